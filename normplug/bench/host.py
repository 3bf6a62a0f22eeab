"""Host time: how long Python and torch take to start a layer's kernels, without a GPU and without running them.

Whoever trains at two images per GPU waits for the host: a step of Mask R-CNN has 69 norms. So this is measured apart:
Triton compiles for an H100 and matches arguments as ever, the launch itself is a function that does nothing, and
tensors lie on the CPU, on which torch's own operations run beside it with next to no values.
"""

import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normplug import layers
from normplug.reporting import markdown_table

__all__ = ["Timing", "markdown", "measure", "without_launching"]

# Next to no values, in groups wide enough for one program to hold them channels-last too.
SHAPE, GROUPS = (2, 64, 2, 2), 8


class Launches:
    """Counts what would have been started."""

    count = 0


@contextmanager
def without_launching() -> Iterator[type[Launches]]:
    """Let ops run their kernels' host code on CPU tensors: compiled for sm_90, started by a function that counts."""
    from normplug.kernels._stub_driver import H100, stub_driver

    def count(*_: Any) -> None:
        Launches.count += 1

    registration = importlib.import_module("normplug.ops._registration")
    first_device, registration.FIRST_DEVICE = registration.FIRST_DEVICE, -1
    library = torch.library.Library("normplug", "IMPL")
    for name, launch in registration.KERNELS.items():
        library.impl(name, launch, "CPU")
    ops = importlib.import_module("normplug.ops.group_norm")
    leave_to_aten, ops._leave_to_aten = ops._leave_to_aten, lambda *_: False
    Launches.count = 0
    try:
        with stub_driver(H100, count):
            yield Launches
    finally:
        registration.FIRST_DEVICE = first_device
        ops._leave_to_aten = leave_to_aten
        library._destroy()


@dataclass
class Timing:
    """Microseconds of host time, forward and backward, of a layer and of torch's own operations for its job."""

    layer: str
    passes: str
    launches: int
    ours: float
    torch: float

    @property
    def ratio(self) -> float:
        return self.ours / self.torch


class _Stock(nn.Module):
    """A norm of torch, the addition of a residual and ReLU, in place where that is allowed."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = self.norm(x)
        return F.relu(z if residual is None else z.add_(residual), inplace=True)


def _group_norm(dtype: torch.dtype) -> nn.Module:
    return _Stock(nn.GroupNorm(GROUPS, SHAPE[1]).to(dtype))


def _batch_norm(_dtype: torch.dtype) -> nn.Module:
    return _Stock(nn.BatchNorm2d(SHAPE[1]))


# Name, ours, torch's own for the same job, with a residual, whether groups are made to need several passes.
CASES: list[tuple[str, Callable[[], nn.Module], Callable[[torch.dtype], nn.Module], bool, bool]] = [
    ("GN + ReLU", partial(layers.GroupNorm, SHAPE[1], GROUPS, act="relu"), _group_norm, False, True),
    ("GN + ReLU", partial(layers.GroupNorm, SHAPE[1], GROUPS, act="relu"), _group_norm, False, False),
    ("GN + add + ReLU", partial(layers.GroupNorm, SHAPE[1], GROUPS, act="relu"), _group_norm, True, True),
    ("BN + ReLU", partial(layers.BatchNormAct, SHAPE[1], act="relu"), _batch_norm, False, True),
    ("BN + add + ReLU", partial(layers.BatchNormAct, SHAPE[1], act="relu"), _batch_norm, True, True),
    ("EvoNormS0", partial(layers.EvoNormS0, SHAPE[1], GROUPS), _group_norm, False, True),
    ("FRN", partial(layers.FilterResponseNorm, SHAPE[1]), _group_norm, False, True),
    ("EvoNormB0", partial(layers.EvoNormB0, SHAPE[1]), _batch_norm, False, True),
]


def measure(rounds: int = 9, calls: int = 300) -> list[Timing]:
    """Return timings of ``CASES``, interleaved with torch's own, each the least of some rounds."""
    found = []
    for channels_last in (False, True):
        for name, ours, stock, has_residual, split in CASES:
            with without_launching() as launches, several_passes(split):
                found.append(
                    _compare(
                        name, ours(), stock(torch.bfloat16), has_residual, channels_last, split, launches, rounds, calls
                    )
                )
    return found


@contextmanager
def several_passes(wanted: bool) -> Iterator[None]:
    """Let small groups be normalized as large ones are: in passes over memory."""
    launch = importlib.import_module("normplug.kernels._launch")
    before = launch.ON_CHIP
    launch.ON_CHIP = 1 if wanted else before
    launch.forget_plans()
    try:
        yield
    finally:
        launch.ON_CHIP = before
        launch.forget_plans()


def _compare(
    name: str, ours: nn.Module, stock: nn.Module, has_residual: bool, channels_last: bool, split: bool,
    launches: type[Launches], rounds: int, calls: int,
) -> Timing:  # fmt: skip
    form = torch.channels_last if channels_last else torch.contiguous_format

    def step(module: nn.Module, form: torch.memory_format) -> Callable[[], Any]:
        x, residual = (
            torch.randn(SHAPE, dtype=torch.bfloat16).to(memory_format=form).requires_grad_() for _ in range(2)
        )
        args = (x, residual) if has_residual else (x,)
        wanted, dy = [*args, *module.parameters()], torch.randn_like(x).detach()
        return lambda: torch.autograd.grad(module(*args), wanted, dy)

    # torch's own are contiguous in either case: on a CPU they do more for the other layout than they would on a GPU.
    steps = step(ours, form), step(stock, torch.contiguous_format)
    for _ in range(20):
        for each in steps:
            each()
    launches.count = 0
    steps[0]()
    started = launches.count
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for each, taken in zip(steps, times, strict=True):
            begin = time.process_time()
            for _ in range(calls):
                each()
            taken.append((time.process_time() - begin) / calls * 1e6)
    passes = ("channels-last" if channels_last else "contiguous") + (", passes" if split else ", on chip")
    return Timing(name, passes, started, min(times[0]), min(times[1]))


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a run."""
    rows = [Timing(**row) for row in result["rows"]]
    head = ["layer", "memory", "launches", "ours (µs)", "torch (µs)", "ratio"]
    lines = [[t.layer, t.passes, str(t.launches), f"{t.ours:.1f}", f"{t.torch:.1f}", f"{t.ratio:.2f}"] for t in rows]
    mean = statistics.geometric_mean([t.ratio for t in rows])
    return f"{markdown_table([head, *lines])}\n\nGeometric mean of the ratios: {mean:.2f}"


def run() -> dict[str, Any]:
    return {"kind": "host", "rows": [asdict(t) for t in measure()]}
