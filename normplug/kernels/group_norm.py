"""Kernels of group_norm."""

from torch import Tensor

from normplug.kernels import _groups
from normplug.kernels._affine import AFFINE

__all__ = ["backward", "forward"]


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Map x (N, C, *), contiguous or channels-last, to y, mean and rstd (N, G)."""
    return _groups.forward(AFFINE, x, num_groups, weight, bias, None, eps, act, residual)[:3]


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight (C,), bias (C,) and residual (empty without one)."""
    dx, dbias, dweight, _, dz = _groups.backward(
        AFFINE, dy, x, mean, rstd, weight, bias, None, act, residual, residual is not None
    )
    if x.numel() == mean.numel():  # groups of one value: what is left of their gradient is rounding noise / √eps
        dx.zero_()
    return dx, dweight, dbias, dz
