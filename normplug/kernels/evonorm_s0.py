"""Kernels of evonorm_s0."""

import triton
import triton.language as tl
from torch import Tensor

from normplug.kernels import _groups
from normplug.kernels._tiles import Formula

__all__ = ["backward", "forward"]


@triton.jit
def _value(x, _mean, rstd, weight, bias, v, _u, _residual, _slope, ACT: tl.constexpr):
    return x * tl.sigmoid(v * x) * rstd * weight + bias


@triton.jit
def _grads(dy, x, _mean, rstd, weight, _bias, v, _u, _residual, _slope, ACT: tl.constexpr):
    s = tl.sigmoid(v * x)
    g, rest = dy * rstd, x * (1.0 - s)
    by_weight = g * x * s
    return weight * g * s * (1.0 + v * rest), dy, by_weight, weight * by_weight * rest, 0.0, 0.0


EVONORM_S0 = Formula(_value, _grads, sums=3, centred=False)


def forward(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, v: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Map x (N, C, *), contiguous or channels-last, to y, mean and rstd (N, G)."""
    return _groups.forward(EVONORM_S0, x, num_groups, weight, bias, v, eps)[:3]


def backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and v (C,)."""
    dx, dbias, dweight, dv, _ = _groups.backward(EVONORM_S0, dy, x, mean, rstd, weight, None, v)
    return dx, dweight, dbias, dv
