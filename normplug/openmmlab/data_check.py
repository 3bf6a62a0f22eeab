"""Whether the data that a config names is there, is what it says, and fits the model: told before anything is built.

The toolkits meet most of these mistakes only after the model is built, in the words of some library, or never: a label
that means another class does not raise.
"""

import sys
from pathlib import Path
from typing import Any

from mmengine.config import Config

from normplug.openmmlab.data_files import CocoFile, empty_files, missing_files, read_coco, read_list, some
from normplug.openmmlab.data_places import LOADERS, class_counts, data_sets, dataset_class, evaluators, is_kind

__all__ = ["check_data"]


def check_data(cfg: Config, loaders: tuple[str, ...] = LOADERS) -> None:
    """Refuse a config whose data is missing, is in another form, or has other classes than the model.

    It looks into data sets of mmdet that read COCO's json and mmaction2's VideoDataset and RawframeDataset, in wrappers
    too, and leaves alone those that read or make their files in a way of their own, or from elsewhere than a disk; of
    our digits that are still to be made it looks at the classes. What may be meant is told on stderr only.

    Args:
        cfg: A config as it will be run.
        loaders: The data loaders that it will use.

    Raises:
        FileNotFoundError: If a folder, annotations, a list, images or videos are missing.
        ValueError: If what the files say does not fit the config.
    """
    for path, dataset in data_sets(cfg):
        if not path.startswith(loaders):
            continue
        kind = dataset_class(cfg, dataset)
        split = path.partition("_")[0]
        if _makes_its_files(kind, dataset):
            _check_counts(cfg, path, _classes(path, dataset, kind))
            continue
        if not _reads_as_usual(kind, dataset):
            continue
        if is_kind(kind, "CocoDataset"):
            _check_coco(cfg, split, path, dataset, kind)
        else:
            _check_videos(cfg, split, path, dataset, kind)


def _reads_as_usual(kind: type | None, dataset: dict) -> bool:
    """Whether a data set is one of the known kinds, with nothing in between it and its files."""
    if dict(dataset.get("backend_args") or {}).get("backend", "local") != "local":
        return False
    for name in ("CocoDataset", "VideoDataset", "RawframeDataset"):
        if is_kind(kind, name):
            base = next(base for base in kind.__mro__ if base.__name__ == name)
            own = kind.__init__ is not base.__init__ and not _is_ours(kind)
            return kind.load_data_list is base.load_data_list and not own
    return False


def _is_ours(kind: type | None) -> bool:
    return getattr(kind, "__module__", "").startswith("normplug.")


def _makes_its_files(kind: type | None, dataset: dict) -> bool:
    """Whether the files will be made when the data set is built, as those of our digits on first use."""
    return _is_ours(kind) and not Path(dataset.get("data_root") or "", dataset.get("ann_file") or "").is_file()


# --- boxes and masks


def _check_coco(cfg: Config, split: str, path: str, dataset: dict, kind: type) -> None:
    root = dataset.get("data_root") or ""
    if root and not Path(root).is_dir():
        raise FileNotFoundError(f"{path}.data_root: there is no folder {root}; {_remedy(split)}.")
    file = _present(f"{path}.ann_file", root, dataset.get("ann_file"), split)
    folder = _present(f"{path}.data_prefix.img", root, (dataset.get("data_prefix") or {}).get("img", ""), split, True)
    classes = _classes(path, dataset, kind)
    metrics = [
        (name, metric)
        for name, metric in evaluators(cfg)
        if name.startswith(f"{split}_") and metric["type"].rpartition(".")[2] == "CocoMetric"
    ]
    for name, metric in metrics:
        if metric.get("ann_file") and not Path(metric["ann_file"]).is_file():
            raise FileNotFoundError(f"{name}.ann_file: there is no file {metric['ann_file']}; {_remedy(split)}.")
    content = read_coco(file)
    _check_classes(path, dataset, classes, content)
    _check_counts(cfg, path, classes)
    measures = [metric for _, metric in metrics if not metric.get("format_only")]
    if split == "train" or measures:
        _check_annotated(split, path, dataset, classes, content, measures)
    for name, metric in metrics:
        if metric.get("ann_file"):
            _check_same(name, read_coco(metric["ann_file"]), path, content)
    names = [name for _, name in content.images]
    if missing := sorted(missing_files(folder, names)):
        raise FileNotFoundError(
            f"{len(missing)} of the {len(names)} images in {file} are not in {folder}, the first is {missing[0]!r}: "
            f"put them there, or set {path}.data_prefix."
        )
    _check_not_empty(file, folder, names, "images")


def _check_counts(cfg: Config, path: str, classes: tuple[str, ...]) -> None:
    """Refuse a model whose heads have another number of classes than the data."""
    if wrong := [f"{place}.{key}={value}" for place, _, key, value in class_counts(cfg) if value != len(classes)]:
        raise ValueError(
            f"{path} has {len(classes)} classes ({some(classes)}), and the model has {some(wrong, 20)}: set "
            f"{'it' if len(wrong) == 1 else 'them'} to {len(classes)}, or {_ALL_PLACES}."
        )


def _check_not_empty(file: Path, folder: Path, names: list[str] | tuple[str, ...], what: str) -> None:
    if empty := empty_files(folder, names):
        raise ValueError(
            f"{len(empty)} of the {len(names)} {what} in {file} are empty (0 bytes), the first is "
            f"{str(folder / min(empty))!r}: put the whole files there, or take them out of the list."
        )


_ALL_PLACES = "set all places at once with --data FOLDER (docs/your-data.md)"


def _remedy(split: str) -> str:
    return f"set it for {split}, or {_ALL_PLACES}"


def _present(name: str, root: str, value: Any, split: str, folder: bool = False) -> Path:
    """Return the path that a setting stands for, if it is there."""
    if not isinstance(value, str) or not (value or folder):
        raise ValueError(f"{name} is {value!r}, expected a path; {_remedy(split)}.")
    path = Path(root, value)
    if not (path.is_dir() if folder else path.is_file()):
        what = "folder" if folder else "file"
        raise FileNotFoundError(f"{name}: there is no {what} {path}; {_remedy(split)}.")
    return path


def _classes(path: str, dataset: dict, kind: type) -> tuple[str, ...]:
    metainfo = dataset.get("metainfo") or {}
    classes = metainfo.get("classes", kind.METAINFO.get("classes"))
    if isinstance(classes, str):
        if not Path(classes).is_file():
            raise ValueError(
                f"{path}.metainfo.classes is the text {classes!r}, expected a tuple: write ({classes!r},), with comma."
            )
        classes = Path(classes).read_text().split("\n")
        classes = [name.strip("\r") for name in classes if name]
    if not classes:
        raise ValueError(f"{path}.metainfo has no classes: write metainfo=dict(classes=('first', 'second')).")
    return tuple(classes)


def _check_classes(path: str, dataset: dict, classes: tuple[str, ...], content: CocoFile) -> None:
    absent = [name for name in classes if name not in content.names]
    metainfo = dataset.get("metainfo") or {}
    if absent and "classes" not in metainfo:
        wrong = " (CLASSES is not read)" if "CLASSES" in metainfo else ""
        raise ValueError(
            f"{path} has no metainfo.classes{wrong} and so those of {dataset['type']} ({some(classes, 3)}), "
            f"and {content.path} has {len(content.names)} ({some(content.names)}): write "
            f"metainfo=dict(classes={content.names}), and {len(content.names)} for each num_classes, or "
            f"{_ALL_PLACES}."
        )
    if absent:
        raise ValueError(
            f"{path}.metainfo.classes has {some(map(repr, absent))}, and {content.path} has no such category, but "
            f"{some(map(repr, content.names))}."
        )
    order = tuple(name for name in content.names if name in classes)
    if order != classes:
        raise ValueError(
            f"{path}.metainfo.classes is {classes}, and {content.path} has them in the order {order}: write them in "
            f"that order, for a label is a category's place in the file."
        )
    if others := [name for name in content.names if name not in classes and content.boxes[name]]:
        print(f"normplug: {path} leaves out {some(others)} of {content.path}", file=sys.stderr)


def _check_annotated(
    split: str, path: str, dataset: dict, classes: tuple[str, ...], content: CocoFile, metrics: list[dict]
) -> None:
    boxes = sum(content.boxes[name] for name in classes)
    if not boxes:
        raise ValueError(
            f"{content.path} has {'no' if content.annotated else 'no list of'} annotations of the classes "
            f"{some(classes)}: expected boxes for {path}."
        )
    if split == "train":
        _tell_odd_boxes(content, boxes)
    steps = dataset.get("pipeline") or ()
    measured = [name for metric in metrics for name in _as_list(metric.get("metric", "bbox"))]
    wants = "segm" in measured if split != "train" else any(step.get("with_mask") for step in steps)
    if wants and content.masks < boxes:
        raise ValueError(
            f"{content.path} has no mask (segmentation) in {boxes - content.masks} of {boxes} annotations, and {path} "
            f"is for a model with masks: add them, or train a model of boxes, such as Faster R-CNN."
        )
    if wants and content.shapeless:
        sentence = (
            f"{len(content.shapeless)} of the {boxes} masks in {content.path} have no polygon of 3 corners or more, "
            f"the first is annotation {content.shapeless[0]['id']}: expected [[x1, y1, x2, y2, x3, y3, ...]]"
        )
        if len(content.shapeless) == boxes:
            raise ValueError(f"{sentence}.")
        print(f"normplug: {sentence}; they are not trained on", file=sys.stderr)


def _tell_odd_boxes(content: CocoFile, used: int) -> None:
    for odd, least, what in (
        (content.unused, 0, "are not trained on: they have no width, height or area, or lie outside of their image"),
        (content.beyond, used / 10, "reach beyond their image: is their form [x1, y1, x2, y2]"),
    ):
        if len(odd) > least:
            print(
                f"normplug: {len(odd)} of the boxes in {content.path} ({used} are used) {what}; the first is "
                f"annotation {odd[0]['id']}, {odd[0]['bbox']}, expected [x, y, width, height] in pixels",
                file=sys.stderr,
            )


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _check_same(name: str, compared: CocoFile, path: str, content: CocoFile) -> None:
    """Refuse an evaluator that compares with other images, or numbers the classes in another way."""
    if compared.path.resolve() == content.path.resolve():
        return
    strangers = content.images - compared.images
    if strangers or compared.names != content.names:
        wrong = (
            f"{len(strangers)} of {len(content.images)} images are not in it"
            if strangers
            else f"its categories are {some(compared.names)}"
        )
        raise ValueError(
            f"{name}.ann_file is {compared.path}, and {path} reads {content.path} ({wrong}): both must be one file."
        )


# --- videos


def _check_videos(cfg: Config, split: str, path: str, dataset: dict, kind: type) -> None:
    frames = is_kind(kind, "RawframeDataset")
    root = dataset.get("data_root") or ""
    file = _present(f"{path}.ann_file", root, dataset.get("ann_file"), split)
    prefix = (dataset.get("data_prefix") or {}).get("img" if frames else "video") or ""
    folder = _present(f"{path}.data_prefix", root, prefix, split, True)
    multi_class = bool(dataset.get("multi_class"))
    content = read_list(
        file,
        delimiter=" " if frames else dataset.get("delimiter", " "),
        frames=frames,
        multi_class=multi_class,
        offset=bool(dataset.get("with_offset")),
    )
    classes = (dataset.get("metainfo") or {}).get("classes", kind.METAINFO.get("classes"))
    largest = max(content.labels)
    counts = [(f"{place}.{key}", value) for place, _, key, value in class_counts(cfg)]
    if multi_class:
        counts.append((f"{path}.num_classes", dataset.get("num_classes") or 0))
    for name, value in counts:
        if classes and value != len(classes):
            raise ValueError(
                f"{name}={value}, and {path} has {len(classes)} classes ({some(classes)}): write {len(classes)}."
            )
        if largest >= value:
            number = sum(count for label, count in content.labels.items() if label >= value)
            raise ValueError(
                f"{file} has the label {largest}, and {name}={value}: labels go from 0 to {value - 1}, and {number} of "
                f"{content.labels.total()} are larger; write the number of classes there, or use --data FOLDER."
            )
    if missing := missing_files(folder, content.names):
        raise FileNotFoundError(
            f"{len(missing)} of the {len(content.names)} {'folders' if frames else 'videos'} in {file} are not in "
            f"{folder}, the first is {missing[0]!r}: put them there, or set {path}.data_prefix."
        )
    if not frames:
        _check_not_empty(file, folder, content.names, "videos")
    if split == "train":
        for name, value in counts:
            if absent := [label for label in range(value) if label not in content.labels]:
                print(
                    f"normplug: {name}={value}, and no video in {file} has one of {len(absent)} of these labels "
                    f"({some(absent)}); if there are fewer classes, write their number there, or use --data FOLDER",
                    file=sys.stderr,
                )
