"""Multi-scale deformable attention, and the masks of point-wise spatial attention."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from normplug.openmmlab.mmcv_ops._common import gradients, slow_op, wide


def _attend(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[list[int]], starts: list[int]) -> Tensor:
    """Weighted sums of bilinear samples; the arguments are those of ``ms_deform_attn_forward``."""
    n, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    sums = []
    for level, ((height, width), start) in enumerate(zip(shapes, starts, strict=True)):
        feature = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(-1, channels, height, width)
        at = locations[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (N heads, queries, points, xy)
        sampled = F.grid_sample(feature, 2 * at - 1, align_corners=False)
        # One pixel outside a sample is 0 and its slope is not; mmcv's kernel does not look at that sample.
        pixel = at * at.new_tensor([width, height]) - 0.5
        inside = ((pixel > -1) & (pixel < pixel.new_tensor([width, height]))).all(-1)
        part = weights[:, :, :, level].transpose(1, 2).reshape(-1, 1, queries, points)
        sums.append((torch.where(inside[:, None], sampled, 0.0) * part).sum(-1))
    return sum(sums).view(n, heads * channels, queries).transpose(1, 2).contiguous()


@slow_op
def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention, for CUDA tensors: on the CPU mmcv has a formula of its own.

    Args:
        value: (N, keys, heads, C), the levels behind each other along axis 1.
        value_spatial_shapes: Height and width of each level, (levels, 2).
        value_level_start_index: Where each level begins.
        sampling_locations: (N, queries, heads, levels, points, 2), x and y in parts of the image.
        attention_weights: (N, queries, heads, levels, points).
        im2col_step: Not used: there are no columns.

    Returns:
        (N, queries, heads * C).
    """
    shapes, starts = value_spatial_shapes.tolist(), value_level_start_index.tolist()
    return _attend(*map(wide, (value, sampling_locations, attention_weights)), shapes, starts).to(value.dtype)


@slow_op
def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Fill the three gradients."""
    formula = partial(_attend, shapes=value_spatial_shapes.tolist(), starts=value_level_start_index.tolist())
    inputs = [wide(x) for x in (value, sampling_locations, attention_weights)]
    grads = gradients(formula, inputs, wide(grad_output))
    for filled, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        filled.copy_(grad)


def _blocks(
    psa_type: int, feature: tuple[int, int], mask: tuple[int, int], half: tuple[int, int]
) -> Iterator[tuple[tuple, tuple]]:
    """Per pixel: where its mask is in (N, mask, mask, H, W), and where that part goes in (N, H, W, H, W)."""
    everything = slice(None)
    for at in product(*map(range, feature)):
        first = [max(0, h - a) for h, a in zip(half, at, strict=True)]
        last = [min(m, n + h - a) for m, n, h, a in zip(mask, feature, half, at, strict=True)]
        source = [slice(f, max(f, k)) for f, k in zip(first, last, strict=True)]
        target = [slice(s.start + a - h, s.stop + a - h) for s, a, h in zip(source, at, half, strict=True)]
        where = (everything, *target, *at) if psa_type == 0 else (everything, *at, *target)
        yield (everything, *source, *at), where


@slow_op
def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Fill (N, HW, H, W) ``output`` with the masks (N, h_mask w_mask, H, W), each laid around its own pixel.

    Args:
        psa_type: 0 collects: axis 1 of the output is the pixel that a mask reaches; 1 distributes: axis 1 is its own.
    """
    masks = input.view(num_, h_mask, w_mask, h_feature, w_feature)
    pairs = output.view(num_, h_feature, w_feature, h_feature, w_feature)
    sizes = (h_feature, w_feature), (h_mask, w_mask), (half_h_mask, half_w_mask)
    for mask, pair in _blocks(psa_type, *sizes):
        pairs[pair] = masks[mask]


@slow_op
def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Fill ``grad_input``; what no pixel reads keeps the zeros it came with."""
    masks = grad_input.view(num_, h_mask, w_mask, h_feature, w_feature)
    pairs = grad_output.reshape(num_, h_feature, w_feature, h_feature, w_feature)
    sizes = (h_feature, w_feature), (h_mask, w_mask), (half_h_mask, half_w_mask)
    for mask, pair in _blocks(psa_type, *sizes):
        masks[mask] = pairs[pair]
