"""What kernels share inside a program: the tile they work on, loads and stores that may be absent, sums.

A tile is (outer, inner) as in ``Layout``, in both memory formats; which axis is the channels' only decides along
which axis parameters and sums lie.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from normplug.kernels._launch import Layout

__all__ = [
    "PER_CHANNEL", "SIZES", "Channels", "Formula", "channels_of", "load", "load_at", "over_positions", "store",
    "tile", "tile_constants",
]  # fmt: skip

# Arguments of kernels that change from batch to batch. Triton would compile a kernel for each that is 1 or a multiple
# of 16; what such knowledge is good for, wide loads, they learn from VEC.
SIZES = [
    "outer", "units", "group_units", "channels", "group_size", "per_sample", "channel_tiles", "tiles", "runs",
    "per_run", "splits", "per_split", "per_batch", "together", "step", "values", "parts", "adders", "samples",
    "positions",
]  # fmt: skip
# Arguments that are loaded once per channel: they may start anywhere, as views into an optimizer's flat buffer do.
PER_CHANNEL = ["mean_ptr", "rstd_ptr", "weight_ptr", "bias_ptr", "v_ptr", "u_ptr"]


@dataclass(frozen=True, eq=False)  # the same only if identical: a key that is cheap to hash
class Formula:
    """A norm in terms of single values, for the passes.

    Attributes:
        value: (x, mean, rstd, weight, bias, v, u, residual, slope, ACT) -> y, a ``triton.jit`` function.
        grads: (dy, x, mean, rstd, weight, bias, v, u, residual, slope, ACT) -> six values: dL/dx at constant
            statistics, and up to five whose sums per channel are wanted: the gradients of bias and weight first.
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


def tile_constants(at: Layout, block: Sequence[int]) -> dict[str, Any]:
    return {"VEC": at.vec, "CHANNELS_LAST": at.channels_last, "BO": block[0], "BI": block[1]}


@triton.jit
def tile(unit, tiles, channel, outer, inner, CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr):
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
def channels_of(channel, CHANNELS_LAST: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr):
    """Return the channels of a tile along their axis: (1, BI) or (BO, 1)."""
    c = channel + tl.arange(0, BI)[None, :] if CHANNELS_LAST else channel + tl.arange(0, BO)[:, None]
    return c


@triton.jit
def load(ptr, offs, mask, other):
    """Return values as float32, or a constant where there is no tensor."""
    value = other if ptr is None else tl.load(ptr + offs, mask=mask, other=other).to(tl.float32)
    return value


@triton.jit
def store(ptr, offs, value, mask):
    if ptr is not None:
        tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def over_positions(t, CHANNELS_LAST: tl.constexpr):
    """Sum a tile over its positions, the first axis or the last, and keep the axes."""
    s = tl.sum(t, 0, keep_dims=True) if CHANNELS_LAST else tl.sum(t, -1, keep_dims=True)
    return s


@triton.jit
def load_at(ptr, start, offs, mask):
    """Load from a tensor that may be absent."""
    value = 0.0 if ptr is None else load(ptr + start, offs, mask, 0.0)
    return value
