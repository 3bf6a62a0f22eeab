"""Time, memory, copy bandwidth, and the check that a result is right before anybody asks how fast it came.

On CUDA a repetition is timed by two events on the device. Before each, more than the L2 cache holds is read, so that
every input comes from memory, and a batch of repetitions is queued behind a device that sleeps: what is measured is
the time of the kernels without gaps, as in a training step whose Python runs ahead (gaps remain where one batch is more
launches than the driver queues, about a thousand). What Python needs per call is reported beside it ("host"), because
a model of small layers waits for that. On a CPU it is ``time.perf_counter``, with
caches as warm as the repetition before left them. All contenders of a case take turns, in batches.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normplug.bench.cases import Problem, as_list
from normplug.bench.peers import Contender

__all__ = ["Timing", "compare", "copy_bandwidth", "cpu_memory", "errors", "memory", "quantile", "time_in_turns"]

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


def run(contender: Contender, dys: list[Tensor]) -> tuple[Tensor, ...]:
    """One forward and one backward pass; gradients of all leaves."""
    outs = as_list(contender.call())
    return torch.autograd.grad(list(outs), list(contender.leaves.values()), dys)


# --- right or wrong


def errors(problem: Problem, contender: Contender) -> dict[str, float]:
    """Return ‖got - right‖ / ‖right‖ of each output and each gradient, by name; inf where not finite."""
    outs = as_list(contender.call())
    grads = torch.autograd.grad(list(outs), list(contender.leaves.values()), problem.dys)
    got = {f"y{i}": y.detach() for i, y in enumerate(outs)} | dict(zip(contender.leaves, grads, strict=True))
    return {name: _error(got[name], want) for name, want in problem.reference.items()}


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


def time_in_turns(calls: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, Timing]:
    """Time functions in turns, each for about ``seconds`` in all; they have been called before."""
    clock = _cuda_batch if device.type == "cuda" else _cpu_batch
    flush = Flush(device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    hosts: dict[str, list[float]] = {name: [] for name in calls}
    counts = {}
    for name, call in calls.items():
        call()
        times, host = clock(call, 2, 0.0, flush)
        each = max(min(times), 1e-3) / 1e3
        counts[name] = max(3, min(20, int(seconds / ROUNDS / each))), max(host)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            count, host_ms = counts[name]
            times, host = clock(call, count, host_ms, flush)
            samples[name] += times
            hosts[name] += host
    return {name: _timing(samples[name], hosts[name]) for name in calls}


def _timing(samples: list[float], hosts: list[float]) -> Timing:
    return Timing(
        quantile(samples, 0.5), quantile(samples, 0.2), quantile(samples, 0.8), len(samples), quantile(hosts, 0.5)
    )


def quantile(values: list[float], q: float) -> float:
    """Return the q-quantile, between neighbours linearly."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


class Flush:
    """Empties the L2 cache of a GPU by reading four times what it holds; reading leaves nothing to write back."""

    def __init__(self, device: torch.device) -> None:
        self.buffer: Tensor | None = None
        if device.type == "cuda":
            size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
            self.buffer = torch.zeros(size, dtype=torch.float32, device=device)

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.sum()


def _cuda_batch(
    call: Callable[[], object], count: int, host_ms: float, flush: Flush
) -> tuple[list[float], list[float]]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    host = []
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2e6 * min(1.5 * (host_ms + 0.1) * count, 500.0)))  # cycles: about 2 million a millisecond
    for start, end in events:
        flush()
        began = time.perf_counter()
        start.record()
        call()
        end.record()
        host.append((time.perf_counter() - began) * 1e3)
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events], host


def _cpu_batch(
    call: Callable[[], object], count: int, _host_ms: float, _flush: Flush
) -> tuple[list[float], list[float]]:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e3)
    return times, times


def copy_bandwidth(device: torch.device, tensor_bytes: int | None = None) -> float:
    """Return GB/s of a copy from memory to memory, bytes read and written counted."""
    size = tensor_bytes or (1 << 30 if device.type == "cuda" else 1 << 27)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    timing = time_in_turns({"copy": lambda: target.copy_(source)}, device, 0.2)["copy"]
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

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del result
    return peak, now
