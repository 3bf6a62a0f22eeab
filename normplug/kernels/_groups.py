"""Norms by groups of channels per sample: one pass where a group fits into a program, the general passes elsewhere."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from normplug.kernels import _launch, _passes
from normplug.kernels._launch import Layout, fits_on_chip, like
from normplug.kernels._tiles import (
    Channels,
    Formula,
    load,
    load_at,
    over_all,
    over_positions,
    store,
    tile_constants,
)

__all__ = ["backward", "forward"]


@triton.jit
def _group_tile(outer, inner, group_size, CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr):
    """Return what ``tile`` does for the group of this program, and its sample and channels."""
    groups = inner // group_size if CHANNELS_LAST else outer // group_size
    n, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    o, i = tl.arange(0, BO)[:, None], tl.arange(0, BI)[None, :]
    channel = group * group_size
    start = n * outer * inner
    if CHANNELS_LAST:
        start += channel
        mask = (o < outer) & (i < group_size)
        c, valid = channel + i, i < group_size
    else:
        start += channel.to(tl.int64) * inner
        mask = (o < group_size) & (i < inner)
        c, valid = channel + o, o < group_size
    return start, o * inner + i, mask, n, c, valid


@triton.jit
def _group_forward(
    x_ptr, y_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, outer, units, group_units, values, eps,
    VALUE: tl.constexpr, ACT: tl.constexpr, HAS_MEAN: tl.constexpr, VEC: tl.constexpr, GROUP_VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    inner, group_size = units * VEC, group_units * GROUP_VEC
    start, offs, mask, _, c, valid = _group_tile(outer, inner, group_size, CHANNELS_LAST, BO, BI)
    x = load(x_ptr + start, offs, mask, 0.0)
    if HAS_MEAN:
        mean = over_all(x) / values
        d = tl.where(mask, x - mean, 0.0)
        # What rounding left over: with mean 1000 it is as large as the last digits of x.
        mean += over_all(d) / values
        d = tl.where(mask, x - mean, 0.0)
        tl.store(mean_ptr + tl.program_id(0), mean)
    else:
        mean = 0.0
        d = x
    rstd = tl.div_rn(1.0, tl.sqrt_rn(over_all(d * d) / values + eps))
    tl.store(rstd_ptr + tl.program_id(0), rstd)
    y = VALUE(
        x,
        mean,
        rstd,
        load(weight_ptr, c, valid, 1.0),
        load(bias_ptr, c, valid, 0.0),
        load(v_ptr, c, valid, 0.0),
        0.0,
        load_at(residual_ptr, start, offs, mask),
        ACT,
    )
    store(y_ptr + start, offs, y, mask)


@triton.jit
def _group_backward(
    dy_ptr, x_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, sums_ptr, dx_ptr, dz_ptr,
    outer, units, group_units, values, step,
    GRADS: tl.constexpr, SUMS: tl.constexpr, ACT: tl.constexpr, CENTRED: tl.constexpr,
    VEC: tl.constexpr, GROUP_VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    inner, group_size = units * VEC, group_units * GROUP_VEC
    start, offs, mask, n, c, valid = _group_tile(outer, inner, group_size, CHANNELS_LAST, BO, BI)
    dy = load(dy_ptr + start, offs, mask, 0.0)
    x = load(x_ptr + start, offs, mask, 0.0)
    residual = load_at(residual_ptr, start, offs, mask)
    mean = 0.0 if mean_ptr is None else tl.load(mean_ptr + tl.program_id(0))
    rstd = tl.load(rstd_ptr + tl.program_id(0))
    weight = load(weight_ptr, c, valid, 1.0)
    dx, e0, e1, e2, _, _ = GRADS(
        dy,
        x,
        mean,
        rstd,
        weight,
        load(bias_ptr, c, valid, 0.0),
        load(v_ptr, c, valid, 0.0),
        0.0,
        residual,
        ACT,
    )
    if dz_ptr is not None:
        store(dz_ptr + start, offs, e0, mask)
    channels = inner if CHANNELS_LAST else outer
    at = n * channels + c
    s0, s1 = over_positions(e0, CHANNELS_LAST), over_positions(e1, CHANNELS_LAST)
    store(sums_ptr, at, s0, valid)
    store(sums_ptr + step, at, s1, valid)
    if SUMS > 2:
        store(sums_ptr + 2 * step, at, over_positions(e2, CHANNELS_LAST), valid)
    if CENTRED:
        dx -= rstd * (over_all(weight * s0) / values)
    dx -= (x - mean) * (rstd * rstd * (over_all(weight * s1) / values))
    store(dx_ptr + start, offs, dx, mask)


def _group_sizes(x: Tensor, groups: int, tensors: int) -> tuple[Layout, tuple[int, int] | None, list[int], int]:
    group_size = x.shape[1] // groups
    at = Layout.of(x, channels=group_size)
    group_vec = at.vec if at.channels_last else 1
    values = group_size * at.positions
    block = fits_on_chip(at, group_size, x.itemsize, tensors)
    return at, block, [at.outer, at.units, group_size // group_vec, values], group_vec


def _warps(block: tuple[int, int]) -> int:
    """Return warps for a program that holds a whole tile: 16 values a thread, 32 for the largest."""
    return max(1, min(16, block[0] * block[1] // 512))


def forward(
    formula: Formula, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, v: Tensor | None,
    eps: float, act: str | None = None, residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Return y, mean (None if the formula has none) and rstd (N, G) of a norm by groups of channels per sample."""
    n = x.shape[0]
    if x.numel() == 0:
        mean, rstd = (x.new_zeros(n, groups, dtype=torch.float32) for _ in range(2))
        return torch.empty_like(x), mean if formula.has_mean else None, rstd
    at, block, sizes, group_vec = _group_sizes(x, groups, tensors=1)
    if block is None:
        kind = "rstd" if formula.has_mean else "square"
        mean, rstd = _passes.statistics(x, groups, eps, kind)
        given = Channels(mean if formula.has_mean else None, rstd, weight, bias, v)
        return _passes.apply(formula, x, given, act, residual), given.mean, rstd
    y = torch.empty_like(x)
    mean = x.new_empty(n, groups, dtype=torch.float32) if formula.has_mean else None
    rstd = x.new_empty(n, groups, dtype=torch.float32)
    if residual is not None:
        residual = like(residual, x)
    _launch.run(
        _group_forward, n * groups, x, y, residual, mean, rstd, weight, bias, v, *sizes, eps, warps=_warps(block),
        VALUE=formula.value, ACT=act, HAS_MEAN=formula.has_mean, GROUP_VEC=group_vec, **tile_constants(at, block),
    )  # fmt: skip
    return y, mean, rstd


def backward(
    formula: Formula, dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, v: Tensor | None, act: str | None = None, residual: Tensor | None = None,
    wants_dz: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, the formula's sums (sums, C), and dz where asked for (else empty): the gradients of ``forward``."""
    (n, c), groups = x.shape[:2], rstd.shape[1]
    if x.numel() == 0:
        zeros = x.new_zeros(formula.sums, c, dtype=torch.float32)
        return torch.empty_like(x), zeros, torch.empty_like(x) if wants_dz else x.new_empty(0)
    dy = like(dy, x)
    if residual is not None:
        residual = like(residual, x)
    at, block, sizes, group_vec = _group_sizes(x, groups, tensors=2)
    if block is None:
        given = Channels(mean, rstd, weight, bias, v)
        parts, splits = _passes.sums(formula, dy, x, given, act, residual)
        t1, t2 = _passes.group_terms(formula, parts, splits, given, c // groups * at.positions)
        dx, dz = _passes.gradient(formula, dy, x, given, t1, t2, act, residual, wants_dz)
        return dx, parts.sum(1), dz
    dx = torch.empty_like(x)
    dz = torch.empty_like(x) if wants_dz else None
    parts = x.new_empty(formula.sums, n, c, dtype=torch.float32)
    _launch.run(
        _group_backward, n * groups, dy, x, residual, mean, rstd, weight, bias, v, parts, dx, dz, *sizes,
        parts.stride(0), warps=_warps(block), GRADS=formula.grads, SUMS=formula.sums, ACT=act, CENTRED=formula.centred,
        GROUP_VEC=group_vec, **tile_constants(at, block),
    )  # fmt: skip
    return dx, parts.sum(1), x.new_empty(0) if dz is None else dz
