"""``python -m normplug bench --cpu-goals``: our layers on a CPU against what their users had before, in one process.

Both sides of a comparison take turns, repetition by repetition, and the number is the ratio of their medians. With one
thread (``OMP_NUM_THREADS=1``) it is the processor's time that counts, which other jobs on the machine disturb least;
with more it is the clock on the wall. Each comparison says what it has to reach; results are compared before times.
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from normplug.bench.cases import OPS, make_problem
from normplug.bench.facts import describe
from normplug.bench.measure import compare, memory, quantile, run
from normplug.bench.peers import Contender, installed, peers_of
from normplug.bench.report import geometric_mean
from normplug.bench.shapes import Shape
from normplug.bench.shapes import select as select_shapes
from normplug.reporting import markdown_table

__all__ = ["Comparison", "Part", "markdown", "measure", "turns"]

CPU = torch.device("cpu")
# Mask R-CNN on two images of 128 x 128 (stem, stages, RoIs), a level of its 800 x 1344 pyramid, and a clip.
LAYERS = [
    (2, 64, 64, 64),
    (2, 256, 32, 32),
    (2, 128, 16, 16),
    (64, 256, 7, 7),
    (2, 256, 50, 84),
    (4, 64, 8, 28, 28),
]
CONVOLUTIONS = [((2, 64, 32, 32), 64), ((2, 128, 16, 16), 128), ((2, 256, 32, 32), 256), ((64, 256, 7, 7), 256)]


@dataclass
class Part:
    """One case of a comparison: milliseconds (or bytes) of both sides, and their ratio."""

    case: str
    ours: float
    peer: float
    ratio: float
    ratio_low: float  # 20th percentile over the turns
    ratio_high: float  # 80th
    repetitions: int


@dataclass
class Comparison:
    """What is compared, what it has to reach, and what came out: the geometric mean of the parts' ratios."""

    what: str
    against: str
    measure: str  # how the ratio is formed
    goal: float
    at_least: bool
    value: float | None = None
    reached: bool | None = None  # None: not measured
    message: str = ""
    parts: list[Part] = field(default_factory=list)

    def close(self) -> "Comparison":
        """Sum the parts up."""
        self.value = geometric_mean(max(p.ratio, 1e-3) for p in self.parts)
        if self.value is not None:
            self.reached = self.value >= self.goal if self.at_least else self.value <= self.goal
        return self


def measure(seconds: float, layers: Sequence[tuple[int, ...]] = LAYERS) -> list[Comparison]:
    """Run all comparisons in about ``seconds`` or less; a minute is enough for most, no limit means three."""
    each = min(max(seconds / 50, 0.05), 3.0)
    found: list[Comparison] = []
    for name in ("evonorm_s0", "evonorm_b0"):
        found += _evonorm(name, layers, each)
    found += [_filters(name, each) for name in ("weight_standardize", "weight_standardize_many")]
    found += [_group_norm(layout, layers, each) for layout in ("contiguous", "channels_last")]
    found += _cross_iteration(each)
    return found


def turns(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Return milliseconds of functions called in turns, at least five rounds of them."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(2):
        for call in calls.values():
            call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(calls))]) < 5:
        for name, call in calls.items():
            began = clock()
            call()
            times[name].append((clock() - began) * 1e3)
    return times


def _part(case: str, ours: Sequence[float], peer: Sequence[float], peer_over_ours: bool) -> Part:
    medians = quantile(list(ours), 0.5), quantile(list(peer), 0.5)
    by_turn = [p / o if peer_over_ours else o / p for o, p in zip(ours, peer, strict=True)]
    ratio = medians[1] / medians[0] if peer_over_ours else medians[0] / medians[1]
    return Part(case, *medians, ratio, quantile(by_turn, 0.2), quantile(by_turn, 0.8), len(ours))


def _pair(op: str, shape: Shape, channels_last: bool, peer: str) -> tuple[dict[str, Contender], list[Tensor], str]:
    """Return ours and the peer on one problem, the gradients to pass back, and what is wrong with a result."""
    problem = make_problem(OPS[op], shape, torch.float32, channels_last, CPU)
    ours = Contender("ours", lambda: OPS[op].ours(**problem.tensors), problem.tensors)
    both = {"ours": ours, "peer": peers_of(problem, [peer])[peer]()}
    wrong = "; ".join(filter(None, (compare(problem, c, ours=name == "ours") for name, c in both.items())))
    problem.reference.clear()
    return both, problem.dys, wrong


def _steps(both: dict[str, Contender], dys: list[Tensor]) -> dict[str, Callable[[], object]]:
    return {name: lambda c=c: run(c, dys) for name, c in both.items()}


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _layer(dims: tuple[int, ...]) -> Shape:
    return Shape("CPU", "layer", "act", (dims,))


def _layouts() -> list[tuple[str, bool]]:
    return [("contiguous", False), ("channels_last", True)]


def _evonorm(op: str, layers: Sequence[tuple[int, ...]], each: float) -> list[Comparison]:
    name = {"evonorm_s0": "EvoNormS0", "evonorm_b0": "EvoNormB0"}[op]
    speed = Comparison(f"{name}, forward and backward", "timm", "timm's time / ours", 2.0, True)
    space = Comparison(f"{name}, memory at the peak", "timm", "our bytes / timm's", 1.0, False)
    if not installed("timm"):
        speed.message = space.message = "timm is not installed"
        return [speed, space]
    for dims in layers:
        for layout, channels_last in _layouts():
            case = f"{'x'.join(map(str, dims))} {layout}"
            _progress(f"{name} {case}")
            both, dys, wrong = _pair(op, _layer(dims), channels_last, "timm")
            if wrong:
                speed.message = space.message = f"{case}: {wrong}"
                return [speed, space]
            used = {who: [float(memory(c, dys, CPU)[0])] for who, c in both.items()}
            times = turns(_steps(both, dys), each)
            speed.parts.append(_part(case, times["ours"], times["peer"], True))
            space.parts.append(_part(case, used["ours"], used["peer"], False))
    return [speed.close(), space.close()]


def _filters(op: str, each: float) -> Comparison:
    which = "one by one" if op == "weight_standardize" else "together"
    what = f"ConvWS, standardizing all filters of R50 {which}, forward and backward"
    result = Comparison(what, "mmcv's conv_ws_2d without its convolution", "mmcv's time / ours", 2.0, True)
    if not installed("mmcv"):
        result.message = "mmcv is not installed"
        return result
    _progress(what)
    shape = select_shapes("quick", "weights")[0]
    both, dys, wrong = _pair(op, shape, False, "mmcv")
    if wrong:
        result.message = wrong
        return result
    times = turns(_steps(both, dys), 3 * each)
    result.parts.append(_part(str(shape), times["ours"], times["peer"], True))
    return result.close()


def _group_norm(layout: str, layers: Sequence[tuple[int, ...]], each: float) -> Comparison:
    what = f"GN with ReLU, {layout}, forward and backward"
    result = Comparison(what, "torch's group norm and ReLU in place", "our time / torch's", 1.05, False)
    for dims in layers:
        case = "x".join(map(str, dims))
        _progress(f"{what} {case}")
        both, dys, wrong = _pair("group_norm_relu", _layer(dims), layout == "channels_last", "torch eager")
        if wrong:
            result.message = f"{case}: {wrong}"
            return result
        times = turns(_steps(both, dys), each)
        result.parts.append(_part(case, times["ours"], times["peer"], False))
    return result.close()


# --- CBN


class ByAutograd(nn.Module):
    """CBN with its derivatives by two ``torch.autograd.grad`` calls, and copies of earlier weights, as its authors do.

    Args:
        num_features: Number of channels.
        buffer_num: Number of earlier batches.
        fused: Normalize by our op with a closed-form backward. The authors' code lets autograd differentiate
            subtraction, division, scale and shift one by one, which is not what the comparison is about, but is
            what their layer costs.
    """

    def __init__(self, num_features: int, buffer_num: int = 3, fused: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("ones", torch.ones(num_features))
        self.buffer_num, self.fused = buffer_num, fused
        self.earlier: list[tuple[Tensor, ...]] = []

    def forward(self, x: Tensor, filters: Tensor) -> Tensor:
        values = x.transpose(0, 1).flatten(1)  # copies, as theirs
        mean, second = values.mean(1), values.square().mean(1)
        d_mean = torch.autograd.grad(mean, filters, self.ones, retain_graph=True)[0]
        d_second = torch.autograd.grad(second, filters, self.ones, retain_graph=True)[0]
        now = filters.detach()
        means, seconds = [mean], [second]
        for mean0, second0, d_mean0, d_second0, then in self.earlier:
            means.append(mean0 + (d_mean0 * (now - then)).flatten(1).sum(1))
            seconds.append(second0 + (d_second0 * (now - then)).flatten(1).sum(1))
        mean_all, second_all = torch.stack(means), torch.stack(seconds)
        keep = (second_all - mean_all.square() >= 0).to(x.dtype)
        count = keep.sum(0)
        centre = (keep * mean_all).sum(0) / count
        var = (keep * second_all).sum(0) / count - centre.square()
        entry = mean.detach(), second.detach(), d_mean, d_second, now.clone()
        self.earlier = [entry, *self.earlier][: self.buffer_num]
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(values.var(1), 0.1)
        if self.fused:
            from normplug.ops import batch_normalize

            share = 1 / (count * values.shape[1])
            centre, rstd = centre.detach(), (var.detach() + 1e-5).rsqrt()
            return batch_normalize(x, centre, rstd, self.weight, self.bias, None, None, share, share)
        y = (values - centre[:, None]) / (var[:, None] + 1e-5).sqrt()
        y = y * self.weight[:, None] + self.bias[:, None]
        return y.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)


class Stack(nn.Module):
    """A convolution and a norm behind it; a step is forward, backward and a small change of the weights."""

    def __init__(self, channels: int, norm: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        with torch.no_grad():
            self.conv.weight.normal_(0, (9 * channels) ** -0.5, generator=generator)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y, self.conv.weight) if isinstance(self.norm, ByAutograd) else self.norm(y)

    def step(self, x: Tensor, dy: Tensor) -> Tensor:
        y = self(x)
        params = [x, *self.parameters()]
        grads = torch.autograd.grad(y, params, dy)
        with torch.no_grad():
            for p, grad in zip(params[1:], grads[1:], strict=True):
                p.sub_(grad, alpha=1e-3)
        return y.detach()


def _cross_iteration(each: float) -> list[Comparison]:
    from normplug.layers import CrossIterationBatchNorm

    how = "(CBN - BN) / (CBN by autograd - BN), conv and norm, forward and backward"
    against = {
        "authors": "two autograd.grad calls per layer, as the authors' code",
        "fused": "two autograd.grad calls per layer, but normalized by our op",
    }
    results = {name: Comparison("CBN, its cost over plain BN", text, how, 0.6, False) for name, text in against.items()}
    for dims, channels in CONVOLUTIONS:
        case = f"{'x'.join(map(str, dims))}, 3x3 to {channels}"
        _progress(f"CBN {case}")
        stacks = {
            "BN": Stack(channels, nn.BatchNorm2d(channels)),
            "ours": Stack(channels, CrossIterationBatchNorm(channels, buffer_num=3)),
            "authors": Stack(channels, ByAutograd(channels)),
            "fused": Stack(channels, ByAutograd(channels, fused=True)),
        }
        x, dy = torch.randn(dims).requires_grad_(), torch.randn(dims) / (dims[0] * dims[2] * dims[3])
        for _ in range(5):  # the window is full behind the fourth
            outs = {name: stack.step(x, dy) for name, stack in stacks.items()}
        off = max((outs["ours"] - outs[name]).norm().item() for name in results) / outs["ours"].norm().item()
        if not off < 1e-3:
            for result in results.values():
                result.message = f"{case}: ours and the definition differ by {off:.2g}"
            return list(results.values())
        times = turns({name: functools.partial(s.step, x, dy) for name, s in stacks.items()}, 2 * each)
        ours = [a - b for a, b in zip(times["ours"], times["BN"], strict=True)]
        for name, result in results.items():
            theirs = [a - b for a, b in zip(times[name], times["BN"], strict=True)]
            medians = [quantile(v, 0.5) for v in (times["ours"], times[name], times["BN"])]
            cost, other = medians[0] - medians[2], medians[1] - medians[2]
            by_turn = [a / b for a, b in zip(ours, theirs, strict=True) if b > 0] or [float("nan")]
            low, high = quantile(by_turn, 0.2), quantile(by_turn, 0.8)
            result.parts.append(Part(case, cost, other, cost / other, low, high, len(ours)))
    return [result.close() for result in results.values()]


# --- the report


def markdown(result: dict) -> str:
    """Return the report of a run."""
    rows, parts = [], []
    for c in result["rows"]:
        ratios = [p["ratio"] for p in c["parts"]]
        sign = "at least" if c["at_least"] else "at most"
        if c["value"] is None:
            outcome = ["not measured", "", c["message"]]
        else:
            worst = min(ratios) if c["at_least"] else max(ratios)
            outcome = [f"{c['value']:.2f}", f"{worst:.2f}", "reached" if c["reached"] else "not reached"]
        rows.append([c["what"], c["against"], c["measure"], f"{sign} {c['goal']:g}", *outcome])
        for p in c["parts"]:
            in_bytes = "bytes" in c["measure"]
            values = [f"{p[k]:,.0f} B" if in_bytes else f"{p[k]:.3f} ms" for k in ("ours", "peer")]
            spread = f"{p['ratio_low']:.2f} to {p['ratio_high']:.2f}"
            parts.append(
                [f"{c['what']}, {c['against']}", p["case"], *values, f"{p['ratio']:.2f}", spread, str(p["repetitions"])]
            )
    return (
        "\n\n".join(
            [
                f"# normplug on {result['facts']['device']}",
                "\n".join(describe(result["facts"])),
                markdown_table([["what", "against", "ratio", "goal", "geometric mean", "worst case", ""], *rows]),
                "Both sides take turns in one process, float32; ratios are of medians of "
                + ("the processor's time." if result["facts"]["threads"] == 1 else "the time on the wall."),
                markdown_table(
                    [["what", "case", "ours", "peer", "ratio", "20th to 80th percentile of the turns", "n"], *parts]
                ),
            ]
        )
        + "\n"
    )
