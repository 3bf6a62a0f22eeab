"""The passes over memory that all norms are made of, and their launches.

Forward takes

    statistics   mean and 1/std of every group: partial sums per channel, then joined
    apply        y = value(x, ...)

and backward

    sums         per channel, of what the formula's ``grads`` names
    group_terms  what the statistics pass back, t1 and t2 per group
    gradient     dx = local - t1 - (x - mean) * t2

Sums are float32, taken in a fixed order without atomics: the same bits on every run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from normplug.kernels import _launch
from normplug.kernels._launch import Layout, Tiling, like, split, tiling
from normplug.kernels._tiles import (
    Channels,
    Formula,
    channels_of,
    load,
    load_at,
    over_positions,
    store,
    tile,
    tile_constants,
)

__all__ = ["apply", "gradient", "group_terms", "statistics", "sums"]


# --- statistics


@triton.jit
def _partial_statistics(
    x_ptr, mean_ptr, m2_ptr, count_ptr, outer, units, channels, channel_tiles, tiles, splits, per_split, per_batch,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Mean and centred sum of squares per channel over a run of tiles: sums shifted by the mean of the first tile.

    The shift is a mean over 1 / T of the values, T being the tiles of the run, so however far it is from the whole
    mean, the variance is at least its squared distance / T: what cancels in float32 stays below T ulps.
    """
    inner = units * VEC
    part, channel = tl.program_id(0) // channel_tiles, tl.program_id(0) % channel_tiles
    channel *= BI if CHANNELS_LAST else BO
    block: tl.constexpr = BO if CHANNELS_LAST else BI
    positions = outer if CHANNELS_LAST else inner
    first = part // splits * per_batch + part % splits * per_split
    last = tl.minimum(first + per_split, (part // splits + 1) * per_batch)
    start, offs, mask = tile(first, tiles, channel, outer, inner, CHANNELS_LAST, BO, BI)
    count = tl.minimum(positions - first % tiles * block, block)
    if first >= last:
        count = 0
        mask = mask & False
    x = load(x_ptr + start, offs, mask, 0.0)
    shift = over_positions(x, CHANNELS_LAST) / tl.maximum(count, 1)
    d = tl.where(mask, x - shift, 0.0)
    s1, s2 = d, d * d
    for unit in range(first + 1, last):
        start, offs, mask = tile(unit, tiles, channel, outer, inner, CHANNELS_LAST, BO, BI)
        d = tl.where(mask, load(x_ptr + start, offs, mask, 0.0) - shift, 0.0)
        s1 += d
        s2 += d * d
        count += tl.minimum(positions - unit % tiles * block, block)
    s1, s2 = over_positions(s1, CHANNELS_LAST), over_positions(s2, CHANNELS_LAST)
    many = tl.maximum(count, 1).to(tl.float32)
    c = channels_of(channel, CHANNELS_LAST, BO, BI)
    at = part.to(tl.int64) * channels + c
    store(mean_ptr, at, shift + s1 / many, c < channels)
    m2 = s2 - s1 * s1 / many
    store(m2_ptr, at, tl.where(m2 < 0, 0.0, m2), c < channels)  # no max, which drops NaN on a GPU
    tl.store(count_ptr + part, count.to(tl.float32))


@triton.jit
def _join(
    mean_in, m2_in, count_in, mean_ptr, out_ptr, channels, group_size, splits, eps,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the partial statistics of a group, splits x group_size of them, by Chan's formula.

    KIND says what is returned beside the mean: "m2", or "rstd" of the variance or of the mean "square".
    """
    groups = channels // group_size
    batch, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    count = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    shift = tl.load(mean_in + batch * splits * channels + group * group_size)
    for start in range(0, splits * group_size, BLOCK):
        j = start + tl.arange(0, BLOCK)
        mask = j < splits * group_size
        part = batch * splits + j // group_size
        n = tl.load(count_in + part, mask=mask, other=0.0)
        mean = tl.load(mean_in + part * channels + group * group_size + j % group_size, mask=mask, other=0.0)
        count += n
        total += n * (mean - shift)
    many = tl.sum(count, 0)
    whole = tl.sum(total, 0) / many
    m2 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits * group_size, BLOCK):
        j = start + tl.arange(0, BLOCK)
        mask = j < splits * group_size
        part = batch * splits + j // group_size
        at = part * channels + group * group_size + j % group_size
        n = tl.load(count_in + part, mask=mask, other=0.0)
        d = tl.load(mean_in + at, mask=mask, other=0.0) - shift - whole
        m2 += tl.load(m2_in + at, mask=mask, other=0.0) + n * d * d
    result = tl.sum(m2, 0)
    mean = shift + whole
    if KIND != "m2":
        result = result / many + eps
        if KIND == "square":
            result += mean * mean
        result = tl.div_rn(1.0, tl.sqrt_rn(result))
    at = tl.program_id(0)
    if mean_ptr is not None:
        tl.store(mean_ptr + at, mean)
    tl.store(out_ptr + at, result)


def statistics(x: Tensor, groups: int, eps: float, kind: str, per_sample: bool = True) -> tuple[Tensor, Tensor]:
    """Return mean and what ``_join`` calls kind: (N, G), or over all samples (G,)."""
    at = Layout.of(x, merge=not per_sample)
    tiles = tiling(at)
    batches = at.samples if per_sample else 1
    parts = _Parts.of(at, tiles, batches, x.device)
    mean_in, m2_in = (x.new_empty(parts.number, at.channels, dtype=torch.float32) for _ in range(2))
    count_in = x.new_empty(parts.number, dtype=torch.float32)
    _launch.run(
        _partial_statistics, parts.number * tiles.channel_tiles,
        x, mean_in, m2_in, count_in, at.outer, at.units, at.channels, tiles.channel_tiles, tiles.position_tiles,
        parts.splits, parts.per_split, parts.per_batch,
        VEC=at.vec, CHANNELS_LAST=at.channels_last, BO=tiles.block_outer, BI=tiles.block_inner,
    )  # fmt: skip
    mean, out = (x.new_empty(batches, groups, dtype=torch.float32) for _ in range(2))
    group_size = at.channels // groups
    _launch.run(
        _join, batches * groups, mean_in, m2_in, count_in, mean, out, at.channels, group_size, parts.splits, eps,
        KIND=kind, BLOCK=_block(parts.splits * group_size),
    )  # fmt: skip
    return (mean, out) if per_sample else (mean[0], out[0])


class _Parts(NamedTuple):
    """How the position tiles of each batch are shared among programs."""

    number: int
    splits: int
    per_split: int
    per_batch: int

    @classmethod
    def of(cls, at: Layout, tiles: Tiling, batches: int, device: torch.device) -> "_Parts":
        per_batch = at.samples * tiles.position_tiles // batches
        splits = split(batches * tiles.channel_tiles, per_batch, device)
        per_split = triton.cdiv(per_batch, splits)
        splits = triton.cdiv(per_batch, per_split)
        return cls(batches * splits, splits, per_split, per_batch)


def _block(length: int) -> int:
    return min(1024, max(32, triton.next_power_of_2(length)))


# --- one pass over x, by given statistics


@triton.jit
def _coefficients(
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr, n, c, channels, group_size, per_sample
):  # fmt: skip
    s = n * per_sample + c // group_size
    mask = c < channels
    return (
        load(mean_ptr, s, mask, 0.0),
        load(rstd_ptr, s, mask, 1.0),
        load(weight_ptr, c, mask, 1.0),
        load(bias_ptr, c, mask, 0.0),
        load(v_ptr, c, mask, 0.0),
        load(u_ptr, c, mask, 0.0),
    )


@triton.jit
def _apply(
    x_ptr, y_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr,
    outer, units, channels, group_size, per_sample, channel_tiles, tiles,
    VALUE: tl.constexpr, ACT: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    inner = units * VEC
    unit, channel = _order(channel_tiles, tiles, CHANNELS_LAST)
    channel *= BI if CHANNELS_LAST else BO
    start, offs, mask = tile(unit, tiles, channel, outer, inner, CHANNELS_LAST, BO, BI)
    c = channels_of(channel, CHANNELS_LAST, BO, BI)
    mean, rstd, weight, bias, v, u = _coefficients(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr, unit // tiles, c, channels, group_size, per_sample
    )
    x = load(x_ptr + start, offs, mask, 0.0)
    residual = load_at(residual_ptr, start, offs, mask)
    y = VALUE(x, mean, rstd, weight, bias, v, u, residual, ACT)
    store(y_ptr + start, offs, y, mask)


@triton.jit
def _order(channel_tiles, tiles, CHANNELS_LAST: tl.constexpr):
    """Return position tile and channel tile of this program: neighbours in memory run one after the other."""
    i = tl.program_id(0)
    if CHANNELS_LAST:
        unit, channel = i // channel_tiles, i % channel_tiles
    else:
        sample, rest = i // (channel_tiles * tiles), i % (channel_tiles * tiles)
        unit, channel = sample * tiles + rest % tiles, rest // tiles
    return unit, channel


def _pass(x: Tensor, given: Channels, sums: int = 0) -> tuple[Layout, Tiling, list[int]]:
    """Return how to cover x in one pass, and the sizes that such a kernel takes."""
    at = Layout.of(x, merge=not given.per_sample)
    tiles = tiling(at, sums)
    per_sample = given.groups if given.per_sample else 0
    group_size = at.channels // max(1, given.groups)  # without a channel no program will ask for it
    sizes = [at.outer, at.units, at.channels, group_size, per_sample]
    return at, tiles, [*sizes, tiles.channel_tiles, tiles.position_tiles]


def apply(formula: Formula, x: Tensor, given: Channels, act: str | None, residual: Tensor | None) -> Tensor:
    """Return the formula's value at every x."""
    at, tiles, sizes = _pass(x, given)
    y = torch.empty_like(x)
    if residual is not None:
        residual = like(residual, x)
    _launch.run(
        _apply, at.samples * tiles.channel_tiles * tiles.position_tiles, x, y, residual, *given, *sizes,
        VALUE=formula.value, ACT=act, **tile_constants(at, tiles),
    )  # fmt: skip
    return y


# --- backward


@triton.jit
def _channel_sums(
    dy_ptr, x_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr, sums_ptr,
    outer, units, channels, group_size, per_sample, channel_tiles, tiles, splits, per_split, per_batch, step,
    GRADS: tl.constexpr, SUMS: tl.constexpr, ACT: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Sums per channel over a run of tiles, which lies in one sample if statistics belong to samples."""
    inner = units * VEC
    part, channel = tl.program_id(0) // channel_tiles, tl.program_id(0) % channel_tiles
    channel *= BI if CHANNELS_LAST else BO
    first = part // splits * per_batch + part % splits * per_split
    last = tl.minimum(first + per_split, (part // splits + 1) * per_batch)
    c = channels_of(channel, CHANNELS_LAST, BO, BI)
    mean, rstd, weight, bias, v, u = _coefficients(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr, first // tiles, c, channels, group_size, per_sample
    )
    s0 = tl.zeros((BO, BI), tl.float32)
    s1 = tl.zeros((BO, BI), tl.float32)
    s2 = tl.zeros((BO, BI), tl.float32)
    s3 = tl.zeros((BO, BI), tl.float32)
    s4 = tl.zeros((BO, BI), tl.float32)
    for unit in range(first, last):
        start, offs, mask = tile(unit, tiles, channel, outer, inner, CHANNELS_LAST, BO, BI)
        dy = load(dy_ptr + start, offs, mask, 0.0)  # 0 outside: so are all that is summed
        x = load(x_ptr + start, offs, mask, 0.0)
        residual = load_at(residual_ptr, start, offs, mask)
        _, e0, e1, e2, e3, e4 = GRADS(dy, x, mean, rstd, weight, bias, v, u, residual, ACT)
        s0 += e0
        s1 += e1
        if SUMS > 2:
            s2 += e2
        if SUMS > 3:
            s3 += e3
            s4 += e4
    at = part.to(tl.int64) * channels + c
    mask = c < channels
    store(sums_ptr, at, over_positions(s0, CHANNELS_LAST), mask)
    store(sums_ptr + step, at, over_positions(s1, CHANNELS_LAST), mask)
    if SUMS > 2:
        store(sums_ptr + 2 * step, at, over_positions(s2, CHANNELS_LAST), mask)
    if SUMS > 3:
        store(sums_ptr + 3 * step, at, over_positions(s3, CHANNELS_LAST), mask)
        store(sums_ptr + 4 * step, at, over_positions(s4, CHANNELS_LAST), mask)


def sums(
    formula: Formula, dy: Tensor, x: Tensor, given: Channels, act: str | None, residual: Tensor | None
) -> tuple[Tensor, int]:
    """Return the partial sums (formula.sums, parts, C) of every batch, one after the other, and parts per batch."""
    at, tiles, sizes = _pass(x, given, formula.sums)
    parts = _Parts.of(at, tiles, at.samples if given.per_sample else 1, x.device)
    out = x.new_empty(formula.sums, parts.number, at.channels, dtype=torch.float32)
    _launch.run(
        _channel_sums, parts.number * tiles.channel_tiles, dy, x, residual, *given, out, *sizes,
        parts.splits, parts.per_split, parts.per_batch, out.stride(0),
        GRADS=formula.grads, SUMS=formula.sums, ACT=act, **tile_constants(at, tiles),
    )  # fmt: skip
    return out, parts.splits


@triton.jit
def _terms(
    sums_ptr, weight_ptr, rstd_ptr, t1_ptr, t2_ptr, channels, group_size, splits, step, values, BLOCK: tl.constexpr
):
    """t1 = rstd * mean(w * s0) and t2 = rstd² * mean(w * s1) of a group."""
    groups = channels // group_size
    n, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    a = tl.zeros((BLOCK,), tl.float32)
    b = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits * group_size, BLOCK):
        j = start + tl.arange(0, BLOCK)
        mask = j < splits * group_size
        c = group * group_size + j % group_size
        at = (n * splits + j // group_size) * channels + c
        w = load(weight_ptr, c, mask, 1.0)
        a += w * load(sums_ptr, at, mask, 0.0)
        b += w * load(sums_ptr + step, at, mask, 0.0)
    rstd = tl.load(rstd_ptr + tl.program_id(0))
    if t1_ptr is not None:
        tl.store(t1_ptr + tl.program_id(0), rstd * (tl.sum(a, 0) / values))
    tl.store(t2_ptr + tl.program_id(0), rstd * rstd * (tl.sum(b, 0) / values))


def group_terms(
    formula: Formula, parts: Tensor, splits: int, given: Channels, values: int
) -> tuple[Tensor | None, Tensor]:
    """Return t1 (None if the formula is not centred) and t2 (N, G); ``values`` is the size of a group."""
    t1, t2 = torch.empty_like(given.rstd) if formula.centred else None, torch.empty_like(given.rstd)
    c = parts.shape[2]
    group_size = c // given.groups
    _launch.run(
        _terms, given.rstd.numel(), parts, given.weight, given.rstd, t1, t2, c, group_size, splits, parts.stride(0),
        values, BLOCK=_block(splits * group_size),
    )  # fmt: skip
    return t1, t2


@triton.jit
def _gradient(
    dy_ptr, x_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr, t1_ptr, t2_ptr, dx_ptr, dz_ptr,
    outer, units, channels, group_size, per_sample, channel_tiles, tiles,
    GRADS: tl.constexpr, ACT: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    inner = units * VEC
    unit, channel = _order(channel_tiles, tiles, CHANNELS_LAST)
    channel *= BI if CHANNELS_LAST else BO
    start, offs, mask = tile(unit, tiles, channel, outer, inner, CHANNELS_LAST, BO, BI)
    c = channels_of(channel, CHANNELS_LAST, BO, BI)
    n = unit // tiles
    mean, rstd, weight, bias, v, u = _coefficients(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr, n, c, channels, group_size, per_sample
    )
    s = n * per_sample + c // group_size
    dy = load(dy_ptr + start, offs, mask, 0.0)
    x = load(x_ptr + start, offs, mask, 0.0)
    residual = load_at(residual_ptr, start, offs, mask)
    dx, dz, _, _, _, _ = GRADS(dy, x, mean, rstd, weight, bias, v, u, residual, ACT)
    dx -= load(t1_ptr, s, c < channels, 0.0) + (x - mean) * load(t2_ptr, s, c < channels, 0.0)
    store(dx_ptr + start, offs, dx, mask)
    if dz_ptr is not None:
        store(dz_ptr + start, offs, dz, mask)


def gradient(
    formula: Formula, dy: Tensor, x: Tensor, given: Channels, t1: Tensor | None, t2: Tensor | None,
    act: str | None, residual: Tensor | None, wants_dz: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return dx = local - t1 - (x - mean) * t2, and the first of the formula's five where asked for (else empty)."""
    at, tiles, sizes = _pass(x, given)
    dx = torch.empty_like(x)
    dz = torch.empty_like(x) if wants_dz else None
    _launch.run(
        _gradient, at.samples * tiles.channel_tiles * tiles.position_tiles,
        dy, x, residual, *given, t1, t2, dx, dz, *sizes,
        GRADS=formula.grads, ACT=act, **tile_constants(at, tiles),
    )  # fmt: skip
    return dx, x.new_empty(0) if dz is None else dz
