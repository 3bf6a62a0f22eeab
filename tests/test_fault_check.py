"""The campaign of faults in small: it holds here, and it tells when something does not hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "fault_check.py"


def campaign(*arguments, **env):
    return subprocess.run(
        [sys.executable, TOOL, *arguments], capture_output=True, text=True, env=os.environ | env, timeout=300
    )


@pytest.mark.slow
def test_every_fault_of_one_process_is_held():
    done = campaign("--norms", "CBN", "--trials", "1", "--faults", "save", "write", "full", "two")
    assert done.stdout.endswith("4 trials, 4 held\n"), done.stdout + done.stderr
    assert done.returncode == 0


def test_arguments():
    done = campaign("--trials", "0")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "fault_check.py: error: --trials must be 1 or more, got 0",
    )
