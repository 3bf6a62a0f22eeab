"""Norms by statistics of groups, or of channels over all samples, as ops call them.

Where a group fits into a program it is normalized in one pass, elsewhere by the general ones. How is planned once per
shape: what follows in later calls is a lookup, the memory for results, and the kernels.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from normplug.kernels._activations import as_constant
from normplug.kernels._launch import Layout, Step, dtypes_of, fits_on_chip, gates, like, planned, stream_of, vector
from normplug.kernels._passes import (
    Parts,
    Pass,
    Statistics,
    add_step,
    apply_step,
    gradient_step,
    sums_step,
)
from normplug.kernels._tiles import (
    PER_CHANNEL,
    SIZES,
    Formula,
    load,
    load_at,
    over_positions,
    store,
    tile_constants,
)

__all__ = ["backward", "forward", "is_channels_last"]

# Values of a warp that holds groups whole.
PER_WARP = 512


@triton.jit
def _group_tile(
    outer, inner, group_size, CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, PACK: tl.constexpr, BI: tl.constexpr
):
    """Return what ``tile`` does for the groups of this program, (BO, PACK, BI), and its sample, groups and channels.

    Groups are counted through all samples. Both come with which of them exist.
    """
    groups = inner // group_size if CHANNELS_LAST else outer // group_size
    packs = (groups + PACK - 1) // PACK
    n, first = (tl.program_id(0) // packs).to(tl.int64), tl.program_id(0) % packs * PACK
    o, p, i = tl.arange(0, BO)[:, None, None], tl.arange(0, PACK)[None, :, None], tl.arange(0, BI)[None, None, :]
    here = first + p < groups
    if CHANNELS_LAST:
        start = n * outer * inner + first * group_size
        offs = o * inner + p * group_size + i
        mask = (o < outer) & (i < group_size) & here
        c, valid = (first + p) * group_size + i, (i < group_size) & here
    else:  # PACK is 1
        start = (n * outer + first * group_size) * inner
        offs = o * inner + i
        mask = (o < group_size) & (i < inner)
        c, valid = first * group_size + o, o < group_size
    return start, offs, mask, n, n * groups + first + p, here, c, valid


@triton.jit
def _over_group(t, PACK: tl.constexpr):
    """Sum a tile, or what belongs to its channels, up for each group: (1, PACK, 1)."""
    if PACK == 1:
        s = tl.zeros((1, 1, 1), tl.float32) + tl.sum(t)
    else:
        s = tl.sum(tl.sum(t, 2, keep_dims=True), 0, keep_dims=True)
    return s


@triton.jit(do_not_specialize=[*SIZES, "eps", "slope"], do_not_specialize_on_alignment=PER_CHANNEL)
def _group_forward(
    x_ptr, y_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr,
    outer, units, group_units, values, eps, slope,
    VALUE: tl.constexpr, ACT: tl.constexpr, HAS_MEAN: tl.constexpr, VEC: tl.constexpr, GROUP_VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    inner, group_size = units * VEC, group_units * GROUP_VEC
    start, offs, mask, _, group, here, c, valid = _group_tile(outer, inner, group_size, CHANNELS_LAST, BO, PACK, BI)
    # All loads first: what is summed waits for x, and the others come meanwhile.
    x = load(x_ptr + start, offs, mask, 0.0)
    residual = load_at(residual_ptr, start, offs, mask)
    weight, bias, v = load(weight_ptr, c, valid, 1.0), load(bias_ptr, c, valid, 0.0), load(v_ptr, c, valid, 0.0)
    if HAS_MEAN:
        mean = _over_group(x, PACK) / values
        d = tl.where(mask, x - mean, 0.0)
        # What rounding left over: with mean 1000 it is as large as the last digits of x.
        mean += _over_group(d, PACK) / values
        d = tl.where(mask, x - mean, 0.0)
        store(mean_ptr, group, mean, here)
    else:
        mean = 0.0
        d = x
    rstd = tl.div_rn(1.0, tl.sqrt_rn(_over_group(d * d, PACK) / values + eps))
    store(rstd_ptr, group, rstd, here)
    y = VALUE(x, mean, rstd, weight, bias, v, 0.0, residual, slope, ACT)
    store(y_ptr + start, offs, y, mask)


@triton.jit(do_not_specialize=[*SIZES, "slope"], do_not_specialize_on_alignment=PER_CHANNEL)
def _group_backward(
    dy_ptr, x_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, parts_ptr, dx_ptr, dz_ptr,
    outer, units, group_units, values, step, slope,
    GRADS: tl.constexpr, SUMS: tl.constexpr, ACT: tl.constexpr, CENTRED: tl.constexpr,
    VEC: tl.constexpr, GROUP_VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    inner, group_size = units * VEC, group_units * GROUP_VEC
    start, offs, mask, n, group, here, c, valid = _group_tile(outer, inner, group_size, CHANNELS_LAST, BO, PACK, BI)
    dy = load(dy_ptr + start, offs, mask, 0.0)
    x = load(x_ptr + start, offs, mask, 0.0)
    residual = load_at(residual_ptr, start, offs, mask)
    mean, rstd = load(mean_ptr, group, here, 0.0), load(rstd_ptr, group, here, 0.0)
    weight, bias, v = load(weight_ptr, c, valid, 1.0), load(bias_ptr, c, valid, 0.0), load(v_ptr, c, valid, 0.0)
    dx, e0, e1, e2, _, _ = GRADS(dy, x, mean, rstd, weight, bias, v, 0.0, residual, slope, ACT)
    if dz_ptr is not None:
        store(dz_ptr + start, offs, e0, mask)
    channels = inner if CHANNELS_LAST else outer
    at = n * channels + c
    s0, s1 = over_positions(e0, CHANNELS_LAST), over_positions(e1, CHANNELS_LAST)
    store(parts_ptr, at, s0, valid)
    store(parts_ptr + step, at, s1, valid)
    if SUMS > 2:
        store(parts_ptr + 2 * step, at, over_positions(e2, CHANNELS_LAST), valid)
    if CENTRED:
        dx -= rstd * (_over_group(weight * s0, PACK) / values)
    dx -= (x - mean) * (rstd * rstd * (_over_group(weight * s1, PACK) / values))
    store(dx_ptr + start, offs, dx, mask)


class _Forward(NamedTuple):
    """What ``forward`` does: one kernel, or two, statistics and apply."""

    whole: Step | None = None
    statistics: Step | None = None
    apply: Step | None = None
    workspace: int = 0
    gates: int = 0
    shape: tuple[int, ...] = ()  # of the statistics


@planned
def _forward(
    formula: Formula, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: int, groups: int,
    per_sample: bool, act: str | None, eps: float, _given: tuple[torch.dtype | None, ...],
) -> _Forward:  # fmt: skip
    channels_last = is_channels_last(shape, stride)
    of_groups = (shape[0], groups) if per_sample else (groups,)
    if per_sample and (tile := _whole(shape, channels_last, dtype, groups, tensors=1)):
        act, slope = as_constant(act)
        constants = {"VALUE": formula.value, "ACT": act, "HAS_MEAN": formula.has_mean, **tile.constants}
        whole = Step(_group_forward, tile.programs, [*tile.sizes, eps, slope], constants, tile.warps)
        return _Forward(whole, shape=of_groups)
    statistics = Statistics.of(shape, channels_last, groups, per_sample, device)
    return _Forward(
        statistics=statistics.step(eps, formula.has_mean),
        apply=apply_step(formula, Pass.over(shape, channels_last, groups, per_sample), act, device),
        workspace=statistics.workspace,
        gates=statistics.gathering.gates,
        shape=of_groups,
    )


def is_channels_last(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Tell whether a dense tensor of that shape is channels-last and not contiguous."""
    step = 1
    for size, distance in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and distance != step:
            return True
        step *= size
    return False


class _Whole(NamedTuple):
    """How programs hold whole groups."""

    programs: int
    warps: int
    sizes: list[int]
    constants: dict[str, Any]


def _whole(shape: torch.Size, channels_last: bool, dtype: torch.dtype, groups: int, tensors: int) -> _Whole | None:
    """Plan programs that hold groups of so many tensors, or return None where not one of them fits."""
    group_size = shape[1] // groups
    at = Layout.of(shape, channels_last, channels=group_size)
    block = fits_on_chip(at, group_size, dtype.itemsize, tensors)
    if block is None:
        return None
    outer, pack, inner = block
    group_vec = at.vec if channels_last else 1
    sizes = [at.outer, at.units, group_size // group_vec, group_size * at.positions]
    constants = {"GROUP_VEC": group_vec, "PACK": pack, **tile_constants(at, (outer, inner))}
    # 16 values a thread, 32 for the largest and for groups side by side
    warps = max(1, min(16, math.prod(block) // (PER_WARP if pack == 1 else 2 * PER_WARP)))
    return _Whole(shape[0] * triton.cdiv(groups, pack), warps, sizes, constants)


def forward(
    formula: Formula, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, v: Tensor | None,
    eps: float, act: str | None = None, residual: Tensor | None = None, per_sample: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """Return y, mean (None if the formula has none), rstd, and the sum of squared deviations for all samples.

    Statistics are of groups of channels in a sample, (N, G), or, unless per_sample, of channels in all samples, (C,);
    the last result is None for the former.
    """
    y = torch.empty_like(x)
    if x.numel() == 0:
        rstd = x.new_zeros((x.shape[0], groups) if per_sample else groups, dtype=torch.float32)
        mean = torch.zeros_like(rstd) if formula.has_mean else None
        return y, mean, rstd, None if per_sample else torch.zeros_like(rstd)
    device = x.get_device()
    weight, bias, v = vector(weight), vector(bias), vector(v)
    given = dtypes_of(weight, bias, v, residual)
    plan = _forward(formula, x.shape, x.stride(), x.dtype, device, groups, per_sample, act, eps, given)
    x = like(x, y)
    if residual is not None:
        residual = like(residual, x)
    stream = stream_of(device)
    rstd = x.new_empty(plan.shape, dtype=torch.float32)
    mean = torch.empty_like(rstd) if formula.has_mean else None
    m2 = None if per_sample else torch.empty_like(rstd)
    if plan.whole is not None:
        plan.whole(stream, x, y, residual, mean, rstd, weight, bias, v)
        return y, mean, rstd, m2
    parts = x.new_empty(plan.workspace, dtype=torch.float32)
    plan.statistics(stream, x, parts, mean, rstd, m2, gates(x, stream, plan.gates))
    plan.apply(stream, x, y, residual, mean, rstd, weight, bias, v, None)
    return y, mean, rstd, m2


class _Backward(NamedTuple):
    """What ``backward`` does: one kernel for dx and add, or two, sums and gradient."""

    whole: Step | None = None
    add: Step | None = None
    sums: Step | None = None
    gradient: Step | None = None
    workspace: int = 0
    gates: int = 0


@planned
def _backward(
    formula: Formula, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: int, groups: int,
    per_sample: bool, act: str | None, wants_dz: bool, _given: tuple[torch.dtype | None, ...],
) -> _Backward:  # fmt: skip
    channels_last = is_channels_last(shape, stride)
    n, c = shape[:2]
    if per_sample and (tile := _whole(shape, channels_last, dtype, groups, tensors=2)):
        act, slope = as_constant(act)
        constants = {"GRADS": formula.grads, "SUMS": formula.sums, "ACT": act, "CENTRED": formula.centred}
        constants |= tile.constants
        whole = Step(_group_backward, tile.programs, [*tile.sizes, n * c, slope], constants, tile.warps)
        return _Backward(whole, add=add_step(c, n), workspace=formula.sums * n * c)
    given = Pass.over(shape, channels_last, groups, per_sample, formula.sums)
    parts = Parts.of(given.at, given.tiles, given.batches, device)
    return _Backward(
        sums=sums_step(formula, given, parts, act),
        gradient=gradient_step(formula, Pass.over(shape, channels_last, groups, per_sample), act, device, parts.number),
        workspace=formula.sums * parts.number * c + given.gathering.totals,
        gates=given.gathering.gates,
    )


def backward(
    formula: Formula, dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, v: Tensor | None, act: str | None = None, residual: Tensor | None = None,
    wants_dz: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Return dx, the formula's sums per channel (C,): two, and a third or None; and dz where asked for (else empty)."""
    dx, c = torch.empty_like(x), x.shape[1]
    dbias = x.new_empty(c, dtype=torch.float32)
    dweight = torch.empty_like(dbias)
    dv = torch.empty_like(dbias) if formula.sums > 2 else None
    dz = torch.empty_like(x) if wants_dz else None
    none = x.new_empty(0) if dz is None else dz
    if x.numel() == 0:
        return dx, dbias.zero_(), dweight.zero_(), None if dv is None else dv.zero_(), none
    device, per_sample = x.get_device(), rstd.ndim == 2
    weight, bias, v = vector(weight), vector(bias), vector(v)
    given = dtypes_of(weight, bias, v, residual)
    plan = _backward(formula, x.shape, x.stride(), x.dtype, device, rstd.shape[-1], per_sample, act, wants_dz, given)
    x = like(x, dx)
    dy = like(dy, dx)
    if residual is not None:
        residual = like(residual, dx)
    stream = stream_of(device)
    parts = x.new_empty(plan.workspace, dtype=torch.float32)
    if plan.whole is not None:
        plan.whole(stream, dy, x, residual, mean, rstd, weight, bias, v, parts, dx, dz)
        plan.add(stream, parts, dbias, dweight, dv)
        return dx, dbias, dweight, dv, none
    t1 = torch.empty_like(rstd) if formula.centred else None
    t2 = torch.empty_like(rstd)
    given = mean, rstd, weight, bias, v, None
    plan.sums(stream, dy, x, residual, *given, parts, t1, t2, gates(x, stream, plan.gates))
    plan.gradient(stream, dy, x, residual, *given, t1, t2, parts, dx, dz, dbias, dweight, dv)
    return dx, dbias, dweight, dv, none
