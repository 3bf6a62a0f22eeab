"""Stand-ins for the compiled functions of ``mmcv._ext`` 2.1.0, on torchvision's operators and plain ATen.

``mmcv.ops`` calls its C++ extension by fixed names, with output tensors that the extension fills. The functions
here keep those names, arguments and fill rules, so that ``mmcv.ops`` runs unchanged on ``mmcv-lite``, on CPU and
CUDA, with empty inputs too. ``OPS`` holds them; whatever else is asked for is a function that raises
``NotImplementedError`` when called, because ``mmcv.ops`` looks up every name while it is imported.

Half precision is computed in float32 and rounded once, on the way into the caller's output.
"""

import struct
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.ops  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor

__all__ = ["OPS", "missing_op"]

OPS: dict[str, Callable] = {}


def _op(function: Callable) -> Callable:
    # The compiled functions record no gradients: mmcv's autograd Functions call forward and backward.
    OPS[function.__name__] = torch.no_grad()(function)
    return OPS[function.__name__]


def missing_op(name: str) -> Callable:
    """Return what ``mmcv._ext.<name>`` is where there is no stand-in: a function that says so when called.

    Raises:
        AttributeError: If ``name`` begins with an underscore; no op does, but Python's own protocols do.
    """
    if name.startswith("_"):
        raise AttributeError(f"module 'mmcv._ext' has no attribute {name!r}")

    def unavailable(*args, **kwargs):
        raise NotImplementedError(
            f"mmcv's compiled op {name!r} was called, but this is mmcv-lite, and normplug's stand-in for "
            f"mmcv._ext has only: {', '.join(sorted(OPS))}. Install the full mmcv, which compiles it: "
            "'pip uninstall mmcv-lite', then 'pip install --no-binary mmcv --no-build-isolation mmcv==2.1.0' "
            "(it needs a C++ compiler, for the GPU also nvcc, and 10 minutes or more). normplug then uses it."
        )

    unavailable.__name__ = unavailable.__qualname__ = name
    return unavailable


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _as_float32(value: float) -> float:
    # mmcv's C++ signatures take float: an IoU of exactly 3/10 is not above float32(0.3), but above double 0.3.
    return struct.unpack("f", struct.pack("f", value))[0]


# ---- about the extension itself; the toolkits print these in their environment report


@_op
def get_compiler_version() -> str:
    return "none (normplug's stand-in for mmcv._ext)"


@_op
def get_compiling_cuda_version() -> str:
    return "none (normplug's stand-in for mmcv._ext)"


# ---- boxes


@_op
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the kept boxes, best score first; ``offset`` 1 counts the right and bottom pixel in."""
    boxes, scores = _wide(boxes), _wide(scores)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torch.ops.torchvision.nms(boxes, scores, _as_float32(iou_threshold))


def _overlap(lt: Tensor, rb: Tensor, offset: int) -> Tensor:
    return (rb - lt + offset).clamp(min=0).prod(-1)


@_op
def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Fill ``ious`` with intersection over union (mode 0) or over the first box's area (mode 1)."""
    first, second = _wide(bboxes1), _wide(bboxes2)
    if not aligned:
        first = first[:, None]
    inter = _overlap(
        torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:]), offset
    )
    area1, area2 = ((b[..., 2:] - b[..., :2] + offset).prod(-1) for b in (first, second))
    ious.copy_(inter / (area1 + area2 - inter if mode == 0 else area1))


def _iou_with(box: np.ndarray, others: np.ndarray, offset: int) -> np.ndarray:
    # numpy keeps the boxes' dtype, as the C++ loops do; two empty boxes give 0/0 there too.
    width, height = (
        np.maximum(0, np.minimum(box[i + 2], others[:, i + 2]) - np.maximum(box[i], others[:, i]) + offset)
        for i in (0, 1)
    )
    inter = width * height
    with np.errstate(invalid="ignore", divide="ignore"):
        return inter / (_area(box[None], offset) + _area(others, offset) - inter)


def _area(boxes: np.ndarray, offset: int) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0] + offset) * (boxes[:, 3] - boxes[:, 1] + offset)


@_op
def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS on CPU tensors: write (x1, y1, x2, y2, score) into the first rows of ``dets``.

    Args:
        method: 0 drops overlapping boxes, 1 scales their score by 1 - IoU, 2 by exp(-IoU² / sigma).

    Returns:
        Indices of the rows written, in the order of the rows.
    """
    table = torch.cat((_wide(boxes), _wide(scores)[:, None]), dim=1).numpy()
    if len(table) == 0:
        return torch.empty(0, dtype=torch.long)
    real = table.dtype.type
    order = np.arange(len(table))
    count, done = len(table), 0
    while done < count:
        best = done + int(np.argmax(table[done:count, 4]))
        for array in (table, order):
            array[[done, best]] = array[[best, done]]
        rest = slice(done + 1, count)
        iou = _iou_with(table[done], table[rest], offset)
        decay = np.ones_like(iou)
        if method == 2:
            decay = np.exp(-(iou * iou) / real(sigma))
        else:
            overlaps = iou >= real(iou_threshold)
            decay[overlaps] = 0 if method == 0 else 1 - iou[overlaps]
        table[rest, 4] *= decay
        kept = ~(table[rest, 4] < real(min_score))
        # A dropped box's place goes to the last box left, as in mmcv: this order decides between equal scores.
        survivors = int(kept.sum())
        holes = np.flatnonzero(~kept[:survivors])
        fillers = survivors + np.flatnonzero(kept[survivors:])[::-1]
        for array in (table, order):
            array[rest][holes] = array[rest][fillers]
        count = done + 1 + survivors
        done += 1
    dets[:count] = torch.from_numpy(table[:count])
    return torch.from_numpy(order[:count])


@_op
def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """For every kept box of (N, 5) CPU ``dets``: its index and those of the boxes it suppresses."""
    table = _wide(dets).numpy()
    left = _wide(dets)[:, 4].argsort(descending=True, stable=True).numpy()
    groups = []
    while len(left):
        hit = _iou_with(table[left[0]], table[left[1:]], 0) >= table.dtype.type(iou_threshold)
        groups.append([int(left[0]), *left[1:][hit].tolist()])
        left = left[1:][~hit]
    return groups


# ---- losses


def _class_weight(weight: Tensor, target: Tensor) -> Tensor | float:
    """The weight of each row's own class; 1 for background, where mmcv's kernel reads past the end."""
    if weight.numel() == 0:
        return 1.0
    known = (target >= 0) & (target < len(weight))
    return torch.where(known, _wide(weight)[target.clamp(0, len(weight) - 1)], 1.0)


def _balanced(loss: Tensor, positive: Tensor, weight: Tensor, target: Tensor, alpha: float) -> Tensor:
    """``loss`` (N, C) times alpha for the target class, 1 - alpha for the others, and the row's class weight."""
    row = _class_weight(weight, target)
    loss = loss * (row[:, None] if isinstance(row, Tensor) else row)
    return torch.where(positive, alpha * loss, (1 - alpha) * loss)


def _sigmoid_terms(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Each logit's probability of being right, its log, and which logits are positive. The log comes from the
    # logit: mmcv's kernel takes it of the rounded probability, which is 0 or 1 beyond logits of about 17.
    positive = torch.arange(input.shape[1], device=input.device) == target[:, None]
    right = torch.where(positive, _wide(input), -_wide(input))
    return right.sigmoid(), F.logsigmoid(right), positive


@_op
def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``output`` (N, C) with -a (1 - p)^gamma log p, p each logit's probability of being right.

    a is ``alpha`` for the target class and 1 - ``alpha`` for the others; a target outside [0, C) is background.
    """
    p, log_p, positive = _sigmoid_terms(input, target)
    output.copy_(_balanced(-(1 - p).pow(gamma) * log_p, positive, weight, target, alpha))


@_op
def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``grad_input`` with the loss's gradient to the logits."""
    p, log_p, positive = _sigmoid_terms(input, target)
    slope = (1 - p).pow(gamma) * (gamma * p * log_p - (1 - p))
    slope = torch.where(positive, slope, -slope)  # a negative's p falls with its logit
    grad_input.copy_(_balanced(slope, positive, weight, target, alpha))


def _softmax_terms(softmax: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    softmax = _wide(softmax)
    p = softmax.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return p, p.clamp(min=torch.finfo(p.dtype).tiny).log(), target >= 0


@_op
def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``output`` (N,) with -alpha (1 - p)^gamma log p; ``input`` is the softmax, not the logits."""
    p, log_p, valid = _softmax_terms(input, target)
    loss = -alpha * (1 - p).pow(gamma) * log_p * _class_weight(weight, target)
    output.copy_(torch.where(valid, loss, 0.0))


@_op
def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Fill ``grad_input`` with the gradient to the logits, ``buff`` with p times that to the target's p."""
    p, log_p, valid = _softmax_terms(input, target)
    rest = (1 - p).clamp(min=torch.finfo(p.dtype).tiny)  # its power gamma - 1 must stay finite at p = 1
    slope = alpha * (gamma * rest.pow(gamma - 1) * p * log_p - (1 - p).pow(gamma))
    buff.copy_(torch.where(valid, slope * _class_weight(weight, target), 0.0))
    one_hot = torch.arange(input.shape[1], device=input.device) == target[:, None]
    grad_input.copy_(_wide(buff)[:, None] * (one_hot.to(p.dtype) - _wide(input)))


# ---- pooling of regions


@_op
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
    x, boxes = _wide(input), _wide(rois)
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


@_op
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
    grad, boxes = _wide(grad_output), _wide(rois)
    if pool_mode == 1:
        size = aligned_height, aligned_width
        ratio = sampling_ratio
        grad_input += torch.ops.torchvision._roi_align_backward(
            grad, boxes, spatial_scale, *size, *grad_input.shape, ratio, aligned
        )
        return
    y, x = _wide(argmax_y), _wide(argmax_x)
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


@_op
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
    x, boxes = _wide(input), _wide(rois)
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


@_op
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
    grad = torch.where(argmax >= 0, _wide(grad_output), 0.0)
    total = grad_input.new_zeros(grad_input.numel(), dtype=grad.dtype)
    total.index_add_(0, at.flatten(), grad.flatten())
    grad_input += total.view_as(grad_input)


# ---- deformable convolution


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
    return torch.ops.torchvision._deform_conv2d_backward(
        grad, input, weight, offset, no_mask if mask is None else mask, no_bias, *geometry, mask is not None
    )


@_op
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
    output.copy_(_deform_conv(_wide(input), _wide(weight), _wide(offset), None, None, geometry))


@_op
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
    grads = _deform_conv_grads(_wide(gradOutput), _wide(input), _wide(weight), _wide(offset), None, geometry)
    gradInput += grads[0]
    gradOffset.copy_(grads[2])
    columns.resize_(weight.shape).copy_(grads[1])


@_op
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
    any_weight = torch.zeros_like(_wide(gradWeight))  # its own gradient does not depend on it
    grads = _deform_conv_grads(_wide(gradOutput), _wide(input), any_weight, _wide(offset), None, geometry)
    gradWeight.add_(grads[1], alpha=scale)


@_op
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
    """Fill ``output``."""
    geometry = stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group
    x, w, at, part = map(_wide, (input, weight, offset, mask))
    output.copy_(_deform_conv(x, w, at, part, _wide(bias) if with_bias else None, geometry))


@_op
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
    grads = _deform_conv_grads(*map(_wide, (grad_output, input, weight, offset, mask)), geometry)
    grad_input += grads[0]
    grad_weight += grads[1]
    grad_offset.copy_(grads[2])
    grad_mask.copy_(grads[3])
    if with_bias:
        grad_bias += grads[4]


# ---- video


def _shift_in_time(source: Tensor, target: Tensor, shift: Tensor, sign: int) -> None:
    length, channels = source.shape[1], source.shape[2]
    per_channel = shift.long().repeat_interleave(channels // shift.shape[1], dim=1)
    frame = torch.arange(length, device=source.device)
    origin = frame[None, :, None] - sign * per_channel[:, None]  # (N, T, C)
    inside = (origin >= 0) & (origin < length)
    index = origin.clamp(0, max(length - 1, 0))[..., None].expand_as(source)
    target.copy_(torch.where(inside[..., None], source.gather(1, index), 0.0))


@_op
def tin_shift_forward(input: Tensor, shift: Tensor, output: Tensor) -> None:
    """Fill (N, T, C, HW) ``output``: channel group g of clip n moved ``shift[n, g]`` frames, zeros behind it."""
    _shift_in_time(input, output, shift, 1)


@_op
def tin_shift_backward(grad_output: Tensor, shift: Tensor, grad_input: Tensor) -> None:
    """Fill ``grad_input``: the gradients moved back. (mmcv's kernel moves them on, which is not the gradient.)"""
    _shift_in_time(grad_output, grad_input, shift, -1)
