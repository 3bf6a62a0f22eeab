"""``python -m normplug bench``: how fast the ops are, against the memory they must move and against their peers.

A case is an op on the input of one layer of Mask R-CNN R50-FPN or I3D R50, in one dtype and layout. Its result is
compared with a formula in float64 first; what is wrong is reported and not timed. Tables go to stdout, progress to
stderr.

Each row is written to --out when it is measured; stopped by SIGINT (Ctrl-C) or SIGTERM, the tables of what was measured
are printed all the same. The smallest and the largest maps come first, in every dtype.

Exit code: 0 all of ours was right and was timed, or the time was up; 1 something of ours was wrong or failed; with
--cpu-goals, 1 also where a goal is not reached; 2 wrong arguments; 130 or 143 stopped by SIGINT or SIGTERM.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from normplug.bench import compilations, cpu_goals, host, paper
from normplug.bench.against import Other, unpacked
from normplug.bench.cases import OPS
from normplug.bench.facts import conditions, facts
from normplug.bench.peers import PEERS
from normplug.bench.report import markdown
from normplug.bench.runner import DTYPES, LAYOUTS, OURS, Row, Stopped, measure_all, plan
from normplug.ops._registration import has_triton

# Kind of a result -> its table.
TABLES = {
    "ops": markdown,
    "cpu goals": cpu_goals.markdown,
    "host": host.markdown,
    "compilations": compilations.markdown,
    "paper": paper.markdown,
}

__all__ = ["add_arguments", "choose_device", "main", "write_json"]


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto: the first GPU if there is one")
    p.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=", ".join(OPS))
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32", "float16"])
    p.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    p.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, metavar="PEER", help=", ".join(PEERS))
    p.add_argument(
        "--shapes",
        choices=["all", "quick", "tiny"],
        help="all layers, a few of them, or small stand-ins; default: all on a GPU, tiny on a CPU",
    )
    p.add_argument("--seconds", type=float, default=1e9, help="begin no case after this time (default: no limit)")
    p.add_argument("--each", type=float, default=0.1, help="seconds of repetitions per contender and pass")
    p.add_argument("--out", type=Path, help="write all rows there, as JSON")
    p.add_argument("--table", type=Path, metavar="JSON", help="measure nothing: print the tables of what --out wrote")
    p.add_argument(
        "--against",
        metavar="REF",
        help="measure ours as of that commit, branch or tag too, in turns, from a second process: a column of ratios",
    )
    p.add_argument("--commit", help="of normplug, where its folder is no git repository")
    p.add_argument(
        "--host",
        action="store_true",
        help="host time of a layer beside torch's own operations, kernels compiled and not run: takes no GPU",
    )
    p.add_argument(
        "--compilations",
        action="store_true",
        help="kernels that a training run on images of changing sizes makes the compiler work on: takes no GPU",
    )
    p.add_argument(
        "--paper",
        action="store_true",
        help="kernels and bytes of all norm layers of a model in a training step, on paper: takes no GPU",
    )
    p.add_argument(
        "--cpu-goals",
        action="store_true",
        help="the comparison on the CPU: EvoNorm, ConvWS, GN and CBN against their stock counterparts",
    )


def main(args: argparse.Namespace) -> int:
    """Run what the command line asks for."""
    modes = [name for name in ("table", "host", "compilations", "paper", "cpu_goals") if getattr(args, name)]
    if args.against is not None and modes:
        option = modes[0].replace("_", "-")
        print(f"--against {args.against} goes with the ops: leave out --{option}", file=sys.stderr)
        return 2
    if args.table:
        result = json.loads(args.table.read_text())
        print(TABLES[result["kind"]](result))
        return 0
    for kind in ("host", "compilations", "paper"):
        if getattr(args, kind):
            return _measure_without_gpu(kind, args.out)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter, before its first use
    device = choose_device("cpu" if args.cpu_goals else args.device)
    if device is None:
        print(f"--device {args.device} is not to be had: torch {torch.__version__} sees no such GPU", file=sys.stderr)
        return 2
    command = ["python", "-m", "normplug", *sys.argv[1:]]
    found = facts(device, command, args.commit)
    if args.cpu_goals:
        comparisons = cpu_goals.measure(args.seconds)
        result = {"kind": "cpu goals", "facts": found, "rows": [asdict(c) for c in comparisons]}
        write_json(args.out, result)
        print(cpu_goals.markdown(result))
        return int(any(c.reached is False for c in comparisons))
    todo = plan(args.ops, args.shapes or ("all" if device.type == "cuda" else "tiny"), args.dtypes, args.layouts)
    readings = {"before": conditions(device)}
    result = {"kind": "ops", "facts": found, "conditions": readings, "bandwidth": {}, "rows": []}

    def save(rows: list[Row], bandwidth: dict[str, float]) -> None:
        result.update(bandwidth=bandwidth, rows=[asdict(row) for row in rows])
        write_json(args.out, result)

    code = 0
    with contextlib.ExitStack() as stack:
        other = None
        if args.against is not None:
            try:
                folder = stack.enter_context(unpacked(args.against))
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
            other = stack.enter_context(Other(args.against, folder, device))
        try:
            with _stoppable():
                measure_all(todo, device, args.peers, args.seconds, args.each, save, other)
        except Stopped as stopped:
            code = 128 + stopped.args[1]
    readings["after"] = conditions(device)
    write_json(args.out, result)
    print(markdown(result))
    return code or int(any(row["who"] == OURS and row["status"] in ("wrong", "failed") for row in result["rows"]))


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `Stopped`, once: the next one ends the process as ever."""

    def stop(number: int, _frame: object) -> None:
        restore()
        raise Stopped(f"stopped by {signal.Signals(number).name}", number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()


def _measure_without_gpu(kind: str, out: Path | None) -> int:
    module = {"host": host, "compilations": compilations, "paper": paper}[kind]
    if not has_triton():
        print(f"--{kind} takes Triton, which comes with torch on Linux and is not installed here", file=sys.stderr)
        return 2
    result = module.run()
    write_json(out, result)
    print(module.markdown(result))
    return 0


def choose_device(name: str) -> torch.device | None:
    """Return the device of that name, None if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        return None
    if device.type == "cpu":
        return device
    index = device.index or 0
    if device.type != "cuda" or not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def write_json(path: Path | None, result: dict) -> None:
    """Write the result of a run, if anybody wants it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".part")  # whoever stops this finds the last complete file
        whole.write_text(json.dumps(result, indent=1) + "\n")
        whole.replace(path)
