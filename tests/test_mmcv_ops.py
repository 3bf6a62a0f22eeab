"""The stand-ins for mmcv's compiled ops: against formulas in float64, and, where it is installed, against mmcv's.

The oracles are written from the definitions, one number at a time, and differentiated by autograd.
"""

import importlib.machinery
import importlib.util
import math
import sys
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from normplug.openmmlab.mmcv_ops import OPS, missing_op

ROIS = [  # image, x1, y1, x2, y2 on a 9 x 11 map at scale 0.5: inside, over two borders, thin, far outside
    [1, 3.3, 2.1, 14.7, 13.2],
    [0, -5.0, -4.0, 6.0, 30.0],
    [0, 4.0, 4.0, 4.4, 9.0],
    [1, 60.0, 60.0, 70.0, 90.0],
]


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def close(got, want, dtype=torch.float64):
    """Equal but for a few roundings of ``dtype``, measured against the largest value."""
    scale = max(want.abs().max().item(), 1e-30) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=20 * torch.finfo(dtype).eps * scale)


# ---- oracles


def linear_share(at: Tensor | float, pixel: int) -> Tensor | float:
    return max(0.0, 1 - abs(at - pixel)) if isinstance(at, float) else (1 - (at - pixel).abs()).clamp(min=0)


def clamped_bilinear(plane: Tensor, y: float, x: float) -> Tensor:
    """RoIAlign's sample of (C, H, W): zero beyond one pixel outside, the border's value up to there."""
    _, height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return plane.new_zeros(len(plane))
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    rows = {math.floor(y), math.ceil(y)}
    columns = {math.floor(x), math.ceil(x)}
    return sum(plane[:, i, j] * linear_share(y, i) * linear_share(x, j) for i, j in product(rows, columns))


def roi_align_oracle(x, rois, size, scale, ratio, mode, aligned):
    pooled = []
    for image, *box in rois:
        x1, y1, x2, y2 = (v * scale - (0.5 if aligned else 0) for v in box)
        height, width = y2 - y1, x2 - x1
        if not aligned:
            height, width = max(height, 1.0), max(width, 1.0)
        bin_h, bin_w = height / size[0], width / size[1]
        down, across = (ratio, ratio) if ratio > 0 else (math.ceil(bin_h), math.ceil(bin_w))
        for i, j in product(range(size[0]), range(size[1])):
            samples = [
                clamped_bilinear(
                    x[int(image)], y1 + (i + (a + 0.5) / down) * bin_h, x1 + (j + (b + 0.5) / across) * bin_w
                )
                for a, b in product(range(down), range(across))
            ]
            stack = torch.stack(samples)
            pooled.append(stack.mean(0) if mode == "avg" else stack.amax(0))
    return torch.stack(pooled).view(len(rois), *size, x.shape[1]).permute(0, 3, 1, 2)


def roi_pool_oracle(x, rois, size, scale):
    _, channels, height, width = x.shape
    out = []
    for image, x1, y1, x2, y2 in rois:
        left, top = x1 * scale, y1 * scale
        bin_w, bin_h = ((x2 + 1) * scale - left) / size[1], ((y2 + 1) * scale - top) / size[0]
        for i, j in product(range(size[0]), range(size[1])):
            rows = range(
                min(max(math.floor(i * bin_h + top), 0), height),
                min(max(math.ceil((i + 1) * bin_h + top), 0), height),
            )
            columns = range(
                min(max(math.floor(j * bin_w + left), 0), width),
                min(max(math.ceil((j + 1) * bin_w + left), 0), width),
            )
            pixels = [x[int(image), :, a, b] for a, b in product(rows, columns)]
            valid = pixels and bin_w > 0 and bin_h > 0
            out.append(torch.stack(pixels).amax(0) if valid else x.new_zeros(channels))
    return torch.stack(out).view(len(rois), *size, channels).permute(0, 3, 1, 2)


def zero_bilinear(planes: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Deformable convolution's sample of (C, H, W): zeros all around the image.

    The slope is the one towards the next pixel, and there is none from one whole pixel outside: that is mmcv's rule.
    """
    _, height, width = planes.shape
    total = planes.new_zeros(len(planes))
    if y <= -1 or x <= -1 or y >= height or x >= width:
        return total
    top, left = math.floor(y.item()), math.floor(x.item())
    for (i, row), (j, column) in product(
        ((top, top + 1 - y), (top + 1, y - top)), ((left, left + 1 - x), (left + 1, x - left))
    ):
        if 0 <= i < height and 0 <= j < width:
            total = total + planes[:, i, j] * row * column
    return total


def deform_conv_oracle(x, offset, mask, weight, bias, stride, pad, dilation, groups, deform_groups):
    n, channels, height, width = x.shape
    out_channels, _, kh, kw = weight.shape
    out_h = (height + 2 * pad[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_w = (width + 2 * pad[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    part = channels // deform_groups
    rows = []
    for b, i, j in product(range(n), range(out_h), range(out_w)):
        column = []
        for a, c in product(range(kh), range(kw)):
            for d in range(deform_groups):
                at = (d * kh * kw + a * kw + c) * 2
                y = i * stride[0] - pad[0] + a * dilation[0] + offset[b, at, i, j]
                z = j * stride[1] - pad[1] + c * dilation[1] + offset[b, at + 1, i, j]
                value = zero_bilinear(x[b, d * part : (d + 1) * part], y, z)
                column.append(value if mask is None else value * mask[b, at // 2, i, j])
        column = torch.cat(column).view(kh, kw, groups, -1).permute(2, 3, 0, 1)  # (groups, channels, kh, kw)
        filters = weight.view(groups, out_channels // groups, *weight.shape[1:])
        rows.append((filters * column[:, None]).flatten(2).sum(-1).flatten())
    out = torch.stack(rows).view(n, out_h, out_w, out_channels).permute(0, 3, 1, 2)
    return out if bias is None else out + bias[:, None, None]


def iou_of(a, b, offset=0, of_the_first=False):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]) + offset)

    def area(box):
        return (box[2] - box[0] + offset) * (box[3] - box[1] + offset)

    return width * height / (area(a) if of_the_first else area(a) + area(b) - width * height)


def soft_nms_oracle(boxes, scores, threshold, sigma, min_score, method, offset):
    left = {i: s for i, s in enumerate(scores)}
    kept = []
    while left:
        best = max(left, key=left.get)
        kept.append((best, left.pop(best)))
        for i in list(left):
            iou = iou_of(boxes[best], boxes[i], offset)
            if method == 2:
                left[i] *= math.exp(-(iou**2) / sigma)
            elif iou >= threshold:
                left[i] *= 0 if method == 0 else 1 - iou
            if left[i] < min_score:
                del left[i]
    return kept


def some_boxes(n, dtype=torch.float32):
    corner = torch.rand(n, 2, dtype=torch.float64) * 30
    return torch.cat((corner, corner + 4 + torch.rand(n, 2, dtype=torch.float64) * 20), 1).to(dtype)


# ---- boxes


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_nms(threshold, offset):
    boxes, scores = some_boxes(60), torch.rand(60)
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou_of(boxes[i].tolist(), boxes[j].tolist(), offset) <= threshold for j in kept):
            kept.append(i)
    got = OPS["nms"](boxes, scores, iou_threshold=threshold, offset=offset)
    assert got.tolist() == kept
    assert 5 < len(kept) < 60


def test_nms_keeps_a_box_that_overlaps_by_exactly_the_threshold():
    # 3 of 10 pixels: in float32 that is the threshold 0.3, in double it is more.
    boxes = torch.tensor([[0.0, 0, 10, 1], [7, 0, 17, 1], [0, 0, 3, 1]])
    assert OPS["nms"](boxes, torch.tensor([3.0, 2, 1]), iou_threshold=0.3, offset=0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", [0, 1, 2], ids=["naive", "linear", "gaussian"])
def test_softnms(method, offset):
    boxes, scores = some_boxes(40), torch.rand(40)
    dets = torch.full((40, 5), -1.0)
    before = boxes.clone(), scores.clone()
    kept = OPS["softnms"](
        boxes, scores, dets, iou_threshold=0.3, sigma=0.5, min_score=0.05, method=method, offset=offset
    )
    want = soft_nms_oracle(boxes.tolist(), scores.tolist(), 0.3, 0.5, 0.05, method, offset)
    assert kept.tolist() == [i for i, _ in want]
    assert 5 < len(kept) < 40
    close(dets[: len(kept), 4], torch.tensor([s for _, s in want]), torch.float32)
    assert torch.equal(dets[: len(kept), :4], boxes[kept])
    assert torch.equal(boxes, before[0])
    assert torch.equal(scores, before[1])


def test_softnms_takes_equal_scores_in_the_order_of_mmcv():
    # Boxes 1 and 2 fall to box 0; the last boxes move into their places, and then come before box 3.
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [0, 0, 8, 9], [20, 0, 21, 1], [30, 0, 31, 1], [40, 0, 41, 1]])
    scores, dets = torch.tensor([1.0, 0.9, 0.8, 0.5, 0.5, 0.5]), torch.empty(6, 5)
    args = dict(iou_threshold=0.5, sigma=0.5, min_score=0.1, method=0, offset=0)
    assert OPS["softnms"](boxes, scores, dets, **args).tolist() == [0, 5, 4, 3]


def test_nms_match():
    boxes, scores = some_boxes(40), torch.rand(40)
    groups = OPS["nms_match"](torch.cat((boxes, scores[:, None]), 1), iou_threshold=0.2)
    assert sorted(i for group in groups for i in group) == list(range(40))
    free = scores.argsort(descending=True).tolist()
    for group in groups:
        best = free[0]
        match = [i for i in free if i == best or iou_of(boxes[best].tolist(), boxes[i].tolist()) >= 0.2]
        assert group == match
        free = [i for i in free if i not in match]
    assert len(groups) < 30


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("mode", [0, 1], ids=["iou", "iof"])
def test_bbox_overlaps(mode, offset):
    a, b = some_boxes(5, torch.float64), some_boxes(5, torch.float64)
    want = [[iou_of(p, q, offset, of_the_first=mode == 1) for q in b.tolist()] for p in a.tolist()]
    ious, pairs = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    OPS["bbox_overlaps"](a, b, ious, mode=mode, aligned=False, offset=offset)
    OPS["bbox_overlaps"](a, b, pairs, mode=mode, aligned=True, offset=offset)
    close(ious, torch.tensor(want, dtype=torch.float64))
    assert torch.equal(pairs, ious.diagonal())


# ---- losses


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_sigmoid_focal_loss(gamma, weighted):
    x = (torch.randn(7, 4, dtype=torch.float64) * 4).requires_grad_()
    target = torch.tensor([0, 3, 1, 4, 2, 4, 0])  # 4 is background
    weight = torch.rand(4, dtype=torch.float64) if weighted else x.new_empty(0)
    positive = torch.nn.functional.one_hot(target, 5)[:, :4].bool()
    p = torch.where(positive, x, -x).sigmoid()
    want = -torch.where(positive, 0.1 * p.log(), 0.9 * p.log()) * (1 - p) ** gamma
    if weighted:
        want = want * torch.cat((weight, weight.new_ones(1)))[target][:, None]
    got, grad = torch.empty_like(want), torch.empty_like(want)
    args = dict(gamma=gamma, alpha=0.1)
    OPS["sigmoid_focal_loss_forward"](x, target, weight, got, **args)
    OPS["sigmoid_focal_loss_backward"](x, target, weight, grad, **args)
    assert not got.requires_grad
    close(got, want.detach())
    close(grad, torch.autograd.grad(want.sum(), x)[0])


@pytest.mark.parametrize("logit", [30.0, 200.0])  # the sigmoid rounds to 1 in float32; then the other's to 0
def test_sigmoid_focal_loss_of_a_confident_mistake(logit):
    x, target = torch.tensor([[logit]]), torch.tensor([1])
    loss, grad = torch.empty(1, 1), torch.empty(1, 1)
    OPS["sigmoid_focal_loss_forward"](x, target, x.new_empty(0), loss, gamma=2.0, alpha=0.25)
    OPS["sigmoid_focal_loss_backward"](x, target, x.new_empty(0), grad, gamma=2.0, alpha=0.25)
    assert loss.item() == pytest.approx(0.75 * logit, rel=1e-6)
    assert grad.item() == pytest.approx(0.75, rel=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_softmax_focal_loss(gamma, weighted):
    x = (torch.randn(6, 4, dtype=torch.float64) * 2).requires_grad_()
    target = torch.tensor([0, 3, 1, -1, 2, 0])  # -1 is ignored
    weight = torch.rand(4, dtype=torch.float64) if weighted else x.new_empty(0)
    p = x.softmax(1)[torch.arange(6), target]
    want = -0.25 * (1 - p) ** gamma * p.log() * (target >= 0)
    if weighted:
        want = want * weight[target]
    softmax, got, grad = x.softmax(1).detach(), torch.empty(6, dtype=x.dtype), torch.empty_like(x)
    buff = torch.empty_like(got)
    OPS["softmax_focal_loss_forward"](softmax, target, weight, got, gamma=gamma, alpha=0.25)
    OPS["softmax_focal_loss_backward"](softmax, target, weight, buff, grad, gamma=gamma, alpha=0.25)
    close(got, want.detach())
    close(grad, torch.autograd.grad(want.sum(), x)[0])


# ---- regions


def run_roi_align(x, rois, dy, size, scale, ratio, mode, aligned, grad_input=None):
    """Forward and backward by the extension's own signatures."""
    output = x.new_zeros(len(rois), x.shape[1], *size)
    argmax = [x.new_zeros(output.shape if mode == "max" else 0) for _ in range(2)]
    args = dict(
        aligned_height=size[0], aligned_width=size[1], spatial_scale=scale, sampling_ratio=ratio, aligned=aligned
    )
    args["pool_mode"] = ("max", "avg").index(mode)
    OPS["roi_align_forward"](x, rois, output, *argmax, **args)
    grad_input = torch.zeros_like(x) if grad_input is None else grad_input
    OPS["roi_align_backward"](dy, rois, *argmax, grad_input, **args)
    return output, grad_input


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align(mode, aligned, ratio):
    (x,) = leaves(torch.randn(2, 3, 9, 11, dtype=torch.float64))
    rois = torch.tensor(ROIS, dtype=torch.float64)
    dy = torch.randn(4, 3, 3, 2, dtype=torch.float64)
    want = roi_align_oracle(x, ROIS, (3, 2), 0.5, ratio, mode, aligned)
    got, grad = run_roi_align(x.detach(), rois, dy, (3, 2), 0.5, ratio, mode, aligned)
    close(got, want.detach())
    close(grad, torch.autograd.grad(want, x, dy)[0])


@pytest.mark.parametrize(("mode", "value"), [("avg", 0.0), ("max", -10000.0)])
def test_roi_align_without_samples(mode, value):
    flat = torch.tensor([[0, 3.0, 3.0, 3.0, 8.0]])
    output, grad = run_roi_align(torch.randn(1, 3, 9, 11), flat, torch.randn(1, 3, 2, 2), (2, 2), 0.5, 0, mode, True)
    assert (output == value).all()
    assert not grad.any()


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align_adds_to_the_gradient_it_is_given(mode):
    x, rois = torch.randn(2, 3, 9, 11), torch.tensor(ROIS)
    dy, old = torch.randn(4, 3, 2, 2), torch.randn(2, 3, 9, 11)
    _, fresh = run_roi_align(x, rois, dy, (2, 2), 0.5, 0, mode, True)
    _, grad = run_roi_align(x, rois, dy, (2, 2), 0.5, 0, mode, True, grad_input=old.clone())
    torch.testing.assert_close(grad, old + fresh)


def run_roi_pool(x, rois, dy, size, scale):
    output = x.new_zeros(len(rois), x.shape[1], *size)
    argmax = torch.zeros(output.shape, dtype=torch.int)
    args = dict(pooled_height=size[0], pooled_width=size[1], spatial_scale=scale)
    OPS["roi_pool_forward"](x, rois, output, argmax, **args)
    grad_input = torch.zeros_like(x)
    OPS["roi_pool_backward"](dy, rois, argmax, grad_input, **args)
    return output, argmax, grad_input


def test_roi_pool():
    (x,) = leaves(torch.randn(2, 3, 9, 11, dtype=torch.float64))
    boxes = [*ROIS, [0, 9.0, 9.0, 7.5, 12.0]]  # and one that is inside out, by less than a pixel
    dy = torch.randn(5, 3, 3, 2, dtype=torch.float64)
    want = roi_pool_oracle(x, boxes, (3, 2), 0.5)
    got, argmax, grad = run_roi_pool(x.detach(), torch.tensor(boxes, dtype=torch.float64), dy, (3, 2), 0.5)
    assert torch.equal(got, want.detach())
    close(grad, torch.autograd.grad(want, x, dy)[0])
    assert (argmax[3:] == -1).all()
    image = x.detach()[1].flatten(1)
    assert torch.equal(image.gather(1, argmax[0].flatten(1).long()), got[0].flatten(1))


def rotated_oracle(x, rois, size, scale, ratio, aligned, clockwise):
    pooled = []
    for image, cx, cy, w, h, angle in rois:
        cx, cy = (v * scale - (0.5 if aligned else 0) for v in (cx, cy))
        w, h = w * scale, h * scale
        if not aligned:
            w, h = max(w, 1.0), max(h, 1.0)
        angle = -angle if clockwise else angle
        down, across = (ratio, ratio) if ratio > 0 else (math.ceil(h / size[0]), math.ceil(w / size[1]))
        for i, j in product(range(size[0]), range(size[1])):
            samples = []
            for a, b in product(range(down), range(across)):
                y, z = -h / 2 + (i + (a + 0.5) / down) * h / size[0], -w / 2 + (j + (b + 0.5) / across) * w / size[1]
                y, z = y * math.cos(angle) - z * math.sin(angle), y * math.sin(angle) + z * math.cos(angle)
                samples.append(clamped_bilinear(x[int(image)], y + cy, z + cx))
            pooled.append(torch.stack(samples).mean(0))
    return torch.stack(pooled).view(len(rois), *size, x.shape[1]).permute(0, 3, 1, 2)


ROTATED_ROIS = [  # image, x, y, width, height, angle: inside, over the borders, thin, far outside
    [1, 9.3, 8.1, 11.7, 6.2, 0.7],
    [0, 1.0, 14.0, 16.0, 30.0, -2.3],
    [0, 9.0, 4.0, 0.5, 9.0, 1.57],
    [1, 60.0, 60.0, 9.0, 7.0, 0.3],
]


@pytest.mark.parametrize("clockwise", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_rotated(aligned, ratio, clockwise):
    ops = pytest.importorskip("mmcv.ops")
    (x,) = leaves(torch.randn(2, 3, 9, 11, dtype=torch.float64))
    want = rotated_oracle(x, ROTATED_ROIS, (3, 2), 0.5, ratio, aligned, clockwise)
    rois = torch.tensor(ROTATED_ROIS, dtype=torch.float64)
    got = ops.RoIAlignRotated((3, 2), 0.5, ratio, aligned, clockwise)(x, rois)
    close(got.detach(), want.detach())
    dy = torch.randn_like(want)
    close(*(torch.autograd.grad(y, x, dy)[0] for y in (got, want)))


def test_roi_align_rotated_without_samples_or_boxes():
    ops = pytest.importorskip("mmcv.ops")
    (x,) = leaves(torch.randn(1, 3, 9, 11))
    flat = ops.roi_align_rotated(x, torch.tensor([[0, 4.0, 4.0, 0.0, 5.0, 0.3]]), 2, 1.0, 0)
    assert not flat.any()
    flat.sum().backward()
    assert not x.grad.any()
    assert ops.roi_align_rotated(x, torch.zeros(0, 6), 2, 1.0, 0).shape == (0, 3, 2, 2)
    with pytest.raises(ValueError, match="negative"):
        ops.roi_align_rotated(x, torch.tensor([[0, 4.0, 4.0, -1.0, 5.0, 0.3]]), 2, 1.0, 0)


def moved_samples(box, move, size, scale, ratio, gamma):
    """(bin row, bin column, y, x, number) of every sample of deformable RoI pooling, and the box's width and height."""
    x1, y1, x2, y2 = (v * scale - 0.5 for v in box)
    width, height = x2 - x1, y2 - y1
    down, across = (ratio, ratio) if ratio > 0 else (math.ceil(height / size[0]), math.ceil(width / size[1]))
    for i, j, a, b in product(range(size[0]), range(size[1]), range(down), range(across)):
        y = y1 + (i + (a + 0.5) / down) * height / size[0]
        x = x1 + (j + (b + 0.5) / across) * width / size[1]
        if move is not None:
            x, y = x + gamma * width * move[0, i, j], y + gamma * height * move[1, i, j]
        yield i, j, float(y), float(x), down * across, width, height


def deform_roi_pool_oracle(x, rois, offset, dy, size, scale, ratio, gamma):
    """Values, and gradients of features and offset by the rule of mmcv's kernel, one sample at a time."""
    _, _, height, width = x.shape
    out = x.new_zeros(len(rois), x.shape[1], *size)
    grad_x, grad_offset = torch.zeros_like(x), torch.zeros(len(rois), 2, *size, dtype=x.dtype)
    for n, (image, *box) in enumerate(rois):
        planes, move = x[int(image)], None if offset is None else offset[n]
        for i, j, y, z, number, box_w, box_h in moved_samples(box, move, size, scale, ratio, gamma):
            out[n, :, i, j] += clamped_bilinear(planes, y, z) / number
            if not (-1 <= y <= height and -1 <= z <= width):
                continue
            inner_y, inner_z = min(max(y, 0.0), height - 1.0), min(max(z, 0.0), width - 1.0)
            top, left = int(inner_y), int(inner_z)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            share = dy[n, :, i, j] / number
            for row, column in {(top, left), (top, right), (bottom, left), (bottom, right)}:
                part = linear_share(inner_y, row) * linear_share(inner_z, column)
                grad_x[int(image), :, row, column] += share * part
            if offset is None:
                continue
            rise = (planes[:, bottom, right] - planes[:, bottom, left]) * (y - top)
            rise = rise + (planes[:, top, right] - planes[:, top, left]) * (bottom - y)
            fall = (planes[:, bottom, right] - planes[:, top, right]) * (z - left)
            fall = fall + (planes[:, bottom, left] - planes[:, top, left]) * (right - z)
            grad_offset[n, 0, i, j] += gamma * box_w * (share * rise).sum()
            grad_offset[n, 1, i, j] += gamma * box_h * (share * fall).sum()
    return out, grad_x, grad_offset


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("moved", [True, False])
def test_deform_roi_pool(moved, ratio):
    ops = pytest.importorskip("mmcv.ops")
    (x,) = leaves(torch.randn(2, 3, 9, 11, dtype=torch.float64))
    rois = torch.tensor(ROIS, dtype=torch.float64)
    offset = leaves(torch.randn(4, 2, 3, 2, dtype=torch.float64))[0] if moved else None
    got = ops.deform_roi_pool(x, rois, offset, (3, 2), 0.5, ratio, 0.3)
    dy = torch.randn_like(got)
    detached = None if offset is None else offset.detach()
    want, *grads = deform_roi_pool_oracle(x.detach(), ROIS, detached, dy, (3, 2), 0.5, ratio, 0.3)
    close(got.detach(), want)
    inputs = (x, offset) if moved else (x,)
    for ours, theirs in zip(torch.autograd.grad(got, inputs, dy), grads, strict=False):
        close(ours, theirs)


def test_deform_roi_pool_inside_an_image_is_differentiable():
    ops = pytest.importorskip("mmcv.ops")
    rois = torch.tensor([[0, 5.3, 6.1, 16.9, 15.2]], dtype=torch.float64)
    x, offset = leaves(torch.randn(1, 2, 12, 12, dtype=torch.float64), torch.rand(1, 2, 2, 2, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: ops.deform_roi_pool(a, rois, b, (2, 2), 0.5, 2, 0.1), (x, offset))


@pytest.mark.parametrize("name", ["DeformRoIPoolPack", "ModulatedDeformRoIPoolPack"])
def test_deformable_roi_pooling_layers_train(name):
    ops = pytest.importorskip("mmcv.ops")
    layer = getattr(ops, name)(output_size=(3, 3), output_channels=2, deform_fc_channels=8)
    for name, parameter in layer.named_parameters():
        if name.endswith("weight"):  # the last layers begin with zeros, which let no gradient through
            torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 2, 9, 11, requires_grad=True)
    layer(x, torch.tensor(ROIS)).square().sum().backward()
    assert x.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


# ---- rotated boxes


def corners_of(box):
    x, y, w, h, angle = box
    cos, sin = math.cos(angle), math.sin(angle)
    local = [(-w / 2, -h / 2), (w / 2, -h / 2), (w / 2, h / 2), (-w / 2, h / 2)]
    return [(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in local]


def cut(polygon, start, end):
    """What is left of a polygon on the inner side of a line."""

    def side(p):
        return (end[0] - start[0]) * (p[1] - start[1]) - (end[1] - start[1]) * (p[0] - start[0])

    kept = []
    for here, there in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        if side(here) >= 0:
            kept.append(here)
        if side(here) * side(there) < 0:
            t = side(here) / (side(here) - side(there))
            kept.append((here[0] + t * (there[0] - here[0]), here[1] + t * (there[1] - here[1])))
    return kept


def rotated_iou(a, b, of_the_first=False):
    polygon, clip = corners_of(a), corners_of(b)
    for start, end in zip(clip, clip[1:] + clip[:1], strict=True):
        polygon = cut(polygon, start, end)
    inter = sum(p[0] * q[1] - q[0] * p[1] for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True)) / 2
    return inter / (a[2] * a[3] if of_the_first else a[2] * a[3] + b[2] * b[3] - inter)


def some_rotated(n, dtype=torch.float64):
    box = torch.rand(n, 5, dtype=torch.float64) * torch.tensor([30, 30, 20, 12, 7]) + torch.tensor([0, 0, 2, 2, -3.5])
    return box.to(dtype)


TOUCHING = [  # pairs with their IoU: the same, turned by 90 degrees, one inside the other, side by side, a corner
    ([5.0, 5, 4, 4, 0.3], [5, 5, 4, 4, 0.3], 1.0),
    ([5, 5, 4, 2, 0], [5, 5, 2, 4, math.pi / 2], 1.0),
    ([5, 5, 6, 6, 0.4], [5, 5, 3, 2, 0.4], 1 / 6),
    ([5, 5, 4, 4, 0], [9, 5, 4, 4, 0], 0.0),
    ([5, 5, 4, 4, 0], [9, 9, 4, 4, 0], 0.0),
    ([5, 5, 4, 4, 0], [7, 5, 4, 4, 0], 1 / 3),
    ([0, 0, 2, 2, 0], [0, 0, 2, 2, math.pi / 4], 1 / math.sqrt(2)),
    ([5, 5, 0, 4, 0], [5, 5, 4, 4, 0], 0.0),
    ([1e5, 1e5, 4, 4, 0.3], [1e5 + 1, 1e5, 4, 4, 0.3], None),
]


@pytest.mark.parametrize("mode", ["iou", "iof"])
def test_box_iou_rotated(mode):
    ops = pytest.importorskip("mmcv.ops")
    a, b = some_rotated(12), some_rotated(9)
    want = [[rotated_iou(p, q, mode == "iof") for q in b.tolist()] for p in a.tolist()]
    close(ops.box_iou_rotated(a, b, mode=mode), torch.tensor(want, dtype=torch.float64))
    pairs = torch.tensor([want[i][i] for i in range(9)], dtype=torch.float64)
    close(ops.box_iou_rotated(a[:9], b, mode=mode, aligned=True), pairs)
    flip = torch.tensor([1, 1, 1, 1, -1])
    close(ops.box_iou_rotated(a * flip, b * flip, mode=mode, clockwise=False), torch.tensor(want, dtype=torch.float64))
    assert ops.box_iou_rotated(a[:0], b).shape == (0, 9)
    assert ops.box_iou_rotated(a, b[:0]).shape == (12, 0)


def test_box_iou_rotated_of_boxes_that_touch():
    ops = pytest.importorskip("mmcv.ops")
    first, second, want = zip(*TOUCHING, strict=True)
    want = [rotated_iou([0, 0, *a[2:]], [b[0] - a[0], b[1] - a[1], *b[2:]]) if w is None else w for a, b, w in TOUCHING]
    got = ops.box_iou_rotated(*(torch.tensor(t, dtype=torch.float64) for t in (first, second)), aligned=True)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("labelled", [False, True])
def test_nms_rotated(labelled):
    ops = pytest.importorskip("mmcv.ops")
    boxes, scores = some_rotated(60, torch.float32), torch.randperm(60) / 60
    labels = torch.randint(3, (60,)) if labelled else None
    kept = []
    for i in scores.argsort(descending=True).tolist():
        rivals = [j for j in kept if not labelled or labels[i] == labels[j]]
        if all(rotated_iou(boxes[i].tolist(), boxes[j].tolist()) < 0.2 for j in rivals):
            kept.append(i)
    dets, got = ops.nms_rotated(boxes, scores, 0.2, labels)
    assert got.tolist() == kept
    assert torch.equal(dets, torch.cat((boxes[kept], scores[kept, None]), 1))
    assert 5 < len(kept) < 60


# ---- deformable convolution

GEOMETRIES = {  # stride, padding, dilation, groups, deformable groups
    "plain": ((1, 1), (1, 1), (1, 1), 1, 1),
    "all": ((2, 1), (1, 2), (1, 2), 2, 2),
}


def deform_case(geometry, dtype=torch.float64, batch=2, place="anywhere"):
    """``place``: where the samples lie: anywhere, on whole pixels (many of them outside), or unmoved (offsets 0)."""
    stride, pad, dilation, groups, deform_groups = GEOMETRIES[geometry]
    x = torch.randn(batch, 4, 6, 5, dtype=dtype)
    weight = torch.randn(6, 4 // groups, 3, 2, dtype=dtype)
    out_h = (6 + 2 * pad[0] - dilation[0] * 2 - 1) // stride[0] + 1
    out_w = (5 + 2 * pad[1] - dilation[1] - 1) // stride[1] + 1
    offset = torch.randn(batch, deform_groups * 12, out_h, out_w, dtype=dtype) * 1.5
    offset = {"anywhere": offset, "on pixels": offset.round(), "unmoved": offset * 0}[place]
    mask = torch.rand(batch, deform_groups * 6, out_h, out_w, dtype=dtype)
    bias, dy = torch.randn(6, dtype=dtype), torch.randn(batch, 6, out_h, out_w, dtype=dtype)
    return x, offset, mask, weight, bias, dy


def modulated_args(geometry, with_bias):
    stride, pad, dilation, groups, deform_groups = GEOMETRIES[geometry]
    return dict(
        kernel_h=3, kernel_w=2, stride_h=stride[0], stride_w=stride[1], pad_h=pad[0], pad_w=pad[1],
        dilation_h=dilation[0], dilation_w=dilation[1], group=groups, deformable_group=deform_groups,
        with_bias=with_bias,
    )  # fmt: skip


def plain_args(geometry):
    stride, pad, dilation, groups, deform_groups = GEOMETRIES[geometry]
    return dict(
        kW=2, kH=3, dW=stride[1], dH=stride[0], padW=pad[1], padH=pad[0], dilationW=dilation[1],
        dilationH=dilation[0], group=groups, deformable_group=deform_groups, im2col_step=1,
    )  # fmt: skip


def run_modulated(ext, x, offset, mask, weight, bias, dy, geometry, with_bias):
    args = modulated_args(geometry, with_bias)
    bufs = [x.new_empty(0), x.new_empty(0)]
    bias = bias if with_bias else x.new_empty(0)
    out = torch.empty_like(dy)
    ext["modulated_deform_conv_forward"](x, weight, bias, bufs[0], offset, mask, out, bufs[1], **args)
    grads = [torch.zeros_like(t) for t in (x, weight, bias, offset, mask)]
    ext["modulated_deform_conv_backward"](x, weight, bias, bufs[0], offset, mask, bufs[1], *grads, dy.clone(), **args)
    return dict(zip(["output", "input", "weight", "bias", "offset", "mask"], [out, *grads], strict=True))


def run_plain(ext, x, offset, weight, dy, geometry, input_first=True):
    args, bufs = plain_args(geometry), [x.new_empty(0), x.new_empty(0)]
    out = torch.empty_like(dy)
    ext["deform_conv_forward"](x, weight, offset, out, *bufs, **args)
    grads = [torch.zeros_like(t) for t in (x, offset, weight)]
    if input_first:
        ext["deform_conv_backward_input"](x, offset, dy.clone(), *grads[:2], weight, bufs[0], **args)
    ext["deform_conv_backward_parameters"](x, offset, dy.clone(), grads[2], *bufs, scale=1, **args)
    return dict(zip(["output", "input", "offset", "weight"], [out, *grads], strict=True))


PLACES = ["anywhere", "on pixels", "unmoved"]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_modulated_deform_conv(geometry, place, with_bias):
    *tensors, dy = deform_case(geometry, place=place)
    got = run_modulated(OPS, *tensors, dy, geometry, with_bias)
    x, offset, mask, weight, bias = inputs = leaves(*tensors)
    want = deform_conv_oracle(x, offset, mask, weight, bias if with_bias else None, *GEOMETRIES[geometry])
    close(got.pop("output"), want.detach())
    names = ["input", "offset", "mask", "weight", "bias"][: 5 if with_bias else 4]
    for name, grad in zip(names, torch.autograd.grad(want, inputs[: len(names)], dy), strict=True):
        close(got[name], grad)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_deform_conv(geometry, place):
    x, offset, _, weight, _, dy = deform_case(geometry, place=place)
    got = run_plain(OPS, x, offset, weight, dy, geometry)
    inputs = leaves(x, offset, weight)
    want = deform_conv_oracle(inputs[0], inputs[1], None, inputs[2], None, *GEOMETRIES[geometry])
    close(got["output"], want.detach())
    for name, grad in zip(("input", "offset", "weight"), torch.autograd.grad(want, inputs, dy), strict=True):
        close(got[name], grad)
    alone = run_plain(OPS, x, offset, weight, dy, geometry, input_first=False)  # the input needs no gradient
    close(alone["weight"], got["weight"])


def enlarged(x, height, width):
    """A buffer of (N, C, height, width) that begins, sample by sample, with the numbers of ``x``."""
    larger = torch.randn(len(x), x.shape[1], height, width, dtype=x.dtype)
    larger.flatten(1)[:, : x[0].numel()] = x.flatten(1)
    return larger


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_modulated_deform_conv_reads_the_beginning_of_larger_offsets_and_masks(geometry):
    x, offset, mask, *rest = deform_case(geometry)
    want = run_modulated(OPS, x, offset, mask, *rest, geometry, True)
    size = offset.shape[2] * 2 + 1, offset.shape[3] * 2
    got = run_modulated(OPS, x, enlarged(offset, *size), enlarged(mask, *size), *rest, geometry, True)
    for name in ("output", "input", "weight", "bias"):
        assert torch.equal(got[name], want[name])
    for name in ("offset", "mask"):
        read = want[name][0].numel()
        assert torch.equal(got[name].flatten(1)[:, :read], want[name].flatten(1))
        assert not got[name].flatten(1)[:, read:].any()


@pytest.mark.parametrize(("name", "at"), [("offset", 1), ("mask", 2)])
def test_modulated_deform_conv_refuses_buffers_that_are_too_short(name, at):
    tensors = list(deform_case("plain"))
    tensors[at] = tensors[at][:, :, :-1]
    with pytest.raises(ValueError, match=rf"modulated_deform_conv: {name} is \(2, .*reads \(2, "):
        run_modulated(OPS, *tensors, "plain", True)


def test_deform_conv_weight_gradient_belongs_to_its_own_call():
    x, offset, _, weight, _, dy = deform_case("plain")
    args, columns = plain_args("plain"), x.new_empty(0)
    total = torch.zeros_like(weight)
    for grad in (dy, 2 * dy):  # backward twice through one graph: the same buffers
        scratch = [torch.zeros_like(x), torch.zeros_like(offset)]
        OPS["deform_conv_backward_input"](x, offset, grad, *scratch, weight, columns, **args)
        OPS["deform_conv_backward_parameters"](x, offset, grad, total, columns, columns, scale=0.5, **args)
    OPS["deform_conv_backward_parameters"](x, offset, 4 * dy, total, columns, columns, scale=0.5, **args)
    close(total, 3.5 * run_plain(OPS, x, offset, weight, dy, "plain")["weight"])


# ---- masked convolution and CARAFE


@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), ((1, 3), (0, 1)), (1, 0)])
def test_masked_convolution_is_the_convolution_where_the_mask_is_set(kernel, padding):
    ops = pytest.importorskip("mmcv.ops")
    layer = ops.MaskedConv2d(3, 4, kernel, padding=padding).double()
    x, mask = torch.randn(1, 3, 5, 6, dtype=torch.float64), torch.rand(1, 5, 6) > 0.5
    with torch.no_grad():
        close(layer(x, mask), layer(x) * mask)
        assert not layer(x, torch.zeros_like(mask)).any()


def carafe_oracle(x, masks, kernel, groups, scale):
    n, channels, height, width = x.shape
    out = []
    for b, c, y, z in product(range(n), range(channels), range(height * scale), range(width * scale)):
        group = c // (channels // groups)
        value = x.new_zeros(())
        for i, j in product(range(kernel), range(kernel)):
            row, column = y // scale + i - kernel // 2, z // scale + j - kernel // 2
            if 0 <= row < height and 0 <= column < width:
                value = value + x[b, c, row, column] * masks[b, (group * kernel + i) * kernel + j, y, z]
        out.append(value)
    return torch.stack(out).view(n, channels, height * scale, width * scale)


@pytest.mark.parametrize(("kernel", "groups", "scale"), [(3, 2, 2), (5, 1, 1), (1, 1, 3)])
@pytest.mark.parametrize("naive", [False, True])
def test_carafe(naive, kernel, groups, scale):
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    masks = torch.rand(2, kernel**2 * groups, 3 * scale, 4 * scale, dtype=torch.float64)
    inputs = leaves(x, masks)
    want = carafe_oracle(*inputs, kernel, groups, scale)
    dy, output = torch.randn_like(want), torch.zeros_like(want)
    args = dict(kernel_size=kernel, group_size=groups, scale_factor=scale)
    grads = [torch.zeros_like(x), torch.zeros_like(masks)]
    if naive:
        OPS["carafe_naive_forward"](x, masks, output, **args)
        OPS["carafe_naive_backward"](dy, x, masks, *grads, **args)
    else:
        kept = torch.zeros_like(x)
        buffers = [torch.zeros_like(t) for t in (dy, dy, x, masks)]
        OPS["carafe_forward"](x, masks, kept, buffers[0], buffers[3], output, **args)
        OPS["carafe_backward"](dy, kept, masks, *buffers, *grads, **args)
    close(output, want.detach())
    for got, grad in zip(grads, torch.autograd.grad(want, inputs, dy), strict=True):
        close(got, grad)


# ---- attention


def attention_case(dtype=torch.float64, place="anywhere"):
    shapes = torch.tensor([[4, 3], [2, 5]])
    value = torch.randn(2, 22, 2, 3, dtype=dtype)
    locations = torch.rand(2, 4, 2, 2, 3, 2, dtype=dtype) * 2 - 0.5  # over the border by half an image
    if place == "on pixels":  # as many outside as inside, and many exactly one pixel outside
        sizes = shapes.flip(1).to(dtype)[:, None]
        locations = ((locations * sizes).round().clamp(min=-1).minimum(sizes) + 0.5) / sizes
    weights = torch.rand(2, 4, 2, 2, 3, dtype=dtype)
    return value, shapes, torch.tensor([0, 12]), locations, weights


def attention_oracle(value, shapes, starts, locations, weights):
    n, _, heads, channels = value.shape
    out = []
    for b, q, h in product(range(n), range(locations.shape[1]), range(heads)):
        total = value.new_zeros(channels)
        for level, point in product(range(len(shapes)), range(locations.shape[4])):
            height, width = shapes[level].tolist()
            start = starts[level].item()
            planes = value[b, start : start + height * width, h].T.reshape(channels, height, width)
            x, y = locations[b, q, h, level, point]
            total = total + weights[b, q, h, level, point] * zero_bilinear(planes, y * height - 0.5, x * width - 0.5)
        out.append(total)
    return torch.stack(out).view(n, -1, heads * channels)


@pytest.mark.parametrize("place", ["anywhere", "on pixels"])
def test_ms_deform_attn(place):
    value, shapes, starts, locations, weights = attention_case(place=place)
    inputs = leaves(value, locations, weights)
    want = attention_oracle(inputs[0], shapes, starts, *inputs[1:])
    args = value, shapes, starts, locations, weights
    got = OPS["ms_deform_attn_forward"](*args, im2col_step=64)
    close(got, want.detach())
    dy = torch.randn_like(want)
    grads = [torch.zeros_like(t) for t in inputs]
    OPS["ms_deform_attn_backward"](*args, dy, *grads, im2col_step=64)
    wanted = torch.autograd.grad(want, inputs, dy)
    close(grads[0], wanted[0])
    close(grads[2], wanted[2])
    if place == "anywhere":  # on a pixel the slope depends on the last digit of the place: the kernel's too
        close(grads[1], wanted[1])


def test_ms_deform_attn_is_what_mmcv_computes_on_the_cpu():
    ops = pytest.importorskip("mmcv.ops.multi_scale_deform_attn")
    value, shapes, starts, locations, weights = attention_case(torch.float32)
    inputs = leaves(value, locations, weights)
    want = ops.multi_scale_deformable_attn_pytorch(inputs[0], shapes, *inputs[1:])
    got = ops.MultiScaleDeformableAttnFunction.apply(inputs[0], shapes, starts, *inputs[1:], 64)
    close(got.detach(), want.detach(), torch.float32)
    dy = torch.randn_like(want)
    for ours, theirs in zip(torch.autograd.grad(got, inputs, dy), torch.autograd.grad(want, inputs, dy), strict=True):
        close(ours, theirs, torch.float32)


def psa_oracle(x, kind, mask_size):
    n, _, height, width = x.shape
    rows, columns = mask_size
    out = x.new_zeros(n, height, width, height, width)
    for h, w, i, j in product(range(height), range(width), range(rows), range(columns)):
        row, column = h + i - (rows - 1) // 2, w + j - (columns - 1) // 2
        if 0 <= row < height and 0 <= column < width:
            target = (row, column, h, w) if kind == "collect" else (h, w, row, column)
            out[(slice(None), *target)] = x[:, i * columns + j, h, w]
    return out.view(n, height * width, height, width)


PSA_SIZES = [(7, 5), (3, 3), (2, 4), (11, 1)]  # larger than the image, smaller, even, both


@pytest.mark.parametrize("mask_size", PSA_SIZES, ids=str)
@pytest.mark.parametrize("kind", ["collect", "distribute"])
def test_psa_mask(kind, mask_size):
    ops = pytest.importorskip("mmcv.ops")
    (x,) = leaves(torch.randn(2, mask_size[0] * mask_size[1], 4, 3, dtype=torch.float64))
    got, want = ops.PSAMask(kind, mask_size)(x), psa_oracle(x, kind, mask_size)
    assert torch.equal(got, want)
    dy = torch.randn_like(want)
    assert torch.equal(*(torch.autograd.grad(y, x, dy)[0] for y in (got, want)))


# ---- video


def test_tin_shift():
    (x,) = leaves(torch.randn(2, 5, 4, 3, dtype=torch.float64))
    shift = torch.tensor([[1, -2], [0, 7]], dtype=torch.int)
    want = torch.stack([
        torch.stack([
            x[n, t - s, c] if 0 <= t - s < 5 else x.new_zeros(3)
            for t in range(5) for c, s in ((c, int(shift[n, c // 2])) for c in range(4))
        ]).view(5, 4, 3)
        for n in range(2)
    ])  # fmt: skip
    dy = torch.randn_like(want)
    got, grad = torch.empty_like(want), torch.empty_like(want)
    OPS["tin_shift_forward"](x, shift, got)
    OPS["tin_shift_backward"](dy, shift, grad)
    assert torch.equal(got, want.detach())
    assert torch.equal(grad, torch.autograd.grad(want, x, dy)[0])


# ---- nothing at all, half precision, what is not there


def test_empty_inputs():
    none, rois = torch.empty(0, 4), torch.empty(0, 5)
    assert OPS["nms"](none, none[:, 0], iou_threshold=0.5, offset=1).shape == (0,)
    soft = dict(iou_threshold=0.5, sigma=0.5, min_score=0.0, method=1, offset=0)
    assert OPS["softnms"](none, none[:, 0], rois, **soft).shape == (0,)
    assert OPS["nms_match"](rois, iou_threshold=0.5) == []
    for a, b in ((0, 3), (3, 0)):
        OPS["bbox_overlaps"](some_boxes(a), some_boxes(b), torch.empty(a, b), mode=0, aligned=False, offset=0)
    x, dy = torch.randn(2, 3, 9, 11), torch.empty(0, 3, 2, 2)
    for mode in ("avg", "max"):
        output, grad = run_roi_align(x, rois, dy, (2, 2), 0.5, 0, mode, True)
        assert output.shape == dy.shape
        assert not grad.any()
    assert not run_roi_pool(x, rois, dy, (2, 2), 0.5)[2].any()
    target, weight = torch.empty(0, dtype=torch.long), torch.empty(0)
    OPS["sigmoid_focal_loss_forward"](none, target, weight, none.clone(), gamma=2.0, alpha=0.25)
    OPS["sigmoid_focal_loss_backward"](none, target, weight, none.clone(), gamma=2.0, alpha=0.25)
    OPS["softmax_focal_loss_forward"](none, target, weight, weight.clone(), gamma=2.0, alpha=0.25)
    *tensors, dy = deform_case("all", batch=0)
    assert run_modulated(OPS, *tensors, dy, "all", True)["output"].shape == dy.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_once(dtype):
    x, rois = torch.randn(2, 3, 9, 11).to(dtype), torch.tensor(ROIS).to(dtype)
    dy = torch.randn(4, 3, 2, 2).to(dtype)
    for mode in ("avg", "max"):
        got = run_roi_align(x, rois, dy, (2, 2), 0.5, 2, mode, True)
        want = run_roi_align(x.double(), rois.double(), dy.double(), (2, 2), 0.5, 2, mode, True)
        # Of the greatest sample mmcv keeps the place in the input's dtype: its gradient is no better than that.
        for g, w in list(zip(got, want, strict=True))[: 2 if mode == "avg" else 1]:
            assert g.dtype == dtype
            torch.testing.assert_close(g.double(), w, rtol=0, atol=torch.finfo(dtype).eps * w.abs().max().item())
    tensors = [t.to(dtype) for t in deform_case("all")]
    got = run_modulated(OPS, *tensors, "all", True)
    want = run_modulated(OPS, *(t.double() for t in tensors), "all", True)
    for name, w in want.items():
        torch.testing.assert_close(got[name].double(), w, rtol=0, atol=torch.finfo(dtype).eps * w.abs().max().item())


def test_an_op_without_stand_in_names_itself_and_the_fix():
    with pytest.raises(NotImplementedError, match=r"'knn_forward'.*mmcv==2\.1\.0"):
        missing_op("knn_forward")(1, key=2)
    with pytest.raises(AttributeError):
        missing_op("__path__")


# ---- through mmcv.ops, as a model calls them


def test_mmcv_ops_run_unchanged():
    ops = pytest.importorskip("mmcv.ops")
    x = torch.randn(2, 3, 9, 11, requires_grad=True)
    pooled = ops.RoIAlign((3, 2), 0.5, 0)(x, torch.tensor(ROIS))
    close(pooled.detach(), roi_align_oracle(x.detach().double(), ROIS, (3, 2), 0.5, 0, "avg", True), torch.float32)
    pooled.sum().backward()
    assert x.grad.any()
    boxes, scores, labels = some_boxes(50), torch.rand(50), torch.randint(3, (50,))
    dets, kept = ops.batched_nms(boxes, scores, labels, dict(type="nms", iou_threshold=0.3))
    assert torch.equal(dets, torch.cat((boxes[kept], scores[kept, None]), 1))
    for label in range(3):  # class by class, as without the trick of moving the classes apart
        own = (labels == label).nonzero()[:, 0]
        alone = own[OPS["nms"](boxes[own], scores[own], iou_threshold=0.3, offset=0)]
        assert alone.tolist() == [i for i in kept.tolist() if labels[i] == label]
    dets, kept = ops.soft_nms(boxes.numpy(), scores.numpy(), 0.3, method="gaussian")
    want = soft_nms_oracle(boxes.tolist(), scores.tolist(), 0.3, 0.5, 1e-3, 2, 0)
    assert kept.tolist() == [i for i, _ in want]
    np.testing.assert_allclose(dets[:, 4], [s for _, s in want], rtol=1e-5)
    dets, kept = ops.batched_nms(boxes, scores, labels, dict(type="soft_nms", iou_threshold=0.3))
    assert len(dets) == len(kept) > 5


@pytest.mark.parametrize("name", ["DCN", "DCNv2"])
def test_mmcv_deformable_layers_train(name):
    pytest.importorskip("mmcv.ops")
    from mmcv.cnn import build_conv_layer

    layer = build_conv_layer(dict(type=name, deform_groups=2), 4, 6, 3, padding=1, bias=False)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.3)
    x = torch.randn(2, 4, 6, 5, requires_grad=True)
    layer(x).square().sum().backward()
    assert all(p.grad.any() for p in (x, layer.weight, layer.conv_offset.weight))


# ---- parity with the compiled extension, where there is one


@pytest.fixture(scope="module")
def compiled():
    spec = importlib.util.find_spec("mmcv._ext") if importlib.util.find_spec("mmcv") else None
    if spec is None or not isinstance(spec.loader, importlib.machinery.ExtensionFileLoader):
        pytest.skip("needs a compiled mmcv._ext; mmcv-lite has none")
    return vars(importlib.import_module("mmcv._ext"))


@pytest.fixture(scope="module")
def parity(request):
    """``parity(op, what, ours, theirs, ulps)`` checks a pair of tensors; the largest differences are printed."""
    rows: dict[tuple[str, str], float] = {}

    def check(op, what, ours, theirs, ulps):
        difference = (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0.0
        scale = theirs.abs().max().item() if theirs.numel() else 1.0
        rows[op, what] = max(rows.get((op, what), 0.0), difference)
        assert ours.shape == theirs.shape
        assert difference <= ulps * torch.finfo(torch.float32).eps * max(scale, 1e-30), (op, what, difference)

    yield check
    manager = request.config.pluginmanager.getplugin("capturemanager")
    with manager.global_and_fixture_disabled():
        print("\n\nop and tensor: largest absolute difference to the compiled mmcv")
        for (op, what), difference in rows.items():
            print(f"  {op:28s} {what:12s} {difference:.3g}")


@pytest.mark.full_mmcv
@pytest.mark.parametrize("offset", [0, 1])
def test_parity_of_box_ops(compiled, parity, offset):
    def same(op, ours, theirs):
        assert ours.tolist() == theirs.tolist(), op
        parity(op, f"offset {offset}", ours, theirs, 0)

    for n, integer in product((0, 1, 300), (False, True)):
        boxes, scores = some_boxes(n), torch.randperm(n) / max(n, 1)  # mmcv's nms sorts equal scores as it likes
        if integer:  # overlaps that equal the threshold
            boxes = boxes.round()
        for threshold in (0.1, 0.3, 0.5, 0.7):
            args = dict(iou_threshold=threshold, offset=offset)
            same("nms", OPS["nms"](boxes, scores, **args), compiled["nms"](boxes, scores, **args))
        if integer:
            scores = (scores * 20).round() / 20
        for method in (0, 1, 2):
            soft = dict(iou_threshold=0.3, sigma=0.5, min_score=0.05, method=method, offset=offset)
            ours, theirs = torch.zeros(n, 5), torch.zeros(n, 5)
            kept, want = OPS["softnms"](boxes, scores, ours, **soft), compiled["softnms"](boxes, scores, theirs, **soft)
            if method < 2 or not integer:  # exp may round differently: near ties may change places
                same(f"softnms method {method}", kept, want)
                parity(f"softnms method {method}", "dets", ours[: len(kept)], theirs[: len(want)], 4)
        if n and not integer:
            dets = torch.cat((boxes, scores[:, None]), 1)
            ours, theirs = OPS["nms_match"](dets, iou_threshold=0.4), compiled["nms_match"](dets, iou_threshold=0.4)
            assert ours == theirs
            parity("nms_match", "groups", torch.tensor(len(ours)), torch.tensor(len(theirs)), 0)
        other = some_boxes(n)
        for mode, aligned in product((0, 1), (False, True)):
            shape = (n,) if aligned else (n, n)
            ours, theirs = torch.zeros(shape), torch.zeros(shape)
            args = dict(mode=mode, aligned=aligned, offset=offset)
            OPS["bbox_overlaps"](boxes, other, ours, **args)
            compiled["bbox_overlaps"](boxes, other, theirs, **args)
            parity("bbox_overlaps", ("iou", "iof")[mode], ours.nan_to_num(), theirs.nan_to_num(), 0)


@pytest.mark.full_mmcv
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_parity_of_roi_align(compiled, parity, mode):
    x = torch.randn(3, 5, 20, 25)
    random = torch.cat((torch.randint(3, (40, 1)).float(), some_boxes(40) * 1.6 - 8), 1)
    for rois, aligned, ratio in product((random, random[:0], torch.tensor(ROIS)), (True, False), (0, 2)):
        dy = torch.randn(len(rois), 5, 7, 6)
        output = x.new_zeros(dy.shape)
        argmax = [x.new_zeros(output.shape if mode == "max" else 0) for _ in range(2)]
        args = dict(aligned_height=7, aligned_width=6, spatial_scale=0.5, sampling_ratio=ratio, aligned=aligned)
        args["pool_mode"] = ("max", "avg").index(mode)
        grad = torch.zeros_like(x)
        compiled["roi_align_forward"](x, rois, output, *argmax, **args)
        compiled["roi_align_backward"](dy, rois, *argmax, grad, **args)
        ours, our_grad = run_roi_align(x, rois, dy, (7, 6), 0.5, ratio, mode, aligned)
        parity(f"roi_align {mode}", "output", ours, output, 4 if mode == "max" else 0)
        parity(f"roi_align {mode}", "grad_input", our_grad, grad, 8)


@pytest.mark.full_mmcv
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_parity_of_deform_conv(compiled, parity, geometry, place):
    x, offset, mask, weight, bias, dy = deform_case(geometry, torch.float32, batch=4, place=place)
    size = offset.shape[2] * 2 + 1, offset.shape[3] * 2
    larger = enlarged(offset, *size), enlarged(mask, *size)  # mmcv reads the beginning of each sample's buffer
    for with_bias, (moves, gates) in product((True, False), ((offset, mask), larger)):
        tensors = x, moves, gates, weight, bias, dy
        theirs = run_modulated(compiled, *tensors, geometry, with_bias)
        ours = run_modulated(OPS, *tensors, geometry, with_bias)
        for name, want in theirs.items():
            parity("modulated_deform_conv", name, ours[name], want, 16)
    theirs = run_plain(compiled, x, offset, weight, dy, geometry)
    ours = run_plain(OPS, x, offset, weight, dy, geometry)
    for name, want in theirs.items():
        parity("deform_conv", name, ours[name], want, 16)


@pytest.mark.full_mmcv
def test_parity_of_roi_align_rotated(compiled, parity):
    x = torch.randn(3, 5, 20, 25)
    random = torch.cat((torch.randint(3, (40, 1)).float(), some_rotated(40, torch.float32) * 1.5), 1)
    for rois, aligned, ratio, clockwise in product(
        (random, random[:0], torch.tensor(ROTATED_ROIS)), (True, False), (0, 2), (True, False)
    ):
        dy = torch.randn(len(rois), 5, 7, 6)
        args = dict(pooled_height=7, pooled_width=6, spatial_scale=0.5, sampling_ratio=ratio)
        args.update(aligned=aligned, clockwise=clockwise)
        pooled = {}
        for ext in (compiled, OPS):
            output, grad = torch.zeros_like(dy), torch.zeros_like(x)
            ext["roi_align_rotated_forward"](x, rois, output, **args)
            ext["roi_align_rotated_backward"](dy, rois, grad, **args)
            pooled[ext is OPS] = output, grad
        for name, ours, theirs in zip(("output", "grad_input"), pooled[True], pooled[False], strict=True):
            parity("roi_align_rotated", name, ours, theirs, 32)  # sine and cosine move samples by some ulps


@pytest.mark.full_mmcv
def test_parity_of_rotated_boxes(compiled, parity):
    first, second, _ = zip(*TOUCHING[:-1], strict=True)  # of the last mmcv's float32 has no digit
    for a, b in [
        (some_rotated(200, torch.float32), some_rotated(200, torch.float32)),
        map(torch.tensor, (first, second)),
    ]:
        for mode, aligned in product((0, 1), (False, True)):
            ours, theirs = (torch.zeros(len(a) if aligned else len(a) * len(b)) for _ in range(2))
            OPS["box_iou_rotated"](a, b, ours, mode_flag=mode, aligned=aligned)
            compiled["box_iou_rotated"](a, b, theirs, mode_flag=mode, aligned=aligned)
            parity("box_iou_rotated", ("iou", "iof")[mode], ours, theirs, 8)
    boxes, scores = some_rotated(300, torch.float32), torch.randperm(300) / 300
    order = scores.argsort(descending=True)
    for threshold in (0.1, 0.3, 0.7):
        args = boxes, scores, order, boxes[order], torch.zeros(0), threshold, False
        kept, want = OPS["nms_rotated"](*args), compiled["nms_rotated"](*args)
        assert kept.tolist() == want.tolist()
        parity("nms_rotated", "kept", kept, want, 0)


@pytest.mark.full_mmcv
@pytest.mark.parametrize("mask_size", PSA_SIZES, ids=str)
def test_parity_of_psa_mask(compiled, parity, mask_size):
    rows, columns = mask_size
    x, dy = torch.randn(2, rows * columns, 4, 3), torch.randn(2, 12, 4, 3)
    for psa_type in (0, 1):
        args = dict(psa_type=psa_type, num_=2, h_feature=4, w_feature=3, h_mask=rows, w_mask=columns)
        args.update(half_h_mask=(rows - 1) // 2, half_w_mask=(columns - 1) // 2)
        for name, argument in (("forward", x), ("backward", dy)):
            ours, theirs = (torch.zeros_like(dy if name == "forward" else x) for _ in range(2))
            OPS[f"psamask_{name}"](argument, ours, **args)
            compiled[f"psamask_{name}"](argument, theirs, **args)
            parity("psamask", name, ours, theirs, 0)


@pytest.mark.full_mmcv
def test_the_compiled_extension_is_left_alone(compiled):
    from mmcv.ops import nms

    from normplug.openmmlab import close_gaps

    close_gaps()
    assert sys.modules[nms.__module__].ext_module.__file__ == compiled["__file__"]
    assert compiled["nms"] is not OPS["nms"]
