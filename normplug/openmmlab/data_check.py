"""What is wrong with the data that a config names, before anything is built or trained.

mmdet and mmaction2 find most of these mistakes late and far from their cause, and some never: a class that the
annotation file does not have shifts the labels of all behind it.
"""

import os
from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DATASETS

from normplug.openmmlab.data_files import read_coco, read_list
from normplug.openmmlab.data_places import LOADERS, class_counts, data_sets, evaluators

__all__ = ["check_data"]

# A larger file is one of the public sets and takes longer to read than training takes to start.
READ_UP_TO = 200_000_000  # bytes
LOOK_FOR = 20_000  # videos; of more, that many are looked for at even distances


def check_data(cfg: Config, loaders: tuple[str, ...] = LOADERS) -> None:
    """Find mistakes in the data of a config, without building it.

    Looks at data sets of mmdet's CocoDataset and mmaction2's VideoDataset, in wrappers too; others are left alone.

    Args:
        cfg: A config as it will be run.
        loaders: The data loaders that it will use.

    Raises:
        ValueError: For the first file or folder that is missing, class that has no place, number of classes that is
            not that of the data, annotation file of a metric that is not that of its data, or line that is no sample.
    """
    sets = [(path, dataset) for path, dataset in data_sets(cfg) if path.startswith(loaders)]
    for path, dataset in sets:
        kind = _kind(cfg, dataset)
        if kind is not None:
            _CHECKS[kind](cfg, path, dataset)
    _check_metrics(cfg, sets)


def _kind(cfg: Config, dataset: dict) -> str | None:
    """Return which of the data sets that we know this is; subclasses with files of their own form are none."""
    if dataset.get("type") in ("CocoDataset", "mmdet.CocoDataset"):
        return "coco"
    return "video" if dataset.get("type") in ("VideoDataset", "mmaction.VideoDataset") else None


def _below(dataset: dict, file: str) -> Path:
    return Path(dataset.get("data_root") or "", file or "")


def _is_remote(dataset: dict) -> bool:
    """Whether files are fetched from a store and cannot be looked for here."""
    return dict(dataset.get("backend_args") or {}).get("backend", "local") != "local"


# --- COCO


def _check_coco(cfg: Config, path: str, dataset: dict) -> None:
    classes = tuple(_metainfo(dataset, "classes") or _default_classes())
    _check_counts(cfg, path, len(classes))
    if _is_remote(dataset):
        return
    file = _below(dataset, dataset.get("ann_file"))
    folder = _below(dataset, dict(dataset.get("data_prefix") or {}).get("img"))
    if not file.is_file():
        raise ValueError(f"{path}: the annotation file {file} is not there. {_SET_BY_HAND}")
    if not folder.is_dir():
        raise ValueError(f"{path}: the folder of images {folder} is not there. {_SET_BY_HAND}")
    if file.stat().st_size > READ_UP_TO:
        return
    content = read_coco(file)
    names = [category["name"] for category in content["categories"]]
    known = {category["id"] for category in content["categories"]}
    _check_classes(path, file, classes, names)
    for key in ("images", "annotations"):
        if not content[key]:
            raise ValueError(f"{path}: {file} has no {key}; there is nothing to train or measure.")
    strangers = {annotation.get("category_id") for annotation in content["annotations"]} - known
    if strangers:
        raise ValueError(
            f"{path}: {file} has annotations of category_id {sorted(strangers, key=str)[0]!r}, and its categories have "
            f"the ids {sorted(known, key=str)}. Every annotation needs one of these."
        )
    ids = {image["id"] for image in content["images"]}
    if lost := [annotation for annotation in content["annotations"] if annotation.get("image_id") not in ids]:
        raise ValueError(
            f"{path}: {file} has {len(lost)} annotations of images that it does not list, the first of image_id "
            f"{lost[0].get('image_id')!r}."
        )
    masks = _wants_masks(dataset)
    if masks and (bare := [a for a in content["annotations"] if not a.get("segmentation")]):
        raise ValueError(
            f"{path}: {len(bare)} of {len(content['annotations'])} annotations in {file} have no segmentation, and the "
            f"pipeline loads masks. Add polygons or RLE, or take a detector of boxes, such as configs/faster_rcnn/."
        )
    _check_files(path, file, folder, [image["file_name"] for image in content["images"]])


_SET_BY_HAND = "Set data_root, ann_file and data_prefix of all three data sets, or give the folder: --data ROOT."


def _metainfo(dataset: dict, key: str):
    return dict(dataset.get("metainfo") or {}).get(key)


def _default_classes() -> tuple[str, ...]:
    with DATASETS.switch_scope_and_registry("mmdet") as registry:
        return registry.get("CocoDataset").METAINFO["classes"]


def _wants_masks(dataset: dict) -> bool:
    return any(
        "LoadAnnotations" in str(step.get("type")) and step.get("with_mask") for step in dataset.get("pipeline") or []
    )


def _check_classes(path: str, file: Path, classes: tuple[str, ...], names: list[str]) -> None:
    wanted = [name for name in names if name in classes]
    if tuple(wanted) == classes:
        return
    told = f"{path} has the classes {_some(classes)}, and {file} the categories {_some(names)}"
    fix = f"Write metainfo=dict(classes={_some(names, True)}) in every data set, or let --data ROOT do it."
    if not wanted:
        raise ValueError(f"{told}: none of them fits. {fix}")
    if missing := [name for name in classes if name not in names]:
        raise ValueError(f"{told}: {_some(missing)} {'is' if len(missing) == 1 else 'are'} not in the file. {fix}")
    raise ValueError(f"{told}: mmdet numbers them in the order of the file, so write them in that order. {fix}")


def _some(names, as_tuple: bool = False) -> str:
    if as_tuple:
        return repr(tuple(names)) if len(names) <= 10 else f"({', '.join(map(repr, names[:10]))}, ...)"
    return ", ".join(map(str, names[:5])) + (f", ... ({len(names)})" if len(names) > 5 else "")


def _check_files(path: str, file: Path, folder: Path, names: list[str]) -> None:
    present: dict[Path, set[str]] = {}  # one look per folder: a network drive takes a second for some hundred files
    missing = []
    for name in names:
        place = (folder / name).parent
        if place not in present:
            present[place] = set(os.listdir(place)) if place.is_dir() else set()
        if Path(name).name not in present[place]:
            missing.append(name)
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of {len(names)} images of {file} are not in {folder}, the first {missing[0]!r}."
        )


def _check_counts(cfg: Config, path: str, number: int) -> None:
    wrong = [(place, key, value) for place, _, key, value in class_counts(cfg) if value != number]
    if wrong:
        places = ", ".join(f"{place}.{key}={value}" for place, key, value in wrong)
        raise ValueError(
            f"{path} has {number} classes, and the model has {places}. Set {'it' if len(wrong) == 1 else 'them'} to "
            f"{number}, or let --data ROOT set all places."
        )


def _check_metrics(cfg: Config, sets: list[tuple[str, dict]]) -> None:
    for path, metric in evaluators(cfg):
        loader = f"{path.partition('_')[0]}_dataloader"
        dataset = next((one for place, one in sets if place.startswith(loader)), None)
        file = metric.get("ann_file")
        if dataset is None or _kind(cfg, dataset) != "coco" or not file or _is_remote(dataset):
            continue
        expected = _below(dataset, dataset["ann_file"])
        if not Path(file).is_file():
            raise ValueError(f"{path}.ann_file={file!r} is not there. Set it to the data set's, {str(expected)!r}.")
        if not os.path.samefile(file, expected):
            raise ValueError(
                f"{path}.ann_file={file!r} is not the file of {loader}, {str(expected)!r}: predictions would be "
                f"measured against other images. Set it to that."
            )


# --- videos


def _check_videos(cfg: Config, path: str, dataset: dict) -> None:
    if _is_remote(dataset):
        return
    file = _below(dataset, dataset.get("ann_file"))
    folder = _below(dataset, dict(dataset.get("data_prefix") or {}).get("video"))
    if not file.is_file():
        raise ValueError(
            f"{path}: the list of videos {file} is not there. Set ann_file, or give the folder: --data ROOT."
        )
    if not folder.is_dir():
        raise ValueError(f"{path}: the folder of videos {folder} is not there. Set data_prefix, or use --data ROOT.")
    if dataset.get("multi_class") or dataset.get("delimiter", " ") != " ":
        return
    samples = read_list(file)
    if not samples:
        raise ValueError(f"{path}: {file} is empty. Expected lines 'path label'.")
    classes = _metainfo(dataset, "classes")
    highest = max(samples, key=lambda sample: sample[1])
    for place, _, key, value in class_counts(cfg):
        if highest[1] >= value:
            raise ValueError(
                f"{path}: {file} has the label {highest[1]} ({highest[0]}), and the model has {place}.{key}={value}, "
                f"for labels from 0 to {value - 1}. Set it to {highest[1] + 1} or more, or let --data ROOT do it."
            )
        if classes and len(classes) != value:
            raise ValueError(
                f"{path} has {len(classes)} classes, and the model has {place}.{key}={value}. Make them equal."
            )
    step = max(1, len(samples) // LOOK_FOR)
    missing = [name for name, _ in samples[::step] if not (folder / name).is_file()]
    if missing:
        looked = len(samples[::step])
        raise ValueError(
            f"{path}: {len(missing)} of {looked} videos of {file} are not in {folder}, the first {missing[0]!r}."
        )


_CHECKS: dict[str, Callable[[Config, str, dict], None]] = {"coco": _check_coco, "video": _check_videos}
