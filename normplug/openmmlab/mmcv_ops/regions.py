"""Pooling of regions: upright, rotated, and moved bin by bin."""

from collections.abc import Iterator

import torch
from torch import Tensor

from normplug.openmmlab.mmcv_ops._common import op, slow_op, wide


@op
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill ``output``; pool mode 1 averages the samples of a bin, 0 takes the greatest and where it lies."""
    x, boxes = wide(input), wide(rois)
    size = aligned_height, aligned_width
    if pool_mode == 1:
        pooled = torch.ops.torchvision.roi_align(x, boxes, spatial_scale, *size, sampling_ratio, aligned)
        output.copy_(pooled)
        return
    for n, (image, ys, xs) in enumerate(_sample_grids(boxes, size, spatial_scale, sampling_ratio, aligned)):
        if ys.numel() == 0 or xs.numel() == 0:  # an aligned box of no height or width has no samples
            output[n], argmax_y[n], argmax_x[n] = -10000, -1, -1
            continue
        values, y, x_at = _greatest_sample(x[image], ys, xs)
        output[n], argmax_y[n], argmax_x[n] = values, y, x_at


@op
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    grad, boxes = wide(grad_output), wide(rois)
    if pool_mode == 1:
        size = aligned_height, aligned_width
        ratio = sampling_ratio
        grad_input += torch.ops.torchvision._roi_align_backward(
            grad, boxes, spatial_scale, *size, *grad_input.shape, ratio, aligned
        )
        return
    y, x = wide(argmax_y), wide(argmax_x)
    height, width = grad_input.shape[2:]
    grad = torch.where(_inside(y, x, height, width) & (y != -1), grad, 0.0)
    plane = _planes(rois, grad_input) * (height * width)
    total = grad_input.new_zeros(grad_input.numel(), dtype=grad.dtype)
    for y_corner, y_part in _neighbours(y, height):
        for x_corner, x_part in _neighbours(x, width):
            at = plane + y_corner * width + x_corner
            total.index_add_(0, at.flatten(), (grad * y_part * x_part).flatten())
    grad_input += total.view_as(grad_input)


def _planes(rois: Tensor, features: Tensor) -> Tensor:
    """Which of the N * C planes of ``features`` each box and channel reads: (K, C, 1, 1)."""
    channels = features.shape[1]
    channel = torch.arange(channels, device=rois.device)
    return (rois[:, :1].long() * channels + channel)[:, :, None, None]


def _inside(y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    return (y >= -1) & (y <= height) & (x >= -1) & (x <= width)


def _neighbours(at: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two pixels that linear interpolation at ``at`` reads, each with its share; edge pixels repeat."""
    at = at.clamp(0, size - 1)
    low = at.floor()
    part = at - low
    low = low.long()
    return (low, 1 - part), ((low + 1).clamp(max=size - 1), part)


def _sample_grids(
    rois: Tensor, size: tuple[int, int], scale: float, sampling_ratio: int, aligned: bool
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Per box: image, sample rows (bins, samples per bin) and sample columns (likewise)."""
    corners = rois[:, 1:] * scale - (0.5 if aligned else 0.0)
    extent = corners[:, 2:] - corners[:, :2]
    if not aligned:
        extent = extent.clamp(min=1)
    bins = extent / extent.new_tensor([size[1], size[0]])
    counts = bins.ceil().long() if sampling_ratio <= 0 else torch.full_like(bins, sampling_ratio).long()
    images = rois[:, 0].long().tolist()
    for image, start, step, (across, down) in zip(images, corners[:, :2], bins, counts.tolist(), strict=True):
        axes = []
        for axis, number, samples in ((1, size[0], down), (0, size[1], across)):
            bin_index = torch.arange(number, device=rois.device, dtype=rois.dtype)[:, None]
            sample = torch.arange(max(samples, 0), device=rois.device, dtype=rois.dtype) + 0.5
            axes.append(start[axis] + bin_index * step[axis] + sample * step[axis] / max(samples, 1))
        yield image, axes[0], axes[1]


def _greatest_sample(feature: Tensor, ys: Tensor, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bilinear samples of (C, H, W) ``feature``; per bin the greatest, its row and its column."""
    channels, height, width = feature.shape
    rows, columns = ys.flatten(), xs.flatten()
    lines = sum(feature[:, at] * part[:, None] for at, part in _neighbours(rows, height))
    values = sum(lines[:, :, at] * part for at, part in _neighbours(columns, width))
    values = torch.where(_inside(rows[:, None], columns, height, width), values, 0.0)
    values = values.view(channels, *ys.shape, *xs.shape).transpose(2, 3).flatten(3)  # (C, bins, bins, samples)
    best, index = values.max(-1)
    down, across = index // xs.shape[1], index % xs.shape[1]
    y = ys[torch.arange(len(ys), device=ys.device)[:, None], down]
    x = xs[torch.arange(len(xs), device=xs.device), across]
    return best, y, x


@op
def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fill ``output`` with each bin's maximum and ``argmax`` with its place y * W + x, -1 in empty bins.

    mmcv cuts unrounded boxes, torchvision rounded ones, so this is plain ATen: a loop over the boxes.
    """
    x, boxes = wide(input), wide(rois)
    width = x.shape[3]
    start = boxes[:, 1:3] * spatial_scale
    extent = (boxes[:, 3:5] + 1) * spatial_scale - start
    valid = (extent > 0).all(1)
    edges = []
    for axis, number in ((1, pooled_height), (0, pooled_width)):
        step = extent[:, axis, None] / number
        index = torch.arange(number, device=x.device, dtype=boxes.dtype)
        low = (index * step + start[:, axis, None]).floor()
        high = ((index + 1) * step + start[:, axis, None]).ceil()
        ends = torch.stack((low, high), -1).clamp(0, x.shape[3 - axis])
        edges.append(torch.where(valid[:, None, None], ends, 0.0).long().tolist())
    output.zero_()
    argmax.fill_(-1)
    for n, (image, rows, columns) in enumerate(zip(boxes[:, 0].long().tolist(), *edges, strict=True)):
        top, bottom = rows[0][0], rows[-1][1]
        if bottom <= top:
            continue
        band = x[image, :, top:bottom]
        for j, (left, right) in enumerate(columns):
            if right <= left:
                continue
            line, column = band[:, :, left:right].max(-1)
            for i, (low, high) in enumerate(rows):
                if high <= low:
                    continue
                best, row = line[:, low - top : high - top].max(-1)
                row = row + (low - top)
                output[n, :, i, j] = best
                argmax[n, :, i, j] = (row + top) * width + left + column.gather(1, row[:, None])[:, 0]


@op
def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    at = _planes(rois, grad_input) * grad_input[0, 0].numel() + argmax.clamp(min=0)
    grad = torch.where(argmax >= 0, wide(grad_output), 0.0)
    total = grad_input.new_zeros(grad_input.numel(), dtype=grad.dtype)
    total.index_add_(0, at.flatten(), grad.flatten())
    grad_input += total.view_as(grad_input)


# ---- with a grid of samples that is not upright


def _corners(y: Tensor, x: Tensor, size: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The four pixels that a sample at ``y``, ``x`` reads, numbered row by row, each with its share; 0 outside."""
    height, width = size
    inside = _inside(y, x, height, width)
    for row, row_part in _neighbours(y, height):
        for column, column_part in _neighbours(x, width):
            yield row * width + column, torch.where(inside, row_part * column_part, 0.0)


def _read(feature: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear samples of (C, H, W) ``feature`` at P places, (C, *P); the border as in RoIAlign."""
    flat = feature.flatten(1)
    return sum(flat[:, at] * part for at, part in _corners(y, x, feature.shape[1:]))


def _write(feature: Tensor, y: Tensor, x: Tensor, grad: Tensor) -> None:
    """The transpose of ``_read``: add (C, *P) ``grad`` to (C, H, W) ``feature``."""
    flat = feature.view(len(feature), -1)
    for at, part in _corners(y, x, feature.shape[1:]):
        flat.index_add_(1, at.flatten(), (grad * part).flatten(1))


def _bin_samples(number: int, samples: int, start: Tensor, step: Tensor) -> Tensor:
    """Where a box is sampled along one axis: (bins, samples per bin)."""
    index = torch.arange(number, device=step.device, dtype=step.dtype)[:, None]
    sample = torch.arange(samples, device=step.device, dtype=step.dtype) + 0.5
    return start + index * step + sample * step / max(samples, 1)


def _rotated_grids(
    rois: Tensor, size: tuple[int, int], scale: float, sampling_ratio: int, aligned: bool, clockwise: bool
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Per box: image, rows and columns of its samples, both (bins, samples, bins, samples).

    Raises:
        ValueError: If an aligned box has a negative width or height, as mmcv's op on the CPU.
    """
    centers = rois[:, 1:3] * scale - (0.5 if aligned else 0.0)
    extents = rois[:, 3:5] * scale
    if not aligned:
        extents = extents.clamp(min=1)
    elif (extents < 0).any():
        raise ValueError("roi_align_rotated: a box has a negative width or height")
    steps = extents / extents.new_tensor([size[1], size[0]])
    counts = steps.ceil().long() if sampling_ratio <= 0 else torch.full_like(steps, sampling_ratio).long()
    angles = -rois[:, 5] if clockwise else rois[:, 5]
    images = rois[:, 0].long().tolist()
    for n, (across, down) in enumerate(counts.tolist()):
        y = _bin_samples(size[0], down, -extents[n, 1] / 2, steps[n, 1])[:, :, None, None]
        x = _bin_samples(size[1], across, -extents[n, 0] / 2, steps[n, 0])
        cos, sin = angles[n].cos(), angles[n].sin()
        yield images[n], y * cos - x * sin + centers[n, 1], y * sin + x * cos + centers[n, 0]


@slow_op
def roi_align_rotated_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    """Fill ``output`` with the averages over the bins of boxes (image, x, y, width, height, angle in radians)."""
    x, boxes = wide(input), wide(rois)
    size = pooled_height, pooled_width
    for n, (image, *grid) in enumerate(_rotated_grids(boxes, size, spatial_scale, sampling_ratio, aligned, clockwise)):
        output[n] = _read(x[image], *grid).mean((2, 4)) if grid[0].numel() else 0.0


@slow_op
def roi_align_rotated_backward(
    top_grad: Tensor,
    rois: Tensor,
    bottom_grad: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    """Add to ``bottom_grad``."""
    grad, boxes = wide(top_grad), wide(rois)
    size = pooled_height, pooled_width
    total = torch.zeros_like(wide(bottom_grad))
    for n, (image, y, x) in enumerate(_rotated_grids(boxes, size, spatial_scale, sampling_ratio, aligned, clockwise)):
        share = grad[n][:, :, None, :, None] / max(y.shape[1] * y.shape[3], 1)
        _write(total[image], y, x, share.expand(-1, *y.shape))
    bottom_grad += total


def _moved_grids(
    rois: Tensor, offset: Tensor, size: tuple[int, int], scale: float, sampling_ratio: int, gamma: float
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Per box: image, its size times ``gamma`` (width, height), and rows and columns of its samples.

    Both are (bins, samples, bins, samples), each bin moved by its own part of ``offset`` (K, 2, bins, bins).
    """
    corners = rois[:, 1:] * scale - 0.5
    extents = corners[:, 2:] - corners[:, :2]
    steps = extents / extents.new_tensor([size[1], size[0]])
    counts = steps.ceil().long() if sampling_ratio <= 0 else torch.full_like(steps, sampling_ratio).long()
    images = rois[:, 0].long().tolist()
    for n, counts_n in enumerate(counts.tolist()):
        across, down = (max(count, 0) for count in counts_n)
        reach = gamma * extents[n]
        y = _bin_samples(size[0], down, corners[n, 1], steps[n, 1])[:, :, None, None]
        x = _bin_samples(size[1], across, corners[n, 0], steps[n, 0])[None, None]
        y, x = torch.broadcast_tensors(y, x)
        if offset.numel():
            move = offset[n, :, :, None, :, None]
            x, y = x + reach[0] * move[0], y + reach[1] * move[1]
        yield images[n], reach, y, x


@slow_op
def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Fill ``output`` with the averages over bins that ``offset`` moves, in parts ``gamma`` of the box; or is empty."""
    values, boxes, moves = wide(input), wide(rois), wide(offset)
    size = pooled_height, pooled_width
    for n, (image, _, y, x) in enumerate(_moved_grids(boxes, moves, size, spatial_scale, sampling_ratio, gamma)):
        output[n] = _read(values[image], y, x).mean((2, 4)) if y.numel() else 0.0


@slow_op
def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Add to the gradients of input and offset.

    At the border the offset's is mmcv's, which is not the slope of the pooled values: it interpolates with the place as
    it was before it was moved onto the image.
    """
    grad, values, boxes, moves = map(wide, (grad_output, input, rois, offset))
    size = pooled_height, pooled_width
    height, width = input.shape[2:]
    total = torch.zeros_like(wide(grad_input))
    for n, (image, reach, y, x) in enumerate(_moved_grids(boxes, moves, size, spatial_scale, sampling_ratio, gamma)):
        share = (grad[n][:, :, None, :, None] / max(y.shape[1] * y.shape[3], 1)).expand(-1, *y.shape)
        _write(total[image], y, x, share)
        if not offset.numel():
            continue
        (top, _), (bottom, _) = _neighbours(y, height)
        (left, _), (right, _) = _neighbours(x, width)
        flat = values[image].flatten(1)
        share = torch.where(_inside(y, x, height, width), share, 0.0)
        across = _slope(flat, top * width, bottom * width, left, right, y - top, bottom - y)
        along = _slope(flat, left, right, top * width, bottom * width, x - left, right - x)
        grad_offset[n, 0] += reach[0] * (share * across).sum((0, 2, 4))
        grad_offset[n, 1] += reach[1] * (share * along).sum((0, 2, 4))
    grad_input += total


def _slope(
    flat: Tensor, first: Tensor, second: Tensor, low: Tensor, high: Tensor, beyond: Tensor, before: Tensor
) -> Tensor:
    """The rise from ``low`` to ``high``, between the lines ``first`` (weight ``before``) and ``second``."""
    return (flat[:, second + high] - flat[:, second + low]) * beyond + (
        flat[:, first + high] - flat[:, first + low]
    ) * before
