"""Kernels of evonorm_b0."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from normplug.kernels import _by_channel
from normplug.kernels._tiles import Channels, Formula

__all__ = ["backward", "forward"]


@triton.jit
def _divisor(d, u):
    return tl.maximum(d, u, propagate_nan=tl.PropagateNan.ALL)  # a GPU's plain max takes the number and drops NaN


# Where other norms have 1/std, these two have the instance's std itself; u is the root of the batch's variance.
@triton.jit
def _value(x, _mean, std, weight, bias, v, u, _residual, _slope, ACT: tl.constexpr):
    return x / _divisor(v * x + std, u) * weight + bias


@triton.jit
def _grads(dy, x, _mean, std, weight, _bias, v, u, _residual, _slope, ACT: tl.constexpr):
    d = v * x + std
    is_bound = d <= u  # and not its opposite: NaN goes the way that keeps it
    d = _divisor(d, u)
    by_weight = dy * x / d
    g = by_weight / d
    above = tl.where(is_bound, 0.0, g)
    local = weight * dy * tl.where(is_bound, u, std) / d / d
    return local, dy, by_weight, above, g - above, above * x


EVONORM_B0 = Formula(_value, _grads, sums=5)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, v: Tensor, batch_var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Map x (N, C, *), laid out in either way, to y, mean and std of instances (N, C), and batch variance (C,)."""
    n, c = x.shape[:2]
    if x.numel() == 0:
        mean, std, total = (x.new_zeros(shape, dtype=torch.float32) for shape in ((n, c), (n, c), c))
        return torch.empty_like(x), mean, std, total if batch_var is None else batch_var.float().clone()
    mean, m2 = _by_channel.statistics(x, per_sample=True)
    var = m2 / x.shape[2:].numel()
    if batch_var is not None:
        total = batch_var.to(var.dtype, copy=True)
    else:  # the mean of the instances' variances and the variance of their means
        total = var.mean(0) + (mean - mean.mean(0)).square_().mean(0)
    std = (var + eps).sqrt_()
    given = Channels(mean, std, weight, bias, v, (total + eps).sqrt_())
    return _by_channel.apply(EVONORM_B0, x, given, None, None), mean, std, total


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    batch_var: Tensor,
    weight: Tensor | None,
    v: Tensor,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and v (C,); the formula is in ``ops.evonorm_b0``."""
    n, c = x.shape[:2]
    if x.numel() == 0:
        zeros = x.new_zeros(3, c, dtype=torch.float32)
        return torch.empty_like(x), *(z.clone() for z in zeros)
    bound = (batch_var + eps).sqrt_()
    given = Channels(mean, std, weight, None, v, bound)
    parts, splits = _by_channel.sums(EVONORM_B0, dy, x, given, None, None)
    by_sample = parts.view(EVONORM_B0.sums, n, splits, c).sum(2)
    dbias, dweight, _, below, dv = by_sample.sum(1)
    w = torch.ones_like(bound) if weight is None else weight.float()
    p = x.shape[2:].numel()
    t1, t2 = torch.zeros_like(mean), w * by_sample[2] / (p * std)
    if training:
        by_batch = w * below / (n * p * bound)
        t2 += by_batch
        t1 += by_batch * (mean - mean.mean(0))
    dx, _ = _by_channel.gradient(EVONORM_B0, dy, x, given, t1, t2, None, None)
    return dx, dweight.clone(), dbias.clone(), -w * dv
