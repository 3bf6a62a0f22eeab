"""Configs equal the recipes of their sources, or their headers say where not; every published number has a status."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS as LAYERS
from torch import nn

import normplug  # noqa: F401

pytest.importorskip("mmdet.models")
pytest.importorskip("mmaction.models")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import make_configs  # noqa: E402
import recipes  # noqa: E402
import results_table  # noqa: E402

pytestmark = pytest.mark.slow  # reading all configs takes half a minute
MODELS = make_configs.models()
GN = ROOT / "configs/mask_rcnn/mask-rcnn_r50_fpn_gn-all_2x_coco.py"
I3D = ROOT / "configs/i3d/i3d_r50_bn_8xb8-32x2x1-100e_kinetics400-rgb.py"


def test_files_that_follow_from_data_are_fresh():
    stale = [path for path, text in (*make_configs.products(), *make_configs.headers()) if path.read_text() != text]
    assert not stale, f"run python tools/make_configs.py: {stale}"
    assert results_table.RESULTS.read_text() == results_table.page(), "run python tools/results_table.py"


def announced(text):
    """The fields that a header's 'Differs' names, for each recipe."""
    parts = make_configs.Header.of(text).parts
    known = sorted({*recipes.fields(recipes.load(GN)), *recipes.fields(recipes.load(I3D))}, key=len, reverse=True)
    return {
        key: {next(field for field in known if item.startswith(field + " ")) for item in text.split("; ")}
        for key, text in parts.items()
        if key.startswith("Differs")
    }


def test_headers_announce_every_difference_from_the_source_and_no_other():
    for model in MODELS:
        path = ROOT / model["Config"]
        found = announced(path.read_text()).get("Differs", set())
        assert found == set(recipes.differences(recipes.load(path), model["Recipe"])), path.stem


CHANGES = {  # field -> what changes it, and nothing else
    "lr": {"optim_wrapper.optimizer.lr": 0.01},
    "length": {"train_cfg.max_iters": 175920},
    "lr / 10 after": {"param_scheduler.1.milestones": [117280, 161260]},
    "warm-up": {"param_scheduler.0.start_factor": 0.001},
    "momentum": {"optim_wrapper.optimizer.nesterov": True},
    "decay of norms": {"optim_wrapper.paramwise_cfg.norm_decay_mult": 1.0},
    "biases": {"optim_wrapper.paramwise_cfg.bias_lr_mult": 1.0},
    "gradient clipping": {"optim_wrapper.clip_grad": ConfigDict(max_norm=35)},
    "mixed precision": {"optim_wrapper.type": "AmpOptimWrapper"},
    "PreciseBN": {"custom_hooks": [ConfigDict(type="PreciseBNHook", num_batches=200)]},
    "input": {"model.data_preprocessor.bgr_to_rgb": True},
    "scales": {"train_dataloader.dataset.pipeline.2.scale": (1333, 640)},
    "weights": {"model.backbone.init_cfg.checkpoint": "torchvision://resnet50"},
    "frozen stages": {"model.backbone.frozen_stages": -1},
    "stride in": {"model.backbone.style": "caffe"},
    "norms": {"model.neck.norm_cfg": None},
    "box head": {"model.roi_head.bbox_head.type": "Shared2FCBBoxHead"},
    "RPN convolutions": {"model.rpn_head.num_convs": 2},
    "proposals": {"model.train_cfg.rpn_proposal.max_per_img": 2000},
    "proposals in tests": {"model.test_cfg.rpn.max_per_img": 2000},
    "RoIs": {"model.train_cfg.rcnn.sampler.num": 256},
    "sampling ratio": {"model.roi_head.bbox_roi_extractor.roi_layer.sampling_ratio": 0},
    "losses of boxes": {"model.rpn_head.loss_bbox.type": "L1Loss"},
    "anchors over the border": {"model.train_cfg.rpn.allowed_border": -1},
    "coordinates": {"model.roi_head.bbox_roi_extractor.roi_layer.aligned": False},
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_recipe_that_changes_is_seen(field):
    cfg = copy.deepcopy(recipes.load(GN))
    before = recipes.fields(cfg)
    for path, value in CHANGES[field].items():
        *way, last = path.split(".")
        node = cfg
        for step in way:
            node = node[int(step)] if step.isdigit() else node[step]
        node[int(last) if last.isdigit() else last] = value
    after = recipes.fields(cfg)
    assert {key for key in before if before[key] != after[key]} == {field}


def test_a_recipe_that_a_config_cannot_have_is_told():
    with pytest.raises(KeyError, match="no recipe 'detectron/gn-5x'"):
        recipes.fields_of_source("detectron/gn-5x")


CHECKED = {  # fields typed from the source's files once more, independent of configs/sources.yml
    "mask_rcnn/mask-rcnn_r50_fpn_gn-all_2x_coco": {  # Detectron's yaml, core/config.py and modeling/optimizer.py
        "length": "180000 iterations",
        "lr / 10 after": "120000, 160000",
        "warm-up": "500 iterations from 0.333",
        "decay of norms": "0",
        "biases": "lr x 2, decay x 0",
        "sampling ratio": "2",
        "stride in": "3x3",
    },
    "mask_rcnn/mask-rcnn_r50-scratch_fpn_syncbn-all_8xb8-ms-9x_coco": {  # Detectron2's yaml and config/defaults.py
        "length": "202500 iterations",
        "warm-up": "1000 iterations from 0.001",
        "decay of norms": "0",
        "PreciseBN": "200 batches",
        "stride in": "3x3",
        "input": "BGR, mean 103.53 116.28 123.675, std 57.375 57.12 58.395",
    },
    "mask_rcnn/mask-rcnn_r101-scratch_fpn_syncbn-all_8xb8-amp-lsj-100e_coco": {  # Detectron2's new_baselines
        "length": "184375 iterations",
        "lr / 10 after": "163889, 177546",
        "decay of norms": "0",
        "stride in": "1x1",
        "input": "BGR, mean 103.53 116.28 123.675, std 1",
    },
    "mask_rcnn/mask-rcnn_r101_fpn_gn-ws-all_4xb1-20-23-24e_coco": {  # JHU's yaml and maskrcnn-benchmark's defaults
        "GPUs x samples": "4 x 1",
        "length": "720000 iterations",
        "lr / 10 after": "600000, 680000",
        "biases": "lr x 2, decay x 0, those of norms too",
        "proposals": "2000 a level, then 2000 an image",
    },
    "faster_rcnn/faster-rcnn_r50-c4_frozen-bn_8xb1-2x_coco": {  # Detectron's yaml
        "GPUs x samples": "8 x 1",
        "lr": "0.01",
        "length": "360000 iterations",
        "norms": "BN* in backbone + conv5",
        "weights": "open-mmlab://detectron2/resnet50_caffe",
    },
    "mask_rcnn/mask-rcnn_r50_fpn_cbn-head_4xb4-1x_coco": {  # the authors' config
        "gradient clipping": "norm 35",
        "proposals in tests": "2000 a level, then 2000 an image",
        "sampling ratio": "2",
    },
    "i3d/i3d_r50_bn_8xb4-64x1x1-100e_kinetics400-rgb": {  # video-nonlocal-net's yaml
        "decay of norms": "0",
        "PreciseBN": "200 batches",
        "scales": "short side 256 to 320, crops of 224",
        "momentum": "0.9, Nesterov",
    },
}


@pytest.mark.parametrize("name", CHECKED)
def test_recipes_that_were_read_in_the_source(name):
    found = recipes.fields(recipes.load(ROOT / "configs" / f"{name}.py"))
    assert {key: found[key] for key in CHECKED[name]} == CHECKED[name]


def test_all_norms_of_the_kinetics_study_train_alike():
    alike = {"decay of norms", "biases", "PreciseBN", "scales", "momentum", "gradient clipping", "length", "dropout"}
    study = [m for m in MODELS if m["Name"].startswith("i3d_")]
    found = {tuple(recipes.fields(recipes.load(ROOT / m["Config"]))[key] for key in sorted(alike)) for m in study}
    assert len(study) == 32
    assert len(found) == 1, found


def experiment(path):
    """What a config trains and tests, without what only bears a name."""
    cfg = recipes.load(path).to_dict()
    names = ("model", "train_dataloader", "test_dataloader", "optim_wrapper", "param_scheduler", "train_cfg")
    return str(plain({name: cfg[name] for name in (*names, "custom_hooks") if name in cfg}))


def plain(value):
    """In one order, and without the scope that mmengine writes into what is inherited from a package."""
    if isinstance(value, dict):
        return {key: plain(value[key]) for key in sorted(value) if key != "_scope_"}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def test_no_experiment_has_two_names():
    seen = {}
    for path in sorted((ROOT / "configs").rglob("*.py")):
        if "_base_" not in path.parts:
            other = seen.setdefault(experiment(path), path.stem)
            assert other == path.stem, f"{path.stem} is the same experiment as {other}"


# --- numbers

NUMBERS = [entry for model in MODELS for entry in model["Published"]]
PUBLISHED = yaml.safe_load((ROOT / "configs/published.yml").read_text())


def test_every_number_has_a_source_and_a_status():
    for entry in (*NUMBERS, *PUBLISHED["Controls"].values(), *PUBLISHED["Others"]):
        assert entry["Source"], entry
        assert entry["Metrics"], entry
        assert entry["Status"] in ("checked", "second-hand", "unverified"), entry
        assert ("Seen" in entry) == (entry["Status"] == "second-hand"), entry
        assert entry.get("Recipe", "mmdet/mask-1x") in recipes.sources(), entry
        assert entry.get("Control", "mmdet-mask-r50-1x") in PUBLISHED["Controls"], entry
    for name, source in recipes.sources().items():
        assert source["Status"] in ("checked", "unverified"), name
        assert ("Config" in source) != ("Fields" in source), name


def test_a_control_is_of_the_same_source():
    """Or of the one that the source itself compares with."""
    borrowed = {"switchnorm": "detectron", "rethinking": "detectron", "jhu": "benchmark", "report": "mmdet1"}
    for model in MODELS:
        for entry in model["Published"]:
            if "Control" in entry:
                origin = entry.get("Recipe", model["Recipe"]).split("/")[0]
                control = entry["Control"]
                assert control.startswith(borrowed.get(origin, origin)), (model["Name"], origin, control)


def test_numbers_of_sources_nobody_could_read_are_not_called_checked():
    unread = ("EvoNorm paper", "CBN paper", "FRN paper", "MegDet")
    for entry in (*NUMBERS, *PUBLISHED["Controls"].values(), *PUBLISHED["Others"]):
        if entry["Source"].startswith(unread):
            assert entry["Status"] != "checked", entry


# --- what the fields do


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gn = nn.Conv2d(4, 4, 1), LAYERS.build(dict(type="GN", num_groups=2, num_channels=4))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("mask_rcnn/mask-rcnn_r50_fpn_gn-all_2x_coco", {"gn.weight": (1, 0), "gn.bias": (1, 0)}),
        ("mask_rcnn/mask-rcnn_r50_fpn_gn-ws-all_4xb2-20-23-24e_coco", {"gn.weight": (1, 1), "gn.bias": (2, 0)}),
        ("faster_rcnn/faster-rcnn_r50_fpn_gn-all_2x_coco", {"gn.weight": (1, 0), "gn.bias": (2, 0)}),
    ],
)
def test_rates_and_decays_of_biases_and_norms(config, expected):
    model, wrapper = Small(), copy.deepcopy(recipes.load(ROOT / "configs" / f"{config}.py").optim_wrapper)
    lr, decay = wrapper.optimizer.lr, wrapper.optimizer.weight_decay
    groups = build_optim_wrapper(model, wrapper).optimizer.param_groups
    found = {n: next(g for g in groups if any(q is p for q in g["params"])) for n, p in model.named_parameters()}
    expected = {"conv.weight": (1, 1), "conv.bias": (2, 0), **expected}
    assert {n: (round(g["lr"] / lr, 6), round(g["weight_decay"] / decay, 6)) for n, g in found.items()} == expected


def test_precise_bn_of_a_model_without_batch_statistics_changes_nothing():
    from normplug.openmmlab.precise_bn import estimate_statistics

    model = Small()
    assert estimate_statistics(model, [torch.randn(2, 4, 3, 3)], lambda m, x: m.gn(m.conv(x))) == 0
