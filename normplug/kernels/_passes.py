"""The passes over memory that all norms are made of, as steps that are planned once per shape.

Forward takes

    partial_statistics   mean and centred sum of squares of runs of tiles
    join                 mean and 1/std of every group; where programs of the next pass can afford it, they do it
    apply                y = value(x, ...)

and backward

    channel_sums         per channel, of what the formula's ``grads`` names
    totals               what the statistics pass back, t1 and t2 per group, and the gradients of parameters; the next
                         pass does this too where it is cheap
    gradient             dx = local - t1 - (x - mean) * t2

Sums are float32, taken in a fixed order without atomics: the same bits on every run. Programs of ``apply`` and
``gradient`` go through x from its end, which the pass before has left in the cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from normplug.kernels import _launch
from normplug.kernels._activations import as_constant
from normplug.kernels._launch import Layout, Step, Tiling, split, tiling
from normplug.kernels._tiles import (
    PER_CHANNEL,
    SIZES,
    Formula,
    channels_of,
    load,
    load_at,
    over_positions,
    store,
    tile,
    tile_constants,
)

__all__ = ["Parts", "Pass", "Statistics", "apply_step", "gradient_step", "sums_step", "totals_step"]

# Partial results per row that a program of apply or gradient puts together by itself, at a time and at most.
AT_ONCE, FOLDED = 32, 256
# Tile in which gradients of parameters are summed up: partial sums x channels.
ADDED, ADDERS = 128, 16
# Position tiles that a program of apply or gradient does at most, for what it loads and joins once.
LONGEST_RUN = 8


class Parts(NamedTuple):
    """How the position tiles of each batch are shared among programs."""

    number: int
    splits: int
    per_split: int
    per_batch: int

    @classmethod
    def of(cls, at: Layout, tiles: Tiling, batches: int, device: int, group_size: int = 1) -> "Parts":
        """Share them so that the device is filled, and the results of a group are few enough for ``FOLDED``."""
        per_batch = at.samples * tiles.position_tiles // batches
        most = per_batch if at.channels_last else max(1, FOLDED // group_size)
        splits = split(batches * tiles.channel_tiles, per_batch, device, most)
        per_split = triton.cdiv(per_batch, splits)
        splits = triton.cdiv(per_batch, per_split)
        return cls(batches * splits, splits, per_split, per_batch)


class Pass(NamedTuple):
    """How x is covered by tiles: with statistics per sample, or for all samples."""

    at: Layout
    tiles: Tiling
    groups: int
    per_sample: bool

    @classmethod
    def over(cls, shape: torch.Size, channels_last: bool, groups: int, per_sample: bool, sums: int = 0) -> "Pass":
        at = Layout.of(shape, channels_last, merge=not per_sample)
        return cls(at, tiling(at, sums), groups, per_sample)

    @property
    def group_size(self) -> int:
        return self.at.channels // self.groups

    @property
    def batches(self) -> int:
        return self.at.samples if self.per_sample else 1

    @property
    def sizes(self) -> list[int]:
        """The sizes that all passes by given statistics take."""
        at, per_sample = self.at, self.groups if self.per_sample else 0
        sizes = [at.outer, at.units, at.channels, self.group_size, per_sample]
        return [*sizes, self.tiles.channel_tiles, self.tiles.position_tiles]

    def runs(self, device: int) -> tuple[int, int]:
        """Return in how many runs the position tiles of a sample are done, and how many tiles each has."""
        rows, tiles = self.at.samples * self.tiles.channel_tiles, self.tiles.position_tiles
        enough = 2 * _launch.PROGRAMS_PER_SM * _launch.multiprocessors(device)
        per_run = max(1, min(LONGEST_RUN, rows * tiles // enough))
        return triton.cdiv(tiles, per_run), per_run


# --- statistics


@triton.jit
def _counted(unit, tiles, positions, block):
    """Return how many positions the tiles before that one have; the last of every sample may be cut short."""
    return unit // tiles * positions + tl.minimum(unit % tiles * block, positions)


@triton.jit(do_not_specialize=SIZES)
def _partial_statistics(
    x_ptr, parts_ptr, outer, units, channels, channel_tiles, tiles, splits, per_split, per_batch, step,
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
    x = load(x_ptr + start, offs, mask, 0.0)
    shift = over_positions(x, CHANNELS_LAST) / count
    d = tl.where(mask, x - shift, 0.0)
    s1, s2 = d, d * d
    for unit in range(first + 1, last):
        start, offs, mask = tile(unit, tiles, channel, outer, inner, CHANNELS_LAST, BO, BI)
        d = tl.where(mask, load(x_ptr + start, offs, mask, 0.0) - shift, 0.0)
        s1 += d
        s2 += d * d
    s1, s2 = over_positions(s1, CHANNELS_LAST), over_positions(s2, CHANNELS_LAST)
    many = (_counted(last, tiles, positions, block) - _counted(first, tiles, positions, block)).to(tl.float32)
    c = channels_of(channel, CHANNELS_LAST, BO, BI)
    at = part.to(tl.int64) * channels + c
    store(parts_ptr, at, shift + s1 / many, c < channels)
    store(parts_ptr + step, at, tl.maximum(s2 - s1 * s1 / many, 0.0, propagate_nan=tl.PropagateNan.ALL), c < channels)


@triton.jit
def _part(j, rows, size, per_split, per_batch, tiles, positions, block):
    """Return where the j-th partial result of a group stands, and for how many values of a channel."""
    part = j // size
    n = _counted(tl.minimum((part + 1) * per_split, per_batch), tiles, positions, block)
    n -= _counted(part * per_split, tiles, positions, block)
    return part * rows + j % size, n.to(tl.float32)


@triton.jit
def _joined(
    parts_ptr, step, batch, group, mask, rows, length, size, splits, per_split, per_batch, tiles, positions, block,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Join the partial statistics of groups, (R, 1) or (1, 1), by Chan's formula: mean, sum of squares and count.

    Each has ``splits`` times ``size`` of them, ``length`` in all, in ``rows`` columns.
    """
    base = parts_ptr + batch * splits * rows + group * size
    shift = tl.load(base, mask=mask, other=0.0)
    total = tl.zeros_like(shift)
    many = (_counted(per_batch, tiles, positions, block) * size).to(tl.float32)
    for start in range(0, length, AT_ONCE):
        j = start + tl.arange(0, AT_ONCE)[None, :]
        at, n = _part(j, rows, size, per_split, per_batch, tiles, positions, block)
        found = mask & (j < length)
        mean = tl.load(base + at, mask=found, other=0.0)
        total += tl.sum(tl.where(found, n * (mean - shift), 0.0), 1, keep_dims=True)
    whole = total / many
    m2 = tl.zeros_like(shift)
    for start in range(0, length, AT_ONCE):
        j = start + tl.arange(0, AT_ONCE)[None, :]
        at, n = _part(j, rows, size, per_split, per_batch, tiles, positions, block)
        found = mask & (j < length)
        d = tl.load(base + at, mask=found, other=0.0) - shift - whole
        inside = tl.load(base + step + at, mask=found, other=0.0)
        m2 += tl.sum(tl.where(found, inside + n * d * d, 0.0), 1, keep_dims=True)
    return shift + whole, m2, many


@triton.jit
def _reciprocal_root(mean, m2, many, eps, CENTRED: tl.constexpr):
    """Return one over the root of the variance, or of the mean square, and eps."""
    square = m2 / many + eps
    if not CENTRED:
        square += mean * mean
    return tl.div_rn(1.0, tl.sqrt_rn(square))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PER_CHANNEL)
def _join(
    parts_ptr, mean_ptr, rstd_ptr, m2_ptr, channels, group_size, step, length, splits, per_split, per_batch,
    stat_tiles, stat_positions, stat_block, eps, CENTRED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    groups = channels // group_size
    batch, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    here = tl.zeros((1, 1), tl.int32)
    mean, m2, many = _joined(
        parts_ptr, step, batch, here + group, here == 0, channels, length, group_size, splits, per_split, per_batch,
        stat_tiles, stat_positions, stat_block, AT_ONCE,
    )  # fmt: skip
    at = tl.program_id(0) + here
    store(mean_ptr, at, mean, here == 0)
    store(m2_ptr, at, m2, here == 0)
    if rstd_ptr is not None:
        store(rstd_ptr, at, _reciprocal_root(mean, m2, many, eps, CENTRED), here == 0)


class Statistics(NamedTuple):
    """How the statistics of groups are found: by sums over ``parts``, which stand in ``workspace`` numbers.

    In contiguous memory a group is one row, and its partial results are so few that ``apply`` joins them by itself;
    channels-last they are per channel.
    """

    at: Layout
    tiles: Tiling
    parts: Parts
    groups: int
    batches: int

    @classmethod
    def of(cls, shape: torch.Size, channels_last: bool, groups: int, per_sample: bool, device: int) -> "Statistics":
        if channels_last:
            at = Layout.of(shape, True, merge=not per_sample)
        else:
            at = Layout.rows(shape[0], groups, shape[1] // groups * shape[2:].numel())
        tiles, batches = tiling(at), at.samples if per_sample else 1
        return cls(at, tiles, Parts.of(at, tiles, batches, device), groups, batches)

    @property
    def step_size(self) -> int:
        return self.parts.number * self.at.channels

    @property
    def workspace(self) -> int:
        return 2 * self.step_size

    @property
    def numbers(self) -> list[int]:
        """What says how many values each partial result stands for."""
        at, tiles, parts = self.at, self.tiles, self.parts
        block = tiles.block_outer if at.channels_last else tiles.block_inner
        return [parts.splits, parts.per_split, parts.per_batch, tiles.position_tiles, at.positions, block]

    def partial(self) -> Step:
        """Plan the first pass: (x, parts)."""
        at, tiles, parts = self.at, self.tiles, self.parts
        numbers = [at.outer, at.units, at.channels, tiles.channel_tiles, tiles.position_tiles, *parts[1:]]
        programs = parts.number * tiles.channel_tiles
        return Step(_partial_statistics, programs, [*numbers, self.step_size], tile_constants(at, tiles))

    def join(self, eps: float, centred: bool = True) -> Step:
        """Plan the second: (parts, mean, rstd, m2), of which any but the first may be None."""
        channels = self.at.channels
        size = channels // self.groups
        numbers = [channels, size, self.step_size, self.parts.splits * size, *self.numbers, eps]
        constants = {"CENTRED": centred, "AT_ONCE": 8 * AT_ONCE}
        return Step(_join, self.batches * self.groups, numbers, constants)


# --- one pass over x, by given statistics


@triton.jit
def _parameters(weight_ptr, bias_ptr, v_ptr, u_ptr, c, mask):
    return (
        load(weight_ptr, c, mask, 1.0),
        load(bias_ptr, c, mask, 0.0),
        load(v_ptr, c, mask, 0.0),
        load(u_ptr, c, mask, 0.0),
    )


@triton.jit
def _order(program, channel_tiles, runs, CHANNELS_LAST: tl.constexpr):
    """Return sample, run of position tiles and channel tile: neighbours in memory are done one after the other."""
    if CHANNELS_LAST:
        channel, rest = program % channel_tiles, program // channel_tiles
        run, n = rest % runs, rest // runs
    else:
        run, rest = program % runs, program // runs
        channel, n = rest % channel_tiles, rest // channel_tiles
    return n, run, channel


@triton.jit(do_not_specialize=[*SIZES, "eps", "slope"], do_not_specialize_on_alignment=PER_CHANNEL)
def _apply(
    x_ptr, y_ptr, residual_ptr, parts_ptr, mean_ptr, rstd_ptr, m2_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr,
    outer, units, channels, group_size, per_sample, channel_tiles, tiles, runs, per_run,
    step, splits, per_split, per_batch, stat_tiles, stat_positions, stat_block, eps, slope,
    VALUE: tl.constexpr, ACT: tl.constexpr, HAS_MEAN: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    inner = units * VEC
    n, run, channel = _order(tl.num_programs(0) - 1 - tl.program_id(0), channel_tiles, runs, CHANNELS_LAST)
    channel *= BI if CHANNELS_LAST else BO
    c = channels_of(channel, CHANNELS_LAST, BO, BI)
    s, found = n * per_sample + c // group_size, c < channels
    if parts_ptr is None:
        mean, rstd = load(mean_ptr, s, found, 0.0), load(rstd_ptr, s, found, 1.0)
    else:
        batch = (n * tl.minimum(per_sample, 1)).to(tl.int64)
        mean, m2, many = _joined(
            parts_ptr, step, batch, c // group_size, found, channels // group_size, splits, 1, splits, per_split,
            per_batch, stat_tiles, stat_positions, stat_block, AT_ONCE,
        )  # fmt: skip
        rstd = _reciprocal_root(mean, m2, many, eps, HAS_MEAN)
        if not HAS_MEAN:
            mean = tl.zeros_like(mean)
        # Of the programs that have a group the first keeps its statistics, for backward.
        keeps = found & (c % group_size == 0) & (run == 0) & ((n == 0) | (per_sample > 0))
        store(mean_ptr, s, mean, keeps)
        store(rstd_ptr, s, rstd, keeps)
        store(m2_ptr, s, m2, keeps)
    weight, bias, v, u = _parameters(weight_ptr, bias_ptr, v_ptr, u_ptr, c, found)
    for unit in range(n * tiles + run * per_run, n * tiles + tl.minimum((run + 1) * per_run, tiles)):
        start, offs, mask = tile(unit, tiles, channel, outer, inner, CHANNELS_LAST, BO, BI)
        x = load(x_ptr + start, offs, mask, 0.0)
        residual = load_at(residual_ptr, start, offs, mask)
        y = VALUE(x, mean, rstd, weight, bias, v, u, residual, slope, ACT)
        store(y_ptr + start, offs, y, mask)


def apply_step(
    formula: Formula, given: Pass, statistics: Statistics | None, eps: float, act: str | None, device: int
) -> Step:
    """Plan y = act(value(x)): (x, y, residual, parts, mean, rstd, m2, weight, bias, v, u).

    With statistics it joins their parts and writes mean, rstd and m2, each unless it is None; else parts is None, and
    it reads mean and rstd.
    """
    runs = given.runs(device)
    act, slope = as_constant(act)
    joins = [0] * 7 if statistics is None else [statistics.step_size, *statistics.numbers]
    programs = given.at.samples * given.tiles.channel_tiles * runs[0]
    constants = {"VALUE": formula.value, "ACT": act, "HAS_MEAN": formula.has_mean, "AT_ONCE": AT_ONCE}
    constants |= tile_constants(given.at, given.tiles)
    return Step(_apply, programs, [*given.sizes, *runs, *joins, eps, slope], constants)


# --- backward


@triton.jit(do_not_specialize=[*SIZES, "slope"], do_not_specialize_on_alignment=PER_CHANNEL)
def _channel_sums(
    dy_ptr, x_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr, parts_ptr,
    outer, units, channels, group_size, per_sample, channel_tiles, tiles, splits, per_split, per_batch, step, slope,
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
    s, found = first // tiles * per_sample + c // group_size, c < channels
    mean, rstd = load(mean_ptr, s, found, 0.0), load(rstd_ptr, s, found, 1.0)
    weight, bias, v, u = _parameters(weight_ptr, bias_ptr, v_ptr, u_ptr, c, found)
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
        _, e0, e1, e2, e3, e4 = GRADS(dy, x, mean, rstd, weight, bias, v, u, residual, slope, ACT)
        s0 += e0
        s1 += e1
        if SUMS > 2:
            s2 += e2
        if SUMS > 3:
            s3 += e3
            s4 += e4
    at = part.to(tl.int64) * channels + c
    store(parts_ptr, at, over_positions(s0, CHANNELS_LAST), found)
    store(parts_ptr + step, at, over_positions(s1, CHANNELS_LAST), found)
    if SUMS > 2:
        store(parts_ptr + 2 * step, at, over_positions(s2, CHANNELS_LAST), found)
    if SUMS > 3:
        store(parts_ptr + 3 * step, at, over_positions(s3, CHANNELS_LAST), found)
        store(parts_ptr + 4 * step, at, over_positions(s4, CHANNELS_LAST), found)


def sums_step(formula: Formula, given: Pass, parts: Parts, act: str | None) -> Step:
    """Plan the sums: (dy, x, residual, mean, rstd, weight, bias, v, u, parts), parts of (formula.sums, number, C)."""
    act, slope = as_constant(act)
    numbers = [*given.sizes, *parts[1:], parts.number * given.at.channels, slope]
    constants = {"GRADS": formula.grads, "SUMS": formula.sums, "ACT": act, **tile_constants(given.at, given.tiles)}
    return Step(_channel_sums, parts.number * given.tiles.channel_tiles, numbers, constants)


@triton.jit
def _group_terms(
    parts_ptr, weight_ptr, batch, group, mask, rstd, channels, group_size, splits, step, values, length,
    CENTRED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Return t1 = rstd * mean(w * s0), if the norm is centred, and t2 = rstd² * mean(w * s1) of groups (R, 1)."""
    a = tl.zeros_like(rstd)
    b = tl.zeros_like(rstd)
    for start in range(0, length, AT_ONCE):
        j = start + tl.arange(0, AT_ONCE)[None, :]
        found = mask & (j < length)
        c = group * group_size + j % group_size
        at = (batch * splits + j // group_size) * channels + c
        w = load(weight_ptr, c, found, 1.0)
        if CENTRED:
            a += tl.sum(tl.where(found, w * tl.load(parts_ptr + at, mask=found, other=0.0), 0.0), 1, keep_dims=True)
        b += tl.sum(tl.where(found, w * tl.load(parts_ptr + step + at, mask=found, other=0.0), 0.0), 1, keep_dims=True)
    t1 = rstd * (a / values) if CENTRED else a
    return t1, rstd * rstd * (b / values)


@triton.jit
def _add_up(
    program, parts_ptr, dbias_ptr, dweight_ptr, dv_ptr, channels, step, parts, ADDED: tl.constexpr, ADDERS: tl.constexpr
):
    """Sum the partial sums of a few channels up over all parts."""
    c = program * ADDERS + tl.arange(0, ADDERS)[None, :]
    s0 = tl.zeros((ADDED, ADDERS), tl.float32)
    s1 = tl.zeros((ADDED, ADDERS), tl.float32)
    s2 = tl.zeros((ADDED, ADDERS), tl.float32)
    for start in range(0, parts, ADDED):
        part = start + tl.arange(0, ADDED)[:, None]
        found = (part < parts) & (c < channels)
        at = part.to(tl.int64) * channels + c
        s0 += tl.load(parts_ptr + at, mask=found, other=0.0)
        s1 += tl.load(parts_ptr + step + at, mask=found, other=0.0)
        if dv_ptr is not None:
            s2 += tl.load(parts_ptr + 2 * step + at, mask=found, other=0.0)
    store(dbias_ptr, c, tl.sum(s0, 0, keep_dims=True), c < channels)
    store(dweight_ptr, c, tl.sum(s1, 0, keep_dims=True), c < channels)
    if dv_ptr is not None:
        store(dv_ptr, c, tl.sum(s2, 0, keep_dims=True), c < channels)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PER_CHANNEL)
def _totals(
    parts_ptr, weight_ptr, rstd_ptr, t1_ptr, t2_ptr, dbias_ptr, dweight_ptr, dv_ptr,
    channels, group_size, splits, step, values, length, parts, terms,
    CENTRED: tl.constexpr, AT_ONCE: tl.constexpr, ADDED: tl.constexpr, ADDERS: tl.constexpr,
):  # fmt: skip
    """The terms of a group in each of the first programs, gradients of parameters in the others."""
    program = tl.program_id(0)
    if program < terms:
        groups = channels // group_size
        here = tl.zeros((1, 1), tl.int32)
        rstd = load(rstd_ptr, program + here, here == 0, 0.0)
        t1, t2 = _group_terms(
            parts_ptr, weight_ptr, (program // groups).to(tl.int64), program % groups + here, here == 0, rstd,
            channels, group_size, splits, step, values, length, CENTRED, AT_ONCE,
        )  # fmt: skip
        store(t1_ptr, program + here, t1, here == 0)
        store(t2_ptr, program + here, t2, here == 0)
    else:
        _add_up(program - terms, parts_ptr, dbias_ptr, dweight_ptr, dv_ptr, channels, step, parts, ADDED, ADDERS)


def _adders(channels: int) -> int:
    return triton.cdiv(channels, ADDERS)


def totals_step(formula: Formula, channels: int, groups: int, parts: Parts, values: int, terms: int) -> Step:
    """Plan what stands between sums and gradient: (parts, weight, rstd, t1, t2, dbias, dweight, dv).

    Args:
        formula: It says whether t1 is not None, and dv.
        channels: C.
        groups: G.
        parts: Those of the sums.
        values: Number of values of a group.
        terms: For how many groups t1 and t2 are wanted; 0 if another kernel has done without them.
    """
    size = channels // groups
    numbers = [channels, size, parts.splits, parts.number * channels, values, parts.splits * size, parts.number, terms]
    constants = {"CENTRED": formula.centred, "AT_ONCE": 8 * AT_ONCE, "ADDED": ADDED, "ADDERS": ADDERS}
    return Step(_totals, terms + _adders(channels), numbers, constants)


@triton.jit(do_not_specialize=[*SIZES, "slope"], do_not_specialize_on_alignment=PER_CHANNEL)
def _gradient(
    dy_ptr, x_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr, t1_ptr, t2_ptr, parts_ptr,
    dx_ptr, dz_ptr, dbias_ptr, dweight_ptr, dv_ptr,
    outer, units, channels, group_size, per_sample, channel_tiles, tiles, runs, per_run,
    splits, step, values, length, parts, adders, slope,
    GRADS: tl.constexpr, CENTRED: tl.constexpr, ACT: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, AT_ONCE: tl.constexpr, ADDED: tl.constexpr, ADDERS: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    if program < adders:
        if parts_ptr is not None:
            _add_up(program, parts_ptr, dbias_ptr, dweight_ptr, dv_ptr, channels, step, parts, ADDED, ADDERS)
    else:
        inner = units * VEC
        n, run, channel = _order(program - adders, channel_tiles, runs, CHANNELS_LAST)
        channel *= BI if CHANNELS_LAST else BO
        c = channels_of(channel, CHANNELS_LAST, BO, BI)
        s, found = n * per_sample + c // group_size, c < channels
        mean, rstd = load(mean_ptr, s, found, 0.0), load(rstd_ptr, s, found, 1.0)
        weight, bias, v, u = _parameters(weight_ptr, bias_ptr, v_ptr, u_ptr, c, found)
        if parts_ptr is None:
            t1, t2 = load(t1_ptr, s, found, 0.0), load(t2_ptr, s, found, 0.0)
        else:
            batch = (n * tl.minimum(per_sample, 1)).to(tl.int64)
            t1, t2 = _group_terms(
                parts_ptr, weight_ptr, batch, c // group_size, found, rstd, channels, group_size, splits, step, values,
                length, CENTRED, AT_ONCE,
            )  # fmt: skip
        for unit in range(n * tiles + run * per_run, n * tiles + tl.minimum((run + 1) * per_run, tiles)):
            start, offs, mask = tile(unit, tiles, channel, outer, inner, CHANNELS_LAST, BO, BI)
            dy = load(dy_ptr + start, offs, mask, 0.0)
            x = load(x_ptr + start, offs, mask, 0.0)
            residual = load_at(residual_ptr, start, offs, mask)
            dx, dz, _, _, _, _ = GRADS(dy, x, mean, rstd, weight, bias, v, u, residual, slope, ACT)
            store(dx_ptr + start, offs, dx - (t1 + (x - mean) * t2), mask)
            if dz_ptr is not None:
                store(dz_ptr + start, offs, dz, mask)


def gradient_step(
    formula: Formula, given: Pass, parts: Parts | None, values: int, act: str | None, device: int
) -> Step:
    """Plan dx = local - t1 - (x - mean) * t2.

    It takes (dy, x, residual, mean, rstd, weight, bias, v, u, t1, t2, parts, dx, dz, dbias, dweight, dv); dz, which may
    be None, is the first of the formula's five. With parts it finds t1 and t2 from the sums by itself and writes the
    gradients of parameters; else it reads t1 and t2 (None for 0), and parts and those gradients are None.
    """
    runs = given.runs(device)
    act, slope = as_constant(act)
    sums = [0] * 6
    if parts is not None:
        channels = given.at.channels
        sums = [parts.splits, parts.number * channels, values, parts.splits * given.group_size, parts.number]
        sums.append(_adders(channels))
    programs = given.at.samples * given.tiles.channel_tiles * runs[0] + sums[-1]
    constants = {"GRADS": formula.grads, "CENTRED": formula.centred, "ACT": act, "AT_ONCE": AT_ONCE}
    constants |= {"ADDED": ADDED, "ADDERS": ADDERS, **tile_constants(given.at, given.tiles)}
    return Step(_gradient, programs, [*given.sizes, *runs, *sums, slope], constants)
