"""The two sides of a comparison: a config and a checkpoint each, and whether comparing them means anything."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import CheckpointLoader
from torch import nn

from normplug.openmmlab.checkpoints import check_norms
from normplug.openmmlab.cli import config_parser, load_config
from normplug.openmmlab.file_kinds import check_kind
from normplug.openmmlab.weight_checks import check_fit, check_weights, weights_of

__all__ = ["Side", "check_comparable", "evaluators", "metrics_of", "names_of", "task_of"]

# What is compared, by the evaluators it can be computed from.
TASKS = {"CocoMetric": "detection", "AccMetric": "video"}
COCO_METRICS = ("bbox", "segm")
ACCURACIES = ("top_k_accuracy", "mean_class_accuracy")


@dataclass
class Side:
    """A model: its letter in the report, config and checkpoint.

    Args:
        letter: A or B.
        config: Config file.
        checkpoint: Checkpoint file.
        options: Settings that override the config.

    Raises:
        FileNotFoundError: If there is no such config or checkpoint.
        CheckpointError: If the checkpoint is a file of another kind.
        ModuleNotFoundError: If the config imports a package that is not installed.
    """

    letter: str
    config: Path
    checkpoint: Path
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        args = config_parser("").parse_args([str(self.config)])  # every flag has its default
        args.cfg_options = self.options
        self.cfg: Config = load_config(args)
        check_kind(self.checkpoint)

    def build(self) -> nn.Module:
        """Return the model with the checkpoint's weights, in evaluation mode, on the CPU.

        Raises:
            ValueError: If the checkpoint is another model's: its norms are of another kind, or weights are missing or
                left over.
        """
        model = MODELS.build(self.cfg.model)
        checkpoint = CheckpointLoader.load_checkpoint(str(self.checkpoint), map_location="cpu")
        weights = {key.removeprefix("module."): value for key, value in weights_of(checkpoint).items()}
        check_weights(weights, self.checkpoint, [name for name, _ in model.named_parameters()])
        check_fit(model, weights, self.checkpoint)
        try:
            check_norms(model, weights)
            missing, left = model.load_state_dict(weights, strict=False)
        except (ValueError, RuntimeError) as error:  # norms, shapes
            what = " ".join(str(error).split())  # torch's has a line for each weight
            raise ValueError(f"{self.checkpoint} does not fit {self.config}. {what}") from error
        if missing := [key for key in missing if not key.endswith("num_batches_tracked")]:
            raise ValueError(
                f"{self.checkpoint} lacks {len(missing)} of the weights that {self.config} has, {missing[0]} for "
                f"one: the model would be evaluated with random numbers there. Give the config of this checkpoint."
            )
        if left := [key for key in left if not key.endswith(("num_batches_tracked", "_extra_state"))]:
            raise ValueError(
                f"{self.checkpoint} has {len(left)} weights that {self.config} has not, {left[0]} for one: "
                f"it is that of a larger model. Give the config of this checkpoint."
            )
        model.eval()  # mmdet's returns nothing
        return model


def names_of(a: Side, b: Side) -> list[str]:
    """Return a name for each side: that of its config or, where both have the same, with that of its checkpoint."""
    if a.config.stem != b.config.stem:
        return [a.config.stem, b.config.stem]
    return [f"{s.config.stem}_{s.checkpoint.absolute().parent.name}_{s.checkpoint.stem}" for s in (a, b)]


def evaluators(cfg: Config) -> list[dict[str, Any]]:
    """Return the test evaluators of a config."""
    found = cfg.get("test_evaluator") or []
    return list(found) if isinstance(found, list | tuple) else [found]


def check_comparable(a: Side, b: Side) -> list[str]:
    """Refuse what cannot be compared, and say what to keep in mind of the rest.

    Returns:
        Remarks for the report: where B's own test settings differ from A's, which are used for both.

    Raises:
        ValueError: If the tasks, metrics or classes differ, or a metric is not known here.
    """
    tasks = [task_of(side) for side in (a, b)]
    if tasks[0] != tasks[1]:
        raise ValueError(
            f"{a.config.name} is tested as {tasks[0]} and {b.config.name} as {tasks[1]}: their numbers do not mean the "
            f"same. Compare two models of one task."
        )
    names = [_class_names(side.cfg) for side in (a, b)]
    if None not in names and names[0] != names[1]:
        different = next((x, y) for x, y in zip([*names[0], None], [*names[1], None], strict=False) if x != y)
        raise ValueError(
            f"The class lists differ: {len(names[0])} classes in {a.config.name}, {len(names[1])} in {b.config.name}; "
            f"the first difference is {different[0]!r} and {different[1]!r}. A label must mean the same to both "
            f"models: compare two that were trained for the same classes in the same order."
        )
    heads = [sorted(set(_numbers_of_classes(side.cfg.model))) for side in (a, b)]
    if heads[0] != heads[1]:
        raise ValueError(
            f"The models' num_classes differ: {heads[0]} in {a.config.name}, {heads[1]} in {b.config.name}. Compare "
            f"two models of the same classes."
        )
    metrics = [metrics_of(side) for side in (a, b)]
    if not set(metrics[0]) & set(metrics[1]):
        raise ValueError(
            f"{a.config.name} is evaluated by {', '.join(metrics[0])}, {b.config.name} by {', '.join(metrics[1])}: "
            f"they have no metric in common."
        )
    remarks = []
    if set(metrics[0]) != set(metrics[1]):
        only = set(metrics[0]) ^ set(metrics[1])
        remarks.append(f"Only one of the configs is evaluated by {', '.join(sorted(only))}, which is left out.")
    for key, what in (("ann_file", "annotations"), ("pipeline", "a test pipeline")):
        ours, theirs = (_inner(side.cfg.test_dataloader.dataset).get(key) for side in (a, b))
        if ours != theirs:
            remarks.append(f"B's own config has other {what.removeprefix('a ')}; A's is used for both.")
    return remarks


def task_of(side: Side) -> str:
    """Return "detection" or "video".

    Raises:
        ValueError: If the config has no test data, or another evaluator.
    """
    found = evaluators(side.cfg)
    kinds = [evaluator["type"].rpartition(".")[2] for evaluator in found]
    if len(kinds) != 1 or kinds[0] not in TASKS or not side.cfg.get("test_dataloader"):
        raise ValueError(
            f"{side.config} has {', '.join(kinds) or 'no'} test_evaluator and "
            f"{'a' if side.cfg.get('test_dataloader') else 'no'} test_dataloader. This tool needs a test_dataloader "
            f"and one test_evaluator of type {' or '.join(TASKS)}; set them with --cfg-options."
        )
    if TASKS[kinds[0]] == "detection" and not found[0].get("ann_file"):
        raise ValueError(f"{side.config}: test_evaluator.ann_file must name the annotations, in COCO's format.")
    return TASKS[kinds[0]]


def metrics_of(side: Side) -> list[str]:
    """Return what a config's evaluator computes.

    Raises:
        ValueError: If that is something that is not compared here.
    """
    evaluator = evaluators(side.cfg)[0]
    detects = task_of(side) == "detection"
    known = COCO_METRICS if detects else ACCURACIES
    found = evaluator.get("metric", "bbox") if detects else evaluator.get("metric_list", ACCURACIES)
    found = [found] if isinstance(found, str) else list(found)
    if unknown := [metric for metric in found if metric not in known]:
        raise ValueError(f"{side.config} is evaluated by {', '.join(unknown)}; this tool compares {', '.join(known)}.")
    return found if detects else list(ACCURACIES)  # from the same scores: all of them


def _inner(dataset: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the data set inside wrappers, of several the first."""
    while "dataset" in dataset or "datasets" in dataset:
        dataset = dataset["dataset"] if "dataset" in dataset else dataset["datasets"][0]
    return dataset


def _class_names(cfg: Config) -> list[str] | None:
    dataset = _inner(cfg.test_dataloader.dataset)
    with DATASETS.switch_scope_and_registry(cfg.get("default_scope")) as registry:
        known = getattr(registry.get(dataset["type"]), "METAINFO", {})
    names = (dataset.get("metainfo") or {}).get("classes") or known.get("classes")
    return [names] if isinstance(names, str) else names and list(names)


def _numbers_of_classes(model: Any) -> Iterator[int]:
    """Yield every ``num_classes`` of a model's config."""
    if isinstance(model, Mapping):
        if isinstance(model.get("num_classes"), int):
            yield model["num_classes"]
        for value in model.values():
            yield from _numbers_of_classes(value)
    elif isinstance(model, list | tuple):
        for value in model:
            yield from _numbers_of_classes(value)
