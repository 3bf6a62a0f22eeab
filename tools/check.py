"""Run every check that a change must pass, and stop at the first that is red.

Exit code: 0 all are green, else the code of the first that is not.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = [
    ["ruff", "format", "--check", "."],
    ["ruff", "check", "."],
    ["mypy"],
    ["tools/layer_table.py", "--check"],
    ["tools/make_configs.py", "--check"],
    ["tools/results_table.py", "--check"],
    ["tools/compatibility.py", "--check"],
    ["pytest", "-n", "auto"],
    ["pytest", "-m", "long"],
]


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for step in STEPS:
        print("$", *step, file=sys.stderr, flush=True)
        command = step if step[0].endswith(".py") else ["-m", *step]
        code = subprocess.call([sys.executable, *command], cwd=ROOT)
        if code:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
