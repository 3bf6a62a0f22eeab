"""Time, memory, copy bandwidth, and the check that a result is right before anybody asks how fast it came.

On CUDA a repetition is timed by two events on the device, and a batch of repetitions is queued behind a device that
sleeps: what is measured is the time of the kernels without gaps, as in a training step whose Python runs ahead (gaps
remain where one batch is more launches than the driver queues, about a thousand). It is measured with a cold L2 cache,
where more than the cache holds is read before each repetition, ahead of its first event and so outside of its time, and
with a warm one, where the repetition before left what fits. The cache is flushed by reading, not by writing: dirty
lines of a flush would have to be written back while the call is timed. What Python needs per call is reported beside
it ("host"): the clock on the wall around the call alone, which waits for nothing, because a model of small layers
waits for that. On a CPU there is one time, by ``time.perf_counter``, with caches as warm as the repetition before left
them. All contenders of a case take turns, in batches.
"""

import contextlib
import ctypes
import functools
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from normplug.bench.cases import Problem, as_list
from normplug.bench.peers import Contender

__all__ = [
    "Batch",
    "Timing",
    "batch_of",
    "brief",
    "compare",
    "copy_bandwidth",
    "cpu_memory",
    "errors",
    "lone_process_group",
    "memory",
    "poisoned",
    "quantile",
    "run",
    "time_in_turns",
]

# Repeats a call so many times, with its milliseconds on the host known from before (0: unknown), the L2 cache cold or
# not; returns milliseconds of each call, on the device and on the host.
Batch = Callable[[int, float, bool], tuple[list[float], list[float]]]

# Of ours: norms of the error over norms of the result. Half types may be off by their one rounding (0.2 eps on
# average); sums over all positions of a channel lose a little more in float32.
FLOAT32, FLOAT32_SUMS, HALF = 1e-5, 1e-4, 0.5
PEER = 0.05  # of peers: enough to see one that computes something else
ROUNDS = 5


@dataclass
class Timing:
    """Milliseconds per call, over all repetitions."""

    median: float
    low: float  # 20th percentile
    high: float  # 80th
    repetitions: int
    host: float  # milliseconds of Python per call, median; on a CPU the same thing
    warm: float | None  # median with a warm L2 cache, where the others are with a cold one; None on a CPU


def run(contender: Contender, dys: list[Tensor]) -> tuple[Tensor, ...]:
    """One forward and one backward pass; gradients of all leaves."""
    outs = as_list(contender.call())
    return torch.autograd.grad(list(outs), list(contender.leaves.values()), dys)


# --- right or wrong


def errors(problem: Problem, contender: Contender) -> dict[str, float]:
    """Return ‖got - right‖ / ‖right‖ of each output and each gradient, by name; inf where not finite."""
    run(contender, problem.dys)  # leaves behind the memory that the next call is likely to get
    with poisoned(problem.dys[0].device):
        outs = as_list(contender.call())
        grads = torch.autograd.grad(list(outs), list(contender.leaves.values()), problem.dys)
    got = {f"y{i}": y.detach() for i, y in enumerate(outs)} | dict(zip(contender.leaves, grads, strict=True))
    return {name: _error(got[name], want) for name, want in problem.reference.items()}


@contextlib.contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Let memory that a call gets and does not write hold no right result of an earlier call.

    On CUDA every free block of the caching allocator is filled with bytes of ones: NaN in each floating-point type. On
    a CPU glibc is asked to fill what it hands out, with -1.7e38 as float32 and bfloat16; other C libraries do not.
    """
    if device.type == "cuda":
        _fill_free_blocks(device)
        yield
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0) if sys.platform == "linux" else lambda *_: 0
    perturb = -6  # M_PERTURB of malloc.h; memory handed out gets the complement of the byte, 0xfe
    mallopt(perturb, 1)
    try:
        yield
    finally:
        mallopt(perturb, 0)


def _fill_free_blocks(device: torch.device) -> None:
    stream = torch.cuda.current_stream(device).cuda_stream
    held = []  # until all are filled: each free block is handed out once
    for segment in torch.cuda.memory_snapshot():
        if (segment["device"], segment["stream"]) != (device.index, stream):
            continue
        for block in segment["blocks"]:
            # More than a MiB at once would come from the allocator's other pool.
            most = 1 << 20 if segment["segment_type"] == "small" else block["size"]
            if block["state"] == "inactive":
                sizes = (min(most, block["size"] - start) for start in range(0, block["size"], most))
                held += [torch.empty(size, dtype=torch.uint8, device=device).fill_(0xFF) for size in sizes]


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    off = got.double() - want
    scale = want.norm().item() or 1.0
    largest = want.abs().max().item() or 1.0
    # The norm forgives one wrong value in a million; the largest error, on its own scale, does not.
    error = max((off.norm() / scale).item(), (off.abs().max() / largest).item() / 4)
    return error if error == error else float("inf")


def compare(problem: Problem, contender: Contender, ours: bool) -> str:
    """Return what is wrong with a contender's results, or an empty text."""
    found = []
    for name, error in errors(problem, contender).items():
        limit = tolerance(problem, name) if ours else PEER
        if error > limit:
            what = "output" if name.startswith("y") else "gradient of"
            found.append(f"{what} {name} is off by {error:.2g} of its size (allowed {limit:.2g})")
    return "; ".join(found)


def tolerance(problem: Problem, name: str) -> float:
    half = HALF * torch.finfo(problem.dtype).eps if problem.dtype.itemsize < 4 else 0.0
    vector = name in problem.op.vectors
    return problem.op.condition * max(half, FLOAT32_SUMS if vector else FLOAT32)


# --- time


def time_in_turns(batches: Mapping[str, Batch], device: torch.device, seconds: float) -> dict[str, Timing]:
    """Time calls in turns, each for about ``seconds`` in all; they have been called before."""
    colds = (True, False) if device.type == "cuda" else (False,)
    samples: dict[tuple[str, bool], list[float]] = {(name, cold): [] for name in batches for cold in colds}
    hosts: dict[str, list[float]] = {name: [] for name in batches}
    counts = {}
    for name, batch in batches.items():
        batch(1, 0.0, False)
        times, host = batch(2, 0.0, colds[0])
        each = max(min(times), 1e-3) / 1e3
        counts[name] = max(3, min(20, int(seconds / ROUNDS / len(colds) / each))), max(host)
    for _ in range(ROUNDS):
        for cold in colds:
            for name, batch in batches.items():
                times, host = batch(*counts[name], cold)
                samples[name, cold] += times
                hosts[name] += host
    return {name: _timing([samples[name, cold] for cold in colds], hosts[name]) for name in batches}


def _timing(samples: list[list[float]], hosts: list[float]) -> Timing:
    median, low, high = (quantile(samples[0], q) for q in (0.5, 0.2, 0.8))
    warm = quantile(samples[1], 0.5) if len(samples) > 1 else None
    return Timing(median, low, high, len(samples[0]), quantile(hosts, 0.5), warm)


def quantile(values: list[float], q: float) -> float:
    """Return the q-quantile, between neighbours linearly."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def batch_of(call: Callable[[], object], device: torch.device) -> Batch:
    """Return how to repeat a call of this process."""
    return (
        functools.partial(_cuda_batch, call, device) if device.type == "cuda" else functools.partial(_cpu_batch, call)
    )


@functools.cache
def _more_than_l2(device: torch.device) -> Tensor:
    """Return four times what the L2 cache holds."""
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    return torch.zeros(size, dtype=torch.float32, device=device)


def _cuda_batch(
    call: Callable[[], object], device: torch.device, count: int, host_ms: float, cold: bool
) -> tuple[list[float], list[float]]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    buffer = _more_than_l2(device)
    host = []
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2e6 * min(1.5 * (host_ms + 0.1) * count, 500.0)))  # cycles: about 2 million a millisecond
    if not cold:
        call()  # the cache holds what another contender left
    for start, end in events:
        if cold:
            buffer.sum()
        start.record()
        began = time.perf_counter()
        call()
        host.append((time.perf_counter() - began) * 1e3)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events], host


def _cpu_batch(call: Callable[[], object], count: int, _host_ms: float, _cold: bool) -> tuple[list[float], list[float]]:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e3)
    return times, times


def copy_bandwidth(device: torch.device, tensor_bytes: int | None = None) -> float:
    """Return GB/s of a copy from memory to memory, bytes read and written counted.

    The bits are random, and the tensor larger than any L2 cache: GPUs compress zeros on their way to memory.
    """
    size = tensor_bytes or (1 << 30 if device.type == "cuda" else 1 << 27)
    source = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    timing = time_in_turns({"copy": batch_of(lambda: target.copy_(source), device)}, device, 0.2)["copy"]
    return 2 * size / timing.median / 1e6


# --- memory


def memory(contender: Contender, dys: list[Tensor], device: torch.device) -> tuple[int, int]:
    """Return bytes at the peak of forward and backward, and bytes held between them, beyond the inputs.

    The output is among them, and at the peak the gradients. On a CPU they are what torch's allocator has handed out,
    as its profiler records it.
    """
    if device.type != "cuda":
        peak, _ = cpu_memory(lambda: run(contender, dys))
        return peak, cpu_memory(contender.call)[1]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outs = contender.call()
    kept = torch.cuda.memory_allocated(device) - before
    grads = torch.autograd.grad(list(as_list(outs)), list(contender.leaves.values()), dys)
    del outs, grads
    return torch.cuda.max_memory_allocated(device) - before, kept


def cpu_memory(call: Callable[[], object]) -> tuple[int, int]:
    """Return bytes at the peak of a call and bytes held after it, as torch's CPU allocator has handed them out."""
    from torch.profiler import ProfilerActivity, profile

    # acc_events: there is one cycle, and torch up to 2.11 warns that others would be lost
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        result = call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del result
    return peak, now


# --- around the calls


def brief(error: Exception) -> str:
    """Return an exception in a line."""
    text = re.sub(r" \(/\S*\)", "", " ".join(str(error).split()))  # where a module lies is nobody's business
    return f"{type(error).__name__}: {text[:200]}"


@contextlib.contextmanager
def lone_process_group(device: torch.device, wanted: bool) -> Iterator[None]:
    """Have a process group of this process alone, if wanted and there is none: SyncBN's collectives need one."""
    wanted = wanted and dist.is_available() and not dist.is_initialized()
    if wanted:
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        except Exception as error:  # then the cases that need it say so
            print(f"no process group: {brief(error)}", file=sys.stderr)
    try:
        yield
    finally:
        if wanted and dist.is_initialized():
            dist.destroy_process_group()
