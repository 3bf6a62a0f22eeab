"""Kernels of batch normalization: all of it by the statistics of one batch, and its parts for what is done between."""

import torch
from torch import Tensor

from normplug.kernels import _by_channel, _groups
from normplug.kernels._affine import AFFINE
from normplug.kernels._tiles import Channels

__all__ = ["backward", "dx", "forward", "normalize", "reduce", "stats"]


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Map x (N, C, *), contiguous or channels-last, to y, mean, rstd and centred sum of squares (C,)."""
    y, mean, rstd, m2 = _groups.forward(AFFINE, x, x.shape[1], weight, bias, None, eps, act, residual, per_sample=False)
    return y, mean, rstd, m2


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
    return dx, dweight, dbias, dz


def stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Map x (N, C, *), contiguous or channels-last, to its mean and centred sum of squares (C,)."""
    if x.numel() == 0:
        mean = x.new_zeros(x.shape[1], dtype=torch.float32)
        return mean, mean.clone()
    return _by_channel.statistics(x, per_sample=False)


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
    return _by_channel.apply(AFFINE, x, Channels(mean, rstd, weight, bias), act, residual)


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
    parts, _ = _by_channel.sums(AFFINE, dy, x, Channels(mean, rstd, weight, bias), act, residual)
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
    t1 = t2 = None
    if mean_term is not None and var_term is not None:
        scale = rstd if weight is None else rstd * weight
        t1, t2 = scale * mean_term, scale * rstd * var_term
    given = Channels(mean, rstd, weight, bias)
    return _by_channel.gradient(AFFINE, dy, x, given, t1, t2, act, residual, residual is not None)
