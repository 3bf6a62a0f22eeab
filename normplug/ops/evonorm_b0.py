"""evonorm_b0: x divided by the larger of its batch's deviation and v * x plus its instance's deviation."""

import math

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from normplug.ops._blocks import blocks, planes
from normplug.ops._common import acc_dtype, affine, as_parameter, check_parameters, dense, per_channel, recalled_bias
from normplug.ops._counting import is_counted
from normplug.ops._registration import define, differentiable, in_torch, use_kernel, without_gradient

__all__ = ["evonorm_b0"]


def evonorm_b0(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    v: Tensor,
    batch_var: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Return x / max(sqrt(batch_var + eps), v * x + sqrt(instance_var + eps)) * weight + bias, and batch_var.

    Both variances are population variances with eps inside the root: batch_var over the samples and positions of a
    channel, instance_var over the positions of one sample's channel. Nothing is subtracted from x.

    Args:
        x: Input (N, C, *), with any number of axes behind C; empty batches are fine.
        weight: Scale per channel (C,), or None for 1.
        bias: Shift per channel (C,), or None for 0.
        v: Slope per channel (C,).
        batch_var: A constant to use in place of the variance of this batch (C,), as in evaluation.
        eps: Added to both variances.

    Returns:
        y with shape, dtype and memory format of x, and the variance used (C,), float32 or wider, without gradient;
        that of an empty batch is 0.

    Raises:
        TypeError: If x or another argument that should be one is no dense floating-point tensor.
        ValueError: If x has no channel axis or a parameter is not (C,).

    Reference:
        H. Liu, A. Brock, K. Simonyan, Q. Le, "Evolving Normalization-Activation Layers", NeurIPS 2020, table 2.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(evonorm_b0, (x,), x, weight, bias, v, batch_var, eps)
    check_parameters("evonorm_b0", x, weight=weight, bias=bias, v=v, batch_var=batch_var)
    if in_torch():
        args = x, weight, bias, v, batch_var, eps
        y, *_, var = _op(*args) if is_counted(_op, weight=1) else formula(*args)
    else:
        y, _, _, var = _call(dense(x), weight, bias, v, batch_var, eps)
    return y, var.detach()


def formula(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, v: Tensor, batch_var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return what ``evonorm_b0`` does, by torch's operations: the variance has a gradient here."""
    t, positions = x.to(acc_dtype(x)), tuple(range(2, x.ndim))
    size = math.prod(x.shape[2:])
    mean = t.sum(positions, keepdim=True) / size if positions else t
    var = (t - mean).square().sum(positions, keepdim=True) / size if positions else torch.zeros_like(t)
    if batch_var is not None:
        total = batch_var.to(t.dtype).detach()
    else:
        by_sample = (t.shape[0], t.shape[1])
        total = var.reshape(by_sample).mean(0) + mean.reshape(by_sample).var(0, correction=0)
    bound = per_channel((total + eps).sqrt(), x)
    other = per_channel(v.to(t.dtype), x) * t + (var + eps).sqrt()
    return affine(t / torch.where(other > bound, other, bound), weight, bias).to(x.dtype), total


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, v: Tensor, batch_var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Map x (N, C, *) to y, laid out as x, mean and std with eps (N, C) of instances, and the batch variance (C,)."""
    y, wide = torch.empty_like(x), acc_dtype(x)
    x3, y3 = planes(x), planes(y)
    n, c, p = x3.shape
    mean, var = (torch.zeros(n, c, dtype=wide, device=x.device) for _ in range(2))
    v, weight, bias = (None if t is None else t.to(wide).view(c, 1) for t in (v, weight, bias))
    for ns, cs in blocks(x3):
        xb = x3[ns, cs].to(wide)
        m = xb.sum(2, keepdim=True).div_(p)
        mean[ns, cs] = m.squeeze(2)
        t = xb - m
        var[ns, cs] = t.mul_(t).sum(2).div_(p)
    if batch_var is not None:
        total = batch_var.to(wide, copy=True)
    elif x3.numel() == 0:
        total = torch.zeros(c, dtype=wide, device=x.device)
    else:  # the mean of the instances' variances and the variance of their means
        total = var.mean(0) + (mean - mean.mean(0)).square_().mean(0)
    std, bound = (var + eps).sqrt_(), (total + eps).sqrt_().view(c, 1)
    for ns, cs in blocks(x3):
        xb = x3[ns, cs].to(wide)
        t = torch.mul(xb, v[cs]).add_(std[ns, cs].unsqueeze(2))
        t = torch.div(xb, torch.maximum(t, bound[cs], out=t), out=t)
        if weight is not None:
            t.mul_(weight[cs])
        torch.add(t, 0 if bias is None else bias[cs], out=y3[ns, cs])
    return y, mean, std, total


def _fake(x, weight, bias, v, batch_var, eps):
    stats = x.new_empty(x.shape[:2], dtype=acc_dtype(x))
    return torch.empty_like(x), stats, torch.empty_like(stats), stats.new_empty(x.shape[1])


_op = define("evonorm_b0", reference, _fake)
use_kernel(_op, reference, "evonorm_b0.forward")


def reference_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    batch_var: Tensor,
    weight: Tensor | None,
    v: Tensor,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and v (C,).

    With L and t the roots of batch and instance variance, D the larger of L and v x + t, and sums over the values
    for which the larger one is L or is not,

        dx = weight * dy * (L or t) / D² - (x - mean) / (P t) * sum_not - (x - batch_mean) / (N P L) * sum_L

    of weight * dy * x / D²; a constant L has no third term.
    """
    dx, wide = torch.empty_like(x), mean.dtype
    x3, dx3, dy3 = planes(x), planes(dx), planes(dy)
    n, c, p = x3.shape
    dbias, dweight, above, below, dv = (torch.zeros(n, c, dtype=wide, device=x.device) for _ in range(5))
    v = v.to(wide).view(c, 1)
    weight = torch.ones_like(v) if weight is None else weight.to(wide).view(c, 1)
    bound = (batch_var + eps).sqrt_().view(c, 1)

    def divisor(xb, ns, cs):
        d = torch.mul(xb, v[cs]).add_(std[ns, cs].unsqueeze(2))
        # 0 or 1 in the dtype of d: on a CPU, selecting with a bool tensor takes 20 times as long as multiplying
        is_above = torch.gt(d, bound[cs], out=torch.empty_like(d))
        return torch.maximum(d, bound[cs], out=d), is_above

    for ns, cs in blocks(x3):
        xb, gb = x3[ns, cs].to(wide), dy3[ns, cs].to(wide)
        d, is_above = divisor(xb, ns, cs)
        t = torch.div(xb, d).mul_(gb)
        dbias[ns, cs], dweight[ns, cs] = gb.sum(2), t.sum(2)
        t.div_(d)
        part = torch.mul(t, is_above, out=is_above)
        above[ns, cs] = part.sum(2)
        below[ns, cs] = t.sub_(part).sum(2)
        dv[ns, cs] = part.mul_(xb).sum(2)
    w = weight.view(c)
    # (x - mean) * a + (x - batch_mean) * b = (x - mean) * (a + b) + (mean - batch_mean) * b, without cancellation
    slope, shift = -w * above / (p * std), torch.zeros_like(mean)
    if training:
        by_batch = -w * below.sum(0) / (n * p * bound.view(c))
        slope += by_batch
        shift += by_batch * (mean - mean.mean(0))
    for ns, cs in blocks(x3):
        xb, gb = x3[ns, cs].to(wide), dy3[ns, cs].to(wide)
        d, is_above = divisor(xb, ns, cs)
        t = is_above.mul_(std[ns, cs].unsqueeze(2) - bound[cs]).add_(bound[cs])  # std where it is above, else bound
        t.div_(d).div_(d).mul_(gb).mul_(weight[cs])
        torch.sub(xb, mean[ns, cs].unsqueeze(2), out=d)
        t.addcmul_(d, slope[ns, cs].unsqueeze(2))
        torch.add(t, shift[ns, cs].unsqueeze(2), out=dx3[ns, cs])
    return dx, dweight.sum(0), dbias.sum(0), -w * dv.sum(0)


def _fake_backward(dy, x, mean, std, batch_var, weight, v, eps, training):
    per_c = x.new_empty(x.shape[1], dtype=mean.dtype)
    return torch.empty_like(x), per_c, torch.empty_like(per_c), torch.empty_like(per_c)


_backward_op = define("evonorm_b0_backward", reference_backward, _fake_backward)
use_kernel(_backward_op, reference_backward, "evonorm_b0.backward")
_call_backward = without_gradient(_backward_op)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, v, batch_var, ctx.eps = inputs
    ctx.training = batch_var is None
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, *output[1:], weight, v)


def _recall(ctx):
    x, _, _, var, weight, v = ctx.saved_tensors
    return x, weight, recalled_bias(ctx, v), v, None if ctx.training else var, ctx.eps


def _backward(ctx, dy: Tensor, _dmean, _dstd, _dvar):  # the variance leaves this file detached
    x, mean, std, var, weight, v = ctx.saved_tensors
    dx, dweight, dbias, dv = _call_backward(dy, x, mean, std, var, weight, v, ctx.eps, ctx.training)
    return (
        dx,
        as_parameter(dweight, weight),
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
        dv.to(v.dtype),
        None,
        None,
    )


_call = differentiable(_op, formula, _save, _recall, _backward, wanted=4)
