"""Overlaps of rotated boxes (x, y, width, height, angle in radians), and suppression by them."""

import torch
from torch import Tensor

from normplug.openmmlab.mmcv_ops._common import as_float32, slow_op

_PAIRS = 1 << 16  # that are compared at once: about 100 MB


def _vertices(boxes: Tensor) -> Tensor:
    """The four vertices of (N, 5) boxes, in order around: (N, 4, 2)."""
    signs = boxes.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    local = signs * boxes[:, None, 2:4] / 2
    cos, sin = boxes[:, None, 4].cos(), boxes[:, None, 4].sin()
    x, y = local.unbind(2)
    return boxes[:, None, :2] + torch.stack((x * cos - y * sin, x * sin + y * cos), 2)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _inside(points: Tensor, polygon: Tensor, slack: Tensor) -> Tensor:
    """Which of (N, P, 2) points lie in (N, 4, 2) convex polygons, the border included."""
    edge = polygon.roll(-1, 1) - polygon
    side = _cross(edge[:, None], points[:, :, None] - polygon[:, None])  # (N, P, 4)
    return (side >= -slack).all(2) | (side <= slack).all(2)


def _intersection(first: Tensor, second: Tensor) -> Tensor:
    """Areas common to pairs of (N, 5) boxes.

    The corners of the common polygon are the vertices of each box inside the other, and the crossings of edges: sorted
    by their angle around the middle they give its area.
    """
    a, b = _vertices(first), _vertices(second)
    slack = 1e-12 * (first[:, 2:4].square().sum(1) + second[:, 2:4].square().sum(1))[:, None, None]
    edge_a, edge_b = (a.roll(-1, 1) - a)[:, :, None], (b.roll(-1, 1) - b)[:, None]
    between = b[:, None] - a[:, :, None]
    denominator = _cross(edge_a, edge_b)
    parallel = denominator.abs() <= slack
    safe = torch.where(parallel, 1.0, denominator)
    t, u = _cross(between, edge_b) / safe, _cross(between, edge_a) / safe
    cross = ~parallel & (t >= 0) & (t <= 1) & (u >= 0) & (u <= 1)
    points = torch.cat((a, b, (a[:, :, None] + t[..., None] * edge_a).flatten(1, 2)), 1)  # (N, 24, 2)
    valid = torch.cat((_inside(a, b, slack), _inside(b, a, slack), cross.flatten(1)), 1)
    any_valid = points.gather(1, valid.byte().argmax(1)[:, None, None].expand(-1, 1, 2))
    points = torch.where(valid[:, :, None], points, any_valid)  # those that do not count repeat one that does
    middle = (points * valid[:, :, None]).sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None]
    x, y = (points - middle).unbind(2)
    around = torch.atan2(y, x).argsort(1)
    points = (points - middle).gather(1, around[:, :, None].expand_as(points))
    area = _cross(points, points.roll(-1, 1)).sum(1).abs() / 2
    return torch.where(valid.sum(1) > 2, area, 0.0)


def _overlaps(first: Tensor, second: Tensor, mode: int) -> Tensor:
    """Intersection over union (mode 0) or over the first box's area (mode 1) of pairs of boxes, in float64."""
    first, second = first.double(), second.double()
    area1, area2 = first[:, 2] * first[:, 3], second[:, 2] * second[:, 3]
    shift = (first[:, :2] + second[:, :2]) / 2  # small coordinates lose fewer digits
    first, second = (torch.cat((box[:, :2] - shift, box[:, 2:5]), 1) for box in (first, second))
    # Only boxes whose circles touch are worth more work: of a thousand detections that is one pair in a hundred.
    reach = (torch.hypot(first[:, 2], first[:, 3]) + torch.hypot(second[:, 2], second[:, 3])) / 2
    near = (torch.hypot(*(first[:, :2] - second[:, :2]).unbind(1)) < reach) & (area1 >= 1e-14) & (area2 >= 1e-14)
    found = [_intersection(first[at], second[at]) for at in near.nonzero()[:, 0].split(_PAIRS)]
    inter = area1.new_zeros(len(first)).index_put_((near,), torch.cat([*found, area1.new_zeros(0)]))
    base = area1 + area2 - inter if mode == 0 else area1
    return torch.where(near, inter / torch.where(near, base, 1.0), 0.0)


@slow_op
def box_iou_rotated(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool) -> None:
    """Fill ``ious`` (N,) of pairs or (N * M,) of all; clockwise angles, mode 0 IoU, 1 over the first box's area."""
    if aligned:
        ious.copy_(_overlaps(boxes1, boxes2, mode_flag))
        return
    table = ious.view(len(boxes1), len(boxes2))
    for row in range(len(boxes1)):
        table[row] = _overlaps(boxes1[row].expand(len(boxes2), -1), boxes2, mode_flag)


@slow_op
def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool,
) -> Tensor:
    """Indices of the kept boxes, best score first.

    Args:
        dets: (N, 5), or (N, 6) with the labels behind, as mmcv gives them with ``multi_label``.
        order: From the best score to the worst; ``dets_sorted`` are ``dets`` in that order.
        multi_label: Boxes of different labels leave each other alone. (mmcv's op on the CPU does not look at labels.)
    """
    boxes, threshold = dets_sorted, as_float32(iou_threshold)
    left = torch.arange(len(boxes), device=boxes.device)
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        overlap = _overlaps(boxes[best].expand(len(left), -1), boxes[left], 0)
        # mmcv suppresses a box that overlaps by exactly the threshold on the CPU, and not on CUDA.
        suppressed = overlap > threshold if boxes.is_cuda else overlap >= threshold
        if multi_label:
            suppressed &= boxes[left, 5] == boxes[best, 5]
        left = left[~suppressed]
    return order[torch.stack(kept)] if kept else order[:0]
