"""weight_standardize: each filter of a convolution with mean 0 and deviation 1, for one weight or for many."""

from collections.abc import Sequence

import torch
from torch import Tensor

from normplug.ops._blocks import row_blocks
from normplug.ops._common import acc_dtype, dense, is_channels_last

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
        ValueError: If a filter has no more values than correction.

    Reference:
        S. Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", arXiv
        1903.10520; the defaults are those of the authors' PyTorch code (unbiased, eps outside the root).
    """
    return weight_standardize_many([weight], eps, correction, eps_inside)[0]


def weight_standardize_many(
    weights: Sequence[Tensor], eps: float = 1e-5, correction: int = 1, eps_inside: bool = False
) -> list[Tensor]:
    """Return ``weight_standardize`` of each weight, from one op.

    Args:
        weights: Weights (O, I, *), of one device and dtype; their shapes may differ.
        eps: Added to the standard deviation or, with eps_inside, to the variance.
        correction: The variance divides by the number of values minus this.
        eps_inside: Divide by sqrt(var + eps) instead.

    Raises:
        ValueError: If a filter has no more values than correction.
    """
    for weight in weights:
        size = weight.shape[1:].numel()
        if weight.ndim < 2 or size <= correction:
            raise ValueError(
                f"weight_standardize needs filters of more than {correction} values to take their deviation, but got "
                f"a weight of shape {tuple(weight.shape)} with {size}. Leave such a convolution (a depthwise 1x1) as "
                f"it is."
            )
    if not weights:
        return []
    return _op([dense(weight) for weight in weights], eps, correction, eps_inside)[0]


def _rows(weight: Tensor) -> Tensor:
    """View weight (O, I, *), contiguous or channels-last, as (O, I·…) in the order of memory."""
    return (weight.movedim(1, -1) if is_channels_last(weight) else weight).flatten(1)


def _divisor(std: Tensor, eps: float, eps_inside: bool) -> Tensor:
    return (std * std + eps).sqrt_() if eps_inside else std + eps


def reference(
    weights: list[Tensor], eps: float, correction: int, eps_inside: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Map weights (O, I, *) to standardized ones, laid out as they are, and mean and std (O,) for backward."""
    outs, means, stds = [], [], []
    for weight in weights:
        wide, out = acc_dtype(weight), torch.empty_like(weight)
        rows, out_rows = _rows(weight), _rows(out)
        mean, std = (torch.empty(len(weight), 1, dtype=wide, device=weight.device) for _ in range(2))
        for block in row_blocks(rows):
            w = rows[block].to(wide)
            m = w.mean(1, keepdim=True)
            d = w - m
            s = d.square().sum(1, keepdim=True).div_(rows.shape[1] - correction).sqrt_()
            mean[block], std[block] = m, s
            torch.div(d, _divisor(s, eps, eps_inside), out=out_rows[block])
        outs.append(out)
        means.append(mean.squeeze(1))
        stds.append(std.squeeze(1))
    return outs, means, stds


_op = torch.library.custom_op("normplug::weight_standardize", reference, mutates_args=())


@_op.register_fake
def _(weights, eps, correction, eps_inside):
    def per_filter():
        return [w.new_empty(len(w), dtype=acc_dtype(w)) for w in weights]

    return [torch.empty_like(w) for w in weights], per_filter(), per_filter()


def reference_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    means: list[Tensor],
    stds: list[Tensor],
    eps: float,
    correction: int,
    eps_inside: bool,
) -> list[Tensor]:
    """Return the gradients of the weights.

    With d = w - mean, D the divisor and g the gradient of d / D,

        dw = (g - mean(g)) / D - d * sum(g * d) / ((size - correction) * D² * S)

    where S is std if eps is outside the root and D if it is inside.
    """
    outs = []
    for grad, weight, mean, std in zip(grads, weights, means, stds, strict=True):
        out, wide = torch.empty_like(weight), mean.dtype
        rows, out_rows = _rows(weight), _rows(out)
        grad_rows = (grad.movedim(1, -1) if is_channels_last(weight) else grad).flatten(1)
        for block in row_blocks(rows):
            g, m, s = grad_rows[block].to(wide), mean[block, None], std[block, None]
            d = rows[block].to(wide) - m
            divisor = _divisor(s, eps, eps_inside)
            slope = (d * g).sum(1, keepdim=True) / ((rows.shape[1] - correction) * divisor * divisor)
            # The deviation of equal values is 0, and so is d: no 0 / 0.
            slope /= divisor if eps_inside else torch.where(s > 0, s, 1)
            shift = g.mean(1, keepdim=True) / divisor
            d.mul_(slope).add_(shift)
            torch.addcdiv(-d, g, divisor, out=out_rows[block])
        outs.append(out)
    return outs


_backward_op = torch.library.custom_op("normplug::weight_standardize_backward", reference_backward, mutates_args=())


@_backward_op.register_fake
def _(grads, weights, means, stds, eps, correction, eps_inside):
    return [torch.empty_like(w) for w in weights]


def _save(ctx, inputs, output) -> None:
    weights, ctx.eps, ctx.correction, ctx.eps_inside = inputs
    ctx.save_for_backward(*weights, *output[1], *output[2])


def _backward(ctx, grads, _dmeans, _dstds):  # the statistics never leave this file: no gradient
    saved, count = ctx.saved_tensors, len(ctx.saved_tensors) // 3
    weights, means, stds = saved[:count], saved[count : 2 * count], saved[2 * count :]
    grads = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)]
    options = ctx.eps, ctx.correction, ctx.eps_inside
    return _backward_op(grads, list(weights), list(means), list(stds), *options), None, None, None


_op.register_autograd(_backward, setup_context=_save)
