"""Precision-recall curves and error types of detections, on data whose answer is known."""

import contextlib
import io

import numpy as np
import pytest

from normplug import layers  # noqa: F401  lets the toolkits import

pytest.importorskip("mmdet.models")
from pycocotools.coco import COCO

from normplug.openmmlab.comparison.average_precision import evaluate
from normplug.openmmlab.comparison.error_types import count_errors
from normplug.openmmlab.comparison.precision_recall import draw_curves, precision_recall


def evaluated(objects, detections):
    """One image of 400 x 400; objects are (class, box, crowd), detections (class, box, score), boxes x, y, w, h."""
    api = COCO()
    api.dataset = dict(
        images=[dict(id=1, width=400, height=400)],
        categories=[dict(id=1, name="a"), dict(id=2, name="b")],
        annotations=[
            dict(id=i, image_id=1, category_id=k, bbox=box, area=box[2] * box[3], iscrowd=crowd)
            for i, (k, box, crowd) in enumerate(objects, 1)
        ],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    found = [dict(image_id=1, category_id=k, bbox=box, score=score) for k, box, score in detections]
    return evaluate(api, found, "bbox", [1], [1, 2])


A, B, C = [0, 0, 100, 100], [200, 0, 100, 100], [0, 200, 100, 100]


@pytest.mark.parametrize(
    ("detection", "expected"),
    [
        ((1, [0, 0, 100, 100], 0.5), dict(duplicate=1, missed=2)),  # A is taken by the one of score 0.9
        ((1, [0, 200, 100, 40], 0.5), dict(localization=1, missed=1)),  # IoU 0.4 with C, of its class
        ((1, [200, 0, 100, 80], 0.5), dict(classification=1, missed=1)),  # IoU 0.8 with B, of the other
        ((1, [200, 0, 100, 30], 0.5), dict(both=1, missed=2)),  # IoU 0.3 with B, of the other
        ((1, [300, 300, 50, 50], 0.5), dict(background=1, missed=2)),  # IoU 0
        ((2, [200, 0, 100, 60], 0.5), dict(missed=1)),  # IoU 0.6 with B: right
    ],
)
def test_each_type_of_error(detection, expected):
    objects = [(1, A, 0), (2, B, 0), (1, C, 0)]
    got = count_errors(evaluated(objects, [(1, A, 0.9), detection]))
    assert {name: n for name, n in got.items() if n} == expected


def test_crowds_do_not_count():
    assert not any(count_errors(evaluated([(1, A, 1)], [(1, [0, 0, 50, 50], 0.9)])).values())


def test_a_known_curve():
    # By falling score: right, wrong, right, of two objects. Precision 1 up to recall 0.5, 2/3 from there on.
    evaluator = evaluated([(1, A, 0), (1, B, 0)], [(1, A, 0.9), (1, C, 0.8), (1, B, 0.7)])
    curves = precision_recall(evaluator)
    want = np.where(np.linspace(0, 1, 101) <= 0.5, 1, 2 / 3)
    for name in ("IoU 0.5", "IoU 0.75", "mean"):
        np.testing.assert_allclose(curves[name], want)
    assert [axes.get_title() for axes in draw_curves([curves, curves], "AB").axes] == list(curves)


def test_no_objects_no_curve():
    assert precision_recall(evaluated([], [(1, A, 0.9)])) == {}
