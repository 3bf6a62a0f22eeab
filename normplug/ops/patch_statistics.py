"""How mean and variance of a convolution's output move with its weight: closed forms, without autograd.

An output value is the product of a filter w with the patch p of the input that it sees, y = <w, p> + b. Over all
positions and samples, with P = mean(p), therefore

    d mean(y) / dw = P             (of the input alone: the same for all filters of a convolution group)
    d var(y) / dw = 2 * mean((y - mean(y)) * p) = 2 * mean(y * p) - 2 * mean(y) * P

The first is a few sums of the input, the second costs what the convolution's weight gradient costs.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from normplug.ops._common import acc_dtype
from normplug.ops._registration import define, without_gradient

__all__ = ["filter_products", "patch_statistics"]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def patch_statistics(
    x: Tensor,
    y: Tensor,
    y_mean: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str = "zeros",
) -> tuple[Tensor, Tensor]:
    """Return the derivatives of mean and population variance of y = conv(x) with respect to the filters.

    Args:
        x: Input of the convolution (N, C_in, *), one to three spatial axes.
        y: Its output (N, C, *); a bias does not matter.
        y_mean: Mean of y per channel (C,).
        kernel_size: One number per spatial axis, as are stride and dilation.
        stride: See nn.Conv2d.
        padding: Two numbers per spatial axis: before and after.
        dilation: See nn.Conv2d.
        groups: See nn.Conv2d.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.

    Returns:
        The mean's derivative (groups, C_in / groups, *kernel_size), one filter for all C / groups channels of a
        group, and the variance's (C, C_in / groups, *kernel_size); float32, or float64 for a float64 x.
    """
    return _call(x, y, y_mean, list(kernel_size), list(stride), list(padding), list(dilation), groups, padding_mode)


def filter_products(weight: Tensor, mean_grads: Sequence[Tensor], var_grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the products (entries, C) of each filter of weight with its two derivatives, entry by entry.

    Args:
        weight: Filters (C, C_in / groups, *).
        mean_grads: Per entry, as from ``patch_statistics``: (groups, C_in / groups, *).
        var_grads: Per entry (C, C_in / groups, *).
    """
    return _call_products(weight, list(mean_grads), list(var_grads))


@functools.lru_cache(maxsize=1024)
def _visits(
    length: int,
    kernel: int,
    stride: int,
    before: int,
    after: int,
    dilation: int,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return (length, kernel): how often each kernel offset meets each position of an axis of the input."""
    outputs = (length + before + after - dilation * (kernel - 1) - 1) // stride + 1
    at = (torch.arange(outputs) * stride)[:, None] + torch.arange(kernel) * dilation - before
    if mode == "reflect":
        at = at.abs()
        at = torch.where(at < length, at, 2 * (length - 1) - at)
    elif mode == "replicate":
        at = at.clamp(0, length - 1)
    elif mode == "circular":
        at = at % length
    inside = (at >= 0) & (at < length)
    counts = torch.zeros(length, kernel, dtype=dtype)
    counts.scatter_add_(0, at.clamp(0, length - 1), inside.to(dtype))
    return counts.to(device)


def reference(
    x: Tensor,
    y: Tensor,
    y_mean: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_mode: str,
) -> tuple[Tensor, Tensor]:
    """Map input and output of a convolution to the derivatives of the output's mean and variance."""
    axes, wide_dtype = len(kernel_size), acc_dtype(x)
    x, y = x.to(wide_dtype), y.to(wide_dtype)
    channels, count = y.shape[1], y.numel() // y.shape[1]
    sums = x.sum(0)
    for axis in range(axes):  # each turn contracts the first spatial axis left and appends its kernel axis
        visits = _visits(
            x.shape[2 + axis],
            kernel_size[axis],
            stride[axis],
            padding[2 * axis],
            padding[2 * axis + 1],
            dilation[axis],
            padding_mode,
            wide_dtype,
            x.device,
        )
        sums = torch.tensordot(sums, visits, ([1], [0]))
    mean_grad = (sums / count).unflatten(0, (groups, -1))

    before, after = padding[::2], padding[1::2]
    if padding_mode != "zeros" or before != after:
        both = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
        x = F.pad(x, both, "constant" if padding_mode == "zeros" else padding_mode)
        before = [0] * axes
    shape = (channels, x.shape[1] // groups, *kernel_size)
    weight = x.new_empty(1).expand(shape)  # only its shape is looked at
    _, var_grad, _ = torch.ops.aten.convolution_backward(
        y, x, weight, None, stride, before, dilation, False, [0] * axes, groups, [False, True, False]
    )
    var_grad = var_grad.contiguous().mul_(2 / count)
    by_group = var_grad.unflatten(0, (groups, -1))
    by_group.addcmul_(y_mean.to(wide_dtype).view(groups, -1, *[1] * (axes + 1)), mean_grad.unsqueeze(1), value=-2)
    return mean_grad, var_grad


def _fake(x, y, y_mean, kernel_size, stride, padding, dilation, groups, padding_mode):
    dtype, inputs = acc_dtype(x), x.shape[1] // groups
    mean_grad = x.new_empty(groups, inputs, *kernel_size, dtype=dtype)
    return mean_grad, x.new_empty(y.shape[1], inputs, *kernel_size, dtype=dtype)


# Its table of visits comes from the host, when a size is met for the first time.
_op = define("patch_statistics", reference, _fake, capturable=False)
_call = without_gradient(_op)


def reference_products(weight: Tensor, mean_grads: list[Tensor], var_grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Map filters and lists of derivatives to the products (entries, C)."""
    # Products and sums, not a matmul: TF32, if switched on, would be coarser than the differences taken of these.
    weight = weight.to(mean_grads[0].dtype)
    rest = list(range(1, weight.ndim))
    by_group = weight.unflatten(0, (len(mean_grads[0]), -1))
    by_mean = [(by_group * grad.unsqueeze(1)).sum([r + 1 for r in rest]).flatten() for grad in mean_grads]
    by_var = [(weight * grad).sum(rest) for grad in var_grads]
    return torch.stack(by_mean), torch.stack(by_var)


def _fake_products(weight, mean_grads, var_grads):
    products = mean_grads[0].new_empty(len(mean_grads), weight.shape[0])
    return products, torch.empty_like(products)


_products_op = define("filter_products", reference_products, _fake_products)
_call_products = without_gradient(_products_op)
