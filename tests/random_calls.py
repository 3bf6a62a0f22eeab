"""Random calls of every layer against its formula in float64: shapes, dtypes, layouts of x and of dy, modes, steps.

    python tests/random_calls.py --cases 10000

prints the worst error of each layer and dtype, and each call that was wrong in a form that can be pasted. The same
draws, few and always the same, are a test (``test_random_calls.py``).

An error is counted in units of the last place of the largest value, and the units allowed are those of
``test_layers.py``. Where a formula enlarges rounding errors, as over two values per channel, more is allowed: eight
times what becomes of its result when each of its operations, forward and backward, rounds its arguments.
"""

import argparse
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import DEVICE, affine, channelwise, evonorm_b0, evonorm_s0, frn, standardized, variance
from test_layers import ULPS
from test_weight_standardization import formula as standardized_filters
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import normplug  # noqa: F401
from normplug.ops._common import acc_dtype
from normplug.registry import MODELS

CONVOLUTIONS = {"ConvWS1d": F.conv1d, "ConvWS2d": F.conv2d, "ConvWS3d": F.conv3d}
BATCH = ("BNAct", "SyncBN", "CBN")
WITH_RESIDUAL = ("GN", "FrozenBatchNorm", *BATCH)
LAYERS = ("GN", "EvoNormS0", "EvoNormB0", "FRN", "FrozenBatchNorm", *BATCH, *CONVOLUTIONS)
# Others round their mean to its type and do not subtract it a second time, or sum products, which must fit float16.
ANY_MEAN = ("GN", "FRN", "FrozenBatchNorm", "BNAct", "SyncBN")
ACTS = {None: lambda z: z, "relu": F.relu, "leaky_relu": F.leaky_relu, "silu": F.silu, "gelu": F.gelu}
KINKED = ("relu", "leaky_relu")
ROUNDED = 3  # evaluations of a formula with rounding
GROWTH = 8  # how many times the change that they find is allowed
COLUMNS = ("y", "dx", "dresidual", "d parameters", "state")


class TooCloseToCall(Exception):
    """A value lies so near a kink (that of a ReLU, say) that rounding decides on which side of it."""


@dataclass(frozen=True)
class Layout:
    """Where the values of a tensor lie in memory."""

    order: tuple[int, ...]  # its axes, the innermost last
    steps: tuple[int, ...]  # every how many-th value along an axis is its own: 1 is dense
    repeated: tuple[int, ...] = ()  # axes along which all values are one, with stride 0
    spare: int | None = None  # the stride of axes of length 1, which is free; None for the natural one


@dataclass(frozen=True)
class Call:
    """One or several calls of a layer, in a form that can be printed and pasted."""

    layer: str
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype
    params: torch.dtype
    x: Layout
    dy: Layout
    residual: Layout | None = None
    training: bool = True
    steps: int = 1
    mean: float = 0.0
    conv: dict[str, int] = field(default_factory=dict)
    seed: int = 0

    @property
    def conv_shape(self) -> tuple[int, ...]:
        """Of the input of the convolution before a CBN, which keeps the size of maps."""
        return self.shape[0], self.conv["in_channels"], *self.shape[2:]

    @property
    def kind(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return name if self.params == self.dtype else f"{name}, float32 parameters"


def place(values: Tensor, layout: Layout) -> Tensor:
    """Return a tensor of these values (the first ones of repeated axes) in a layout, NaN around them."""
    lengths = [1 if axis in layout.repeated else n for axis, n in enumerate(values.shape)]
    memory = values.new_full([lengths[axis] * layout.steps[axis] for axis in layout.order], float("nan"))
    inverse = sorted(range(values.ndim), key=layout.order.__getitem__)
    t = memory.permute(inverse)[tuple(slice(None, None, step) for step in layout.steps)]
    t.copy_(values[tuple(slice(n) for n in lengths)])
    t = t.expand(values.shape)
    if layout.spare is not None:
        strides = [layout.spare if n == 1 else stride for n, stride in zip(t.shape, t.stride(), strict=True)]
        t = t.as_strided(t.shape, strides)
    return t


def dense_layouts(shape: tuple[int, ...]) -> Iterator[Layout]:
    """Yield every dense layout of a shape, with some strides that an axis of length 1 may have."""
    seen = set()
    for order in itertools.permutations(range(len(shape))):
        for spare in (None, 1) if 1 in shape else (None,):
            layout = Layout(order, (1,) * len(shape), spare=spare)
            strides = place(torch.empty(shape), layout).stride()
            if strides not in seen:
                seen.add(strides)
                yield layout


# --- formulas


def wide(t: Tensor) -> Tensor:
    """Return a copy in float64, also of what is: steps write to parameters."""
    return t.detach().double().clone(memory_format=torch.contiguous_format)


class Rounding(TorchDispatchMode):
    """Changes the arguments of every operation by one unit of a size, up or down at random, the gradients' too."""

    def __init__(self, unit: float, seed: int) -> None:
        super().__init__()
        self.unit, self.generator = unit, torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func._schema.is_mutable:
            args = tree_map(self.round, args)
        return func(*args, **(kwargs or {}))

    def round(self, t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        signs = torch.randint(0, 2, t.shape, generator=self.generator).to(t) * 2 - 1
        return t * (1 + self.unit * signs)


class Formula:
    """A layer's mathematics in float64, with what it remembers: the earlier batches of CBN."""

    def __init__(self, call: Call, rounding: Rounding | None = None) -> None:
        self.call, self.rounding = call, rounding or nullcontext()
        self.earlier: list[tuple[Tensor, ...]] = []
        self.steps = 0
        self.kinks: list[tuple[Tensor, Tensor]] = []  # of this step: distances from kinks, and the size of values

    def step(self, *args: Any) -> dict[str, Tensor]:
        """Return what ``results`` does."""
        with self.rounding:
            return self.results(*args)

    def kink(self, distance: Tensor, values: Tensor) -> None:
        if distance.numel():
            self.kinks.append((distance.detach(), values.detach().abs().max()))

    def results(
        self, layer: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor, conv: nn.Module | None, before: Tensor
    ) -> dict[str, Tensor]:
        """Return output, gradients and state of the next step of ``layer``, which has not made it yet, by name.

        Args:
            layer: Parameters and buffers are read from it.
            x: Its input.
            residual: What is added before the activation.
            dy: The gradient of its output.
            conv: The convolution that x comes from, where the layer needs it.
            before: The input of that.
        """
        self.steps += 1
        self.kinks = []
        inputs = {"x": wide(x)} | ({} if residual is None else {"residual": wide(residual)})
        inputs |= {name: wide(p) for name, p in layer.named_parameters()}
        inputs = {name: t.requires_grad_() for name, t in inputs.items()}
        buffers = {name: wide(b) for name, b in layer.named_buffers() if b.is_floating_point()}
        p = dict(inputs)
        z, state = self.normalized(layer, p.pop("x"), p, buffers, conv, before)
        if residual is not None:
            z = z + inputs["residual"]
        act = self.call.kwargs.get("act")
        if act in KINKED:
            self.kink(z, z)
        y = ACTS[act](z)
        grads = torch.autograd.grad(y, [*inputs.values()], wide(dy), allow_unused=True)
        return {"y": y.detach()} | {f"d{name}": g for name, g in zip(inputs, grads, strict=True)} | state

    def normalized(
        self,
        layer: nn.Module,
        x: Tensor,
        p: dict[str, Tensor],
        buffers: dict[str, Tensor],
        conv: nn.Module | None,
        before: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what stands before residual and activation, and the state afterwards."""
        name, kwargs = self.call.layer, self.call.kwargs
        eps = kwargs["eps"]
        if name in CONVOLUTIONS:
            filters = standardized_filters(p["weight"], eps, kwargs["correction"], kwargs["eps_inside"])
            geometry = layer.stride, layer.padding, layer.dilation, layer.groups
            return CONVOLUTIONS[name](x, filters, p.get("bias"), *geometry), {"filters": filters.detach()}
        ones = torch.ones(x.shape[1]).to(x)
        constants = {"weight": ones, "bias": ones - 1} | ({} if name != "FrozenBatchNorm" else buffers)
        p = {k: v for k, v in (constants | p).items() if k not in ("residual", "running_mean", "running_var")}
        if kwargs.get("apply_act") is False and name != "FRN":
            return affine(x, p["weight"], p["bias"]), {}
        if name == "GN":
            groups = x.unflatten(1, (kwargs["num_groups"], -1))
            x_hat = standardized(groups, tuple(range(2, groups.ndim)), eps).flatten(1, 2)
            return affine(x_hat, **p), {}
        if name == "EvoNormS0":
            return evonorm_s0(kwargs["num_groups"], eps)(x, **p), {}
        if name == "FRN":
            if "tau" in p:
                z = frn(eps)(x, **{k: v for k, v in p.items() if k != "tau"})
                self.kink(z - channelwise(p["tau"], x), z)
            return frn(eps)(x, **p), {}
        if name == "EvoNormB0":
            return self.evonorm_b0(x, p, buffers, eps)
        outside = kwargs.get("eps_mode") == "outside"
        if name == "FrozenBatchNorm" or (not self.call.training and buffers):
            mean, var = buffers["running_mean"], buffers["running_var"]
            divisor = var.sqrt() + eps if outside else (var + eps).sqrt()
            return affine((x - channelwise(mean, x)) / channelwise(divisor, x), **p), buffers
        if name == "CBN" and self.call.training and x.numel():
            return self.cross_iteration(x, p, buffers, conv, before)
        return affine(standardized(x, (0, *range(2, x.ndim)), eps), **p), self.moved(buffers, x)

    def moved(self, buffers: dict[str, Tensor], x: Tensor, unbiased: bool = True) -> dict[str, Tensor]:
        """Return the running statistics after a batch."""
        if not self.call.training or x.numel() == 0:
            return buffers
        momentum = self.call.kwargs["momentum"]
        share = 1 / self.steps if momentum is None else momentum
        values = x.detach().transpose(0, 1).flatten(1)
        new = {"running_mean": values.mean(1), "running_var": values.var(1, correction=int(unbiased))}
        return {name: old + share * (new[name] - old) for name, old in buffers.items()}

    def evonorm_b0(self, x, p, buffers, eps) -> tuple[Tensor, dict[str, Tensor]]:
        var = None if self.call.training else buffers["running_var"]
        values = x.detach().reshape(*x.shape[:2], x.shape[2:].numel())
        bound = ((variance(values, (0, 2)) if var is None else var.view(1, -1, 1)) + eps).sqrt()
        self.kink(p["v"].view(1, -1, 1) * values + (variance(values, (2,)) + eps).sqrt() - bound, bound)
        return evonorm_b0(var, eps)(x, **p), self.moved(buffers, x, self.call.kwargs["running_unbiased"])

    def cross_iteration(self, x, p, buffers, conv, before) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 7 to 12 of the paper: mean and second moment of earlier batches, expanded to the filters of now."""
        kwargs = self.call.kwargs
        values = x.transpose(0, 1).flatten(1)
        count, mean, second = values.shape[1], values.mean(1), values.square().mean(1)
        means, variances = [mean], [variance(values, (1,)).squeeze(1)]
        if kwargs["buffer_num"] and self.steps > kwargs["burnin"]:
            w = wide(conv.weight).requires_grad_()
            products = conv.multiply(wide(before), w)
            d_mean = torch.autograd.grad(products.sum() / count, w, retain_graph=True)[0]
            # x is the product as the convolution rounds it: what it is times its derivative, not that of its square
            d_second = torch.autograd.grad((products * x.detach()).sum() * 2 / count, w)[0]
            w = w.detach()
            for mean0, second0, d_mean0, d_second0, w0 in self.earlier:
                moves = ((d * (w - w0)).flatten(1).sum(1) * kwargs["rho"] for d in (d_mean0, d_second0))
                moved_mean, moved_second = (m + move for m, move in zip((mean0, second0), moves, strict=True))
                means.append(moved_mean)
                variances.append(moved_second - moved_mean.square())
                self.kink(variances[-1], moved_second)
            self.earlier = [(mean.detach(), second.detach(), d_mean, d_second, w), *self.earlier][
                : kwargs["buffer_num"]
            ]
        elif kwargs["official_burnin_var"] and self.steps <= kwargs["burnin"]:
            variances[0] = variances[0] * count / (count - 1)
        means, variances = torch.stack(means), torch.stack(variances)
        keep = (variances >= 0).double() if kwargs["rule"] == "drop" else torch.ones_like(variances)
        keep[0] = 1
        centre = (keep * means).sum(0) / keep.sum(0)
        spread = (keep * (variances.clamp(min=0) + (means - centre).square())).sum(0) / keep.sum(0)
        if kwargs["eps_mode"] == "outside":
            self.kink(spread, second)  # the root of the variance of equal values has no derivative
        divisor = spread.sqrt() + kwargs["eps"] if kwargs["eps_mode"] == "outside" else (spread + kwargs["eps"]).sqrt()
        state = self.moved(buffers, x)
        for age, (mean0, second0, *_) in enumerate(self.earlier):
            state |= {f"history.0.{age}.mean": mean0, f"history.0.{age}.var": second0 - mean0.square()}
        return affine((x - channelwise(centre, x)) / channelwise(divisor, x), **p), state


# --- one call


class Placed:
    """A convolution whose output comes in a layout of ours, as a leaf."""

    layout: Layout

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, None)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = place(super().forward(x), self.layout)
        return y.requires_grad_()


def build(call: Call) -> tuple[nn.Module, nn.Module | None]:
    """Return the layer, with random parameters and running statistics, and for CBN the convolution before it."""
    cls, conv = MODELS.get(call.layer), None
    layer = cls(**call.conv, **call.kwargs) if call.layer in CONVOLUTIONS else cls(call.shape[1], **call.kwargs)
    for name, t in (*layer.named_parameters(), *layer.named_buffers()):
        if name == "running_var":
            nn.init.uniform_(t, 0.5, 2)
        elif t.is_floating_point():
            nn.init.normal_(t, mean=1.0)
    if call.layer == "CBN" and call.conv:
        conv = type("Conv", (Placed, (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(call.shape) - 3]), {})(**call.conv)
        conv.layout = call.x
        conv.to(DEVICE, call.dtype).train(call.training)
    return layer.to(DEVICE, call.params).train(call.training), conv


def results(layer: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    """Return what a step of the layer gives, under the names of ``Formula.results``."""
    y = layer(x) if residual is None else layer(x, residual)
    inputs = {"x": x} | ({} if residual is None else {"residual": residual}) | dict(layer.named_parameters())
    grads = torch.autograd.grad(y, [*inputs.values()], dy, allow_unused=True)
    filters = {"filters": layer.standardized_weight().detach()} if hasattr(layer, "standardized_weight") else {}
    found = {f"d{name}": g for name, g in zip(inputs, grads, strict=True)}
    return {"y": y.detach()} | found | state_of(layer) | filters


def state_of(layer: nn.Module) -> dict[str, Tensor]:
    """Return running statistics, and mean and variance of the batches that a CBN remembers."""
    state = {name: b for name, b in layer.named_buffers() if b.is_floating_point()}
    if getattr(layer, "buffer_num", 0):
        known = [t for t in layer.state_dict().items() if t[0].startswith("history")]
        state |= {name: t for name, t in known if name.endswith((".mean", ".var"))}
    return state


class Error(NamedTuple):
    """An error in units of the last place, as the head of this file counts them; the worst has the largest share."""

    share: float  # of what is allowed
    ulps: float


@contextmanager
def right_convolutions(call: Call) -> Iterator[None]:
    """Keep oneDNN out of convolutions in bfloat16, which it gets wrong on some CPUs (docs/upstream-batch-norm.md)."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = before and call.dtype != torch.bfloat16
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def run(call: Call) -> dict[str, Error]:
    """Return the worst error of each column over all steps of a call.

    Raises:
        TooCloseToCall: If the formula alone cannot say which side of a kink a value is on.
        AssertionError: If an input was written to, or the output has another shape, dtype or memory format.
    """
    with right_convolutions(call):
        return errors_of(call)


def errors_of(call: Call) -> dict[str, Error]:
    torch.manual_seed(call.seed)
    layer, conv = build(call)
    dtype = call.dtype if call.layer in CONVOLUTIONS else acc_dtype(torch.empty(0, dtype=call.dtype))
    unit = torch.finfo(dtype).eps
    formulas = [Formula(call), *(Formula(call, Rounding(unit, i)) for i in range(ROUNDED))]
    worst: dict[str, Error] = {}
    for _ in range(call.steps):
        before = values(call.conv_shape, call) if conv is not None else None
        x = place(values(call.shape, call), call.x).requires_grad_() if conv is None else conv(before)
        residual = None if call.residual is None else place(values(call.shape, call), call.residual).requires_grad_()
        shape = layer(x.detach()).shape if call.layer in CONVOLUTIONS else x.shape
        dy = place(torch.randn(shape).to(DEVICE, call.dtype), call.dy)
        want, *others = (f.step(layer, x, residual, dy, conv, before) for f in formulas)
        check_kinks(formulas, unit)
        kept = [t.detach().clone() for t in (x, dy, *([] if residual is None else [residual]))]
        got = results(layer, x, residual, dy)
        y = got["y"]
        assert y.shape == shape, f"output of shape {tuple(y.shape)} for {tuple(shape)}"
        assert y.dtype == call.dtype, f"output of {y.dtype} for {call.dtype}"
        if call.layer not in CONVOLUTIONS:
            check_layout(x, y)
        for before_call, after in zip(kept, (x, dy, residual), strict=False):
            assert torch.equal(before_call, after.detach()), "an input was written to"
        for name, w in want.items():
            column = name if name in COLUMNS else "d parameters" if name.startswith("d") else "state"
            error = compare(got[name], w, [other[name] for other in others])
            worst[column] = max(worst.get(column, error), error)
        with torch.no_grad():
            for p in (*layer.parameters(), *(() if conv is None else conv.parameters())):
                p.add_(0.1 * torch.randn_like(p))
    return worst


def values(shape: tuple[int, ...], call: Call) -> Tensor:
    return (call.mean + torch.randn(shape)).to(DEVICE, call.dtype)


def check_kinks(formulas: list[Formula], unit: float) -> None:
    for (distance, size), *others in zip(*(f.kinks for f in formulas), strict=True):
        spread = max((distance - other).abs().max() for other, _ in others)
        if (distance.abs() < 32 * torch.maximum(spread, unit * size)).any():
            raise TooCloseToCall


def check_layout(x: Tensor, y: Tensor) -> None:
    if x.is_contiguous():
        assert y.is_contiguous(), f"output of strides {y.stride()} for contiguous input"
    elif x.ndim > 3 and x.movedim(1, -1).is_contiguous():
        assert y.movedim(1, -1).is_contiguous(), f"output of strides {y.stride()} for channels-last input"


def compare(got: Tensor | None, want: Tensor | None, others: list[Tensor]) -> Error:
    """Return the error of a result; ``others`` are what the formula makes of changed inputs."""
    if want is None or want.numel() == 0:
        assert got is None or got.numel() == 0 or not got.any(), "a gradient of what has no part in the output"
        return Error(0, 0)
    if got is None:
        got = torch.zeros_like(want)
    assert got.shape == want.shape, f"shape {tuple(got.shape)} where {tuple(want.shape)} was expected"
    info = torch.finfo(got.dtype)
    change = max((other - want).abs().max() for other in others)
    last_place = (info.eps * want.abs().max().clamp(max=info.max)).clamp(min=info.tiny * info.eps)
    allowed = ULPS[got.dtype] * last_place + GROWTH * change
    # A value beyond the range of a type is right if it is infinite.
    overflows = got.isinf() & (got == want.to(got.dtype))
    error = torch.where(overflows, 0.0, (got.double() - want).abs()).max()
    share = float("inf") if error.isnan() else (error / allowed).item()
    return Error(share, share * ULPS[got.dtype])


# --- drawing

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = {3: (1, 2, 5, 9, 70), 4: (1, 1, 2, 3, 5, 9), 5: (1, 1, 2, 3, 4)}  # of the axes of a map, by the rank of x


def draw_layout(draw: Random, shape: tuple[int, ...], repeats: bool = True) -> Layout:
    """Return a layout: contiguous, channels-last, any other dense one, with steps, or with repeated values."""
    ndim = len(shape)
    axes = tuple(range(ndim))
    kind = draw.choice(["contiguous", "last", "dense", "dense", "steps", "repeated"])
    order = axes if kind in ("contiguous", "repeated") else (0, *axes[2:], 1) if kind == "last" else None
    order = order or tuple(draw.sample(axes, ndim))
    steps = tuple(draw.choice([1, 2]) if kind == "steps" else 1 for _ in axes)
    repeated = tuple(a for a in axes if kind == "repeated" and repeats and shape[a] > 1 and draw.random() < 0.5)
    spare = draw.choice([None, 0, 1, 7, 1000]) if 1 in shape else None
    return Layout(order, steps, repeated, spare)


def draw_call(draw: Random, layer: str | None = None) -> Call:
    """Return a call of one layer, or of any."""
    name = layer or draw.choice(LAYERS)

    def chosen(*values):
        return draw.choice(values)

    ndim = int(name[6]) + 2 if name in CONVOLUTIONS else chosen(2, 3, 4, 4, 5)
    channels = chosen(1, 2, 3, 4, 6, 8, 12)
    shape = (chosen(0, 1, 1, 2, 3, 5), channels, *(chosen(*SIZES[ndim]) for _ in range(ndim - 2)))
    training = chosen(True, True, False)
    dtype = chosen(*DTYPES)
    params = chosen(dtype, torch.float32) if dtype.itemsize < 4 and name not in CONVOLUTIONS else dtype
    kwargs = draw_options(draw, name, shape)
    conv = draw_convolution(draw, name, channels) if kwargs.get("buffer_num") or name in CONVOLUTIONS else {}
    if shape[0] * math.prod(shape[2:]) == 1 and takes_statistics_over_batch(name, kwargs, training):
        shape = (2, *shape[1:])  # a single value is refused
    constant_channels = kwargs.get("eps_mode") != "outside" and not conv
    x = draw_layout(draw, shape, repeats=constant_channels)
    return Call(
        name,
        kwargs,
        shape,
        dtype,
        params,
        x,
        dy=draw_layout(draw, shape),
        residual=draw_layout(draw, shape) if name in WITH_RESIDUAL and draw.random() < 0.5 else None,
        training=training,
        steps=chosen(1, 2, 4) if name in (*BATCH, "EvoNormB0") else 1,
        mean=chosen(0.0, 0.0, 10.0, 1000.0 if name in ANY_MEAN else 10.0),
        conv=conv,
        seed=draw.randrange(10**6),
    )


def draw_options(draw: Random, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return arguments of a layer for an input of a shape."""

    def chosen(*values):
        return draw.choice(values)

    channels, positions = shape[1], math.prod(shape[2:])
    groups = [g for g in range(1, channels + 1) if channels % g == 0]
    kwargs: dict[str, Any] = {"eps": chosen(1e-5, 1e-3)}
    if name in CONVOLUTIONS:
        return kwargs | {"correction": chosen(0, 1), "eps_inside": chosen(True, False)}
    if name == "FRN":
        kwargs["eps"] = chosen(1.0, 1e-2, *([1e-6] if positions > 1 else []))  # it warns of smaller ones
        learned = {"learnable_eps": True, "eps_per_channel": chosen(True, False)}
        return kwargs | chosen({}, {"apply_act": False}, learned)
    if name in WITH_RESIDUAL:
        kwargs["act"] = chosen(None, None, *list(ACTS)[1:])
    if name == "FrozenBatchNorm":
        return kwargs
    kwargs["affine"] = chosen(True, True, False)
    if name == "GN":
        kwargs["num_groups"] = chosen(*groups)
    if name == "EvoNormS0":
        kwargs["num_groups"] = chosen(*[g for g in groups if channels * positions > g] or [1])
    if name == "EvoNormB0":
        kwargs |= {"running_unbiased": chosen(True, False), "momentum": chosen(0.1, 0.3)}
    if name in ("EvoNormS0", "EvoNormB0"):  # a group of a single value is refused
        kwargs["apply_act"] = chosen(True, True, False) and (name == "EvoNormB0" or channels * positions > 1)
    if name in BATCH:
        kwargs |= {"track_running_stats": chosen(True, True, False), "momentum": chosen(0.1, 0.3, None)}
    if name in ("BNAct", "SyncBN"):
        kwargs["bias"] = chosen(True, True, False)
    if name == "CBN":
        kwargs |= {"buffer_num": chosen(0, 1, 3) if len(shape) > 2 else 0}  # no convolution has an output of two axes
        kwargs |= {"burnin": chosen(0, 0, 2), "official_burnin_var": chosen(False, True), "rho": chosen(1.0, 0.5)}
        kwargs |= {"eps_mode": chosen("inside", "inside", "outside"), "rule": chosen("drop", "max")}
    return kwargs


def draw_convolution(draw: Random, name: str, channels: int) -> dict[str, Any]:
    """Return arguments of a layer that is a convolution of these channels, or of one that a CBN of them follows."""
    groups = draw.choice([g for g in (1, 2, 3) if channels % g == 0])
    if name in CONVOLUTIONS:
        conv = {"in_channels": channels, "out_channels": groups * draw.choice([1, 2, 4]), "groups": groups}
        return conv | {
            "kernel_size": 3,
            "padding": 1,
            "stride": draw.choice([1, 2]),
            "bias": draw.choice([True, False]),
        }
    kernel = draw.choice([1, 3])
    conv = {"in_channels": 2 * groups, "out_channels": channels, "groups": groups}
    return conv | {"kernel_size": kernel, "padding": kernel // 2, "bias": False}


def takes_statistics_over_batch(name: str, kwargs: dict[str, Any], training: bool) -> bool:
    if name == "EvoNormB0":
        return training and kwargs["apply_act"]
    return name in BATCH and (training or not kwargs["track_running_stats"])


# --- many calls


@dataclass
class Row:
    """What the calls of a layer in a dtype came to."""

    cases: int = 0
    wrong: int = 0
    worst: dict[str, Error] = field(default_factory=dict)

    def add(self, errors: dict[str, Error]) -> None:
        self.cases += 1
        self.wrong += any(error.share > 1 for error in errors.values())
        for column, error in errors.items():
            self.worst[column] = max(self.worst.get(column, error), error)


def campaign(cases: int, first: int = 0, layer: str | None = None) -> tuple[dict[tuple[str, str], Row], list[str], int]:
    """Run random calls.

    Args:
        cases: Their number.
        first: Seed of the first; the others follow.
        layer: All of one layer.

    Returns:
        What they came to by layer and dtype, lines about the wrong ones, and how many were too close to call.
    """
    rows: dict[tuple[str, str], Row] = defaultdict(Row)
    wrong: list[str] = []
    too_close = 0
    for i in range(cases):
        call = draw_call(Random(first + i), layer)
        row = rows[call.layer, call.kind]
        try:
            errors = run(call)
        except TooCloseToCall:
            too_close += 1
            continue
        except Exception as error:  # a layer may fail in any way: it is counted, and the next one has its turn
            row.cases, row.wrong = row.cases + 1, row.wrong + 1
            wrong.append(f"{type(error).__name__}: {error}\n    {call}")
        else:
            row.add(errors)
            bad = [f"{column} off by {e.ulps:.3g}" for column, e in errors.items() if e.share > 1]
            wrong.extend([f"{', '.join(bad)}\n    {call}"] if bad else [])
        if (i + 1) % 500 == 0:
            print(f"{i + 1} calls, {len(wrong)} wrong", file=sys.stderr, flush=True)
    return rows, wrong, too_close


def table(rows: dict[tuple[str, str], Row]) -> str:
    lines = ["| layer | dtype | cases | wrong | " + " | ".join(COLUMNS) + " |", "|---" * (4 + len(COLUMNS)) + "|"]
    for (layer, kind), row in sorted(rows.items()):
        cells = [f"{row.worst[column].ulps:.2f}" if column in row.worst else "" for column in COLUMNS]
        lines.append(f"| {layer} | {kind} | {row.cases} | {row.wrong} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layer", choices=LAYERS)
    args = parser.parse_args()
    if args.cases < 1:
        parser.error(f"--cases is the number of calls, 1 or more, but got {args.cases}.")
    torch.set_num_threads(1)
    rows, wrong, too_close = campaign(args.cases, args.seed, args.layer)
    print(table(rows))
    total = sum(row.cases for row in rows.values())
    print(f"\n{total} calls, {len(wrong)} wrong; {too_close} more had a value too close to a kink to tell.")
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
