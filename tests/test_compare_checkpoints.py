"""Two checkpoints side by side: the statistics, COCO's AP on resamples, caching, the norms, and the tool itself."""

import contextlib
import copy
import io
import sys
from pathlib import Path

import numpy as np
import pytest

import normplug  # noqa: F401  lets the toolkits import

pytest.importorskip("mmdet.models")
pytest.importorskip("mmaction.models")
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from normplug.openmmlab.comparison.accuracy import Accuracy
from normplug.openmmlab.comparison.average_precision import AveragePrecision, evaluate
from normplug.openmmlab.comparison.bootstrap import Metric, compare, draw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

# Statistics


def test_intervals_cover_a_known_difference():
    """Of paired coin flips with success rates 0.5 and 0.6: 95% intervals hold 0.1 in about 95% of the experiments."""
    random, experiments, samples = np.random.default_rng(0), 300, 200
    covered = found = 0
    for seed in range(experiments):
        shared = random.random(samples)  # the same difficulty for both: that is why the bootstrap is paired
        a, b = shared < 0.5, shared < 0.6

        def rate(hits):
            return lambda counts: {Metric("rate"): counts @ hits / counts.sum(1)}

        (rates,) = compare(rate(a), rate(b), samples, 400, seed)
        assert rates.difference == pytest.approx(b.mean() - a.mean(), abs=1e-12)
        covered += rates.low <= 0.1 <= rates.high
        found += rates.verdict == "B is better"
    assert 0.90 <= covered / experiments <= 0.98  # 0.95 but for chance (three sigma: 0.038) and n = 200
    assert found > 0.98 * experiments  # unpaired, the interval would be ±0.097 and miss half of them


def test_a_difference_of_nothing_is_inside_the_noise():
    hits = np.random.default_rng(0).random((2, 100)) < 0.5
    (same,) = compare(*(lambda n, h=hits[0]: {Metric("rate"): n @ h / n.sum(1)} for _ in "AB"), 100, 50)
    assert (same.low, same.high, same.verdict) == (0, 0, "inside the noise")
    (rates,) = compare(*(lambda n, h=h: {Metric("rate"): n @ h / n.sum(1)} for h in hits), 100, 200)
    assert rates.low < 0 < rates.high
    assert rates.verdict == "inside the noise"
    with pytest.raises(ValueError, match="not empty"):
        compare(*[lambda n: {}] * 2, 0)


def test_a_resample_has_as_many_samples_as_the_data():
    counts = draw(7, 1000)
    assert counts.shape == (1000, 7)
    assert (counts.sum(1) == 7).all()
    assert abs(counts.mean(0) - 1).max() < 0.15


# COCO's AP

IMAGES, CLASSES = 14, 4


def made_up_boxes(seed):
    """Truth with crowds, empty images and a class without objects; detections near them, with equal scores."""
    random = np.random.default_rng(seed)
    annotations, detections = [], []
    for image in range(1, IMAGES + 1):
        for _ in range(random.integers(0, 7)):
            size = random.choice([12, 50, 150])
            box = [*random.uniform(0, 300, 2).tolist(), *random.uniform(0.7 * size, 1.3 * size, 2).tolist()]
            crowd, category = int(random.random() < 0.1), int(random.integers(1, CLASSES))
            x, y, w, h = box
            annotations.append(
                dict(
                    id=len(annotations) + 1, image_id=image, category_id=category, bbox=box, area=w * h, iscrowd=crowd,
                    segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                )
            )  # fmt: skip
            for _ in range(random.integers(0, 3)):
                near = (np.array(box) + random.normal(0, size / 12, 4)).clip(1).tolist()
                score = round(random.random(), 2 if seed % 2 else 6)
                detections.append(dict(image_id=image, category_id=category, bbox=near, score=score))
        for _ in range(random.integers(0, 3)):
            wrong = random.uniform(10, 200, 4).tolist()
            category = int(random.integers(1, CLASSES + 1))
            detections.append(dict(image_id=image, category_id=category, bbox=wrong, score=random.random()))
    categories = [dict(id=k, name=f"class {k}") for k in range(1, CLASSES + 1)]
    images = [dict(id=i, width=500, height=500) for i in range(1, IMAGES + 1)]
    return dict(images=images, categories=categories, annotations=annotations), detections


def coco(truth):
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = copy.deepcopy(truth)
        api.createIndex()
    return api


def by_pycocotools(truth, detections, kind="bbox"):
    """Its own evaluation, from nothing: 'precision' (T, R, K, A) and the first six of its summary."""
    api = coco(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(api, api.loadRes(copy.deepcopy(detections)), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.eval["precision"][..., -1], evaluator.stats[:6]


def ours(truth, detections, counts, kind="bbox"):
    ids = [i["id"] for i in truth["images"]], [c["id"] for c in truth["categories"]]
    return AveragePrecision(evaluate(coco(truth), detections, kind, *ids))(np.atleast_2d(counts))


def check_against_pycocotools(values, row, precision, stats):
    of = next(iter(values)).of
    names = [("AP", "all"), ("AP50", "all"), ("AP75", "all"), *(("AP", s) for s in ("small", "medium", "large"))]
    for (name, size), want in zip(names, stats, strict=True):
        got = values[Metric(name, of, size)][row]
        assert got == pytest.approx(want, abs=1e-12) if want > -1 else np.isnan(got), (name, size)
    for k in range(CLASSES):
        for a, size in enumerate(("all", "small", "medium", "large")):
            cells, got = precision[:, :, k, a], values[Metric("AP", of, size, f"class {k + 1}")][row]
            want = cells[cells > -1].mean() if (cells > -1).any() else np.nan
            assert got == pytest.approx(want, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("seed", range(4))
def test_each_image_once_is_pycocotools(seed):
    truth, detections = made_up_boxes(seed)
    values = ours(truth, detections, np.ones(IMAGES, np.int32))
    check_against_pycocotools(values, 0, *by_pycocotools(truth, detections))


@pytest.mark.parametrize("seed", [0, 2])  # without equal scores, whose order a copied image would change
def test_an_image_that_counts_twice_is_there_twice(seed):
    truth, detections = made_up_boxes(seed)
    counts = draw(IMAGES, 6, seed)
    values = ours(truth, detections, counts)
    for row, times in enumerate(counts):
        copies, found = dict(truth, images=[], annotations=[]), []
        for image, number in zip(truth["images"], times, strict=True):
            for _ in range(number):
                new = dict(image, id=len(copies["images"]) + 1)
                copies["images"].append(new)
                for source, target in ((truth["annotations"], copies["annotations"]), (detections, found)):
                    target += [dict(x, image_id=new["id"]) for x in source if x["image_id"] == image["id"]]
        copies["annotations"] = [dict(a, id=i) for i, a in enumerate(copies["annotations"], 1)]
        check_against_pycocotools(values, row, *by_pycocotools(copies, found))


def test_masks_are_compared_as_masks():
    truth, _ = made_up_boxes(0)
    plain = dict(truth, annotations=[dict(a, iscrowd=0) for a in truth["annotations"]])
    api = coco(plain)
    keys = ("image_id", "category_id", "segmentation")
    found = [{k: a[k] for k in keys} | dict(score=0.5) for a in plain["annotations"]]
    for f, a in zip(found, plain["annotations"], strict=True):
        f["segmentation"] = api.annToRLE(dict(a, segmentation=[[c / 2 for c in a["segmentation"][0]]]))
    half = by_pycocotools(plain, found, "segm")
    check_against_pycocotools(ours(plain, found, np.ones(IMAGES, np.int32), "segm"), 0, *half)
    assert 0 <= half[1][0] < 0.5


def test_known_values():
    """One object per image, four images: a hit in each, in two, in none."""
    truth = dict(images=[dict(id=i, width=99, height=99) for i in range(4)], categories=[dict(id=1, name="it")])
    truth["annotations"] = [
        dict(id=i + 1, image_id=i, category_id=1, bbox=[9, 9, 40, 40], area=1600, iscrowd=0) for i in range(4)
    ]
    hits = [dict(image_id=i, category_id=1, bbox=[9, 9, 40, 40], score=0.9 - i / 10) for i in range(4)]
    once = np.ones(4, np.int32)
    assert ours(truth, hits, once)[Metric("AP", "box")] == 1
    assert ours(truth, hits[:2], once)[Metric("AP", "box")] == pytest.approx(51 / 101)  # recalls 0, 0.01, ... 0.5
    assert ours(truth, [], once)[Metric("AP", "box")] == 0
    assert np.isnan(ours(truth, [], once)[Metric("AP", "box", "large")])
    assert ours(truth, hits[:1], [4, 0, 0, 0])[Metric("AP", "box")] == 1
    assert ours(truth, hits[:1], [0, 1, 1, 2])[Metric("AP", "box")] == 0


# Accuracy of clips


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_is_mmaction2s_of_the_resampled_clips(seed):
    from mmaction.evaluation import AccMetric

    random = np.random.default_rng(seed)
    clips, classes = 12, 7  # so few that classes are missing, and some are predicted that no clip belongs to
    scores, labels = random.random((clips, classes)), random.integers(0, classes, clips)
    counts = np.concatenate([np.ones((1, clips), np.int32), draw(clips, 20, seed)])
    values = Accuracy(scores, labels, top_k=(1, 3))(counts)
    metric = AccMetric(metric_options=dict(top_k_accuracy=dict(topk=(1, 3))))
    for row, times in enumerate(counts):
        chosen = np.repeat(np.arange(clips), times)
        want = metric.calculate(list(scores[chosen]), labels[chosen].tolist())
        assert values[Metric("top-1")][row] == pytest.approx(want["top1"], abs=1e-12)
        assert values[Metric("top-3")][row] == pytest.approx(want["top3"], abs=1e-12)
        assert values[Metric("mean class accuracy")][row] == pytest.approx(want["mean1"], abs=1e-12)
        for k in range(classes):
            own = [scores[i].argmax() == k for i in chosen if labels[i] == k]
            got = values[Metric("accuracy", category=f"class {k}")][row]
            assert got == pytest.approx(np.mean(own) if own else np.nan, nan_ok=True)
