"""The report of a comparison: tables, figures, and all numbers as JSON."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normplug.openmmlab.comparison.bootstrap import FEWEST, Difference
from normplug.openmmlab.comparison.norms import Filters, Norm, Summary, part_of
from normplug.openmmlab.comparison.run import Comparison
from normplug.reporting import Report, markdown_table, write_json

__all__ = ["brief", "write"]

NOTHING = "–"
LETTERS = ("A", "B")
COLOURS = ("C0", "C1")
MOST_ROWS = 40  # of a figure: of more classes those that differ most
Rows = list[list[str]]


def brief(comparison: Comparison) -> str:
    """Return the short table for a terminal: the metrics, and the verdict on each."""
    return markdown_table(_metric_rows(_overall(comparison)))


def write(comparison: Comparison, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write report.md, report.html, the figures and report.json; return their paths.

    Args:
        comparison: What to report.
        folder: Where to; made if it is not there.
        facts: Command, versions, device.
    """
    report = Report(" against ".join(comparison.names), _lead(comparison))
    _report_metrics(report, comparison)
    _report_classes(report, comparison)
    _report_cost(report, comparison)
    _report_norms(report, comparison)
    report.heading("How this was made")
    report.facts({name: value for name, value in facts.items() if value is not None})
    paths = report.write(folder)
    return [*paths, write_json(folder / "report.json", _numbers(comparison, facts))]


def _lead(comparison: Comparison) -> str:
    what = "images" if comparison.task == "detection" else "clips"
    sides = [f"- **{s.letter}**: `{s.config}`, `{s.checkpoint}`" for s in comparison.sides]
    sources = [
        f"{letter}'s from cache ({found.date})" if found.from_cache else f"{letter}'s computed in {found.seconds:.0f} s"
        for letter, found in zip(LETTERS, comparison.predictions, strict=True)
    ]
    return "\n".join(
        [
            *sides,
            "",
            f"Both were evaluated on the same {comparison.samples} {what}, with the test data, pipeline and evaluator "
            f"of A's config; each has its own data preprocessor. Predictions: {', '.join(sources)}.",
            *comparison.remarks,
        ]
    )


# --- metrics


def _overall(comparison: Comparison) -> list[Difference]:
    return [d for d in comparison.differences if not d.metric.category]


def _metric_rows(differences: Iterable[Difference]) -> Rows:
    rows = [["metric", "A", "B", "B − A", "95% interval", "verdict"]]
    return rows + [[str(d.metric), *_cells(d)] for d in differences]


def _cells(d: Difference) -> list[str]:
    interval = NOTHING if np.isnan(d.low) else f"{100 * d.low:+.1f} to {100 * d.high:+.1f}"
    return [_percent(d.a), _percent(d.b), _percent(d.difference, "+.1f"), interval, d.verdict]


def _percent(value: float, form: str = ".1f") -> str:
    return NOTHING if np.isnan(value) else format(100 * value, form)


def _report_metrics(report: Report, comparison: Comparison) -> None:
    overall = _overall(comparison)
    unit = "image" if comparison.task == "detection" else "clip"
    sizes = (
        " Small, medium and large are COCO's: objects below 32², up to 96² and above 96² pixels."
        if any(d.metric.size != "all" for d in overall)
        else ""
    )
    report.heading("Metrics")
    report.table(
        _metric_rows(overall),
        f"In %. Interval: the central 95% of B − A over {comparison.resamples} bootstrap resamples of the {unit}s, the "
        f"same for both models. If it holds zero, the difference is inside the noise of this data set; fewer than "
        f"{FEWEST} {unit}s with something to find are too few samples to tell. It says nothing about the noise of "
        f"training: for that, compare several seeds.{sizes}",
    )
    defined = [d for d in overall if not np.isnan(d.low)]
    figure = Figure(figsize=(7, 0.8 + 0.3 * len(defined)), layout="constrained")
    _forest(figure.subplots(), defined, lambda d: str(d.metric))
    report.figure(figure, "metrics", "B − A of each metric, with its 95% interval; grey is inside the noise.")


def _forest(axes: Axes, differences: Sequence[Difference], name: Callable[[Difference], str]) -> None:
    """Draw differences with their intervals, the first on top."""
    for y, d in enumerate(differences):
        colour = {"A is better": COLOURS[0], "B is better": COLOURS[1]}.get(d.verdict, "0.55")
        axes.plot([100 * d.low, 100 * d.high], [y, y], color=colour, linewidth=2)
        axes.plot(100 * d.difference, y, "o", color=colour, markersize=5)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(differences)), [name(d) for d in differences])
    axes.set_ylim(len(differences) - 0.5, -0.5)
    axes.set_xlabel("A is better  ←  B − A, percentage points  →  B is better", fontsize="small")
    axes.grid(axis="x", alpha=0.3)


def _report_classes(report: Report, comparison: Comparison) -> None:
    by_class = [d for d in comparison.differences if d.metric.category and not np.isnan(d.low)]
    sizes = [size for size in dict.fromkeys(d.metric.size for d in by_class) if size != "all"]
    report.heading("By class and size" if sizes else "By class")
    if not by_class:
        report.text("No class has anything to find.")
        return
    by_key = {d.metric: d for d in by_class}
    judged = [d for d in by_class if d.support >= FEWEST]
    clear = sum("better" in d.verdict for d in judged)
    unit = "images" if comparison.task == "detection" else "clips"
    report.text(
        f"Of these {len(judged)} differences {clear} are outside the noise; by chance alone about 5% would be, "
        f"{0.05 * len(judged):.0f}."
        + (f" {len(by_class) - len(judged)} more have fewer than {FEWEST} {unit}." if judged != by_class else "")
    )
    drawn = []
    for title in dict.fromkeys(_kind(d) for d in by_class):
        rows = [["class", unit, "A", "B", "B − A", "95% interval", "verdict", *(f"{size}: A → B" for size in sizes)]]
        whole = [d for d in by_class if (_kind(d), d.metric.size) == (title, "all")]
        for d in whole:
            cells = [_arrow(by_key.get(d.metric._replace(size=size))) for size in sizes]
            rows.append([d.metric.category, str(d.support), *_cells(d), *cells])
        report.table(rows, f"{title[0].upper()}{title[1:]}, in %.{' A star: outside the noise.' if sizes else ''}")
        drawn.append((title, sorted(whole, key=lambda d: -abs(d.difference))[:MOST_ROWS]))
    height = max(len(most) for _, most in drawn)
    figure = Figure(figsize=(5.5 * max(len(drawn), 1.3), 1 + 0.25 * height), layout="constrained")
    for axes, (title, most) in zip(np.atleast_1d(figure.subplots(1, len(drawn))), drawn, strict=True):
        _forest(axes, sorted(most, key=lambda d: -d.difference), lambda d: d.metric.category)
        axes.set_title(title, fontsize="medium")
    some = f" The {MOST_ROWS} classes that differ most." if height == MOST_ROWS else ""
    report.figure(figure, "classes", f"B − A by class, with 95% intervals.{some}")


def _kind(d: Difference) -> str:
    return str(d.metric._replace(category="", size="all"))


def _arrow(d: Difference | None) -> str:
    star = " *" if d and "better" in d.verdict else ""
    return f"{_percent(d.a)} → {_percent(d.b)}{star}" if d else NOTHING


# --- cost


def _report_cost(report: Report, comparison: Comparison) -> None:
    report.heading("Cost")
    costs = comparison.costs
    rows = [["", *LETTERS, "B / A"]]
    quantities = [
        ("parameters", [c.parameters for c in costs], ",.0f"),
        ("trainable parameters", [c.trainable for c in costs], ",.0f"),
        ("weights and buffers (MB)", [c.weight_bytes / 1e6 for c in costs], ",.1f"),
    ]
    parts = sorted({part for c in costs for part in c.flops})
    quantities += [
        (f"GFLOPs{f', {part}' if part else ' per sample'}", [c.flops.get(part, 0) / 1e9 for c in costs], ",.2f")
        for part in parts
    ]
    rows += [[name, *(format(v, form) for v in values), _ratio(*values)] for name, values, form in quantities]
    flops = (
        "FLOPs are those of convolutions and matrix products, a multiplication and an addition counted as two, the "
        "mean over the first samples of the data. Norms, activations, RoIAlign and NMS are not counted."
    )
    report.table(rows, flops if parts else "")
    if not any(c.latencies for c in costs):
        return
    rows = [["batch", "A (ms)", "B (ms)", "B / A", "A (per s)", "B (per s)", "A peak (MB)", "B peak (MB)"]]
    for a, b in zip(*(c.latencies for c in costs), strict=True):
        times = [f"{x.median:.1f} ({x.low:.1f} to {x.high:.1f})" for x in (a, b)]
        speeds = [f"{x.throughput:.1f}" for x in (a, b)]
        rows.append([str(a.batch_size), *times, _ratio(a.median, b.median), *speeds, *(_mb(x) for x in (a, b))])
    cached = f" From cache, measured {comparison.costs_from_cache}." if comparison.costs_from_cache else ""
    report.table(
        rows,
        "Milliseconds of a batch: median (25% to 75%) of calls of A and B in turns, from preprocessing to the final "
        "results, loading not included; then samples per second; then the peak of the memory that torch allocates "
        f"during a call, beyond the weights and the batch.{cached}",
    )
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for cost, letter, colour in zip(costs, LETTERS, COLOURS, strict=True):
        sizes = [x.batch_size for x in cost.latencies]
        style = {"color": colour, "marker": "o", "label": letter}
        panels[0].plot(sizes, [x.median for x in cost.latencies], **style)
        panels[0].fill_between(
            sizes, [x.low for x in cost.latencies], [x.high for x in cost.latencies], color=colour, alpha=0.2
        )
        panels[1].plot(sizes, [x.throughput for x in cost.latencies], **style)
        panels[2].plot(sizes, [x.peak_bytes / 1e6 for x in cost.latencies], **style)
    for axes, title in zip(panels, ("ms per batch", "samples per second", "peak memory (MB)"), strict=True):
        axes.set(title=title, xlabel="batch size", xticks=sizes, ylim=(0, None))
        axes.grid(alpha=0.3)
    panels[0].legend()
    report.figure(
        figure, "cost", "Time, throughput and memory by batch size; the band is the middle half of the calls."
    )


def _ratio(a: float, b: float) -> str:
    return f"{b / a:.3f}" if a else NOTHING


def _mb(latency: Any) -> str:
    return f"{latency.peak_bytes / 1e6:.1f}"


# --- norms


def _report_norms(report: Report, comparison: Comparison) -> None:
    report.heading("Norms")
    report.text(
        "A channel is **dead** if what its norm hands on (behind the ReLU, where one follows directly) is the same "
        "everywhere on the data: its range is at most 1e-4 of the largest in its layer. The **effective scale** is "
        "what a channel's input is multiplied by in evaluation: weight / sqrt(running_var + eps) in batch norms, "
        "weight in the others, whose divisor depends on the sample. **State**: what training changes; with "
        "*statistics frozen* the layer is in evaluation mode in training too, with *weights frozen* only its "
        "statistics move."
    )
    report.table(_part_rows(comparison.norms), "Layers by part of the model. Dead: channels, of all that were called.")
    if any(comparison.norms):
        figure = Figure(figsize=(11, 5.5), layout="constrained")
        _draw_norms(figure, comparison.norms)
        report.figure(
            figure,
            "norms",
            "Effective scale of each layer's channels (median, and the band from 5% to 95%), and the share of dead "
            "channels, by layer in the order of the model.",
        )
        report.heading("Layer by layer", 3)
        report.table(
            _norm_rows(comparison.norms),
            "Mean (smallest to largest) over the channels; of weights and scales, of their absolute values.",
        )
    if comparison.filters:
        report.heading("Weight standardization", 3)
        report.table(
            _filter_rows(comparison.filters),
            "Convolutions that standardize their weights in one of the models: standard deviation of each filter's "
            "weights before that, mean (smallest to largest) over the filters.",
        )


def _part_rows(norms: Sequence[Sequence[Norm]]) -> Rows:
    rows = [["part", "side", "norms", "layers", "channels", "state", "dead"]]
    for part in dict.fromkeys(part_of(norm.name) for side in norms for norm in side):
        for letter, side in zip(LETTERS, norms, strict=True):
            found = [norm for norm in side if part_of(norm.name) == part]
            called = [norm for norm in found if norm.dead is not None]
            kinds, states = (", ".join(dict.fromkeys(getattr(n, key) for n in found)) for key in ("kind", "state"))
            dead, channels = sum(len(norm.dead) for norm in called), sum(norm.channels for norm in called)
            share = f"{dead} of {channels} ({100 * dead / channels:.1f}%)" if channels else NOTHING
            total = sum(norm.channels for norm in found)
            rows.append([part, letter, kinds or NOTHING, str(len(found)), str(total), states or NOTHING, share])
    return rows


def _by_place(norms: Sequence[Sequence[Norm]]) -> list[list[Norm | None]]:
    """Return A's and B's norm at each place, in A's order, then what B alone has."""
    sides = [{norm.place: norm for norm in side} for side in norms]
    return [[side.get(place) for side in sides] for place in dict.fromkeys([*sides[0], *sides[1]])]


def _norm_rows(norms: Sequence[Sequence[Norm]]) -> Rows:
    columns: dict[str, Callable[[Norm], str]] = {
        "norm": lambda n: n.kind,
        "channels": lambda n: str(n.channels),
        "groups": lambda n: NOTHING if n.groups is None else str(n.groups),
        "state": lambda n: n.state,
        "dead": lambda n: "not called" if n.dead is None else str(len(n.dead)),
        "effective scale": lambda n: _spread(n.scale),
        "weight": lambda n: _spread(n.weight),
        "bias": lambda n: _spread(n.bias),
        "running mean": lambda n: _spread(n.running_mean),
        "running var": lambda n: _spread(n.running_var),
        "v or tau": lambda n: _spread(n.activation),
    }
    rows = [
        [norm.name, letter, *(cell(norm) for cell in columns.values())]
        for pair in _by_place(norms)
        for letter, norm in zip(LETTERS, pair, strict=True)
        if norm is not None
    ]
    header = ["layer", "side", *columns]
    kept = [i for i in range(len(header)) if any(row[i] != NOTHING for row in rows)]
    return [[row[i] for i in kept] for row in [header, *rows]]


def _filter_rows(filters: Sequence[Sequence[Filters]]) -> Rows:
    rows = [["convolution", "A", "A: std", "B", "B: std"]]
    sides = [{f.name: f for f in side} for side in filters]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        pair = [side.get(name) for side in sides]
        if any(f is not None and f.standardized for f in pair):
            rows.append([name])
            for f in pair:
                rows[-1] += [NOTHING, NOTHING] if f is None else [f.kind, _spread(f.std)]
    return rows


def _spread(summary: Summary | None) -> str:
    return NOTHING if summary is None else f"{summary.mean:.3g} ({summary.low:.3g} to {summary.high:.3g})"


def _draw_norms(figure: Figure, norms: Sequence[Sequence[Norm]]) -> None:
    pairs = _by_place(norms)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for i, (letter, colour) in enumerate(zip(LETTERS, COLOURS, strict=True)):
        at = [x for x, pair in enumerate(pairs) if pair[i] is not None]
        if not at:
            continue
        scales = [np.quantile(pairs[x][i].scales, [0.05, 0.5, 0.95]) for x in at]
        low, middle, high = (np.array(values) for values in zip(*scales, strict=True))
        above.plot(at, middle, marker=".", color=colour, label=letter)
        above.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        called = [(x, pairs[x][i]) for x in at if pairs[x][i].dead is not None]
        shares = [100 * len(norm.dead) / norm.channels for _, norm in called]
        below.bar([x + (i - 0.5) * 0.4 for x, _ in called], shares, 0.4, color=colour)
    parts = [part_of(next(norm for norm in pair if norm is not None).name) for pair in pairs]
    starts = [x for x, part in enumerate(parts) if x == 0 or parts[x - 1] != part]
    for axes in (above, below):
        for start in starts[1:]:
            axes.axvline(start - 0.5, color="0.6", linewidth=0.8, linestyle=":")
        axes.grid(axis="y", alpha=0.3)
    above.set_yscale("log", nonpositive="clip")
    above.set_ylim(bottom=max(above.get_ylim()[0], 1e-6))
    above.set_ylabel("effective scale")
    above.legend()
    below.set_ylabel("dead (%)")
    below.set_ylim(0, max(1, below.get_ylim()[1]))
    names = [parts[x].replace(".", ".\n") for x in starts]
    below.set_xticks(starts, names, ha="left", fontsize="small")
    below.set_xlabel("layer")


# --- all numbers


def _numbers(comparison: Comparison, facts: Mapping[str, Any]) -> dict[str, Any]:
    sides = [
        {"config": str(s.config), "checkpoint": str(s.checkpoint), "from_cache": p.from_cache, "predicted": p.date}
        for s, p in zip(comparison.sides, comparison.predictions, strict=True)
    ]
    return {
        "facts": dict(facts),
        "sides": dict(zip(LETTERS, sides, strict=True)),
        "task": comparison.task,
        "samples": comparison.samples,
        "resamples": comparison.resamples,
        "remarks": comparison.remarks,
        "metrics": [
            {**d.metric._asdict(), "a": d.a, "b": d.b, "difference": d.difference, "low": d.low, "high": d.high}
            | {"support": d.support, "verdict": d.verdict}
            for d in comparison.differences
        ],
        "cost": [asdict(cost) for cost in comparison.costs],
        "cost_from_cache": comparison.costs_from_cache,
        "norms": [[asdict(norm) for norm in side] for side in comparison.norms],
        "filters": [[asdict(f) for f in side] for side in comparison.filters],
    }
