"""Where a tensor's values lie, how they are cut into tiles, and the one place that starts kernels."""

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

__all__ = [
    "Layout", "Step", "Tiling", "dtypes_of", "fits_on_chip", "forget_plans", "gates", "like", "multiprocessors",
    "planned", "run", "split", "stream_of", "tiling", "vector",
]  # fmt: skip

Plan = TypeVar("Plan")

# Values per tile and program: with 4 warps 16 a thread, two 128-bit loads of a half type or four of float32.
TILE = 2048
# The shortest row of a tile: shorter ones leave lanes of a warp idle. And the longest one of channels: sums over wider
# tiles of fewer rows spend their time in shared memory, in each program's exchange between its warps.
SHORTEST, WIDEST = 32, 64
# Programs per multiprocessor among which the sums of a first pass are shared: with more of them there is more to join,
# above all channels-last, where each has all channels of a tile.
PROGRAMS_PER_SM, PROGRAMS_PER_SM_CHANNELS_LAST = 6, 4
# Values that one program of 16 warps holds in registers without spilling. And the bytes that neighbouring groups of a
# position should have in it, channels-last: a sector of the L2 cache.
ON_CHIP, ROW_BYTES = 16384, 32


class Layout(NamedTuple):
    """A dense (N, C, *) as N matrices (outer, inner): (C, P) if contiguous, (P, C) if channels-last.

    ``units`` is inner divided by ``vec``: 8, 4 or 1, the largest that divides it (and ``channels``, the block of
    neighbouring channels that must not be split, where channels are innermost). A kernel multiplies the two again:
    that is how the compiler learns that rows start at multiples of vec and may be loaded in vectors. Where positions
    are innermost, whose number changes from batch to batch, it is 4 or 1: a finer choice makes more kernels to compile,
    and loads of 64 bits keep as many bytes under way as those of 128.
    """

    samples: int
    outer: int
    units: int
    vec: int
    channels_last: bool

    @classmethod
    def of(cls, shape: torch.Size, channels_last: bool, channels: int = 16, merge: bool = False) -> "Layout":
        """Return the layout of a tensor of that shape."""
        n, c, p = shape[0], shape[1], shape[2:].numel()
        if merge and channels_last:
            n, p = 1, n * p
        outer, inner = (p, c) if channels_last else (c, p)
        return cls.rows(n, outer, inner, channels_last, channels)

    @classmethod
    def rows(cls, samples: int, outer: int, inner: int, channels_last: bool = False, channels: int = 16) -> "Layout":
        """Return the layout of matrices of these sizes."""
        common = math.gcd(inner, channels, 8) if channels_last else math.gcd(inner, 4)
        vec = common if common >= 4 else 1
        return cls(samples, outer, inner // vec, vec, channels_last)

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

    Where positions are innermost their number changes from batch to batch, and every shape of a tile is one more kernel
    to compile: there are two, of one row and of 16. A program that keeps more than three running sums of every lane, or
    an address of every value, takes tiles of half the size.
    """
    size = TILE if sums <= 3 and at.vec > 1 else TILE // 2
    if at.channels_last:  # several positions per tile: what is loaded per channel serves all of them
        longest = max(SHORTEST, min(size, WIDEST, triton.next_power_of_2(at.inner)))
        sizes = [longest >> i for i in range(longest.bit_length()) if longest >> i >= SHORTEST]
    else:
        sizes = [size >> i for i in (0, 4) if size >> i >= SHORTEST] or [size]
    covered = {size: triton.cdiv(at.inner, size) * size for size in sizes}
    least = min(covered.values())
    block_inner = next(size for size in sizes if covered[size] <= 1.15 * least)
    block_outer = max(1, size // block_inner)
    outer, inner = triton.cdiv(at.outer, block_outer), triton.cdiv(at.inner, block_inner)
    return Tiling(block_outer, block_inner, *((inner, outer) if at.channels_last else (outer, inner)))


def split(programs: int, tiles: int, channels_last: bool, device: int) -> int:
    """Return into how many programs, at most, to cut a sum over tiles: ``programs`` such sums shall fill the device."""
    per_multiprocessor = PROGRAMS_PER_SM_CHANNELS_LAST if channels_last else PROGRAMS_PER_SM
    wanted = triton.cdiv(per_multiprocessor * multiprocessors(device), max(programs, 1))
    return max(1, min(wanted, tiles))


@functools.cache
def multiprocessors(device: int) -> int:
    """Return how many multiprocessors the GPU of that index has."""
    if device < 0:
        return 132  # the interpreter takes its time whatever the number; this is what an H200 has
    return torch.cuda.get_device_properties(device).multi_processor_count


def fits_on_chip(at: Layout, group_size: int, itemsize: int, tensors: int) -> tuple[int, int, int] | None:
    """Return the tile (outer, groups, inner) that holds groups of so many tensors in one program, or None if none does.

    Channels-last a program has groups side by side until their rows are ``ROW_BYTES`` long, as far as they fit. Less
    than 16 bytes would load far more than they use.
    """
    positions, channels = _rounded(at.positions), triton.next_power_of_2(group_size)
    # Where every value has an address of its own, addresses take half of the registers.
    most = ON_CHIP if at.vec > 1 else ON_CHIP // 2
    if positions * channels * tensors > most:
        positions = triton.next_power_of_2(at.positions)
    if positions * channels * tensors > most:
        return None
    if not at.channels_last:
        return channels, 1, positions
    groups = 1
    if channels == group_size:
        fitting = most // (positions * channels * tensors), at.channels // group_size
        while groups * channels * itemsize < ROW_BYTES and 2 * groups <= min(fitting):
            groups *= 2
    if groups * group_size * itemsize < 16 and at.channels > groups * group_size:
        return None
    return positions, groups, channels


def _rounded(positions: int) -> int:
    """Round up to a power of 4, at least 64: the number of positions changes from batch to batch, see ``tiling``."""
    bits = (positions - 1).bit_length()
    return max(64, 1 << (bits + bits % 2))


def like(dy: Tensor, x: Tensor) -> Tensor:
    """Return dy laid out as x, in its dtype and from 16 bytes on: itself, or a copy.

    A loss of another layout is not, nor one value expanded, nor a view that starts anywhere.
    """
    if dy.stride() == x.stride() and not dy.data_ptr() % 16 and dy.dtype is x.dtype:
        return dy
    return torch.empty_like(x).copy_(dy)


def dtypes_of(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """Return what a plan depends on beside sizes: which tensors there are, and of which dtypes."""
    return tuple([None if t is None else t.dtype for t in tensors])  # a list: no generator has to be made


def vector(values: Tensor | None) -> Tensor | None:
    """Return values per channel one beside the other in memory, as kernels read them."""
    return values if values is None or values.is_contiguous() else values.contiguous()


# From this version on a compiled kernel takes all arguments of its function, constants included.
_STARTS_DIRECTLY = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


# Plans of a kind that are kept: of each layer of a large model for some hundred sizes of images.
_PLANS = 1 << 16
_kept: list[Any] = []


def planned(plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """Let a function, which plans for a shape, do so once per shape."""
    kept = functools.lru_cache(_PLANS)(plan)
    _kept.append(kept)
    return kept


def forget_plans() -> None:
    """Plan anew from the next call on: after a change of the sizes above, which only tests make."""
    for plans in _kept:
        plans.cache_clear()


class Step:
    """A kernel with its grid, numbers and constants, to be called with its tensors, in the order of its arguments.

    Numbers and constants of a step never change, so that after the first call, for which Triton compiles or finds the
    kernel, what it matched and looked up is known: the compiled kernel is started directly. The caller sees to what
    would make it another kernel: dtypes, which tensors are None, and that the others start at multiples of 16 bytes
    unless the kernel says that it does not care. A step belongs to one device.
    """

    __slots__ = ("_grid", "_handles", "_start", "_tail", "constants", "kernel", "numbers", "programs", "warps")

    def __init__(
        self, kernel: Any, programs: int, numbers: Sequence[float], constants: dict[str, Any], warps: int = 4
    ) -> None:
        self.kernel, self.programs, self.numbers, self.warps = kernel, programs, tuple(numbers), warps
        names = kernel.arg_names
        self.constants = {name: constants[name] for name in names[len(names) - len(constants) :]}
        self._tail = (*self.numbers, *self.constants.values())
        self._grid = programs, 1, 1
        self._start: Any = None
        self._handles: tuple[Any, ...] = ()

    def __call__(self, stream: int, *tensors: Tensor | None) -> None:
        if self._start is not None:
            self._start(*self._grid, stream, *self._handles, *tensors, *self._tail)
            return
        compiled = run(self.kernel, self.programs, *tensors, *self.numbers, warps=self.warps, **self.constants)
        if compiled is not None and _STARTS_DIRECTLY:
            # What Triton hands over itself; the three None are for hooks that its own profiler sets.
            self._handles = compiled.function, compiled.packed_metadata, None, None, None
            self._start = compiled.run


def run(kernel: Any, programs: int, *args: Any, warps: int = 4, **constants: Any) -> Any:
    """Start a kernel through Triton and return it compiled (None in the interpreter); every first launch comes here."""
    return kernel[(programs,)](*args, **constants, num_warps=warps)


# Counters at which programs meet, of each device and stream.
GATES = 1 << 14
_gates: dict[tuple[torch.device, int], Tensor] = {}


def gates(x: Tensor, stream: int, number: int) -> Tensor:
    """Return so many counters for programs that meet, which are open: 0.

    The last program at one leaves it at 0 again, so that nothing has to be zeroed between launches: that would
    be one more kernel for every layer. Launches on one stream do not overlap and share them. A CUDA graph may be
    replayed beside any of these, so that each launch that is captured zeroes its own.
    """
    key = x.device, stream
    if x.is_cuda and torch._C._cuda_isCurrentStreamCapturing():
        return torch.zeros(number, dtype=torch.int32, device=x.device)
    kept = _gates.get(key)
    if kept is None or len(kept) < number:
        # By a thread of its own: what this one allocates may be for a pool that a compiler's CUDA graphs own, which
        # takes a tensor that stays for a leak.
        with ThreadPoolExecutor(1) as pool:
            kept = _gates[key] = pool.submit(_open_gates, x.device, max(number, GATES)).result()
    return kept


def _open_gates(device: torch.device, number: int) -> Tensor:
    counters = torch.zeros(number, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # they are for other streams than this thread's
    return counters


def stream_of(device: int) -> int:
    """Return the current stream of the GPU of that index, as kernels are started on it."""
    return 0 if device < 0 else torch._C._cuda_getCurrentRawStream(device)
