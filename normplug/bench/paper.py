"""What the norm layers of a model cost in a training step on paper: kernels that are started, and bytes that are moved.

Kernels are counted by going through every layer without starting any. Bytes are those of tensors as large as x; what
is per channel or per group is below 1 % of them. Time is bytes by bandwidth, without what a start of a kernel costs.
"""

import importlib
import math
from functools import partial
from typing import Any

import torch

from normplug.bench.compilations import step
from normplug.bench.shapes import ROLES, select
from normplug.reporting import markdown_table

__all__ = ["BANDWIDTH", "markdown", "run"]

# Bytes per second: what a copy of large tensors reaches on an H100.
BANDWIDTH = 3.0e12
NORM, DTYPE = "group_norm", torch.bfloat16
# Tensors as large as x that are read and written, without and with a residual sum: the least possible, and what passes
# move more. Without: x, y; dy, x, dx. With: x, residual, y; dy, x, y, dx, dresidual. Passes read x, or dy, x and y,
# once more.
LEAST = {"forward": {False: 2, True: 3}, "backward": {False: 3, True: 5}}
AGAIN = {"forward": {False: 1, True: 1}, "backward": {False: 2, True: 3}}


def run() -> dict[str, Any]:
    """Count for both models and layouts."""
    shapes = [shape for role in ROLES[:3] for shape in select("all", role)]
    rows = [
        _count(model, [shape for shape in shapes if shape.model == model], channels_last)
        for model in dict.fromkeys(shape.model for shape in shapes)
        for channels_last in (False, True)
    ]
    return {"kind": "paper", "rows": rows}


def _count(model: str, shapes: list[Any], channels_last: bool) -> dict[str, Any]:
    row = {"model": model, "layout": "channels-last" if channels_last else "contiguous"}
    row |= {"layers": sum(shape.layers for shape in shapes), "kernels": 0, "bytes": 0, "least": 0}
    for shape in shapes:
        adds, size = shape.role == "add", shape.layers * math.prod(shape.dims[0]) * DTYPE.itemsize
        least = sum(tensors[adds] for tensors in LEAST.values())
        row["least"] += least * size
        names = _started(shape, channels_last)
        whole = {name.split("_")[-1] for name in names if name.startswith("_group_")}
        again = sum(tensors[adds] for way, tensors in AGAIN.items() if way not in whole)
        row["kernels"] += shape.layers * len(names)
        row["bytes"] += (least + again) * size
    return row


def _started(shape: Any, channels_last: bool) -> list[str]:
    """Return the names of the kernels of a layer."""
    from normplug.kernels._recording import record

    module = importlib.import_module(f"normplug.kernels.{NORM}")
    launches = record(partial(step, module, NORM, shape.dims[0], shape.role, DTYPE, channels_last))
    return [launch.kernel.split(":")[1] for launch in launches]


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a run."""
    head = ["model", "layout", "norms", "kernels", "GB", "ms"]
    lines = []
    for row in result["rows"]:
        numbers = f"{row['bytes'] / 1e9:.2f}", f"{row['bytes'] / BANDWIDTH * 1e3:.2f}"
        lines.append([row["model"], row["layout"], str(row["layers"]), str(row["kernels"]), *numbers])
    return markdown_table([head, *lines])
