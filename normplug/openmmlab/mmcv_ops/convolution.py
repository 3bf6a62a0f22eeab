"""Deformable and masked convolution, and CARAFE, which is a convolution with a kernel of its own at every pixel."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from normplug.openmmlab.mmcv_ops._common import gradients, op, slow_op, wide


def _deform_conv(input, weight, offset, mask, bias, geometry) -> Tensor:
    # torchvision wants tensors where there is no mask and no bias.
    no_mask, no_bias = input.new_zeros(len(input), 1), input.new_zeros(len(weight))
    return torch.ops.torchvision.deform_conv2d(
        input,
        weight,
        offset,
        no_mask if mask is None else mask,
        no_bias if bias is None else bias,
        *geometry,
        mask is not None,
    )


def _deform_conv_grads(grad, input, weight, offset, mask, geometry) -> tuple[Tensor, ...]:
    """Gradients to input, weight, offset, mask and bias."""
    no_mask, no_bias = input.new_zeros(len(input), 1), input.new_zeros(len(weight))
    grads = torch.ops.torchvision._deform_conv2d_backward(
        grad, input, weight, offset, no_mask if mask is None else mask, no_bias, *geometry, mask is not None
    )
    grads[2][~_sampled(input, weight, offset, geometry)] = 0
    return grads


def _sampled(input: Tensor, weight: Tensor, offset: Tensor, geometry: tuple[int, ...]) -> Tensor:
    """Which offsets, of (N, 2 * places, H, W), belong to a sample less than one pixel outside the image.

    A whole pixel outside a sample is 0, yet its slope towards the image is not. mmcv gives it no gradient, torchvision
    does; and a padded layer whose offsets are still zero has such samples all along its border.
    """
    stride, pad, dilation = geometry[:2], geometry[2:4], geometry[4:6]
    inside = []
    axes = offset.unflatten(1, (-1, *weight.shape[2:], 2)).unbind(4)  # y and x, (N, groups, kernel, kernel, H, W)
    for axis, (at, size) in enumerate(zip(axes, input.shape[2:], strict=True)):
        window = torch.arange(at.shape[4 + axis], device=at.device) * stride[axis] - pad[axis]
        place = torch.arange(at.shape[2 + axis], device=at.device) * dilation[axis]
        shape = [at.shape[d] if d in (2 + axis, 4 + axis) else 1 for d in range(6)]
        at = at + (place[:, None] + window).view(shape)
        inside.append((at > -1) & (at < size))
    return (inside[0] & inside[1])[:, :, :, :, None].expand(-1, -1, -1, -1, 2, -1, -1).reshape(offset.shape)


@op
def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Fill ``output``. torchvision splits the batch by itself: ``im2col_step`` and the buffers are not used."""
    geometry = dH, dW, padH, padW, dilationH, dilationW, group, deformable_group
    output.copy_(_deform_conv(wide(input), wide(weight), wide(offset), None, None, geometry))


@op
def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Add to ``gradInput``, fill ``gradOffset``.

    torchvision computes the weight's gradient along with these two. It waits in ``columns``, the scratch tensor
    that mmcv hands to this function and then to ``deform_conv_backward_parameters``, so nothing is done twice.
    """
    geometry = dH, dW, padH, padW, dilationH, dilationW, group, deformable_group
    grads = _deform_conv_grads(wide(gradOutput), wide(input), wide(weight), wide(offset), None, geometry)
    gradInput += grads[0]
    gradOffset.copy_(grads[2])
    columns.resize_(weight.shape).copy_(grads[1])


@op
def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add ``scale`` times the weight's gradient to ``gradWeight``."""
    if columns.shape == gradWeight.shape:  # left there by deform_conv_backward_input
        gradWeight.add_(columns, alpha=scale)
        columns.set_()
        return
    geometry = dH, dW, padH, padW, dilationH, dilationW, group, deformable_group
    any_weight = torch.zeros_like(wide(gradWeight))  # its own gradient does not depend on it
    grads = _deform_conv_grads(wide(gradOutput), wide(input), any_weight, wide(offset), None, geometry)
    gradWeight.add_(grads[1], alpha=scale)


def _flat_offset(x: Tensor, name: str, per_place: int, weight: Tensor, output: Tensor, groups: int) -> Tensor:
    """The beginning of each sample's buffer as (N, channels, H, W) of ``output``, which is how mmcv reads it.

    DyHead hands over the offsets and masks of a level twice as large; ``DyHead`` checkpoints were trained that way.

    Raises:
        ValueError: If a buffer is too short; mmcv reads past its end.
    """
    size = (per_place * groups * weight.shape[2] * weight.shape[3], *output.shape[2:])
    needed = size[0] * size[1] * size[2]
    if len(x) < len(output) or x[:1].numel() < needed * min(len(x), 1):
        raise ValueError(
            f"modulated_deform_conv: {name} is {tuple(x.shape)}, but an output of {tuple(output.shape)} with "
            f"{groups} deform_groups reads {(len(output), *size)}"
        )
    return x[: len(output)].flatten(1)[:, :needed].reshape(len(output), *size)


@op
def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Fill ``output``. Offset and mask may be larger than it: mmcv reads the beginning of each sample's numbers."""
    geometry = stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group
    offset = _flat_offset(offset, "offset", 2, weight, output, deformable_group)
    mask = _flat_offset(mask, "mask", 1, weight, output, deformable_group)
    x, w, at, part = map(wide, (input, weight, offset, mask))
    output.copy_(_deform_conv(x, w, at, part, wide(bias) if with_bias else None, geometry))


@op
def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Add to the gradients of input, weight and bias, fill those of offset and mask."""
    geometry = stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group
    offset = _flat_offset(offset, "offset", 2, weight, grad_output, deformable_group)
    mask = _flat_offset(mask, "mask", 1, weight, grad_output, deformable_group)
    grads = _deform_conv_grads(*map(wide, (grad_output, input, weight, offset, mask)), geometry)
    grad_input += grads[0]
    grad_weight += grads[1]
    for whole, part in ((grad_offset, grads[2]), (grad_mask, grads[3])):
        flat = part.flatten(1)
        whole.flatten(1)[: len(flat), : flat.shape[1]] = flat
    if with_bias:
        grad_bias += grads[4]


# ---- masked convolution


@op
def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Fill (C * kernel_h * kernel_w, M) ``col`` with the windows of (1, C, H, W) ``im`` at M pixels."""
    padded = F.pad(im[0], (pad_w, pad_w, pad_h, pad_h))
    windows = padded.unfold(1, kernel_h, 1).unfold(2, kernel_w, 1)  # (C, H, W, kernel, kernel), a view
    col.copy_(windows[:, mask_h_idx, mask_w_idx].permute(0, 2, 3, 1).flatten(0, 2))


@op
def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Write the M columns of (C, M) ``col`` to their pixels of (1, C, H, W) ``im``."""
    im[0][:, mask_h_idx, mask_w_idx] = col


# ---- CARAFE


def _reassemble(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """At each pixel of the larger image: the window of (N, C, H, W) around it, weighted by that pixel's own mask."""
    n, channels, height, width = features.shape
    padded = F.pad(features, [kernel_size // 2] * 4).view(
        n, group_size, channels // group_size, 1, height + kernel_size - 1, 1, width + kernel_size - 1, 1
    )
    masks = masks.view(n, group_size, 1, kernel_size**2, height, scale_factor, width, scale_factor)
    output = 0
    for place in range(kernel_size**2):  # a view each: no copy of the features is kept for backward
        i, j = divmod(place, kernel_size)
        window = padded[:, :, :, 0, i : i + height, :, j : j + width]
        output = output + window * masks[:, :, :, place]
    return output.reshape(n, channels, height * scale_factor, width * scale_factor)


@slow_op
def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fill ``output`` (N, C, scale H, scale W), and ``rfeatures``, which backward gets in place of the features."""
    rfeatures.copy_(features)
    output.copy_(_reassemble(wide(features), wide(masks), kernel_size, group_size, scale_factor))


@slow_op
def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fill the gradients of features and masks."""
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


@slow_op
def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    output.copy_(_reassemble(wide(features), wide(masks), kernel_size, group_size, scale_factor))


@slow_op
def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    formula = partial(_reassemble, kernel_size=kernel_size, group_size=group_size, scale_factor=scale_factor)
    grads = gradients(formula, (wide(features), wide(masks)), wide(top_grad))
    bottom_grad.copy_(grads[0])
    mask_grad.copy_(grads[1])
