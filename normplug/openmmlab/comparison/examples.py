"""Examples: the images and clips on which two models differ most, with what each of them says."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import mmcv
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pycocotools.coco import COCO

from normplug.openmmlab.comparison.average_precision import evaluate
from normplug.reporting import Report

__all__ = ["ClipExamples", "Counts", "ImageExamples", "count_hits"]

MOST = 4  # examples
SCORE = 0.3  # detections below it are neither counted nor drawn
FRAMES, TOP, MOST_CONFUSIONS = 3, 3, 10
# Pixels of a picture's longer side: a dozen photographs, grey, or in colour, stay below 600 KB.
IMAGE_SIDE, FRAME_SIDE = 240, 120
Results = Mapping[str, list]


class Counts(NamedTuple):
    """Detections of one image, and the objects that none of them found."""

    hits: int = 0
    false: int = 0
    missed: int = 0

    def __str__(self) -> str:
        return f"{self.hits} hits, {self.false} false, {self.missed} missed"


def count_hits(truth: COCO, results: Results, categories: list[int]) -> dict[int, Counts]:
    """Count right and wrong boxes (masks, where there are no boxes) by image, as COCO matches them at IoU 0.5.

    Args:
        truth: Annotations.
        results: COCO's result lists by "bbox" and "segm", and the ids of the "images" looked at. Detections with a
            score below 0.3 do not count.
        categories: Ids of the classes.
    """
    kind = "bbox" if "bbox" in results else "segm"
    sure = [d for d in results[kind] if d["score"] >= SCORE]
    evaluator = evaluate(truth, sure, kind, results["images"], categories, [0.5])
    found = dict.fromkeys(results["images"], Counts())
    for e in evaluator.evalImgs:  # one for each image, class and size
        if e is None or e["aRng"] != evaluator.params.areaRng[0]:  # the first: of all sizes
            continue
        counted, matched = ~e["dtIgnore"][0].astype(bool), e["dtMatches"][0] > 0
        objects = np.asarray(e["gtIgnore"]) == 0
        more = [counted & matched, counted & ~matched, objects & (e["gtMatches"][0] == 0)]
        both = zip(found[e["image_id"]], more, strict=True)
        found[e["image_id"]] = Counts(*(n + int(np.count_nonzero(x)) for n, x in both))
    return found


class ImageExamples:
    """The images whose detections differ most: by hits minus false detections, of equals the first.

    Args:
        truth: Annotations.
        results: A's and B's, as ``Predictions.results`` has them.
        paths: Image files by id.
        categories: Ids of the classes.
    """

    def __init__(
        self, truth: COCO, results: Sequence[Results], paths: Mapping[int, str], categories: list[int]
    ) -> None:
        self.truth, self.results, self.paths, self.categories = truth, results, paths, categories
        self.counts = [count_hits(truth, r, categories) for r in results]
        a, b = ({i: c.hits - c.false for i, c in side.items()} for side in self.counts)
        different = [i for i in a if a[i] != b[i]]
        order = sorted(different, key=lambda i: -abs(a[i] - b[i]))  # stable: of equals the first
        self.chosen, self.unreadable = _readable(order, lambda i: _read_image(paths.get(i, "")))

    def report(self, report: Report, letters: Sequence[str]) -> None:
        """Add a figure, a row for each image: truth, A and B."""
        if self.chosen:
            caption = (
                f"The images whose hits minus false detections (IoU 0.5, score {SCORE} or more) differ most. "
                "Colours are classes; the pictures are grey so that these stand out."
            )
            report.figure(self._draw(letters), "examples", caption)
        elif not self.unreadable:
            report.text(
                f"No image has other hits minus false detections (IoU 0.5, score {SCORE} or more) in B than in A."
            )
        report.text(_sentence(len(self.unreadable), "image"))

    def numbers(self) -> list[dict[str, Any]]:
        """Return ids, paths and counts, for JSON."""
        return [
            {"image": i, "path": self.paths[i], "counts": [side[i]._asdict() for side in self.counts]}
            for i in self.chosen
        ]

    def _draw(self, letters: Sequence[str]) -> Figure:
        shapes = [picture.shape for picture in self.chosen.values()]
        figure = Figure(figsize=(9, sum(0.4 + 2.9 * min(h / w, 1.3) for h, w, _ in shapes)), layout="constrained")
        rows = figure.subplots(len(self.chosen), 3, squeeze=False)
        for panels, (image, picture) in zip(rows, self.chosen.items(), strict=True):
            grey = cv2.cvtColor(_small(picture, IMAGE_SIDE), cv2.COLOR_RGB2GRAY)
            own = self.truth.loadAnns(self.truth.getAnnIds([image], self.categories, iscrowd=False))
            found = [
                [d for kind in ("bbox", "segm") for d in r.get(kind, []) if d["image_id"] == image]
                for r in self.results
            ]
            counts = [side[image] for side in self.counts]
            titles = [Path(self.paths[image]).name, *map("{}: {}".format, letters, counts)]
            for axes, shown, title in zip(panels, [own, *found], titles, strict=True):
                _show(axes, grey, title, picture.shape)
                for one in shown:
                    if one.get("score", 1) >= SCORE:
                        self._draw_one(axes, one)
        return figure

    def _draw_one(self, axes: Axes, one: Mapping[str, Any]) -> None:
        """Draw an annotation, with box and mask, or an entry of a result list, which has the one or the other."""
        colour = colormaps["tab10"](self.categories.index(one["category_id"]) % 10)
        if one.get("segmentation"):
            mask = self.truth.annToMask(one)
            axes.imshow(
                mask[..., None] * np.array([*colour[:3], 0.4]), extent=_extent(mask.shape), interpolation="nearest"
            )
        if "bbox" in one:
            x, y, w, h = one["bbox"]
            axes.plot([x, x + w, x + w, x, x], [y, y, y + h, y + h, y], color=colour, linewidth=1.2)
            name = self.truth.cats[one["category_id"]]["name"]
            label = f"{name} {one['score']:.2f}" if "score" in one else name
            box = {"facecolor": colour, "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
            axes.text(x, y, label, fontsize=6, color="white", va="bottom", bbox=box, clip_on=True)


class ClipExamples:
    """The clips whose right class has the most different scores, of equals the first, and what is confused.

    Args:
        results: A's and B's, as ``Predictions.results`` has them.
        paths: Video files, one for each clip; none if it is not known which is which.
        classes: Names of the classes; by default their numbers.
    """

    def __init__(self, results: Sequence[Results], paths: Sequence[str], classes: Sequence[str] = ()) -> None:
        self.scores = [np.array(r["scores"]) for r in results]  # (N, classes)
        self.labels, self.paths = np.array(results[0]["labels"]), paths
        self.classes = classes or [f"class {k}" for k in range(self.scores[0].shape[1])]
        right = [scores[np.arange(len(scores)), self.labels] for scores in self.scores]
        gaps = np.abs(right[0] - right[1])
        order = [i for i in np.argsort(-gaps, kind="stable").tolist() if gaps[i]]
        self.chosen, self.unreadable = _readable(order, lambda i: _read_frames(paths[i] if paths else ""))

    def report(self, report: Report, letters: Sequence[str]) -> None:
        """Add a figure, a row of frames and classes for each clip, and a table of the most frequent confusions."""
        if self.chosen:
            caption = (
                f"The clips whose right class has the most different scores, and the {TOP} classes of highest score; "
                "a star marks the right one."
            )
            report.figure(self._draw(letters), "examples", caption)
        elif not self.unreadable:
            report.text("No clip's right class has another score in B than in A.")
        report.text(_sentence(len(self.unreadable), "clip"))
        confusions = self.confusions()
        if confusions:
            rows = [
                [f"{true} → {taken}", str(a), str(b), f"{b - a:+d}"] for (true, taken), (a, b) in confusions.items()
            ]
            report.table(
                [["right → predicted", *letters, "B − A"], *rows],
                f"The most frequent confusions, at most {MOST_CONFUSIONS}: clips of the one class taken for the other.",
            )

    def confusions(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return A's and B's number of clips by right and predicted class, the most frequent of both first."""
        a, b = (
            Counter((int(k), int(taken)) for k, taken in zip(self.labels, _ranked(scores)[:, 0], strict=True))
            for scores in self.scores
        )
        wrong = sorted(pair for pair in {*a, *b} if pair[0] != pair[1])
        wrong.sort(key=lambda pair: -(a[pair] + b[pair]))
        return {(self.classes[k], self.classes[t]): (a[k, t], b[k, t]) for k, t in wrong[:MOST_CONFUSIONS]}

    def numbers(self) -> list[dict[str, Any]]:
        """Return indices, paths and the right class's scores, for JSON."""
        return [
            {"clip": i, "path": self.paths[i], "scores": [float(side[i, self.labels[i]]) for side in self.scores]}
            for i in self.chosen
        ]

    def _draw(self, letters: Sequence[str]) -> Figure:
        figure = Figure(figsize=(9, 2.3 * len(self.chosen)), layout="constrained")
        rows = figure.subplots(len(self.chosen), FRAMES + 1, squeeze=False)
        for panels, (clip, frames) in zip(rows, self.chosen.items(), strict=True):
            for axes, frame in zip(panels, frames, strict=False):  # a short clip has fewer
                _show(axes, _small(frame, FRAME_SIDE), "", frame.shape)
            panels[0].set_title(Path(self.paths[clip]).name, fontsize="small")
            lines = [f"right: {self.classes[self.labels[clip]]}"]
            for letter, scores in zip(letters, self.scores, strict=True):
                lines += ["", letter]
                for k in _ranked(scores[clip : clip + 1])[0, :TOP]:
                    lines.append(f"{scores[clip, k]:.2f} {self.classes[k]}{' *' if k == self.labels[clip] else ''}")
            for axes in panels:
                axes.set_axis_off()
            panels[-1].text(0, 1, "\n".join(lines), fontsize=8, va="top", transform=panels[-1].transAxes)
        return figure


def _readable(order: Iterable[int], read: Any) -> tuple[dict[int, Any], list[int]]:
    """Return the first samples that can be read with what was read, and those before that cannot."""
    chosen, unreadable = {}, []
    for i in order:
        if len(chosen) == MOST:
            break
        content = read(i)
        if content is None:
            unreadable.append(i)
        else:
            chosen[i] = content
    return chosen, unreadable


def _read_image(path: str) -> np.ndarray | None:
    picture = cv2.imread(path) if Path(path).is_file() else None
    return None if picture is None else cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _read_frames(path: str) -> list[np.ndarray] | None:
    """Return frames (H, W, 3) from the beginning, the middle and the end of a video."""
    if not Path(path).is_file():
        return None
    video = mmcv.VideoReader(path)
    places = sorted({round(i) for i in np.linspace(0, len(video) - 1, FRAMES)}) if len(video) else []
    frames = [video.get_frame(i) for i in places]
    return [cv2.cvtColor(f, cv2.COLOR_BGR2RGB) for f in frames if f is not None] or None


def _ranked(scores: np.ndarray) -> np.ndarray:
    return np.argsort(scores, axis=1)[:, ::-1]  # of equals the last, as mmaction2 and our accuracy have it


def _small(picture: np.ndarray, side: int) -> np.ndarray:
    scale = side / max(picture.shape[:2])
    return cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else picture


def _show(axes: Axes, picture: np.ndarray, title: str, shape: tuple[int, ...]) -> None:
    """Show a picture in the coordinates of the file, whose shape that is."""
    grey = {"cmap": "gray", "vmin": 0, "vmax": 255} if picture.ndim == 2 else {}
    axes.imshow(picture, extent=_extent(shape), interpolation="nearest", **grey)
    axes.set(xlim=(0, shape[1]), ylim=(shape[0], 0), autoscale_on=False)
    axes.set_title(title, fontsize="small")
    axes.set_axis_off()


def _extent(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    return 0, shape[1], shape[0], 0


def _sentence(unreadable: int, what: str) -> str:
    if not unreadable:
        return ""
    return f"{unreadable} {what}{'s' if unreadable > 1 else ''} that would stand here could not be read."
