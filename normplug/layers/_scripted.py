"""What the layers compute, for TorchScript: it compiles Python's source, and knows neither our ops nor our checks."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "affine",
    "batch_norm",
    "convolution",
    "evonorm_b0",
    "evonorm_s0",
    "filter_response_norm",
    "group_norm",
    "inside_root",
]

# ruff: noqa: UP045  TorchScript of the oldest torch that we take reads Optional[str], and str | None not everywhere


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widened(parameter: Optional[Tensor], x: Tensor) -> Optional[Tensor]:
    """Return a parameter in the dtype of sums over x."""
    if parameter is None:
        return None
    else:
        return parameter.to(wide_dtype(x))


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View v (C,) or (1,), in the dtype of sums over x (N, C, *), so that it broadcasts along axis 1."""
    return v.to(wide_dtype(x)).view([1, -1] + [1] * (x.dim() - 2))


def affine(x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], like: Tensor) -> Tensor:
    """Return weight * x + bias in the dtype of another tensor."""
    if weight is not None:
        x = x * per_channel(weight, x)
    if bias is not None:
        x = x + per_channel(bias, x)
    return x.to(like.dtype)


def finish(z: Tensor, own: Optional[str], act: Optional[str], residual: Optional[Tensor], like: Tensor) -> Tensor:
    """Return act(z + residual), act being that of the call or else the layer's own, in the dtype of another tensor."""
    if residual is not None:
        z = z + residual
    name = own if act is None else act
    if name is not None:
        if name == "relu":
            z = F.relu(z)
        elif name == "leaky_relu":
            z = F.leaky_relu(z, 0.01)
        elif name == "silu":
            z = F.silu(z)
        elif name == "gelu":
            z = F.gelu(z)
        else:
            raise RuntimeError("act is no activation that a norm layer can apply: relu, leaky_relu, silu or gelu")
    return z.to(like.dtype)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
    own: Optional[str],
    act: Optional[str],
    residual: Optional[Tensor],
) -> Tensor:
    wide = x.to(wide_dtype(x)).contiguous()  # of channels-last tensors ATen takes E[x²] - E[x]² on a CPU
    z = torch.group_norm(wide, num_groups, widened(weight, x), widened(bias, x), eps)
    return finish(z, own, act, residual, x)


def batch_norm(
    x: Tensor,
    mean: Optional[Tensor],
    var: Optional[Tensor],
    count: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    momentum: Optional[float],
    eps: float,
    own: Optional[str],
    training: bool,
    act: Optional[str],
    residual: Optional[Tensor],
) -> Tensor:
    factor = 0.0 if momentum is None else momentum
    if training and count is not None:
        count.add_(1)
        if momentum is None:
            factor = 1.0 / float(count)
    by_batch = training or mean is None or var is None
    m, v = widened(mean, x), widened(var, x)
    z = F.batch_norm(x.to(wide_dtype(x)), m, v, widened(weight, x), widened(bias, x), by_batch, factor, eps)
    # Of a half type m and v are copies. Else backward has kept the very buffers, and they must not be written to.
    if training and mean is not None and var is not None and m is not None and v is not None and m.dtype != mean.dtype:
        mean.copy_(m)
        var.copy_(v)
    return finish(z, own, act, residual, x)


def inside_root(var: Optional[Tensor], eps: float, eps_mode: str, x: Tensor) -> tuple[Optional[Tensor], float]:
    """Return a variance and an eps inside the root for which it is √var + eps."""
    wide = widened(var, x)
    if wide is not None and eps_mode == "outside":
        wide, eps = wide + 2 * eps * wide.sqrt(), eps * eps
    return wide, eps


def maps(x: Tensor) -> Tensor:
    """Return x (N, C, *) as (N, C, P), in the dtype of sums over it."""
    return x.to(wide_dtype(x)).reshape(x.size(0), x.size(1), x.flatten(1).size(1) // x.size(1))


def variance(x: Tensor) -> Tensor:
    """Return the population variance of x (N, C, P) over P: (N, C, 1)."""
    return (x - x.mean(2, keepdim=True)).square().mean(2, keepdim=True)


def evonorm_s0(
    x: Tensor, num_groups: int, weight: Optional[Tensor], bias: Optional[Tensor], v: Tensor, eps: float
) -> Tensor:
    x3 = maps(x)
    size = x.size(1) // num_groups
    var = variance(x3.reshape(x.size(0), num_groups, size * x3.size(2)))
    rstd = (var + eps).rsqrt().repeat_interleave(size, 1)
    return affine(x3 * torch.sigmoid(per_channel(v, x3) * x3) * rstd, weight, bias, x).view(x.shape)


def evonorm_b0(
    x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], v: Tensor, batch_var: Tensor, eps: float
) -> Tensor:
    x3 = maps(x)
    std = (variance(x3) + eps).sqrt()
    divisor = torch.maximum((per_channel(batch_var, x3) + eps).sqrt(), per_channel(v, x3) * x3 + std)
    return affine(x3 / divisor, weight, bias, x).view(x.shape)


def filter_response_norm(
    x: Tensor, weight: Tensor, bias: Tensor, tau: Optional[Tensor], eps: float, learned: Optional[Tensor]
) -> Tensor:
    x3 = maps(x)
    square = x3.square().mean(2, keepdim=True) + eps
    if learned is not None:
        square = square + per_channel(learned, x3).abs()
    z = affine(x3 / square.sqrt(), weight, bias, x3)
    if tau is not None:
        z = torch.maximum(z, per_channel(tau, x3))
    return z.to(x.dtype).view(x.shape)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    stride: list[int],
    dilation: list[int],
    groups: int,
    padding: list[int],
    padding_mode: str,
    eps: float,
    correction: int,
    eps_inside: bool,
) -> Tensor:
    """Return the convolution with the standardized weight; padding is that of F.pad, the last axis first."""
    rows = weight.to(wide_dtype(weight)).flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    var = centred.square().sum(1, keepdim=True) / (rows.size(1) - correction)
    divisor = (var + eps).sqrt() if eps_inside else var.sqrt() + eps
    weight = (centred / divisor).to(weight.dtype).view(weight.shape)
    x = F.pad(x, padding, "constant" if padding_mode == "zeros" else padding_mode)
    if len(stride) == 1:
        return F.conv1d(x, weight, bias, stride, [0], dilation, groups)
    elif len(stride) == 2:
        return F.conv2d(x, weight, bias, stride, [0, 0], dilation, groups)
    else:
        return F.conv3d(x, weight, bias, stride, [0, 0, 0], dilation, groups)
