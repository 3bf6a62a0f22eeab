"""Tables out of rows: geometric means against each peer, the goals, one line per case. Nothing here measures."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from normplug.bench.cases import OPS
from normplug.bench.facts import describe
from normplug.bench.peers import PEERS
from normplug.reporting import markdown_table

__all__ = ["GOALS", "geometric_mean", "markdown"]

OURS, AGAIN = "normplug", "normplug again"
STEP = "forward+backward"


@dataclass(frozen=True)
class Goal:
    """A number to reach: the geometric mean over shapes and layouts of peer's time over ours, or of our bandwidth."""

    ops: tuple[str, ...]
    dtypes: tuple[str, ...]
    peer: str  # or "copy bandwidth"
    factor: float
    host: bool = False  # count what Python needs where that is longer: hundreds of launches are not hidden
    maps: str = "all"  # or those "above L2" or "below L2": what is in the cache is read faster than memory copies it


FUSED = ("group_norm_relu", "group_norm_add_relu")
BOTH = ("bfloat16", "float32")
# Of an H100; an H200 has 60 MB.
L2_BYTES = 50e6
# What we aim at on an NVIDIA H100, forward and backward. The peers' rows of the same run are what counts.
GOALS = [
    Goal(FUSED, BOTH, "torch eager", 2.0),
    Goal(FUSED, BOTH, "torch.compile", 1.3),
    Goal(FUSED, BOTH, "apex", 1.1),
    Goal(FUSED, BOTH, "liger", 1.1),
    Goal(FUSED, BOTH, "copy bandwidth", 0.8, maps="above L2"),
    Goal(FUSED, BOTH, "copy bandwidth", 0.6, maps="below L2"),
    Goal(("evonorm_s0",), BOTH, "timm", 6.0),
    Goal(("evonorm_s0",), BOTH, "timm compiled", 1.5),
    Goal(("weight_standardize_many",), ("float32",), "mmcv", 10.0, host=True),
    Goal(("sync_batch_norm_relu",), BOTH, "torch eager", 1.3),
]


def geometric_mean(values: Iterable[float]) -> float | None:
    """Return the geometric mean, or None of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def markdown(result: dict) -> str:
    """Return the report of a run, from what ``--out`` writes."""
    rows, copy = result["rows"], result["bandwidth"]
    measured = [r for r in rows if r["status"] == "ok"]
    by_case: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for row in measured:
        by_case[_case(row)][row["who"]] = row
    by_case = {key: case for key, case in by_case.items() if OURS in case}
    parts = [
        f"# normplug's ops on {result['facts']['device']}",
        "\n".join(describe(result["facts"])),
        f"Copy bandwidth in this run: {_number(copy.get('copy_gb_per_s'), '.1f')} GB/s before, "
        f"{_number(copy.get('copy_gb_per_s_at_the_end'), '.1f')} GB/s after; fractions are of the first.",
        readings(result.get("conditions", {})),
        noise(by_case),
    ]
    if result["facts"]["device_type"] == "cuda":
        parts += ["## Goals", goals(by_case)]
    parts += [
        "## Geometric means over the shapes",
        "Times as fast as each peer (its time over ours, from the same cases); GB/s are the bytes that had to move "
        "over the time, and the fraction is of the copy bandwidth. Times of a GPU are with a cold L2 cache; 'warm' is "
        "how many times as fast ours is with a warm one. Host is milliseconds of Python per call. 'normplug again' is "
        "the same code timed a second time: what it differs from 1 is noise.",
        summary(by_case),
        "## Every case",
        "Milliseconds of ours with 20th and 80th percentile, with a warm L2 cache, then of the others; host: "
        "milliseconds of Python per call; "
        "peak and kept: MB beyond the inputs at the peak of forward and backward, and between them (the output "
        "included).",
        detail(by_case),
        "## Bytes that had to move",
        "Every tensor of the input's size read or written once, plus the parameters of the channels (float32, read by "
        "each pass; their gradients written once):",
        traffic(),
    ]
    problems = trouble(rows)
    if problems:
        parts += ["## Not measured", problems]
    return "\n\n".join(parts) + "\n"


def readings(found: dict[str, dict[str, str]]) -> str:
    """Return clocks and temperature before and after."""
    if not any(found.values()):
        return "Clocks and temperature: not recorded (no GPU here, or no nvidia-smi that knows it)."
    before, after = found.get("before", {}), found.get("after", {})
    names = before or after
    return markdown_table([["", "before", "after"], *([n, before.get(n, "-"), after.get(n, "-")] for n in names)])


def noise(by_case: dict[tuple, dict[str, dict]]) -> str:
    """Return how far the same code is from itself, over all cases."""
    found = sorted(ratios(by_case, AGAIN, lambda _: True))
    if not found:
        return "Noise: nothing was timed twice."
    return (
        f"Noise: ours timed twice, second over first, is {found[0]:.3f} to {found[-1]:.3f} in {len(found)} cases, "
        f"{geometric_mean(found):.3f} on average. A ratio of one case within that range says nothing."
    )


def others(by_case: dict[tuple, dict[str, dict]]) -> list[str]:
    """Return who was timed beside ours: ours again, another version of ours, the peers."""
    names = {name: None for case in by_case.values() for name in case if name != OURS}
    return sorted(names, key=lambda name: (name != AGAIN, PEERS.index(name) if name in PEERS else -1))


def _case(row: dict) -> tuple:
    return row["op"], row["model"], row["place"], str(row["shape"]), row["dtype"], row["layout"], row["direction"]


def ratios(
    by_case: dict[tuple, dict[str, dict]], peer: str, wanted: Callable[[dict], bool], host: bool = False
) -> list[float]:
    """Return the peer's time over ours, or our fraction of the copy bandwidth, for each case that has both."""

    def spent(row: dict) -> float:
        return max(row["ms"], row["host_ms"]) if host else row["ms"]

    found = []
    for case in by_case.values():
        ours = case[OURS]
        if not wanted(ours):
            continue
        if peer == "copy bandwidth":
            found.append(ours["copy_fraction"])
        elif peer in case:
            found.append(spent(case[peer]) / spent(ours))
    return found


def goals(by_case: dict[tuple, dict[str, dict]]) -> str:
    """Return the table of goals: what was measured, and whether that is enough."""
    rows = []
    for goal in GOALS:
        for dtype in goal.dtypes:
            values = ratios(
                by_case,
                goal.peer,
                lambda r, goal=goal, dtype=dtype: (
                    r["op"] in goal.ops
                    and r["dtype"] == dtype
                    and r["direction"] == STEP
                    and goal.maps in ("all", size_of_map(r))
                ),
                goal.host,
            )
            mean = geometric_mean(values)
            got = "not measured" if mean is None else f"{mean:.2f}"
            reached = "-" if mean is None else "reached" if mean >= goal.factor else "not reached"
            against = goal.peer if goal.maps == "all" else f"{goal.peer}, maps {goal.maps}"
            rows.append([", ".join(goal.ops), dtype, against, f"{goal.factor:g}", got, str(len(values)), reached])
    return markdown_table([["op", "dtype", "against", "goal", "measured", "cases", ""], *rows])


def size_of_map(row: dict) -> str:
    """Tell whether the input of a case is larger than the L2 cache."""
    values = sum(math.prod(dims) for dims in row["shape"])
    return "above L2" if values * getattr(torch, row["dtype"]).itemsize > L2_BYTES else "below L2"


def summary(by_case: dict[tuple, dict[str, dict]]) -> str:
    """Return geometric means per op, dtype, layout and pass."""
    peers = others(by_case)
    groups: dict[tuple, dict[tuple, dict[str, dict]]] = defaultdict(dict)
    for key, case in by_case.items():
        op, *_, dtype, layout, direction = key
        groups[op, dtype, layout, direction][key] = case
    rows = []
    for (op, dtype, layout, direction), group in sorted(groups.items(), key=lambda item: _rank(*item[0])):
        ours = [case[OURS] for case in group.values()]
        speed, fraction = (geometric_mean(r[k] for r in ours) for k in ("gb_per_s", "copy_fraction"))
        host = geometric_mean(r["host_ms"] for r in ours)
        warm = geometric_mean(r["ms"] / r["warm_ms"] for r in ours if r.get("warm_ms"))
        cells = [op, dtype, layout, direction, str(len(ours)), _number(speed, ".1f"), _number(fraction, ".2f")]
        cells += [_number(warm, ".2f"), _number(host, ".3f")]
        for peer in peers:
            values = ratios(group, peer, lambda _: True)
            some = f" ({len(values)})" if 0 < len(values) < len(ours) else ""
            cells.append(_number(geometric_mean(values), ".2f") + some)
        rows.append(cells)
    return markdown_table(
        [
            ["op", "dtype", "layout", "pass", "shapes", "GB/s", "of copy", "warm", "host", *(f"x {p}" for p in peers)],
            *rows,
        ]
    )


def _rank(op: str, *rest: str) -> tuple:
    return list(OPS).index(op), *rest


def detail(by_case: dict[tuple, dict[str, dict]]) -> str:
    """Return a line per case."""
    peers = others(by_case)
    rows = []
    for (op, model, place, _, dtype, layout, direction), case in by_case.items():
        ours = case[OURS]
        dims = ours["shape"]
        cells = [
            op,
            f"{model} {place}",
            "x".join(map(str, dims[0])) if len(dims) == 1 else f"{len(dims)} filters",
            dtype,
            layout,
            direction,
            f"{ours['ms']:.4f} ({ours['ms_low']:.4f} to {ours['ms_high']:.4f})",
            _number(ours.get("warm_ms"), ".4f"),
            str(ours["repetitions"]),
            f"{ours['host_ms']:.3f}",
            f"{ours['bytes'] / 1e6:.2f}",
            f"{ours['gb_per_s']:.1f}",
            f"{ours['copy_fraction']:.2f}",
            f"{ours['peak_bytes'] / 1e6:.1f}",
            f"{ours['kept_bytes'] / 1e6:.1f}",
        ]
        cells += [_peer(case.get(peer)) for peer in peers]
        rows.append(cells)
    header = ["op", "layer", "shape", "dtype", "layout", "pass", "ms", "warm", "n", "host", "MB to move", "GB/s"]
    header += ["of copy", "peak", "kept", *(f"{p}: ms, warm, host, peak, kept" for p in peers)]
    return markdown_table([header, *rows])


def _peer(row: dict | None) -> str:
    if row is None:
        return "-"
    warm = _number(row.get("warm_ms"), ".4f")
    memory = f"{row['peak_bytes'] / 1e6:.1f}, {row['kept_bytes'] / 1e6:.1f}"
    return f"{row['ms']:.4f}, {warm}, {row['host_ms']:.3f}, {memory}"


def traffic() -> str:
    """Return the formulas of the bytes."""
    rows = []
    for op in OPS.values():
        forward, both = op.traffic.tensors(False), op.traffic.tensors(True)
        vectors = ", ".join(op.vectors) or "none"
        rows.append([op.name, op.traffic.forward, op.traffic.backward, f"{forward}, {both}", vectors])
    return markdown_table([["op", "forward: reads > writes", "backward", "in all: forward, both", "parameters"], *rows])


def trouble(rows: Sequence[dict]) -> str:
    """Return what was not measured, and why; equal reasons together."""
    reasons: dict[tuple, int] = defaultdict(int)
    for row in rows:
        if row["status"] != "ok":
            reasons[row["op"], row["who"], row["status"], row["message"]] += 1
    lines = [[op, who, status, str(count), message] for (op, who, status, message), count in reasons.items()]
    return markdown_table([["op", "who", "status", "rows", "why"], *lines]) if lines else ""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
