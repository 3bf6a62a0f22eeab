"""Configs of the toolkits as installed."""

import importlib
from pathlib import Path

from mmengine.config import Config


def stock(toolkit, path):
    """A model's config of a toolkit, as installed, without its pre-trained weights."""
    package = Path(importlib.import_module(toolkit).__file__).parent
    cfg = Config.fromfile(package / ".mim" / "configs" / f"{path}.py")
    without_weights(cfg.model)
    return cfg


def without_weights(cfg):
    """Drop every path to pre-trained weights: nothing is downloaded."""
    if isinstance(cfg, dict):
        for key in list(cfg):
            if key in ("pretrained", "teacher_ckpt") or (key == "init_cfg" and "Pretrained" in str(cfg[key])):
                cfg[key] = False if cfg[key] is True else None
            else:
                without_weights(cfg[key])
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            without_weights(value)
