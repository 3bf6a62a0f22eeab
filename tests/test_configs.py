"""Every config in configs/: it loads, builds, and learns from one small batch; and the claims that its name makes."""

import copy
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mmengine.registry import HOOKS, MODELS, DefaultScope
from stock_configs import without_weights
from torch import nn

import normplug  # noqa: F401

pytest.importorskip("mmdet.models")
pytest.importorskip("mmaction.models")

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
sys.path.insert(0, str(CONFIGS.parent / "tools"))
import recipes  # noqa: E402

EXPERIMENTS = sorted(f for f in CONFIGS.rglob("*.py") if "_base_" not in f.parts)
pytestmark = [
    pytest.mark.slow,  # reading all configs takes a minute
    pytest.mark.filterwarnings("ignore:FRN got an input of shape"),  # the test's images are that small
    pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8"),  # mmdet's C4 mask head
]
each_config = pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda f: str(f.relative_to(CONFIGS).with_suffix("")))


@pytest.fixture(autouse=True)
def one_thread():
    """These models are many small operations: on a busy machine two threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_load = recipes.load


def load(file):
    return copy.deepcopy(_load(file))


def build(cfg):
    model = cfg.model.copy()
    without_weights(model)
    (model.get("data_preprocessor") or {}).pop("batch_augments", None)  # they pad to 1024x1024
    if "rcnn" in (model.get("train_cfg") or {}):  # 1024 RoIs take minutes on a CPU
        model.train_cfg.rcnn.sampler.num = 16
        model.train_cfg.rpn_proposal.max_per_img = 64
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(model)


def batch(cfg):
    """Two samples: images of two objects each, or clips of two classes."""
    if cfg.default_scope == "mmaction":
        from mmaction.structures import ActionDataSample

        inputs = [torch.randint(0, 256, (1, 3, 8, 32, 32), dtype=torch.uint8) for _ in range(2)]
        samples = [ActionDataSample(metainfo=dict(img_shape=(32, 32))).set_gt_label(label) for label in range(2)]
        return dict(inputs=inputs, data_samples=samples)
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    samples = []
    for _ in range(2):
        masks = np.zeros((2, 64, 64), dtype=np.uint8)
        masks[0, 4:36, 4:40] = 1
        masks[1, 20:60, 30:62] = 1
        truth = InstanceData(
            bboxes=torch.tensor([[4.0, 4, 40, 36], [30, 20, 62, 60]]),
            labels=torch.tensor([0, 1]),
            masks=BitmapMasks(masks, 64, 64),
        )
        shapes = dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64), scale_factor=(1.0, 1.0))
        samples.append(DetDataSample(metainfo=shapes, gt_instances=truth))
    return dict(inputs=[torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)], data_samples=samples)


def shrunk(cfg):
    """The model with one block per stage, but for the first: what every block does, in a tenth of the time."""
    from mmdet.models.backbones import ResNet, ResNeXt

    patch = pytest.MonkeyPatch()
    for backbone in (ResNet, ResNeXt):
        settings = {depth: (block, (2, 1, 1, 1)) for depth, (block, _) in backbone.arch_settings.items()}
        patch.setattr(backbone, "arch_settings", settings)
    try:
        return build(cfg)
    finally:
        patch.undo()


def structure(file):
    """What is left of the model when the experiment around it is taken away: equal texts are equal models."""
    model = plain(load(file).model.to_dict())
    without_weights(model)
    backbone = model["backbone"]
    if backbone.get("depth") == 101:
        backbone["depth"] = 50  # the same blocks, and shrunk the same number
    model.get("data_preprocessor", {}).clear()
    return re.sub(r"'burnin': \d+", "", str(sorted_deep(model)))


def sorted_deep(value):
    if isinstance(value, dict):
        return {key: sorted_deep(value[key]) for key in sorted(value)}
    return [sorted_deep(v) for v in value] if isinstance(value, list) else value


@each_config
def test_config_builds(file):
    """The whole model, without memory for its weights."""
    with torch.device("meta"):
        model = build(load(file))
    norms = [cfg for cfg in norm_cfgs(plain(load(file).model.to_dict()))]
    names = {cls.__name__ for m in model.modules() for cls in type(m).__mro__}
    assert {MODELS.get(n["type"]).__name__ for n in norms if n["type"] not in ("BN", "BN3d")} <= names


@pytest.fixture(scope="module")
def learnt():
    return {}


@each_config
def test_config_learns(file, learnt):
    """Forward and backward, once for all configs of the same model."""
    key = structure(file)
    if key in learnt:
        assert learnt[key] is None, f"the same model as {learnt[key]}, which fails"
        return
    learnt[key] = file.stem
    cfg = load(file)
    model = shrunk(cfg).train()
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        losses = model(**model.data_preprocessor(batch(cfg), training=True), mode="loss")
        loss, _ = model.parse_losses(losses)
    loss.backward()
    assert loss.isfinite()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
    learnt[key] = None


def norm_cfgs(cfg):
    if isinstance(cfg, dict):
        for key, value in cfg.items():
            if key in ("norm_cfg", "conv_cfg") and value and value["type"] not in ("Conv2d", "Conv3d"):
                yield value
            else:
                yield from norm_cfgs(value)


@each_config
def test_config_says_what_it_is(file):
    text = file.read_text()
    assert text.startswith("#"), "a config begins with what it is"
    cfg = load(file)
    assert "normplug" in cfg.custom_imports["imports"]
    if "digits" not in file.parts:
        assert "# Published: " in text, (
            "a config of COCO or Kinetics names the number it aims at, or says there is none"
        )
        assert "# Cost: " in text
        size = re.search(r"_(\d)xb(\d)-", file.stem)
        gpus, images = map(int, size.groups()) if size else (8, 2)
        assert cfg.train_dataloader.batch_size == images
        assert cfg.auto_scale_lr.base_batch_size == gpus * images
        assert f"{gpus} GPUs x {images}" in text or "as the 2x file" in text


def differences(ours, theirs, path=""):
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(set(ours) | set(theirs)):
            yield from differences(ours.get(key), theirs.get(key), f"{path}.{key}".strip("."))
    elif ours != theirs:
        yield path


SAME = {
    "mask_rcnn/mask-rcnn_r50_fpn_frozen-bn_1x_coco": ("mmdet", "mask_rcnn/mask-rcnn_r50_fpn_1x_coco"),
    "mask_rcnn/mask-rcnn_r50_fpn_frozen-bn_2x_coco": ("mmdet", "mask_rcnn/mask-rcnn_r50_fpn_2x_coco"),
    "mask_rcnn/mask-rcnn_r50_fpn_gn-ws-all_2x_coco": ("mmdet", "gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco"),
    "mask_rcnn/mask-rcnn_r50_fpn_gn-ws-all_20-23-24e_coco": (
        "mmdet",
        "gn+ws/mask-rcnn_r50_fpn_gn-ws-all_20-23-24e_coco",
    ),
    "i3d/i3d_r50_bn_8xb8-32x2x1-100e_kinetics400-rgb": (
        "mmaction",
        "recognition/i3d/i3d_imagenet-pretrained-r50_8xb8-32x2x1-100e_kinetics400-rgb",
    ),
}
# I3D trains as in video-nonlocal-net; the model, the data and what is tested are mmaction2's.
ALLOWED = {
    "i3d/i3d_r50_bn_8xb8-32x2x1-100e_kinetics400-rgb": {
        "optim_wrapper.paramwise_cfg",
        "optim_wrapper.constructor",
        "optim_wrapper.clip_grad",
        "optim_wrapper.optimizer.nesterov",
        "train_dataloader.dataset.pipeline",
        "custom_hooks",
        "clips32_train",
        "clips32_val",
        "clips32_test",
    }
}


def plain(cfg):
    """Drop the scope that mmengine writes into everything inherited from a package."""
    if isinstance(cfg, dict):
        return {key: plain(value) for key, value in cfg.items() if key != "_scope_"}
    return [plain(value) for value in cfg] if isinstance(cfg, (list, tuple)) else cfg


@pytest.mark.parametrize("name", SAME)
def test_config_is_the_toolkits_own_but_for_what_it_says(name):
    import importlib

    toolkit, path = SAME[name]
    stock = Path(importlib.import_module(toolkit).__file__).parent / ".mim" / "configs" / f"{path}.py"
    ours, theirs = (plain(load(file).to_dict()) for file in (CONFIGS / f"{name}.py", stock))
    assert set(differences(ours, theirs)) == {"custom_imports"} | ALLOWED.get(name, set())


WITH_NORMS = ("model.backbone.", "model.neck.", "model.roi_head.bbox_head.", "model.roi_head.mask_head.")
# What separates an experiment from its control, and nothing else.
CONTROLS = {
    "small_batch/mask-rcnn_r50_fpn_syncbn-all_8xb2-1x_coco": (
        "small_batch/mask-rcnn_r50_fpn_frozen-bn-4conv1fc_8xb2-1x_coco",
        {
            "norm_cfg",
            "model.backbone.norm_cfg.type",
            "model.backbone.norm_eval",
            "model.neck.norm_cfg",
            "model.roi_head.bbox_head.norm_cfg",
            "model.roi_head.mask_head.norm_cfg",
        },
    ),
    **{
        f"mask_rcnn/mask-rcnn_r50-scratch_fpn_{norm}-silu_8xb8-lsj-72e_coco": (
            f"mask_rcnn/mask-rcnn_r50-scratch_fpn_{norm}-relu_8xb8-lsj-72e_coco",
            {f"{part}norm_cfg.{key}" for part in ("", *WITH_NORMS) for key in keys},
        )
        for norm, keys in (("gn", ["act"]), ("bn", ["type", "act"]))
    },
    "small_batch/mask-rcnn_r50_fpn_evonorm-s0-head_8xb2-1x_coco": (
        "small_batch/mask-rcnn_r50_fpn_frozen-bn-4conv1fc_8xb2-1x_coco",
        {"norm_cfg", "model.neck.norm_cfg", "model.roi_head.bbox_head.norm_cfg", "model.roi_head.mask_head.norm_cfg"},
    ),
    "mask_rcnn/mask-rcnn_r50_fpn_cbn-head_4xb4-1x_coco": (
        "mask_rcnn/mask-rcnn_r50_fpn_none-4conv1fc_4xb4-1x_coco",
        {"norm_cfg", "model.neck.norm_cfg", "model.roi_head.bbox_head.norm_cfg", "model.roi_head.mask_head.norm_cfg"},
    ),
    "mask_rcnn/mask-rcnn_r50_fpn_gn-bbox-head_2x_coco": (
        "mask_rcnn/mask-rcnn_r50_fpn_frozen-bn-4conv1fc_2x_coco",
        {"model.roi_head.bbox_head.norm_cfg"},
    ),
    "i3d/i3d_r50_syncbn_8xb8-32x2x1-100e_kinetics400-rgb": (
        "i3d/i3d_r50_bn_8xb8-32x2x1-100e_kinetics400-rgb",
        {"model.backbone.norm_cfg"},
    ),
    "i3d/i3d_r50_gn_8xb8-32x2x1-100e_kinetics400-rgb": (
        "i3d/i3d_r50_bn_8xb8-32x2x1-100e_kinetics400-rgb",
        {"model.backbone.norm_cfg", "model.backbone.pretrained"},
    ),
    "i3d/i3d_r50_gn-ws_8xb8-32x2x1-100e_kinetics400-rgb": (
        "i3d/i3d_r50_gn_8xb8-32x2x1-100e_kinetics400-rgb",
        {"model.backbone.conv_cfg.type", "model.backbone.pretrained"},
    ),
    "i3d/i3d_r50_evonorm-s0_8xb8-32x2x1-100e_kinetics400-rgb": (
        "i3d/i3d_r50_gn_8xb8-32x2x1-100e_kinetics400-rgb",
        {"model.backbone.norm_cfg.type", "model.backbone.norm_cfg.num_groups", "param_scheduler"},
    ),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_config_differs_from_its_control_in_the_experiment_alone(name):
    control, expected = CONTROLS[name]
    ours, theirs = (plain(load(CONFIGS / f"{n}.py").to_dict()) for n in (name, control))
    assert set(differences(ours, theirs)) == expected


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_silu_is_behind_every_norm_and_every_sum_of_its_configs(norm):
    relu, silu = (
        build(load(CONFIGS / f"mask_rcnn/mask-rcnn_r50-scratch_fpn_{norm}-{act}_8xb8-lsj-72e_coco.py"))
        for act in ("relu", "silu")
    )
    assert list(silu.state_dict()) == list(relu.state_dict())

    places = [name for name, m in relu.named_modules() if type(m) is nn.ReLU]
    now = {name: type(silu.get_submodule(name)).__name__ for name in places}
    left = {name for name, kind in now.items() if kind == "ReLU"}
    assert left == {"roi_head.bbox_head.relu", "roi_head.mask_head.relu"}
    assert all(now[f"backbone.layer{i}.0.relu"] == "SiLU" for i in (1, 2, 3, 4))
    assert not any(isinstance(m, nn.SiLU) for m in silu.neck.modules())
    assert sum(isinstance(m, nn.SiLU) for m in silu.modules()) == len(places) - 2


FRN = [file for file in EXPERIMENTS if "_frn" in file.stem and file.parent.name != "digits"]


@pytest.mark.parametrize("file", FRN, ids=lambda f: f.stem)
def test_frn_warms_up_for_an_epoch(file):
    """It needs that at any batch size; the toolkits' 500 iterations are a fifteenth of one at 16 images."""
    cfg = load(file)
    warm_up = cfg.param_scheduler[0]
    assert warm_up.type == "LinearLR"
    if warm_up.by_epoch:
        assert warm_up.end >= 1
        assert warm_up.convert_to_iter_based  # or it would be one step
    else:
        assert warm_up.end >= 117266 / cfg.auto_scale_lr.base_batch_size  # images of train2017 with objects


def test_precise_bn_is_in_the_recipe_that_has_it():
    cfg = load(CONFIGS / "mask_rcnn" / "mask-rcnn_r50-caffe_fpn_syncbn-all_ms-3x_coco.py")
    (hook,) = (HOOKS.build(hook) for hook in cfg.custom_hooks)
    assert (type(hook).__name__, hook.num_batches) == ("PreciseBNHook", 200)


def test_burn_in_of_cbn_is_eight_epochs():
    """117,266 images of train2017 have objects; each layer is called once in an iteration of 4 x 4 images."""
    cfg = load(CONFIGS / "mask_rcnn/mask-rcnn_r50_fpn_cbn-head_4xb4-1x_coco.py")
    per_gpu = -(-117266 // 4)
    assert cfg.model.neck.norm_cfg.burnin == 8 * -(-per_gpu // cfg.train_dataloader.batch_size)


CBN_DIGITS = sorted((CONFIGS / "digits").glob("*_cbn_*.py"))


@pytest.mark.parametrize("file", CBN_DIGITS, ids=lambda f: f.stem)
def test_cbn_remembers_in_every_place_of_a_stock_model(file):
    """Behind the burn-in each CBN finds its convolution: in the backbone, the FPN and the heads."""
    cfg = load(file)
    for norm in norm_cfgs(cfg.model):
        if norm["type"] == "CBN":
            norm["burnin"] = 0
    model = build(cfg).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            loss, _ = model.parse_losses(model(**model.data_preprocessor(batch(cfg), training=True), mode="loss"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layers = [name for name, m in model.named_modules() if isinstance(m, MODELS.get("CBN"))]
    remembered = {key.partition(".history.")[0] for key in model.state_dict() if ".history." in key}
    assert layers
    assert remembered == set(layers)


def test_batch_norms_of_the_frozen_configs_stay_in_eval_mode():
    model = build(load(CONFIGS / "mask_rcnn/mask-rcnn_r50_fpn_frozen-bn_1x_coco.py")).train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 53
    assert not any(m.training for m in norms)
    assert not any(p.requires_grad for p in model.backbone.layer1.parameters())
    assert all(p.requires_grad for p in model.backbone.layer2.parameters())


METAFILES = {p.parent.name: yaml.safe_load(p.read_text()) for p in sorted(CONFIGS.glob("*/metafile.yml"))}


def test_every_config_has_one_entry_in_a_metafile():
    entries = [model["Config"] for meta in METAFILES.values() for model in meta["Models"]]
    assert sorted(entries) == sorted(str(f.relative_to(CONFIGS.parent)) for f in EXPERIMENTS)
    index = yaml.safe_load((CONFIGS.parent / "model-index.yml").read_text())
    assert index["Import"] == [f"configs/{folder}/metafile.yml" for folder in METAFILES]


@pytest.mark.parametrize("folder", METAFILES)
def test_metafile_says_what_its_configs_say(folder):
    collections = {c["Name"] for c in METAFILES[folder]["Collections"]}
    for model in METAFILES[folder]["Models"]:
        file = CONFIGS.parent / model["Config"]
        assert model["Name"] == file.stem
        assert model["In Collection"] in collections
        text = " ".join(line.removeprefix("# ") for line in file.read_text().splitlines())
        for published in model["Published"]:
            for value in published["Metrics"].values():
                assert re.search(rf"\b{value}0?\b", text), f"{file.stem}: {value} is not in the header"
        if "Batch Size" in model["Metadata"]:
            cfg = load(file)
            assert cfg.train_dataloader.batch_size == model["Metadata"]["Batch Size"]
            length = "Iterations" if "max_iters" in cfg.train_cfg else "Epochs"
            assert cfg.train_cfg.get("max_iters", cfg.train_cfg.get("max_epochs")) == model["Metadata"][length]


def test_page_of_weights_is_fresh(monkeypatch):
    monkeypatch.syspath_prepend(CONFIGS.parent / "tools")
    import weights_table

    assert not weights_table.is_stale(weights_table.page((file, load(file)) for file in EXPERIMENTS))


def test_names_say_where_the_norms_are():
    for file in EXPERIMENTS:
        if "_base_" in file.parts or "digits" in file.parts or not file.stem.startswith(("mask", "faster")):
            continue
        cfg = load(file)
        model, name = cfg.model, file.stem
        everywhere = "-all" in name or "lsj-72e" in name
        if "scratch" in name:
            assert model.backbone.frozen_stages == -1
            assert model.backbone.init_cfg is None
        if "-c4_" in name:
            assert model.roi_head.shared_head.norm_cfg == model.backbone.norm_cfg
        elif "-head" in name and "bbox-head" not in name:
            assert model.backbone.norm_cfg.type == "BN"
            assert model.backbone.norm_eval
            assert model.neck.norm_cfg.type == model.roi_head.bbox_head.norm_cfg.type
        elif everywhere:
            assert model.backbone.norm_cfg.type == model.neck.norm_cfg.type
            if model.backbone.norm_cfg.type in ("BN", "SyncBN", "CBN"):
                assert not model.backbone.norm_eval
