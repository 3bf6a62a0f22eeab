"""The passes over memory that all norms are made of, as steps that are planned once per shape.

Forward takes

    partial_statistics   mean and centred sum of squares of runs of tiles; the last program joins those of a group
    apply                y = value(x, ...)

and backward

    channel_sums         per channel, of what the formula's ``grads`` names; the last program finds t1 and t2 of a group
    gradient             dx = local - t1 - (x - mean) * t2, and the gradients of parameters

A group's last program is the one that is last to count itself in a counter ("gate") of its channels: it reads what the
others have stored, in the order in which the parts stand. Channels-last there are many parts of few channels: it joins
those of each channel first, rows of neighbouring channels at a time, and then the channels of groups. Sums are float32
in a fixed order whoever comes last: the same bits on every run. Programs of ``apply`` and ``gradient`` go through x
from its end, which the pass before has left in the cache.
"""

import math
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

__all__ = ["Parts", "Pass", "Statistics", "add_step", "apply_step", "gradient_step", "sums_step"]

# Partial results that the last program of a group reads at a time: groups x parts of one, or channels-last so many
# groups x channels of one, and before that rows of a tile's channels. Each time it waits for the L2 cache; but with
# twice as many the compiler runs out of registers.
AT_ONCE, GROUPS, IN_ROWS = 512, 8, 1024
# Tile in which gradients of parameters are summed up: partial sums x channels.
ADDED, ADDERS = 128, 16
# Position tiles that a program of apply or gradient does at most, for what it loads once; and programs per
# multiprocessor that are enough to leave it at that.
LONGEST_RUN, ENOUGH = 8, 32


class Parts(NamedTuple):
    """How the position tiles of each batch are shared among programs."""

    number: int
    splits: int
    per_split: int
    per_batch: int

    @classmethod
    def of(cls, at: Layout, tiles: Tiling, batches: int, device: int) -> "Parts":
        """Share them so that the device is filled."""
        per_batch = at.samples * tiles.position_tiles // batches
        splits = split(batches * tiles.channel_tiles, per_batch, at.channels_last, device)
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

    @property
    def gathering(self) -> "Gathering":
        return Gathering.of(self.at, self.tiles, self.batches, self.group_size)

    def runs(self, device: int) -> tuple[int, int]:
        """Return in how many runs the position tiles of a sample are done, and how many tiles each has."""
        rows, tiles = self.at.samples * self.tiles.channel_tiles, self.tiles.position_tiles
        enough = ENOUGH * _launch.multiprocessors(device)
        per_run = max(1, min(LONGEST_RUN, rows * tiles // enough))
        return triton.cdiv(tiles, per_run), per_run


# --- the last program of a group


class Gathering(NamedTuple):
    """Which programs wait, as it were, for each other: those of a batch and of ``together`` channel tiles.

    These are the fewest tiles that cover whole groups.
    """

    together: int
    gates: int
    groups: int  # at a time
    at_once: int
    rows: int  # of partial results at a time, channels-last
    totals: int  # numbers, behind the partial results, for what those of channels are joined to

    @classmethod
    def of(cls, at: Layout, tiles: Tiling, batches: int, group_size: int) -> "Gathering":
        width = tiles.block_inner if at.channels_last else tiles.block_outer
        together = min(tiles.channel_tiles, math.lcm(width, group_size) // width)
        groups = GROUPS if at.channels_last else width
        gates = batches * triton.cdiv(tiles.channel_tiles, together)
        rows, totals = (IN_ROWS // width, 2 * batches * at.channels) if at.channels_last else (0, 0)
        return cls(together, gates, groups, min(256, AT_ONCE // groups), rows, totals)

    @property
    def constants(self) -> dict[str, int]:
        return {"GROUPS": self.groups, "AT_ONCE": self.at_once, "ROWS": self.rows}


@triton.jit
def _gathered(
    gate_ptr, batch, channel_tile, channel_tiles, together, splits, channels, group_size, WIDTH: tl.constexpr
):  # fmt: skip
    """Count this program in; return the first group of its gate and the last but one, none unless it is the last.

    What the others stored before is seen after. The gate is left open.
    """
    tl.debug_barrier()
    first = channel_tile // together * together
    programs = splits * tl.minimum(together, channel_tiles - first)
    gate_ptr += batch * ((channel_tiles + together - 1) // together) + channel_tile // together
    before = tl.atomic_add(gate_ptr, 1, sem="acq_rel", scope="gpu")
    is_last = before == programs - 1
    if is_last:
        tl.store(gate_ptr, 0)
    tl.debug_barrier()
    begin = first * WIDTH // group_size
    end = tl.minimum((first + together) * WIDTH, channels) // group_size
    return begin, tl.where(is_last, end, begin)


# --- statistics


@triton.jit
def _counted(unit, tiles, positions, block, CHANNELS_LAST: tl.constexpr):
    """Return how many positions the tiles of a batch before that one have; the last of a sample may be cut short."""
    if CHANNELS_LAST:  # a batch is one sample, or has all as one
        count = tl.minimum(unit * block, positions)
    else:
        count = unit // tiles * positions + tl.minimum(unit % tiles * block, positions)
    return count


@triton.jit(do_not_specialize=[*SIZES, "eps"])
def _partial_statistics(
    x_ptr, parts_ptr, mean_ptr, rstd_ptr, m2_ptr, gate_ptr,
    outer, units, channels, group_size, channel_tiles, tiles, splits, per_split, per_batch, step, together, eps,
    CENTRED: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    GROUPS: tl.constexpr, AT_ONCE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean and centred sum of squares per channel over a run of tiles: sums shifted by the mean of the first tile.

    The shift is a mean over 1 / T of the values, T being the tiles of the run, so however far it is from the whole
    mean, the variance is at least its squared distance / T: what cancels in float32 stays below T ulps.
    """
    inner = units * VEC
    part, channel_tile = tl.program_id(0) // channel_tiles, tl.program_id(0) % channel_tiles
    block: tl.constexpr = BO if CHANNELS_LAST else BI
    width: tl.constexpr = BI if CHANNELS_LAST else BO
    channel = channel_tile * width
    positions = outer if CHANNELS_LAST else inner
    batch = part // splits
    first = batch * per_batch + part % splits * per_split
    last = tl.minimum(first + per_split, (batch + 1) * per_batch)
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
    many = _counted(last - batch * per_batch, tiles, positions, block, CHANNELS_LAST)
    many -= _counted(first - batch * per_batch, tiles, positions, block, CHANNELS_LAST)
    many = many.to(tl.float32)
    c = channels_of(channel, CHANNELS_LAST, BO, BI)
    at = part.to(tl.int64) * channels + c
    store(parts_ptr, at, shift + s1 / many, c < channels)
    store(parts_ptr + step, at, tl.maximum(s2 - s1 * s1 / many, 0.0, propagate_nan=tl.PropagateNan.ALL), c < channels)
    begin, end = _gathered(gate_ptr, batch, channel_tile, channel_tiles, together, splits, channels, group_size, width)
    row = batch.to(tl.int64) * splits
    if CHANNELS_LAST:
        totals_ptr, apart, row_of_totals = parts_ptr + 2 * step, step // splits, batch.to(tl.int64)
        for one in range(begin * group_size, end * group_size, BI):
            of = one + tl.arange(0, BI)[:, None]
            valid = of < end * group_size
            mean, m2, _ = _joined(
                parts_ptr, step, row, of, valid, channels, 1, splits, per_split, per_batch, tiles, positions, block,
                True, ROWS,
            )  # fmt: skip
            store(totals_ptr, row_of_totals * channels + of, mean, valid)
            store(totals_ptr + apart, row_of_totals * channels + of, m2, valid)
        tl.debug_barrier()  # what a thread reads below others have stored
        parts_ptr, step, row, splits, per_split = totals_ptr, apart, row_of_totals, 1, per_batch
    for one in range(begin, end, GROUPS):
        group = one + tl.arange(0, GROUPS)[:, None]
        mean, m2, count_of_group = _joined(
            parts_ptr, step, row, group, group < end, channels, group_size, splits, per_split, per_batch, tiles,
            positions, block, CHANNELS_LAST, AT_ONCE,
        )  # fmt: skip
        s = batch * (channels // group_size) + group
        store(mean_ptr, s, mean, group < end)
        store(m2_ptr, s, m2, group < end)
        if rstd_ptr is not None:
            store(rstd_ptr, s, _reciprocal_root(mean, m2, count_of_group, eps, CENTRED), group < end)


@triton.jit
def _part(j, rows, size, per_split, per_batch, tiles, positions, block, CHANNELS_LAST: tl.constexpr):
    """Return where the j-th partial result of a group stands, and for how many values of a channel."""
    part = j // size
    n = _counted(tl.minimum((part + 1) * per_split, per_batch), tiles, positions, block, CHANNELS_LAST)
    n -= _counted(part * per_split, tiles, positions, block, CHANNELS_LAST)
    return part * rows + j % size, n.to(tl.float32)


@triton.jit
def _joined(
    parts_ptr, step, row, group, mask, rows, size, splits, per_split, per_batch, tiles, positions, block,
    CHANNELS_LAST: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Join the partial statistics of groups (R, 1) by Chan's formula: mean, sum of squares and count.

    Each has ``splits`` times ``size`` of them, in as many rows from ``row`` on, of ``rows`` columns each.
    """
    base = parts_ptr + row * rows + group * size
    shift = tl.load(base, mask=mask, other=0.0, cache_modifier=".cg")
    total = tl.zeros((group.shape[0], AT_ONCE), tl.float32)
    many = (_counted(per_batch, tiles, positions, block, CHANNELS_LAST) * size).to(tl.float32)
    length = splits * size
    for start in range(0, length, AT_ONCE):
        j = start + tl.arange(0, AT_ONCE)[None, :]
        at, n = _part(j, rows, size, per_split, per_batch, tiles, positions, block, CHANNELS_LAST)
        found = mask & (j < length)
        mean = tl.load(base + at, mask=found, other=0.0, cache_modifier=".cg")
        total += tl.where(found, n * (mean - shift), 0.0)
    whole = tl.sum(total, 1, keep_dims=True) / many
    m2 = tl.zeros((group.shape[0], AT_ONCE), tl.float32)
    for start in range(0, length, AT_ONCE):
        j = start + tl.arange(0, AT_ONCE)[None, :]
        at, n = _part(j, rows, size, per_split, per_batch, tiles, positions, block, CHANNELS_LAST)
        found = mask & (j < length)
        mean = tl.load(base + at, mask=found, other=0.0, cache_modifier=".cg")
        inside = tl.load(base + step + at, mask=found, other=0.0, cache_modifier=".cg")
        d = mean - shift - whole
        m2 += tl.where(found, inside + n * d * d, 0.0)
    return shift + whole, tl.sum(m2, 1, keep_dims=True), many


@triton.jit
def _reciprocal_root(mean, m2, many, eps, CENTRED: tl.constexpr):
    """Return one over the root of the variance, or of the mean square, and eps."""
    square = m2 / many + eps
    if not CENTRED:
        square += mean * mean
    return tl.div_rn(1.0, tl.sqrt_rn(square))


class Statistics(NamedTuple):
    """How the statistics of groups are found: by sums over ``parts``, which stand in ``workspace`` numbers.

    In contiguous memory a group is one row, channels-last partial results are per channel.
    """

    at: Layout
    tiles: Tiling
    parts: Parts
    group_size: int  # columns of partial results that are one group
    gathering: Gathering

    @classmethod
    def of(cls, shape: torch.Size, channels_last: bool, groups: int, per_sample: bool, device: int) -> "Statistics":
        size = shape[1] // groups
        if channels_last:
            at, group_size = Layout.of(shape, True, merge=not per_sample), size
        else:
            at, group_size = Layout.rows(shape[0], groups, size * shape[2:].numel()), 1
        tiles, batches = tiling(at), at.samples if per_sample else 1
        parts = Parts.of(at, tiles, batches, device)
        return cls(at, tiles, parts, group_size, Gathering.of(at, tiles, batches, group_size))

    @property
    def workspace(self) -> int:
        return 2 * self.parts.number * self.at.channels + self.gathering.totals

    def step(self, eps: float, centred: bool = True) -> Step:
        """Plan them: (x, parts, mean, rstd, m2, gates), of which the results may be None."""
        at, tiles, parts = self.at, self.tiles, self.parts
        numbers = [at.outer, at.units, at.channels, self.group_size, tiles.channel_tiles, tiles.position_tiles]
        numbers += [*parts[1:], parts.number * at.channels, self.gathering.together, eps]
        constants = {"CENTRED": centred, **tile_constants(at, tiles), **self.gathering.constants}
        return Step(_partial_statistics, parts.number * tiles.channel_tiles, numbers, constants)


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


@triton.jit(do_not_specialize=[*SIZES, "slope"], do_not_specialize_on_alignment=PER_CHANNEL)
def _apply(
    x_ptr, y_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr,
    outer, units, channels, group_size, per_sample, channel_tiles, tiles, runs, per_run, slope,
    VALUE: tl.constexpr, ACT: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    inner = units * VEC
    n, run, channel = _order(tl.num_programs(0) - 1 - tl.program_id(0), channel_tiles, runs, CHANNELS_LAST)
    channel *= BI if CHANNELS_LAST else BO
    c = channels_of(channel, CHANNELS_LAST, BO, BI)
    s, found = n * per_sample + c // group_size, c < channels
    mean, rstd = load(mean_ptr, s, found, 0.0), load(rstd_ptr, s, found, 1.0)
    weight, bias, v, u = _parameters(weight_ptr, bias_ptr, v_ptr, u_ptr, c, found)
    for unit in range(n * tiles + run * per_run, n * tiles + tl.minimum((run + 1) * per_run, tiles)):
        start, offs, mask = tile(unit, tiles, channel, outer, inner, CHANNELS_LAST, BO, BI)
        x = load(x_ptr + start, offs, mask, 0.0)
        residual = load_at(residual_ptr, start, offs, mask)
        y = VALUE(x, mean, rstd, weight, bias, v, u, residual, slope, ACT)
        store(y_ptr + start, offs, y, mask)


def apply_step(formula: Formula, given: Pass, act: str | None, device: int) -> Step:
    """Plan y = act(value(x)): (x, y, residual, mean, rstd, weight, bias, v, u)."""
    runs = given.runs(device)
    act, slope = as_constant(act)
    programs = given.at.samples * given.tiles.channel_tiles * runs[0]
    constants = {"VALUE": formula.value, "ACT": act, **tile_constants(given.at, given.tiles)}
    return Step(_apply, programs, [*given.sizes, *runs, slope], constants)


# --- backward


@triton.jit(do_not_specialize=[*SIZES, "slope"], do_not_specialize_on_alignment=PER_CHANNEL)
def _channel_sums(
    dy_ptr, x_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr, parts_ptr, t1_ptr, t2_ptr,
    gate_ptr,
    outer, units, channels, group_size, per_sample, channel_tiles, tiles, splits, per_split, per_batch, step, together,
    values, slope,
    GRADS: tl.constexpr, SUMS: tl.constexpr, CENTRED: tl.constexpr, ACT: tl.constexpr, VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, GROUPS: tl.constexpr, AT_ONCE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Sums per channel over a run of tiles, which lies in one sample if statistics belong to samples."""
    inner = units * VEC
    part, channel_tile = tl.program_id(0) // channel_tiles, tl.program_id(0) % channel_tiles
    width: tl.constexpr = BI if CHANNELS_LAST else BO
    channel = channel_tile * width
    batch = part // splits
    first = batch * per_batch + part % splits * per_split
    last = tl.minimum(first + per_split, (batch + 1) * per_batch)
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
    if t2_ptr is not None:
        begin, end = _gathered(
            gate_ptr, batch, channel_tile, channel_tiles, together, splits, channels, group_size, width
        )
        row = batch.to(tl.int64) * splits
        if CHANNELS_LAST:
            totals_ptr, apart, row_of_totals = parts_ptr + SUMS * step, step // splits, batch.to(tl.int64)
            for one in range(begin * group_size, end * group_size, BI):
                of = one + tl.arange(0, BI)[:, None]
                valid = of < end * group_size
                a, b = _added(parts_ptr, None, step, row, of, valid, channels, 1, splits, CENTRED, ROWS)
                store(totals_ptr, row_of_totals * channels + of, a, valid)
                store(totals_ptr + apart, row_of_totals * channels + of, b, valid)
            tl.debug_barrier()  # what a thread reads below others have stored
            parts_ptr, step, row, splits = totals_ptr, apart, row_of_totals, 1
        for one in range(begin, end, GROUPS):
            group = one + tl.arange(0, GROUPS)[:, None]
            of = batch * per_sample + group
            scale = load(rstd_ptr, of, group < end, 0.0)
            a, b = _added(
                parts_ptr, weight_ptr, step, row, group, group < end, channels, group_size, splits, CENTRED, AT_ONCE
            )
            # t1 = rstd * mean(w * s0), if the norm is centred, and t2 = rstd² * mean(w * s1)
            store(t1_ptr, of, scale * (a / values), group < end)
            store(t2_ptr, of, scale * scale * (b / values), group < end)


def sums_step(formula: Formula, given: Pass, parts: Parts, act: str | None) -> Step:
    """Plan the sums: (dy, x, residual, mean, rstd, weight, bias, v, u, parts, t1, t2, gates).

    Parts are (formula.sums, number, C). The last three are None where t1 and t2 are not wanted.
    """
    act, slope = as_constant(act)
    at = given.at
    values = given.group_size * at.positions * at.samples // given.batches
    numbers = [*given.sizes, *parts[1:], parts.number * at.channels, given.gathering.together, values, slope]
    constants = {"GRADS": formula.grads, "SUMS": formula.sums, "CENTRED": formula.centred, "ACT": act}
    constants |= {**tile_constants(at, given.tiles), **given.gathering.constants}
    return Step(_channel_sums, parts.number * given.tiles.channel_tiles, numbers, constants)


@triton.jit
def _added(
    parts_ptr, weight_ptr, step, row, group, mask, rows, size, splits, CENTRED: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Add up w * s0 (0 unless the norm is centred) and w * s1 of the parts of groups (R, 1), as ``_joined`` does."""
    base = parts_ptr + row * rows + group * size
    a = tl.zeros((group.shape[0], AT_ONCE), tl.float32)
    b = tl.zeros((group.shape[0], AT_ONCE), tl.float32)
    length = splits * size
    for start in range(0, length, AT_ONCE):
        j = start + tl.arange(0, AT_ONCE)[None, :]
        found = mask & (j < length)
        at = j // size * rows + j % size
        s1 = tl.load(base + step + at, mask=found, other=0.0, cache_modifier=".cg")
        s0 = tl.load(base + at, mask=found, other=0.0, cache_modifier=".cg") if CENTRED else tl.zeros_like(s1)
        w = load(weight_ptr, group * size + j % size, found, 1.0)
        a += tl.where(found, w * s0, 0.0)
        b += tl.where(found, w * s1, 0.0)
    return tl.sum(a, 1, keep_dims=True), tl.sum(b, 1, keep_dims=True)


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


@triton.jit(do_not_specialize=SIZES)
def _add(parts_ptr, dbias_ptr, dweight_ptr, dv_ptr, channels, step, parts, ADDED: tl.constexpr, ADDERS: tl.constexpr):
    _add_up(tl.program_id(0), parts_ptr, dbias_ptr, dweight_ptr, dv_ptr, channels, step, parts, ADDED, ADDERS)


def _adders(channels: int) -> int:
    return triton.cdiv(channels, ADDERS)


def add_step(channels: int, parts: int) -> Step:
    """Plan the gradients of parameters from so many partial sums: (parts, dbias, dweight, dv)."""
    numbers = [channels, parts * channels, parts]
    return Step(_add, _adders(channels), numbers, {"ADDED": 2 * ADDED, "ADDERS": ADDERS}, warps=8)


@triton.jit(do_not_specialize=[*SIZES, "slope"], do_not_specialize_on_alignment=PER_CHANNEL)
def _gradient(
    dy_ptr, x_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, u_ptr, t1_ptr, t2_ptr, parts_ptr,
    dx_ptr, dz_ptr, dbias_ptr, dweight_ptr, dv_ptr,
    outer, units, channels, group_size, per_sample, channel_tiles, tiles, runs, per_run, step, parts, adders, slope,
    GRADS: tl.constexpr, ACT: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, ADDED: tl.constexpr, ADDERS: tl.constexpr,
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
        t1, t2 = load(t1_ptr, s, found, 0.0), load(t2_ptr, s, found, 0.0)
        for unit in range(n * tiles + run * per_run, n * tiles + tl.minimum((run + 1) * per_run, tiles)):
            start, offs, mask = tile(unit, tiles, channel, outer, inner, CHANNELS_LAST, BO, BI)
            dy = load(dy_ptr + start, offs, mask, 0.0)
            x = load(x_ptr + start, offs, mask, 0.0)
            residual = load_at(residual_ptr, start, offs, mask)
            dx, dz, _, _, _, _ = GRADS(dy, x, mean, rstd, weight, bias, v, u, residual, slope, ACT)
            store(dx_ptr + start, offs, dx - (t1 + (x - mean) * t2), mask)
            if dz_ptr is not None:
                store(dz_ptr + start, offs, dz, mask)


def gradient_step(formula: Formula, given: Pass, act: str | None, device: int, parts: int = 0) -> Step:
    """Plan dx = local - t1 - (x - mean) * t2.

    It takes (dy, x, residual, mean, rstd, weight, bias, v, u, t1, t2, parts, dx, dz, dbias, dweight, dv); t1 and t2 may
    be None for 0, and dz, which is the first of the formula's five. It also adds up as many partial sums as ``parts``
    says to the gradients of parameters, which are None for 0.
    """
    runs = given.runs(device)
    act, slope = as_constant(act)
    channels = given.at.channels
    adders = _adders(channels) if parts else 0
    programs = given.at.samples * given.tiles.channel_tiles * runs[0] + adders
    constants = {"GRADS": formula.grads, "ACT": act, "ADDED": ADDED, "ADDERS": ADDERS}
    constants |= tile_constants(given.at, given.tiles)
    numbers = [*given.sizes, *runs, parts * channels, parts, adders, slope]
    return Step(_gradient, programs, numbers, constants)
