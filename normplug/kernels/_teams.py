"""A group that does not fit into one program, normalized in one pass by a team of programs.

Each program of a team holds a piece of the group in registers; they exchange sums through global memory and a barrier.
A team does one group after the other, and all teams are resident at once: a cooperative launch is that, or is refused.

In Triton's interpreter programs run one after the other, and the first would wait for ever: there a step is a launch
for each side of the barrier, and the second side loads its piece again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from normplug.kernels import _launch
from normplug.kernels._activations import as_constant
from normplug.kernels._launch import COOPERATIVE, Layout, Step, gates
from normplug.kernels._passes import _reciprocal_root
from normplug.kernels._tiles import PER_CHANNEL, SIZES, Formula, load, load_at, over_all, over_positions, store

__all__ = ["Team", "TeamStep", "backward_step", "forward_step"]

# Sides of the barrier that a launch does: COOPERATIVE is both.
BEFORE, AFTER = 1, 2
# Exchanged sums that a program reads at a time.
AT_ONCE = 128
# The fewest positions of a piece: less would be rows of a few values, or programs that do little between barriers.
FEWEST = 16


@triton.jit
def _meet(gate_ptr, rank, members):
    """Wait for all members of the team; what they stored before is seen after.

    Each adds 1, but the first member what makes the sum of all the sign bit: it changes when the last has come, and
    the bits below are 0 again. It cannot change twice while one still waits, who is missing at the next barrier.
    """
    tl.debug_barrier()
    share = tl.where(rank == 0, 2147483647 - (members - 2), 1)
    before = tl.atomic_add(gate_ptr, share, sem="release", scope="gpu")
    now = before
    while (before ^ now) >= 0:
        now = tl.atomic_add(gate_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _piece(
    group, rank, outer, inner, group_size, CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Return where a piece starts, its offsets, which exist, its sample and channels, which exist, and its values."""
    groups = inner // group_size if CHANNELS_LAST else outer // group_size
    n, channel = (group // groups).to(tl.int64), group % groups * group_size
    o, i = tl.arange(0, BO)[:, None], tl.arange(0, BI)[None, :]
    if CHANNELS_LAST:
        row = rank * BO
        start = (n * outer + row) * inner + channel
        mask = (row + o < outer) & (i < group_size)
        c, valid = channel + i, i < group_size
    else:
        column = rank * BI
        start = (n * outer + channel) * inner + column
        mask = (o < group_size) & (column + i < inner)
        c, valid = channel + o, o < group_size
    return start, o * inner + i, mask, n, c, valid


@triton.jit
def _values(rank, positions, block, group_size):
    return (tl.minimum(positions - rank * block, block) * group_size).to(tl.float32)


@triton.jit
def _exchanged(base, j, members):
    """Load both sums of some members, past the first cache, which other programs' stores do not reach."""
    found = j < members
    first = tl.load(base + 2 * j, mask=found, other=0.0, cache_modifier=".cg")
    return first, tl.load(base + 2 * j + 1, mask=found, other=0.0, cache_modifier=".cg")


@triton.jit(do_not_specialize=[*SIZES, "eps", "slope"], do_not_specialize_on_alignment=PER_CHANNEL)
def _team_forward(
    x_ptr, y_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, parts_ptr, gate_ptr,
    outer, units, group_units, samples, members, teams, values, eps, slope,
    VALUE: tl.constexpr, ACT: tl.constexpr, HAS_MEAN: tl.constexpr, VEC: tl.constexpr, GROUP_VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, AT_ONCE: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    inner, group_size = units * VEC, group_units * GROUP_VEC
    positions = outer if CHANNELS_LAST else inner
    block: tl.constexpr = BO if CHANNELS_LAST else BI
    team, rank = tl.program_id(0) // members, tl.program_id(0) % members
    all_groups = samples * ((inner if CHANNELS_LAST else outer) // group_size)
    for group in range(team, all_groups, teams):
        start, offs, mask, _, c, valid = _piece(group, rank, outer, inner, group_size, CHANNELS_LAST, BO, BI)
        x = load(x_ptr + start, offs, mask, 0.0)
        base = parts_ptr + (group * members).to(tl.int64) * 2
        if PHASE != 2:
            many = _values(rank, positions, block, group_size)
            mean = over_all(x) / many
            d = tl.where(mask, x - mean, 0.0)
            # What rounding left over: with mean 1000 it is as large as the last digits of x.
            mean += over_all(d) / many
            d = tl.where(mask, x - mean, 0.0)
            tl.store(base + 2 * rank, mean)
            tl.store(base + 2 * rank + 1, over_all(d * d))
        if PHASE == 0:
            _meet(gate_ptr + team, rank, members)
        if PHASE != 1:
            shift = tl.load(base, cache_modifier=".cg")
            total = tl.zeros((AT_ONCE,), tl.float32)
            for first in range(0, members, AT_ONCE):
                j = first + tl.arange(0, AT_ONCE)
                means, m2 = _exchanged(base, j, members)
                total += tl.where(j < members, _values(j, positions, block, group_size) * (means - shift), 0.0)
            mean = tl.sum(total, 0) / values
            squares = tl.zeros((AT_ONCE,), tl.float32)
            for first in range(0, members, AT_ONCE):
                j = first + tl.arange(0, AT_ONCE)
                means, m2 = _exchanged(base, j, members)
                apart = means - shift - mean
                squares += tl.where(j < members, m2 + _values(j, positions, block, group_size) * apart * apart, 0.0)
            mean += shift
            rstd = _reciprocal_root(mean, tl.sum(squares, 0), values, eps, HAS_MEAN)
            if not HAS_MEAN:
                mean = 0.0
            if rank == 0:
                if mean_ptr is not None:
                    tl.store(mean_ptr + group, mean)
                tl.store(rstd_ptr + group, rstd)
            y = VALUE(
                x,
                mean,
                rstd,
                load(weight_ptr, c, valid, 1.0),
                load(bias_ptr, c, valid, 0.0),
                load(v_ptr, c, valid, 0.0),
                0.0,
                load_at(residual_ptr, start, offs, mask),
                slope,
                ACT,
            )
            store(y_ptr + start, offs, y, mask)


@triton.jit(do_not_specialize=[*SIZES, "slope"], do_not_specialize_on_alignment=PER_CHANNEL)
def _team_backward(
    dy_ptr, x_ptr, residual_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, v_ptr, parts_ptr, dx_ptr, dz_ptr, gate_ptr,
    outer, units, group_units, samples, members, teams, values, step, slope,
    GRADS: tl.constexpr, SUMS: tl.constexpr, ACT: tl.constexpr, CENTRED: tl.constexpr, VEC: tl.constexpr,
    GROUP_VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, AT_ONCE: tl.constexpr,
    PHASE: tl.constexpr,
):  # fmt: skip
    inner, group_size = units * VEC, group_units * GROUP_VEC
    channels = inner if CHANNELS_LAST else outer
    team, rank = tl.program_id(0) // members, tl.program_id(0) % members
    for group in range(team, samples * (channels // group_size), teams):
        start, offs, mask, n, c, valid = _piece(group, rank, outer, inner, group_size, CHANNELS_LAST, BO, BI)
        dy = load(dy_ptr + start, offs, mask, 0.0)
        x = load(x_ptr + start, offs, mask, 0.0)
        residual = load_at(residual_ptr, start, offs, mask)
        mean = 0.0 if mean_ptr is None else tl.load(mean_ptr + group)
        rstd = tl.load(rstd_ptr + group)
        weight = load(weight_ptr, c, valid, 1.0)
        bias, v = load(bias_ptr, c, valid, 0.0), load(v_ptr, c, valid, 0.0)
        dx, e0, e1, e2, _, _ = GRADS(dy, x, mean, rstd, weight, bias, v, 0.0, residual, slope, ACT)
        base = parts_ptr + SUMS * step + (group * members).to(tl.int64) * 2
        if PHASE != 2:
            if dz_ptr is not None:
                store(dz_ptr + start, offs, e0, mask)
            at = (n * members + rank) * channels + c
            s0, s1 = over_positions(e0, CHANNELS_LAST), over_positions(e1, CHANNELS_LAST)
            store(parts_ptr, at, s0, valid)
            store(parts_ptr + step, at, s1, valid)
            if SUMS > 2:
                store(parts_ptr + 2 * step, at, over_positions(e2, CHANNELS_LAST), valid)
            tl.store(base + 2 * rank, over_all(weight * s0))
            tl.store(base + 2 * rank + 1, over_all(weight * s1))
        if PHASE == 0:
            _meet(gate_ptr + team, rank, members)
        if PHASE != 1:
            a = tl.zeros((AT_ONCE,), tl.float32)
            b = tl.zeros((AT_ONCE,), tl.float32)
            for first in range(0, members, AT_ONCE):
                more_a, more_b = _exchanged(base, first + tl.arange(0, AT_ONCE), members)
                a += more_a
                b += more_b
            if CENTRED:
                dx -= rstd * (tl.sum(a, 0) / values)
            dx -= (x - mean) * (rstd * rstd * (tl.sum(b, 0) / values))
            store(dx_ptr + start, offs, dx, mask)


class Team(NamedTuple):
    """How the groups of a shape are shared: by teams of so many members, each with a piece of ``block`` values."""

    at: Layout
    block: tuple[int, int]
    group_size: int
    members: int
    teams: int

    @classmethod
    def of(cls, at: Layout, group_size: int, itemsize: int, tensors: int, device: int) -> "Team | None":
        """Share them, or return None: not allowed, pieces too narrow, or more members than programs are resident."""
        if not _launch.ONE_PASS or (at.channels_last and group_size * itemsize < 16 and at.channels > group_size):
            return None
        channels = triton.next_power_of_2(group_size)
        positions = _launch.PIECE // tensors // channels
        if positions < FEWEST:
            return None
        members = triton.cdiv(at.positions, positions)
        together = _launch.resident(device) // members
        if members < 2 or together < 1:
            return None
        block = (positions, channels) if at.channels_last else (channels, positions)
        return cls(at, block, group_size, members, min(together, at.samples * (at.channels // group_size)))

    @property
    def values(self) -> int:
        """Values of a group."""
        return self.group_size * self.at.positions

    @property
    def exchanged(self) -> int:
        """Numbers that all members exchange."""
        return 2 * self.at.samples * (self.at.channels // self.group_size) * self.members

    def sizes(self, group_vec: int) -> list[int]:
        at = self.at
        return [at.outer, at.units, self.group_size // group_vec, at.samples, self.members, self.teams, self.values]


class TeamStep:
    """A kernel of teams, to be called as ``Step``: with the counters of its barriers after the tensors."""

    __slots__ = ("_steps", "_teams")

    def __init__(self, kernel: Any, team: Team, numbers: Sequence[float], constants: dict[str, Any]) -> None:
        at, self._teams = team.at, team.teams
        group_vec = at.vec if at.channels_last else 1
        numbers = [*team.sizes(group_vec), *numbers]
        constants = constants | {
            "VEC": at.vec, "GROUP_VEC": group_vec, "CHANNELS_LAST": at.channels_last,
            "BO": team.block[0], "BI": team.block[1], "AT_ONCE": AT_ONCE,
        }  # fmt: skip
        phases = (COOPERATIVE,) if hasattr(kernel, "params") else (BEFORE, AFTER)  # the interpreter's have none
        self._steps = [
            Step(kernel, team.teams * team.members, numbers, constants | {"PHASE": phase}, _launch.TEAM_WARPS)
            for phase in phases
        ]

    def __call__(self, stream: int, x: Tensor, *tensors: Tensor | None) -> None:
        counters = gates(x, stream, self._teams)
        for step in self._steps:
            step(stream, x, *tensors, counters)


def forward_step(formula: Formula, team: Team, eps: float, act: str | None) -> TeamStep:
    """Plan forward: (x, y, residual, mean, rstd, weight, bias, v, exchanged)."""
    act, slope = as_constant(act)
    constants = {"VALUE": formula.value, "ACT": act, "HAS_MEAN": formula.has_mean}
    return TeamStep(_team_forward, team, [eps, slope], constants)


def backward_step(formula: Formula, team: Team, act: str | None) -> TeamStep:
    """Plan backward: (dy, x, residual, mean, rstd, weight, bias, v, parts, dx, dz).

    Parts are (formula.sums, N * members, C), and then what is exchanged.
    """
    act, slope = as_constant(act)
    constants = {"GRADS": formula.grads, "SUMS": formula.sums, "ACT": act, "CENTRED": formula.centred}
    step = team.at.samples * team.members * team.at.channels
    return TeamStep(_team_backward, team, [step, slope], constants)
