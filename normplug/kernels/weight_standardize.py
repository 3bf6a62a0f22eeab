"""Triton kernels of weight_standardize: the filters of any number of weights in one launch.

A filter is contiguous memory in either layout, so that nothing here depends on the layout. A program does one filter,
or neighbours of one weight where they are small: 64 values alone would not keep it busy. Where there are several
weights two tables lead it to its filters: the addresses of the tensors, new in every call, and the parts, which depend
on the shapes only. Neither needs memory of the host when a CUDA graph that was captured is replayed.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from normplug.kernels._launch import Step, planned, stream_of

__all__ = ["backward", "backward_many", "forward", "forward_many"]

# Blocks that hold a filter, each for the filters that fit in no smaller one; up to TILE as many filters as fill it.
# They stay in registers. Longer filters, and those that do not start on 16 bytes, are read again for every pass.
SMALL, MIDDLE, TILE, LARGE = 512, 2048, 4096, 8192
CHUNK = 1024
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _load(ptr, offs, mask, mean):
    """Load values less their mean, and 0 behind the end."""
    return tl.where(mask, tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32) - mean, 0.0)


@triton.jit
def _quotient(total, count):
    return tl.div_rn(total, count.to(tl.float32))  # rounded once: a GPU's "/" errs by up to two units


@triton.jit
def _divisor(std, eps, INSIDE: tl.constexpr):
    return tl.sqrt_rn(std * std + eps) if INSIDE else std + eps


@triton.jit
def _slopes(sum_g, sum_d, sum_gd, std, size, eps, CORRECTION: tl.constexpr, INSIDE: tl.constexpr):
    """Return a, b, c and e of dw = (g - a) * b - (d - c) * e, see ``reference_backward``."""
    divisor = _divisor(std, eps, INSIDE)
    shift = _quotient(sum_d, size)  # what the mean lost when it was rounded: much, where it is large
    root = divisor if INSIDE else tl.where(std == 0, 1.0, std)  # equal values: d is 0, and so are the sums with it
    slope = tl.div_rn(sum_gd - shift * sum_g, root) / (divisor * divisor * (size - CORRECTION))
    return _quotient(sum_g, size), tl.div_rn(1.0, divisor), shift, slope


@triton.jit
def _tile(
    grad, weight, out, row, rows, size, mean_ptr, std_ptr, eps, BACKWARD: tl.constexpr, CORRECTION: tl.constexpr,
    INSIDE: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Do up to ROWS filters of at most BLOCK values, from 16 bytes to 16 bytes: everything is read once."""
    size = size // VECTOR * VECTOR  # the same number, but now the compiler sees that the mask ends with a vector
    start = row.to(tl.int64) * size
    ptr: tl.constexpr = tl.pointer_type(DTYPE)
    w_ptr, out_ptr = tl.multiple_of(weight.to(ptr), 16) + start, tl.multiple_of(out.to(ptr), 16) + start
    r = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    offs = r * size + cols
    mask = (r < rows) & (cols < size)
    if BACKWARD:
        g_ptr = tl.multiple_of(grad.to(ptr), 16) + start
        mean, std = tl.load(mean_ptr + r, mask=r < rows, other=0.0), tl.load(std_ptr + r, mask=r < rows, other=1.0)
        g, d = _load(g_ptr, offs, mask, 0.0), _load(w_ptr, offs, mask, mean)
        sum_g, sum_d = tl.sum(g, axis=1, keep_dims=True), tl.sum(d, axis=1, keep_dims=True)
        sum_gd = tl.sum(g * d, axis=1, keep_dims=True)
        a, b, c, e = _slopes(sum_g, sum_d, sum_gd, std, size, eps, CORRECTION, INSIDE)
        y = (g - a) * b - (d - c) * e
    else:
        # Less its first value, a filter has a mean near 0: no digit of it is lost, and equal values come out as 0.
        first = tl.load(w_ptr + r * size, mask=r < rows, other=0.0).to(tl.float32)
        d = _load(w_ptr, offs, mask, first)
        shift = _quotient(tl.sum(d, axis=1, keep_dims=True), size)
        d = tl.where(mask, d - shift, 0.0)
        std = tl.sqrt_rn(_quotient(tl.sum(d * d, axis=1, keep_dims=True), size - CORRECTION))
        y = d * tl.div_rn(1.0, _divisor(std, eps, INSIDE))
        tl.store(mean_ptr + r, first + shift, mask=r < rows)
        tl.store(std_ptr + r, std, mask=r < rows)
    tl.store(out_ptr + offs, y.to(DTYPE), mask=mask)


@triton.jit
def _long_row(
    grad, weight, out, row, size, mean_ptr, std_ptr, eps, BACKWARD: tl.constexpr, CORRECTION: tl.constexpr,
    INSIDE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Do a filter of any size at any address."""
    start = row.to(tl.int64) * size
    ptr: tl.constexpr = tl.pointer_type(DTYPE)
    w_ptr, out_ptr = weight.to(ptr) + start, out.to(ptr) + start
    sum_d = tl.zeros((BLOCK,), tl.float32)
    if BACKWARD:
        g_ptr = grad.to(ptr) + start
        mean, std = tl.load(mean_ptr), tl.load(std_ptr)
        sum_g, sum_gd = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, size, BLOCK):
            offs = begin + tl.arange(0, BLOCK)
            g, d = _load(g_ptr, offs, offs < size, 0.0), _load(w_ptr, offs, offs < size, mean)
            sum_g += g
            sum_d += d
            sum_gd += g * d
        a, b, c, e = _slopes(tl.sum(sum_g), tl.sum(sum_d), tl.sum(sum_gd), std, size, eps, CORRECTION, INSIDE)
        for begin in range(0, size, BLOCK):
            offs = begin + tl.arange(0, BLOCK)
            g, d = _load(g_ptr, offs, offs < size, 0.0), _load(w_ptr, offs, offs < size, mean)
            tl.store(out_ptr + offs, ((g - a) * b - (d - c) * e).to(DTYPE), mask=offs < size)
    else:
        first = tl.load(w_ptr).to(tl.float32)
        for begin in range(0, size, BLOCK):
            offs = begin + tl.arange(0, BLOCK)
            sum_d += _load(w_ptr, offs, offs < size, first)
        shift = _quotient(tl.sum(sum_d), size)
        squares = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, size, BLOCK):
            offs = begin + tl.arange(0, BLOCK)
            d = tl.where(offs < size, _load(w_ptr, offs, offs < size, first) - shift, 0.0)
            squares += d * d
        std = tl.sqrt_rn(_quotient(tl.sum(squares), size - CORRECTION))
        rstd = tl.div_rn(1.0, _divisor(std, eps, INSIDE))
        for begin in range(0, size, BLOCK):
            offs = begin + tl.arange(0, BLOCK)
            d = _load(w_ptr, offs, offs < size, first) - shift
            tl.store(out_ptr + offs, (d * rstd).to(DTYPE), mask=offs < size)
        tl.store(mean_ptr, first + shift)
        tl.store(std_ptr, std)


@triton.jit
def _filters(
    grad, weight, out, row, rows, size, mean, std, eps, BACK: tl.constexpr, CORR: tl.constexpr, INSIDE: tl.constexpr,
    DTYPE: tl.constexpr, SMALL: tl.constexpr, MIDDLE: tl.constexpr, TILE: tl.constexpr, LARGE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Do a few neighbouring filters of a weight, given by addresses; mean and std point to those of the first."""
    V: tl.constexpr = 128 // DTYPE.primitive_bitwidth  # values in 16 bytes
    aligned = ((grad | weight | out) % 16 == 0) & (size % V == 0)
    if aligned & (size <= SMALL):
        _tile(grad, weight, out, row, rows, size, mean, std, eps, BACK, CORR, INSIDE, DTYPE, TILE // SMALL, SMALL, V)
    elif aligned & (size <= MIDDLE):
        _tile(grad, weight, out, row, rows, size, mean, std, eps, BACK, CORR, INSIDE, DTYPE, TILE // MIDDLE, MIDDLE, V)
    elif aligned & (size <= TILE):
        _tile(grad, weight, out, row, rows, size, mean, std, eps, BACK, CORR, INSIDE, DTYPE, 1, TILE, V)
    elif aligned & (size <= LARGE):
        _tile(grad, weight, out, row, rows, size, mean, std, eps, BACK, CORR, INSIDE, DTYPE, 1, LARGE, V)
    else:
        for i in range(rows):
            _long_row(grad, weight, out, row + i, size, mean + i, std + i, eps, BACK, CORR, INSIDE, DTYPE, CHUNK)


@triton.jit
def _standardize(
    address_ptr, part_ptr, mean_ptr, std_ptr, eps, BACK: tl.constexpr, CORR: tl.constexpr, INSIDE: tl.constexpr,
    DTYPE: tl.constexpr, SMALL: tl.constexpr, MIDDLE: tl.constexpr, TILE: tl.constexpr, LARGE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    part = part_ptr + tl.program_id(0) * 5
    address = address_ptr + tl.load(part) * 3
    row, rows, rank, size = tl.load(part + 1), tl.load(part + 2), tl.load(part + 3), tl.load(part + 4)
    grad, weight, out = tl.load(address), tl.load(address + 1), tl.load(address + 2)
    _filters(
        grad, weight, out, row, rows, size, mean_ptr + rank, std_ptr + rank, eps, BACK, CORR, INSIDE,
        DTYPE, SMALL, MIDDLE, TILE, LARGE, CHUNK,
    )  # fmt: skip


# Sizes are not specialized: what is compiled once does every weight that starts on 16 bytes, see `_start_one`.
@triton.jit(do_not_specialize=["count", "size", "step"], do_not_specialize_on_alignment=["mean_ptr", "std_ptr"])
def _standardize_one(
    grad_ptr, weight_ptr, out_ptr, mean_ptr, std_ptr, count, size, step, eps,
    BACK: tl.constexpr, CORR: tl.constexpr, INSIDE: tl.constexpr,
    DTYPE: tl.constexpr, SMALL: tl.constexpr, MIDDLE: tl.constexpr, TILE: tl.constexpr, LARGE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * step
    _filters(
        grad_ptr.to(tl.int64), weight_ptr.to(tl.int64), out_ptr.to(tl.int64), row, tl.minimum(step, count - row), size,
        mean_ptr + row, std_ptr + row, eps, BACK, CORR, INSIDE, DTYPE, SMALL, MIDDLE, TILE, LARGE, CHUNK,
    )  # fmt: skip


def _step(size: int, small: int, middle: int, tile: int) -> int:
    """Return how many filters of a size a program does."""
    return tile // small if size <= small else tile // middle if size <= middle else 1


@functools.lru_cache(256)  # as many models, and parts of them that had gradients
def _parts(shapes: tuple[tuple[int, int], ...], small: int, middle: int, tile: int, device: torch.device) -> Tensor:
    """Return a row for each program: weight, first filter, number of filters, first among all, and their size.

    Args:
        shapes: Number of filters and of all values of each weight.
        small: See SMALL, as the next two.
        middle: See MIDDLE.
        tile: See TILE.
        device: Where the table is kept.

    Raises:
        RuntimeError: If a CUDA graph is being captured: a table cannot be made then.
    """
    if _is_capturing(device):
        raise RuntimeError(
            f"weight_standardize_many meets a set of {len(shapes)} weights for the first time while a CUDA graph is "
            f"captured. Run the same forward and backward pass once before the capture, as its warm-up."
        )
    parts, rank = [], 0
    for index, (count, values) in enumerate(shapes):
        size = values // max(count, 1)
        step = _step(size, small, middle, tile)
        parts += [(index, row, min(step, count - row), rank + row, size) for row in range(0, count, step)]
        rank += count
    parts.sort(key=lambda part: -part[-1])  # the longest filters first, so that none is started last
    table = torch.tensor(parts, dtype=torch.int32, device="cpu").view(-1, 5)
    if device.type != "cuda":
        return table.to(device)
    # Another thread, since this one may be warming up a graph: all that it allocates then is the graph's to reuse.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(table.to, device).result()


_captured: dict[int, Tensor] = {}  # tables of parts that graphs may read whenever they are replayed


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _addresses(columns: list[list[Tensor]], device: torch.device) -> Tensor:
    """Return the addresses of the tensors of each weight side by side."""
    addresses = [t.data_ptr() for tensors in zip(*columns, strict=True) for t in tensors]
    if _is_capturing(device):  # a copy would be repeated with what the host's memory holds by then
        table = torch.zeros(len(addresses), dtype=torch.int64, device=device)
        torch._foreach_add_(table.unbind(), addresses)  # as arguments of a kernel, which the graph keeps
        return table
    table = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)  # from pinned memory: no wait for the GPU


@planned
def _plan(
    kernel: Any, programs: int, numbers: tuple[float, ...], dtype: torch.dtype, backward: bool, correction: int,
    eps_inside: bool, _device: int,
) -> Step:  # fmt: skip
    constants = {
        "BACK": backward, "CORR": correction, "INSIDE": eps_inside, "DTYPE": DTYPES[dtype],
        "SMALL": SMALL, "MIDDLE": MIDDLE, "TILE": TILE, "LARGE": LARGE, "CHUNK": CHUNK,
    }  # fmt: skip
    return Step(kernel, programs, numbers, constants)


def _start_one(
    grad: Tensor, weight: Tensor, out: Tensor, mean: Tensor, std: Tensor, backward: bool,
    eps: float, correction: int, eps_inside: bool,
) -> None:  # fmt: skip
    count, device = len(weight), weight.get_device()
    if count == 0:
        return
    if (grad.data_ptr() | weight.data_ptr() | out.data_ptr()) % 16:  # the kernel of tables finds out by itself
        _start_many([grad], [weight], [out], mean, std, backward, eps, correction, eps_inside)
        return
    size = weight.numel() // count
    step = _step(size, SMALL, MIDDLE, TILE)
    numbers, form = (count, size, step, eps), (backward, correction, eps_inside)
    start = _plan(_standardize_one, -(-count // step), numbers, weight.dtype, *form, device)
    start(stream_of(device), grad, weight, out, mean, std)


def _start_many(
    grads: list[Tensor], weights: list[Tensor], outs: list[Tensor], mean: Tensor, std: Tensor, backward: bool,
    eps: float, correction: int, eps_inside: bool,
) -> None:  # fmt: skip
    first = weights[0]
    if any(w.dtype != first.dtype or w.device != first.device for w in weights):
        raise ValueError(
            f"weight_standardize_many takes weights of one dtype and device, but got "
            f"{sorted({f'{w.dtype} on {w.device}' for w in weights})}. Call it once for each."
        )
    parts = _parts(tuple((len(w), w.numel()) for w in weights), SMALL, MIDDLE, TILE, first.device)
    if _is_capturing(first.device):
        _captured[id(parts)] = parts
    if len(parts) > 0:
        device, form = first.get_device(), (backward, correction, eps_inside)
        start = _plan(_standardize, len(parts), (eps,), first.dtype, *form, device)
        start(stream_of(device), _addresses([grads, weights, outs], first.device), parts, mean, std)


def _like(grad: Tensor, weight: Tensor) -> Tensor:
    """Return a gradient that lies in memory as the weight does: itself, or a copy."""
    if grad.dtype == weight.dtype and grad.stride() == weight.stride():
        return grad
    layouts = zip(grad.stride(), weight.stride(), weight.shape, strict=True)
    if grad.dtype == weight.dtype and all(g == w or size == 1 for g, w, size in layouts):
        return grad
    return torch.empty_like(weight).copy_(grad)


def forward_many(
    weights: list[Tensor], eps: float, correction: int, eps_inside: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return what ``reference_many`` returns: results, mean and std."""
    outs = [torch.empty_like(w) for w in weights]
    mean = torch.empty(sum(map(len, weights)), 1, dtype=torch.float32, device=weights[0].device)
    std = torch.empty_like(mean)
    _start_many(weights, weights, outs, mean, std, False, eps, correction, eps_inside)
    return outs, mean, std


def backward_many(
    grads: list[Tensor], weights: list[Tensor], mean: Tensor, std: Tensor, eps: float, correction: int,
    eps_inside: bool,
) -> list[Tensor]:  # fmt: skip
    """Return what ``reference_many_backward`` returns: the gradient of each weight."""
    outs = [torch.empty_like(w) for w in weights]
    grads = [_like(g, w) for g, w in zip(grads, weights, strict=True)]
    _start_many(grads, weights, outs, mean, std, True, eps, correction, eps_inside)
    return outs


def forward(weight: Tensor, eps: float, correction: int, eps_inside: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``reference`` returns."""
    out = torch.empty_like(weight)
    mean = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
    std = torch.empty_like(mean)
    _start_one(weight, weight, out, mean, std, False, eps, correction, eps_inside)
    return out, mean, std


def backward(
    grad: Tensor, weight: Tensor, mean: Tensor, std: Tensor, eps: float, correction: int, eps_inside: bool
) -> Tensor:
    """Return what ``reference_backward`` returns."""
    out = torch.empty_like(weight)
    _start_one(_like(grad, weight), weight, out, mean, std, True, eps, correction, eps_inside)
    return out
