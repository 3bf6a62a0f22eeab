"""Make the data sets of handwritten digits that configs/digits/ train on.

The configs make their set themselves on first use: this tool is for other seeds and sizes, and for machines where
training starts many processes at once. Prints the folder of each set.

Exit code: 0 the sets are there; 1 a set could not be written; 2 wrong arguments, or something else is in its place.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from normplug.openmmlab import digits


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", choices=[*digits.TASKS, "all"], default="all")
    p.add_argument("--out", default="data/digits", metavar="DIR", help="data_root of the configs (default %(default)s)")
    p.add_argument("--seed", type=int, help=defaults("seed"))
    p.add_argument("--train", type=int, metavar="N", help=f"training samples ({defaults('num_train')})")
    p.add_argument("--val", type=int, metavar="N", help=f"validation samples ({defaults('num_val')})")
    p.add_argument("--force", action="store_true", help="make the set anew, also over one of another seed or size")
    args = p.parse_args(argv)
    for task in digits.TASKS if args.task == "all" else [args.task]:
        try:
            sizes = dict(seed=args.seed, num_train=args.train, num_val=args.val)
            made = digits.make(task, args.out, **sizes, force=args.force, track=progress)
        except (OSError, RuntimeError, ValueError) as error:
            print(f"make_digits.py: {error}", file=sys.stderr)
            return 2 if isinstance(error, ValueError) else 1
        print(f"{Path(args.out, task)}: {'made' if made else 'was there'}")
    return 0


def defaults(name: str) -> str:
    return "default " + ", ".join(f"{task} {values[name]}" for task, values in digits.DEFAULTS.items())


def progress(numbers: Iterable[int], title: str) -> Iterable[int]:
    return tqdm(numbers, desc=title, file=sys.stderr, leave=False)


if __name__ == "__main__":
    raise SystemExit(main())
