"""Settings of a run that are mistyped, told before anything is built: the toolkits meet them late, or never."""

import contextlib
import importlib
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import MODELS, Registry, root
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch.utils.data import DataLoader

from normplug.openmmlab.config_files import nearest
from normplug.openmmlab.data_files import some

__all__ = [
    "TAKEN_OUT",
    "TOP_LEVEL",
    "accepted_arguments",
    "check_forms",
    "check_launcher",
    "check_settings",
    "check_work_dir",
    "classes_named",
    "unknown_settings",
]

# What a run is made of, by the loader that it reads.
PARTS = {
    "train_dataloader": ("model", "train_dataloader", "train_cfg", "optim_wrapper"),
    "val_dataloader": ("model",),
    "test_dataloader": ("model", "test_dataloader", "test_cfg", "test_evaluator"),
}
# Keys that mean something at the top level of a config, beside those that a Runner takes.
TOP_LEVEL = {
    *inspect.signature(Runner.__init__).parameters,
    *inspect.signature(FlexibleRunner.__init__).parameters,
    *("runner_type", "model_wrapper_cfg", "sync_bn", "find_unused_parameters", "activation_checkpointing"),
    *(
        "efficient_conv_bn_eval",
        "compile",
        "custom_imports",
        "tta_model",
        "tta_pipeline",
        "init_weights_for_test_or_val",
    ),
    *("norm_cfg", "conv_cfg", "act_cfg"),  # the log says what becomes of these
} - {"self", "cfg"}
# Where mmengine 0.x and mmcv 1.x had it, and where it is now.
FORMER = {
    "device": "CUDA_VISIBLE_DEVICES in the environment",
    "gpus": "CUDA_VISIBLE_DEVICES in the environment",
    "gpu_ids": "CUDA_VISIBLE_DEVICES in the environment",
    "total_epochs": "train_cfg.max_epochs",
    "epochs": "train_cfg.max_epochs",
    "samples_per_gpu": "train_dataloader.batch_size",
    "workers_per_gpu": "train_dataloader.num_workers",
    "lr_config": "param_scheduler",
    "checkpoint_config": "default_hooks.checkpoint",
    "log_config": "default_hooks.logger",
    "evaluation": "train_cfg.val_interval",
    "load_checkpoint": "load_from",
    "resume_from": "load_from together with resume=True",
}


# --- values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value >= 1


def _each(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(check, value))


_COUNT = (_is_count, "a whole number, 1 or more")
_STRICT_COUNT = (lambda v: isinstance(v, int) and _is_count(v), _COUNT[1])  # torch takes no 8.0
_NOT_NEGATIVE = (lambda v: _is_number(v) and v >= 0, "a finite number, 0 or more")
_WHOLE = (lambda v: isinstance(v, int) and _is_whole(v) and v >= 0, "a whole number, 0 or more")
_NUMBER = (_is_number, "a finite number")
_POSITIVE = (lambda v: _is_number(v) and v > 0, "a finite number above 0")
_INTERVAL = (lambda v: _is_count(v) or v == -1, "a whole number, 1 or more, or -1 for never")
_SWITCH = (lambda v: isinstance(v, bool), "True or False")
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

# Path of a setting, and what it has to be. None passes: the default is meant.
VALUES = [
    ("*_dataloader.batch_size", *_STRICT_COUNT),
    ("*_dataloader.num_workers", *_WHOLE),
    ("*_dataloader.prefetch_factor", *_STRICT_COUNT),
    ("*_dataloader.persistent_workers", *_SWITCH),
    ("*_dataloader.drop_last", *_SWITCH),
    ("*_dataloader.sampler.shuffle", *_SWITCH),
    ("train_cfg.max_epochs", *_COUNT),
    ("train_cfg.max_iters", *_COUNT),
    ("train_cfg.val_interval", *_COUNT),
    ("train_cfg.val_begin", *_WHOLE),
    ("optim_wrapper*.optimizer.lr", *_POSITIVE),
    ("optim_wrapper*.optimizer.weight_decay", *_NOT_NEGATIVE),
    ("optim_wrapper*.optimizer.momentum", *_NOT_NEGATIVE),
    ("optim_wrapper*.optimizer.eps", *_NOT_NEGATIVE),
    ("optim_wrapper*.optimizer.betas", _each(lambda v: _is_number(v) and 0 <= v < 1), "numbers from 0 to below 1"),
    ("optim_wrapper*.accumulative_counts", *_STRICT_COUNT),
    ("optim_wrapper*.clip_grad.max_norm", *_POSITIVE),
    ("optim_wrapper*.clip_grad.clip_value", *_POSITIVE),
    ("optim_wrapper*_mult", *_NOT_NEGATIVE),
    ("param_scheduler*.begin", *_NOT_NEGATIVE),
    ("param_scheduler*.end", *_POSITIVE),  # fractions of an epoch are allowed
    ("param_scheduler*.T_max", *_POSITIVE),
    ("param_scheduler*.step_size", *_COUNT),
    ("param_scheduler*.milestones", _each(_is_number), "a list of numbers, such as [8,11]"),
    ("param_scheduler*.gamma", *_POSITIVE),
    ("param_scheduler*.*factor", *_NOT_NEGATIVE),
    ("param_scheduler*.power", *_NUMBER),
    ("param_scheduler*.eta_min*", *_NUMBER),
    ("param_scheduler*.by_epoch", *_SWITCH),
    (
        "randomness.seed",
        lambda v: _WHOLE[0](v) and v < 2**32,
        "a whole number from 0 to 2**32-1",
    ),
    ("auto_scale_lr.base_batch_size", *_COUNT),
    ("default_hooks.checkpoint.interval", *_INTERVAL),
    ("default_hooks.checkpoint.max_keep_ckpts", *_INTERVAL),
    ("default_hooks.logger.interval", *_COUNT),
    ("find_unused_parameters", *_SWITCH),
    ("resume", *_SWITCH),
    ("log_level", lambda v: v in _LEVELS or isinstance(v, int), f"one of {', '.join(_LEVELS)}"),
]


def check_forms(cfg: Config) -> None:
    """Refuse a config with a plain value in the place of a dict or a list of dicts, before anything looks into these.

    Raises:
        ValueError: The message names the setting and its value.
    """
    for part in _DICTS:
        if not isinstance(cfg.get(part) or {}, dict):
            raise ValueError(f"{part}={cfg[part]!r} is of type {type(cfg[part]).__name__}, expected {part}=dict(...).")
    for path, entries in (
        ("custom_hooks", cfg.get("custom_hooks")),
        ("visualizer.vis_backends", (cfg.get("visualizer") or {}).get("vis_backends")),
    ):
        if not isinstance(entries or [], list | tuple):
            raise ValueError(f"{path}={entries!r}: expected a list, such as [dict(type=...)].")
        for i, entry in enumerate(entries or ()):
            if not isinstance(entry, dict) or "type" not in entry:
                raise ValueError(f"{path}.{i}={entry!r}: expected dict(type=...).")


_DICTS = ("model", "train_dataloader", "train_cfg", "optim_wrapper", "test_dataloader", "test_cfg", "val_dataloader")
_DICTS += ("val_cfg", "env_cfg", "default_hooks", "randomness", "log_processor", "visualizer", "auto_scale_lr")


def check_settings(cfg: Config, loaders: Iterable[str]) -> None:
    """Refuse a config that lacks a part of what will be run, or has a value that cannot be meant.

    Args:
        cfg: A config as it will be run.
        loaders: The data loaders that it will use.

    Raises:
        ValueError: The message names the setting, its value, and what is expected.
    """
    file = cfg.filename or "The config"
    for part in dict.fromkeys(part for loader in loaders for part in PARTS[loader]):
        if cfg.get(part) is None:  # an empty test_cfg is the rule in mmpretrain
            like = nearest(part, (key for key in cfg if key not in TOP_LEVEL))
            hint = f" (it has {like[0]})" if like else ""
            raise ValueError(f"{file} has no {part}{hint}: expected {part}=dict(...) in it or in one of its _base_.")
    for split in ("val", "test") if tuple(loaders) != ("train_dataloader",) else ("test",):
        parts = [f"{split}_{part}" for part in ("dataloader", "cfg", "evaluator")]
        if (missing := [part for part in parts if cfg.get(part) is None]) and len(missing) < len(parts):
            there = [part for part in parts if part not in missing]
            raise ValueError(
                f"{file} has {' and '.join(there)} and no {' and no '.join(missing)}: set all three, or all to None."
            )
    if cfg.get("param_scheduler") == {}:
        raise ValueError(
            "param_scheduler is an empty dict: expected a list of dict(type=...), or None for no schedule."
        )
    for loader in loaders:
        for part in ("dataset", "sampler"):
            settings = cfg.get(loader) or {}
            is_default = part == "sampler" and settings.get(part, part) is None  # the order of the data, to torch
            if settings and not is_default and not _is_typed(settings.get(part)):
                raise ValueError(f"{loader}.{part}={settings.get(part)!r}: expected {part}=dict(type=...).")
    wrapper = cfg.get("optim_wrapper") or {}
    if "train_dataloader" in loaders and "constructor" not in wrapper and not _is_typed(wrapper.get("optimizer")):
        raise ValueError(
            f"optim_wrapper.optimizer={wrapper.get('optimizer')!r}: expected optimizer=dict(type='SGD', lr=...)."
        )
    scope = cfg.get("default_scope") or "mmengine"
    if scope not in _SCOPES | MODELS.children.keys() and (like := nearest(scope, _SCOPES)):
        raise ValueError(f"default_scope={scope!r} is no toolkit: did you mean {like[0]!r}?")
    for path, value in _settings(cfg):
        name = path.rpartition(".")[2]
        if name == "_delete_" and path.partition(".")[0] in TOP_LEVEL:  # in the file's own variables it may have served
            raise ValueError(f"{path}={value!r}: there is nothing in a _base_ to delete here; leave it out.")
        for pattern, is_right, expected in VALUES:
            if fnmatchcase(path, pattern) and value is not None and not is_right(value):
                raise ValueError(f"{path}={value!r}: expected {expected}.")
        if name == "num_classes" and "head" in path and value is not None and not _STRICT_COUNT[0](value):
            raise ValueError(f"{path}={value!r}: expected the number of classes, 1 or more.")
    for loader in loaders:
        settings = cfg.get(loader) or {}
        for key in ("persistent_workers", "prefetch_factor"):
            if settings.get(key) and settings.get("num_workers", 0) == 0:
                raise ValueError(
                    f"{loader}.{key}={settings[key]!r} needs num_workers of 1 or more, and it is 0: set "
                    f"{loader}.num_workers=2, or leave {key} out."
                )


def _is_typed(part: Any) -> bool:
    """Whether something can be built from this: a dict with a type, a list of such, or what is built already."""
    return "type" in part if isinstance(part, dict) else part is not None and not isinstance(part, str | int | float)


_SCOPES = {"mmengine", *MODULE2PACKAGE}


def _settings(part: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and value of every setting; a list of plain values is one."""
    if isinstance(part, Mapping | Config):
        items = part.items()
    elif isinstance(part, list | tuple) and any(isinstance(value, Mapping | list | tuple) for value in part):
        items = enumerate(part)
    else:
        yield path, part
        return
    for key, value in items:
        yield from _settings(value, f"{path}.{key}" if path else str(key))


# --- keys


def unknown_settings(cfg: Config, options: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each setting of --cfg-options that nothing will read, with the nearest that is.

    An argument that a class does not take is not among them: building it is an error, which says the same.

    Args:
        cfg: The config as it was read, without them.
        options: What --cfg-options says, value by dotted path.
    """
    told = []
    for path in options:
        leaves = _where_it_leaves(cfg, path)
        if leaves is None:
            continue
        where, name, part = leaves
        known, complete = (TOP_LEVEL, True) if not where else _taken_by(cfg, part)
        if where and (name in known or ("type" in part and complete)):
            continue
        like = nearest(name, (set(part) | known) - {name} if where else set(part) & known)
        if not (like or complete):
            continue  # a dict that may hold anything
        rest = path[len(f"{where}.{name}" if where else name) :]
        paths = list(_paths(cfg))
        hints = [FORMER[name]] if not where and name in FORMER else []
        hints += [known for known in paths if known.endswith(f".{path}")]
        hints += [(f"{where}.{known}" if where else known) + rest for known in like]
        hints += [FORMER[key] for key in nearest(name, FORMER) if not where]
        hints += [known for known in paths if known.endswith(f".{path.split('.')[-1]}")]
        hint = hints[0] if hints else None
        place = f"{where} (of type {part['type']})" if isinstance(part.get("type"), str) else where
        told.append(
            f"--cfg-options {path}: nothing reads {name!r} {f'in {place}' if where else 'at the top level'}; "
            + (f"did you mean {hint}?" if hint else f"known there: {some(sorted(set(part) | known), 8)}.")
        )
    return told


def _where_it_leaves(cfg: Config, path: str) -> tuple[str, str, Mapping] | None:
    """Return where a path leaves what the config has, the first name that is not there, and the dict it is not in."""
    part, where = cfg, ""
    for name in path.split("."):
        if isinstance(part, list | tuple) and name.isdecimal() and int(name) < len(part):
            part = part[int(name)]
        elif not hasattr(part, "keys"):
            return None  # an error, told when it is merged
        elif name not in part or (not where and name not in TOP_LEVEL):  # other names there are the file's variables
            return None if not where and name in TOP_LEVEL else (where, name, part)
        else:
            part = part[name]
        where = f"{where}.{name}" if where else name
    return None


def _paths(cfg: Config) -> Iterator[str]:
    return (path for path, _ in _settings({key: cfg[key] for key in cfg if key in TOP_LEVEL}))


# What is in dicts that are no object's arguments, and what builders take out of those that are.
_ENVIRONMENT = {"cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"}
_RANDOMNESS = set(inspect.signature(Runner.set_randomness).parameters)
_LOADER = set(inspect.signature(DataLoader.__init__).parameters) | {"num_batch_per_epoch"}
TAKEN_OUT = {"type", "_scope_", "_delete_", "init_cfg", "requires_grad", "eps", "replace_norm", "priority"}
TAKEN_OUT |= {"convert_to_iter_based", "constructor", "paramwise_cfg", "data_preprocessor", "optimizer", "clip_grad"}


def _taken_by(cfg: Config, part: Mapping) -> tuple[set[str], bool]:
    """Return what may be set in this dict, and whether that is all."""
    if "type" in part:
        named = [accepted_arguments(kind) for kind in classes_named(part["type"], cfg.get("default_scope"))]
        known = set().union(*(names for names, _ in named))
        return known | TAKEN_OUT, bool(named) and all(complete for _, complete in named)
    for known in (_LOADER, _RANDOMNESS, _ENVIRONMENT):
        if part and set(part) <= known:
            return known - {"self"}, True
    return set(), False


def classes_named(kind: Any, scope: str | None) -> list[type]:
    """Return what the registries have under the type of a config, seen from a toolkit's scope."""
    if not isinstance(kind, str):
        return [kind]
    found = []
    with contextlib.suppress(ImportError):
        importlib.import_module(f"{scope}.registry")  # the toolkit's registries are below mmengine's from then on
    for registry in (registry for registry in vars(root).values() if isinstance(registry, Registry)):
        # As a build does, the toolkit's own first; but nothing is logged of those that a toolkit has not.
        for here in (registry.children.get(scope), registry):
            if here is not None:
                with contextlib.suppress(ImportError):  # mmaction2 1.2.0 gives a place that is not there
                    here.import_from_location()
                if kind in here.module_dict:
                    found.append(here.module_dict[kind])
                    break
    return found


def accepted_arguments(kind: Any) -> tuple[set[str], bool]:
    """Return the names of what a class or function takes, and whether it takes no other."""
    if not isinstance(kind, type):
        parameters = inspect.signature(kind).parameters.values()
        return _named(parameters), all(p.kind is not p.VAR_KEYWORD for p in parameters)
    names = set()
    for cls in kind.__mro__:
        if cls in (nn.Module, object):
            return names, True
        if "__init__" in vars(cls):
            parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
            names |= _named(parameters)
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                return names, True
    return names, False


def _named(parameters: Iterable[inspect.Parameter]) -> set[str]:
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY)}


# --- where it runs

_LAUNCHED = {
    "pytorch": (("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "tools/dist_train.sh CONFIG GPUS"),
    "slurm": (("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODELIST"), "tools/slurm_train.sh PARTITION JOB CONFIG WORK_DIR"),
    "mpi": (("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), "mpirun -np GPUS python"),
}


def check_launcher(launcher: str) -> None:
    """Check that the processes of a run were started by what --launcher says.

    Raises:
        ValueError: If not: the message says how to start them.
    """
    if launcher == "none":
        if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"torchrun has started {os.environ['WORLD_SIZE']} processes, and without --launcher pytorch each would "
                f"train by itself in one work dir: add --launcher pytorch."
            )
        return
    names, command = _LAUNCHED[launcher]
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(
            f"--launcher {launcher} needs {some(missing)} in the environment, which its launcher sets: start it with "
            f"{command}, or leave --launcher out to run in one process."
        )
    if launcher == "pytorch" and 0 < (gpus := torch.cuda.device_count()) <= int(os.environ["LOCAL_RANK"]):
        raise ValueError(
            f"torchrun has started more processes than there are GPUs: LOCAL_RANK={os.environ['LOCAL_RANK']}, and "
            f"{gpus} GPUs are visible; expected one process per GPU (--nproc_per_node={gpus})."
        )
    for name in names[:2]:
        if not os.environ[name].isdecimal():
            raise ValueError(f"{name}={os.environ[name]!r} in the environment: expected a whole number, 0 or more.")


def check_work_dir(folder: str | Path) -> None:
    """Make the folder that a run writes to.

    Raises:
        OSError: If it cannot be made or written to.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(None, "this user may not write there")
    except FileExistsError as error:
        raise FileExistsError(f"--work-dir {folder} is a file, expected a folder: name another.") from error
    except OSError as error:
        raise OSError(f"--work-dir {folder} cannot be written to ({error.strerror}): name another.") from error
