"""A config of somebody else's data made one for your own: every place that names classes or files, at once.

A detector of mmdet says in about twelve places what its data are: the root, the annotation file and the folder of each
data set, the classes of each, the number of classes of every head, the file of each metric. ``use_data`` finds out from
the folder and sets them all. ``normplug.openmmlab.data_check`` finds what somebody forgot who set them by hand.
"""

import copy
import os
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config

from normplug.openmmlab.data_files import classes_of, read_coco, read_list
from normplug.openmmlab.data_places import LOADERS, class_counts, evaluators, leaves

__all__ = ["use_data"]

SPLITS = {
    "train": ("train2017", "train"),
    "val": ("val2017", "val", "valid", "validation"),
    "test": ("test2017", "test"),
}
# Where the annotations of a split are looked for, and where its images, the first that has them.
ANNOTATIONS = ("annotations/instances_{}.json", "annotations/{}.json", "{}.json", "{}/_annotations.coco.json")
IMAGES = ("{}", "images/{}", "{}/images", "images", "")
LISTS = ("kinetics400_{}_list_videos.txt", "{}_list_videos.txt", "{}_videos.txt", "{}.txt")
VIDEOS = ("videos_{}", "{}", "videos/{}", "videos", "")
VIDEO_ENDINGS = (".mp4", ".avi", ".webm", ".mkv", ".mov")


class Split(NamedTuple):
    """One part of a data set: files as paths below its root, or absolute."""

    ann_file: str
    folder: str
    classes: tuple[str, ...]
    samples: int
    objects: int = 0
    masks: bool = True


def use_data(cfg: Config, root: str | Path) -> str:
    """Have a config train, validate and test on the data in a folder, in place.

    Detection: COCO's own layout (``annotations/instances_train2017.json``, ``train2017/``), the same without 2017,
    ``train.json`` and ``val.json`` with ``train/`` and ``val/`` or ``images/``, and Roboflow's
    ``train/_annotations.coco.json``. Video: Kinetics' layout (``kinetics400_train_list_videos.txt``,
    ``videos_train/``), ``train.txt`` and ``val.txt`` with lines ``path label``, or ``train/CLASS/*.mp4`` and
    ``val/CLASS/*.mp4``, for which lists are written into the work dir. A ``classes.txt``, one name a line, names the
    labels. The test set is the val set where there is no other with annotations.

    Set are: type, root, files, folders and classes of all data sets, also wrapped ones; the number of classes of every
    head, also where it is a default that no config names; and the annotation file of every metric.

    Args:
        cfg: Config of mmdet or mmaction2.
        root: Folder with the data.

    Returns:
        A line that says what was found and what was set.

    Raises:
        ValueError: If the folder has none of these layouts, its files contradict each other, or the config has nothing
            to set.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"--data {root}: there is no such folder. Name the one that holds your data's train and val.")
    missing = [name for name in LOADERS if "dataset" not in (cfg.get(name) or {})]
    if missing or "model" not in cfg:
        raise ValueError(f"--data sets what a config has, and this one has no {(missing or ['model'])[0]}.")
    for name in (*LOADERS, "val_evaluator", "test_evaluator"):
        cfg[name] = copy.deepcopy(cfg[name])  # many configs have one for val and test, and these differ now
    return _use_videos(cfg, root) if cfg.get("default_scope") == "mmaction" else _use_images(cfg, root)


# --- images


def _use_images(cfg: Config, root: Path) -> str:
    splits = {split: _find_coco(root, split, required=split != "test") for split in SPLITS}
    train, val = splits["train"], splits["val"]
    splits["test"] = splits["test"] or val
    for name, split in splits.items():
        if split.classes != train.classes:
            raise ValueError(
                f"--data {root}: {split.ann_file} has the classes {_some(split.classes)}, and {train.ann_file} has "
                f"{_some(train.classes)}. Expected the same categories in the same order in all files ({name})."
            )
    masks = "mask_head" in str(cfg.model) or any("segm" in str(metric.get("metric")) for _, metric in evaluators(cfg))
    without = [split.ann_file for split in splits.values() if masks and not split.masks]
    if without:
        raise ValueError(
            f"--data {root}: the model predicts masks, and {without[0]} has annotations without a segmentation. Take a "
            f"detector of boxes, such as configs/faster_rcnn/, or add polygons or RLE to the file."
        )
    for loader in LOADERS:
        dataset = _one_data_set(cfg[loader]["dataset"])
        split = splits[loader.partition("_")[0]]
        _, leaf = next(leaves(dataset, loader))
        _forget_digits(leaf)
        leaf.update(
            type="CocoDataset",
            data_root=str(root),
            ann_file=split.ann_file,
            data_prefix=dict(img=split.folder),
            metainfo=dict(classes=train.classes),
        )
        cfg[loader]["dataset"] = dataset
    for path, metric in list(evaluators(cfg)):
        split = splits[path.partition("_")[0]]
        if metric["type"].endswith("CocoMetric"):
            metric["ann_file"] = str(root / split.ann_file)
            metric.pop("format_only", None)
            metric.pop("outfile_prefix", None)
        else:
            raise ValueError(
                f"--data {root}: {path} is {metric['type']}, which does not measure on data in COCO's form. Give the "
                f"config {path.partition('.')[0]}=dict(type='CocoMetric', metric='bbox')."
            )
    places = _set_classes(cfg, len(train.classes))
    found = ", ".join(
        f"{name} {split.samples} images with {split.objects} objects ({split.ann_file})"
        for name, split in splits.items()
        if name != "test" or split is not val
    )
    return (
        f"data of {root}: {len(train.classes)} classes ({_some(train.classes)}), {found}; set in {len(places)} heads "
        f"({', '.join(places)}), all data sets and metrics"
    )


def _forget_digits(dataset: dict) -> None:
    """Take out what only our digits sets have, and what of another's files is left."""
    for key in ("seed", "num_train", "num_val", "ann_subdir", "img_subdir", "indices"):
        dataset.pop(key, None)


def _one_data_set(dataset: dict) -> dict:
    """Take a concatenation of several data sets for its first: there is one now."""
    while isinstance(dataset, dict) and isinstance(dataset.get("datasets"), list | tuple):
        dataset = dataset["datasets"][0]
    if isinstance(dataset, dict) and isinstance(dataset.get("dataset"), dict):
        dataset["dataset"] = _one_data_set(dataset["dataset"])
    return dataset


def _find_coco(root: Path, split: str, required: bool) -> Split | None:
    tried = [form.format(name) for name in SPLITS[split] for form in ANNOTATIONS]
    for ann_file, name in ((form.format(name), name) for name in SPLITS[split] for form in ANNOTATIONS):
        if (root / ann_file).is_file():
            return _read_coco(root, ann_file, name)
    if required:
        raise ValueError(
            f"--data {root}: no annotations for {split}. Looked for {', '.join(tried)}. Bring the files into one of "
            f"these layouts: docs/your-data.md."
        )
    return None


def _read_coco(root: Path, ann_file: str, name: str) -> Split:
    content = read_coco(root / ann_file)
    if not content["images"] or not content["annotations"]:
        empty = "images" if not content["images"] else "annotations"
        raise ValueError(f"--data {root}: {ann_file} has no {empty}. Expected at least one of each.")
    first = content["images"][0]["file_name"]
    folders = [form.format(name) for form in (f"{Path(ann_file).parent}", *IMAGES)]
    folder = next((folder for folder in folders if folder != "annotations" and (root / folder / first).is_file()), None)
    if folder is None:
        raise ValueError(
            f"--data {root}: {ann_file} names the image {first!r}, and it is in none of "
            f"{', '.join(str(root / folder) for folder in dict.fromkeys(folders))}."
        )
    return Split(
        ann_file,
        "" if folder == "." else folder,
        classes_of(content),
        len(content["images"]),
        len(content["annotations"]),
        all(annotation.get("segmentation") for annotation in content["annotations"]),
    )


def _set_classes(cfg: Config, number: int) -> list[str]:
    """Set the number of classes of every head, and of the losses that weigh classes."""
    places = []
    for path, part, key, value in list(class_counts(cfg)):
        part[key] = number
        places.append(path.removeprefix("model."))
        for loss in (item for item in part.values() if isinstance(item, dict)):
            weights = loss.get("class_weight")
            if isinstance(weights, list | tuple) and len(weights) in (value, value + 1):
                loss["class_weight"] = [weights[0]] * number + list(weights[value:])
            if loss.get("num_classes") == value:
                loss["num_classes"] = number
    if not places and "language_model" not in cfg.model:
        raise ValueError(
            "--data: no head of this model has a number of classes. It works for detectors and recognizers."
        )
    return places


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f", ... {len(names)} in all" if len(names) > 5 else "")


# --- videos


def _use_videos(cfg: Config, root: Path) -> str:
    named = root / "classes.txt"
    classes = tuple(line.strip() for line in named.read_text().splitlines() if line.strip()) if named.is_file() else ()
    splits, folders = {}, _class_folders(root)
    for split in ("train", "val"):
        found = _find_list(root, split)
        if found is None and folders:
            classes = classes or folders
            found = _write_list(cfg, root, split, classes)
        if found is None:
            tried = [form.format(split) for form in LISTS]
            raise ValueError(
                f"--data {root}: no list of videos for {split}. Looked for {', '.join(tried)} and for folders "
                f"{split}/CLASS/ with videos: docs/your-data.md."
            )
        splits[split] = found
    splits["test"] = _find_list(root, "test") or splits["val"]
    number = len(classes) or 1 + max(max(labels) for _, _, labels in splits.values())
    for loader in LOADERS:
        ann_file, folder, _ = splits[loader.partition("_")[0]]
        dataset = _one_data_set(cfg[loader]["dataset"])
        _, leaf = next(leaves(dataset, loader))
        if leaf["type"] not in ("VideoDataset", "DigitsVideo"):
            raise ValueError(
                f"--data {root}: {loader} has a {leaf['type']}, and --data knows lists of videos only. Take a config "
                f"with VideoDataset, or set its data by hand."
            )
        _forget_digits(leaf)
        leaf.update(type="VideoDataset", ann_file=str(ann_file), data_prefix=dict(video=str(folder)))
        leaf.pop("data_root", None)
        if classes:
            leaf["metainfo"] = dict(classes=classes)
        cfg[loader]["dataset"] = dataset
    places = _set_classes(cfg, number)
    found = ", ".join(f"{name} {len(splits[name][2])} videos ({splits[name][0]})" for name in ("train", "val"))
    return (
        f"data of {root}: {number} classes{f' ({_some(classes)})' if classes else ''}, {found}; set in "
        f"{', '.join(places)} and all data sets"
    )


def _find_list(root: Path, split: str) -> tuple[Path, Path, list[int]] | None:
    for form in LISTS:
        file = root / form.format(split)
        if file.is_file():
            lines = read_list(file)
            if not lines:
                raise ValueError(f"--data {root}: {file} is empty. Expected lines 'path label'.")
            first = lines[0][0]
            folders = [root / form.format(split) for form in VIDEOS]
            folder = next((folder for folder in folders if (folder / first).is_file()), None)
            if folder is None:
                raise ValueError(
                    f"{file} names the video {first!r}, and it is in none of {', '.join(map(str, folders))}."
                )
            return file, folder, [label for _, label in lines]
    return None


def _class_folders(root: Path) -> tuple[str, ...]:
    folder = root / "train"
    return tuple(sorted(part.name for part in folder.iterdir() if part.is_dir())) if folder.is_dir() else ()


def _write_list(cfg: Config, root: Path, split: str, classes: tuple[str, ...]) -> tuple[Path, Path, list[int]] | None:
    """Write the list of a folder per class, as VideoDataset reads it; every process writes the same."""
    folder = root / split
    unknown = (
        sorted({part.name for part in folder.iterdir() if part.is_dir()} - set(classes)) if folder.is_dir() else []
    )
    if unknown:
        raise ValueError(f"--data {root}: {folder / unknown[0]} is no class of {root / 'train'} ({_some(classes)}).")
    lines, labels = [], []
    for label, name in enumerate(classes):
        for video in sorted((folder / name).glob("*")):
            if video.suffix.lower() in VIDEO_ENDINGS:
                if " " in str(video.relative_to(folder)):
                    raise ValueError(f"--data {root}: mmaction2 reads no path with a space: rename {video}.")
                lines.append(f"{video.relative_to(folder)} {label}\n")
                labels.append(label)
    if not lines:
        return None
    file = Path(cfg.work_dir, f"{split}_videos.txt")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text("".join(lines))
    part.replace(file)
    return file.resolve(), folder.resolve(), labels
