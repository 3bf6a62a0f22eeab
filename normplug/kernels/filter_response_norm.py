"""Kernels of filter_response_norm."""

import triton
import triton.language as tl
from torch import Tensor

from normplug.kernels import _groups
from normplug.kernels._tiles import Formula

__all__ = ["backward", "forward"]


# rstd is that of the mean square, v the threshold tau.
@triton.jit
def _value(x, _mean, rstd, weight, bias, v, _u, _residual, _slope, ACT: tl.constexpr):
    z = x * rstd * weight + bias
    return tl.maximum(z, v, propagate_nan=tl.PropagateNan.ALL)  # a GPU's plain max drops NaN


@triton.jit
def _grads(dy, x, _mean, rstd, weight, bias, v, _u, _residual, _slope, ACT: tl.constexpr):
    dz = tl.where(x * rstd * weight + bias > v, dy, 0.0)
    return rstd * (weight * dz), dz, dz * x * rstd, dy - dz, 0.0, 0.0


FRN = Formula(_value, _grads, sums=3, has_mean=False, centred=False)


def forward(x: Tensor, weight: Tensor, bias: Tensor, tau: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Map x (N, C, *), contiguous or channels-last, to y and 1/root of the mean square (N, C)."""
    y, _, rstd, _ = _groups.forward(FRN, x, x.shape[1], weight, bias, tau, eps)
    return y, rstd


def backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and tau (C,)."""
    dx, dbias, dweight, dtau, _ = _groups.backward(FRN, dy, x, None, rstd, weight, bias, tau)
    return dx, dweight, dbias, dtau
