"""What evaluating with a model costs: time and memory by batch size, parameters, FLOPs."""

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from normplug.bench.measure import cpu_memory, quantile
from normplug.openmmlab.comparison.norms import part_of

__all__ = ["PASSES", "Cost", "Latency", "Speed", "flops", "measure", "speed", "static_cost"]

WARMUP = 2
PASSES = 3  # through all batch sizes: a machine that is busy for a while is so for a part of each measurement
FEWEST, MOST = 4, 200  # repetitions in each
FLOP_SAMPLES = 4


@dataclass
class Latency:
    """Milliseconds per batch, and bytes at the peak."""

    batch_size: int
    median: float
    low: float  # 25th percentile
    high: float  # 75th
    repetitions: int
    peak_bytes: int  # of tensors beyond the weights and the batch
    calls: list[float] = field(default_factory=list)  # each, in milliseconds, in the order of measurement

    @property
    def throughput(self) -> float:
        """Samples per second."""
        return 1e3 * self.batch_size / self.median


class Speed(NamedTuple):
    """How long B takes, as a multiple of A."""

    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Which is faster, if that is more than the spread of the measurements."""
        if self.low <= 1 <= self.high:
            return "inside the noise"
        return "A is faster" if self.ratio > 1 else "B is faster"


def speed(a: Latency, b: Latency) -> Speed:
    """Compare calls that were made in turns: the median of their ratios, and its 95% confidence interval.

    The interval is that of order statistics: of n ratios the median lies between those of rank n/2 ± 0.98 sqrt(n) in
    95 of 100 cases, whatever their distribution.
    """
    ratios = sorted(y / x for x, y in zip(a.calls, b.calls, strict=True))
    n = len(ratios)
    half = 0.98 * n**0.5
    low, high = max(0, math.floor(n / 2 - half)), min(n - 1, math.ceil(n / 2 + half))
    return Speed(quantile(ratios, 0.5), ratios[low], ratios[high])


@dataclass
class Cost:
    """What a model costs."""

    parameters: int
    trainable: int
    weight_bytes: int  # parameters and buffers
    flops: dict[str, float] = field(default_factory=dict)  # per sample, by part of the model and in all ("")
    latencies: list[Latency] = field(default_factory=list)  # no batch size that did not fit into memory


def static_cost(model: nn.Module) -> Cost:
    """Count a model's parameters: all, and those that training would change."""
    parameters = list(model.parameters())
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        weight_bytes=sum(t.numel() * t.element_size() for t in [*parameters, *model.buffers()]),
    )


def measure(
    models: Sequence[nn.Module],
    loader: DataLoader,
    batch_sizes: Sequence[int],
    seconds: float = 3.0,
    advance: Callable[[], None] = lambda: None,
) -> list[Cost]:
    """Measure models on the same batches, in turns: what else the machine does falls on all of them.

    A call is the model's ``test_step``: preprocessing, network, post-processing (NMS, pasting of masks), and on a GPU
    the copy of the batch to it. The first samples of the data set make up the batches; where it has fewer, they repeat.

    Memory is the peak of what torch has allocated during a call, beyond what was there before: on CUDA its caching
    allocator's count, on a CPU its profiler's.

    Args:
        models: Models on one device, in evaluation mode.
        loader: The data; its batch size and workers do not matter.
        batch_sizes: Numbers of samples.
        seconds: Time for each batch size and model; at least 12 repetitions are made whatever they take.
        advance: Called after each batch size of each of the PASSES.
    """
    device = next(models[0].parameters()).device
    costs = [static_cost(model) for model in models]
    samples = [loader.dataset[i % len(loader.dataset)] for i in range(max([FLOP_SAMPLES, *batch_sizes]))]
    for cost, model in zip(costs, models, strict=True):
        cost.flops = flops(model, [loader.collate_fn([sample]) for sample in samples[:FLOP_SAMPLES]])
    batches = {size: loader.collate_fn(samples[:size]) for size in batch_sizes}
    times: dict[int, list[list[float]]] = {size: [[] for _ in models] for size in batch_sizes}
    for _ in range(PASSES):
        for size in [size for size in batch_sizes if size in times]:
            try:
                for all_calls, calls in zip(
                    times[size], _in_turns(models, batches[size], device, seconds / PASSES), strict=True
                ):
                    all_calls += calls
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                del times[size]
            advance()
    for size, of_size in times.items():
        peaks = [_peak(model, batches[size], device) for model in models]
        for cost, peak, took in zip(costs, peaks, of_size, strict=True):
            quartiles = (quantile(took, q) for q in (0.5, 0.25, 0.75))
            cost.latencies.append(Latency(size, *quartiles, len(took), peak, took))
    return costs


def _timed(model: nn.Module, batch: Any, device: torch.device) -> float:
    """Return the milliseconds of a call, of which the copy of the batch is no part: models write into it."""
    batch = copy.deepcopy(batch)
    _synchronize(device)
    began = time.perf_counter()
    with torch.no_grad():
        model.test_step(batch)
    _synchronize(device)
    return (time.perf_counter() - began) * 1e3


def _in_turns(models: Sequence[nn.Module], batch: Any, device: torch.device, seconds: float) -> list[list[float]]:
    slowest = 0.0
    for _ in range(WARMUP):
        slowest = max(_timed(model, batch, device) for model in models)
    count = max(FEWEST, min(MOST, int(seconds * 1e3 / slowest)))
    times: list[list[float]] = [[] for _ in models]
    order = list(enumerate(models))
    for _ in range(count):
        for i, model in order:
            times[i].append(_timed(model, batch, device))
        order.reverse()  # nobody is always first
    return times


def _peak(model: nn.Module, batch: Any, device: torch.device) -> int:
    batch = copy.deepcopy(batch)
    with torch.no_grad():
        if device.type != "cuda":
            return cpu_memory(lambda: model.test_step(batch))[0]
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model.test_step(batch)
        return torch.cuda.max_memory_allocated(device) - before


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops(model: nn.Module, batches: Sequence[Any]) -> dict[str, float]:
    """Count the floating-point operations of convolutions and matrix products, the mean over batches.

    A multiplication and an addition are two. Norms, activations, pooling, RoIAlign and NMS are not counted; nor is
    the standardization of weights. With a detector the numbers depend on how many objects it finds.

    Returns:
        Operations by part of the model ("backbone", "roi_head.bbox_head"), and of the whole ("").
    """
    totals: dict[str, float] = defaultdict(float)
    counter = FlopCounterMode(display=False)
    parts = {name: module for name, module in model.named_modules() if name and part_of(name) == name}
    handles = []
    for name, module in parts.items():  # the counter's own names know a module by the caller, not by its place

        def before(_module: nn.Module, _args: tuple, name: str = name) -> None:
            totals[name] -= counter.get_total_flops()

        def behind(_module: nn.Module, _args: tuple, _result: Any, name: str = name) -> None:
            totals[name] += counter.get_total_flops()

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(behind)]
    try:
        for batch in batches:
            with torch.no_grad(), counter:  # entering it sets it to zero
                model.test_step(copy.deepcopy(batch))
            totals[""] += counter.get_total_flops()
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / len(batches) for name, total in totals.items() if total}
