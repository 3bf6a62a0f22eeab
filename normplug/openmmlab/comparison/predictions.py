"""What a model says about a data set, computed once: a cache that knows what its entries depend on."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import METRICS
from torch import nn
from torch.utils.data import DataLoader

from normplug.openmmlab.comparison.norms import OutputRanges
from normplug.openmmlab.comparison.sides import Side, evaluators

__all__ = ["Cache", "Predictions", "fingerprint", "predict"]

DATE = "%Y-%m-%d %H:%M"
EMPTY = "The test data set is empty: look at test_dataloader.dataset of the first config."
PACKAGE = Path(__file__).parents[2]  # normplug
PACKAGES = ("torch", "torchvision", "numpy", "mmengine", "mmcv", "mmcv-lite", "mmdet", "mmaction2")


@dataclass
class Predictions:
    """The predictions of one model on all samples, as plain values.

    For detection, ``results`` has COCO's result lists by metric ("bbox", "segm") and "images", the ids of the
    images that were looked at. For video it has "scores" (N, classes) and "labels" (N,).
    """

    results: dict[str, list]
    ranges: dict[str, list]  # of OutputRanges
    seconds: float
    date: str
    from_cache: bool = False


def predict(model: nn.Module, cfg: Config, loader: DataLoader, advance: Callable[[int], None]) -> Predictions:
    """Run a model over a data loader.

    Args:
        model: The model, on its device.
        cfg: Config whose test evaluator, and whose test loop's precision, count.
        loader: The data.
        advance: Told how many samples have been done since it was last called.

    Raises:
        ValueError: If the data set is empty, or a clip has several labels.
    """
    metric = METRICS.build(evaluators(cfg)[0])
    evaluator = Evaluator([metric])
    evaluator.dataset_meta = getattr(loader.dataset, "metainfo", None)
    ranges, began = OutputRanges(), time.perf_counter()
    device = next(model.parameters()).device
    half = cfg.get("test_cfg", {}).get("fp16", False)
    with torch.no_grad(), ranges.watching(model), torch.autocast(device.type, enabled=half):
        for batch in loader:
            outputs = model.test_step(batch)
            evaluator.process(outputs, batch)
            advance(len(outputs))
    if not metric.results:
        raise ValueError(EMPTY)
    results = _detections(metric) if hasattr(metric, "results2json") else _scores(metric)
    return Predictions(results, ranges.state(), time.perf_counter() - began, time.strftime(DATE))


def _detections(metric: Any) -> dict[str, list]:
    predictions = [prediction for _, prediction in metric.results]
    metric.cat_ids = metric._coco_api.get_cat_ids(cat_names=metric.dataset_meta["classes"])
    with tempfile.TemporaryDirectory() as folder:
        files = metric.results2json(predictions, f"{folder}/results")
        found = {kind: json.loads(Path(files[kind]).read_text()) for kind in ("bbox", "segm") if kind in files}
    for detection in found.get("segm", []):
        detection.pop("bbox")  # else pycocotools takes its area for the mask's, as mmdet says
    return found | {"images": [prediction["img_id"] for prediction in predictions]}


def _scores(metric: Any) -> dict[str, list]:
    labels = [result["label"] for result in metric.results]
    if not all(isinstance(label, int) for label in labels) or isinstance(metric.results[0]["pred"], dict):
        raise ValueError(
            "Clips with several labels or several scores cannot be compared by this tool: it knows top-k accuracy of "
            "one label per clip."
        )
    return {"scores": [result["pred"].tolist() for result in metric.results], "labels": labels}


# --- the cache


class Cache:
    """Results by what they depend on: a folder of JSON files, each with the full description of its key.

    Args:
        folder: Where they are; None for a cache that keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, kind: str, key: dict[str, Any]) -> Any:
        """Return what was put there under exactly this key, or None."""
        if self.folder is None or not self._file(kind, key).is_file():
            return None
        try:
            entry = json.loads(self._file(kind, key).read_text())
        except ValueError:  # cut off
            return None
        return entry["value"] if entry["key"] == key else None

    def put(self, kind: str, key: dict[str, Any], value: Any) -> None:
        """Keep a value; a reader at the same time sees all of it or nothing."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(kind, key)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps({"key": key, "value": value}))
        unfinished.replace(file)

    def predictions(self, key: dict[str, Any], compute: Callable[[], Predictions]) -> Predictions:
        """Return the predictions of this key, computed if they are not there."""
        if (known := self.get("predictions", key)) is not None:
            return Predictions(**{**known, "from_cache": True})
        predictions = compute()
        self.put("predictions", key, asdict(predictions))
        return predictions

    def _file(self, kind: str, key: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{kind}-{digest[:20]}.json"


def fingerprint(side: Side, reference: Config, loader: DataLoader, device: torch.device) -> dict[str, Any]:
    """Return all that a model's predictions depend on.

    Args:
        side: The model.
        reference: Config with the test settings.
        loader: Its test data. Of every file that a sample names, size and time of change count.
        device: Where it runs.
    """
    config, settings = side.cfg.to_dict(), reference.to_dict()
    return {
        "config": _digest(f"{k}={v!r}" for k, v in config.items() if k not in ("work_dir", "launcher")),
        "checkpoint": _digest(_blocks(side.checkpoint)),
        "settings": _digest(f"{k}={settings.get(k)!r}" for k in ("test_dataloader", "test_evaluator", "test_cfg")),
        "data": _digest(_descriptions(loader.dataset)),
        "annotations": _digest(_contents(_annotation_files(loader.dataset, reference))),
        "code": _digest(_contents(_code(side.cfg, reference))),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)  # the length: so that no two lists run into the same
    return digest.hexdigest()


def _blocks(file: Path) -> Iterable[bytes]:
    with file.open("rb") as opened:
        yield from iter(lambda: opened.read(1 << 20), b"")


def _descriptions(dataset: Any) -> Iterable[str]:
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        yield json.dumps(info, sort_keys=True, default=repr)
        for value in info.values():
            if isinstance(value, str) and os.path.exists(value):
                status = os.stat(value)
                yield f"{value} {status.st_size} {status.st_mtime_ns}"


def _annotation_files(dataset: Any, reference: Config) -> list[str]:
    found = [getattr(dataset, "ann_file", None), *(evaluator.get("ann_file") for evaluator in evaluators(reference))]
    return [file for file in found if isinstance(file, str) and os.path.isfile(file)]


def _code(*configs: Config) -> list[str]:
    """The source files of this package and of what the configs import beside it."""
    names = {name for cfg in configs for name in cfg.get("custom_imports", {}).get("imports", [])}
    specs = [importlib.util.find_spec(name) for name in sorted(names)]
    own = sorted(PACKAGE.rglob("*.py"))
    return [*map(str, own), *(spec.origin for spec in specs if spec is not None and spec.origin)]


def _contents(files: Iterable[str]) -> Iterable[bytes]:
    return (Path(file).read_bytes() for file in files)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
