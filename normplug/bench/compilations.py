"""How many kernels a training run on images of changing sizes makes the compiler work on: a simulation without a GPU.

Every kernel takes Triton some tenths of a second, on every rank, whenever a batch comes whose sizes make it another.
The batches are drawn as COCO has them: two images, the short side 800, padded together to multiples of 32.
"""

import importlib
import random
from collections.abc import Iterator
from functools import partial
from math import ceil
from typing import Any

import torch

from normplug.reporting import markdown_table

__all__ = ["GOAL", "batches", "count", "layers", "markdown", "run", "step"]

# At most so many kernels are compiled in a training run.
GOAL = 40
# Aspect ratios of COCO's images, the frequent ones more than once; None for one drawn at random.
RATIOS = [4 / 3] * 5 + [640 / 427] * 5 + [640 / 426] * 2 + [16 / 9] + [None] * 4
SHORT, LONG, IMAGES = 800, 1333, 2


def batches(number: int, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Yield height and width of the padded images of so many batches."""
    draw = random.Random(seed)
    for _ in range(number):
        height = width = 0
        for _ in range(IMAGES):
            ratio = draw.choice(RATIOS) or 4 / 3 + draw.uniform(-0.3, 0.6)
            short, long = SHORT, int(SHORT * ratio)
            if long > LONG:
                short, long = int(LONG / ratio), LONG
            h, w = (short, long) if draw.random() < 0.75 else (long, short)
            height, width = max(height, h), max(width, w)
        yield ceil(height / 32) * 32, ceil(width / 32) * 32


def layers(height: int, width: int) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield shapes and roles ("plain", "act", "add") of the distinct norms of Mask R-CNN R50-FPN with GN everywhere."""
    size = height // 2, width // 2
    yield (IMAGES, 64, *size), "act"
    size = height // 4, width // 4
    for stage, channels in enumerate((64, 128, 256, 512)):
        if stage:
            yield (IMAGES, channels, *size), "act"  # the first block strides in its second convolution
            size = ceil(size[0] / 2), ceil(size[1] / 2)
        yield (IMAGES, channels, *size), "act"
        yield (IMAGES, 4 * channels, *size), "add"
        yield (IMAGES, 4 * channels, *size), "plain"
    size = height // 4, width // 4
    for _ in range(5):
        yield (IMAGES, 256, *size), "plain"
        size = ceil(size[0] / 2), ceil(size[1] / 2)
    yield (512 * IMAGES, 256, 7, 7), "act"
    yield (128 * IMAGES, 256, 14, 14), "act"


def count(norm: str, dtype: torch.dtype, channels_last: bool, number: int = 400, seed: int = 0) -> list[int]:
    """Return how many kernels have been compiled after each batch, forward and backward."""
    from normplug.kernels._recording import record

    module = importlib.import_module(f"normplug.kernels.{norm}")
    seen: set[Any] = set()
    sizes: set[tuple[int, int]] = set()
    growth = []
    for size in batches(number, seed):
        if size not in sizes:
            sizes.add(size)
            for shape, role in layers(*size):
                seen.update(record(partial(step, module, norm, shape, role, dtype, channels_last)))
        growth.append(len(seen))
    return growth


def step(module: Any, norm: str, shape: tuple[int, ...], role: str, dtype: torch.dtype, channels_last: bool) -> None:
    """Go forward and backward through a layer as its op does."""
    last = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
    form = last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=form)
    w = torch.empty(shape[1], device="meta")
    if norm == "evonorm_s0":  # it brings its activation, and takes no residual
        _, mean, rstd = module.forward(x, 32, w, w, w, 1e-5)
        module.backward(x, x, mean, rstd, w, w)
        return
    residual, act = x if role == "add" else None, None if role == "plain" else "relu"
    given = (w, w, 1e-5, act, residual) if norm == "batch_norm" else (32, w, w, 1e-5, act, residual)
    _, mean, rstd, *_ = module.forward(x, *given)
    module.backward(x, x, mean, rstd, w, w, *(("relu_of_output", x) if role == "add" else (act, None)))


def run(number: int = 400) -> dict[str, Any]:
    """Count for every norm and layout."""
    rows = []
    for norm in ("group_norm", "batch_norm", "evonorm_s0"):
        for channels_last in (False, True):
            growth = count(norm, torch.bfloat16, channels_last, number)
            layout = "channels-last" if channels_last else "contiguous"
            rows.append({"norm": norm, "layout": layout, "batches": number, "growth": growth})
    return {"kind": "compilations", "rows": rows}


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a run."""
    marks = [m for m in (1, 10, 100, 400) if m <= len(result["rows"][0]["growth"])]
    head = ["norm", "layout", *(f"after {m} batch{'es' if m > 1 else ''}" for m in marks)]
    lines = [[r["norm"], r["layout"], *(str(r["growth"][m - 1]) for m in marks)] for r in result["rows"]]
    return markdown_table([head, *lines])
