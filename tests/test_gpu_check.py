"""tools/gpu_check.sh, with a stand-in for the interpreter of a GPU machine, and the tools around it.

What it does with parts that end well, that fail, that take too long, and what is kept when it is stopped.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECK = ROOT / "tools" / "gpu_check.sh"
STAGES = ["smoke", "ops", "train", "tests", "tune"]
# What a part leaves that was cut short in its middle.
CUT = {"smoke": "smoke.txt", "ops": "ops-bf16.json", "train": "train-mask_rcnn.json"}
CUT |= {"tests": "tests.txt", "tune": "tune.json"}

pytestmark = pytest.mark.slow

# The parts are told by their arguments. Tests are pytest's own, of a file that has one of each outcome. A benchmark
# is a row in its file; WAIT makes it, and the last test, wait to be stopped. REAL runs the true one, on the CPU.
INTERPRETER = """#!/usr/bin/env bash
case "$*" in
    -) cat >/dev/null; echo some-gpu ;;
    "-c import xdist") exit 1 ;;
    "-m normplug env") echo "torch: 9.9" ;;
    "-m pytest"*)
        echo "TF32 $NVIDIA_TF32_OVERRIDE"
        echo $$ >{folder}/pid
        cd {folder} && exec {python} -m pytest -c empty.ini -p no:cacheprovider -v --tb=short -rfE test_outcomes.py ;;
    *--table*)
        [ -z "$REAL" ] || exec {python} "$@"
        echo "table made of ${{@: -1}}" ;;
    *"normplug bench"* | *benchmark_train* | *tune_kernels*)
        echo "progress of $1 $2" >&2
        if [ -n "$REAL" ]; then
            set -- "${{@/#cuda/cpu}}"
            exec {python} "${{@/#quick/tiny}}"
        fi
        out=$(sed -n 's/.*--out \\([^ ]*\\).*/\\1/p' <<<"$*")
        echo '{{"rows": [{{"ms": 0.1}}]}}' >"$out"
        touch {folder}/waiting
        [ -z "$WAIT" ] || exec sleep 60
        [ -z "$FAIL" ] || exit 1
        echo "table printed for $out" ;;
    *) exit 99 ;;
esac
"""
OUTCOMES = """
import os, pathlib, time

def test_passes():
    pass

def test_fails():
    assert not os.environ.get("FAIL"), "the reason of the failure"

def test_waits():
    pathlib.Path({waiting!r}).touch()
    time.sleep(60 if os.environ.get("WAIT") else 0)
"""


@pytest.fixture
def start(tmp_path):
    """Start gpu_check.sh; what it writes is under tmp_path/out."""
    interpreter, started = tmp_path / "python", []
    interpreter.write_text(INTERPRETER.format(python=sys.executable, folder=tmp_path))
    interpreter.chmod(0o755)
    (tmp_path / "empty.ini").write_text("[pytest]\n")
    (tmp_path / "test_outcomes.py").write_text(OUTCOMES.format(waiting=str(tmp_path / "waiting")))

    def start(*arguments, **variables):
        env = {k: v for k, v in os.environ.items() if k not in ("WAIT", "FAIL", "REAL")} | variables
        command = [CHECK, "--out", "out", "--commit", "abc123", *arguments]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(
            subprocess.Popen(
                command, cwd=tmp_path, env=env | {"PYTHON": str(interpreter)}, start_new_session=True, **pipes
            )
        )
        return started[-1]

    # In the background of a script SIGINT is ignored, by whatever is started; no shell can trap it then.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield start
    signal.signal(signal.SIGINT, before)
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_for(process, condition):
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def kept(tmp_path):
    """Return the folder of the only run and its report."""
    (report,) = tmp_path.glob("out/some-gpu/*/report.md")
    return report.parent, report.read_text()


def test_all_stages_in_order(start, tmp_path):
    process = start()
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    folder, text = kept(tmp_path)
    assert stdout == f"{folder / 'report.md'}\n"
    assert text.startswith("# gpu_check smoke ops train tests on some-gpu: all is well\n")
    names = ["smoke.txt", "ops-bf16.json", "ops-fp32.json", "ops-compiled.json", "train-mask_rcnn.json"]
    names += ["train-i3d.json", "tests.txt"]
    assert {f.name for f in folder.iterdir()} == {*names, "report.md", "log.txt"}
    at = [text.index(f"\n## {name.partition('.')[0]}\n") for name in names]
    assert at == sorted(at)
    for name in names:
        assert not name.endswith(".json") or f"table printed for {folder / name}" in text
    tests = (folder / "smoke.txt").read_text()
    assert "torch: 9.9" in tests
    assert "TF32 0" in tests
    assert "test_passes PASSED" in tests
    assert "test_passes PASSED" not in text  # the report has what did not pass, and the summary
    assert text.count("3 passed") == 3  # of smoke, and of both parts of tests
    assert "progress of tools/benchmark_train.py" in (folder / "log.txt").read_text()


def test_parts_that_fail(start, tmp_path):
    """The parts after them run all the same, tables are made of what there is."""
    process = start("smoke", "ops", FAIL="1")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    folder, text = kept(tmp_path)
    assert "gpu_check: failed: kernels (exit code 1)" in stderr
    assert "failed: kernels (exit code 1), ops-bf16 (exit code 1), ops-fp32" in text.splitlines()[0]
    assert "the reason of the failure" in text
    for name in ("ops-bf16", "ops-fp32", "ops-compiled"):
        assert f"table made of {folder / name}.json" in text


def check_cut(folder, text, stage, why):
    """Check that what was measured before the end is there, and that the report tells it."""
    assert why in text.splitlines()[0]
    if stage in ("smoke", "tests"):
        for words in ("test_outcomes.py::test_fails FAILED", "the reason of the failure", "1 failed, 1 passed"):
            assert words in text
            assert words in (folder / CUT[stage]).read_text()
    else:
        assert json.loads((folder / CUT[stage]).read_text())["rows"] == [{"ms": 0.1}]
        assert f"table made of {folder / CUT[stage]}" in text


@pytest.mark.parametrize("name", ["INT", "TERM"])
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_in_the_middle_of_a_stage(stage, name, start, tmp_path):
    process = start(stage, WAIT="1", FAIL="1")
    wait_for(process, (tmp_path / "waiting").exists)
    number = getattr(signal, f"SIG{name}")
    process.send_signal(number)
    began = time.monotonic()
    stdout, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 10  # it ended by INT, not by the KILL that follows
    assert process.returncode == 128 + number
    folder, text = kept(tmp_path)
    assert stdout == f"{folder / 'report.md'}\n"
    check_cut(folder, text, stage, f"(stopped by {name})")
    assert len(list(folder.glob("*.json"))) <= 1  # no part began after it


@pytest.mark.parametrize("stage", ["ops", "tests"])
def test_a_part_that_takes_too_long(stage, start, tmp_path):
    process = start(stage, "--seconds", "5", WAIT="1", FAIL="1")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    folder, text = kept(tmp_path)
    assert "stopped when its time was up" in stderr
    check_cut(folder, text, stage, "(stopped when its time was up)")


def test_killed(start, tmp_path):
    """Nothing can be done any more: what there is tells it."""
    process = start("smoke", "ops", WAIT="1")
    wait_for(process, (tmp_path / "waiting").exists)
    process.kill()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # else the part goes on to its limit
    process.communicate(timeout=30)
    folder, text = kept(tmp_path)
    assert text.startswith(
        "# gpu_check smoke ops on some-gpu: kernels is running, or was killed; before: all is well\n"
    )
    assert "test_passes PASSED" in (folder / "smoke.txt").read_text()


def test_rows_of_the_benchmark_are_kept(start, tmp_path):
    """The true benchmark, on the CPU: its rows are in the file while it runs, and the report has their table."""
    process = start("ops", REAL="1")

    def measured():
        files = list(tmp_path.glob("out/some-gpu/*/ops-bf16.json"))
        return files and json.loads(files[0].read_text())["rows"]

    wait_for(process, measured)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    folder, text = kept(tmp_path)
    rows = json.loads((folder / "ops-bf16.json").read_text())["rows"]
    statuses = {row["status"] for row in rows}
    assert "ok" in statuses
    assert statuses <= {"ok", "unavailable", "not run"}  # the last are those that were still to come
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert "| group_norm_relu | bfloat16 | contiguous |" in text


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        ("gpu_check.sh", ["smok"], "'smok' is no stage and no option; stages are smoke, ops, train, tests and tune"),
        ("gpu_check.sh", ["--seconds", "0"], "--seconds must be a whole number of 1 or more, got '0'"),
        ("gpu_check.sh", ["--seconds", "1.5"], "got '1.5'"),
        ("gpu_check.sh", ["smoke", "--out"], "--out needs a value"),
        ("gpu_wheels.sh", [], "the folder for the wheels was expected, got nothing"),
        ("gpu_wheels.sh", ["--help-me"], "got --help-me"),
        ("target_env.sh", [], "the folder of the environment was expected, got nothing"),
        ("target_env.sh", ["-q"], "got -q"),
    ],
)
def test_wrong_arguments(tool, arguments, words, tmp_path):
    done = subprocess.run([CHECK.with_name(tool), *arguments], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_no_gpu(tmp_path):
    env = dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHON=sys.executable)
    done = subprocess.run([CHECK, "--out", tmp_path / "out"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sees no GPU here" in done.stderr
    assert not (tmp_path / "out").exists()
