"""group_norm: normalize groups of channels per sample, then add a residual and activate, in one op."""

import math
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from normplug.ops._blocks import Block, blocks, planes, sample_blocks
from normplug.ops._common import (
    RELU_OF_OUTPUT,
    acc_dtype,
    activate,
    activation_grad,
    add_and_activate,
    affine,
    as_parameter,
    check_act,
    check_groups,
    check_parameters,
    check_residual,
    dense,
    for_backward,
    is_channels_last,
    recalled_residual,
)
from normplug.ops._registration import define, differentiable, in_torch, use_kernel, without_gradient

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
        TypeError: If x or another argument that should be one is no dense floating-point tensor.
        ValueError: If num_groups does not divide C, x has no channel axis, the activation is unknown,
            residual is not shaped as x, or a parameter is not (C,).

    Reference:
        Y. Wu, K. He, "Group Normalization", ECCV 2018, eq. 1, 2 and 7.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(group_norm, (x,), x, num_groups, weight, bias, eps, act, residual)
    check_act(act)
    check_parameters("group_norm", x, weight=weight, bias=bias)
    check_groups("group_norm", x, num_groups)
    check_residual("group_norm", x, residual)
    if in_torch():
        return formula(x, num_groups, weight, bias, eps, act, residual)
    x = dense(x)
    if residual is not None:
        residual = residual.to(x.dtype)
    if _leave_to_aten(x, num_groups):
        return _by_aten(x, num_groups, weight, bias, eps, act, residual)
    return _call(x, num_groups, weight, bias, eps, act, residual)


def formula(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    residual: Tensor | None,
) -> Tensor:
    """Return ``group_norm`` by torch's own, in the precision of the op."""
    t = x.to(acc_dtype(x))
    weight, bias = (None if p is None else p.to(t.dtype) for p in (weight, bias))
    if x.shape[1] == num_groups and math.prod(x.shape[2:]) == 1:  # no spread: see _native
        z = affine(t - t, weight, bias)
    else:
        # One axis of positions, so that ATen takes nothing for channels-last: see _native.
        z = F.group_norm(t.flatten(2) if x.ndim > 3 else t, num_groups, weight, bias, eps).view(x.shape)
    return add_and_activate(z, act, residual, x.dtype)


# Bytes from which malloc fetches new memory, which the system clears, for every tensor: what costs most there.
FRESH = 1 << 25


def _leave_to_aten(x: Tensor, num_groups: int) -> bool:
    """Tell whether ATen's operations and their gradients beat the op: on a CPU, in full precision.

    Large channels-last x excepted: ATen's operations need one more tensor there than the op, which works in blocks.
    """
    fits = x.is_contiguous() or x.numel() * x.element_size() <= FRESH
    return x.is_cpu and x.dtype == acc_dtype(x) and x.numel() > 0 and x.shape[1:].numel() > num_groups and fits


def _by_aten(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    residual: Tensor | None,
) -> Tensor:
    if is_channels_last(x):  # see _native; the mean of a group may be taken off, the result does not depend on it
        with torch.no_grad():
            mean = _of_groups(_rows(x).sum(1), num_groups) / (x.shape[1:].numel() // num_groups)
            centre = _spread(mean, x.shape[1]).view(*x.shape[:2], *[1] * (x.ndim - 2))
        x = x - centre
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    shape = x.shape
    if x.ndim > 3 and 1 in shape and x.is_contiguous():
        # An axis of length 1 can make ATen take x for a channels-last one, see _native; with one axis of positions not.
        x, residual = x.flatten(2), None if residual is None else residual.flatten(2)
    z = F.group_norm(x, num_groups, weight, bias, eps)
    if residual is not None:
        z = z.add_(residual)
    z = z.relu_() if act == "relu" else activate(z, act)
    return z if z.shape == shape else z.view(shape)


def _native(x: Tensor, num_groups: int) -> bool:
    """Tell whether ATen's own group norm may be used as it is.

    On channels-last CPU input it takes E[x²] - E[x]² in float32: with mean 10 and variance 1 it is hundreds
    of ulps off, with mean 1000 it returns noise. And a group of one value comes out as rounding noise / √eps.
    """
    return x.numel() > 0 and not is_channels_last(x) and x[0].numel() > num_groups


_native_backward = torch.ops.aten.native_group_norm_backward


def _parameters(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return weight and bias (C,), or what stands for them, in the dtype of sums over x."""
    wide, c = acc_dtype(x), x.shape[1]
    weight = x.new_ones(c, dtype=wide) if weight is None else weight.to(wide)
    return weight, x.new_zeros(c, dtype=wide) if bias is None else bias.to(wide)


def _rows(x: Tensor) -> Tensor:
    """View x (N, C, *) as (N, P, C)."""
    return planes(x).transpose(1, 2)


def _of_groups(sums: Tensor, num_groups: int) -> Tensor:
    """Add sums (N, C) up over the channels of each group: (N, G)."""
    return sums.unflatten(1, (num_groups, -1)).sum(2)


def _spread(stats: Tensor, channels: int) -> Tensor:
    """Repeat statistics (N, G) of groups for each of their channels: (N, C)."""
    return stats.unsqueeze(2).expand(-1, -1, channels // stats.shape[1]).reshape(-1, channels)


def _finish(z: Tensor, act: str | None, residual: Tensor | None, y: Tensor) -> None:
    """Write act(z + residual) to y; z is overwritten."""
    if residual is not None:
        z.add_(residual)
    y.copy_(z.relu_() if act == "relu" else activate(z, act))


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
    (n, c), p, wide = x.shape[:2], x.shape[2:].numel(), acc_dtype(x)
    size = c // num_groups
    weight, bias = _parameters(x, weight, bias)
    y = torch.empty_like(x)
    mean, rstd = (torch.zeros(n, num_groups, dtype=wide, device=x.device) for _ in range(2))
    if _native(x, num_groups):
        x3, y3, residual3 = planes(x), planes(y), None if residual is None else planes(residual)
        for ns, cs in blocks(x3, size):
            xb = x3[ns, cs].to(wide)
            samples, channels = xb.shape[:2]
            gs = slice(cs.start // size, (cs.start + channels) // size)
            z, m, r = torch.native_group_norm(xb, weight[cs], bias[cs], samples, channels, p, channels // size, eps)
            mean[ns, gs], rstd[ns, gs] = m, r
            _finish(z, act, None if residual3 is None else residual3[ns, cs], y3[ns, cs])
        return y, mean, rstd
    x3, y3, residual3 = _rows(x), _rows(y), None if residual is None else _rows(residual)
    for ns, parts in sample_blocks(x3):
        total = reduce(torch.add, (x3[ns, ps].to(wide).sum(1) for ps in parts))
        m = _of_groups(total, num_groups) / (size * p)
        centre = _spread(m, c).unsqueeze(1)
        sums, squares = m.new_zeros(2, len(m), c)
        for ps in parts:
            t = x3[ns, ps].to(wide) - centre
            sums += t.sum(1)
            squares += t.square_().sum(1)
        mean[ns] = m.add_(_of_groups(sums, num_groups) / (size * p))  # what rounding of many sums has left over
        rstd[ns] = r = (_of_groups(squares, num_groups) / (size * p)).add_(eps).rsqrt_()
        centre = _spread(m, c).unsqueeze(1)
        scale = (_spread(r, c) * weight).unsqueeze(1)
        for ps in parts:
            z = (x3[ns, ps].to(wide) - centre).mul_(scale).add_(bias)
            _finish(z, act, None if residual3 is None else residual3[ns, ps], y3[ns, ps])
    return y, mean, rstd


def _fake(x, num_groups, weight, bias, eps, act, residual):
    stats = x.new_empty(x.shape[0], num_groups, dtype=acc_dtype(x))
    return torch.empty_like(x), stats, torch.empty_like(stats)


_op = define("group_norm", reference, _fake)
use_kernel(_op, reference, "group_norm.forward")


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

    With dz the gradient before the activation, a = weight * dz and the mean over a group,

        dx = rstd * (a - mean(a) - x̂ * mean(a * x̂))

    With ``RELU_OF_OUTPUT`` as activation the output stands in the residual's place.
    """
    c, p, num_groups, wide = x.shape[1], x.shape[2:].numel(), mean.shape[1], mean.dtype
    size = c // num_groups
    weight, bias = _parameters(x, weight, bias)
    dresidual, dx = _like_residual(x, residual), torch.empty_like(x)
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(weight)
    if _native(x, num_groups):
        x3, dy3, dx3 = planes(x), planes(dy), planes(dx)
        residual3, dresidual3 = (None, None) if residual is None else (planes(residual), planes(dresidual))
        scale = _spread(rstd, c) * weight
        shift = bias - _spread(mean, c) * scale
        for at in blocks(x3, size):
            ns, cs = at
            xb, dz = x3[at].to(wide), dy3[at].to(wide)
            dz = _before_act(dz, xb, scale[at].unsqueeze(2), shift[at].unsqueeze(2), act, residual3, at).contiguous()
            if dresidual3 is not None:
                dresidual3[at] = dz
            samples, channels = xb.shape[:2]
            groups = channels // size
            stats = tuple(t[ns, cs.start // size : cs.start // size + groups] for t in (mean, rstd))
            dx3[at], dw, db = _native_backward(dz, xb, *stats, weight[cs], samples, channels, p, groups, [True] * 3)
            dweight[cs] += dw
            dbias[cs] += db
        return dx, dweight, dbias, dresidual
    x3, dy3, dx3 = _rows(x), _rows(dy), _rows(dx)
    residual3, dresidual3 = (None, None) if residual is None else (_rows(residual), _rows(dresidual))
    for ns, parts in sample_blocks(x3):
        # A group of one value has no spread: with 0 for 1/std its gradient is 0 exactly.
        r = rstd[ns] * (size * p > 1)
        centre, scale = _spread(mean[ns], c).unsqueeze(1), (_spread(r, c) * weight).unsqueeze(1)
        sums, products = scale.new_zeros(2, len(r), c)
        for ps in parts:
            t, dz = x3[ns, ps].to(wide) - centre, dy3[ns, ps].to(wide)
            dz = _before_act(dz, t, scale, bias, act, residual3, (ns, ps))
            sums += dz.sum(1)
            products += t.mul_(dz).sum(1)
        products *= _spread(r, c)
        dbias += sums.sum(0)
        dweight += products.sum(0)
        m1, m2 = (_of_groups(t * weight, num_groups) / (size * p) for t in (sums, products))
        offset, slope = (_spread(t, c).unsqueeze(1) for t in (-r * m1, -r * r * m2))
        for ps in parts:
            t, dz = x3[ns, ps].to(wide) - centre, dy3[ns, ps].to(wide)
            dz = _before_act(dz, t, scale, bias, act, residual3, (ns, ps))
            if dresidual3 is not None:
                dresidual3[ns, ps] = dz
            torch.addcmul(t.mul_(slope).add_(offset), dz, scale, out=dx3[ns, ps])
    return dx, dweight, dbias, dresidual


def _before_act(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, act: str | None, residual: Tensor | None, at: Block
) -> Tensor:
    """Return the gradient at z = scale * x + shift + residual[at] from that at act(z)."""
    if act is None:
        return dy
    if residual is not None and act == RELU_OF_OUTPUT:
        return activation_grad(dy, residual[at].to(dy.dtype), act)
    z = (x * scale).add_(shift)
    return activation_grad(dy, z if residual is None else z.add_(residual[at]), act)


def _like_residual(x: Tensor, residual: Tensor | None) -> Tensor:
    return x.new_empty(0) if residual is None else torch.empty_like(x)


def _fake_backward(dy, x, mean, rstd, weight, bias, act, residual):
    per_c = x.new_empty(x.shape[1], dtype=mean.dtype)
    return torch.empty_like(x), per_c, torch.empty_like(per_c), _like_residual(x, residual)


_backward_op = define("group_norm_backward", reference_backward, _fake_backward)
use_kernel(_backward_op, reference_backward, "group_norm.backward")
_call_backward = without_gradient(_backward_op)


def _save(ctx, inputs, output) -> None:
    x, ctx.num_groups, weight, bias, ctx.eps, act, residual = inputs
    y, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.act, residual = for_backward(act, residual, y)
    ctx.save_for_backward(x, mean, rstd, weight, bias, residual)


def _recall(ctx):
    x, _, _, weight, bias, residual = ctx.saved_tensors
    return x, ctx.num_groups, weight, bias, ctx.eps, ctx.act, recalled_residual(ctx, x, residual)


def _backward(ctx, dy: Tensor, _dmean, _drstd):  # the statistics never leave this file: no gradient
    x, mean, rstd, weight, bias, residual = ctx.saved_tensors
    dx, dweight, dbias, dresidual = _call_backward(dy, x, mean, rstd, weight, bias, ctx.act, residual)
    if residual is None:  # then a residual, if there was one, was the last thing added
        dresidual = dy
    return (
        dx,
        None,
        as_parameter(dweight, weight),
        as_parameter(dbias, bias),
        None,
        None,
        dresidual if ctx.has_residual else None,
    )


_call = differentiable(_op, formula, _save, _recall, _backward)
