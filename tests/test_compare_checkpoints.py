"""Two checkpoints side by side: the statistics, COCO's AP on resamples, caching, the norms, and the tool itself."""

import contextlib
import copy
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import METRICS, MODELS, DefaultScope
from mmengine.runner import Runner
from torch import nn

from normplug import layers  # and lets the toolkits import

pytest.importorskip("mmdet.models")
pytest.importorskip("mmaction.models")
from cases import unpadded
from matplotlib.figure import Figure
from mmcv.cnn import build_norm_layer
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from normplug.openmmlab import digits
from normplug.openmmlab.adapt import adapt, fuse_activations
from normplug.openmmlab.comparison import report
from normplug.openmmlab.comparison.accuracy import Accuracy
from normplug.openmmlab.comparison.average_precision import AveragePrecision, evaluate
from normplug.openmmlab.comparison.bootstrap import Metric, compare, draw
from normplug.openmmlab.comparison.cost import measure
from normplug.openmmlab.comparison.norms import OutputRanges, filters_of, norms_of
from normplug.openmmlab.comparison.predictions import Cache, Predictions, _detections, fingerprint
from normplug.openmmlab.comparison.run import compare_checkpoints
from normplug.openmmlab.comparison.sides import Side, check_comparable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import compare_checkpoints as tool  # noqa: E402  found through the line above

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


@pytest.mark.parametrize("clips", [1, 2, 4, 5, 10])
def test_a_rare_class_is_not_called_better_by_chance(clips):
    """Two models of the same quality, each right with probability 0.5, on one rare class and one that is not."""
    random, labels = np.random.default_rng(0), np.repeat([0, 1], [clips, 60])
    wrong = without_zero = 0
    for seed in range(500):
        a, b = (Accuracy(random.random((len(labels), 2)), labels, top_k=(1,)) for _ in "AB")
        rates = {d.metric: d for d in compare(a, b, len(labels), 300, seed, support=a.support)}
        rare, common = (rates[Metric("accuracy", category=f"class {k}")] for k in (0, 1))
        assert (rare.support, common.support) == (clips, 60)
        assert (rare.verdict == "too few samples") == (clips < 5)
        wrong += "better" in rare.verdict
        without_zero += rare.low > 0 or rare.high < 0
    assert wrong / 500 < 0.07 + 3 * 0.012  # of ten clips 7%, and three standard errors
    if clips < 3:  # why there is a limit: all of the clips must differ, and in one direction
        assert without_zero / 500 == pytest.approx(2 * 0.25**clips, abs=3 * 0.023)


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


def test_images_with_something_to_find_are_counted():
    truth, detections = made_up_boxes(0)
    ids = [i["id"] for i in truth["images"]], [c["id"] for c in truth["categories"]]
    support = AveragePrecision(evaluate(coco(truth), detections, "bbox", *ids)).support
    assert set(support) == set(ours(truth, detections, np.ones(IMAGES, np.int32)))
    bounds = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
    for metric, number in support.items():
        low, high = bounds[metric.size]
        assert number == len(
            {
                a["image_id"]
                for a in truth["annotations"]
                if low <= a["area"] < high and not a["iscrowd"]
                if metric.category in ("", f"class {a['category_id']}")
            }
        ), metric


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


# What the norms are doing


class Block(nn.Module):
    """Convolution, norm, ReLU; then convolution, norm, sum in place and ReLU as in a residual block; a spare norm."""

    def __init__(self, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3), norm(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), norm(8)
        self.relu, self.spare = nn.ReLU(inplace=True), norm(8)

    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(x))
        y += x
        return self.relu(y)


def ranges_of(model, *inputs):
    ranges = OutputRanges()
    with torch.no_grad(), ranges.watching(model):
        for x in inputs:
            model(x)
    return ranges


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c), layers.FrozenBatchNorm])
def test_planted_dead_channels_are_found(norm):
    model = Block(norm).eval()
    with torch.no_grad():
        for layer in (model.norm1, model.norm2):
            layer.weight[3] = 1e-9  # constant
            layer.bias[5] = -1e3  # never positive: dead behind a ReLU; before a sum it is a channel like others
            layer.weight[6], layer.bias[6] = 1e-2, 1.0  # small and alive
    found = norms_of(model, ranges_of(model, *torch.randn(3, 2, 3, 9, 9)))
    assert {n.name: n.dead for n in found} == {"norm1": [3, 5], "norm2": [3], "spare": None}
    assert not model._forward_hooks
    assert not model.norm1._forward_hooks


def test_a_channel_is_dead_only_if_it_is_on_all_data():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU())
    nothing, something = torch.zeros(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    assert ranges_of(model, nothing).dead("0") == [0, 1, 2, 3]
    assert ranges_of(model, nothing, something).dead("0") == []
    assert ranges_of(model, something[:0]).dead("0") is None  # an RoI head without RoIs


@pytest.mark.parametrize("kind", ["EvoNormS0", "EvoNormB0", "FRN"])
def test_channels_of_layers_with_their_own_activation(kind):
    layer = build_norm_layer(dict(type=kind), 4)[1].eval()
    with torch.no_grad():
        layer.weight[1] = 0
        if kind == "FRN":
            layer.tau[2] = 50  # a threshold above everything
    model = nn.Sequential(layer)
    (norm,) = norms_of(model, ranges_of(model, torch.randn(2, 4, 8, 8)))
    assert norm.dead == ([1, 2] if kind == "FRN" else [1])
    assert norm.kind == kind
    assert norm.activation.mean == (12.5 if kind == "FRN" else 1)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_norms_that_take_the_sum_over_are_seen_without_it(act):
    """What is found does not depend on whether norm, sum and activation run in one pass, as on a GPU."""
    from mmdet.models.backbones import ResNet

    model = ResNet(18, base_channels=8, stem_channels=8, norm_cfg=dict(type="GN", num_groups=2, act=act))
    adapt(model)
    model.eval()  # returns nothing, as all of mmdet's backbones
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.weight[1], layer.bias[2] = 0, -1e3
    x = torch.randn(2, 3, 32, 32)
    apart = ranges_of(model, x).state()
    together = ranges_of(fuse_activations(model, ("cpu",)), x)
    dead = {norm.name: norm.dead for norm in norms_of(model, together)}
    assert dead["gn1"] == dead["layer1.0.gn1"] == ([1, 2] if act == "relu" else [1])
    assert dead["layer1.0.gn2"] == dead["layer2.0.downsample.1"] == [1]
    for name, (low, high) in together.state().items():
        assert low == pytest.approx(apart[name][0], abs=1e-4), name
        assert high == pytest.approx(apart[name][1], abs=1e-4), name


@pytest.mark.parametrize("kind", ["BN", "SyncBN", "FrozenBatchNorm", "CBN", "CBN outside"])
def test_the_effective_scale_is_the_slope_of_the_layer(kind):
    options = dict(eps_mode="outside", eps=0.1) if "outside" in kind else {}
    layer = build_norm_layer(dict(type=kind.split()[0], **options), 5)[1].double().eval()
    with torch.no_grad():
        for t in (layer.weight, layer.running_mean, layer.running_var):
            t.copy_(torch.rand(5) + 0.1)
        layer.weight[0] *= -1
        x = torch.randn(2, 5, 3, 3).double()
        slope = (layer(x + 1) - layer(x)).mean((0, 2, 3))
    (norm,) = norms_of(nn.Sequential(layer))
    assert norm.scales == pytest.approx(slope.abs().tolist(), rel=1e-9)
    assert norm.weight.low == pytest.approx(layer.weight.abs().min().item())
    assert norm.running_var.mean == pytest.approx(layer.running_var.mean().item())


def test_state_is_what_training_would_change():
    from mmdet.models.backbones import ResNet

    def states(**options):
        model = ResNet(18, base_channels=8, stem_channels=8, **options)
        model.eval()
        found = {norm.name.partition(".")[0]: norm.state for norm in norms_of(model)}
        assert not any(module.training for module in model.modules())
        return found.get("bn1", found.get("gn1")), found["layer4"]

    free = dict(frozen_stages=-1, norm_eval=False)
    assert states(**free) == ("trained", "trained")
    assert states(frozen_stages=0, norm_eval=False) == ("frozen", "trained")
    assert states(frozen_stages=0, norm_eval=True) == ("frozen", "statistics frozen")
    assert states(**free, norm_cfg=dict(type="BN", requires_grad=False)) == ("weights frozen",) * 2
    assert states(**free, norm_cfg=dict(type="FrozenBatchNorm")) == ("frozen", "frozen")
    groups = dict(type="GN", num_groups=2, requires_grad=False)
    assert states(**free, norm_cfg=groups) == ("frozen", "frozen")


def test_a_model_without_norms_is_drawn_too():
    norms = norms_of(nn.Sequential(nn.BatchNorm2d(2)))
    for side in (0, 1):
        figure = Figure()
        report._draw_norms(figure, [norms, []] if side == 0 else [[], norms])
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["AB"[side]]


def test_filters_say_which_are_standardized():
    model = nn.Sequential(layers.WSConv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
    standardized, plain = filters_of(model)
    assert (standardized.standardized, plain.standardized) == (True, False)
    want = model[0].weight.detach().double().numpy().reshape(4, -1).std(1)
    assert [standardized.std.mean, standardized.std.low] == pytest.approx([want.mean(), want.min()])


# Cost


class Made(nn.Module):
    """A model as the measurement sees it: a convolution, and a temporary tensor of 4 MB per sample."""

    def __init__(self):
        super().__init__()
        self.backbone, self.roi_head = nn.Conv2d(3, 8, 3, bias=False), nn.Module()
        self.roi_head.fc = nn.Linear(8, 5)

    def test_step(self, data):
        x = self.backbone(torch.stack(data))
        temporary = torch.zeros(len(data), 1 << 20)
        return self.roi_head.fc(x.mean((2, 3))) + temporary.sum()


def test_cost_of_a_known_model():
    model = Made()
    model.roi_head.requires_grad_(False)
    data = torch.utils.data.DataLoader(list(torch.randn(3, 3, 10, 10)), collate_fn=list)
    cost, other = measure([model, Made()], data, [1, 4], seconds=0.01)  # 4: the data begins anew
    conv, linear = 2 * 8 * 3 * 9 * 8 * 8, 2 * 8 * 5
    assert cost.flops == {"backbone": conv, "roi_head.fc": linear, "": conv + linear}
    assert (cost.parameters, cost.trainable, cost.weight_bytes) == (261, 216, 4 * 261)
    assert [x.batch_size for x in cost.latencies] == [1, 4]
    for x in (*cost.latencies, *other.latencies):
        assert 0 < x.low <= x.median <= x.high
        assert x.repetitions == len(x.calls) >= 12
        assert x.throughput == pytest.approx(1000 * x.batch_size / x.median)
        assert 0 <= x.peak_bytes - x.batch_size * (4 << 20) < 1 << 16


# The whole


@pytest.fixture(scope="module")
def detection(tmp_path_factory):
    return set_up("detection", "mask-rcnn_r18_fpn_{}_digits.py", tmp_path_factory.mktemp("detection"))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return set_up("video", "i3d_r18_{}_digits.py", tmp_path_factory.mktemp("video"))


def set_up(task, pattern, folder):
    """A tiny data set, and options and arguments for a BN and a GN model with random weights."""
    sizes = dict(num_train=2, num_val=6)
    digits.make(task, folder, **sizes)
    options = {f"test_dataloader.dataset.{key}": value for key, value in dict(data_root=str(folder), **sizes).items()}
    if task == "detection":
        options["test_evaluator.ann_file"] = f"{folder}/detection/val.json"
        options["model.test_cfg.rcnn.max_per_img"] = 5
    arguments = []
    for norm in ("bn", "gn"):
        config = ROOT / "configs/digits" / pattern.format(norm)
        cfg = Config.fromfile(config)
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
        model.init_weights()
        arguments += [str(config), str(folder / f"{norm}.pth")]
        torch.save(dict(state_dict=model.state_dict()), arguments[-1])
    return arguments, options


def side(setup, letter, **options):
    arguments, own = setup
    config, checkpoint = arguments[:2] if letter == "A" else arguments[2:]
    return Side(letter, Path(config), Path(checkpoint), own | options)


def sides(setup):
    return side(setup, "A"), side(setup, "B")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detection", "video"])
def test_the_tool(task, request, tmp_path, capsys, monkeypatch):
    arguments, options = request.getfixturevalue(task)
    command = [*arguments, "--device", "cpu", "--resamples", "20", "--batch-sizes", "1", "2", "--seconds", "0.01"]
    command += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path), "--cfg-options"]
    command += [f"{key}={value}" for key, value in options.items()] + ["test_dataloader.dataset.indices=4"]
    assert tool.main(command) == 0
    printed, text = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    name = {"detection": "box AP", "video": "top-1"}[task]
    assert f"| {name} " in printed
    assert f"| {name} " in text
    assert "from cache" not in text.lower()
    for file in ("metrics.png", "classes.png", "cost.png", "norms.png", "report.html"):
        assert (tmp_path / file).stat().st_size > 5000, file
    numbers = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert numbers["samples"] == 4
    assert all(norm["dead"] is not None for side in numbers["norms"] for norm in side)
    assert {norm["kind"] for norm in numbers["norms"][1]} == {"GN"}
    assert [len(cost["latencies"]) for cost in numbers["cost"]] == [2, 2]

    # again: nothing runs
    monkeypatch.setattr("normplug.openmmlab.comparison.run.predict", pytest.fail)
    monkeypatch.setattr("normplug.openmmlab.comparison.run.measure", pytest.fail)
    assert tool.main(command) == 0
    text = (tmp_path / "report.md").read_text()
    assert "A's from cache" in text
    assert "B's from cache" in text
    assert "From cache, measured" in text
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["metrics"] == numbers["metrics"]
    assert again["norms"] == numbers["norms"]
    assert again["cost"] == numbers["cost"]


def test_predictions_are_scored_as_the_toolkits_do(detection, video):
    """The tool's numbers against those of the evaluators that the configs name, from a plain loop."""
    for setup in (detection, video):
        a, b = sides(setup)
        found = compare_checkpoints(a, b, torch.device("cpu"), batch_sizes=(), resamples=2)
        with DefaultScope.overwrite_default_scope(a.cfg.default_scope):
            evaluator = Evaluator(copy.deepcopy(a.cfg.test_evaluator))
            loader = Runner.build_dataloader(a.cfg.test_dataloader)
            evaluator.dataset_meta = loader.dataset.metainfo
            model = b.build()
            for batch in loader:
                with torch.no_grad():
                    evaluator.process(model.test_step(batch), batch)
            want = evaluator.evaluate(len(loader.dataset))
        names = {
            "coco/bbox_mAP": Metric("AP", "box"),
            "coco/bbox_mAP_50": Metric("AP50", "box"),
            "coco/segm_mAP": Metric("AP", "mask"),
            "coco/segm_mAP_s": Metric("AP", "mask", "small"),
            "acc/top1": Metric("top-1"),
            "acc/top5": Metric("top-5"),
            "acc/mean1": Metric("mean class accuracy"),
        }
        values = {difference.metric: difference.b for difference in found.differences}
        compared = {key: values[metric] for key, metric in names.items() if key in want}
        assert len(compared) in (3, 4)
        assert compared == pytest.approx({key: want[key] for key in compared}, abs=5.1e-4)  # mmdet rounds


def test_detections_are_scored_as_mmdet_does(detection):
    """Half-right detections whose masks are smaller than their boxes: whether one is small depends on which counts."""
    a, _ = sides(detection)
    random = np.random.default_rng(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        metric = METRICS.build(a.cfg.test_evaluator)
    metric.dataset_meta = dict(classes=digits.CLASSES)
    truth = metric._coco_api
    for image in truth.getImgIds():
        found = truth.loadAnns(truth.getAnnIds(imgIds=[image]))
        corners = np.array([[x, y, x + w, y + h] for x, y, w, h in (f["bbox"] for f in found)])
        prediction = dict(
            img_id=image,
            bboxes=corners + random.normal(0, 3, corners.shape) + [-4, -4, 4, 4],
            scores=random.random(len(found)),
            labels=np.array([f["category_id"] - 1 for f in found]),
            masks=[rle.encode(np.asfortranarray(np.roll(truth.annToMask(f), random.integers(0, 5), 1))) for f in found],
        )
        metric.results.append((dict(width=128, height=128, img_id=image), prediction))
    results = _detections(metric)
    want = metric.compute_metrics(metric.results)
    classes = truth.getCatIds()
    sizes = {"": ("AP", "all"), "_50": ("AP50", "all"), "_75": ("AP75", "all")}
    sizes |= {f"_{size[0]}": ("AP", size) for size in ("small", "medium")}
    for kind, of in (("bbox", "box"), ("segm", "mask")):
        scores = AveragePrecision(evaluate(truth, results[kind], kind, results["images"], classes))
        values = scores(np.ones((1, len(results["images"])), np.int32))
        for key, (name, size) in sizes.items():
            got = values[Metric(name, of, size)].item()
            assert got == pytest.approx(want[f"{kind}_mAP{key}"], abs=5.1e-4), (of, name, size)  # mmdet rounds
        assert 0.1 < values[Metric("AP", of)].item() < 0.9


def test_known_predictions(detection, tmp_path, monkeypatch):
    """A finds nothing, B finds everything."""
    a, b = sides(detection)
    truth = json.loads(Path(a.cfg.test_evaluator.ann_file).read_text())
    keys = ("image_id", "category_id", "bbox", "segmentation")
    right = [{k: annotation[k] for k in keys} | {"score": 0.5} for annotation in truth["annotations"]]
    masks = [{k: v for k, v in d.items() if k != "bbox"} for d in right]
    boxes = [{k: v for k, v in d.items() if k != "segmentation"} for d in right]
    images = [image["id"] for image in truth["images"]]
    answers = iter([([], []), (boxes, masks)])

    def made_up(*_):
        bbox, segm = next(answers)
        return Predictions(dict(bbox=bbox, segm=segm, images=images), {}, 0.0, "today")

    monkeypatch.setattr("normplug.openmmlab.comparison.run.predict", made_up)
    found = compare_checkpoints(a, b, torch.device("cpu"), batch_sizes=(), resamples=20)
    for difference in found.differences:
        if not np.isnan(difference.low):
            assert (difference.a, difference.b) == (0, pytest.approx(1, abs=1e-12)), difference.metric
            assert difference.verdict == ("B is better" if difference.support >= 5 else "too few samples")
    report.write(found, tmp_path, {})
    text = (tmp_path / "report.md").read_text()
    assert "| box AP | B is better | +100.0 | +100.0 to +100.0 | 0.0 | 100.0 |" in unpadded(text)
    assert re.search(r"\| 3 \| too few samples \|.*\| 0.0 \| 100.0 \| [1-4] \|", unpadded(text))
    assert "latency" not in text
    assert "not called" in text


# What is remembered


@pytest.mark.slow
def test_a_key_changes_with_all_that_predictions_depend_on(video, tmp_path, monkeypatch):
    (own, other), device = sides(video), torch.device("cpu")

    def key(of, reference=None):
        cfg = (reference or of).cfg
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            return fingerprint(of, cfg, Runner.build_dataloader(cfg.test_dataloader), device)

    first = key(own)
    assert key(side(video, "A")) == first
    assert key(other) != first
    changed = {
        "config": key(side(video, "A", **{"model.cls_head.dropout_ratio": 0.5}), own),
        "settings": key(own, side(video, "A", **{"test_dataloader.batch_size": 2})),
    }
    weights = torch.load(own.checkpoint)
    weights["state_dict"]["backbone.conv1.bn.bias"][0] += 1e-6
    torch.save(weights, tmp_path / "bn.pth")
    changed["checkpoint"] = key(Side("A", own.config, tmp_path / "bn.pth", video[1]))
    file = next(Path(video[1]["test_dataloader.dataset.data_root"]).rglob("val/*.mp4"))
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    changed["data"] = key(own)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    source = tmp_path / "own_module.py"
    source.write_text("x = 1")
    monkeypatch.syspath_prepend(tmp_path)
    with_code = side(video, "A")
    with_code.cfg.custom_imports.imports.append("own_module")
    plain = key(with_code)
    source.write_text("x = 2")
    assert key(with_code) == plain | {"code": key(with_code)["code"]} != plain
    for name, found in changed.items():
        assert {k for k in first if found[k] != first[k]} == {name}, name
    assert key(own) == first


def test_the_cache_believes_no_other_key_and_no_broken_file(tmp_path):
    cache, key = Cache(tmp_path / "new"), {"checkpoint": "a"}
    assert cache.get("cost", key) is None
    cache.put("cost", key, [1.5, float("nan")])
    assert cache.get("cost", key)[0] == 1.5
    assert cache.get("cost", {"checkpoint": "b"}) is None
    assert cache.get("predictions", key) is None
    (file,) = cache.folder.iterdir()
    whole = file.read_text()
    file.write_text(whole[:-3])
    assert cache.get("cost", key) is None
    file.write_text(whole.replace('"a"', '"b"'))  # two keys with one name
    assert cache.get("cost", key) is None
    Cache(None).put("cost", key, 1)
    assert Cache(None).get("cost", key) is None


# What is refused


def test_what_cannot_be_compared_says_why(detection, video, tmp_path):
    a, b = sides(detection)
    assert check_comparable(a, b) == []
    with pytest.raises(ValueError, match=r"is tested as detection and .* as video"):
        check_comparable(a, side(video, "B"))
    renamed = {"test_dataloader.dataset.metainfo": dict(classes=tuple("0123456798"))}
    with pytest.raises(ValueError, match=r"class lists differ: 10 classes .* 10 .* '8' and '9'"):
        check_comparable(a, side(detection, "B", **renamed))
    more = {"model.roi_head.bbox_head.num_classes": 11, "model.roi_head.mask_head.num_classes": 11}
    with pytest.raises(ValueError, match=r"num_classes differ: \[10\] .* \[11\]"):
        check_comparable(a, side(detection, "B", **more))
    with pytest.raises(ValueError, match="evaluated by proposal"):
        check_comparable(a, side(detection, "B", **{"test_evaluator.metric": "proposal"}))
    only = [{"test_evaluator.metric": kind} for kind in ("bbox", "segm")]
    with pytest.raises(ValueError, match="no metric in common"):
        check_comparable(side(detection, "A", **only[0]), side(detection, "B", **only[1]))
    (remark,) = check_comparable(a, side(detection, "B", **only[0]))
    assert "segm, which is left out" in remark
    with pytest.raises(ValueError, match="VOCMetric test_evaluator"):
        check_comparable(a, side(detection, "B", **{"test_evaluator.type": "VOCMetric"}))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Side("A", a.config, tmp_path / "none.pth", {})


def test_a_checkpoint_of_another_model_is_refused(video, tmp_path):
    a, b = sides(video)
    with DefaultScope.overwrite_default_scope("mmaction"):
        with pytest.raises(ValueError, match="norms are not the model's"):
            Side("A", a.config, b.checkpoint, video[1]).build()
        weights = torch.load(a.checkpoint)["state_dict"]
        torch.save({k: v for k, v in weights.items() if "cls_head" not in k}, tmp_path / "headless.pth")
        with pytest.raises(ValueError, match=r"lacks 2 of the weights .*cls_head"):
            Side("A", a.config, tmp_path / "headless.pth", video[1]).build()
        torch.save(weights | {"backbone.layer5.weight": torch.ones(3)}, tmp_path / "larger.pth")
        with pytest.raises(ValueError, match=r"has 1 weights that .* has not, backbone\.layer5\.weight for one"):
            Side("A", a.config, tmp_path / "larger.pth", video[1]).build()
        weights["cls_head.fc_cls.weight"] = torch.zeros(3, 64)
        torch.save(weights, tmp_path / "three.pth")
        with pytest.raises(ValueError, match=r"(?s)does not fit .*size mismatch"):
            Side("A", a.config, tmp_path / "three.pth", video[1]).build()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resamples", "0"], "--resamples must be 1 or more"),
        (["--batch-sizes", "2", "0"], "--batch-sizes must be 1 or more"),
    ],
)
def test_wrong_arguments_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(["a.py", "a.pth", "b.py", "b.pth", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("task", ["detection", "video"])
def test_no_data_is_said(task, request, capsys):
    arguments, options = request.getfixturevalue(task)
    chosen = [f"{key}={value}" for key, value in options.items()] + ["test_dataloader.dataset.indices=0"]
    assert tool.main([*arguments, "--device", "cpu", "--batch-sizes", "--cfg-options", *chosen]) == 2
    assert "The test data set is empty" in capsys.readouterr().err


def test_missing_files_are_named(capsys):
    assert tool.main(["none.py", "a.pth", "none.py", "b.pth", "--device", "cpu"]) == 2
    assert "There is no config none.py" in capsys.readouterr().err
    assert tool.main(["a.py", "a.pth", "b.py", "b.pth", "--device", "tpu"]) == 2
    assert "--device tpu" in capsys.readouterr().err
