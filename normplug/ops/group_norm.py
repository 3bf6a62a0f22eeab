"""group_norm: normalize groups of channels per sample, then add a residual and activate, in one op."""

import torch
from torch import Tensor

from normplug.ops._common import (
    RELU_OF_OUTPUT,
    acc_dtype,
    activate,
    activation_grad,
    check_act,
    dense,
    for_backward,
    is_channels_last,
    per_channel,
    use_kernel,
)

__all__ = ["group_norm"]


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return act(gn(x) + residual).

    Mean and variance (population, eps inside the root) run over C / num_groups channels and all positions of
    one sample. A group of a single value has no spread: its normalized value is 0 and passes no gradient.

    Args:
        x: Input (N, C, *), with any number of axes behind C; empty batches are fine.
        num_groups: Number of groups; divides C.
        weight: Scale per channel (C,), or None for 1.
        bias: Shift per channel (C,), or None for 0.
        eps: Added to the variance.
        act: Activation applied last: one of ``ACTIVATIONS`` or None.
        residual: Added before the activation; has the shape of x.

    Returns:
        A tensor with shape, dtype and memory format of x; statistics are computed in float32 (float64 for a
        float64 x) whatever its dtype.

    Raises:
        ValueError: If num_groups does not divide C, x has no channel axis, the activation is unknown, or
            residual is not shaped as x.

    Reference:
        Y. Wu, K. He, "Group Normalization", ECCV 2018, eq. 1, 2 and 7.
    """
    check_act(act)
    if x.ndim < 2:
        raise ValueError(f"group_norm expects an input of shape (N, C, *), but got {tuple(x.shape)}.")
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(
            f"group_norm cannot split C={x.shape[1]} channels into num_groups={num_groups} equal groups. "
            f"Use a number of groups that divides {x.shape[1]}."
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"group_norm adds a residual of the input's own shape {tuple(x.shape)}, but got "
            f"{tuple(residual.shape)}. Project the shortcut to that shape first."
        )
    x = dense(x)
    if residual is not None:
        residual = residual.to(x.dtype)
    return _op(x, num_groups, weight, bias, eps, act, residual)[0]


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    return x.unflatten(1, (num_groups, -1))  # (N, G, C/G, *): a view in either layout


def _normalized(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return x̂ (N, C, *) of a wide x, from statistics (N, G)."""
    groups = _grouped(x, mean.shape[1])
    shape = (*mean.shape, *[1] * (groups.ndim - 2))
    return ((groups - mean.view(shape)) * rstd.view(shape)).flatten(1, 2)


def _affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x_hat = x_hat * per_channel(weight, x_hat).to(x_hat.dtype)
    return x_hat if bias is None else x_hat + per_channel(bias, x_hat).to(x_hat.dtype)


def _folded(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return weight * x̂ + bias in one pass over x, as one scale and one shift per sample and channel."""
    n, c = x.shape[:2]
    size, wide = c // mean.shape[1], mean.dtype
    scale = rstd.repeat_interleave(size, 1)
    shift = -mean.repeat_interleave(size, 1) * scale
    if weight is not None:
        scale, shift = scale * weight.to(wide), shift * weight.to(wide)
    if bias is not None:
        shift = shift + bias.to(wide)
    ones = [1] * (x.ndim - 2)
    return torch.addcmul(shift.view(n, c, *ones), x, scale.view(n, c, *ones))


def reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Map x (N, C, *) to y, laid out as x, and the mean and 1/std (N, G) that backward needs."""
    n, c = x.shape[:2]
    wide = x.to(acc_dtype(x))
    if x.numel() == 0:
        mean, rstd = wide.new_zeros(n, num_groups), wide.new_zeros(n, num_groups)
        return torch.empty_like(x), mean, rstd
    if _native(x, num_groups):
        scale, shift = (None if p is None else p.to(wide.dtype) for p in (weight, bias))
        z, mean, rstd = torch.native_group_norm(wide, scale, shift, n, c, x[0, 0].numel(), num_groups, eps)
    else:
        groups = _grouped(wide, num_groups)
        var, mean = torch.var_mean(groups, dim=tuple(range(2, groups.ndim)), correction=0)
        rstd = (var + eps).rsqrt()
        z = _affine(_normalized(wide, mean, rstd), weight, bias)
    if residual is not None:
        z = z + residual
    y = (z.relu_() if act == "relu" else activate(z, act)).to(x.dtype)
    return (y.clone() if y.data_ptr() == x.data_ptr() else y), mean, rstd


def _native(x: Tensor, num_groups: int) -> bool:
    """Tell whether ATen's own group norm may be used.

    On channels-last CPU input it takes E[x²] - E[x]² in float32: with mean 10 and variance 1 it is hundreds
    of ulps off, with mean 1000 it returns noise. And a group of one value comes out as rounding noise / √eps.
    """
    return not is_channels_last(x) and x[0].numel() > num_groups


_op = torch.library.custom_op("normplug::group_norm", reference, mutates_args=())
use_kernel(_op, reference, "group_norm.forward")


@_op.register_fake
def _(x, num_groups, weight, bias, eps, act, residual):
    stats = x.new_empty(x.shape[0], num_groups, dtype=acc_dtype(x))
    return torch.empty_like(x), stats, torch.empty_like(stats)


def reference_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight (C,), bias (C,) and residual (empty without one).

    With ``RELU_OF_OUTPUT`` as activation the output stands in the residual's place.
    """
    n, c = x.shape[:2]
    num_groups = mean.shape[1]
    wide, dz = x.to(mean.dtype), dy.to(mean.dtype)
    if x.numel() == 0:
        zeros = wide.new_zeros(c)
        return torch.empty_like(x), zeros, zeros.clone(), _like_residual(x, residual)
    if act == RELU_OF_OUTPUT:
        dz = activation_grad(dz, residual.to(dz.dtype), act)
    elif act is not None:
        z = _folded(wide, mean, rstd, weight, bias)
        dz = activation_grad(dz, z if residual is None else z + residual, act)
    if _native(x, num_groups):
        scale = None if weight is None else weight.to(wide.dtype)
        dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
            dz.contiguous(), wide, mean, rstd, scale, n, c, x[0, 0].numel(), num_groups, [True, True, True]
        )
    else:
        x_hat = _normalized(wide, mean, rstd)
        rest = (0, *range(2, x.ndim))
        dbias, dweight = dz.sum(rest), (dz * x_hat).sum(rest)
        g = dz if weight is None else dz * per_channel(weight, x).to(dz.dtype)
        over = tuple(range(2, x.ndim + 1))
        gs, hs = _grouped(g, num_groups), _grouped(x_hat, num_groups)
        m1, m2 = gs.mean(over, keepdim=True), (gs * hs).mean(over, keepdim=True)
        r = rstd.view(n, num_groups, *[1] * (x.ndim - 1))
        dx = (r * (gs - m1 - hs * m2)).flatten(1, 2)
    dresidual = _like_residual(x, residual)
    if residual is not None:
        dresidual.copy_(dz)
    if dx.dtype != x.dtype or dx.stride() != x.stride():
        dx = torch.empty_like(x).copy_(dx)
    return dx, dweight, dbias, dresidual


def _like_residual(x: Tensor, residual: Tensor | None) -> Tensor:
    return x.new_empty(0) if residual is None else torch.empty_like(residual)


_backward_op = torch.library.custom_op("normplug::group_norm_backward", reference_backward, mutates_args=())
use_kernel(_backward_op, reference_backward, "group_norm.backward")


@_backward_op.register_fake
def _(dy, x, mean, rstd, weight, bias, act, residual):
    per_c = x.new_empty(x.shape[1], dtype=mean.dtype)
    return torch.empty_like(x), per_c, torch.empty_like(per_c), _like_residual(x, residual)


def _save(ctx, inputs, output) -> None:
    x, _, weight, bias, _, act, residual = inputs
    y, mean, rstd = output
    ctx.has_residual = residual is not None
    # A kernel finds what ReLU met again from x, in the pass that reads x; on a CPU that would be a pass of its own.
    alone_on_cpu = act == "relu" and x.is_cpu and residual is None
    ctx.act, residual = (RELU_OF_OUTPUT, y) if alone_on_cpu else for_backward(act, residual, y)
    ctx.save_for_backward(x, mean, rstd, weight, bias, residual)


def _backward(ctx, dy: Tensor, _dmean, _drstd):  # the statistics never leave this file: no gradient
    x, mean, rstd, weight, bias, residual = ctx.saved_tensors
    act = ctx.act
    if act == RELU_OF_OUTPUT and not ctx.has_residual:
        dy, act, residual = activation_grad(dy, residual, act), None, None
    dx, dweight, dbias, dresidual = _backward_op(dy, x, mean, rstd, weight, bias, act, residual)
    if residual is None:  # then a residual, if there was one, was the last thing added
        dresidual = dy
    return (
        dx,
        None,
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None,
        None,
        dresidual if ctx.has_residual else None,
    )


_op.register_autograd(_backward, setup_context=_save)
