"""Write the table of layers into README.md, from the classes and their docstrings.

Exit code: 0 the table is (now) fresh; 1 with --check: it is stale.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from normplug.__main__ import COLUMNS, layer_rows
from normplug.reporting import markdown_table

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- layers: python tools/layer_table.py -->", "<!-- end of layers -->"


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--check", action="store_true", help="change nothing, tell whether the table is fresh")
    args = p.parse_args(argv)
    text = README.read_text()
    head, rest = text.split(BEGIN)
    fresh = f"{head}{BEGIN}\n\n{markdown_table([COLUMNS, *layer_rows()])}\n\n{END}{rest.split(END)[1]}"
    if args.check:
        if fresh != text:
            print("README.md: the table of layers is stale; run python tools/layer_table.py", file=sys.stderr)
        return int(fresh != text)
    README.write_text(fresh)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
