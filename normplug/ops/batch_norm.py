"""Batch normalization in parts: local sums, the normalization itself, the two sums and the dx of its gradient.

The parts are apart because what stands between them differs: nothing (``batch_norm_act``), an all-reduce over
ranks (SyncBN), or statistics of earlier iterations (CBN).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from normplug.ops._common import (
    RELU_OF_OUTPUT,
    acc_dtype,
    activate,
    activation_grad,
    add_and_activate,
    affine,
    as_parameter,
    check_act,
    check_parameters,
    check_residual,
    dense,
    for_backward,
    is_channels_last,
    per_channel,
    recalled_residual,
    with_plain_strides,
)
from normplug.ops._registration import define, differentiable, in_torch, is_recorded, use_kernel, without_gradient

__all__ = [
    "batch_norm_act",
    "batch_norm_dx",
    "batch_norm_reduce",
    "batch_norm_stats",
    "batch_normalize",
    "is_exact_in_aten",
    "stock_batch_norm",
]


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: str | None = None,
    residual: Tensor | None = None,
    correction: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return act(bn(x) + residual) with the statistics of this batch, and these statistics.

    Args:
        x: Input (N, C, *), with any number of axes behind C; empty batches are fine.
        weight: Scale per channel (C,), or None for 1.
        bias: Shift per channel (C,), or None for 0.
        eps: Added to the population variance, inside the root.
        act: Activation applied last: one of ``ACTIVATIONS`` or None.
        residual: Added before the activation; has the shape of x.
        correction: What the variance that is returned takes off the number of values, as in ``torch.var``: 1 for
            that which a batch norm averages. The output knows the population variance only.

    Returns:
        y with shape, dtype and memory format of x, and mean and variance (C,), which carry no gradient; they are
        float32 (float64 for a float64 x) and 0 for an empty batch.

    Raises:
        TypeError: If x or another argument that should be one is no dense floating-point tensor.
        ValueError: If x has no channel axis, the activation is unknown, residual is not shaped as x, or a parameter
            is not (C,).

    Reference:
        S. Ioffe, C. Szegedy, "Batch Normalization", ICML 2015, algorithm 1.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(batch_norm_act, (x,), x, weight, bias, eps, act, residual, correction)
    check_act(act)
    check_parameters("batch_norm_act", x, weight=weight, bias=bias)
    check_residual("batch_norm_act", x, residual)
    if in_torch():
        y, mean, var = formula_act(x, weight, bias, eps, act, residual)
        count = _count(x)
        return y, mean.detach(), var.detach() * (count / max(count - correction, 1)) if correction else var.detach()
    x = dense(x)
    if residual is not None:
        residual = residual.to(x.dtype)
    y, mean, _, m2 = _act(x, weight, bias, eps, act, residual)
    if mean.requires_grad:  # as the op of a compiled graph has it
        mean, m2 = mean.detach(), m2.detach()
    return y, mean, m2 / max(_count(x) - correction, 1)


def formula_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``batch_norm_act`` does, by torch's operations: mean and variance have a gradient here."""
    t, rest = x.to(acc_dtype(x)), (0, *range(2, x.ndim))
    count = max(_count(x), 1)
    mean = t.sum(rest) / count
    centred = t - per_channel(mean, x)
    var = centred.square().sum(rest) / count
    z = affine(centred * per_channel((var + eps).rsqrt(), x), weight, bias)
    return add_and_activate(z, act, residual, x.dtype), mean, var


def batch_normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
    mean_share: Tensor | None = None,
    var_share: Tensor | None = None,
) -> Tensor:
    """Return act((x - mean) * rstd * weight + bias + residual) for given statistics per channel.

    Gradients flow to x, weight, bias and residual. With g = dL/dz * weight, z the value before the activation,

        dx = rstd * (g - mean_share * sum(g) - x̂ * var_share * sum(g * x̂))

    so the shares say how far the statistics follow x: None (both) for constants, 1 / count for the statistics of
    x itself, less where x is one batch of several.

    Args:
        x: Input (N, C, *); empty batches are fine.
        mean: Mean per channel (C,), float32 or float64.
        rstd: Reciprocal standard deviation per channel (C,), of the dtype of mean.
        weight: Scale per channel (C,), or None for 1.
        bias: Shift per channel (C,), or None for 0.
        act: Activation applied last: one of ``ACTIVATIONS`` or None.
        residual: Added before the activation; has the shape of x.
        mean_share: Derivative of mean with respect to one value of x, per channel (C,), or None for 0.
        var_share: Half the derivative of the variance with respect to x, over x - mean, (C,), or None for 0.

    Returns:
        A tensor with shape, dtype and memory format of x.

    Raises:
        TypeError: If x or another argument that should be one is no dense floating-point tensor.
        ValueError: If x has no channel axis, the activation is unknown, residual is not shaped as x, a statistic or
            parameter is not (C,), or only one of the shares is given.
    """
    if has_torch_function_unary(x):
        args = x, mean, rstd, weight, bias, act, residual, mean_share, var_share
        return handle_torch_function(batch_normalize, (x,), *args)
    check_act(act)
    shares = {"mean_share": mean_share, "var_share": var_share}
    check_parameters("batch_normalize", x, mean=mean, rstd=rstd, weight=weight, bias=bias, **shares)
    check_residual("batch_normalize", x, residual)
    if (mean_share is None) != (var_share is None):
        raise ValueError(
            "batch_normalize takes mean_share and var_share together or neither, but got only one of them. "
            "Pass zeros for a statistic that does not depend on x."
        )
    if in_torch():
        return formula(x, mean, rstd, weight, bias, act, residual, mean_share, var_share)
    x = dense(x)
    if residual is not None:
        residual = residual.to(x.dtype)
    return _call(x, mean, rstd, weight, bias, act, residual, mean_share, var_share)


def formula(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
    mean_share: Tensor | None,
    var_share: Tensor | None,
) -> Tensor:
    """Return ``batch_normalize`` by torch's operations.

    Mean and variance are functions of x whose values are those given. With s the shares and S, Q the sums of x - mean
    and of its square, of which only the derivatives count,

        mean(x) = mean + s S,    variance(x) = 1/rstd² + s Q - (s S)²

    as of a mean of means, and a mean of squares less its square.
    """
    mean, rstd = mean.detach(), rstd.detach()
    centred = x.to(mean.dtype) - per_channel(mean, x)
    if mean_share is not None and var_share is not None:
        rest = (0, *range(2, x.ndim))
        sums, squares = centred.sum(rest), centred.square().sum(rest)
        moved = mean_share * (sums - sums.detach())
        rstd = (rstd.pow(-2) + var_share * (squares - squares.detach()) - moved.square()).rsqrt()
        centred = centred - per_channel(moved, x)
    z = affine(centred * per_channel(rstd, x), weight, bias)
    return add_and_activate(z, act, residual, x.dtype)


def batch_norm_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and sum of squared deviations (C,) of x (N, C, *): zeros for an empty x; no gradient."""
    return _call_stats(dense(x.detach()))


def batch_norm_reduce(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return sum(dz) and sum(dz * x̂) per channel (C,), dz being dy behind the activation's derivative.

    Activation and residual are those of ``for_backward``.
    """
    return _call_reduce(dy, x, mean, rstd, weight, bias, act, residual)


def batch_norm_dx(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
    mean_term: Tensor | None,
    var_term: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return rstd * weight * (dz - mean_term - x̂ * var_term), and dz where there is a residual (else empty)."""
    return _call_dx(dy, x, mean, rstd, weight, bias, act, residual, mean_term, var_term)


def is_exact_in_aten(x: Tensor) -> bool:
    """Tell whether torch's own batch norm rounds x's dtype once; on a CPU it sums half types in half precision."""
    return x.is_cuda or x.element_size() >= 4


def stock_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Return ``F.batch_norm`` of x (N, C, *), with its numbers and with right gradients in every layout.

    On a CPU its backward takes x and dy for laid out alike where their strides suggest the same memory format, and
    reads both by what x is. An axis of length 1 may have any stride, and then a channels-last tensor suggests a
    contiguous one (docs/upstream-batch-norm.md). So where there is such an axis x goes in as a view that leaves no
    choice: with the strides of its layout, and if that is the contiguous one, with one axis of positions.
    """
    args = running_mean, running_var, weight, bias, training, momentum, eps
    # A graph for others to run, at other sizes, must not depend on this one's.
    if not (x.is_cpu and x.ndim > 3 and torch.is_grad_enabled()) or is_recorded() or 1 not in x.shape:
        return F.batch_norm(x, *args)
    if x.is_contiguous():
        return F.batch_norm(x.flatten(2), *args).view(x.shape)
    return F.batch_norm(with_plain_strides(x), *args)


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[1] if x.shape[1] else 0


def _scale_shift(mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return scale and shift (C,) such that x * scale + shift is the normalized and affine x."""
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias.to(shift.dtype)


def _apply(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return x * scale + shift, laid out as x: one pass, and one rounding where x is a half type."""
    if is_channels_last(x):
        out = torch.empty_like(x, dtype=scale.dtype)
        torch.addcmul(per_channel(shift, x), x.to(scale.dtype), per_channel(scale, x), out=out)
        return out.to(x.dtype)
    # Contiguous: evaluation of ATen's batch norm with mean 0, variance 1 and eps 0 is the fastest such pass.
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.native_batch_norm(x, scale, shift, zero, one, False, 0.0, 0.0)[0]


def reference_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Map x (N, C, *) to its mean and centred sum of squares (C,)."""
    count = _count(x)
    wide_dtype = acc_dtype(x)
    if count == 0:
        zeros = x.new_zeros(x.shape[1], dtype=wide_dtype)
        return zeros, zeros.clone()
    if x.device.type == "cpu" and is_channels_last(x):
        # ATen's own sums run in one float32 per channel here: over 2 x 50 x 76 values of mean 1000 the mean is off
        # by 2e-3. sum() adds in blocks; the second round removes what the first left over.
        rest = (0, *range(2, x.ndim))
        wide = x.to(wide_dtype)
        mean = wide.mean(rest)
        centred = wide - per_channel(mean, x)
        left = centred.mean(rest)
        return mean + left, centred.square_().sum(rest) - count * left * left
    if x.device.type == "cpu":  # on CUDA the sums of a half x are float32 already
        x = x.to(wide_dtype)
    mean, var = torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0)
    return mean, var * count


def _fake_stats(x):
    mean = x.new_empty(x.shape[1], dtype=acc_dtype(x))
    return mean, torch.empty_like(mean)


_stats_op = define("batch_norm_stats", reference_stats, _fake_stats)
use_kernel(_stats_op, reference_stats, "batch_norm.stats")
_call_stats = without_gradient(_stats_op)


def reference(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
    mean_share: Tensor | None,
    var_share: Tensor | None,
) -> Tensor:
    """Map x (N, C, *) to y, laid out as x."""
    if x.numel() == 0:
        return torch.empty_like(x)
    scale, shift = _scale_shift(mean, rstd, weight, bias)
    if act is None and residual is None:
        return _apply(x, scale, shift)
    z = _apply(x.to(mean.dtype), scale, shift)
    if residual is not None:
        z += residual
    return activate(z, act).to(x.dtype)


def _fake(x, mean, rstd, weight, bias, act, residual, mean_share, var_share):
    return torch.empty_like(x)


_op = define("batch_normalize", reference, _fake)
use_kernel(_op, reference, "batch_norm.normalize")


def _before_activation(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return dz and x, both wide and laid out alike."""
    wide = x.to(mean.dtype)
    dz = dy.to(mean.dtype)
    if dz.stride() != wide.stride():  # a loss of another layout, or one value expanded
        dz = torch.empty_like(wide).copy_(dz)
    if act is None:
        return dz, wide
    if act == RELU_OF_OUTPUT:
        return activation_grad(dz, residual.to(dz.dtype), act), wide
    z = _apply(wide, *_scale_shift(mean, rstd, weight, bias))
    if residual is not None:
        z += residual
    return activation_grad(dz, z, act), wide


def reference_reduce(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Map dy and x (N, C, *) to the sums (C,) of dz and of dz * x̂."""
    if x.numel() == 0:
        return torch.zeros_like(mean), torch.zeros_like(mean)
    dz, wide = _before_activation(dy, x, mean, rstd, weight, bias, act, residual)
    _, by_x, plain = torch.ops.aten.native_batch_norm_backward(
        dz, wide, torch.ones_like(mean), None, None, mean, rstd, True, 0.0, [False, True, True]
    )
    return plain, by_x


def _fake_reduce(dy, x, mean, rstd, weight, bias, act, residual):
    return torch.empty_like(mean), torch.empty_like(mean)


_reduce_op = define("batch_norm_reduce", reference_reduce, _fake_reduce)
use_kernel(_reduce_op, reference_reduce, "batch_norm.reduce")
_call_reduce = without_gradient(_reduce_op)


def reference_dx(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
    mean_term: Tensor | None,
    var_term: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Map dy and x (N, C, *) to dx, laid out as x, and the residual's gradient (empty without one)."""
    dresidual = x.new_empty(0) if residual is None else torch.empty_like(residual)
    if x.numel() == 0:
        return torch.empty_like(x), dresidual
    dz, wide = _before_activation(dy, x, mean, rstd, weight, bias, act, residual)
    if residual is not None:
        dresidual.copy_(dz)
    scale, _ = _scale_shift(mean, rstd, weight, None)
    if mean_term is None or var_term is None:
        dx = dz * per_channel(scale, x)
    else:
        slope = -scale * rstd * var_term
        shift = -scale * mean_term - slope * mean
        dx = _apply(wide, slope, shift).addcmul_(dz, per_channel(scale, x))
    return dx.to(x.dtype), dresidual


def _fake_dx(dy, x, mean, rstd, weight, bias, act, residual, mean_term, var_term):
    return torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(residual)


_dx_op = define("batch_norm_dx", reference_dx, _fake_dx)
use_kernel(_dx_op, reference_dx, "batch_norm.dx")
_call_dx = without_gradient(_dx_op)


def _save(ctx, inputs, output) -> None:
    x, mean, rstd, weight, bias, act, residual, mean_share, var_share = inputs
    ctx.has_residual = residual is not None
    # Without an activation nothing depends on bias and residual, with one they are needed to find z again.
    ctx.act, residual = for_backward(act, residual, output)
    ctx.save_for_backward(x, mean, rstd, weight, bias, residual, mean_share, var_share)


def _recall(ctx):
    x, mean, rstd, weight, bias, residual, *shares = ctx.saved_tensors
    return x, mean, rstd, weight, bias, ctx.act, recalled_residual(ctx, x, residual), *shares


def _backward(ctx, dy: Tensor):
    x, mean, rstd, weight, bias, residual, mean_share, var_share = ctx.saved_tensors
    args = dy, x, mean, rstd, weight, bias, ctx.act, residual
    needs_x, _, _, needs_weight, needs_bias, _, needs_residual, _, _ = ctx.needs_input_grad
    dx = dweight = dbias = dresidual = None
    follows = needs_x and mean_share is not None
    if needs_weight or needs_bias or follows:
        dbias, dweight = _call_reduce(*args)
    if needs_x or (needs_residual and residual is not None):
        terms = (mean_share * dbias, var_share * dweight) if follows else (None, None)
        dx, dresidual = _call_dx(*args, *terms)
    if residual is None:  # then a residual, if there was one, was the last thing added
        dresidual = dy
    return (
        dx if needs_x else None,
        None,
        None,
        dweight.to(weight.dtype) if needs_weight else None,
        dbias.to(bias.dtype) if needs_bias else None,
        None,
        dresidual if needs_residual else None,
        None,
        None,
    )


_call = differentiable(_op, formula, _save, _recall, _backward)


def reference_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Map x (N, C, *) to y, laid out as x, mean, 1/std and the centred sum of squares (C,)."""
    mean, m2 = reference_stats(x)
    rstd = (m2 / max(_count(x), 1)).add_(eps).rsqrt_()
    return reference(x, mean, rstd, weight, bias, act, residual, None, None), mean, rstd, m2


def _fake_act(x, weight, bias, eps, act, residual):
    mean = x.new_empty(x.shape[1], dtype=acc_dtype(x))
    return torch.empty_like(x), mean, torch.empty_like(mean), torch.empty_like(mean)


_act_op = define("batch_norm_act", reference_act, _fake_act)
use_kernel(_act_op, reference_act, "batch_norm.forward")


def reference_act_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight (C,), bias (C,) and residual (empty without one)."""
    args = dy, x, mean, rstd, weight, bias, act, residual
    dbias, dweight = reference_reduce(*args)
    count = max(_count(x), 1)
    dx, dresidual = reference_dx(*args, dbias / count, dweight / count)
    return dx, dweight, dbias, dresidual


def _fake_act_backward(dy, x, mean, rstd, weight, bias, act, residual):
    dresidual = x.new_empty(0) if residual is None else torch.empty_like(residual)
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean), dresidual


_act_backward_op = define("batch_norm_act_backward", reference_act_backward, _fake_act_backward)
use_kernel(_act_backward_op, reference_act_backward, "batch_norm.backward")
_call_act_backward = without_gradient(_act_backward_op)


def _save_act(ctx, inputs, output) -> None:
    x, weight, bias, ctx.eps, act, residual = inputs
    y, mean, rstd, _ = output
    ctx.has_residual = residual is not None
    ctx.act, residual = for_backward(act, residual, y)
    ctx.save_for_backward(x, mean, rstd, weight, bias, residual)


def _recall_act(ctx):
    x, _, _, weight, bias, residual = ctx.saved_tensors
    return x, weight, bias, ctx.eps, ctx.act, recalled_residual(ctx, x, residual)


def _backward_act(ctx, dy: Tensor, *_statistics):  # they leave this file detached: no gradient
    x, mean, rstd, weight, bias, residual = ctx.saved_tensors
    dx, dweight, dbias, dresidual = _call_act_backward(dy, x, mean, rstd, weight, bias, ctx.act, residual)
    if residual is None:  # then a residual, if there was one, was the last thing added
        dresidual = dy
    return (
        dx,
        as_parameter(dweight, weight),
        as_parameter(dbias, bias),
        None,
        None,
        dresidual if ctx.has_residual else None,
    )


_act = differentiable(_act_op, formula_act, _save_act, _recall_act, _backward_act, wanted=4)
