"""filter_response_norm: each map divided by its root mean square, then kept above a learned threshold."""

import math

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from normplug.ops._blocks import blocks, planes
from normplug.ops._common import acc_dtype, affine, check_parameters, dense, per_channel
from normplug.ops._counting import is_counted
from normplug.ops._registration import define, differentiable, in_torch, use_kernel, without_gradient

__all__ = ["filter_response_norm"]


def filter_response_norm(
    x: Tensor, weight: Tensor, bias: Tensor, tau: Tensor | None, eps: float | Tensor = 1e-6
) -> Tensor:
    """Return max(x / sqrt(mean(x²) + eps) * weight + bias, tau).

    The mean runs over all positions of one channel of one sample. Nothing is subtracted from x.

    Args:
        x: Input (N, C, *), with any number of axes behind C; empty batches are fine.
        weight: Scale per channel (C,).
        bias: Shift per channel (C,).
        tau: Least value of a channel (C,), or None for no threshold.
        eps: Added to the mean square. A tensor (1,) or (C,), which must be positive, gets a gradient; backward then
            keeps intermediate results of the size of x, and not x alone.

    Returns:
        A tensor with shape, dtype and memory format of x; everything in between is computed in float32 (float64
        for a float64 x).

    Raises:
        TypeError: If x or another argument that should be one is no dense floating-point tensor.
        ValueError: If x has no channel axis or a parameter is not (C,).

    Reference:
        S. Singh, S. Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of
        Deep Neural Networks", CVPR 2020, eq. 1 to 3.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(filter_response_norm, (x,), x, weight, bias, tau, eps)
    check_parameters("filter_response_norm", x, weight=weight, bias=bias, tau=tau)
    if tau is None:
        tau = weight.new_full(weight.shape, float("-inf"))
    # A learned eps too: it is learned where maps are tiny, and no pass over them is worth saving.
    if in_torch() and is_counted(_op, weight=1):  # what comes out is not looked at: any eps will do
        return _op(x, weight, bias, tau, 1.0)[0]
    if in_torch() or isinstance(eps, Tensor):
        return formula(x, weight, bias, tau, eps)
    return _call(dense(x), weight, bias, tau, eps)


def formula(x: Tensor, weight: Tensor, bias: Tensor, tau: Tensor, eps: float | Tensor) -> Tensor:
    """Return ``filter_response_norm`` by torch's operations."""
    t, positions = x.to(acc_dtype(x)), tuple(range(2, x.ndim))
    squares = t.square()
    mean = squares.sum(positions, keepdim=True) / max(1, math.prod(x.shape[2:])) if positions else squares
    if isinstance(eps, Tensor):
        eps = per_channel(eps.to(t.dtype), x)
    z = affine(t / (mean + eps).sqrt(), weight, bias)  # not rsqrt: its cube, in the gradient, is 0 for large x
    tau = per_channel(tau.to(t.dtype), x)
    return torch.where(z <= tau, tau, z).to(x.dtype)


def reference(x: Tensor, weight: Tensor, bias: Tensor, tau: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Map x (N, C, *) to y, laid out as x, and the 1/root of the mean square (N, C) that backward needs."""
    y, wide = torch.empty_like(x), acc_dtype(x)
    x3, y3 = planes(x), planes(y)
    n, c, p = x3.shape
    rstd = torch.zeros(n, c, dtype=wide, device=x.device)
    weight, bias, tau = (t.to(wide).view(c, 1) for t in (weight, bias, tau))
    for ns, cs in blocks(x3):
        xb = x3[ns, cs].to(wide)
        t = xb * xb
        r = (t.sum(2, keepdim=True) / p).add_(eps).rsqrt_()
        rstd[ns, cs] = r.squeeze(2)
        torch.mul(xb, r * weight[cs], out=t).add_(bias[cs])  # addcmul is slow where two of its arguments broadcast
        torch.maximum(t, tau[cs], out=y3[ns, cs])
    return y, rstd


def _fake(x, weight, bias, tau, eps):
    return torch.empty_like(x), x.new_empty(x.shape[:2], dtype=acc_dtype(x))


_op = define("filter_response_norm", reference, _fake)
use_kernel(_op, reference, "filter_response_norm.forward")


def reference_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and tau (C,).

    With x̂ = x rstd, dz = dy where weight x̂ + bias > tau and 0 elsewhere, and the mean over a map,

        dx = rstd * weight * (dz - x̂ * mean(dz * x̂))
    """
    dx, wide = torch.empty_like(x), rstd.dtype
    x3, dx3, dy3 = planes(x), planes(dx), planes(dy)
    n, c, p = x3.shape
    dweight, dbias, dtau = (torch.zeros(n, c, dtype=wide, device=x.device) for _ in range(3))
    weight, bias, tau = (t.to(wide).view(c, 1) for t in (weight, bias, tau))
    for ns, cs in blocks(x3):
        xb, gb = x3[ns, cs].to(wide), dy3[ns, cs].to(wide)
        r = rstd[ns, cs].unsqueeze(2)
        scale = r * weight[cs]
        t = (xb * scale).add_(bias[cs] - tau[cs])
        dz = torch.ops.aten.threshold_backward(gb, t, 0)  # one pass without a mask
        dbias[ns, cs] = dz.sum(2)
        dtau[ns, cs] = torch.sub(gb, dz, out=t).sum(
            2
        )  # and not of sums, whose rounding would be left where tau is never met
        sums = torch.mul(dz, xb, out=t).sum(2, keepdim=True) * r
        dweight[ns, cs] = sums.squeeze(2)
        torch.addcmul(dz.mul_(scale), xb, scale * r * sums / p, value=-1, out=dx3[ns, cs])
    return dx, dweight.sum(0), dbias.sum(0), dtau.sum(0)


def _fake_backward(dy, x, rstd, weight, bias, tau):
    per_c = x.new_empty(x.shape[1], dtype=rstd.dtype)
    return torch.empty_like(x), per_c, torch.empty_like(per_c), torch.empty_like(per_c)


_backward_op = define("filter_response_norm_backward", reference_backward, _fake_backward)
use_kernel(_backward_op, reference_backward, "filter_response_norm.backward")
_call_backward = without_gradient(_backward_op)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, tau, ctx.eps = inputs
    ctx.save_for_backward(x, output[1], weight, bias, tau)


def _recall(ctx):
    x, _, *parameters = ctx.saved_tensors
    return x, *parameters, ctx.eps


def _backward(ctx, dy: Tensor, _drstd):  # rstd never leaves this file: no gradient
    x, rstd, weight, bias, tau = ctx.saved_tensors
    dx, dweight, dbias, dtau = _call_backward(dy, x, rstd, weight, bias, tau)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), dtau.to(tau.dtype), None


_call = differentiable(_op, formula, _save, _recall, _backward)
