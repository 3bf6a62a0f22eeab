"""What kind of error a detector makes: the six types of TIDE, counted."""

from collections import Counter
from typing import Any

import numpy as np
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

__all__ = ["ERRORS", "count_errors"]

ERRORS = ("classification", "localization", "both", "duplicate", "background", "missed")
FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU


def count_errors(evaluator: COCOeval) -> dict[str, int]:
    """Count the false positives by type, and the objects that nothing explains ("missed").

    A detection is right if it takes, by falling score, a free object of its class with an IoU of 0.5 or more. Else it
    is, the first that holds: *localization*, IoU with an object of its class from 0.1 to 0.5; *classification*, 0.5 or
    more with one of another class; *duplicate*, 0.5 or more with one of its class that is taken; *background*, at most
    0.1 with all; *both*, the rest. An object is missed if it is not found and is the best match of no classification
    or localization error. Crowds, and the detections of their class inside them, do not count.

    Args:
        evaluator: Evaluated, so that boxes or masks are ready.

    Reference:
        D. Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", 2020, section 2.2. We count
        errors; the paper weighs them too, by the AP that mending a type would give.
    """
    p, found = evaluator.params, Counter(dict.fromkeys(ERRORS, 0))
    for image in p.imgIds:
        truth, detections = (
            [x for category in p.catIds for x in side[image, category]] for side in (evaluator._gts, evaluator._dts)
        )
        detections = sorted(detections, key=lambda d: -d["score"])
        _count_image(truth, detections, "bbox" if p.iouType == "bbox" else "segmentation", found)
    return dict(found)


def _count_image(truth: list[dict], detections: list[dict], shape: str, found: Counter) -> None:
    crowds, objects = ([g for g in truth if bool(g.get("iscrowd")) == crowd] for crowd in (True, False))
    ious, inside = _ious(detections, objects, shape, 0), _ious(detections, crowds, shape, 1)
    same, in_crowd = _same_class(detections, objects), _same_class(detections, crowds)
    taken, explained, wrong = set(), set(), []
    for i in range(len(detections)):
        free = [j for j in np.flatnonzero(same[i] & (ious[i] >= FOREGROUND)) if j not in taken]
        if free:
            taken.add(max(free, key=lambda j: ious[i, j]))
        elif not (in_crowd[i] & (inside[i] >= FOREGROUND)).any():
            wrong.append(i)
    for i in wrong:
        own, other = np.where(same[i], ious[i], 0), np.where(same[i], 0, ious[i])
        if BACKGROUND <= own.max(initial=0) < FOREGROUND:
            found["localization"] += 1
            explained.add(int(own.argmax()))
        elif other.max(initial=0) >= FOREGROUND:
            found["classification"] += 1
            explained.add(int(other.argmax()))
        elif own.max(initial=0) >= FOREGROUND:
            found["duplicate"] += 1
        else:
            found["background" if ious[i].max(initial=0) <= BACKGROUND else "both"] += 1
    found["missed"] += len(set(range(len(objects))) - taken - explained)


def _ious(detections: list[dict], truth: list[dict], shape: str, crowd: int) -> np.ndarray:
    if not detections or not truth:
        return np.zeros((len(detections), len(truth)))
    return mask.iou([d[shape] for d in detections], [g[shape] for g in truth], [crowd] * len(truth))


def _same_class(detections: list[dict[str, Any]], truth: list[dict[str, Any]]) -> np.ndarray:
    classes = [np.array([x["category_id"] for x in side], int) for side in (detections, truth)]
    return classes[0][:, None] == classes[1][None]
