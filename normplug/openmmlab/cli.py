"""What tools/train.py and tools/test.py share: one set of flags and one way to a Runner for all toolkits."""

import argparse
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import MODELS, RUNNERS
from mmengine.runner import Runner

from normplug.openmmlab.checkpoints import CheckpointNormHook
from normplug.openmmlab.config_files import read_config
from normplug.openmmlab.data_check import check_data
from normplug.openmmlab.file_kinds import check_kind
from normplug.openmmlab.mistakes import add_debug
from normplug.openmmlab.own_data import use_data
from normplug.openmmlab.pretrained import fetch_weights
from normplug.openmmlab.random_state import RandomStateHook
from normplug.openmmlab.replacement import replace_norm
from normplug.openmmlab.settings import check_forms, check_launcher, check_settings, check_work_dir, unknown_settings

__all__ = [
    "add_cfg_options",
    "build_runner",
    "check_run",
    "config_parser",
    "load_config",
    "override",
    "parse_norm",
    "require_checkpoint",
    "tell_unknown",
]

# What our tools add to every config: checkpoints of another norm are refused, resumed runs go on exactly.
HOOKS_OF_OURS = (CheckpointNormHook.__name__, RandomStateHook.__name__)


def config_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that training and testing have in common."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("config", type=Path, help="config file")
    p.add_argument("--work-dir", help="where logs and checkpoints go; default: work_dirs/<name of the config>")
    add_cfg_options(p)
    p.add_argument(
        "--data", type=Path, metavar="ROOT", help="train and test on the data in this folder: docs/your-data.md"
    )
    p.add_argument(
        "--norm",
        nargs="+",
        metavar=("TYPE", "KEY=VALUE"),
        help="replace every norm of the model, or those in where=..., such as: GN num_groups=auto where=backbone",
    )
    add_debug(p)
    p.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    p.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return p


class _Settings(DictAction):
    """mmengine's KEY=VALUE pairs; what is none is a mistake on the command line and not a traceback."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for value in values:
            if "=" not in value.lstrip("="):
                parser.error(f'{option_string} takes KEY=VALUE, got {value!r}; quote values with spaces: key="[1, 2]"')
            try:
                super().__call__(parser, namespace, [value], option_string)
            except AssertionError as error:  # brackets
                parser.error(f'{option_string} {value}: {error}; quote values with spaces: key="[1, 2]"')


def add_cfg_options(p: argparse.ArgumentParser, whose: str = "the config") -> None:
    """Add the flag that overrides settings of a config."""
    p.add_argument(
        "--cfg-options",
        nargs="+",
        action=_Settings,
        default={},
        metavar="KEY=VALUE",
        help=f'settings that override {whose}, such as optim_wrapper.optimizer.lr=0.01 or key="[a,b]"',
    )


def override(cfg: Config, options: Mapping[str, Any]) -> None:
    """Set what --cfg-options says.

    Raises:
        ValueError: If a key leads through something that the config has otherwise: a list too short, a number.
    """
    for path in options:
        part, names = cfg, path.split(".")
        for i, name in enumerate(names):
            where = ".".join(names[:i])
            if isinstance(part, list | tuple):
                if not name.isdecimal():
                    raise ValueError(f"--cfg-options {path}: {where} is a list, expected a number after it.")
                if int(name) >= len(part):
                    raise ValueError(
                        f"--cfg-options {path}: Index {name} exceeds the length of list {where}, which is {len(part)}."
                    )
                part = part[int(name)]
            elif not hasattr(part, "keys"):
                raise ValueError(f"--cfg-options {path}: {where} is {part!r}, which has no {name!r} in it.")
            elif name not in part:
                break
            else:
                part = part[name]
    cfg.merge_from_dict(dict(options))


def tell_unknown(cfg: Config, options: Mapping[str, Any]) -> None:
    """Say on stderr what of --cfg-options nothing will read; ``cfg`` is the config without them."""
    if is_first():
        for sentence in unknown_settings(cfg, options):
            print(f"normplug: {sentence}", file=sys.stderr)


def require_checkpoint(name: str | Path) -> None:
    """Check that a checkpoint on this machine is there and one by its kind; of an address nothing is known yet.

    Raises:
        FileNotFoundError: If it is not.
        CheckpointError: If the file is of another kind.
    """
    if "://" not in str(name):
        check_kind(name)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config that the arguments name and apply those that every tool has.

    Raises:
        FileNotFoundError: If there is no such file, or one that --data needs.
        ModuleNotFoundError: If the config imports a package that is not installed.
        ValueError: If the file is no config, what --norm says is no norm_cfg, --cfg-options do not fit the config, the
            folder of --data holds no data for it, or --launcher has not started this process.
    """
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    check_launcher(args.launcher)
    cfg = read_config(args.config)
    tell_unknown(cfg, args.cfg_options)
    override(cfg, args.cfg_options)
    check_forms(cfg)
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", args.config.stem))
    if args.data is not None:
        told = use_data(cfg, args.data)
        override(cfg, args.cfg_options)  # whatever they say of the data, they have the last word
        if is_first():
            print(f"normplug: {told}", file=sys.stderr)
    if args.norm:
        norm_cfg = parse_norm(args.norm)
        replace_norm(cfg, norm_cfg, norm_cfg.pop("where", None))
    cfg.launcher = args.launcher
    hooks = cfg.get("custom_hooks") or []
    present = {hook["type"] for hook in hooks}
    cfg.custom_hooks = [*hooks, *(dict(type=kind) for kind in HOOKS_OF_OURS if kind not in present)]
    if find_spec("tensorboard"):
        add_tensorboard(cfg)
    return cfg


def is_first() -> bool:
    """Whether this is the first process of a run, or the only one, as torchrun and Slurm say it."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0


def check_run(cfg: Config, loaders: tuple[str, ...], weights: bool) -> None:
    """Find what a run lacks before it reads data and builds a model.

    Settings in each of its processes, data and weights in one of them.

    Args:
        cfg: The config as it will be run.
        loaders: The data loaders that it will use.
        weights: Whether it starts from pre-trained weights; they are downloaded now where they are not there.

    Raises:
        ValueError: If a setting is missing or cannot be meant, or something is wrong with the data.
        OSError: If data are missing, or the work dir cannot be written to.
        MissingWeightsError: If the weights cannot be had.
    """
    check_settings(cfg, loaders)
    check_work_dir(cfg.work_dir)
    if is_first():
        check_data(cfg, loaders)
        if weights:
            fetch_weights(cfg)


def parse_norm(words: list[str]) -> dict:
    """Return the norm_cfg, and perhaps ``where``, that the words of --norm stand for.

    Raises:
        ValueError: If the first is no norm, or another is not KEY=VALUE.
    """
    kind, *pairs = words
    if "=" in kind or MODELS.get(kind) is None:
        raise ValueError(
            f"--norm begins with the name of a norm, such as GN, but got {kind!r}: python -m normplug list."
        )
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"--norm {kind} takes KEY=VALUE after the name, such as num_groups=32, but got {wrong[0]!r}.")
    values = (pair.split("=", 1) for pair in pairs)
    return {"type": kind, **{key: DictAction._parse_iterable(value) for key, value in values}}


def add_tensorboard(cfg: Config) -> None:
    """Have scalars written for TensorBoard as well, unless the config does so."""
    visualizer = cfg.get("visualizer") or dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
    backends = visualizer.get("vis_backends") or []
    if "TensorboardVisBackend" not in (backend["type"] for backend in backends):
        cfg.visualizer = visualizer | dict(vis_backends=[*backends, dict(type="TensorboardVisBackend")])


def use_amp(cfg: Config) -> None:
    """Switch the config to automatic mixed precision with dynamic loss scaling.

    Raises:
        ValueError: If there is no GPU, or the config has an optimizer wrapper of its own kind.
    """
    if not torch.cuda.is_available():
        raise ValueError("--amp needs a GPU and none is visible. Leave the flag out to train in float32.")
    if not isinstance(cfg.get("optim_wrapper"), dict):
        raise ValueError("--amp changes optim_wrapper, and this config has none: expected optim_wrapper=dict(...).")
    kind = cfg.optim_wrapper.get("type", "OptimWrapper")
    if kind not in ("OptimWrapper", "AmpOptimWrapper"):
        raise ValueError(
            f"--amp replaces optim_wrapper.type='OptimWrapper', but this config has {kind!r}. Set mixed precision "
            f"in the config itself."
        )
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


def check_amp(cfg: Config) -> None:
    """Check that mixed precision, where the config itself asks for it, can be had here.

    Raises:
        ValueError: If it cannot: mmengine's wrapper would end in an assertion once the model is built.
    """
    if (cfg.get("optim_wrapper") or {}).get("type") == "AmpOptimWrapper" and get_device() in ("cpu", "mps"):
        raise ValueError(
            "This config trains in mixed precision (optim_wrapper.type='AmpOptimWrapper'), which needs a GPU, and none "
            "is visible. To train in float32: --cfg-options optim_wrapper.type=OptimWrapper"
        )


def scale_lr(cfg: Config) -> None:
    """Have the learning rate follow the batch size, from the config's ``auto_scale_lr.base_batch_size``.

    Raises:
        ValueError: If the config does not say for which batch size its learning rate is meant.
    """
    if "base_batch_size" not in (cfg.get("auto_scale_lr") or {}):
        raise ValueError(
            "--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config: the batch size, over all "
            "GPUs, that its learning rate is meant for."
        )
    cfg.auto_scale_lr.enable = True


def build_runner(cfg: Config) -> Runner:
    """Return the runner that the config asks for; a strategy asks for FlexibleRunner, since Runner ignores it."""
    if "strategy" in cfg and "runner_type" not in cfg:
        cfg.runner_type = "FlexibleRunner"
    return Runner.from_cfg(cfg) if "runner_type" not in cfg else RUNNERS.build(cfg)
