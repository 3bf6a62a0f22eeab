"""tools/tune_kernels.py: what a trial is and does, and a run in Triton's interpreter. No number is tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_bench import made_up_result

from normplug.ops._registration import has_triton

if not has_triton():
    pytest.skip("Triton comes with torch on Linux only", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import tune_kernels as tune

from normplug.kernels import _groups, _launch, _passes

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = """
import importlib, json, sys
import torch
import interpreted

class Config:
    def addinivalue_line(self, *_):
        pass

interpreted.pytest_configure(Config)
import tune_kernels as tune
from normplug.bench.shapes import Shape
from normplug.kernels import _passes
trials = [tune.Trial(text) for text in (tune.PRESENT, "TILE=1024,ENOUGH=1", "ON_CHIP=1,LONGEST_RUN=2")]
cases = [(tune.OPS["group_norm_relu"], Shape("tiny", "map", "act", ((1, 64, 4, 6),)), "float32", "channels_last")]
right = tune.check(trials, cases, torch.device("cpu"))
times = tune.measure(trials, cases[0], torch.device("cpu"), 0.001)
_passes.IN_ROWS = 0  # no part is joined
print(json.dumps([right, times, tune.check(trials[2:], cases, torch.device("cpu"))]))
"""


def test_a_trial_changes_what_it_names_and_no_more():
    before = _launch.TILE, _groups.PER_WARP, _passes.ENOUGH
    tune.Trial("TILE=64,PER_WARP=128").use()
    assert (64, 128, before[2]) == (_launch.TILE, _groups.PER_WARP, _passes.ENOUGH)
    tune.Trial("ENOUGH=1").use()
    assert (*before[:2], 1) == (_launch.TILE, _groups.PER_WARP, _passes.ENOUGH)
    tune.Trial(tune.PRESENT).use()
    assert before == (_launch.TILE, _groups.PER_WARP, _passes.ENOUGH)


def test_the_trials_that_come_with_it_are_trials():
    assert len({tune.Trial(text).text for text in tune.TRIALS}) == len(tune.TRIALS)


@pytest.mark.parametrize("text", ["TILE", "TILE=", "TILE=-1", "TILES=3", "Layout=3", "tiling=3", "", "TILE=1,"])
def test_what_is_no_trial_is_said_to_be_none(text):
    with pytest.raises(ValueError, match=r"is no trial: expected NAME=NUMBER.*TILE=4096"):
        tune.Trial(text)


def test_table():
    ms = {tune.PRESENT: {"cold": 2.0, "warm": 1.0}, "TILE=64": {"cold": 1.0, "warm": 0.5}}
    slow = {tune.PRESENT: {"cold": 2.0, "warm": 1.0}, "TILE=64": {"cold": 4.0, "warm": 2.0}}
    result = {"facts": made_up_result([])["facts"], "trials": list(ms), "wrong": ["TILE=64: gn: off"]}
    text = tune.markdown(result | {"rows": [{"case": "a", "ms": ms}, {"case": "b", "ms": slow}]})
    assert "1.000" in text
    assert "0.50 a" in text
    assert "2.00 b" in text
    assert "- TILE=64: gn: off" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 2
    assert "sees no GPU" in capsys.readouterr().err
    assert tune.main(["TILES=3"]) == 2
    assert "is no trial" in capsys.readouterr().err


@pytest.mark.slow
def test_trials_are_checked_and_timed():
    env = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tools"))),
    }
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    right, times, wrong = json.loads(done.stdout.splitlines()[-1])
    assert right == []
    assert all(t["cold"] > 0 for t in times.values())
    assert len(times) == 3
    assert len(wrong) == 1
    assert wrong[0].startswith("ON_CHIP=1,LONGEST_RUN=2: group_norm_relu")
