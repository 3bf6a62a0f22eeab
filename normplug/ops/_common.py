"""What every op needs: the dtype of its sums, dense inputs, views per channel, fused activations."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "RELU_OF_OUTPUT",
    "acc_dtype",
    "activate",
    "activation_grad",
    "add_and_activate",
    "affine",
    "as_parameter",
    "check_act",
    "check_groups",
    "check_parameters",
    "check_residual",
    "check_tensor",
    "dense",
    "for_backward",
    "per_channel",
    "recalled_bias",
    "recalled_residual",
    "with_plain_strides",
]


# What every op computes with; there are sums and kernels for no other kind of number.
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def check_tensor(name: str, x: Any, argument: str = "input") -> None:
    """Raise TypeError, in the name of an op or layer, if x is no dense floating-point tensor."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPES or x.layout is not torch.strided or x.is_nested:
        kind, remedy = _kind_and_remedy(x)
        raise TypeError(
            f"{name} takes a dense tensor of float16, bfloat16, float32 or float64 as {argument}, but got {kind}. "
            f"{remedy}"
        )


def _kind_and_remedy(x: Any) -> tuple[str, str]:
    """Say what x is, and how to make a dense floating-point tensor of it."""
    if isinstance(x, (list, tuple)) and any(isinstance(part, Tensor) for part in x):
        return f"a {type(x).__name__} of {len(x)} elements", "Call it once for each tensor, or join them by torch.cat."
    if x is None:
        return "None", "What computes it returned nothing: look for a missing return, or leave the call out."
    if type(x).__name__ == "Proxy":
        return (
            "a Proxy of torch.fx",
            "Let the tracer take the call as a whole: Tracer.is_leaf_module, or torch.fx.wrap.",
        )
    if not isinstance(x, Tensor):
        return f"{type(x).__name__}", "Make a tensor of it first: torch.as_tensor(x, dtype=torch.float32)."
    if x.is_nested:
        return "a nested tensor", "Pad it (torch.nested.to_padded_tensor), or call it for each tensor of x.unbind()."
    if x.is_quantized:
        return f"a quantized tensor ({x.dtype})", "Call x.dequantize() before."
    if x.layout is not torch.strided:
        return f"a tensor of layout {x.layout}", "Call x.to_dense() before."
    kind = f"a {tuple(x.shape)} tensor of {x.dtype}"
    if x.is_complex():
        return kind, "Normalize real and imaginary part apart: x.real and x.imag."
    return kind, "Convert it before, for example by x.float()."


def check_residual(name: str, x: Tensor, residual: Tensor | None) -> None:
    """Raise TypeError or ValueError if residual cannot be added to an output of the shape of x."""
    if residual is None:
        return
    check_tensor(name, residual, "residual")
    if residual.get_device() != x.get_device():
        raise ValueError(
            f"{name} got a residual on {residual.device} and an input on {x.device}. Move one to the other."
        )
    if residual.shape != x.shape:
        raise ValueError(
            f"{name} adds a residual of the input's own shape {tuple(x.shape)}, but got "
            f"{tuple(residual.shape)}. Project the shortcut to that shape first."
        )


def check_parameters(name: str, x: Tensor, **parameters: Tensor | None) -> None:
    """Raise TypeError or ValueError if x (N, C, *) has no channel axis, or one of the others, if given, is not (C,)."""
    check_tensor(name, x)
    if x.ndim < 2:
        raise ValueError(
            f"{name} expects an input of shape (N, C, *), but got {tuple(x.shape)}. Add the missing axes by unsqueeze."
        )
    # A length that is traced is a tensor, neither True nor False, and whoever asks it for its value is warned.
    channels, device = x.shape[1], x.get_device()
    for parameter, value in parameters.items():
        if value is None:
            continue
        is_one = isinstance(value, Tensor) and value.dtype in DTYPES and value.ndim == 1
        if is_one and (value.shape[0] == channels) is not False:
            if value.get_device() == device:
                continue
            raise ValueError(
                f"{name} got {parameter} on {value.device} and an input on {x.device}. Move the layer to the input's "
                f"device, layer.to({str(x.device)!r}), or the input to the layer's."
            )
        check_tensor(name, value, parameter)
        raise ValueError(
            f"{name} takes one value of {parameter} per channel, but got {tuple(value.shape)} for an input of "
            f"shape {tuple(x.shape)}. Give a tensor of shape ({x.shape[1]},); channels sit on axis 1."
        )


def check_groups(name: str, x: Tensor, num_groups: int) -> None:
    """Raise ValueError if num_groups does not divide the channels of x (N, C, *)."""
    if not isinstance(num_groups, int) or isinstance(num_groups, bool):
        raise ValueError(f"{name} takes an integer as num_groups, but got {num_groups!r}. Give one, for example 32.")
    if num_groups < 1 or (x.shape[1] % num_groups == 0) is False:
        raise ValueError(
            f"{name} cannot split C={x.shape[1]} channels into num_groups={num_groups} equal groups. "
            f"Use a number of groups that divides {x.shape[1]}."
        )


class _Wide(dict):
    """Refuses what is no real number: of a complex one a cast would leave the real part."""

    def __missing__(self, dtype: torch.dtype) -> torch.dtype:
        raise TypeError(f"normplug computes with float16, bfloat16, float32 and float64, but got a tensor of {dtype}.")


_WIDE = _Wide({dtype: torch.float64 if dtype == torch.float64 else torch.float32 for dtype in DTYPES})


def acc_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of statistics and sums over x: float32, or float64 for a float64 x.

    Where squares of x, or their sum, pass its largest number, a norm returns 0 or NaN, as torch's own do.
    """
    return _WIDE[x.dtype]


def as_parameter(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    """Return a parameter's gradient in its dtype, None for none."""
    if parameter is None or gradient.dtype is parameter.dtype:
        return None if parameter is None else gradient
    return gradient.to(parameter.dtype)


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


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return x (N, C, *) scaled and shifted per channel, in the dtype of x."""
    if weight is not None:
        x = x * per_channel(weight.to(x.dtype), x)
    return x if bias is None else x + per_channel(bias.to(x.dtype), x)


_aten = torch.ops.aten
# name -> (function, gradient of its argument z from that of its result): one pass, in the precision and layout of z
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (F.relu, lambda dy, z: _aten.threshold_backward(dy, z, 0)),
    "leaky_relu": (lambda z: F.leaky_relu(z, 0.01), lambda dy, z: _aten.leaky_relu_backward(dy, z, 0.01, False)),
    "silu": (F.silu, _aten.silu_backward),
    "gelu": (F.gelu, _aten.gelu_backward),
}


# Backward of ReLU from what it returned: its sign says the same as that of what it met, which need not be found again.
RELU_OF_OUTPUT = "relu_of_output"


def check_act(act: str | None) -> None:
    """Raise ValueError if act names no fused activation."""
    if act is not None and not (isinstance(act, str) and act in ACTIVATIONS):
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


def recalled_bias(ctx: Any, like: Tensor) -> Tensor | None:
    """Return what stands for a bias in a formula, which was not kept: zeros of its dtype, or None for none."""
    return None if ctx.bias_dtype is None else torch.zeros_like(like, dtype=ctx.bias_dtype, requires_grad=True)


def recalled_residual(ctx: Any, x: Tensor, kept: Tensor | None) -> Tensor | None:
    """Return what stands for a residual in a formula: what was kept, or zeros if it was the last thing added."""
    if kept is not None or not ctx.has_residual:
        return kept
    return x.new_zeros(()).expand(x.shape).requires_grad_()


def activation_grad(dy: Tensor, z: Tensor, act: str | None) -> Tensor:
    """Return the gradient of z from that of its activation (for ``RELU_OF_OUTPUT`` z is what the activation gave)."""
    if act is None:
        return dy
    return ACTIVATIONS["relu" if act == RELU_OF_OUTPUT else act][1](dy, z)


def add_and_activate(z: Tensor, act: str | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return act(z + residual) in a dtype: how formulas end.

    With ``RELU_OF_OUTPUT``, and what ReLU gave in the residual's place, only the derivatives are those of ReLU.
    """
    if residual is not None:
        z = z + residual
        if act == RELU_OF_OUTPUT:
            return torch.where(residual.detach() > 0, z, 0).to(dtype)
    return activate(z, act).to(dtype)
