"""weight_standardize: each filter of a convolution with mean 0 and deviation 1, for one weight or for many."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from normplug.ops._blocks import row_blocks
from normplug.ops._common import acc_dtype, check_tensor, dense, is_channels_last
from normplug.ops._registration import (
    below_autograd,
    define,
    in_torch,
    pull_back,
    register_gradient,
    use_kernel,
    without_gradient,
)

__all__ = ["weight_standardize", "weight_standardize_many"]


def weight_standardize(weight: Tensor, eps: float = 1e-5, correction: int = 1, eps_inside: bool = False) -> Tensor:
    """Return (weight - mean) / (std + eps), mean and std over each filter weight[o].

    A filter of equal values comes out as 0 and its gradient is finite.

    Args:
        weight: Filters (O, I, *), in any layout.
        eps: Added to the standard deviation or, with eps_inside, to the variance.
        correction: The variance divides by the number of values minus this: 1 is unbiased, 0 population.
        eps_inside: Divide by sqrt(var + eps) instead.

    Returns:
        A tensor with shape, dtype and memory format of the weight, computed in float32 (float64 for float64).

    Raises:
        TypeError: If a weight is no dense floating-point tensor.
        ValueError: If a filter has no more values than correction.

    Reference:
        S. Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", arXiv
        1903.10520; the defaults are those of the authors' PyTorch code (unbiased, eps outside the root).
    """
    if has_torch_function_unary(weight):
        return handle_torch_function(weight_standardize, (weight,), weight, eps, correction, eps_inside)
    return weight_standardize_many([weight], eps, correction, eps_inside)[0]


def weight_standardize_many(
    weights: Sequence[Tensor], eps: float = 1e-5, correction: int = 1, eps_inside: bool = False
) -> list[Tensor]:
    """Return ``weight_standardize`` of each weight, from one op; on CUDA also from one launch.

    A weight whose result has no part in the loss gets no gradient, as if it had been left out.

    Args:
        weights: Weights (O, I, *), of one device and dtype; their shapes may differ.
        eps: Added to the standard deviation or, with eps_inside, to the variance.
        correction: The variance divides by the number of values minus this.
        eps_inside: Divide by sqrt(var + eps) instead.

    Raises:
        TypeError: If a weight is no dense floating-point tensor.
        ValueError: If a filter has no more values than correction.
    """
    for weight in weights:
        _check(weight, correction)
    if in_torch():
        return [formula(weight, eps, correction, eps_inside) for weight in weights]
    weights = [dense(weight) for weight in weights]
    if not weights:
        return []
    if _needs_eager_gradients(weights):
        return list(_Standardize.apply((eps, correction, eps_inside), *weights))
    return _standardize(weights, eps, correction, eps_inside)[0]


def formula(weight: Tensor, eps: float, correction: int, eps_inside: bool) -> Tensor:
    """Return ``weight_standardize`` by torch's operations."""
    w = weight.to(acc_dtype(weight))
    rest = tuple(range(1, w.ndim))
    centred = w - w.mean(rest, keepdim=True)
    var = centred.square().sum(rest, keepdim=True) / (math.prod(w.shape[1:]) - correction)
    if eps_inside:
        return (centred / (var + eps).sqrt()).to(weight.dtype)
    spread = var > 0  # the root of 0 has no derivative, and equal values need none
    std = torch.where(spread, torch.where(spread, var, 1).sqrt(), 0)
    return (centred / (std + eps)).to(weight.dtype)


def _check(weight: Tensor, correction: int) -> None:
    check_tensor("weight_standardize", weight, "weight")
    size = weight.shape[1:].numel()
    if weight.ndim < 2 or size <= correction:
        raise ValueError(
            f"weight_standardize needs filters of more than {correction} values to take their deviation, but got a "
            f"weight of shape {tuple(weight.shape)} with {size}. Leave such a convolution (a depthwise 1x1) as it is."
        )


def _rows(weight: Tensor, like: Tensor | None = None) -> Tensor:
    """View weight (O, I, *), contiguous or channels-last, as (O, I·…) in the order of memory (that of ``like``)."""
    return (weight.movedim(1, -1) if is_channels_last(weight if like is None else like) else weight).flatten(1)


def _divisor(std: Tensor, eps: float, eps_inside: bool) -> Tensor:
    return (std * std).add_(eps).sqrt_() if eps_inside else std + eps


def reference(weight: Tensor, eps: float, correction: int, eps_inside: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Map weight (O, I, *) to the standardized one, laid out as it is, and mean and std (O, 1) for backward."""
    out = torch.empty_like(weight)
    rows, out_rows = _rows(weight), _rows(out)
    mean, std = (torch.empty(len(weight), 1, dtype=acc_dtype(weight), device=weight.device) for _ in range(2))
    for block in row_blocks(rows):
        w, m, s = rows[block].to(mean.dtype), mean[block], std[block]
        torch.mean(w, 1, keepdim=True, out=m)
        d = w - m
        torch.sum(d.square(), 1, keepdim=True, out=s)
        s.div_(rows.shape[1] - correction).sqrt_()
        torch.div(d, _divisor(s, eps, eps_inside), out=out_rows[block])
    return out, mean, std


def reference_backward(
    grad: Tensor, weight: Tensor, mean: Tensor, std: Tensor, eps: float, correction: int, eps_inside: bool
) -> Tensor:
    """Return the gradient of the weight.

    With d = w - mean, D the divisor and g the gradient of d / D,

        dw = (g - mean(g)) / D - d * sum(g * d) / ((size - correction) * D² * S)

    where S is std if eps is outside the root and D if it is inside.
    """
    out = torch.empty_like(weight)
    rows, out_rows, grad_rows = _rows(weight), _rows(out), _rows(grad, like=weight)
    for block in row_blocks(rows):
        g, s = grad_rows[block].to(mean.dtype), std[block]
        d = rows[block].to(mean.dtype) - mean[block]
        divisor = _divisor(s, eps, eps_inside)
        # The deviation of equal values is 0, and so is d: no 0 / 0.
        root = divisor if eps_inside else s.clamp_min(1e-30)
        slope = (d * g).sum(1, keepdim=True).div_(root).div_(divisor.square().mul_(rows.shape[1] - correction))
        dw = (g - g.mean(1, keepdim=True)).div_(divisor)
        torch.addcmul(dw, d, slope, value=-1, out=out_rows[block])
    return out


def reference_many(
    weights: list[Tensor], eps: float, correction: int, eps_inside: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return what ``reference`` returns: a list of the first results, mean and std below one another."""
    results = [reference(weight, eps, correction, eps_inside) for weight in weights]
    return [r[0] for r in results], torch.cat([r[1] for r in results]), torch.cat([r[2] for r in results])


def reference_many_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    mean: Tensor,
    std: Tensor,
    eps: float,
    correction: int,
    eps_inside: bool,
) -> list[Tensor]:
    """Return what ``reference_backward`` returns for each weight."""
    each = zip(grads, weights, *_of_each(weights, mean, std), strict=True)
    return [reference_backward(*tensors, eps, correction, eps_inside) for tensors in each]


def _of_each(weights: Sequence[Tensor], mean: Tensor, std: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Cut the statistics of all filters into those of each weight."""
    counts = [len(weight) for weight in weights]
    return mean.split(counts), std.split(counts)


def _fake(weight, eps, correction, eps_inside):
    stats = weight.new_empty(len(weight), 1, dtype=acc_dtype(weight))
    return torch.empty_like(weight), stats, torch.empty_like(stats)


def _fake_backward(grad, weight, mean, std, eps, correction, eps_inside):
    return torch.empty_like(weight)


def _fake_many(weights, eps, correction, eps_inside):
    stats = weights[0].new_empty(sum(map(len, weights)), 1, dtype=acc_dtype(weights[0]))
    return [torch.empty_like(weight) for weight in weights], stats, torch.empty_like(stats)


def _fake_many_backward(grads, weights, mean, std, eps, correction, eps_inside):
    return [torch.empty_like(weight) for weight in weights]


# Two ops and not one of a list: what torch does around a list of tensors takes longer than standardizing one weight.
_op = define("weight_standardize", reference, _fake)
_backward_op = define("weight_standardize_backward", reference_backward, _fake_backward)
_OPTIONS = "float eps, int correction, bool eps_inside"  # schemas by hand: torch 2.6 infers none of list[Tensor]
_many_op = define(
    "weight_standardize_many",
    reference_many,
    _fake_many,
    f"(Tensor[] weights, {_OPTIONS}) -> (Tensor[], Tensor, Tensor)",
)
_many_backward_op = define(
    "weight_standardize_many_backward",
    reference_many_backward,
    _fake_many_backward,
    f"(Tensor[] grads, Tensor[] weights, Tensor mean, Tensor std, {_OPTIONS}) -> Tensor[]",
)
use_kernel(_op, reference, "weight_standardize.forward")
use_kernel(_backward_op, reference_backward, "weight_standardize.backward")
use_kernel(_many_op, reference_many, "weight_standardize.forward_many")
use_kernel(_many_backward_op, reference_many_backward, "weight_standardize.backward_many")
_standardize_backward = without_gradient(_backward_op)
_many_backward = without_gradient(_many_backward_op)


def _save(ctx, inputs, output) -> None:
    weight, *ctx.options = inputs
    ctx.save_for_backward(weight, output[1], output[2])


def _backward(ctx, grad, _dmean, _dstd):  # the statistics never leave this file: no gradient
    return _backward_op(grad, *ctx.saved_tensors, *ctx.options), None, None, None


def _save_many(ctx, inputs, output) -> None:
    weights, *ctx.options = inputs
    ctx.save_for_backward(*weights, *output[1:])


def _backward_many(ctx, grads, _dmean, _dstd):
    *weights, mean, std = ctx.saved_tensors
    return _many_backward_op(grads, weights, mean, std, *ctx.options), None, None, None


register_gradient(_op, _save, _backward)
register_gradient(_many_op, _save_many, _backward_many)


class _Standardize(torch.autograd.Function):
    """The gradient of both ops outside of compilers, in half the time for many weights.

    It keeps its tensors by itself. Activation checkpointing counts what its part of a network saves and demands the
    same number when it runs again; here it sees none, whether a layer standardizes its weight or is handed the result.
    """

    @staticmethod
    def forward(ctx, options, *weights):
        with below_autograd():
            outs, mean, std = _standardize(weights, *options)
        ctx.kept = options, [weight._version for weight in weights], weights, mean, std
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grads):
        options, versions, weights, mean, std = ctx.kept
        used = [i for i, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[i + 1]]
        if any(versions[i] != weights[i]._version for i in used):
            raise RuntimeError(
                "A weight was modified by an inplace operation between its standardization and the backward pass, "
                "which needs it as it was. Update weights (optimizer.step(), load_state_dict()) after backward()."
            )
        result: list[Tensor | None] = [None] * len(grads)
        if torch.is_grad_enabled() or in_torch():
            for i in used:
                result[i] = pull_back(formula, (weights[i], *options), (True, False, False, False), grads[i])[0]
            return None, *result
        if used and len(used) < len(weights):
            means, stds = _of_each(weights, mean, std)
            mean, std = torch.cat([means[i] for i in used]), torch.cat([stds[i] for i in used])
        dws = _gradients([grads[i] for i in used], [weights[i] for i in used], mean, std, *options)
        for i, dw in zip(used, dws, strict=True):
            result[i] = dw
        return None, *result


def _gradients(grads: list[Tensor], weights: list[Tensor], mean: Tensor, std: Tensor, *options) -> list[Tensor]:
    if len(weights) > 1:
        return _many_backward(grads, weights, mean, std, *options)
    return [_standardize_backward(grads[0], weights[0], mean, std, *options)] if weights else []


def _standardize(weights: Sequence[Tensor], *options) -> tuple[list[Tensor], Tensor, Tensor]:
    if len(weights) > 1:
        return _many_op(list(weights), *options)
    out, mean, std = _op(weights[0], *options)
    return [out], mean, std


def _needs_eager_gradients(weights: list[Tensor]) -> bool:
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and any(weight.requires_grad for weight in weights)
    )
