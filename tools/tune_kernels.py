"""Try other values of the constants by which kernels are cut, on a GPU, against those that they have.

Each trial changes some constants of normplug/kernels, TILE=4096 or ROW_BYTES=64,PER_WARP=256 for example; without any,
those of TRIALS. First all kernels are compiled, in as many processes as there are cores, and what they compute is
compared with a formula in float64; then all trials take turns on every shape. The table says what each takes of the
time of the present constants, forward and backward: the geometric mean over the shapes, its best and its worst.

Exit code: 0 all were right; 1 a trial computed something wrong or failed; 2 no GPU, or wrong arguments.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from normplug.bench import choose_device, write_json
from normplug.bench.cases import OPS, make_problem
from normplug.bench.facts import describe, facts
from normplug.bench.measure import Batch, batch_of, brief, compare, run, time_in_turns
from normplug.bench.peers import Contender
from normplug.bench.runner import DTYPES, LAYOUTS, Case, plan
from normplug.openmmlab.mistakes import add_debug, answered
from normplug.reporting import markdown_table

PRESENT = "present"
TRIALS = [
    *(f"PROGRAMS_PER_SM={n}" for n in (4, 8)),
    *(f"PROGRAMS_PER_SM_CHANNELS_LAST={n}" for n in (2, 3, 6, 8)),
    *(f"WIDEST={n}" for n in (32, 128)),
    *(f"TILE={n}" for n in (1024, 4096)),
    *(f"ENOUGH={n}" for n in (16, 64)),
    *(f"LONGEST_RUN={n}" for n in (4, 16)),
    *(f"ROW_BYTES={n}" for n in (16, 64, 128)),
    "PER_WARP=1024",
    "ROW_BYTES=64,PER_WARP=256",
]
OPS_TRIED = ["group_norm_relu", "group_norm_add_relu"]


class Trial:
    """Constants with other values."""

    def __init__(self, text: str) -> None:
        """Read "NAME=NUMBER,..."; raise ValueError for what is no constant of the kernels."""
        self.text, self.values = text, {}
        for part in text.split(",") if text != PRESENT else []:
            name, _, number = part.partition("=")
            known = [module for module in _modules() if isinstance(getattr(module, name, None), int)]
            if not known or not name.isupper() or not number.isdigit():
                raise ValueError(
                    f"{text!r} is no trial: expected NAME=NUMBER, or several with commas between, of constants in "
                    f"normplug/kernels, such as TILE=4096"
                )
            self.values[known[0], name] = type(getattr(known[0], name))(int(number))

    def use(self) -> None:
        """Give all constants their values: these, and to the others the present ones."""
        from normplug.kernels import _launch

        for (module, name), value in {**_present, **self.values}.items():
            _present.setdefault((module, name), getattr(module, name))
            setattr(module, name, value)
        _launch.forget_plans()


# What a trial has changed, as it was before.
_present: dict[tuple[Any, str], Any] = {}


def _modules() -> tuple[Any, ...]:
    from normplug.kernels import _groups, _launch, _passes

    return _launch, _passes, _groups


def check(trials: Sequence[Trial], cases: Sequence[Case], device: torch.device) -> list[str]:
    """Run every trial on every case once; return sentences on those that failed or computed something wrong."""
    found = []
    for trial, case in itertools.product(trials, cases):
        op, shape, dtype, layout = case
        trial.use()
        try:
            problem = make_problem(op, shape, DTYPES[dtype], layout == "channels_last", device)
            wrong = compare(problem, _ours(case, problem), ours=True)
        except Exception as error:
            wrong = brief(error)
        if wrong:
            found.append(f"{trial.text}: {op.name}, {shape}, {dtype}, {layout}: {wrong}")
    return found


def _ours(case: Case, problem: Any) -> Contender:
    return Contender("ours", lambda: case[0].ours(**problem.tensors), problem.tensors)


def measure(trials: Sequence[Trial], case: Case, device: torch.device, seconds: float) -> dict[str, dict[str, float]]:
    """Return milliseconds of forward and backward of every trial, with a cold and, on a GPU, a warm L2 cache."""
    op, shape, dtype, layout = case
    problem = make_problem(op, shape, DTYPES[dtype], layout == "channels_last", device)
    ours = _ours(case, problem)
    batches = {trial.text: _batch(trial, lambda: run(ours, problem.dys), device) for trial in trials}
    timings = time_in_turns(batches, device, seconds)
    return {name: {"cold": t.median, "warm": t.warm or t.median} for name, t in timings.items()}


def _batch(trial: Trial, call: Callable[[], Any], device: torch.device) -> Batch:
    inner = batch_of(call, device)

    def batch(count: int, host_ms: float, cold: bool) -> tuple[list[float], list[float]]:
        trial.use()
        call()  # plans, and finds its kernels
        return inner(count, host_ms, cold)

    return batch


def markdown(result: dict) -> str:
    """Return the report of a run."""
    rows = result["rows"]
    lines = []
    for text in result["trials"]:
        ratios = [row["ms"][text][k] / row["ms"][PRESENT][k] for row in rows for k in ("cold", "warm")]
        by_case = {row["case"]: row["ms"][text]["cold"] / row["ms"][PRESENT]["cold"] for row in rows}
        best, worst = min(by_case, key=by_case.__getitem__), max(by_case, key=by_case.__getitem__)
        mean = statistics.geometric_mean(ratios)
        lines.append([text, f"{mean:.3f}", f"{by_case[best]:.2f} {best}", f"{by_case[worst]:.2f} {worst}"])
    lines.sort(key=lambda line: float(line[1]))
    parts = ["# Constants of the kernels", "\n".join(describe(result["facts"]))]
    parts.append(markdown_table([["constants", "time / present", "best", "worst"], *lines]))
    if result["wrong"]:
        parts += ["## Wrong", "\n".join(f"- {line}" for line in result["wrong"])]
    return "\n\n".join(parts) + "\n"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("trials", nargs="*", default=TRIALS, metavar="NAME=NUMBER", help="default: those of TRIALS")
    p.add_argument("--ops", nargs="+", choices=list(OPS), default=OPS_TRIED, metavar="OP")
    p.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16"])
    p.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    p.add_argument("--shapes", choices=["all", "quick", "tiny"], default="quick")
    p.add_argument("--device", default="cuda", help="cuda or cuda:N")
    p.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that compile")
    p.add_argument("--each", type=float, default=0.02, help="seconds of repetitions per trial and shape")
    p.add_argument("--seconds", type=float, default=1e6, help="begin no shape after this time")
    p.add_argument("--out", type=Path, help="write all numbers there, as JSON, when they come")
    p.add_argument("--table", type=Path, metavar="JSON", help="run nothing: print the table of what --out wrote")
    p.add_argument("--commit", help="of normplug, where its folder is no git repository")
    p.add_argument("--part", nargs=2, type=int, help=argparse.SUPPRESS)  # of the checks, in a process of its own
    add_debug(p)
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    with answered("tune_kernels.py", args.debug) as answer:
        answer.code = execute(args, sys.argv[1:] if argv is None else list(argv))
    return answer.code


def execute(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Do what the arguments, which are also ``argv`` as it was typed, ask for. Returns the exit code."""
    if args.table:
        print(markdown(json.loads(args.table.read_text())))
        return 0
    trials = [Trial(text) for text in dict.fromkeys([PRESENT, *args.trials])]
    device = choose_device(args.device)
    if device is None or device.type != "cuda":
        print(f"tune_kernels.py: torch {torch.__version__} sees no GPU as {args.device!r}", file=sys.stderr)
        return 2
    cases = plan(args.ops, args.shapes, args.dtypes, args.layouts)
    if args.part:
        i, n = args.part
        print(json.dumps([line for case in cases[i::n] for line in check(trials, [case], device)]))
        return 0
    end = time.monotonic() + args.seconds
    result: dict[str, Any] = {
        "kind": "constants of the kernels",
        "facts": facts(device, ["python", "tools/tune_kernels.py", *argv], args.commit),
        "trials": [trial.text for trial in trials],
        "wrong": _checked_in_parts(argv, min(args.jobs, len(cases))),
        "rows": [],
    }
    for case in cases:
        if time.monotonic() > end:
            print("the time was up", file=sys.stderr)
            break
        name = f"{case[0].name}, {case[1]}, {case[2]}, {case[3]}"
        print(name, file=sys.stderr, flush=True)
        result["rows"].append({"case": name, "ms": measure(trials, case, device, args.each)})
        write_json(args.out, result)
    print(markdown(result) if result["rows"] else "Nothing was measured.")
    return int(bool(result["wrong"]))


def _checked_in_parts(argv: Sequence[str], number: int) -> list[str]:
    """Check in processes of their own, which leave the kernels in Triton's cache; return what was wrong."""
    print(f"compiling and checking in {number} processes", file=sys.stderr, flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--part"]
    parts = [
        subprocess.Popen([*command, str(i), str(number)], stdout=subprocess.PIPE, text=True) for i in range(number)
    ]
    wrong = []
    for part in parts:
        out, _ = part.communicate()
        lines = out.splitlines()
        wrong += (
            json.loads(lines[-1]) if part.returncode == 0 and lines else [f"a process ended with {part.returncode}"]
        )
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
