"""The ops: what each computes (in float64: the judge), the bytes it has to move, its inputs, and our call of it."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normplug.bench.shapes import Shape

__all__ = ["OPS", "Op", "Problem", "Traffic", "count_bytes", "make_problem"]

GROUPS = 32
EPS = 1e-5
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Traffic:
    """The least an op has to read and write in memory, named tensor by tensor: "inputs > outputs".

    Every tensor of x's size counts once, however often a kernel reads it: statistics of more than a chip holds make
    a second read necessary, and that is the kernel's loss. Backward has what our forward keeps, the input and a few
    statistics, and what the residual sum needs again. Per-channel parameters are read by both passes, and their
    gradients written; statistics are not counted.
    """

    forward: str
    backward: str

    def tensors(self, backward: bool) -> int:
        """Return how many tensors of x's size the forward pass moves, or forward and backward together."""
        text = f"{self.forward} {self.backward}" if backward else self.forward
        return len(text.replace(">", " ").split())


@dataclass(frozen=True)
class Op:
    """One line of the benchmark.

    Args:
        name: As ``--ops`` takes it.
        role: Which shapes it is measured on.
        ours: Our op: takes the tensors by name, returns one output or a list.
        formula: The same in plain torch, for any dtype, and how far each value is from a kink of the function (the
            zero of a ReLU), or None: near a kink two right answers have different gradients.
        traffic: The bytes it has to move.
        vectors: Names of its per-channel parameters.
        condition: By how much the formula enlarges rounding errors.
    """

    name: str
    role: str
    ours: Callable[..., Tensor | Sequence[Tensor]]
    formula: Callable[..., tuple[Tensor | Sequence[Tensor], Tensor | None]]
    traffic: Traffic
    vectors: tuple[str, ...] = ("weight", "bias")
    condition: float = 1


@dataclass
class Problem:
    """Inputs, and the gradient of each output."""

    op: Op
    shape: Shape
    dtype: torch.dtype
    tensors: Tensors
    dys: list[Tensor]
    reference: Tensors  # in float64: outputs y0, y1 ..., and the gradient of each input by its name


def count_bytes(op: Op, shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """Return the bytes that forward, or forward and backward, must move at least: see ``Traffic``."""
    values = sum(torch.Size(dims).numel() for dims in shape.dims)
    passes = 3 if backward else 1  # parameters are read by both, and their gradients written
    return op.traffic.tensors(backward) * values * dtype.itemsize + passes * len(op.vectors) * shape.dims[0][1] * 4


def channelwise(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (x.ndim - 2))


def group_norm_formula(act: bool):
    def formula(x, weight, bias, residual=None):
        groups = x.unflatten(1, (GROUPS, -1))
        rest = tuple(range(2, groups.ndim))
        centred = groups - groups.mean(rest, keepdim=True)
        x_hat = (centred / (centred.square().mean(rest, keepdim=True) + EPS).sqrt()).flatten(1, 2)
        z = x_hat * channelwise(weight, x) + channelwise(bias, x)
        z = z if residual is None else z + residual
        return (z.relu(), z) if act else (z, None)

    return formula


def batch_norm_formula(x, weight, bias, residual=None):
    rest = (0, *range(2, x.ndim))
    centred = x - x.mean(rest, keepdim=True)
    x_hat = centred / (centred.square().mean(rest, keepdim=True) + EPS).sqrt()
    z = x_hat * channelwise(weight, x) + channelwise(bias, x)
    z = z if residual is None else z + residual
    return z.relu(), z


def evonorm_s0_formula(x, weight, bias, v):
    groups = x.unflatten(1, (GROUPS, -1))
    std = (groups.var(tuple(range(2, groups.ndim)), correction=0, keepdim=True) + EPS).sqrt()
    gated = (x * torch.sigmoid(channelwise(v, x) * x)).unflatten(1, (GROUPS, -1))
    return (gated / std).flatten(1, 2) * channelwise(weight, x) + channelwise(bias, x), None


def evonorm_b0_formula(x, weight, bias, v):
    batch = (x.var((0, *range(2, x.ndim)), correction=0, keepdim=True) + EPS).sqrt()
    instance = (x.var(tuple(range(2, x.ndim)), correction=0, keepdim=True) + EPS).sqrt()
    other = channelwise(v, x) * x + instance
    y = x / torch.maximum(batch, other) * channelwise(weight, x) + channelwise(bias, x)
    return y, other - batch


def filter_response_norm_formula(x, weight, bias, tau):
    z = x * (x.square().mean(tuple(range(2, x.ndim)), keepdim=True) + EPS).rsqrt()
    z = z * channelwise(weight, x) + channelwise(bias, x)
    return torch.maximum(z, channelwise(tau, x)), z - channelwise(tau, x)


def weight_standardize_formula(**weights):
    outs = []
    for weight in weights.values():
        rest = tuple(range(1, weight.ndim))
        std = weight.std(rest, keepdim=True)
        outs.append((weight - weight.mean(rest, keepdim=True)) / (std + EPS))
    return outs, None


def group_norm(act: str | None):
    def ours(x, weight, bias, residual=None):
        from normplug.ops import group_norm

        return group_norm(x, GROUPS, weight, bias, EPS, act, residual)

    return ours


def batch_norm_relu(x, weight, bias, residual=None):
    from normplug.ops import batch_norm_act

    return batch_norm_act(x, weight, bias, EPS, "relu", residual)[0]


def sync_batch_norm_relu(x, weight, bias):
    """Take the way of several ranks, in a group of one: the collectives run and have nothing to wait for."""
    from normplug.layers.sync_batch_norm import synchronized

    layer = _sync_layer(len(weight), x.device)
    layer.weight, layer.bias = weight, bias
    return synchronized(layer, x, None, layer.act)


@functools.cache
def _sync_layer(channels: int, device: torch.device):
    from normplug.layers import SyncBatchNorm

    return SyncBatchNorm(channels, EPS, act="relu", device=device)


def evonorm_s0(x, weight, bias, v):
    from normplug.ops import evonorm_s0

    return evonorm_s0(x, GROUPS, weight, bias, v, EPS)


def evonorm_b0(x, weight, bias, v):
    from normplug.ops import evonorm_b0

    return evonorm_b0(x, weight, bias, v, None, EPS)[0]


def filter_response_norm(x, weight, bias, tau):
    from normplug.ops import filter_response_norm

    return filter_response_norm(x, weight, bias, tau, EPS)


def weight_standardize(**weights):
    from normplug.ops import weight_standardize

    return [weight_standardize(weight, EPS) for weight in weights.values()]


def weight_standardize_many(**weights):
    from normplug.ops import weight_standardize_many

    return weight_standardize_many(list(weights.values()), EPS)


NORM = Traffic("x > y", "dy x > dx")
FILTERS = Traffic("w > y", "dy w > dw")
SUM = Traffic("x residual > y", "dy x residual > dx dresidual")
_OPS = [  # in the order in which they are measured: the goals first
    Op("group_norm_relu", "act", group_norm("relu"), group_norm_formula(True), NORM),
    Op("group_norm_add_relu", "add", group_norm("relu"), group_norm_formula(True), SUM),
    Op("evonorm_s0", "act", evonorm_s0, evonorm_s0_formula, NORM, ("weight", "bias", "v")),
    Op("weight_standardize_many", "weights", weight_standardize_many, weight_standardize_formula, FILTERS, ()),
    Op("sync_batch_norm_relu", "act", sync_batch_norm_relu, batch_norm_formula, NORM),
    Op("batch_norm_relu", "act", batch_norm_relu, batch_norm_formula, NORM),
    Op("batch_norm_add_relu", "add", batch_norm_relu, batch_norm_formula, SUM),
    Op("group_norm", "plain", group_norm(None), group_norm_formula(False), NORM),
    # v x + std may cancel
    Op("evonorm_b0", "act", evonorm_b0, evonorm_b0_formula, NORM, ("weight", "bias", "v"), condition=4),
    Op(
        "filter_response_norm",
        "act",
        filter_response_norm,
        filter_response_norm_formula,
        NORM,
        ("weight", "bias", "tau"),
    ),
    Op("weight_standardize", "weights", weight_standardize, weight_standardize_formula, FILTERS, ()),
]
OPS = {op.name: op for op in _OPS}


def make_problem(op: Op, shape: Shape, dtype: torch.dtype, channels_last: bool, device: torch.device) -> Problem:
    """Draw random inputs, and compute what is right for them in float64.

    Parameters are float32, as under AMP, with values that a half type has too: peers may take them as such.
    """
    tensors = {}
    for i, dims in enumerate(shape.dims):
        x = torch.randn(dims, device=device).add_(0.5)
        tensors["x" if op.role != "weights" else f"w{i}"] = _laid_out(x.to(dtype), channels_last)
    for name in op.vectors:
        mean = 1.0 if name in ("weight", "v") else 0.0
        values = torch.randn(shape.dims[0][1], device=device).mul_(0.25).add_(mean)
        tensors[name] = torch.nn.Parameter(values.bfloat16().float())
    if op.role == "add":
        tensors["residual"] = _laid_out(torch.randn(shape.dims[0], device=device).to(dtype), channels_last)
    for t in tensors.values():
        t.requires_grad_()
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    outs, kink = op.formula(**wide)
    outs = list(as_list(outs))
    dys = [_laid_out(torch.randn_like(y).to(dtype), channels_last) for y in outs]
    if kink is not None:  # no gradient comes in where it depends on the last digit
        dys = [dy.masked_fill_(kink.detach().abs() < max(1e-4, 4 * torch.finfo(dtype).eps), 0) for dy in dys]
    grads = torch.autograd.grad(outs, list(wide.values()), [dy.double() for dy in dys])
    reference = {f"y{i}": y.detach() for i, y in enumerate(outs)} | dict(zip(wide, grads, strict=True))
    return Problem(op, shape, dtype, tensors, dys, reference)


def as_list(outs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [outs] if isinstance(outs, Tensor) else outs


def _laid_out(x: Tensor, channels_last: bool) -> Tensor:
    if not channels_last:
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
