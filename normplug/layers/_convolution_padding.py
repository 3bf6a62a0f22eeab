"""How a convolution pads its input: as its attributes say, or in a forward of its own.

mmcv's Conv2dAdaptivePadding and timm's Conv2dSame pad by what the size of the input asks for and say ``padding=0``.
Their output is the judge: of the ways to pad that give its size, the one that gives its values is theirs.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normplug.layers._convolution_trace import Convolution
from normplug.ops.patch_statistics import PADDING_MODES

__all__ = ["gives_size", "padding_of"]

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def padding_of(conv: Convolution, y: Tensor) -> dict[str, Any] | None:
    """Return the arguments of ``patch_statistics`` with which a convolution has made y (N, C, *) of its input.

    It costs the convolution once more for each way that is tried; the first is that of its attributes.

    Returns:
        None if it was no convolution of its input with its filters, whatever the padding.
    """
    assert conv.input is not None
    inputs, outputs = conv.input.shape[2:], y.shape[2:]
    return next((way for way in _ways(conv.geometry, inputs, outputs) if _has_made(conv, way, y)), None)


def gives_size(geometry: dict[str, Any], inputs: Sequence[int], outputs: Sequence[int]) -> bool:
    """Whether a convolution of this geometry makes maps of these sizes of maps of those sizes."""
    before, after = geometry["padding"][::2], geometry["padding"][1::2]
    padded = [n + b + a for n, b, a in zip(inputs, before, after, strict=True)]
    reach = _reach(geometry)
    return list(outputs) == [(n - r) // s + 1 for n, r, s in zip(padded, reach, geometry["stride"], strict=True)]


def _reach(geometry: dict[str, Any]) -> list[int]:
    return [d * (k - 1) + 1 for d, k in zip(geometry["dilation"], geometry["kernel_size"], strict=True)]


def _ways(own: dict[str, Any], inputs: Sequence[int], outputs: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the geometry of its own if the sizes allow it, then others: half of the padding before, half behind."""
    if gives_size(own, inputs, outputs):
        yield own
    if min(outputs) == 0:
        return
    axes = zip(inputs, outputs, own["stride"], _reach(own), strict=True)
    for pads in itertools.product(*(_pads((m - 1) * s + reach - n, s) for n, m, s, reach in axes)):
        padding = [part for pair in pads for part in pair]
        for mode in PADDING_MODES if 0 < max(padding) < min(inputs) else PADDING_MODES[:1]:
            yield own | {"padding": padding, "padding_mode": mode}


def _pads(least: int, stride: int) -> list[tuple[int, int]]:
    """What may stand before and behind an axis that lacks ``least`` values: by a stride, some at the end go unseen."""
    pads: dict[int, tuple[int, int]] = {}
    for total in range(max(least, 0), least + stride):
        pads.setdefault(total // 2, (total // 2, total - total // 2))
    return list(pads.values())


def _has_made(conv: Convolution, geometry: dict[str, Any], y: Tensor) -> bool:
    """Whether y is the output of the convolution with this geometry."""
    assert conv.input is not None
    x, filters = conv.input.detach().to(y.dtype), conv.filters().to(y.dtype)
    bias = conv.bias()
    bias = None if bias is None else bias.to(y.dtype)
    mode = geometry["padding_mode"]
    pairs = [geometry["padding"][i : i + 2] for i in range(0, len(geometry["padding"]), 2)]
    x = F.pad(x, [n for pair in reversed(pairs) for n in pair], "constant" if mode == "zeros" else mode)
    convolve = CONVOLUTIONS[len(pairs)]
    wanted = convolve(x, filters, bias, geometry["stride"], 0, geometry["dilation"], geometry["groups"])
    # Over all channels: in half precision one whose products nearly cancel may be far off by itself.
    off, size = (torch.linalg.vector_norm(t.float() if t.element_size() < 4 else t) for t in (y.detach() - wanted, y))
    return bool(off <= 0.02 * size + 1e-6)
