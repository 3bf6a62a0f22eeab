"""Suites of toolkits with and without normplug, in small: what is lost, gained, crashed or a matter of chance."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "peer_suites.py"


def peer_suites(*arguments) -> subprocess.CompletedProcess:
    # A terminal's colours would be in the output of the tests' own pytest
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=280, env=os.environ
    )


@pytest.fixture
def checkouts(tmp_path):
    (tmp_path / "mmengine" / "mmengine").mkdir(parents=True)
    version = importlib.metadata.version("mmengine")
    (tmp_path / "mmengine" / "mmengine" / "version.py").write_text(f"__version__ = '{version}'\n")
    (tmp_path / "mmengine" / "note.txt").write_text("beside the tests")
    tests = {
        "test_registry.py": (
            "import pathlib, pytest\n"
            "from mmengine.registry import MODELS\n"
            "def test_stock(): assert 'CBN' not in MODELS.module_dict, 'there is one'\n"
            "def test_ours(): assert 'CBN' in MODELS.module_dict\n"
            "def test_installed(): import mmengine; assert mmengine.Config\n"
            "def test_otherwise(): assert not (1 / 0 if 'CBN' in MODELS.module_dict else 1)\n"
            "def test_beside(): assert pathlib.Path('note.txt').read_text() == 'beside the tests'\n"
            "@pytest.mark.skip\n"
            "def test_skipped(): pass\n"
        ),
        "test_chance.py": (
            "from pathlib import Path\n"
            f"runs = Path({str(tmp_path)!r}, 'runs')\n"
            "def test_chance():\n"
            "    runs.write_text((runs.read_text() if runs.exists() else '') + 'x')\n"
            "    assert len(runs.read_text()) != 2\n"
        ),
        "test_crash.py": (
            "import os\nfrom mmengine.registry import MODELS\ndef test_first(): pass\n"
            "def test_abort():\n    if 'CBN' in MODELS.module_dict: os.abort()\n"
            "def test_last(): pass\n"
        ),
        "test_pickle.py": (
            "import pathlib, torch\n"
            "def test_load(tmp_path):\n"
            "    torch.save(pathlib.Path('x'), tmp_path / 'x')\n"
            "    assert torch.load(tmp_path / 'x').name == 'x'\n"
        ),
        "test_hang.py": "import time\ndef test_hang(): time.sleep(1000)\n",
        "data/test_not.py": "raise AssertionError('data')\n",
    }
    for name, text in tests.items():
        file = tmp_path / "mmengine" / "tests" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


@pytest.mark.slow
@pytest.mark.long
def test_what_changes_is_told(checkouts):
    done = peer_suites(checkouts, "--timeout", 20, "--json", checkouts / "all.json")
    assert done.returncode == 1, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[0:4] == [
        "",
        "mmengine",
        "without  8 passed, 2 failed, 1 skipped, 1 timeout",
        "with     4 passed, 1 crashed, 4 failed, 1 skipped, 1 timeout",
    ]
    assert [re.split(r" in {| Weights", line)[0] for line in lines[4:]] == [  # what follows is not ours
        "gained: tests/test_registry.py::test_ours: failed -> passed",
        "AssertionError: assert 'CBN'",
        "lost: tests/test_crash.py::test_abort: passed -> crashed",
        "lost: tests/test_crash.py::test_last: passed -> absent",
        "lost: tests/test_pickle.py::test_load: passed -> failed",
        "_pickle.UnpicklingError:",
        "lost: tests/test_registry.py::test_stock: passed -> failed",
        "AssertionError: there is one",
        "1 differed once and not again: tests/test_chance.py::test_chance",
        "1 fail with AssertionError -> with ZeroDivisionError: tests/test_registry.py::test_otherwise",
    ]
    report = json.loads((checkouts / "all.json").read_text())["mmengine"]
    assert report["with"]["ends"] == {"tests/test_crash.py": "crashed", "tests/test_hang.py": "timeout"}
    assert not list(checkouts.glob("**/.pytest_cache"))


@pytest.mark.slow
def test_nothing_changes(checkouts):
    done = peer_suites(checkouts, "--only", "mmengine/tests/test_chance.py")
    assert done.returncode == 0, done.stderr


def test_arguments(checkouts):
    def said(*arguments):
        done = peer_suites(*arguments)
        assert done.returncode == 2
        return done.stderr.splitlines()[-1]

    assert "has none of mmengine/tests, mmcv/tests" in said(checkouts / "mmengine")
    assert "--only mmdet: there is no such path" in said(checkouts, "--only", "mmdet")
    assert "--timeout is a number of seconds above 0, got 0" in said(checkouts, "--timeout", "0")
    (checkouts / "mmengine" / "mmengine" / "version.py").write_text("__version__ = '0.1'\n")
    assert "is version 0.1, and" in said(checkouts)
