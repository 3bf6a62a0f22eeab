"""The whole comparison: predictions, statistics, cost and norms of two checkpoints."""

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from pycocotools.coco import COCO
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader, Dataset

from normplug.bench.facts import processor
from normplug.openmmlab.comparison.accuracy import Accuracy
from normplug.openmmlab.comparison.average_precision import AveragePrecision, evaluate
from normplug.openmmlab.comparison.bootstrap import Difference, Metric, compare
from normplug.openmmlab.comparison.cost import PASSES, Cost, Latency, measure, static_cost
from normplug.openmmlab.comparison.examples import ClipExamples, ImageExamples
from normplug.openmmlab.comparison.norms import Filters, Norm, OutputRanges, filters_of, norms_of
from normplug.openmmlab.comparison.predictions import DATE, EMPTY, Cache, Predictions, fingerprint, predict
from normplug.openmmlab.comparison.seeds import OverSeeds, over_seeds
from normplug.openmmlab.comparison.sides import Side, check_comparable, evaluators, metrics_of, names_of, task_of

__all__ = ["Comparison", "compare_checkpoints"]


@dataclass
class Comparison:
    """All that was found out about A and B; lists of two are in this order."""

    sides: list[Side]
    task: str
    samples: int
    resamples: int
    remarks: list[str]
    differences: list[Difference]
    predictions: list[Predictions]
    costs: list[Cost]
    costs_from_cache: str  # when they were measured, if not now
    norms: list[list[Norm]]
    filters: list[list[Filters]]  # empty where neither standardizes weights
    curves: dict[str, list[dict[str, list[float]]]]  # by "box" or "mask"; of detection only
    errors: dict[str, list[dict[str, int]]]
    examples: ImageExamples | ClipExamples
    more: list[list[Side]]  # A's and B's further checkpoints
    seeds: list[OverSeeds]  # empty where there are none

    @property
    def names(self) -> list[str]:
        """A's and B's names: of the configs or, where these are the same, of the checkpoints too."""
        return names_of(*self.sides)


def compare_checkpoints(
    a: Side,
    b: Side,
    device: torch.device,
    *,
    batch_sizes: Sequence[int] = (1, 2, 4, 8),
    resamples: int = 1000,
    seconds: float = 3.0,
    cache: Cache | None = None,
    more: Sequence[Sequence[Side]] = ((), ()),
) -> Comparison:
    """Evaluate two checkpoints on A's test data with A's test settings, and measure what they cost.

    Progress goes to stderr.

    Args:
        a: One model.
        b: The other.
        device: Where both run.
        batch_sizes: For time and memory; none to leave these out.
        resamples: Of the bootstrap.
        seconds: Time for each batch size and model.
        cache: Where predictions and measurements are kept; by default nowhere.
        more: Further checkpoints of A's config and of B's, trained with other seeds. Of these only the metrics are
            computed.

    Raises:
        ValueError: If the two cannot be compared, a checkpoint does not fit its config, or one of several is given
            twice.
    """
    cache = cache or Cache(None)
    remarks = check_comparable(a, b)
    sides = [a, b]
    with DefaultScope.overwrite_default_scope(a.cfg.get("default_scope")), _progress() as bar:
        loader = _load(a.cfg)
        models = [side.build() for side in sides]
        keys = [fingerprint(side, a.cfg, loader, device) for side in sides]
        keys_of_more = [[fingerprint(side, a.cfg, loader, device) for side in of_one] for of_one in more]
        if any(more):
            _check_seeds([*sides, *more[0], *more[1]], models, [*keys, *keys_of_more[0], *keys_of_more[1]])

        def predictions_of(title: str, key: dict[str, Any], build: Callable[[], nn.Module]) -> Predictions:
            with bar(title, len(loader.dataset)) as advance:
                return cache.predictions(key, lambda: predict(build().to(device), a.cfg, loader, advance))

        predictions = [
            predictions_of(f"{side.letter}: predictions", key, lambda model=model: model)
            for side, model, key in zip(sides, models, keys, strict=True)
        ]
        classes = getattr(loader.dataset, "metainfo", {}).get("classes") or ()
        differences, curves, errors = [], {}, {}
        for ours, theirs in zip(*(_scorers(sides, found, classes) for found in predictions), strict=True):
            if isinstance(ours, AveragePrecision):
                curves[ours.of], errors[ours.of] = [ours.curves, theirs.curves], [ours.errors, theirs.errors]
            with bar("bootstrap", resamples) as advance:
                differences += compare(
                    ours, theirs, _samples(predictions[0]), resamples, support=ours.support, advance=advance
                )
        examples = _examples(a, [found.results for found in predictions], loader.dataset, classes)
        values = [[{d.metric: getattr(d, x) for d in differences if not d.metric.category}] for x in ("a", "b")]
        for seeds, of_one, keys_of_one in zip(values, more, keys_of_more, strict=True):
            for i, (side, key) in enumerate(zip(of_one, keys_of_one, strict=True), 2):
                found = predictions_of(f"{side.letter}{i}: predictions", key, side.build)
                seeds.append(_values(_scorers(sides, found, classes), _samples(found)))
        costs, measured = _costs(models, keys, loader, device, batch_sizes, seconds, cache, bar)
    filters = [filters_of(model) for model in models]
    return Comparison(
        sides=sides,
        task=task_of(a),
        samples=_samples(predictions[0]),
        resamples=resamples,
        remarks=remarks,
        differences=differences,
        predictions=predictions,
        costs=costs,
        costs_from_cache=measured,
        norms=[norms_of(m, OutputRanges.from_state(p.ranges)) for m, p in zip(models, predictions, strict=True)],
        filters=filters if any(f.standardized for side in filters for f in side) else [],
        curves=curves,
        errors=errors,
        examples=examples,
        more=[list(of_one) for of_one in more],
        seeds=over_seeds(*values) if any(more) else [],
    )


def _check_seeds(sides: Sequence[Side], models: Sequence[nn.Module], keys: Sequence[dict[str, Any]]) -> None:
    """Refuse, before anything is predicted, what does not fit its config or is there twice.

    Twice is a file, by its content, and on one side also a model: trained again with the same seed it shows no noise.
    Equal weights on the two sides are two ways that come to the same.

    Args:
        sides: All; the further ones behind the first two.
        models: Those of the first two, on the CPU.
        keys: Of all.
    """
    first: dict[tuple[str, str], Side] = {}
    for i, (side, key) in enumerate(zip(sides, keys, strict=True)):
        weights = _digest_of_weights(models[i] if i < len(models) else side.build())
        for mark in (("", key["checkpoint"]), (side.letter, weights)):
            if (other := first.setdefault(mark, side)) is not side:
                raise ValueError(
                    f"{side.checkpoint} of {side.letter} holds the same weights as {other.checkpoint} of "
                    f"{other.letter}: give each checkpoint once, from trainings with different seeds."
                )


def _digest_of_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _values(scorers: Sequence[Accuracy | AveragePrecision], samples: int) -> dict[Metric, float]:
    """Return the metrics over all classes, with each sample counting once."""
    found = [scorer(np.ones((1, samples), np.int32)) for scorer in scorers]
    return {metric: value.item() for one in found for metric, value in one.items() if not metric.category}


def _load(cfg: Config) -> DataLoader:
    try:
        return Runner.build_dataloader(cfg.test_dataloader, seed=0)
    except ValueError as error:
        if "need at least one array" in str(error):  # mmengine packs the samples into one
            raise ValueError(EMPTY) from error
        raise


def _scorers(
    sides: Sequence[Side], predictions: Predictions, classes: Sequence[str]
) -> list[Accuracy | AveragePrecision]:
    """Return what computes the metrics that both configs ask for, from the predictions of one of the models."""
    evaluator, results = evaluators(sides[0].cfg)[0], predictions.results
    if task_of(sides[0]) == "video":
        top_k = (evaluator.get("metric_options") or {}).get("top_k_accuracy", {}).get("topk", (1, 5))
        top_k = [top_k] if isinstance(top_k, int) else top_k
        return [Accuracy(np.array(results["scores"]), np.array(results["labels"]), top_k, classes)]
    truth, categories = _truth(sides[0], classes)
    return [
        AveragePrecision(evaluate(truth, results[k], k, results["images"], categories, evaluator.get("iou_thrs")))
        for k in metrics_of(sides[0])
        if k in metrics_of(sides[1])
    ]


def _truth(side: Side, classes: Sequence[str]) -> tuple[COCO, list[int]]:
    truth = COCO(evaluators(side.cfg)[0]["ann_file"])
    return truth, truth.getCatIds(catNms=list(classes))


def _examples(
    side: Side, results: Sequence[dict[str, list]], dataset: Dataset, classes: Sequence[str]
) -> ImageExamples | ClipExamples:
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    if task_of(side) == "detection":
        truth, categories = _truth(side, classes)
        return ImageExamples(truth, results, {info["img_id"]: info["img_path"] for info in infos}, categories)
    in_order = [info.get("label") for info in infos] == results[0]["labels"]  # else a sampler has shuffled the clips
    return ClipExamples(results, [info.get("filename", "") for info in infos] if in_order else [], classes)


def _samples(predictions: Predictions) -> int:
    return len(predictions.results.get("images") or predictions.results["labels"])


def _costs(
    models: Sequence[nn.Module],
    keys: Sequence[dict[str, Any]],
    loader: DataLoader,
    device: torch.device,
    batch_sizes: Sequence[int],
    seconds: float,
    cache: Cache,
    bar: Callable,
) -> tuple[list[Cost], str]:
    """Return the costs and, if they are from the cache, when they were measured."""
    if not batch_sizes:
        return [static_cost(model) for model in models], ""
    where = {"processor": processor(), "threads": torch.get_num_threads()}
    key = {"models": list(keys), "batch_sizes": list(batch_sizes), "seconds": seconds, **where}
    if (known := cache.get("cost", key)) is not None:
        latencies = [[Latency(**latency) for latency in cost["latencies"]] for cost in known["costs"]]
        return [Cost(**{**c, "latencies": of_c}) for c, of_c in zip(known["costs"], latencies, strict=True)], known[
            "date"
        ]
    with bar("time and memory", PASSES * len(batch_sizes)) as advance:
        costs = measure([model.to(device) for model in models], loader, batch_sizes, seconds, advance)
    cache.put("cost", key, {"costs": [asdict(cost) for cost in costs], "date": time.strftime(DATE)})
    return costs, ""


@contextmanager
def _progress() -> Iterator[Callable]:
    """Bars on stderr; what libraries print goes there too."""
    columns = TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress, redirect_stdout(sys.stderr):

        @contextmanager
        def bar(title: str, total: int) -> Iterator[Callable]:
            task = progress.add_task(title, total=total)
            yield lambda done=1: progress.advance(task, done)

        yield bar
