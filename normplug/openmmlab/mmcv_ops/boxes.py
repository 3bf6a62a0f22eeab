"""Overlaps of upright boxes, and the choices made by them."""

import numpy as np
import torch
from torch import Tensor

from normplug.openmmlab.mmcv_ops._common import as_float32, op, wide


@op
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the kept boxes, best score first; ``offset`` 1 counts the right and bottom pixel in."""
    boxes, scores = wide(boxes), wide(scores)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torch.ops.torchvision.nms(boxes, scores, as_float32(iou_threshold))


def _overlap(lt: Tensor, rb: Tensor, offset: int) -> Tensor:
    return (rb - lt + offset).clamp(min=0).prod(-1)


@op
def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Fill ``ious`` with intersection over union (mode 0) or over the first box's area (mode 1)."""
    first, second = wide(bboxes1), wide(bboxes2)
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


@op
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
    table = torch.cat((wide(boxes), wide(scores)[:, None]), dim=1).numpy()
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


@op
def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """For every kept box of (N, 5) CPU ``dets``: its index and those of the boxes it suppresses."""
    table = wide(dets).numpy()
    left = wide(dets)[:, 4].argsort(descending=True, stable=True).numpy()
    groups = []
    while len(left):
        hit = _iou_with(table[left[0]], table[left[1:]], 0) >= table.dtype.type(iou_threshold)
        groups.append([int(left[0]), *left[1:][hit].tolist()])
        left = left[1:][~hit]
    return groups
