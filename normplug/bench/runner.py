"""Runs the cases: each is checked, then timed, ours and all peers in turns; what fails is a row that says so."""

import contextlib
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from normplug.bench.cases import OPS, Op, Problem, count_bytes, make_problem
from normplug.bench.measure import Timing, compare, copy_bandwidth, memory, run, time_in_turns
from normplug.bench.peers import Contender, peers_of
from normplug.bench.shapes import Shape, select

__all__ = ["DTYPES", "LAYOUTS", "OURS", "Row", "measure_all", "measure_case", "plan"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("contiguous", "channels_last")
PASSES = ("forward", "forward+backward")
OURS = "normplug"


@dataclass
class Row:
    """One contender in one case and pass; without a time where status is not 'ok'."""

    op: str
    model: str
    place: str
    shape: list[list[int]]
    dtype: str
    layout: str
    direction: str  # one of PASSES
    who: str
    status: str = "ok"  # or wrong, failed, unavailable, not run
    message: str = ""
    bytes: int = 0  # that had to move
    ms: float | None = None
    ms_low: float | None = None  # 20th percentile
    ms_high: float | None = None  # 80th
    repetitions: int = 0
    host_ms: float | None = None
    gb_per_s: float | None = None
    copy_fraction: float | None = None
    peak_bytes: int | None = None  # beyond the inputs, in forward and backward
    kept_bytes: int | None = None  # between forward and backward, the output among them


Case = tuple[Op, Shape, str, str]


def plan(ops: Sequence[str], shapes: str, dtypes: Sequence[str], layouts: Sequence[str]) -> list[Case]:
    """Return the cases, ordered so that a run cut short has something of everything: by shape, dtype, op, layout."""
    chosen = [(i, op, shape) for op in ops for i, shape in enumerate(select(shapes, OPS[op].role))]
    ranked = [
        ((i, dtypes.index(dtype), list(OPS).index(op), layouts.index(layout)), (OPS[op], shape, dtype, layout))
        for (i, op, shape), dtype, layout in itertools.product(chosen, dtypes, layouts)
    ]
    return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]


def measure_all(
    todo: Sequence[Case],
    device: torch.device,
    peers: Sequence[str],
    seconds: float,
    each: float,
    save: Callable[[list[Row], dict[str, float]], None] = lambda *_: None,
) -> tuple[list[Row], dict[str, float]]:
    """Run cases until the time is up; return rows, and the copy bandwidth before and after.

    Args:
        todo: The cases.
        device: Where.
        peers: Names of the peers to run.
        seconds: Budget; a case that has begun is finished, and what does not fit is 'not run'.
        each: Seconds of repetitions per contender and pass.
        save: Called with what there is after each case, in case there is no end.
    """
    end = time.monotonic() + seconds
    copy = copy_bandwidth(device)
    bandwidth = {"copy_gb_per_s": copy}
    print(f"copy bandwidth: {copy:.1f} GB/s", file=sys.stderr)
    rows: list[Row] = []
    with lone_process_group(device, any(op.name.startswith("sync") for op, *_ in todo)):
        for i, case in enumerate(todo, 1):
            if time.monotonic() > end:
                rows += [row for late in todo[i - 1 :] for row in _rows(late, OURS, "not run", "the time was up")]
                break
            op, shape, dtype, layout = case
            print(f"[{i}/{len(todo)}] {op.name}, {shape}, {dtype}, {layout}", file=sys.stderr, flush=True)
            rows += measure_case(case, device, peers, each, copy)
            save(rows, bandwidth)
    bandwidth["copy_gb_per_s_at_the_end"] = copy_bandwidth(device)
    save(rows, bandwidth)
    return rows, bandwidth


def measure_case(case: Case, device: torch.device, peers: Sequence[str], each: float, copy: float) -> list[Row]:
    """Check and time ours and the peers on one case."""
    op, shape, dtype, layout = case
    if any("compile" in peer for peer in peers):
        torch._dynamo.reset()  # else the ninth shape of a function is no longer compiled
    try:
        problem = make_problem(op, shape, DTYPES[dtype], layout == "channels_last", device)
    except Exception as error:  # one case, out of memory say, must not hide the others
        return _rows(case, OURS, "failed", _brief(error))
    makers: dict[str, Callable[[], Contender]] = {
        OURS: lambda: Contender(OURS, lambda: op.ours(**problem.tensors), problem.tensors)
    }
    makers |= peers_of(problem, peers)
    rows: list[Row] = []
    ready: dict[str, Contender] = {}
    for name, make in makers.items():
        status, message = "wrong", ""
        try:
            contender = make()
            message = compare(problem, contender, ours=name == OURS)
        except Exception as error:
            missing = name != OURS or isinstance(error, ImportError)
            status, message = "unavailable" if missing else "failed", _brief(error)
        if message:
            rows += _rows(case, name, status, message)
            if name == OURS:
                break
        else:
            ready[name] = contender
    problem.reference.clear()
    try:
        return rows + _timed(case, problem, ready, device, each, copy)
    except Exception as error:
        return rows + [row for name in ready for row in _rows(case, name, "failed", _brief(error))]


def _timed(
    case: Case, problem: Problem, ready: dict[str, Contender], device: torch.device, each: float, copy: float
) -> list[Row]:
    used = {name: memory(contender, problem.dys, device) for name, contender in ready.items()}
    forward = time_in_turns({name: c.call for name, c in ready.items()}, device, each)
    both = time_in_turns({name: lambda c=c: run(c, problem.dys) for name, c in ready.items()}, device, each)
    rows = []
    for name in ready:
        for row, timing in zip(_rows(case, name), (forward[name], both[name]), strict=True):
            _fill(row, timing, copy)
            row.peak_bytes, row.kept_bytes = used[name]
            rows.append(row)
    return rows


def _fill(row: Row, timing: Timing, copy: float) -> None:
    row.ms, row.ms_low, row.ms_high = timing.median, timing.low, timing.high
    row.repetitions, row.host_ms = timing.repetitions, timing.host
    row.gb_per_s = row.bytes / timing.median / 1e6
    row.copy_fraction = row.gb_per_s / copy


def _rows(case: Case, who: str, status: str = "ok", message: str = "") -> list[Row]:
    op, shape, dtype, layout = case
    dims = [list(d) for d in shape.dims]
    return [
        Row(
            op.name,
            shape.model,
            shape.place,
            dims,
            dtype,
            layout,
            direction,
            who,
            status,
            message,
            count_bytes(op, shape, DTYPES[dtype], direction != "forward"),
        )
        for direction in PASSES
    ]


def _brief(error: Exception) -> str:
    text = re.sub(r" \(/\S*\)", "", " ".join(str(error).split()))  # where a module lies is nobody's business
    return f"{type(error).__name__}: {text[:200]}"


@contextlib.contextmanager
def lone_process_group(device: torch.device, wanted: bool) -> Iterator[None]:
    """Have a process group of this process alone, if wanted and there is none: SyncBN's collectives need one."""
    wanted = wanted and dist.is_available() and not dist.is_initialized()
    if wanted:
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        except Exception as error:  # then the cases that need it say so
            print(f"no process group: {_brief(error)}", file=sys.stderr)
    try:
        yield
    finally:
        if wanted and dist.is_initialized():
            dist.destroy_process_group()
