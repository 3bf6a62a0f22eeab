"""What the files of a data set say: annotations in COCO's json, and mmaction2's lists of videos and frames.

They are read as the toolkits read them, and every fault that the toolkits would meet later, or pass over, is named here
in one sentence.
"""

import functools
import gc
import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CocoFile", "VideoList", "empty_files", "missing_files", "read_coco", "read_list", "some"]

COCO_FORM = "COCO's json is an object with the lists images, annotations and categories"


@dataclass(frozen=True)
class CocoFile:
    """A file of annotations in COCO's form, summed up.

    Attributes:
        path: Where it is.
        names: The categories' names in the order of the file, which is the order of mmdet's labels.
        group: The supercategory that all categories but the first have, if it is one.
        images: Id and file name of each image.
        annotated: Whether there is a list of annotations; COCO's test-dev has none.
        boxes: How many boxes of each category mmdet would use.
        masks: How many of these have a mask.
        unused: Boxes that mmdet leaves out though nothing marks them so: without width, height or area, or outside of
            their image.
        beyond: Boxes that reach more than a pixel beyond their image.
        shapeless: Annotations whose polygons are none, of less than three corners: mmdet trains on no mask of theirs.
    """

    path: Path
    names: tuple[str, ...]
    group: str | None
    images: frozenset[tuple[int, str]]
    annotated: bool
    boxes: dict[str, int]
    masks: int
    unused: tuple[dict, ...]
    beyond: tuple[dict, ...]
    shapeless: tuple[dict, ...]


@dataclass(frozen=True)
class VideoList:
    """A list of videos or of folders with frames.

    Attributes:
        path: Where it is.
        names: Path of each video, as it stands there.
        labels: All labels, several per video where it has several, and how many videos have each.
    """

    path: Path
    names: tuple[str, ...]
    labels: Counter[int]


def some(things: Iterable, limit: int = 5) -> str:
    """Return the first of these as text, and how many more there are."""
    texts = [str(thing) for thing in things]
    more = len(texts) - limit
    return ", ".join(texts[:limit]) + (f" and {more} more" if more > 0 else "")


def missing_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Return which of these files are not in the folder; it is listed, since a look at each takes longer."""
    by_folder = defaultdict(list)
    for name in names:
        path = os.path.join(folder, name)
        by_folder[os.path.dirname(path)].append((os.path.basename(path), name))
    missing = []
    for place, wanted in by_folder.items():
        present = set(os.listdir(place)) if os.path.isdir(place) else set()
        missing += [name for base, name in wanted if base not in present]
    return missing


def empty_files(folder: Path, names: Iterable[str], seconds: float = 3.0) -> list[str]:
    """Return which of these files have no bytes, as far as that is seen in some seconds: each costs a look at the disk.

    COCO's 118,000 images take one second on a local disk; of slower ones the first files are looked at.
    """
    end, empty = time.monotonic() + seconds, []
    by_place = defaultdict(set)
    for name in names:
        path = os.path.join(folder, name)
        by_place[os.path.dirname(path)].add(os.path.basename(path))
    for place, wanted in by_place.items():
        for entry in os.scandir(place):
            if time.monotonic() > end:
                return empty
            if entry.name in wanted and not entry.is_dir() and entry.stat().st_size == 0:
                empty.append(os.path.relpath(entry.path, folder))
    return empty


# --- COCO's json


def read_coco(path: str | Path) -> CocoFile:
    """Read annotations in COCO's form; a file that has not changed is read once.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not COCO's json, or contradicts itself.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no annotation file {path}.")
    status = path.stat()
    return _read_coco(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read_coco(path: Path, size: int, changed: int) -> CocoFile:
    collects = gc.isenabled()
    gc.disable()  # millions of new dicts and none to free: the collector would take half of the time
    try:
        if size == 0:
            raise ValueError(f"{path} is empty (0 bytes); expected: {COCO_FORM}.")
        return _summary(path, json.loads(path.read_bytes()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not json ({error}); expected: {COCO_FORM}.") from error
    finally:
        if collects:
            gc.enable()


def _summary(path: Path, content: object) -> CocoFile:
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} at its top; {COCO_FORM}.")
    for key in ("images", "categories", "annotations"):
        if not isinstance(content.get(key, []), list) or (key != "annotations" and not content.get(key)):
            raise ValueError(f"{path} has no {key!r}, or they are not a list; {COCO_FORM}.")
    images, categories = content["images"], content["categories"]
    _check_entries(path, "images", images, ("id", "file_name", "height", "width"))
    _check_entries(path, "categories", categories, ("id", "name"))
    names = {category["id"]: category["name"] for category in categories}
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise ValueError(f"{path} has several categories of the same name: {some(twice)}; give each a name of its own.")
    annotations = content.get("annotations", [])
    _check_annotations(path, annotations, {image["id"] for image in images}, names)
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    for number, (width, height) in enumerate(sizes.values()):
        if not (isinstance(width, int | float) and isinstance(height, int | float) and width > 0 and height > 0):
            raise ValueError(f"{path}: images[{number}] has width={width!r}, height={height!r}; expected pixels.")
    used = [annotation for annotation in annotations if _is_used(annotation, *sizes[annotation["image_id"]])]
    if annotations and not used:
        raise ValueError(
            f"{path} has {len(annotations)} annotations and no box that can be used, the first is "
            f"{annotations[0]['bbox']}: expected is [x, y, width, height] in pixels, inside the image and at least one "
            f"pixel wide and high."
        )
    groups = {category.get("supercategory") for category in categories[1:]}
    return CocoFile(
        path,
        tuple(names.values()),
        groups.pop() if len(groups) == 1 else None,
        frozenset((image["id"], image["file_name"]) for image in images),
        "annotations" in content,
        dict.fromkeys(names.values(), 0) | Counter(names[annotation["category_id"]] for annotation in used),
        sum(bool(annotation.get("segmentation")) for annotation in used),
        tuple(a for a in annotations if _is_lost(a, *sizes[a["image_id"]])) if len(used) < len(annotations) else (),
        tuple(a for a in used if _is_beyond(a["bbox"], *sizes[a["image_id"]])),
        tuple(a for a in used if _is_shapeless(a.get("segmentation"))),
    )


def _check_entries(path: Path, what: str, entries: Sequence, keys: Sequence[str]) -> None:
    ids = set()
    for number, entry in enumerate(entries):
        lacks = [key for key in keys if key not in entry] if isinstance(entry, dict) else keys
        if lacks:
            raise ValueError(f"{path}: {what}[{number}] has no {lacks[0]!r}; {what} have {', '.join(keys)}.")
        ids.add(entry["id"])
    if len(ids) < len(entries):
        raise ValueError(f"{path}: {len(entries) - len(ids)} of {len(entries)} {what} have an id that another has.")


def _check_annotations(path: Path, annotations: list, images: set, names: dict) -> None:
    _check_entries(path, "annotations", annotations, ("id", "image_id", "category_id", "bbox", "area"))
    for key, known, whose in (("category_id", names, "category"), ("image_id", images, "image")):
        if strays := [annotation for annotation in annotations if annotation[key] not in known]:
            raise ValueError(
                f"{path}: {len(strays)} of {len(annotations)} annotations have a {key} that no {whose} of the file "
                f"has, the first is {strays[0][key]!r}; the ids of the {len(known)} there are "
                f"{some(sorted(known, key=_in_order))}."
            )
    for number, annotation in enumerate(annotations):
        box = annotation["bbox"]
        is_box = isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)
        if not is_box or not math.isfinite(sum(box)):
            raise ValueError(
                f"{path}: annotations[{number}] has bbox={box!r}, expected [x, y, width, height], finite and in pixels."
            )
        if not isinstance(annotation["area"], int | float):
            raise ValueError(f"{path}: annotations[{number}] has area={annotation['area']!r}, expected a number.")


def _in_order(value: object) -> tuple[str, object]:
    return type(value).__name__, value  # ids of a damaged file may be numbers and texts


def _is_used(annotation: dict, width: float, height: float) -> bool:
    """Whether mmdet's CocoDataset keeps this annotation."""
    x, y, w, h = annotation["bbox"]
    inside = max(0, min(x + w, width) - max(x, 0)) * max(0, min(y + h, height) - max(y, 0))
    return not annotation.get("ignore") and inside > 0 and annotation["area"] > 0 and w >= 1 and h >= 1


def _is_lost(annotation: dict, width: float, height: float) -> bool:
    """Whether mmdet leaves out an annotation that was meant; one narrower than a pixel is left out with reason."""
    x, y, w, h = annotation["bbox"]
    inside = x < width and y < height and x + w > 0 and y + h > 0
    return not annotation.get("ignore") and not (w > 0 and h > 0 and annotation["area"] > 0 and inside)


def _is_shapeless(segmentation: object) -> bool:
    if not segmentation or not isinstance(segmentation, list):
        return False
    return not any(isinstance(polygon, list) and len(polygon) >= 6 for polygon in segmentation)


def _is_beyond(box: list[float], width: float, height: float) -> bool:
    x, y, w, h = box
    return x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1


# --- lists of videos


def read_list(
    path: str | Path, *, delimiter: str = " ", frames: bool = False, multi_class: bool = False, offset: bool = False
) -> VideoList:
    """Read a list of videos, "path label", or of folders with frames, "path frames label".

    Args:
        path: The list.
        delimiter: What stands between path and label.
        frames: Whether it is a list of folders with frames.
        multi_class: Whether a video may have several labels.
        offset: Whether the number of the first frame stands before that of frames.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line has another form.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no list {path}.")
    numbers = (["first frame"] if offset else []) + (["number of frames"] if frames else []) + ["label"]
    form = delimiter.join(["path", *numbers])
    names, labels = [], Counter()
    for number, line in enumerate(path.read_text().splitlines(), 1):
        name, *words = line.strip().split(delimiter)
        wrong = f"{path}, line {number}: {line.strip()!r} is not {form!r}: "
        if not line.strip():
            raise ValueError(f"{path}, line {number}, is empty; expected {form!r} in each line.")
        if len(words) < len(numbers):
            other = next((sep for sep in (",", ";", "\t", " ") if sep != delimiter and sep in line), None)
            hint = f"; write {delimiter!r} instead of {other!r}" if other else ""
            raise ValueError(f"{wrong}the {numbers[len(words)]} is missing{hint}.")
        if len(words) > len(numbers) and not multi_class:
            raise ValueError(
                f"{wrong}it has {len(words) + 1} parts; a path that contains {delimiter!r} needs another delimiter, in "
                f"the file and in the config (dataset.delimiter='\\t')."
            )
        for word, meaning in zip(words, [*numbers, *["label"] * len(words)], strict=False):
            if not word.isdecimal():
                raise ValueError(f"{wrong}the {meaning} is {word!r}, and must be a whole number, 0 or more.")
        names.append(name)
        labels.update(map(int, words[len(numbers) - 1 :]))
    if not names:
        raise ValueError(f"{path} is empty; expected {form!r} in each line.")
    return VideoList(path, tuple(names), labels)
