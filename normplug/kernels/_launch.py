"""Where a tensor's values lie, how they are cut into tiles, and the one place that starts kernels."""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

__all__ = ["Layout", "Tiling", "fits_on_chip", "like", "run", "split", "tiling"]

# Values per tile and program: with 4 warps 16 a thread, two 128-bit loads of a half type or four of float32.
TILE = 2048
# The shortest row of a tile: shorter ones leave lanes of a warp idle.
SHORTEST = 32
# Programs per multiprocessor that keep enough loads in flight to saturate the memory of an H200 (see docs/kernels.md).
PROGRAMS_PER_SM = 8
# Values that one program of 16 warps holds in registers without spilling.
ON_CHIP = 16384


class Layout(NamedTuple):
    """A dense (N, C, *) as N matrices (outer, inner): (C, P) if contiguous, (P, C) if channels-last.

    ``units`` is inner divided by ``vec``, the largest power of two up to 16 that divides it (and ``channels``, the
    block of neighbouring channels that must not be split, where channels are innermost). A kernel multiplies the two
    again: that is how the compiler learns that rows start at multiples of vec and may be loaded in vectors.
    """

    samples: int
    outer: int
    units: int
    vec: int
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor, channels: int = 16, merge: bool = False) -> "Layout":
        """Read off a contiguous or channels-last x; with merge all samples are one where that is no copy."""
        n, c, p = x.shape[0], x.shape[1], x.shape[2:].numel()
        channels_last = not x.is_contiguous()
        if merge and channels_last:
            n, p = 1, n * p
        outer, inner = (p, c) if channels_last else (c, p)
        vec = math.gcd(inner, 16, channels if channels_last else 16)
        return cls(n, outer, inner // vec, vec, channels_last)

    @property
    def inner(self) -> int:
        return self.units * self.vec

    @property
    def channels(self) -> int:
        return self.inner if self.channels_last else self.outer

    @property
    def positions(self) -> int:
        return self.outer if self.channels_last else self.inner


class Tiling(NamedTuple):
    """Size of a tile, and how many of them cover channels and positions of a sample."""

    block_outer: int
    block_inner: int
    channel_tiles: int
    position_tiles: int


def tiling(at: Layout, sums: int = 0) -> Tiling:
    """Choose the tile: rows as long as possible, unless a shorter one leaves fewer lanes without a value.

    A program that keeps more than three running sums of every lane takes half as many.
    """
    size = TILE if sums <= 3 else TILE // 2
    longest = max(SHORTEST, min(size, triton.next_power_of_2(at.inner)))
    if at.channels_last:
        longest = min(longest, 256)  # several positions per tile: what is loaded per channel serves all of them
    sizes = [longest >> i for i in range(longest.bit_length()) if longest >> i >= SHORTEST]
    covered = {size: triton.cdiv(at.inner, size) * size for size in sizes}
    least = min(covered.values())
    block_inner = next(size for size in sizes if covered[size] <= 1.15 * least)
    block_outer = max(1, min(size // block_inner, triton.next_power_of_2(at.outer)))
    outer, inner = triton.cdiv(at.outer, block_outer), triton.cdiv(at.inner, block_inner)
    return Tiling(block_outer, block_inner, *((inner, outer) if at.channels_last else (outer, inner)))


def split(programs: int, tiles: int, device: torch.device) -> int:
    """Return into how many programs to cut a sum over tiles, so that ``programs`` such sums fill the device."""
    wanted = triton.cdiv(PROGRAMS_PER_SM * _multiprocessors(device), max(programs, 1))
    return max(1, min(wanted, tiles))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # the interpreter takes its time whatever the number; this is what an H200 has
    return torch.cuda.get_device_properties(device).multi_processor_count


def fits_on_chip(at: Layout, group_size: int, itemsize: int, tensors: int) -> tuple[int, int] | None:
    """Return the tile (outer, inner) that holds a group of so many tensors in one program, or None if none does.

    Channels-last groups of less than 16 bytes per position would load far more than they use.
    """
    if at.channels_last and group_size * itemsize < 16 and at.channels > group_size:
        return None
    rows, columns = (at.positions, group_size) if at.channels_last else (group_size, at.positions)
    block = triton.next_power_of_2(rows), triton.next_power_of_2(columns)
    return block if block[0] * block[1] * tensors <= ON_CHIP else None


def like(dy: Tensor, x: Tensor) -> Tensor:
    """Return dy laid out as x: a copy if it is not (a loss of another layout, or one value expanded)."""
    return dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)


def run(kernel, programs: int, *args, warps: int = 4, **constants) -> None:
    """Start a kernel; every launch of the package goes through here."""
    if programs:
        args = tuple(_with_neighbours(value) for value in args)
        kernel[(programs,)](*args, **constants, num_warps=warps)


def _with_neighbours(value: Any) -> Any:
    """Return a parameter or statistic (C,) with one value behind the other, as kernels read it; other arguments as is."""
    is_strided = isinstance(value, Tensor) and value.ndim == 1 and not value.is_contiguous()
    return value.contiguous() if is_strided else value
