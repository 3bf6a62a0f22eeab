"""evonorm_s0: x * sigmoid(v * x) divided by the standard deviation of its group."""

import math

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from normplug.ops._blocks import blocks, planes
from normplug.ops._common import (
    acc_dtype,
    affine,
    as_parameter,
    check_groups,
    check_parameters,
    dense,
    per_channel,
    recalled_bias,
)
from normplug.ops._counting import is_counted
from normplug.ops._registration import define, differentiable, in_torch, use_kernel, without_gradient

__all__ = ["evonorm_s0"]


def evonorm_s0(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    v: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Return x * sigmoid(v * x) / sqrt(var + eps) * weight + bias.

    The variance (population, eps inside the root) runs over C / num_groups channels and all positions of one
    sample. Nothing is subtracted from x.

    Args:
        x: Input (N, C, *), with any number of axes behind C; empty batches are fine.
        num_groups: Number of groups; divides C.
        weight: Scale per channel (C,), or None for 1.
        bias: Shift per channel (C,), or None for 0.
        v: Slope of the sigmoid per channel (C,).
        eps: Added to the variance.

    Returns:
        A tensor with shape, dtype and memory format of x; everything in between is computed in float32 (float64
        for a float64 x).

    Raises:
        TypeError: If x or another argument that should be one is no dense floating-point tensor.
        ValueError: If x has no channel axis, num_groups does not divide C, or a parameter is not (C,).

    Reference:
        H. Liu, A. Brock, K. Simonyan, Q. Le, "Evolving Normalization-Activation Layers", NeurIPS 2020, table 2.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(evonorm_s0, (x,), x, num_groups, weight, bias, v, eps)
    check_parameters("evonorm_s0", x, weight=weight, bias=bias, v=v)
    check_groups("evonorm_s0", x, num_groups)
    if in_torch():
        args = x, num_groups, weight, bias, v, eps
        return _op(*args)[0] if is_counted(_op, weight=2) else formula(*args)
    return _call(dense(x), num_groups, weight, bias, v, eps)


def formula(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, v: Tensor, eps: float) -> Tensor:
    """Return ``evonorm_s0`` by torch's operations."""
    t = x.to(acc_dtype(x))
    by_group = t.unflatten(1, (num_groups, -1))
    rest = tuple(range(2, by_group.ndim))
    size = x.shape[1] // num_groups * math.prod(x.shape[2:])  # those of by_group are constants to an ONNX exporter
    centred = by_group - by_group.sum(rest, keepdim=True) / size
    var = centred.square().sum(rest, keepdim=True) / size
    z = (t * torch.sigmoid(per_channel(v.to(t.dtype), x) * t)).unflatten(1, (num_groups, -1))
    return affine((z * (var + eps).rsqrt()).flatten(1, 2), weight, bias).to(x.dtype)


def _spread(stats: Tensor, channels: int) -> Tensor:
    """Repeat statistics (N, G) of groups for each of their channels: (N, C, 1)."""
    return stats.repeat_interleave(channels // stats.shape[1], 1).unsqueeze(2)


def _of_groups(sums: Tensor, num_groups: int) -> Tensor:
    """Add sums (N, C) or (N, C, P) up over the channels of each group: (N, G)."""
    return sums.unflatten(1, (num_groups, -1)).sum(tuple(range(2, sums.ndim + 1)))


def reference(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, v: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Map x (N, C, *) to y, laid out as x, and the mean and 1/std (N, G) that backward needs."""
    y, wide = torch.empty_like(x), acc_dtype(x)
    x3, y3 = planes(x), planes(y)
    n, c, p = x3.shape
    size = c // num_groups
    mean, rstd = (torch.zeros(n, num_groups, dtype=wide, device=x.device) for _ in range(2))
    v, weight, bias = (None if t is None else t.to(wide).view(c, 1) for t in (v, weight, bias))
    for ns, cs in blocks(x3, size):
        xb = x3[ns, cs].to(wide)
        groups = xb.shape[1] // size
        m = _of_groups(xb, groups) / (size * p)
        t = xb - _spread(m, xb.shape[1])
        r = (_of_groups(t.mul_(t), groups) / (size * p)).add_(eps).rsqrt_()
        gs = slice(cs.start // size, cs.start // size + groups)
        mean[ns, gs], rstd[ns, gs] = m, r
        scale = _spread(r, xb.shape[1])
        torch.mul(xb, v[cs], out=t).sigmoid_().mul_(xb).mul_(scale if weight is None else scale * weight[cs])
        torch.add(t, 0 if bias is None else bias[cs], out=y3[ns, cs])
    return y, mean, rstd


def _fake(x, num_groups, weight, bias, v, eps):
    stats = x.new_empty(x.shape[0], num_groups, dtype=acc_dtype(x))
    return torch.empty_like(x), stats, torch.empty_like(stats)


_op = define("evonorm_s0", reference, _fake)
use_kernel(_op, reference, "evonorm_s0.forward")


def reference_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and v (C,).

    With s = sigmoid(v x), a = weight * dy, h = x s rstd and the mean over a group,

        dx = rstd * (a * s * (1 + v x (1 - s)) - x̂ * mean(a * h))
    """
    dx, wide = torch.empty_like(x), mean.dtype
    x3, dx3, dy3 = planes(x), planes(dx), planes(dy)
    n, c, p = x3.shape
    num_groups = mean.shape[1]
    size = c // num_groups
    dbias, dweight, dv = (torch.zeros(n, c, dtype=wide, device=x.device) for _ in range(3))
    v = v.to(wide).view(c, 1)
    weight = torch.ones_like(v) if weight is None else weight.to(wide).view(c, 1)
    for ns, cs in blocks(x3, size):
        xb, gb = x3[ns, cs].to(wide), dy3[ns, cs].to(wide)
        channels = xb.shape[1]
        gs = slice(cs.start // size, (cs.start + channels) // size)
        r = _spread(rstd[ns, gs], channels)
        s = torch.mul(xb, v[cs]).sigmoid_()
        rest = torch.addcmul(xb, s, xb, value=-1)  # x (1 - s)
        s.mul_(gb)
        t = s * xb
        sums = t.sum(2, keepdim=True) * r
        dbias[ns, cs], dweight[ns, cs] = gb.sum(2), sums.squeeze(2)
        scale = r * weight[cs]
        rest.mul_(s)
        dv[ns, cs] = (torch.mul(rest, xb, out=t).sum(2, keepdim=True) * scale).squeeze(2)
        direct = s.mul_(scale).addcmul_(rest, scale * v[cs])
        m = _of_groups(sums * weight[cs], channels // size) / (size * p)
        slope = _spread(m, channels) * r * r
        torch.sub(xb, _spread(mean[ns, gs], channels), out=t)
        torch.addcmul(direct, t, slope, value=-1, out=dx3[ns, cs])
    return dx, dweight.sum(0), dbias.sum(0), dv.sum(0)


def _fake_backward(dy, x, mean, rstd, weight, v):
    per_c = x.new_empty(x.shape[1], dtype=mean.dtype)
    return torch.empty_like(x), per_c, torch.empty_like(per_c), torch.empty_like(per_c)


_backward_op = define("evonorm_s0_backward", reference_backward, _fake_backward)
use_kernel(_backward_op, reference_backward, "evonorm_s0.backward")
_call_backward = without_gradient(_backward_op)


def _save(ctx, inputs, output) -> None:
    x, ctx.num_groups, weight, bias, v, ctx.eps = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, output[1], output[2], weight, v)


def _recall(ctx):
    x, _, _, weight, v = ctx.saved_tensors
    return x, ctx.num_groups, weight, recalled_bias(ctx, v), v, ctx.eps


def _backward(ctx, dy: Tensor, _dmean, _drstd):  # the statistics never leave this file: no gradient
    x, mean, rstd, weight, v = ctx.saved_tensors
    dx, dweight, dbias, dv = _call_backward(dy, x, mean, rstd, weight, v)
    return (
        dx,
        None,
        as_parameter(dweight, weight),
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
        dv.to(v.dtype),
        None,
    )


_call = differentiable(_op, formula, _save, _recall, _backward)
