"""COCO and Kinetics-400 in a few dozen files: the folders, lists and annotations that the configs expect, drawn here.

What is in the real sets and breaks programs is in these: categories whose ids have gaps, an image without objects, a
crowd with a run-length mask, an object of two polygons, one of less than a pixel, a grey image, a clip that is
shorter than what is sampled. And weights to start from, under the names and keys of the published files.

    data/coco/{annotations/instances_{train,val}2017.json, train2017/*.jpg, val2017/*.jpg}
    data/kinetics400/{videos_train,videos_val}/<class>/*.mp4, kinetics400_{train,val}_list_videos.txt
    data/{fruit,gestures}: one's own data, of the same files
    <TORCH_HOME>/hub/checkpoints/*.pth
"""

import json
import shutil
from itertools import count, cycle
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from torch import nn

import normplug  # noqa: F401  lets mmdet import

__all__ = ["make_coco", "make_kinetics", "make_own", "make_weights", "overlapping"]

_NOT_USED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # of the 91 ids of COCO's paper the 11 that the data lacks; 91 too
SIZES = ((160, 120), (120, 160), (160, 107), (128, 128))  # width, height: COCO's shapes, a quarter of their side
PANORAMA = ((320, 48),)  # COCO has such, and resized to 1333x800 they stay small
ACTIONS = {0: "abseiling", 6: "arm_wrestling", 137: "feeding_birds", 399: "zumba"}


def make_coco(root: Path, train: int = 24, val: int = 12, sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
    """Write a set of instance annotations under ``root`` (data/coco).

    Args:
        root: Folder of the set, created.
        train: Number of training images.
        val: Number of validation images, likewise with one that has no object.
        sizes: Width and height of the images, in turn.
    """
    from mmdet.datasets import CocoDataset

    names = dict(zip((i for i in range(1, 91) if i not in _NOT_USED), CocoDataset.METAINFO["classes"], strict=True))
    ids, categories = count(900_100_000_001), cycle(names)
    for split, number in (("train2017", train), ("val2017", val)):
        rng = np.random.default_rng(number)
        Path(root, split).mkdir(parents=True)
        Path(root, "annotations").mkdir(exist_ok=True)
        images, annotations = [], []
        for i, (width, height) in zip(range(number), cycle(sizes), strict=False):
            picture = rng.integers(40, 90, (height, width, 3), np.uint8)
            file = f"{1000 * i + 139:012d}.jpg"
            images.append({"id": 1000 * i + 139, "file_name": file, "width": width, "height": height, "license": 3})
            # The first image has the rare things, the second has nothing
            for j in range(0 if i == 1 else 8):
                category = next(categories)
                centre = rng.uniform((0.2 * width, 0.2 * height), (0.8 * width, 0.8 * height))
                crowd, tiny = i == 0 and j == 0, i == 0 and j == 1
                shape = [_polygon(rng, centre, radius=0.4 if tiny else rng.uniform(0.1, 0.3) * height)]
                if i == 0 and j == 2:
                    shape.append(shape[0] + (width / 4, 0))
                shape = [points.clip(0, (width - 1, height - 1)) for points in shape]
                for points in shape:
                    cv2.fillPoly(picture, [points.round().astype(np.int32)], _colour(category))
                annotations.append(_annotation(next(ids), images[-1], category, shape, crowd))
            cv2.imwrite(str(root / split / file), cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY) if i == 2 else picture)
        described = {
            "info": {"description": "drawn in the manner of COCO 2017", "year": 2017},
            "licenses": [{"id": 3, "name": "none"}],
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name, "supercategory": "thing"} for i, name in names.items()],
        }
        Path(root, "annotations", f"instances_{split}.json").write_text(json.dumps(described))


def _colour(category: int) -> tuple[int, int, int]:
    return 60 + 37 * category % 196, 60 + 91 * category % 196, 60 + 53 * category % 196


def _polygon(rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    """Corners (K, 2) around a centre, in pixels, x before y."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(5, 9)))
    return centre + radius * rng.uniform(0.7, 1.0, (len(angles), 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)


def _annotation(number: int, image: dict, category: int, shape: list[np.ndarray], crowd: bool) -> dict:
    corners = np.concatenate(shape)
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    mask = np.zeros((image["height"], image["width"]), np.uint8)
    cv2.fillPoly(mask, [points.round().astype(np.int32) for points in shape], 1)
    segmentation = [points.round(2).flatten().tolist() for points in shape]
    return {
        "id": number,
        "image_id": image["id"],
        "category_id": category,
        "bbox": [round(float(x), 2) for x in (left, top, right - left, bottom - top)],
        "area": float(mask.sum()),
        "iscrowd": int(crowd),
        "segmentation": {"counts": _runs(mask), "size": list(mask.shape)} if crowd else segmentation,
    }


def _runs(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths of a mask (H, W): down the columns, zeros first."""
    flat = np.concatenate([[0], mask.T.flatten(), [1 - mask.T.flat[-1]]])
    return np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)), [mask.size]])).tolist()


def make_own(fruit: Path, gestures: Path, coco: Path, kinetics: Path) -> None:
    """Make of the two sets those that docs/your-data.md is about: eight fruits, and two gestures in folders.

    Args:
        fruit: Folder of the images, created.
        gestures: Folder of the videos, created.
        coco: What `make_coco` wrote.
        kinetics: What `make_kinetics` wrote.
    """
    shutil.copytree(coco, fruit)
    for file in (fruit / "annotations").glob("instances_*.json"):
        content = json.loads(file.read_text())
        names = ("apple", "pear", "plum", "fig", "lime", "kiwi", "date", "grape")
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
        for annotation, i in zip(content["annotations"], cycle(range(1, 9)), strict=False):
            annotation["category_id"] = i
        file.write_text(json.dumps(content))
    for split in ("train", "val"):
        clips = sorted((kinetics / f"videos_{split}").rglob("*.mp4"))
        for clip, name in zip(clips, cycle(("point", "wave")), strict=False):
            (gestures / split / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(clip, gestures / split / name)


def make_kinetics(root: Path, train: int = 16, val: int = 8) -> None:
    """Write clips of four of the 400 actions under ``root`` (data/kinetics400), and their lists.

    Args:
        root: Folder of the set, created.
        train: Number of training clips.
        val: Number of validation clips.
    """
    for split, number in (("train", train), ("val", val)):
        rng, lines = np.random.default_rng(number), []
        for i, (label, action) in zip(range(number), cycle(ACTIONS.items()), strict=False):
            name = f"{action}/clip{i:07d}_000010_000020.mp4"
            file = Path(root, f"videos_{split}", name)
            file.parent.mkdir(parents=True, exist_ok=True)
            _write_clip(file, rng, frames=20 if i == 1 else 75)
            lines.append(f"{name} {label}\n")
        Path(root, f"kinetics400_{split}_list_videos.txt").write_text("".join(lines))


def _write_clip(file: Path, rng: np.random.Generator, frames: int) -> None:
    width, height = 86, 64
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"mp4v"), 25, (width, height))
    assert writer.isOpened(), f"this OpenCV cannot write {file}"
    ground, speed = rng.integers(0, 120, (height, width, 3), np.uint8), rng.integers(1, 4)
    for t in range(frames):
        frame = ground.copy()
        cv2.circle(frame, (int(10 + speed * t) % width, height // 2), 9, (200, 180, 60), -1)
        writer.write(frame)
    writer.release()


# file name -> torchvision's model, and the norm of mmdet's keys in it; None: torchvision's own file
_WEIGHTS = {
    "resnet50-0676ba61": ("resnet50", None),
    "resnet101-63fe2227": ("resnet101", None),
    "resnet50_msra-5891d200": ("resnet50", "bn"),
    "resnet50_gn-9186a21c": ("resnet50", "gn"),
    "resnet101_gn-cac0ab98": ("resnet101", "gn"),
    "resnet50_gn_thangvubk-ad1730dd": ("resnet50", "gn"),
    "resnet50_gn_ws-15beedd8": ("resnet50", "gn"),
    "resnet101_gn_ws-3e3c308c": ("resnet101", "gn"),
    "resnext50_32x4d_gn-c7e8b754": ("resnext50_32x4d", "gn"),
    "resnext50_32x4d_gn_ws-0d87ac85": ("resnext50_32x4d", "gn"),
    "resnext101_32x4d_gn-ac3bb84e": ("resnext101_32x4d", "gn"),
    "resnext101_32x4d_gn_ws-34ac1a9e": ("resnext101_32x4d", "gn"),
}


def make_weights(torch_home: Path) -> None:
    """Write random weights where torch looks for downloaded files: an offline user puts the published ones there."""
    folder = torch_home / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (model, norm) in _WEIGHTS.items():
        weights = published_weights(model, norm)
        torch.save(overlapping(weights), folder / f"{name}.pth")


def overlapping(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return random weights of the same shapes and deviations, whose filters are windows of one row of numbers.

    No two filters are alike, and a file has a hundredth of its size.
    """
    return {key: _windows(value) if value.ndim > 1 else value for key, value in weights.items()}


def _windows(value: torch.Tensor) -> torch.Tensor:
    row = value.std() * torch.randn(len(value) + value[0].numel())
    return row.as_strided(value.shape, (1, *value.stride()[1:]))


def published_weights(model: str, norm: str | None = None) -> dict:
    """Return random weights with the keys of a published file.

    Args:
        model: Of torchvision, or ResNeXt-101 32x4d, which it lacks.
        norm: ``bn`` or ``gn``: an mmdet backbone without classifier; None: torchvision's own checkpoint.
    """
    layer = (lambda channels: nn.GroupNorm(32, channels)) if norm == "gn" else nn.BatchNorm2d
    if model == "resnext101_32x4d":
        blocks, layers = torchvision.models.resnet.Bottleneck, [3, 4, 23, 3]
        net = torchvision.models.ResNet(blocks, layers, groups=32, width_per_group=4, norm_layer=layer)
    else:
        net = torchvision.models.get_model(model, norm_layer=layer)
    weights = net.state_dict()
    if norm is None:
        return weights
    return {key.replace("bn", norm): value for key, value in weights.items() if not key.startswith("fc.")}
