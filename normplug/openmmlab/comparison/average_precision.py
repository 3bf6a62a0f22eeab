"""COCO's average precision as a function of how often each image counts."""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from normplug.openmmlab.comparison.bootstrap import Metric
from normplug.openmmlab.comparison.error_types import count_errors
from normplug.openmmlab.comparison.precision_recall import precision_recall

__all__ = ["AveragePrecision", "evaluate"]

KINDS = {"bbox": "box", "segm": "mask"}
MAX_DETECTIONS = 100  # per image and class, as in COCO's AP


def evaluate(
    truth: COCO,
    detections: list[dict[str, Any]],
    kind: str,
    images: list[int],
    categories: list[int],
    thresholds: np.ndarray | None = None,
) -> COCOeval:
    """Match detections with the truth, image by image, through pycocotools.

    Args:
        truth: Annotations.
        detections: COCO's results: ``image_id``, ``category_id``, ``score``, and ``bbox`` (x, y, w, h in pixels) or
            ``segmentation``.
        kind: "bbox" or "segm".
        images: Ids of the images that were looked at.
        categories: Ids of the classes.
        thresholds: IoU thresholds; default: 0.5 to 0.95.

    Returns:
        The evaluator, evaluated and not yet accumulated.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        if detections:
            found = truth.loadRes([dict(d) for d in detections])  # it writes into them
        else:  # loadRes looks at the first
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluator = COCOeval(truth, found, kind)
        evaluator.params.imgIds, evaluator.params.catIds = images, categories
        evaluator.params.maxDets = [1, 10, MAX_DETECTIONS]
        if thresholds is not None:
            evaluator.params.iouThrs = np.asarray(thresholds)
        evaluator.evaluate()
    return evaluator


@dataclass
class _Curve:
    """Detections of one class and size at one IoU threshold, by falling score."""

    hits: np.ndarray  # the image of each true positive
    misses: np.ndarray  # the image of each false positive
    before: np.ndarray  # how many of these come before each true positive

    def average(self, counts: np.ndarray, positives: np.ndarray, recalls: np.ndarray) -> np.ndarray:
        """Return the precision, averaged over recall thresholds, for each row of counts."""
        rows, width = len(counts), len(self.hits)
        if not width:
            return np.zeros(rows)
        hits = counts[:, self.hits].cumsum(1, dtype=np.int64)
        misses = np.zeros((rows, len(self.misses) + 1), np.int64)
        counts[:, self.misses].cumsum(1, dtype=np.int64, out=misses[:, 1:])
        precision = hits / (misses[:, self.before] + hits + np.spacing(1))
        best = np.zeros((rows, width + 1))  # the last column: a recall that is never reached
        best[:, :width] = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # One search for all rows: each row's numbers are lifted above those of the row before.
        lift = np.arange(rows)[:, None] * (max(hits.max(), positives.max()) + 1)
        needed = _hits_for(recalls, positives[:, None])
        place = np.searchsorted((hits + lift).ravel(), (needed + lift).ravel()).reshape(needed.shape)
        return np.take_along_axis(best, place - np.arange(rows)[:, None] * width, axis=1).mean(1)


def _hits_for(recalls: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Return the smallest number of hits with hits / positives >= recall, as that division rounds."""
    n = np.ceil(recalls * positives).astype(np.int64)
    positives = np.maximum(positives, 1)
    n -= (n - 1) / positives >= recalls
    return n + (n / positives < recalls)


class AveragePrecision:
    """AP over all classes and of each, over all sizes and of each, for weighted images: a ``Scorer``.

    An image that counts n times is an image that is n times in the data set; with each counting once the values are
    those of ``COCOeval.accumulate``. The order of detections with equal scores is that of the images.

    `support` has the number of images with objects, for each size and class; `curves` and `errors` what
    `precision_recall` and `count_errors` say of the data as it is.

    Args:
        evaluator: What `evaluate` returns.
    """

    def __init__(self, evaluator: COCOeval) -> None:
        p = evaluator.params
        self.of, self.thresholds, self.recalls = KINDS[p.iouType], p.iouThrs, p.recThrs
        self.sizes = p.areaRngLbl
        self.categories = [c["name"] for c in evaluator.cocoGt.loadCats(p.catIds)]
        shape = len(p.catIds), len(p.areaRng), len(p.imgIds)
        self.cells = []  # per class and size: images with objects, how many in each, and a curve per IoU threshold
        for i in range(shape[0] * shape[1]):
            found = evaluator.evalImgs[i * shape[2] : (i + 1) * shape[2]]
            self.cells.append(_cell([(j, e) for j, e in enumerate(found) if e is not None], len(p.iouThrs)))
        self.support = self._count_images()
        self.curves, self.errors = precision_recall(evaluator), count_errors(evaluator)

    def _count_images(self) -> dict[Metric, int]:
        cells = [images for images, _, _ in self.cells]
        found = {}
        for s, size in enumerate(self.sizes):
            by_class = cells[s :: len(self.sizes)]
            found |= {
                Metric("AP", self.of, size, name): len(images)
                for name, images in zip(self.categories, by_class, strict=True)
            }
            found[Metric("AP", self.of, size)] = len(np.unique(np.concatenate(by_class)))
        everywhere = found[Metric("AP", self.of)]
        return found | {Metric(name, self.of): everywhere for name in ("AP50", "AP75")}

    def __call__(self, counts: np.ndarray) -> dict[Metric, np.ndarray]:
        ap = np.full((len(counts), len(self.thresholds), len(self.cells)), np.nan)
        for cell, (images, objects, curves) in enumerate(self.cells):
            positives = counts[:, images] @ objects
            if positives.any():
                for t, curve in enumerate(curves):
                    ap[:, t, cell] = curve.average(counts, positives, self.recalls)
                ap[positives == 0, :, cell] = np.nan
        ap = ap.reshape(*ap.shape[:2], len(self.categories), len(self.sizes))
        values = {Metric("AP", self.of): _mean(ap[..., 0])}
        for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
            at = np.flatnonzero(np.isclose(self.thresholds, threshold))
            if len(at):
                values[Metric(name, self.of)] = _mean(ap[..., 0][:, at])
        values |= {Metric("AP", self.of, size): _mean(ap[..., s]) for s, size in enumerate(self.sizes) if s}
        for k, category in enumerate(self.categories):
            for s, size in enumerate(self.sizes):
                values[Metric("AP", self.of, size, category)] = _mean(ap[..., k, s])
        return values


def _cell(found: list[tuple[int, dict]], thresholds: int) -> tuple[np.ndarray, np.ndarray, list[_Curve]]:
    """Put the images' results of one class and size together."""
    images = np.array([i for i, _ in found], np.int64)
    objects = np.array([np.count_nonzero(e["gtIgnore"] == 0) for _, e in found], np.int64)
    none = np.zeros((thresholds, 0))
    scores, image = np.zeros(0), np.zeros(0, np.int64)
    matched = ignored = none
    if found:
        kept = [e["dtScores"][:MAX_DETECTIONS] for _, e in found]
        scores = np.concatenate(kept)
        image = np.repeat(images, [len(s) for s in kept])
        matched, ignored = (
            np.concatenate([e[key][:, :MAX_DETECTIONS] for _, e in found], axis=1).astype(bool)
            for key in ("dtMatches", "dtIgnore")
        )
    order = np.argsort(-scores, kind="stable")
    image, matched, ignored = image[order], matched[:, order].astype(bool), ignored[:, order].astype(bool)
    curves = []
    for match, ignore in zip(matched, ignored, strict=True):
        hits, misses = np.flatnonzero(match & ~ignore), np.flatnonzero(~match & ~ignore)
        curves.append(_Curve(image[hits], image[misses], np.searchsorted(misses, hits)))
    with_objects = objects > 0
    return images[with_objects], objects[with_objects], curves


def _mean(ap: np.ndarray) -> np.ndarray:
    """Return the mean over all axes but the first, without NaN."""
    flat = ap.reshape(len(ap), -1)
    defined = ~np.isnan(flat)
    number = defined.sum(1)
    return np.where(number, np.where(defined, flat, 0).sum(1) / np.maximum(number, 1), np.nan)
