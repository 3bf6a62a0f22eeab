"""Kernels of the parts of batch normalization: local sums, the normalization, its gradient's sums and dx."""

import torch
from torch import Tensor

from normplug.kernels import _passes
from normplug.kernels._affine import AFFINE
from normplug.kernels._launch import like
from normplug.kernels._tiles import Channels

__all__ = ["dx", "normalize", "reduce", "stats"]


def stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Map x (N, C, *), contiguous or channels-last, to its mean and centred sum of squares (C,)."""
    if x.numel() == 0:
        mean = x.new_zeros(x.shape[1], dtype=torch.float32)
        return mean, mean.clone()
    return _passes.statistics(x, x.shape[1], 0.0, "m2", per_sample=False)


def normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
    _mean_share: Tensor | None,
    _var_share: Tensor | None,
) -> Tensor:
    """Map x to y, laid out as x; the shares are backward's."""
    return _passes.apply(AFFINE, x, Channels(mean, rstd, weight, bias), act, residual)


def reduce(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Map dy and x to the sums (C,) of dz and of dz * x̂."""
    if x.numel() == 0:
        return torch.zeros_like(mean), torch.zeros_like(mean)
    dy, residual = _laid_out(dy, x, residual)
    parts, _ = _passes.sums(AFFINE, dy, x, Channels(mean, rstd, weight, bias), act, residual)
    plain, by_x = parts.sum(1)
    # An op's results must not share their memory, and have the dtype of the statistics.
    return plain.to(mean.dtype, copy=True), by_x.to(mean.dtype, copy=True)


def dx(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
    mean_term: Tensor | None,
    var_term: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Map dy and x to dx, laid out as x, and the residual's gradient (empty without one)."""
    dy, residual = _laid_out(dy, x, residual)
    t1 = t2 = None
    if mean_term is not None and var_term is not None:
        scale = rstd if weight is None else rstd * weight
        t1, t2 = scale * mean_term, scale * rstd * var_term
    given = Channels(mean, rstd, weight, bias)
    return _passes.gradient(AFFINE, dy, x, given, t1, t2, act, residual, residual is not None)


def _laid_out(dy: Tensor, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return like(dy, x), None if residual is None else like(residual, x)
