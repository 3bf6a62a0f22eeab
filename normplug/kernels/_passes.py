"""The passes over memory that all norms are made of, and their launches.

A norm is a formula of a value, the statistics of its group and the parameters of its channel. Forward takes

    statistics   mean and 1/std of every group: partial sums per channel, then joined
    apply        y = value(x, ...)

or one pass where a group fits into the registers of a program. Backward takes

    sums         per channel, of what the formula's ``grads`` names
    terms        what the statistics pass back, t1 and t2 per group
    gradient     dx = local - t1 - (x - mean) * t2

and again one pass where a group fits. A tile is (outer, inner) as in ``Layout``, in both memory formats; which axis
is the channels' only decides along which axis parameters and sums lie. Sums are float32, taken in a fixed order
without atomics: the same bits on every run.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from normplug.kernels import _launch
from normplug.kernels._launch import Layout, Tiling, fits_on_chip, like, split, tiling

__all__ = ["Channels", "Formula", "apply", "backward", "forward", "gradient", "statistics", "sums"]


class Formula(NamedTuple):
    """A norm in terms of single values, for the passes.

    Attributes:
        value: (x, mean, rstd, weight, bias, v, u, residual, ACT) -> y, a ``triton.jit`` function.
        grads: (dy, x, mean, rstd, weight, bias, v, u, residual, ACT) -> six values: dL/dx at constant statistics, and
            up to five whose sums per channel are wanted: the gradients of bias and weight first.
        sums: How many of the five.
        has_mean: False for a norm that divides by the root of the mean square.
        centred: True if the mean is subtracted from x, so that it passes a gradient of its own.
    """

    value: Any
    grads: Any
    sums: int = 2
    has_mean: bool = True
    centred: bool = True


class Channels(NamedTuple):
    """What a formula takes besides x: statistics (N, G) or (G,), and parameters (C,), each or None."""

    mean: Tensor | None
    rstd: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    v: Tensor | None = None
    u: Tensor | None = None

    @property
    def groups(self) -> int:
        return self.rstd.shape[-1]

    @property
    def per_sample(self) -> bool:
        return self.rstd.ndim == 2


# --- inside a program


@triton.jit
def _tile(unit, tiles, channel, outer, inner, CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr):
    """Return where a tile starts, its offsets from there, and which of them exist.

    ``unit`` counts the position tiles of all samples, ``channel`` is the tile's first.
    """
    n = (unit // tiles).to(tl.int64)
    if CHANNELS_LAST:
        row, column = (unit % tiles) * BO, channel
    else:
        row, column = channel, (unit % tiles) * BI
    o, i = tl.arange(0, BO)[:, None], tl.arange(0, BI)[None, :]
    start = (n * outer + row) * inner + column  # int64: a batch of video passes 2**31
    return start, o * inner + i, (row + o < outer) & (column + i < inner)


@triton.jit
def _channels(channel, CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr):
    """Return the channels of a tile along their axis: (1, BI) or (BO, 1)."""
    c = channel + tl.arange(0, BI)[None, :] if CHANNELS_LAST else channel + tl.arange(0, BO)[:, None]
    return c


@triton.jit
def _load(ptr, offs, mask, other):
    """Return values as float32, or a constant where there is no tensor."""
    value = other if ptr is None else tl.load(ptr + offs, mask=mask, other=other).to(tl.float32)
    return value


@triton.jit
def _store(ptr, offs, value, mask):
    if ptr is not None:
        tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _over_positions(t, CHANNELS_LAST: tl.constexpr):
    """Sum a tile over its positions and keep both axes."""
    s = tl.sum(t, 0, keep_dims=True) if CHANNELS_LAST else tl.sum(t, 1, keep_dims=True)
    return s


@triton.jit
def _over_all(t):
    return tl.sum(tl.sum(t, 1), 0)


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
    start, offs, mask = _tile(first, tiles, channel, outer, inner, CHANNELS_LAST, BO, BI)
    count = tl.minimum(positions - first % tiles * block, block)
    if first >= last:
        count = 0
        mask = mask & False
    x = _load(x_ptr + start, offs, mask, 0.0)
    shift = _over_positions(x, CHANNELS_LAST) / tl.maximum(count, 1)
    d = tl.where(mask, x - shift, 0.0)
    s1, s2 = d, d * d
    for unit in range(first + 1, last):
        start, offs, mask = _tile(unit, tiles, channel, outer, inner, CHANNELS_LAST, BO, BI)
        d = tl.where(mask, _load(x_ptr + start, offs, mask, 0.0) - shift, 0.0)
        s1 += d
        s2 += d * d
        count += tl.minimum(positions - unit % tiles * block, block)
    s1, s2 = _over_positions(s1, CHANNELS_LAST), _over_positions(s2, CHANNELS_LAST)
    many = tl.maximum(count, 1).to(tl.float32)
    c = _channels(channel, CHANNELS_LAST, BO, BI)
    at = part.to(tl.int64) * channels + c
    _store(mean_ptr, at, shift + s1 / many, c < channels)
    _store(m2_ptr, at, tl.maximum(s2 - s1 * s1 / many, 0.0), c < channels)
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
        result = 1.0 / tl.sqrt(result)
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
        _load(mean_ptr, s, mask, 0.0),
        _load(rstd_ptr, s, mask, 1.0),
        _load(weight_ptr, c, mask, 1.0),
        _load(bias_ptr, c, mask, 0.0),
        _load(v_ptr, c, mask, 0.0),
        _load(u_ptr, c, mask, 0.0),
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
    start, offs, mask = _tile(unit, tiles, channel, outer, inner, CHANNELS_LAST, BO, BI)
    c = _channels(channel, CHANNELS_LAST, BO, BI)
    mean, rstd, weight, bias, v, u = _coefficients(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr, unit // tiles, c, channels, group_size, per_sample
    )
    x = _load(x_ptr + start, offs, mask, 0.0)
    residual = _load_at(residual_ptr, start, offs, mask)
    y = VALUE(x, mean, rstd, weight, bias, v, u, residual, ACT)
    _store(y_ptr + start, offs, y, mask)


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


@triton.jit
def _load_at(ptr, start, offs, mask):
    """Load from a tensor that may be absent."""
    value = 0.0 if ptr is None else _load(ptr + start, offs, mask, 0.0)
    return value


def _pass(x: Tensor, given: Channels, sums: int = 0) -> tuple[Layout, Tiling, list[int]]:
    """Return how to cover x in one pass, and the sizes that such a kernel takes."""
    at = Layout.of(x, merge=not given.per_sample)
    tiles = tiling(at, sums)
    per_sample = given.groups if given.per_sample else 0
    sizes = [at.outer, at.units, at.channels, at.channels // given.groups, per_sample]
    return at, tiles, [*sizes, tiles.channel_tiles, tiles.position_tiles]


def _tile_constants(at: Layout, block: Sequence[int]) -> dict[str, Any]:
    return {"VEC": at.vec, "CHANNELS_LAST": at.channels_last, "BO": block[0], "BI": block[1]}


def apply(formula: Formula, x: Tensor, given: Channels, act: str | None, residual: Tensor | None) -> Tensor:
    """Return the formula's value at every x."""
    at, tiles, sizes = _pass(x, given)
    y = torch.empty_like(x)
    if residual is not None:
        residual = like(residual, x)
    _launch.run(
        _apply, at.samples * tiles.channel_tiles * tiles.position_tiles, x, y, residual, *given, *sizes,
        VALUE=formula.value, ACT=act, **_tile_constants(at, tiles),
    )  # fmt: skip
    return y


# --- backward


@triton.jit
def _channel_sums(
    dy_ptr, x_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr, sums_ptr,
    outer, units, channels, group_size, per_sample, channel_tiles, tiles, splits, per_split, per_batch, parts,
    GRADS: tl.constexpr, SUMS: tl.constexpr, ACT: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Sums per channel over a run of tiles, which lies in one sample if statistics belong to samples."""
    inner = units * VEC
    part, channel = tl.program_id(0) // channel_tiles, tl.program_id(0) % channel_tiles
    channel *= BI if CHANNELS_LAST else BO
    first = part // splits * per_batch + part % splits * per_split
    last = tl.minimum(first + per_split, (part // splits + 1) * per_batch)
    c = _channels(channel, CHANNELS_LAST, BO, BI)
    mean, rstd, weight, bias, v, u = _coefficients(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr, first // tiles, c, channels, group_size, per_sample
    )
    s0 = tl.zeros((BO, BI), tl.float32)
    s1 = tl.zeros((BO, BI), tl.float32)
    s2 = tl.zeros((BO, BI), tl.float32)
    s3 = tl.zeros((BO, BI), tl.float32)
    s4 = tl.zeros((BO, BI), tl.float32)
    for unit in range(first, last):
        start, offs, mask = _tile(unit, tiles, channel, outer, inner, CHANNELS_LAST, BO, BI)
        dy = _load(dy_ptr + start, offs, mask, 0.0)  # 0 outside: so are all that is summed
        x = _load(x_ptr + start, offs, mask, 0.0)
        residual = _load_at(residual_ptr, start, offs, mask)
        _, e0, e1, e2, e3, e4 = GRADS(dy, x, mean, rstd, weight, bias, v, u, residual, ACT)
        s0 += e0
        s1 += e1
        if SUMS > 2:
            s2 += e2
        if SUMS > 3:
            s3 += e3
            s4 += e4
    at = part.to(tl.int64) * channels + c
    step = parts.to(tl.int64) * channels
    mask = c < channels
    _store(sums_ptr, at, _over_positions(s0, CHANNELS_LAST), mask)
    _store(sums_ptr + step, at, _over_positions(s1, CHANNELS_LAST), mask)
    if SUMS > 2:
        _store(sums_ptr + 2 * step, at, _over_positions(s2, CHANNELS_LAST), mask)
    if SUMS > 3:
        _store(sums_ptr + 3 * step, at, _over_positions(s3, CHANNELS_LAST), mask)
        _store(sums_ptr + 4 * step, at, _over_positions(s4, CHANNELS_LAST), mask)


def sums(
    formula: Formula, dy: Tensor, x: Tensor, given: Channels, act: str | None, residual: Tensor | None
) -> tuple[Tensor, int]:
    """Return the partial sums (formula.sums, parts, C) of every batch, one after the other, and parts per batch."""
    at, tiles, sizes = _pass(x, given, formula.sums)
    parts = _Parts.of(at, tiles, at.samples if given.per_sample else 1, x.device)
    out = x.new_empty(formula.sums, parts.number, at.channels, dtype=torch.float32)
    _launch.run(
        _channel_sums, parts.number * tiles.channel_tiles, dy, x, residual, *given, out, *sizes,
        parts.splits, parts.per_split, parts.per_batch, parts.number,
        GRADS=formula.grads, SUMS=formula.sums, ACT=act, **_tile_constants(at, tiles),
    )  # fmt: skip
    return out, parts.splits


@triton.jit
def _terms(
    sums_ptr, weight_ptr, rstd_ptr, t1_ptr, t2_ptr, channels, group_size, splits, parts, values, BLOCK: tl.constexpr
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
        w = _load(weight_ptr, c, mask, 1.0)
        a += w * _load(sums_ptr, at, mask, 0.0)
        b += w * _load(sums_ptr + parts.to(tl.int64) * channels, at, mask, 0.0)
    rstd = tl.load(rstd_ptr + tl.program_id(0))
    if t1_ptr is not None:
        tl.store(t1_ptr + tl.program_id(0), rstd * (tl.sum(a, 0) / values))
    tl.store(t2_ptr + tl.program_id(0), rstd * rstd * (tl.sum(b, 0) / values))


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
    start, offs, mask = _tile(unit, tiles, channel, outer, inner, CHANNELS_LAST, BO, BI)
    c = _channels(channel, CHANNELS_LAST, BO, BI)
    n = unit // tiles
    mean, rstd, weight, bias, v, u = _coefficients(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr, n, c, channels, group_size, per_sample
    )
    s = n * per_sample + c // group_size
    dy = _load(dy_ptr + start, offs, mask, 0.0)
    x = _load(x_ptr + start, offs, mask, 0.0)
    residual = _load_at(residual_ptr, start, offs, mask)
    dx, dz, _, _, _, _ = GRADS(dy, x, mean, rstd, weight, bias, v, u, residual, ACT)
    dx -= _load(t1_ptr, s, c < channels, 0.0) + (x - mean) * _load(t2_ptr, s, c < channels, 0.0)
    _store(dx_ptr + start, offs, dx, mask)
    if dz_ptr is not None:
        _store(dz_ptr + start, offs, dz, mask)


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
        GRADS=formula.grads, ACT=act, **_tile_constants(at, tiles),
    )  # fmt: skip
    return dx, x.new_empty(0) if dz is None else dz


# --- a whole group in one program


@triton.jit
def _group_tile(outer, inner, group_size, CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr):
    """Return what ``_tile`` does for the group of this program, and its sample and channels."""
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
    x = _load(x_ptr + start, offs, mask, 0.0)
    if HAS_MEAN:
        mean = _over_all(x) / values
        d = tl.where(mask, x - mean, 0.0)
        # What rounding left over: with mean 1000 it is as large as the last digits of x.
        mean += _over_all(d) / values
        d = tl.where(mask, x - mean, 0.0)
        tl.store(mean_ptr + tl.program_id(0), mean)
    else:
        mean = 0.0
        d = x
    rstd = 1.0 / tl.sqrt(_over_all(d * d) / values + eps)
    tl.store(rstd_ptr + tl.program_id(0), rstd)
    y = VALUE(
        x,
        mean,
        rstd,
        _load(weight_ptr, c, valid, 1.0),
        _load(bias_ptr, c, valid, 0.0),
        _load(v_ptr, c, valid, 0.0),
        0.0,
        _load_at(residual_ptr, start, offs, mask),
        ACT,
    )
    _store(y_ptr + start, offs, y, mask)


@triton.jit
def _group_backward(
    dy_ptr, x_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, sums_ptr, dx_ptr, dz_ptr,
    outer, units, group_units, values, samples,
    GRADS: tl.constexpr, SUMS: tl.constexpr, ACT: tl.constexpr, CENTRED: tl.constexpr,
    VEC: tl.constexpr, GROUP_VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    inner, group_size = units * VEC, group_units * GROUP_VEC
    start, offs, mask, n, c, valid = _group_tile(outer, inner, group_size, CHANNELS_LAST, BO, BI)
    dy = _load(dy_ptr + start, offs, mask, 0.0)
    x = _load(x_ptr + start, offs, mask, 0.0)
    residual = _load_at(residual_ptr, start, offs, mask)
    mean = 0.0 if mean_ptr is None else tl.load(mean_ptr + tl.program_id(0))
    rstd = tl.load(rstd_ptr + tl.program_id(0))
    weight = _load(weight_ptr, c, valid, 1.0)
    dx, e0, e1, e2, _, _ = GRADS(
        dy,
        x,
        mean,
        rstd,
        weight,
        _load(bias_ptr, c, valid, 0.0),
        _load(v_ptr, c, valid, 0.0),
        0.0,
        residual,
        ACT,
    )
    if dz_ptr is not None:
        _store(dz_ptr + start, offs, e0, mask)
    channels = inner if CHANNELS_LAST else outer
    at = n * channels + c
    step = samples.to(tl.int64) * channels
    s0, s1 = _over_positions(e0, CHANNELS_LAST), _over_positions(e1, CHANNELS_LAST)
    _store(sums_ptr, at, s0, valid)
    _store(sums_ptr + step, at, s1, valid)
    if SUMS > 2:
        _store(sums_ptr + 2 * step, at, _over_positions(e2, CHANNELS_LAST), valid)
    if CENTRED:
        dx -= rstd * (_over_all(weight * s0) / values)
    dx -= (x - mean) * (rstd * rstd * (_over_all(weight * s1) / values))
    _store(dx_ptr + start, offs, dx, mask)


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
        mean, rstd = statistics(x, groups, eps, kind)
        given = Channels(mean if formula.has_mean else None, rstd, weight, bias, v)
        return apply(formula, x, given, act, residual), given.mean, rstd
    y = torch.empty_like(x)
    mean = x.new_empty(n, groups, dtype=torch.float32) if formula.has_mean else None
    rstd = x.new_empty(n, groups, dtype=torch.float32)
    if residual is not None:
        residual = like(residual, x)
    _launch.run(
        _group_forward, n * groups, x, y, residual, mean, rstd, weight, bias, v, *sizes, eps, warps=_warps(block),
        VALUE=formula.value, ACT=act, HAS_MEAN=formula.has_mean, GROUP_VEC=group_vec, **_tile_constants(at, block),
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
        parts, splits = sums(formula, dy, x, given, act, residual)
        t1, t2 = torch.empty_like(rstd) if formula.centred else None, torch.empty_like(rstd)
        group_size = c // groups
        _launch.run(
            _terms, n * groups, parts, weight, rstd, t1, t2, c, group_size, splits, parts.shape[1],
            group_size * at.positions, BLOCK=_block(splits * group_size),
        )  # fmt: skip
        dx, dz = gradient(formula, dy, x, given, t1, t2, act, residual, wants_dz)
        return dx, parts.sum(1), dz
    dx = torch.empty_like(x)
    dz = torch.empty_like(x) if wants_dz else None
    parts = x.new_empty(formula.sums, n, c, dtype=torch.float32)
    _launch.run(
        _group_backward, n * groups, dy, x, residual, mean, rstd, weight, bias, v, parts, dx, dz, *sizes, n,
        warps=_warps(block), GRADS=formula.grads, SUMS=formula.sums, ACT=act, CENTRED=formula.centred,
        GROUP_VEC=group_vec, **_tile_constants(at, block),
    )  # fmt: skip
    return dx, parts.sum(1), x.new_empty(0) if dz is None else dz
