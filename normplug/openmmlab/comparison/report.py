"""The report of a comparison: tables, figures, and all numbers as JSON."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normplug.openmmlab.comparison.bootstrap import FEWEST, Difference
from normplug.openmmlab.comparison.config_difference import config_difference
from normplug.openmmlab.comparison.cost import PASSES, speed
from normplug.openmmlab.comparison.error_types import ERRORS
from normplug.openmmlab.comparison.norms import Filters, Norm, Summary, part_of
from normplug.openmmlab.comparison.precision_recall import draw_curves
from normplug.openmmlab.comparison.run import Comparison
from normplug.openmmlab.comparison.seeds import OverSeeds
from normplug.openmmlab.comparison.training import draw_trainings, find_training
from normplug.reporting import Report, markdown_table, write_json

__all__ = ["brief", "write"]

NOTHING = "–"
LETTERS = ("A", "B")
COLOURS = ("C0", "C1")
MARKS = ("o", "s")
LONGEST = 90  # characters of a setting that stands in the table; longer ones are folded
MOST_ROWS = 40  # of a figure: of more classes those that differ most
Rows = list[list[str]]


def brief(comparison: Comparison) -> str:
    """Return the short tables for a terminal: the metrics, and the verdict on each, of one pair and over seeds."""
    pair = markdown_table(_metric_rows(_overall(comparison)))
    if not comparison.seeds:
        return pair
    return f"{pair}\n\nOver seeds ({_seeds(comparison)}):\n\n{markdown_table(_seed_rows(comparison.seeds))}"


def write(comparison: Comparison, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write report.md, report.html, the figures and report.json; return their paths.

    Args:
        comparison: What to report.
        folder: Where to; made if it is not there.
        facts: Command, versions, device.
    """
    report = Report(" against ".join(comparison.names), _lead(comparison))
    _report_metrics(report, comparison)
    _report_seeds(report, comparison)
    _report_classes(report, comparison)
    _report_errors(report, comparison)
    report.heading("Examples")
    comparison.examples.report(report, LETTERS)
    _report_cost(report, comparison)
    _report_norms(report, comparison)
    _report_trainings(report, comparison)
    _report_configs(report, comparison)
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
    rows = [["metric", "verdict", "B − A", "95% interval", "A", "B"]]  # what is asked for stands on the left
    return rows + [[str(d.metric), *_cells(d)] for d in differences]


def _cells(d: Difference) -> list[str]:
    return [d.verdict, _percent(d.difference, "+.1f"), _interval(d.low, d.high), _percent(d.a), _percent(d.b)]


def _interval(low: float, high: float) -> str:
    return NOTHING if np.isnan(low) else f"{100 * low:+.1f} to {100 * high:+.1f}"


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


def _report_seeds(report: Report, comparison: Comparison) -> None:
    if not comparison.seeds:
        return
    report.heading("Over seeds")
    report.table(
        _seed_rows(comparison.seeds),
        f"In %, over {_seeds(comparison)}: B − A of the means, with Welch's 95% t interval; mean ± standard deviation "
        "of A and B. If the interval holds zero, the difference is inside the noise of training. All were scored on "
        "the same test set: its noise is shared and not in this interval, but in that of the metrics above. No "
        "spread: the seeds of neither model differ, which shows no noise to judge by.",
    )
    checkpoints = [[side, *more] for side, more in zip(comparison.sides, comparison.more, strict=True)]
    names = [f"{side.letter}{i}" for of_one in checkpoints for i, side in enumerate(of_one, 1)]
    files = [f"`{side.checkpoint}`" for of_one in checkpoints for side in of_one]
    report.text("\n".join(f"- **{name}**: {file}" for name, file in zip(names, files, strict=True)))
    report.folded(
        "Seed by seed",
        [["metric", *names], *([str(s.metric), *map(_percent, [*s.a, *s.b])] for s in comparison.seeds)],
    )


def _seeds(comparison: Comparison) -> str:
    return " and ".join(f"{1 + len(more)} of {x}" for x, more in zip(LETTERS, comparison.more, strict=True))


def _seed_rows(seeds: Iterable[OverSeeds]) -> Rows:
    rows = [["metric", "verdict", "B − A", "95% interval", "A", "B"]]
    for s in seeds:
        sides = [
            _percent(mean) + ("" if np.isnan(deviation) else f" ± {_percent(deviation)}")
            for mean, deviation in zip(s.means, s.deviations, strict=True)
        ]
        rows.append([str(s.metric), s.verdict, _percent(s.difference, "+.1f"), _interval(*s.interval), *sides])
    return rows


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
        rows = [["class", "verdict", "B − A", "95% interval", "A", "B", unit, *(f"{size}: A → B" for size in sizes)]]
        whole = [d for d in by_class if (_kind(d), d.metric.size) == (title, "all")]
        for d in whole:
            cells = [_arrow(by_key.get(d.metric._replace(size=size))) for size in sizes]
            rows.append([d.metric.category, *_cells(d), str(d.support), *cells])
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


# --- curves and errors


def _report_errors(report: Report, comparison: Comparison) -> None:
    for of, pair in comparison.curves.items():
        report.heading(f"Precision and errors: {of}")
        if all(pair):
            caption = "Precision by recall, the mean over classes; the area under it is the AP."
            report.figure(draw_curves(pair, LETTERS), f"precision-{of}", caption)
        a, b = comparison.errors[of]
        report.table(
            [
                ["error", *LETTERS, "B − A"],
                *([name, str(a[name]), str(b[name]), f"{b[name] - a[name]:+d}"] for name in ERRORS),
            ],
            "Numbers of detections of any score by TIDE's types, IoU 0.5 (0.1 for background), and of missed objects. "
            "Detections of low score count as much as others here: a model that keeps more of them has more errors.",
        )


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
    pairs = list(zip(*(c.latencies for c in costs), strict=True))
    speeds = [speed(a, b) for a, b in pairs]
    rows = [["batch", "verdict", "time B / A", "95% interval", "A (ms)", "B (ms)"]]
    rows[0] += ["A (per s)", "B (per s)", "A peak (MB)", "B peak (MB)"]
    for (a, b), found in zip(pairs, speeds, strict=True):
        times = [f"{x.median:.1f} ({x.low:.1f} to {x.high:.1f})" for x in (a, b)]
        rates = [f"{x.throughput:.1f}" for x in (a, b)]
        interval = f"{found.low:.3f} to {found.high:.3f}"
        rows.append([str(a.batch_size), found.verdict, f"{found.ratio:.3f}", interval, *times, *rates, _mb(a), _mb(b)])
    cached = f" From cache, measured {comparison.costs_from_cache}." if comparison.costs_from_cache else ""
    drowned = [str(a.batch_size) for (a, _), found in zip(pairs, speeds, strict=True) if "faster" not in found.verdict]
    report.table(
        rows,
        f"Calls of A and B in turns, in {PASSES} passes through all batch sizes, from preprocessing to the final "
        "results, loading not included. B / A: the median of the ratios of neighbouring calls, and its 95% interval: "
        "if that holds 1, the spread of the measurements drowns the difference. Milliseconds of a batch: median (25% "
        "to 75%); then samples per second; then the peak of the memory that torch allocates during a call, beyond "
        f"the weights and the batch.{cached}",
    )
    if drowned:
        report.text(
            f"At batch size {', '.join(drowned)} the spread drowns the difference: measure on an idle machine, or with "
            f"a larger `--seconds`, before you say that one is faster."
        )
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    at = np.arange(len(pairs))
    for i, (cost, letter, colour, mark) in enumerate(zip(costs, LETTERS, COLOURS, MARKS, strict=True)):
        place = at + 0.16 * (2 * i - 1)  # side by side: neither hides the other
        style = {"color": colour, "marker": mark, "label": letter, "linestyle": "none", "capsize": 3}
        middle, low, high = (np.array([getattr(x, q) for x in cost.latencies]) for q in ("median", "low", "high"))
        rate, size = 1e3 / middle, np.array([x.batch_size for x in cost.latencies])
        panels[0].errorbar(place, middle, [middle - low, high - middle], **style)
        panels[1].errorbar(place, size * rate, [size * (rate - 1e3 / high), size * (1e3 / low - rate)], **style)
        panels[2].plot(place, [x.peak_bytes / 1e6 for x in cost.latencies], mark, color=colour)
    for axes, title in zip(panels, ("ms per batch", "samples per second", "peak memory (MB)"), strict=True):
        axes.set(title=title, xlabel="batch size", ylim=(0, None))
        axes.set_xticks(at, [str(a.batch_size) for a, _ in pairs])
        axes.grid(axis="y", alpha=0.3)
    panels[0].legend()
    report.figure(
        figure, "cost", "Time, throughput and memory by batch size; the bars hold the middle half of the calls."
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
        figure = Figure(figsize=(9, 1.2 + 0.22 * len(_by_place(comparison.norms))), layout="constrained")
        _draw_norms(figure, comparison.norms)
        report.figure(
            figure,
            "norms",
            "Effective scale of each layer's channels (median, and the line from 5% to 95%), and the share of dead "
            "channels, by layer in the order of the model.",
        )
        report.folded(
            "Layer by layer",
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
    """Draw a row for each layer, with its name, A above B in it."""
    pairs = _by_place(norms)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    for i, (letter, colour, mark) in enumerate(zip(LETTERS, COLOURS, MARKS, strict=True)):
        rows = [(y + 0.18 * (2 * i - 1), pair[i]) for y, pair in enumerate(pairs) if pair[i] is not None]
        for y, norm in rows:
            low, middle, high = np.quantile(norm.scales, [0.05, 0.5, 0.95])
            left.plot([low, high], [y, y], color=colour, linewidth=1)
            left.plot(middle, y, mark, color=colour, markersize=4)
        called = [(y, norm) for y, norm in rows if norm.dead is not None]
        shares = [100 * len(norm.dead) / norm.channels for _, norm in called]
        right.barh([y for y, _ in called], shares, 0.34, color=colour)
        if rows:
            left.plot([], [], mark, color=colour, label=letter)
    names = [next(norm for norm in pair if norm is not None).name for pair in pairs]
    left.set_yticks(range(len(pairs)), names, fontsize="x-small")
    left.set_ylim(len(pairs) - 0.5, -0.5)
    left.set_xscale("log", nonpositive="clip")
    left.set_xlim(left=max(left.get_xlim()[0], 1e-6))
    left.set_xlabel("effective scale")
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    right.set_xlabel("dead (%)")
    right.set_xlim(0, max(1, right.get_xlim()[1]))
    parts = [part_of(name) for name in names]
    for axes in (left, right):
        for y in (y for y in range(1, len(parts)) if parts[y] != parts[y - 1]):
            axes.axhline(y - 0.5, color="0.6", linewidth=0.8, linestyle=":")
        axes.grid(axis="x", alpha=0.3)


# --- how they came to be


def _report_trainings(report: Report, comparison: Comparison) -> None:
    found = {s.letter: find_training(s.checkpoint, comparison.task) for s in comparison.sides}
    report.heading("Training")
    without = [s for s in comparison.sides if found[s.letter] is None]
    if without:
        report.text(
            f"No log of {' and '.join(s.letter for s in without)}: looked for `*/vis_data/scalars.json` beside "
            f"`{without[0].checkpoint}`. Leave the checkpoint in the work dir of its training to see the curves here."
        )
    known = {letter: outcome for letter, outcome in found.items() if outcome is not None}
    if known:
        styles = (dict(zip(LETTERS, values, strict=True)) for values in (COLOURS, MARKS))
        report.figure(
            draw_trainings(known, comparison.task, *styles),
            "training",
            "Training loss (pale: each logged value; strong: means of neighbours) and metrics during training.",
        )


def _report_configs(report: Report, comparison: Comparison) -> None:
    report.heading("What the configs differ in")
    rows = config_difference(*(s.cfg for s in comparison.sides))
    if not rows:
        report.text("Nothing, but for where they write.")
        return
    short = [row for row in rows if max(map(len, row)) <= LONGEST]
    long = [row for row in rows if row not in short]
    if short:
        report.table([["setting", *LETTERS], *map(list, short)])
    for path, a, b in long:
        report.folded(path, [["", "value"], ["A", a], ["B", b]])


# --- all numbers


def _numbers(comparison: Comparison, facts: Mapping[str, Any]) -> dict[str, Any]:
    sides = [
        {"config": str(s.config), "checkpoint": str(s.checkpoint), "from_cache": p.from_cache, "predicted": p.date}
        for s, p in zip(comparison.sides, comparison.predictions, strict=True)
    ]
    seeds = [
        {**s.metric._asdict(), "a": s.a, "b": s.b, "mean_a": s.means[0], "mean_b": s.means[1]}
        | {"std_a": s.deviations[0], "std_b": s.deviations[1], "difference": s.difference}
        | {"low": s.interval[0], "high": s.interval[1], "verdict": s.verdict}
        for s in comparison.seeds
    ]
    more = [[str(side.checkpoint) for side in of_one] for of_one in comparison.more]
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
        "seeds": seeds,
        "more_checkpoints": dict(zip(LETTERS, more, strict=True)),
        "precision_recall": comparison.curves,
        "errors": comparison.errors,
        "examples": comparison.examples.numbers(),
        "cost": [asdict(cost) for cost in comparison.costs],
        "cost_from_cache": comparison.costs_from_cache,
        "norms": [[asdict(norm) for norm in side] for side in comparison.norms],
        "filters": [[asdict(f) for f in side] for side in comparison.filters],
        "config_difference": [list(row) for row in config_difference(*(s.cfg for s in comparison.sides))],
    }
