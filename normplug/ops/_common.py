"""What every op needs: the dtype of its sums, dense inputs, views per channel, fused activations, its kernel."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import CustomOpDef

__all__ = [
    "ACTIVATIONS",
    "RELU_OF_OUTPUT",
    "acc_dtype",
    "activate",
    "activation_grad",
    "check_act",
    "dense",
    "for_backward",
    "per_channel",
    "use_kernel",
    "with_plain_strides",
]


def acc_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of statistics and sums over x: float32, or float64 for a float64 x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dense(x: Tensor) -> Tensor:
    """Return x itself if it is contiguous or channels-last, else a copy that is one of the two."""
    if x.is_contiguous():
        return x
    if is_channels_last(x):
        return with_plain_strides(x)
    # A slice of a channels-last tensor stays channels-last: the layout follows the strides it has.
    return x.clone(memory_format=torch.preserve_format).contiguous(memory_format=layout(x))


def layout(x: Tensor) -> torch.memory_format:
    """Return the memory format that the strides of x are nearest to."""
    if x.ndim in (4, 5) and x.shape[1] > 1 and x.stride(1) == 1:
        return torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """Tell whether x is dense with its channels innermost, and not contiguous at the same time."""
    if x.ndim not in (4, 5) or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def with_plain_strides(x: Tensor) -> Tensor:
    """Return a contiguous or channels-last x (N, C, *) with axes of length 1 that have that layout's strides: a view.

    They may have any, and torch then takes one layout for the other. What has neither layout is returned as it is.
    """
    if 1 not in x.shape:
        return x
    if x.is_contiguous():
        return (
            x if _has_strides(x, range(x.ndim - 1, -1, -1)) else x.view(-1).view(x.shape)
        )  # a view writes strides anew
    last = x.movedim(1, -1)
    if not last.is_contiguous() or _has_strides(x, (1, *range(x.ndim - 1, 1, -1), 0)):
        return x
    return last.view(last.shape).movedim(-1, 1)


def _has_strides(x: Tensor, axes: Iterable[int]) -> bool:
    """Tell whether x has the strides of a tensor that lies densely in memory, with the first of the axes innermost."""
    step = 1
    for axis in axes:
        if x.stride(axis) != step:
            return False
        step *= x.shape[axis]
    return True


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View v (C,) so that it broadcasts along axis 1 of x (N, C, *)."""
    return v.view(1, -1, *[1] * (x.ndim - 2))


def _silu_grad(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _gelu_grad(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * torch.exp(-0.5 * z * z) * 0.3989422804014327


# name -> (function, derivative), both of the value before the activation
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (F.relu, lambda z: (z > 0).to(z.dtype)),
    "leaky_relu": (lambda z: F.leaky_relu(z, 0.01), lambda z: torch.where(z > 0, torch.ones_like(z), 0.01)),
    "silu": (F.silu, _silu_grad),
    "gelu": (F.gelu, _gelu_grad),
}


# Backward of ReLU from what it returned: its sign says the same as that of what it met, which need not be found again.
RELU_OF_OUTPUT = "relu_of_output"


def check_act(act: str | None) -> None:
    """Raise ValueError if act names no fused activation."""
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(
            f"act={act!r} is no activation that a norm layer can apply. Use one of {sorted(ACTIVATIONS)}, or "
            f"act=None and a separate activation module behind the layer."
        )


def activate(z: Tensor, act: str | None) -> Tensor:
    """Return the activation of z, or z itself without one."""
    return z if act is None else ACTIVATIONS[act][0](z)


def for_backward(act: str | None, residual: Tensor | None, y: Tensor) -> tuple[str | None, Tensor | None]:
    """Return what backward takes as activation and residual: for ReLU the output, which the next layer keeps anyway."""
    if act == "relu" and residual is not None:
        return RELU_OF_OUTPUT, y
    return act, None if act is None else residual


def activation_grad(dy: Tensor, z: Tensor, act: str | None) -> Tensor:
    """Return dy times the derivative of the activation at z (for ``RELU_OF_OUTPUT`` at what gave z)."""
    if act is None:
        return dy
    if act in (
        "relu",
        RELU_OF_OUTPUT,
    ):  # by far the most common: one pass without a mask, and masked_fill forgets channels-last
        return torch.ops.aten.threshold_backward(dy, z, 0)
    return dy * ACTIVATIONS[act][1](z)


def use_kernel(op: CustomOpDef, reference: Callable[..., Any], kernel: str) -> None:
    """Let an op run a Triton kernel on CUDA, for half and single precision; double precision stays with ATen.

    Args:
        op: What ``torch.library.custom_op`` returned.
        reference: Its implementation for every device.
        kernel: File and function in ``normplug.kernels`` with the arguments and results of the reference,
            "group_norm.forward". Imported on first use: CPU-only machines need no Triton.
    """
    file, function = kernel.split(".")

    @op.register_kernel("cuda")
    def launch(*args):
        x = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if acc_dtype(x) == torch.float64 or not has_triton():
            return reference(*args)
        with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
            return getattr(importlib.import_module(f"normplug.kernels.{file}"), function)(*args)


@functools.cache
def has_triton() -> bool:
    """Tell whether Triton is installed: it comes with torch on Linux, elsewhere ATen does its work."""
    return importlib.util.find_spec("triton") is not None
