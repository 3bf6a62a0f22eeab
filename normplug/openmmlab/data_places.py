"""Where a config says what its data are: data sets, metrics, and the numbers of classes of its heads."""

import inspect
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, Registry

__all__ = ["LOADERS", "class_counts", "data_sets", "dataset_class", "evaluators", "is_kind", "leaves"]

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def data_sets(cfg: Config) -> Iterator[tuple[str, dict]]:
    """Yield path and config of every data set of a config that reads files, those inside of wrappers too."""
    for loader in LOADERS:
        if isinstance(cfg.get(loader), dict) and "dataset" in cfg[loader]:
            yield from leaves(cfg[loader]["dataset"], f"{loader}.dataset")


def leaves(dataset: Any, path: str) -> Iterator[tuple[str, dict]]:
    """Yield path and config of the data sets in one that may be a wrapper or a list."""
    if isinstance(dataset, list | tuple):
        for i, part in enumerate(dataset):
            yield from leaves(part, f"{path}.{i}")
    elif isinstance(dataset, dict):
        inner = [key for key in ("dataset", "datasets") if key in dataset]
        for key in inner:
            yield from leaves(dataset[key], f"{path}.{key}")
        if not inner:
            yield path, dataset


def dataset_class(cfg: Config, dataset: dict) -> type | None:
    """Return the class that a data set's config names, or None if nothing registered has that name."""
    kind = dataset.get("type")
    if not isinstance(kind, str):
        return kind
    with DATASETS.switch_scope_and_registry(dataset.get("_scope_") or cfg.get("default_scope")) as registry:
        return registry.get(kind)


def is_kind(cls: type | None, name: str) -> bool:
    """Whether a class is the toolkits' class of this name, or comes from it; nothing is imported for it."""
    return any(base.__name__ == name and base.__module__.startswith(("mmdet.", "mmaction.")) for base in _bases(cls))


def _bases(cls: type | None) -> tuple[type, ...]:
    return cls.__mro__ if isinstance(cls, type) else ()


def evaluators(cfg: Config) -> Iterator[tuple[str, dict]]:
    """Yield path and config of every metric of a config."""
    for name in ("val_evaluator", "test_evaluator"):
        metrics = cfg.get(name)
        if isinstance(metrics, dict):
            yield name, metrics
        elif isinstance(metrics, list | tuple):
            yield from ((f"{name}.{i}", metric) for i, metric in enumerate(metrics))


def class_counts(cfg: Config) -> Iterator[tuple[str, dict, str, int]]:
    """Yield path, part, key and value of every number of classes among a model's heads, those by default too.

    Not those of heads that count something else: things and stuff of semantic segmentation, objects of an RPN.
    """
    if "language_model" in cfg.get("model", {}):
        return  # GLIP and Grounding DINO read the classes as text, and their num_classes is the longest text
    with MODELS.switch_scope_and_registry(cfg.get("default_scope")) as registry:
        yield from _counts(cfg.get("model"), "model", False, registry)


# Heads whose classes are not those of the boxes.
OTHER_HEADS = ("rpn_head", "semantic_head", "reid", "tracker", "embed_head")


def _counts(part: Any, path: str, in_head: bool, registry: Registry) -> Iterator[tuple[str, dict, str, int]]:
    if isinstance(part, list | tuple):
        for i, item in enumerate(part):
            yield from _counts(item, f"{path}.{i}", in_head, registry)
    if not isinstance(part, dict) or any(name in path.rpartition(".")[2] for name in OTHER_HEADS):
        return
    if in_head and isinstance(part.get("type"), str):
        if isinstance(part.get("num_classes"), int):
            yield path, part, "num_classes", part["num_classes"]
        elif (default := _default_classes(part["type"], registry)) is not None:
            yield path, part, "num_classes", default
    if path.endswith(".aux_head_cfg") and isinstance(part.get("out_channels"), int):  # of mmaction2's TPN
        yield path, part, "out_channels", part["out_channels"]
    if isinstance(part.get("num_things_classes"), int):
        yield path, part, "num_things_classes", part["num_things_classes"]
    for key, item in part.items():
        yield from _counts(item, f"{path}.{key}", in_head or "head" in key or key == "blending", registry)


def _default_classes(kind: str, registry: Registry) -> int | None:
    """Return what a head takes for num_classes if its config does not say; most hand it to a class above theirs."""
    for cls in _bases(registry.get(kind)):
        parameter = inspect.signature(cls.__init__).parameters.get("num_classes") if "__init__" in vars(cls) else None
        if parameter is not None:
            return parameter.default if isinstance(parameter.default, int) else None
    return None
