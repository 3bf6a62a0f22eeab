"""Compare two checkpoints on the same data: metrics and their noise, cost, and what the norms are doing.

Both models are evaluated on the test data of A's config, with A's test pipeline and evaluator; each keeps its own data
preprocessor. Writes report.md, report.html, report.json and PNGs, and prints the metrics with their differences; a
difference whose 95% bootstrap interval over images or clips holds zero is called inside the noise. Detectors with
CocoMetric and recognizers with AccMetric can be compared. With --more-a and --more-b the metrics are compared over
several seeds too.

Exit code: 0 done; 2 wrong arguments, or two models that cannot be compared.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import normplug  # noqa: F401  registers the layers, and lets the toolkits import
from normplug.bench import choose_device
from normplug.bench.facts import facts
from normplug.openmmlab.cli import add_cfg_options
from normplug.openmmlab.mistakes import add_debug, answered


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for letter in "AB":
        p.add_argument(f"config_{letter.lower()}", type=Path, metavar=f"{letter}.py", help=f"config of model {letter}")
        p.add_argument(
            f"checkpoint_{letter.lower()}", type=Path, metavar=f"{letter}.pth", help=f"checkpoint of model {letter}"
        )
    for letter in "AB":
        p.add_argument(
            f"--more-{letter.lower()}",
            type=Path,
            nargs="+",
            default=[],
            metavar=f"{letter}2.pth",
            help=f"checkpoints of {letter}.py trained with other seeds: the metrics are compared over all",
        )
    p.add_argument("--out", type=Path, metavar="DIR", help="default: work_dirs/compare/<A>_vs_<B>")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto: the first GPU if there is one")
    p.add_argument(
        "--share-data",
        action="store_true",
        help="keep predictions and measurements in --cache: a rerun takes both from there and runs no model; so does "
        "another comparison on the same data with the predictions of a model it shares. What they depend on (config, "
        "checkpoint, data, code, versions, device) is their key, so old ones are never used",
    )
    p.add_argument("--cache", type=Path, metavar="DIR", help="default: work_dirs/compare/cache; implies --share-data")
    p.add_argument(
        "--batch-sizes",
        type=int,
        nargs="*",
        default=[1, 2, 4, 8],
        metavar="N",
        help="for time and memory (default: 1 2 4 8); none after the flag leaves them out",
    )
    p.add_argument("--seconds", type=float, default=3.0, help="of timing per batch size and model (default: 3)")
    p.add_argument("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap (default: 1000)")
    add_cfg_options(p, "both configs")
    add_debug(p)
    args = p.parse_args(argv)
    if args.resamples < 1:
        p.error(f"--resamples must be 1 or more, got {args.resamples}")
    if any(size < 1 for size in args.batch_sizes):
        p.error(f"--batch-sizes must be 1 or more, got {' '.join(map(str, args.batch_sizes))}")
    if args.share_data and args.cache is None:
        args.cache = Path("work_dirs", "compare", "cache")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter, before its first use
    device = choose_device(args.device)
    if device is None:
        print(f"compare_checkpoints.py: --device {args.device} is not to be had here; use cpu", file=sys.stderr)
        return 2
    # Imports the toolkits: --help and wrong arguments need not wait for them.
    from normplug.openmmlab.comparison import report
    from normplug.openmmlab.comparison.predictions import Cache
    from normplug.openmmlab.comparison.run import compare_checkpoints
    from normplug.openmmlab.comparison.sides import Side
    from normplug.openmmlab.training_runs import toolkit_versions

    with answered("compare_checkpoints.py", args.debug) as answer:
        a = Side("A", args.config_a, args.checkpoint_a, args.cfg_options)
        b = Side("B", args.config_b, args.checkpoint_b, args.cfg_options)
        more = [
            [Side(letter, config, checkpoint, args.cfg_options) for checkpoint in checkpoints]
            for letter, config, checkpoints in (("A", args.config_a, args.more_a), ("B", args.config_b, args.more_b))
        ]
        comparison = compare_checkpoints(
            a,
            b,
            device,
            batch_sizes=sorted(set(args.batch_sizes)),
            resamples=args.resamples,
            seconds=args.seconds,
            cache=Cache(args.cache),
            more=more,
        )
        command = ["python", "tools/compare_checkpoints.py", *(sys.argv[1:] if argv is None else argv)]
        folder = args.out or Path("work_dirs", "compare", "_vs_".join(comparison.names))
        found = facts(device, command)
        versions = {name: version for name, version in found.pop("versions").items() if version} | toolkit_versions()
        paths = report.write(comparison, folder, found | versions)
        print(report.brief(comparison))
        print("", *paths, sep="\n")
    return answer.code


if __name__ == "__main__":
    raise SystemExit(main())
