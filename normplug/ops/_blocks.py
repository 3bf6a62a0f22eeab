"""Cutting an input into blocks that stay in a CPU's cache while several operations pass over them."""

from collections.abc import Iterator

from torch import Tensor

__all__ = ["Block", "blocks", "planes", "row_blocks", "sample_blocks"]

# Elements per block. Five float32 blocks of this size fit the L2 caches of two cores; half of it and the cost of
# the calls shows, ten times as much and every operation goes to memory again.
BLOCK = 1 << 17

Block = tuple[slice, slice]


def planes(x: Tensor) -> Tensor:
    """View x (N, C, *) as (N, C, P) in its own layout; copies what is neither contiguous nor channels-last."""
    n, c = x.shape[:2]
    return x.reshape(n, c, x.shape[2:].numel())


def blocks(x: Tensor, group: int = 1) -> Iterator[Block]:
    """Yield slices of the first two axes of x (N, C, P) that cover it: whole samples, or whole groups of one.

    Only a CPU gains by blocks; elsewhere all of x is one. Channels-last samples are not split.

    Args:
        x: The planes, see above.
        group: Number of neighbouring channels that stay together.
    """
    n, c, p = x.shape
    if x.numel() == 0:
        return
    if not x.is_cpu:
        yield slice(0, n), slice(0, c)
        return
    if c * p <= BLOCK or x.stride(2) != 1:
        step = max(1, BLOCK // (c * p))
        for i in range(0, n, step):
            yield slice(i, i + step), slice(0, c)
        return
    step = max(1, BLOCK // (group * p)) * group
    for i in range(n):
        for j in range(0, c, step):
            yield slice(i, i + 1), slice(j, j + step)


def sample_blocks(x: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Yield slices of the first axis of x (N, P, C), each with slices of the second that cover it: for sums over P.

    One slice of the second axis covers it where a sample fits a block.
    """
    n, p, c = x.shape
    if x.numel() == 0:
        return
    samples, length = (max(1, BLOCK // (p * c)), max(1, BLOCK // c)) if x.is_cpu else (n, p)
    parts = [slice(j, j + length) for j in range(0, p, length)]
    for i in range(0, n, samples):
        yield slice(i, i + samples), parts


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Yield slices of the first axis of x (O, I) that cover it."""
    step = max(1, BLOCK // x.shape[1]) if x.is_cpu else len(x)
    for i in range(0, len(x), step):
        yield slice(i, i + step)
