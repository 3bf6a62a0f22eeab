"""Compiling ahead of the first step: all kernels that a model's norms may start, in a process per core.

Triton keeps what it has compiled in a folder (``TRITON_CACHE_DIR``, else ``~/.triton/cache``), where later starts of
this process and of all others find it.
"""

import copy
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import nn

from normplug.layers import CrossIterationBatchNorm, SyncBatchNorm
from normplug.ops import _registration
from normplug.ops._common import for_backward
from normplug.ops.batch_norm import batch_norm_dx, batch_norm_reduce, batch_norm_stats, batch_normalize

__all__ = ["Start", "calls_of", "compile_all", "starts_of", "warm_up"]

# Maps of all kinds, by what they make of tiles: in one program or several, rows long or short, a multiple of 4 or not.
SIZES_OF_MAPS = [
    *[(7, 7), (8, 8), (13, 15), (14, 14), (25, 25), (16, 16), (25, 42), (25, 43), (32, 32), (40, 44), (45, 45)],
    *[(43, 51), (50, 84), (51, 83), (64, 64), (100, 168), (99, 167), (200, 336), (400, 672)],
]


# Ops of layers that start kernels by the sizes of their input -> whether they take a residual.
TAKES_RESIDUAL = {
    "group_norm": True,
    "batch_norm": True,
    "evonorm_s0": False,
    "evonorm_b0": False,
    "filter_response_norm": False,
}
# Layers whose op is done in parts: their statistics are those of several ranks or iterations.
BY_PARTS = (SyncBatchNorm, CrossIterationBatchNorm)


class Start(NamedTuple):
    """A start of a kernel as another process can repeat it: tensors are their dtypes, functions "module:name"."""

    kernel: str
    args: tuple[Any, ...]
    warps: int
    constants: tuple[tuple[str, Any], ...]


def starts_of(calls: Iterator[Callable[[], Any]]) -> list[Start]:
    """Return the distinct starts of calls on tensors without memory."""
    from normplug.kernels import _launch

    found: dict[Start, None] = {}

    def catch(kernel: Any, _programs: int, *args: Any, warps: int = 4, **constants: Any) -> None:
        # Numbers do not matter to the compiler, but for what is too large for 32 bits.
        seen = tuple(
            a.dtype if isinstance(a, torch.Tensor) else 2**40 if type(a) is int and a >= 2**31 else _one(a)
            for a in args
        )
        fixed = tuple((name, _named(value)) for name, value in constants.items())
        found.setdefault(Start(_named(kernel), seen, warps, fixed))

    _launch.forget_plans()
    original, _launch.run = _launch.run, catch
    first, _registration.FIRST_DEVICE = _registration.FIRST_DEVICE, -1
    try:
        for call in calls:
            call()
    finally:
        _launch.run, _registration.FIRST_DEVICE = original, first
        _launch.forget_plans()
    return list(found)


def _one(value: Any) -> Any:
    return 1 if type(value) is int else 1.0 if type(value) is float else value


def _named(value: Any) -> Any:
    return f"{value.fn.__module__}:{value.fn.__name__}" if hasattr(value, "fn") else value


def calls_of(model: nn.Module, batch_size: int, dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Yield a forward and backward pass for every kind of norm in a model, on maps of every kind.

    In training each is called as in the model: in its memory format, with a residual and without where it takes one.
    """
    convolutions = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    is_video = any(isinstance(m, nn.Conv3d) for m in convolutions)
    last = torch.channels_last_3d if is_video else torch.channels_last
    form = last if any(_is_channels_last(m.weight) for m in convolutions) else torch.contiguous_format
    kinds: dict[str, nn.Module] = {}
    for module in model.modules():
        if getattr(module, "op", None) in TAKES_RESIDUAL:
            kinds.setdefault(repr(module), module)
    for norm in kinds.values():
        if isinstance(norm, BY_PARTS):
            step = partial(_parts_of_batch_norm, norm.weight is not None, norm.bias is not None)
        else:
            step = partial(_step, copy.deepcopy(norm).to("meta").train())
        channels = getattr(norm, "num_channels", None) or norm.num_features
        for size in SIZES_OF_MAPS:
            shape = (batch_size, channels, 8, *size) if is_video else (batch_size, channels, *size)
            for residuals in (0, 1) if TAKES_RESIDUAL[norm.op] else (0,):
                yield partial(step, shape, dtype, form, residuals)


def _is_channels_last(weight: torch.Tensor) -> bool:
    return not weight.is_contiguous()


def _step(
    layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, form: torch.memory_format, residuals: int
) -> None:
    given = [
        torch.empty(shape, dtype=dtype, device="meta").to(memory_format=form).requires_grad_()
        for _ in range(1 + residuals)
    ]
    y = layer(*given)
    y.backward(torch.empty_like(y))


def _parts_of_batch_norm(
    has_weight: bool, has_bias: bool, shape: tuple[int, ...], dtype: torch.dtype, form: torch.memory_format,
    residuals: int,
) -> None:  # fmt: skip
    """Start what a layer does between which ranks, or iterations, meet: it would wait for the others if it was run."""
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=form)
    residual = x if residuals else None
    with torch.no_grad():
        mean, m2 = batch_norm_stats(x)
        given = mean, m2, mean if has_weight else None, mean if has_bias else None
        y = batch_normalize(x, *given, "relu", residual)
        behind = for_backward("relu", residual, y)
        sums = batch_norm_reduce(y, x, *given, *behind)
        batch_norm_dx(y, x, *given, *behind, *sums)


def warm_up(
    model: nn.Module,
    batch_size: int = 2,
    dtype: torch.dtype = torch.float32,
    jobs: int | None = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> int:
    """Compile what the norms of a model may start in training, on images of any size, and return how many kernels.

    Args:
        model: Its norms of normplug, and the memory format of its convolutions, are looked at; nothing of it is run.
        batch_size: Samples per GPU.
        dtype: Of the maps that the norms see: that of autocast, if it is on.
        jobs: Processes to compile in; as many as there are cores unless given.
        progress: Called with the numbers of kernels that are done, and of all.
    """
    from normplug.kernels._stub_driver import current_target

    return compile_all(starts_of(calls_of(model, batch_size, dtype)), current_target(), jobs, progress)


def compile_all(
    starts: list[Start], target: Any, jobs: int | None = None, progress: Callable[[int, int], Any] = print
) -> int:
    """Compile for a target (of Triton), in processes that need no GPU."""
    if not starts:
        return 0
    jobs = min(jobs or os.cpu_count() or 1, len(starts))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        todo = [pool.submit(_compile, start, target) for start in starts]
        for done, future in enumerate(as_completed(todo), 1):
            future.result()
            progress(done, len(starts))
    return len(starts)


def _compile(start: Start, target: Any) -> None:
    from normplug.kernels._recording import resolve
    from normplug.kernels._stub_driver import stub_driver

    with stub_driver(target):
        constants = {name: resolve(v) if isinstance(v, str) and ":" in v else v for name, v in start.constants}
        resolve(start.kernel).warmup(*start.args, grid=(1,), num_warps=start.warps, **constants)
