"""Runs the cases: each is checked, then timed, ours and all peers in turns; what fails is a row that says so."""

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from normplug.bench.against import Other
from normplug.bench.cases import OPS, Op, Problem, count_bytes, make_problem
from normplug.bench.measure import (
    Batch,
    Timing,
    batch_of,
    brief,
    compare,
    copy_bandwidth,
    lone_process_group,
    memory,
    run,
    time_in_turns,
)
from normplug.bench.peers import Contender, peers_of
from normplug.bench.shapes import Shape, select

__all__ = ["AGAIN", "DTYPES", "LAYOUTS", "OURS", "PASSES", "Row", "Stopped", "measure_all", "measure_case", "plan"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("contiguous", "channels_last")
PASSES = ("forward", "forward+backward")
OURS = "normplug"
AGAIN = "normplug again"  # the same code and tensors, timed a second time: what differs is noise


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
    warm_ms: float | None = None  # with a warm L2 cache; the other times of a GPU are with a cold one
    gb_per_s: float | None = None
    copy_fraction: float | None = None
    peak_bytes: int | None = None  # beyond the inputs, in forward and backward
    kept_bytes: int | None = None  # between forward and backward, the output among them


Case = tuple[Op, Shape, str, str]
Save = Callable[[list[Row], dict[str, float]], None]


class Stopped(BaseException):
    """A signal has come: a sentence and its number. Not an Exception, which would be a case that failed."""


@dataclass
class Entry:
    """A contender whose results were right: what it keeps, and how to repeat each pass."""

    memory: Callable[[], tuple[int, int]]
    batches: dict[str, Batch]


def plan(ops: Sequence[str], shapes: str, dtypes: Sequence[str], layouts: Sequence[str]) -> list[Case]:
    """Return the cases, ordered so that a run cut short has something of everything.

    The smallest and the largest map of each op come first, in each dtype, and with them one layout each, by turns; then
    the same in the other layout; then the maps between.
    """
    ranked = []
    for op in ops:
        chosen = sorted(select(shapes, OPS[op].role), key=lambda shape: sum(map(prod, shape.dims)))
        chosen = [*chosen[:1], *chosen[:0:-1]]  # the smallest, the largest, and down
        for (i, shape), (d, dtype), turn in itertools.product(
            enumerate(chosen), enumerate(dtypes), range(len(layouts))
        ):
            layout = layouts[(i + d + turn) % len(layouts)]
            rank = (i // 2, turn, d, i % 2, list(OPS).index(op))
            ranked.append((rank, (OPS[op], shape, dtype, layout)))
    return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]


def measure_all(
    todo: Sequence[Case],
    device: torch.device,
    peers: Sequence[str],
    seconds: float,
    each: float,
    save: Save = lambda *_: None,
    other: Other | None = None,
) -> tuple[list[Row], dict[str, float]]:
    """Run cases until the time is up; return rows, and the copy bandwidth before and after.

    Args:
        todo: The cases.
        device: Where.
        peers: Names of the peers to run.
        seconds: Budget; a case that has begun is finished, and what does not fit is 'not run'.
        each: Seconds of repetitions per contender and pass.
        save: Called with what there is whenever a row has come, in case there is no end.
        other: Another version of ours, to be measured too.

    Raises:
        Stopped: After the rows that were not measured have been saved as 'not run'.
    """
    end = time.monotonic() + seconds
    rows: list[Row] = []
    bandwidth: dict[str, float] = {}
    done = begun = 0  # cases that are done, rows before the one at work

    def leave(why: str) -> None:
        """Say of each pass that ours has no row of that it was not run."""
        passes = [row.direction for row in rows[begun:] if row.who == OURS]
        late = [row for case in todo[done:] for row in _rows(case, OURS, "not run", why)]
        rows.extend(late[len(passes) :])
        save(rows, bandwidth)

    try:
        copy = bandwidth["copy_gb_per_s"] = copy_bandwidth(device)
        print(f"copy bandwidth: {copy:.1f} GB/s", file=sys.stderr)
        with lone_process_group(device, any(op.name.startswith("sync") for op, *_ in todo)):
            for case in todo:
                if time.monotonic() > end:
                    leave("the time was up")
                    break
                op, shape, dtype, layout = case
                print(f"[{done + 1}/{len(todo)}] {op.name}, {shape}, {dtype}, {layout}", file=sys.stderr, flush=True)
                for measured in measure_case(case, device, peers, each, copy, other):
                    rows += measured
                    save(rows, bandwidth)
                done, begun = done + 1, len(rows)
        bandwidth["copy_gb_per_s_at_the_end"] = copy_bandwidth(device)
    except Stopped as stopped:
        leave(stopped.args[0])
        raise
    save(rows, bandwidth)
    return rows, bandwidth


def measure_case(
    case: Case, device: torch.device, peers: Sequence[str], each: float, copy: float, other: Other | None = None
) -> Iterator[list[Row]]:
    """Check and time ours and the peers on one case; give rows as they come."""
    op, shape, dtype, layout = case
    if any("compile" in peer for peer in peers):
        torch._dynamo.reset()  # else the ninth shape of a function is no longer compiled
    try:
        problem = make_problem(op, shape, DTYPES[dtype], layout == "channels_last", device)
    except Exception as error:  # one case, out of memory say, must not hide the others
        yield _rows(case, OURS, "failed", brief(error))
        return
    makers: dict[str, Callable[[], Contender]] = {
        OURS: lambda: Contender(OURS, lambda: op.ours(**problem.tensors), problem.tensors)
    }
    makers |= peers_of(problem, peers)
    ready: dict[str, Entry] = {}
    for name, make in makers.items():
        status, message = "wrong", ""
        try:
            contender = make()
            message = compare(problem, contender, ours=name == OURS)
        except Exception as error:
            missing = name != OURS or isinstance(error, ImportError)
            status, message = "unavailable" if missing else "failed", brief(error)
        if message:
            yield _rows(case, name, status, message)
            if name == OURS:
                break
        else:
            ready[name] = _entry(contender, problem, device)
    problem.reference.clear()
    if OURS in ready:
        ready[AGAIN] = ready[OURS]
        if other is not None:
            status, message = "wrong", ""
            try:
                message = other.ask("prepare", op.name, shape, DTYPES[dtype], layout == "channels_last")
            except Exception as error:
                status, message = "failed", brief(error)
            if message:
                yield _rows(case, other.name, status, message)
            else:
                batches = {direction: other.batch(direction) for direction in PASSES}
                ready[other.name] = Entry(lambda: other.ask("memory"), batches)
    yield from _timed(case, ready, device, each, copy)


def _entry(contender: Contender, problem: Problem, device: torch.device) -> Entry:
    calls = (contender.call, lambda: run(contender, problem.dys))
    batches = {direction: batch_of(call, device) for direction, call in zip(PASSES, calls, strict=True)}
    return Entry(lambda: memory(contender, problem.dys, device), batches)


def _timed(case: Case, ready: dict[str, Entry], device: torch.device, each: float, copy: float) -> Iterator[list[Row]]:
    left = {name: dict(zip(PASSES, _rows(case, name), strict=True)) for name in ready}
    try:
        used = {name: entry.memory() for name, entry in ready.items()}
        for direction in PASSES:
            timings = time_in_turns({name: e.batches[direction] for name, e in ready.items()}, device, each)
            for name, timing in timings.items():
                _fill(left[name][direction], timing, copy)
                left[name][direction].peak_bytes, left[name][direction].kept_bytes = used[name]
            yield [rows.pop(direction) for rows in left.values()]
    except Exception as error:
        yield [
            row
            for name, rows in left.items()
            for row in _rows(case, name, "failed", brief(error))
            if row.direction in rows
        ]


def _fill(row: Row, timing: Timing, copy: float) -> None:
    row.ms, row.ms_low, row.ms_high = timing.median, timing.low, timing.high
    row.repetitions, row.host_ms, row.warm_ms = timing.repetitions, timing.host, timing.warm
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
