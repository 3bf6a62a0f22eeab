"""Two small data sets of real handwritten digits, made from what scikit-learn's wheel carries.

`detection`: images with two to six digits on textured ground, a COCO json with exact instance masks.
`video`: mp4 clips in which one digit moves in one of eight ways, a Kinetics-style list.

Both come from `sklearn.datasets.load_digits` (1,797 images of 8x8 pixels, no download). A set depends on
its parameters alone: sample i of a split is drawn from its own random stream, so that a longer set begins
with the shorter one. The digits of the val part are never drawn for the train part.

    <root>/detection/{manifest.json, train.json, val.json, train/*.png, val/*.png}
    <root>/video/{manifest.json, train.txt, val.txt, train/*.mp4, val/*.mp4}
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from pycocotools import mask as rle
from scipy import ndimage

__all__ = ["CLASSES", "DEFAULTS", "MOTIONS", "TASKS", "make", "source_split"]

CLASSES = tuple("0123456789")
# Motion -> which of y, x, angle and scale it turns, and how far: 1 is about two thirds of its circle in a clip.
_MOVES = {
    "left": (1, -1),
    "right": (1, 1),
    "up": (0, -1),
    "down": (0, 1),
    "clockwise": (2, 0.6),
    "counterclockwise": (2, -0.6),
    "grow": (3, 1),
    "shrink": (3, -1),
}
MOTIONS = tuple(_MOVES)
TASKS = ("detection", "video")
DEFAULTS = {
    "detection": {"seed": 0, "num_train": 200, "num_val": 100},
    "video": {"seed": 0, "num_train": 640, "num_val": 160},
}

_FORMAT = 1  # raise it when the pictures of given parameters change: older sets are then refused
_NUM_VAL_SOURCES = 360
_IMAGE, _CLIP, _FRAMES = 128, 64, 16  # pixels, pixels, frames
_SIZES = (28.0, 56.0)  # height of the 8x8 grid in an image, in pixels; the digit itself fills most of it
_CLIP_SIZES = (24.0, 50.0)
_PAD = 2  # rings of empty pixels around the 8x8 grid, so that the spline fades out instead of being cut
_STREAMS = {"detection": 1, "video": 2, "train": 3, "val": 4}

Track = Callable[[Iterable[int], str], Iterable[int]]


def make(
    task: str,
    root: str | os.PathLike = "data/digits",
    *,
    seed: int | None = None,
    num_train: int | None = None,
    num_val: int | None = None,
    force: bool = False,
    track: Track | None = None,
) -> bool:
    """Make one of the two sets under ``root``, unless it is there already.

    The set is written to a folder beside its own and renamed at the end: a half-made set is never seen, and
    of several processes that start at once the first to finish wins.

    Args:
        task: ``detection`` or ``video``; also the name of the folder under ``root``.
        root: Folder of both sets. Created when missing.
        seed: Seed of everything random. Default: ``DEFAULTS[task]``, as for the two numbers.
        num_train: Number of training images or clips.
        num_val: Number of validation images or clips.
        force: Make the set anew, also over one of other parameters.
        track: Wraps the loops to show progress: called with the sample numbers and a title.

    Returns:
        True if the set was made, False if a finished one of these parameters was there.

    Raises:
        ValueError: If an argument is out of range, or the folder holds something else: a set of other
            parameters (without ``force``) or files that are not a digits set (always).
    """
    params = _params(task, seed=seed, num_train=num_train, num_val=num_val)
    root = Path(root)
    target = root / task
    if not force and _finished(target, task, params):
        return False
    if target.exists():
        _read_manifest(target)  # `force` replaces a digits set, never somebody's other files
    root.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkdtemp: its folders are closed to everyone else, and so would the set be.
    scratch = root / f"{task}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    scratch.mkdir()
    try:
        write = {"detection": _write_detection, "video": _write_video}[task]
        sources = {}
        for split in ("train", "val"):
            (scratch / split).mkdir()
            numbers = range(params[f"num_{split}"])
            shown = track(numbers, f"{task} {split}") if track else numbers
            sources[split] = write(scratch, split, params["seed"], shown)
        manifest = {"digits": _FORMAT, "task": task, "params": params, "sources": sources}
        _dump(manifest, scratch / "manifest.json")
        return _publish(scratch, target, task, params, force)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def source_split() -> tuple[range, range]:
    """Return the indices into `load_digits` that the train and the val part draw from.

    Cut, not shuffled: neighbours in the data set were written by the same hand, so val has other writers.
    """
    count = len(_digits()[0])
    return range(count - _NUM_VAL_SOURCES), range(count - _NUM_VAL_SOURCES, count)


# Parameters, manifests and folders


def _params(task: str, **given: int | None) -> dict[str, int]:
    """Fill in the defaults and check the ranges."""
    if task not in TASKS:
        raise ValueError(f"There is no digits set {task!r}. Choose one of: {', '.join(TASKS)}.")
    params = {name: DEFAULTS[task][name] if value is None else value for name, value in given.items()}
    for name, value in params.items():
        least = 0 if name == "seed" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{name}={value!r} was given for the {task} digits, but it must be a whole number, {least} or "
                f"more. Leave it out to take {DEFAULTS[task][name]}."
            )
    return params


def _read_manifest(target: Path) -> dict[str, Any]:
    """Return the manifest of a digits set of any format; raise ValueError for any other folder."""
    try:
        manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
        if isinstance(manifest, dict) and "digits" in manifest:
            return manifest
    except (OSError, ValueError):
        pass
    raise ValueError(
        f"{target} exists but is not a digits set: it has no manifest.json of one. It is left alone. Move it "
        "away, or give another folder (data_root in the config, --out of tools/make_digits.py)."
    )


def _finished(target: Path, task: str, params: dict[str, int]) -> bool:
    """Whether the set is there; raise ValueError if what is there is not this set."""
    if not target.exists():
        return False
    manifest = _read_manifest(target)
    wanted = {"digits": _FORMAT, "task": task, "params": params}
    found = {key: manifest.get(key) for key in wanted}
    if found == wanted:
        return True
    flags = " ".join(f"--{name.removeprefix('num_')} {value}" for name, value in params.items())
    raise ValueError(
        f"{target} holds a digits set made with {found}, but {wanted} is asked for. Either make it anew with "
        f"`python tools/make_digits.py --task {task} --out {target.parent} {flags} --force`, or give another "
        "folder (data_root in the config), or ask for what is there (seed, num_train, num_val)."
    )


def _publish(scratch: Path, target: Path, task: str, params: dict[str, int], force: bool) -> bool:
    """Move the finished set to its place; return False if another process was first."""
    old = scratch.with_suffix(".old")
    if force and target.exists():
        target.rename(old)
    try:
        scratch.rename(target)  # fails if the folder is there: renaming replaces empty folders only
    except OSError:
        if _finished(target, task, params):
            return False
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
    return True


def _dump(data: Any, path: Path) -> None:
    path.write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")


# Drawing


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Spline coefficients (1797, 12, 12) of the padded digits, values 0 to 1, and their labels."""
    from sklearn.datasets import load_digits  # here: it takes a second, and a finished set needs none of it

    data = load_digits()
    padded = np.pad(data.images / 16, ((0, 0), (_PAD, _PAD), (_PAD, _PAD)))
    splines = ndimage.spline_filter1d(ndimage.spline_filter1d(padded, axis=1), axis=2)
    return splines, data.target


def _stream(task: str, split: str, seed: int, number: int) -> Generator:
    return np.random.default_rng([seed, _STREAMS[task], _STREAMS[split], number])


def _draw_source(rng: Generator, split: str) -> int:
    pool = source_split()[split == "val"]
    return int(rng.integers(pool.start, pool.stop))


def _coverage(source: int, side: int, size: float, angle: float, centre: np.ndarray) -> np.ndarray:
    """Render a digit: how much of each pixel it covers, 0 to 1.

    Args:
        source: Index into `load_digits`.
        side: Side of the square picture in pixels.
        size: Side of the digit's 8x8 grid in the picture, in pixels.
        angle: Rotation in radians, clockwise as seen.
        centre: (y, x) of the digit's middle in pixels.
    """
    spline = _digits()[0][source]
    cos, sin = np.cos(angle), np.sin(angle)
    to_grid = np.array([[cos, -sin], [sin, cos]]) * 8 / size
    middle = (len(spline) - 1) / 2
    ink = ndimage.affine_transform(spline, to_grid, middle - to_grid @ centre, (side, side), order=3, prefilter=False)
    return np.clip((ink - 0.25) / 0.3, 0, 1)  # strokes with a soft edge; half covered is 40 % ink


def _ground(rng: Generator, side: int) -> np.ndarray:
    """Textured dark ground (side, side, 3): a gradient, stripes and two noises around some colour."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    turns = rng.uniform(0, 2 * np.pi, 2)
    gradient, along = (np.cos(turn) * x + np.sin(turn) * y for turn in turns)
    stripes = np.sin(2 * np.pi * (rng.uniform(3, 12) * along + rng.uniform()))
    clouds = ndimage.zoom(rng.normal(0, 1, (8, 8)), side / 8, order=1)
    texture = sum(
        amount[:, None, None] * layer[..., None] * rng.uniform(0.6, 1, 3)
        for amount, layer in zip(rng.uniform(0, [[60], [14], [14]]), (gradient, stripes, clouds), strict=True)
    )
    return rng.uniform(30, 100, 3) + texture + rng.normal(0, 4, (side, side, 1))


def _chalk(rng: Generator) -> np.ndarray:
    """A colour for a digit, always brighter than the ground.

    Learning that dark on bright is the same digit takes longer than the few hundred iterations of a quick run.
    """
    return rng.uniform(150, 255, 3)


def _paint(picture: np.ndarray, coverage: np.ndarray, colour: np.ndarray) -> None:
    picture += coverage[..., None] * (colour - picture)


def _pixels(picture: np.ndarray) -> np.ndarray:
    """RGB in floats to the BGR bytes that OpenCV writes."""
    return np.ascontiguousarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8)[..., ::-1])


# The detection set


def _write_detection(root: Path, split: str, seed: int, numbers: Iterable[int]) -> list[int]:
    """Write the images and the COCO json of one split; return the source digits it used."""
    images, annotations = [], []
    for number in numbers:
        picture, instances = _detection_image(_stream("detection", split, seed, number), split)
        name = f"{number:06d}.png"
        if not cv2.imwrite(str(root / split / name), _pixels(picture)):
            raise OSError(f"{root / split / name} could not be written. Is the disk full or read-only?")
        images.append({"id": number + 1, "file_name": name, "width": _IMAGE, "height": _IMAGE})
        for source, mask in instances:
            encoded = rle.encode(np.asfortranarray(mask, np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,  # from 1: COCO's evaluation takes an id of 0 for "no match"
                    "image_id": number + 1,
                    "category_id": int(_digits()[1][source]) + 1,
                    "bbox": [int(v) for v in rle.toBbox(encoded)],
                    "area": int(rle.area(encoded)),
                    "iscrowd": 0,
                    "segmentation": {"size": [_IMAGE, _IMAGE], "counts": encoded["counts"].decode()},
                    "source": source,
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    _dump(coco, root / f"{split}.json")
    return sorted({annotation["source"] for annotation in annotations})


def _detection_image(rng: Generator, split: str) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Return a picture and its instances: source digit and mask of what is seen of it."""
    picture = _ground(rng, _IMAGE)
    drawn: list[tuple[int, np.ndarray, int]] = []  # source, visible mask, area before others covered it
    for _ in range(rng.integers(2, 7)):
        source, size = _draw_source(rng, split), rng.uniform(*_SIZES)
        angle, colour = rng.uniform(-0.2, 0.2), _chalk(rng)
        for _ in range(10):  # places to try; a digit that finds none without hiding another is left out
            centre = rng.uniform(size / 2, _IMAGE - size / 2, 2)
            coverage = _coverage(source, _IMAGE, size, angle, centre)
            mask = coverage >= 0.5
            left = [(other, seen & ~mask, area) for other, seen, area in drawn]
            if all(seen.sum() >= 0.8 * area for _, seen, area in left):
                drawn = [*left, (source, mask, int(mask.sum()))]
                _paint(picture, coverage, colour)
                break
    return picture, [(source, mask) for source, mask, _ in drawn]


# The video set


def _write_video(root: Path, split: str, seed: int, numbers: Iterable[int]) -> list[int]:
    """Write the clips and the list of one split; return the source digit of every clip."""
    sources, lines = [], []
    for number in numbers:
        label = number % len(MOTIONS)  # in turn, so that every class is equally frequent
        rng = _stream("video", split, seed, number)
        source = _draw_source(rng, split)
        name = f"{split}/{number:06d}.mp4"
        _write_clip(root / name, _clip(rng, source, MOTIONS[label]))
        sources.append(source)
        lines.append(f"{name} {label}\n")
    (root / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    return sources


def _clip(rng: Generator, source: int, motion: str) -> Iterable[np.ndarray]:
    """Yield the frames of one clip."""
    ground, colour = _ground(rng, _CLIP), _chalk(rng)
    for y, x, angle, scale in _path(rng, motion):
        # Drawn near the middle and rolled into place: what leaves at one edge comes in at the other.
        whole = np.floor([y * _CLIP, x * _CLIP]).astype(int)
        middle = _CLIP // 2
        centre = np.array([y * _CLIP, x * _CLIP]) - whole + middle
        small, large = _CLIP_SIZES
        size = small * (large / small) ** scale
        coverage = _coverage(source, _CLIP, size, 2 * np.pi * angle, centre)
        frame = ground.copy()
        _paint(frame, np.roll(coverage, whole - middle, axis=(0, 1)), colour)
        yield _pixels(frame)


def _path(rng: Generator, motion: str) -> np.ndarray:
    """Return y, x, angle and scale of each frame (frames, 4), each on a circle of circumference 1.

    Each starts anywhere on its circle and the motion turns one of them. So the four are distributed alike in
    every frame of every motion: no single frame says which motion it is from.
    """
    axis, turns = _MOVES[motion]
    start, speed = rng.uniform(size=4), np.zeros(4)
    speed[axis] = turns * rng.uniform(0.5, 0.8)
    return (start + np.linspace(0, 1, _FRAMES)[:, None] * speed) % 1


def _write_clip(path: Path, frames: Iterable[np.ndarray]) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 16.0, (_CLIP, _CLIP))
    if not writer.isOpened():
        raise RuntimeError(
            f"OpenCV could not open {path} for an mp4 (codec mp4v). Builds without FFmpeg cannot: install the "
            "wheel with `pip install opencv-python-headless`."
        )
    try:
        for frame in frames:
            writer.write(frame)
    finally:
        writer.release()
