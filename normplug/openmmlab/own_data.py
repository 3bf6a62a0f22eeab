"""A config of somebody else's data made one for your own: every place that names classes or files, at once.

A detector of mmdet says in about twelve places what its data are: the root, the annotation file and the folder of each
data set, the classes of each, the number of classes of every head, the file of each metric. ``use_data`` finds out from
the folder and sets them all. ``normplug.openmmlab.data_check`` finds what somebody forgot who set them by hand.
"""

import copy
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config, ConfigDict

from normplug.openmmlab.data_files import CocoFile, missing_files, read_coco, read_list, some
from normplug.openmmlab.data_places import LOADERS, class_counts, dataset_class, evaluators, is_kind, leaves

__all__ = ["use_data"]

SPLITS = {
    "train": ("train2017", "train"),
    "val": ("val2017", "val", "valid", "validation"),
    "test": ("test2017", "test"),
}
# Where the annotations of a split are looked for, and where its images, the first that has them.
ANNOTATIONS = ("annotations/instances_{}.json", "annotations/{}.json", "{}.json", "{}/_annotations.coco.json")
IMAGES = ("{}", "images/{}", "{}/images", "images", "")
# Of videos, or of folders with frames ("rawframes"), the second in braces.
LISTS = ("kinetics*_{0}_list_{1}.txt", "{0}_list_{1}.txt", "{0}_{1}.txt", "{0}_list.txt", "{0}.txt")
VIDEOS = ("{1}_{0}", "{0}", "{1}/{0}", "{1}", "")
VIDEO_ENDINGS = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".mpg", ".mpeg", ".m4v")
# What stays of the settings of a data set of boxes when its files become others.
KEPT = (
    "pipeline",
    "test_mode",
    "filter_cfg",
    "serialize_data",
    "lazy_init",
    "max_refetch",
    "return_classes",
    "_scope_",
)


class Images(NamedTuple):
    """One part of a data set of images: its annotations, and the folder of the images below the root."""

    file: CocoFile
    folder: str


class Videos(NamedTuple):
    """One part of a data set of videos: the list, the folder that its paths begin in, and how many have each label."""

    ann_file: Path
    folder: Path
    labels: Counter
    delimiter: str = " "

    @property
    def samples(self) -> int:
        return self.labels.total()


def use_data(cfg: Config, root: str | Path) -> str:
    """Have a config train, validate and test on the data in a folder, in place.

    Detection: COCO's own layout (``annotations/instances_train2017.json``, ``train2017/``), the same without 2017,
    ``train.json`` and ``val.json`` with ``train/`` and ``val/`` or ``images/``, and Roboflow's
    ``train/_annotations.coco.json``. Video: Kinetics' layout (``kinetics400_train_list_videos.txt``,
    ``videos_train/``), ``train.txt`` and ``val.txt`` with lines ``path label``, or ``train/CLASS/*.mp4`` and
    ``val/CLASS/*.mp4``, for which lists are written into the work dir; for a config that reads frames, lists of
    ``folder frames label``. A ``classes.txt``, one name a line, names the
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
    has_test = splits["test"] is not None and splits["test"].file.annotated
    if not has_test:
        splits["test"] = val
    classes = _classes_of([split.file for split in splits.values()])
    steps = [
        step for loader in LOADERS for _, leaf in leaves(cfg[loader]["dataset"], "") for step in _annotations(leaf)
    ]
    if any(step.get("with_seg") for step in steps):
        raise ValueError(
            f"--data {root}: this config also reads a map of the whole image, and --data knows boxes and masks of "
            f"objects only. Take another config, or set its data by hand."
        )
    for loader in LOADERS:
        dataset = _one_data_set(cfg[loader]["dataset"])
        split = splits[loader.partition("_")[0]]
        _, leaf = next(leaves(dataset, loader))
        kept = {key: leaf[key] for key in KEPT if key in leaf}
        leaf.clear()
        leaf.update(
            ConfigDict(
                type="CocoDataset",
                data_root=str(root),
                ann_file=str(split.file.path.relative_to(root)),
                data_prefix=dict(img=split.folder),
                metainfo=dict(classes=classes),
                **kept,
            )
        )
        cfg[loader]["dataset"] = dataset
    for name in ("val", "test"):
        cfg[f"{name}_evaluator"] = _measured_with(cfg, name, splits[name].file.path)
    _check_masks(cfg, root, [split.file for split in splits.values()])
    places = _set_classes(cfg, len(classes))
    found = ", ".join(
        f"{name} {len(split.file.images)} images with {sum(split.file.boxes.values())} objects "
        f"({split.file.path.relative_to(root)})"
        for name, split in splits.items()
        if name != "test" or has_test
    )
    without = [name for name in classes if not train.file.boxes[name]]
    return (
        f"data of {root}: {len(classes)} classes ({some(classes)}), {found}"
        f"{f', no object to train on of {some(without)}' if without else ''}; set in {len(places)} "
        f"{'head' if len(places) == 1 else 'heads'} ({', '.join(places)}), all data sets and metrics"
    )


def _annotations(dataset: dict) -> list[dict]:
    return [step for step in dataset.get("pipeline") or [] if "LoadAnnotations" in str(step.get("type"))]


def _classes_of(files: list[CocoFile]) -> tuple[str, ...]:
    """Return the classes that all files have, in their order, which is that of mmdet's labels.

    Roboflow's first category is the name of the project, all others' supercategory and without objects: it is no class.
    """
    first = files[0]
    for file in files:
        if file.names != first.names:
            raise ValueError(
                f"{file.path} has the categories {some(file.names)}, and {first.path} has {some(first.names)}. "
                f"Expected the same categories in the same order in all files: a label is a category's place there."
            )
    is_group = first.names[0] == first.group and not any(file.boxes[first.group] for file in files)
    return first.names[1:] if is_group else first.names


def _check_masks(cfg: Config, root: Path, files: list[CocoFile]) -> None:
    measured = any("segm" in str(metric.get("metric")) for _, metric in evaluators(cfg))
    for file in files:
        if (measured or "mask_head" in str(cfg.model)) and file.masks < sum(file.boxes.values()):
            raise ValueError(
                f"--data {root}: the model predicts masks, and {file.path} has annotations without a segmentation. "
                f"Take a detector of boxes, such as configs/faster_rcnn/, or add polygons or RLE to the file."
            )


def _measured_with(cfg: Config, split: str, file: Path) -> list[dict] | dict:
    """Return the metrics of a split with another file; those that belong to another data set give way to COCO's."""
    own = [metric for path, metric in evaluators(cfg) if path.startswith(split)]
    kept = [metric for metric in own if metric["type"].startswith("Dump")]
    coco = [metric for metric in own if metric["type"].rpartition(".")[2] == "CocoMetric"]
    if not coco:
        masks = any(
            step.get("with_mask") for _, leaf in leaves(cfg.train_dataloader.dataset, "") for step in _annotations(leaf)
        )
        coco = [ConfigDict(type="CocoMetric", metric=["bbox", "segm"] if masks else "bbox")]
    for metric in coco:
        metric["ann_file"] = str(file)
        metric.pop("format_only", None)
        metric.pop("outfile_prefix", None)
    return coco[0] if len(coco + kept) == 1 else [*coco, *kept]


def _one_data_set(dataset: dict) -> dict:
    """Take a concatenation of several data sets for its first: there is one now."""
    while isinstance(dataset, dict) and isinstance(dataset.get("datasets"), list | tuple):
        dataset = dataset["datasets"][0]
    if isinstance(dataset, dict) and isinstance(dataset.get("dataset"), dict):
        dataset["dataset"] = _one_data_set(dataset["dataset"])
    return dataset


def _find_coco(root: Path, split: str, required: bool) -> Images | None:
    tried = [(form.format(name), name) for name in SPLITS[split] for form in ANNOTATIONS]
    for ann_file, name in tried:
        if (root / ann_file).is_file():
            file = read_coco(root / ann_file)
            return Images(file, _folder_of(root, name, file))
    if required:
        raise ValueError(
            f"--data {root}: no annotations for {split}. Looked for {', '.join(file for file, _ in tried)}. Bring the "
            f"files into one of these layouts: docs/your-data.md."
        )
    return None


def _folder_of(root: Path, name: str, file: CocoFile) -> str:
    """Return the folder below the root that has the first image of a file."""
    _, first = min(file.images)
    beside = file.path.parent.relative_to(root)
    folders = dict.fromkeys(["" if str(beside) == "." else str(beside), *(form.format(name) for form in IMAGES)])
    for folder in folders:
        if folder != "annotations" and (root / folder / first).is_file():
            return folder
    raise ValueError(
        f"--data {root}: {file.path} names the image {first!r}, and it is in none of "
        f"{', '.join(str(root / folder) for folder in folders)}."
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


# --- videos


def _use_videos(cfg: Config, root: Path) -> str:
    kinds = [dataset_class(cfg, leaf) for loader in LOADERS for _, leaf in leaves(cfg[loader]["dataset"], "")]
    frames = all(is_kind(kind, "RawframeDataset") for kind in kinds)
    if not frames and not all(is_kind(kind, "VideoDataset") for kind in kinds):
        raise ValueError(
            f"--data {root}: this config reads {some(dict.fromkeys(kind.__name__ for kind in kinds if kind))}, and "
            f"--data knows lists of videos and of frames only. Take a config with VideoDataset or RawframeDataset, or "
            f"set its data by hand."
        )
    named = root / "classes.txt"
    classes = tuple(line.strip() for line in named.read_text().splitlines() if line.strip()) if named.is_file() else ()
    splits = {split: _find_list(root, split, frames) for split in SPLITS}
    folders = {split: _class_folders(root, split) for split in SPLITS}
    if splits["train"] is None and folders["train"] and not frames:
        classes = classes or tuple(folders["train"])
        splits = {split: _write_list(cfg, root, split, folders[split], classes) for split in SPLITS}
    for split in ("train", "val"):
        if splits[split] is None:
            what = "rawframes" if frames else "videos"
            raise ValueError(
                f"--data {root}: no list of {what} for {split}. Looked for "
                f"{', '.join(form.format(split, what) for form in LISTS)}"
                f"{'' if frames else f' and for folders {split}/CLASS/ with videos'}: docs/your-data.md."
            )
    has_test = splits["test"] is not None
    splits["test"] = splits["test"] or splits["val"]
    number = len(classes) or 1 + max(max(split.labels) for split in splits.values())
    untrained = _check_labels(root, splits, classes, number)
    for loader in LOADERS:
        split = splits[loader.partition("_")[0]]
        dataset = _one_data_set(cfg[loader]["dataset"])
        _, leaf = next(leaves(dataset, loader))
        _forget_another_set(leaf)
        leaf.update(
            type="RawframeDataset" if frames else "VideoDataset",
            ann_file=str(split.ann_file),
            data_prefix=ConfigDict({"img" if frames else "video": str(split.folder)}),
        )
        if split.delimiter != " ":
            leaf["delimiter"] = split.delimiter
        if classes:
            leaf["metainfo"] = ConfigDict(classes=classes)
        cfg[loader]["dataset"] = dataset
    places = _set_classes(cfg, number)
    found = ", ".join(
        f"{name} {split.samples} videos ({split.ann_file})"
        for name, split in splits.items()
        if name != "test" or has_test
    )
    return (
        f"data of {root}: {number} classes{f' ({some(classes)})' if classes else ''}, {found}"
        f"{f', no video to train on of {some(untrained)}' if untrained else ''}; set in {', '.join(places)} "
        f"and all data sets"
    )


def _forget_another_set(dataset: dict) -> None:
    """Take out what only our digits sets have, and what of another's files is left."""
    for key in ("seed", "num_train", "num_val", "indices", "data_root", "multi_class", "num_classes", "delimiter"):
        dataset.pop(key, None)


def _check_labels(root: Path, splits: dict[str, Videos], classes: tuple[str, ...], number: int) -> list[str]:
    """Refuse labels without a class, and gaps where nothing names the classes; return those that no video trains."""
    for split in splits.values():
        if max(split.labels) >= number:
            raise ValueError(
                f"--data {root}: {split.ann_file} has the label {max(split.labels)}, and classes.txt names {number} "
                f"classes, for labels from 0 to {number - 1}."
            )
    absent = [label for label in range(number) if label not in splits["train"].labels]
    if absent and not classes:
        raise ValueError(
            f"--data {root}: {splits['train'].ann_file} has no video of label {some(absent)}, and there are labels "
            f"up to {number - 1}. Number the classes from 0 without a gap, or name all of them in {root}/classes.txt."
        )
    return [classes[label] for label in absent]


def _find_list(root: Path, split: str, frames: bool) -> Videos | None:
    what = "rawframes" if frames else "videos"
    files = [file for name in SPLITS[split] for form in LISTS for file in sorted(root.glob(form.format(name, what)))]
    if not files:
        return None
    content = read_list(files[0], frames=frames)
    folders = [root / form.format(name, what) for name in SPLITS[split] for form in VIDEOS]
    folder = next((folder for folder in folders if not missing_files(folder, content.names[:1])), None)
    if folder is None:
        raise ValueError(
            f"{files[0]} names {content.names[0]!r}, and it is in none of "
            f"{', '.join(map(str, dict.fromkeys(folders)))}."
        )
    return Videos(files[0], folder, content.labels)


def _class_folders(root: Path, split: str) -> dict[str, Path]:
    """Return the folder of each class of a split."""
    place = next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)
    return {part.name: part for part in sorted(place.iterdir()) if part.is_dir()} if place is not None else {}


def _write_list(
    cfg: Config, root: Path, split: str, folders: dict[str, Path], classes: tuple[str, ...]
) -> Videos | None:
    """Write the list of a folder per class, with tabs, since paths may have spaces; every process writes the same."""
    if unknown := sorted(set(folders) - set(classes)):
        raise ValueError(f"--data {root}: {folders[unknown[0]]} is none of the classes {some(classes)}.")
    lines, labels = [], Counter()
    for label, name in enumerate(classes):
        videos = sorted(folders[name].rglob("*")) if name in folders else []
        videos = [video.relative_to(root) for video in videos if video.suffix.lower() in VIDEO_ENDINGS]
        lines += [f"{video}\t{label}\n" for video in videos]
        labels[label] += len(videos)
    if not lines:
        return None
    file = Path(cfg.work_dir, f"{split}_videos.txt")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text("".join(lines))
    part.replace(file)
    return Videos(file.resolve(), root.resolve(), +labels, "\t")
