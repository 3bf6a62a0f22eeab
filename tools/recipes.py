"""What a recipe is: the fields that decide a number, read out of a config, and those of the source that it follows.

configs/sources.yml has the fields of every source; ``differences`` compares.
"""

import importlib
import warnings
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import mmengine.config.utils
import yaml
from mmengine.config import Config

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "configs" / "sources.yml"


# For each file inherited from a toolkit mmengine reads all metafiles of it, to find where the file is: four fifths of
# the time that a config takes.
_read_once = cache(mmengine.config.utils.load)


@cache
def load(path: Path) -> Config:
    """Return a config, not to be changed."""
    with warnings.catch_warnings(), mock.patch.object(mmengine.config.utils, "load", _read_once):
        warnings.simplefilter("ignore")  # mmengine imports pkg_resources
        return Config.fromfile(path)


@cache
def sources() -> dict[str, dict]:
    """Return every recipe of configs/sources.yml by its name."""
    return yaml.safe_load(SOURCES.read_text())["Recipes"]


@cache
def fields_of_source(name: str) -> dict[str, str]:
    """Return the fields of a source: as listed, or those of the toolkit's own config where one is named.

    Raises:
        KeyError: If configs/sources.yml has no such recipe.
    """
    if name not in sources():
        raise KeyError(f"configs/sources.yml has no recipe {name!r}; it has {', '.join(sources())}.")
    source = sources()[name]
    if "Config" in source:
        stock = fields(load(_stock(source["Config"])))
        return {key: value for key, value in stock.items() if key not in source.get("Varies", ())}
    return {key: str(value) for key, value in source["Fields"].items()}


def differences(cfg: Config, name: str) -> dict[str, tuple[str, str]]:
    """Return what differs: field -> (value here, value of the source). Fields that the source leaves open are none.

    Raises:
        KeyError: If the source has a field that configs do not have.
    """
    ours, theirs = fields(cfg), fields_of_source(name)
    if unknown := set(theirs) - set(ours):
        raise KeyError(f"recipe {name!r} has fields that no config has: {sorted(unknown)}; there are {sorted(ours)}.")
    return {key: (ours[key], value) for key, value in theirs.items() if ours[key] != value}


def fields(cfg: Config) -> dict[str, str]:
    """Return the fields of a config for COCO or Kinetics, each as the text that stands in headers."""
    return {**_optimization(cfg), **(_video(cfg) if cfg.default_scope == "mmaction" else _detection(cfg))}


def _stock(path: str) -> Path:
    toolkit, _, name = path.partition("::")
    return Path(importlib.import_module(toolkit).__file__).parent / ".mim" / "configs" / name


def _optimization(cfg: Config) -> dict[str, str]:
    wrapper, optimizer = cfg.optim_wrapper, cfg.optim_wrapper.optimizer
    rules = wrapper.get("paramwise_cfg") or {}
    decay = optimizer.weight_decay
    biases = dict(lr=rules.get("bias_lr_mult", 1), decay=rules.get("bias_decay_mult", 1), norms="")
    if bias := rules.get("custom_keys", {}).get(".bias"):
        biases = dict(lr=bias["lr_mult"], decay=bias["decay_mult"], norms=", those of norms too")
    clip = (wrapper.get("clip_grad") or {}).get("max_norm")
    warm_up, steps = None, cfg.param_scheduler[-1]
    if len(cfg.param_scheduler) > 1:
        warm_up = cfg.param_scheduler[0]
    by_epoch = steps.by_epoch
    repeated = cfg.train_dataloader.dataset.get("times", 1) if by_epoch else 1  # RepeatDataset's epochs are longer
    length = cfg.train_cfg.max_epochs * repeated if by_epoch else cfg.train_cfg.max_iters
    unit = "epochs" if by_epoch else "iterations"
    batch = cfg.train_dataloader.batch_size
    return {
        "GPUs x samples": f"{cfg.auto_scale_lr.base_batch_size // batch} x {batch}",
        "lr": f"{optimizer.lr:g}",
        "length": f"{length} {unit}",
        "lr / 10 after": ", ".join(str(step * repeated) for step in steps.milestones),
        "warm-up": _warm_up(warm_up),
        "momentum": f"{optimizer.momentum:g}" + (", Nesterov" if optimizer.get("nesterov") else ""),
        "weight decay": f"{decay:g}",
        "decay of norms": f"{decay * rules.get('norm_decay_mult', 1):g}",
        "biases": "as weights"
        if biases["lr"] == biases["decay"] == 1
        else f"lr x {biases['lr']:g}, decay x {biases['decay']:g}{biases['norms']}",
        "gradient clipping": f"norm {clip:g}" if clip else "none",
        "mixed precision": "yes" if wrapper.get("type") == "AmpOptimWrapper" else "no",
        "PreciseBN": next(
            (f"{hook.num_batches} batches" for hook in cfg.get("custom_hooks", []) if hook.type == "PreciseBNHook"),
            "none",
        ),
    }


def _warm_up(scheduler) -> str:
    if scheduler is None:
        return "none"
    unit = "iterations" if not scheduler.by_epoch else "epoch" if scheduler.end == 1 else "epochs"
    return f"{scheduler.end} {unit} from {scheduler.start_factor:.3g}"


def _norm(norm_cfg, conv_cfg=None, frozen_statistics: bool = False) -> str:
    if not norm_cfg:
        return "none"
    name = norm_cfg["type"].removesuffix("3d")
    if frozen_statistics and name == "BN":
        name = "BN* (weight and bias trained)" if norm_cfg.get("requires_grad", True) else "BN*"
    if norm_cfg.get("act"):
        name += f" and {norm_cfg['act']}"
    return name + ("+WS" if conv_cfg and "WS" in conv_cfg["type"] else "")


def _input(preprocessor) -> str:
    order = "RGB" if preprocessor.get("bgr_to_rgb", "Action" in preprocessor.type) else "BGR"
    mean, std = (" ".join(f"{v:g}" for v in preprocessor[key]) for key in ("mean", "std"))
    return f"{order}, mean {mean}, std {'1' if std == '1 1 1' else std}"


def _weights(backbone) -> str:
    init = backbone.get("init_cfg") or {}
    return backbone.get("pretrained") or init.get("checkpoint") or "none"


def _detection(cfg: Config) -> dict[str, str]:
    model, backbone = cfg.model, cfg.model.backbone
    found = {
        "input": _input(model.data_preprocessor),
        "scales": _scales(cfg),
        "weights": _weights(backbone),
        "frozen stages": "none" if backbone.frozen_stages < 0 else f"stem to {backbone.frozen_stages}",
        "stride in": "1x1" if backbone.get("style") == "caffe" else "3x3",
    }
    norms = {"backbone": _norm(backbone.norm_cfg, backbone.get("conv_cfg"), backbone.get("norm_eval", False))}
    if "neck" in model:
        norms["FPN"] = _norm(model.neck.get("norm_cfg"), model.neck.get("conv_cfg"))
    if "roi_head" not in model:
        norms["head"] = _norm(model.bbox_head.get("norm_cfg"), model.bbox_head.get("conv_cfg"))
        return {**found, "norms": _listed(norms)}
    heads = model.roi_head
    if shared := heads.get("shared_head"):
        norms["conv5"] = _norm(shared.norm_cfg, None, shared.get("norm_eval", False))
    else:
        norms["box head"] = _norm(heads.bbox_head.get("norm_cfg"), heads.bbox_head.get("conv_cfg"))
        if "mask_head" in heads:
            norms["mask head"] = _norm(heads.mask_head.get("norm_cfg"), heads.mask_head.get("conv_cfg"))
    train, test = model.train_cfg, model.test_cfg
    extractor = heads.bbox_roi_extractor.roi_layer
    modern = extractor.get("aligned", True) and model.rpn_head.anchor_generator.type == "AnchorGenerator"
    return {
        **found,
        "norms": _listed(norms),
        "box head": {"Shared4Conv1FCBBoxHead": "4conv1fc", "Shared2FCBBoxHead": "2fc"}.get(
            heads.bbox_head.type, "conv5" if shared else heads.bbox_head.type
        ),
        "RPN convolutions": str(model.rpn_head.get("num_convs", 1)),
        "proposals": f"{train.rpn_proposal.nms_pre} a level, then {train.rpn_proposal.max_per_img} an image",
        "proposals in tests": f"{test.rpn.nms_pre} a level, then {test.rpn.max_per_img} an image",
        "RoIs": str(train.rcnn.sampler.num),
        "sampling ratio": str(extractor.sampling_ratio),
        "losses of boxes": f"RPN {_loss(model.rpn_head.loss_bbox)}, head {_loss(heads.bbox_head.loss_bbox)}",
        "anchors over the border": "left out" if train.rpn.allowed_border == 0 else "used",
        "coordinates": "continuous" if modern else "of whole pixels",
    }


def _listed(norms: dict[str, str]) -> str:
    """Group the places by norm: 'BN* in backbone, GN in FPN + box head'."""
    places: dict[str, list[str]] = {}
    for place, norm in norms.items():
        places.setdefault(norm, []).append(place)
    return ", ".join(f"{norm} in {' + '.join(where)}" for norm, where in places.items())


def _loss(loss) -> str:
    return f"smooth L1 ({loss.get('beta', 1):.3g})" if loss.type == "SmoothL1Loss" else "L1"


def _scales(cfg: Config) -> str:
    dataset = cfg.train_dataloader.dataset
    pipeline = dataset.get("dataset", dataset).pipeline
    resize = next(step for step in pipeline if "Resize" in step.type)
    if resize.type == "RandomResize":
        low, high = resize.ratio_range
        return f"{low:g} to {high:g} times {resize.scale[0]}"
    if resize.type == "RandomChoiceResize":
        sides = sorted(min(scale) for scale in resize.scales)
        return f"short side one of {', '.join(map(str, sides))}"
    return f"short side {min(resize.scale)}"


def _video(cfg: Config) -> dict[str, str]:
    backbone, pipeline = cfg.model.backbone, cfg.train_dataloader.dataset.pipeline
    steps: dict[str, Any] = {step.type: step for step in pipeline}
    test = {step.type: step for step in cfg.test_dataloader.dataset.pipeline}
    sampled = steps["SampleFrames"]
    if "RandomRescale" in steps:
        low, high = steps["RandomRescale"].scale_range
        scales = f"short side {low} to {high}, crops of {steps['RandomCrop'].size}"
    else:
        crop = steps["MultiScaleCrop"]
        scales = f"short side 256, crops of {' and '.join(f'{s:g}' for s in crop.scales)} of it, at 5 places"
    views = f"{test['SampleFrames'].num_clips} clips x 3 crops of {test['ThreeCrop'].crop_size}"
    return {
        "input": _input(cfg.model.data_preprocessor),
        "clip": f"{sampled.clip_len} frames, stride {sampled.frame_interval}",
        "scales": scales,
        "weights": _weights(backbone),
        "norms": _norm(backbone.get("norm_cfg", dict(type="BN3d")), backbone.get("conv_cfg"), backbone.norm_eval)
        + " in backbone",
        "dropout": f"{cfg.model.cls_head.dropout_ratio:g}",
        "test views": views,
    }


# --- numbers of others


def numbers(metrics: dict, between: str = "/") -> str:
    """Return '40.3/35.7' of {'box AP': 40.3, 'mask AP': 35.7}."""
    return between.join(str(value) for value in metrics.values())


def status(entry: dict) -> str:
    """Return 'checked', 'unverified' or 'second-hand, seen in ...'."""
    return entry["Status"] + (f", seen in {entry['Seen']}" if "Seen" in entry else "")


def batch_elsewhere(cfg: Config, recipe: str) -> str:
    """Return '; at 4 x 1 samples' where a number was trained with another batch than the config has."""
    different = differences(cfg, recipe).get("GPUs x samples")
    return f"; at {different[1]} samples" if different else ""
