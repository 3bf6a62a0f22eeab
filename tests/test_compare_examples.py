"""The examples of a comparison, on made-up predictions: which are chosen, what is counted, what is drawn."""

import contextlib
import io

import cv2
import numpy as np
import pytest

from normplug import layers  # noqa: F401  lets the toolkits import

pytest.importorskip("mmdet.models")
from pycocotools import mask as rle
from pycocotools.coco import COCO

from normplug.openmmlab.comparison.examples import ClipExamples, Counts, ImageExamples
from normplug.reporting import Report

BOXES = [[10, 10, 30, 30], [60, 10, 30, 20]]  # of class 1 and class 2, in every image
OUTLINE = [[10, 10, 40, 10, 40, 40, 10, 40]]
ELSEWHERE = [60, 50, 20, 20]


@pytest.fixture
def paths(tmp_path):
    """Six images of 100 x 80 pixels."""
    found = {i: str(tmp_path / f"picture {i}.png") for i in range(1, 7)}
    for path in found.values():
        cv2.imwrite(path, np.full((80, 100, 3), 90, np.uint8))
    return found


def truth():
    api = COCO()
    objects = [(image, k) for image in range(1, 7) for k in (1, 2)]
    api.dataset = dict(
        images=[dict(id=i, width=100, height=80) for i in range(1, 7)],
        categories=[dict(id=1, name="cat"), dict(id=2, name="dog")],
        annotations=[
            dict(id=i, image_id=image, category_id=k, bbox=BOXES[k - 1], area=600, iscrowd=0)
            | (dict(segmentation=OUTLINE) if k == 1 else {})
            for i, (image, k) in enumerate(objects, 1)
        ],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return api


def boxes(image, *found):
    return [dict(image_id=image, category_id=k, bbox=box, score=score) for k, box, score in found]


def results(*bbox, segm=()):
    return dict(bbox=[d for some in bbox for d in some], segm=list(segm), images=[1, 2, 3, 4, 5, 6])


RIGHT = [(1, BOXES[0], 0.9), (2, BOXES[1], 0.3)]
A = results(boxes(2, *RIGHT), boxes(3, *RIGHT), boxes(6, (2, BOXES[0], 0.8)))
# Image 3: three wrong ones. Image 2: as A, and one of low score that does not count. Image 5: one of two.
B = results(boxes(2, *RIGHT, (1, ELSEWHERE, 0.29)), boxes(3, *[(1, ELSEWHERE, 0.5)] * 3), boxes(5, RIGHT[0]))


def texts(figure):
    return [[axes.get_title(), *(t.get_text() for t in axes.texts)] for axes in figure.axes]


def written(examples, folder):
    report = Report("examples")
    examples.report(report, "AB")
    report.write(folder)
    return report.markdown()


def test_images_that_differ_most_come_first_with_their_counts(paths, tmp_path):
    examples = ImageExamples(truth(), [A, B], paths, [1, 2])
    assert list(examples.chosen) == [3, 5, 6]  # by 5, by 1, by 1; the others do not differ
    assert [side[3] for side in examples.counts] == [Counts(2, 0, 0), Counts(0, 3, 2)]
    assert [side[6] for side in examples.counts] == [Counts(0, 1, 2), Counts(0, 0, 2)]  # the right place, another class
    assert examples.counts[1][2] == Counts(2, 0, 0)
    assert examples.numbers()[0] == dict(
        image=3,
        path=paths[3],
        counts=[dict(hits=2, false=0, missed=0), dict(hits=0, false=3, missed=2)],
    )
    assert "could not be read" not in written(examples, tmp_path)
    assert 5000 < (tmp_path / "examples.png").stat().st_size < 600_000


def test_a_row_shows_truth_a_and_b(paths):
    mask = np.zeros((80, 100), np.uint8, order="F")
    mask[10:40, 10:40] = 1
    code = rle.encode(mask)
    masks = [
        dict(image_id=3, category_id=1, score=s, segmentation=dict(code, counts=code["counts"].decode()))
        for s in (0.9, 0.2)
    ]
    figure = ImageExamples(truth(), [{**A, "segm": masks}, B], paths, [1, 2])._draw("AB")
    row = figure.axes[:3]
    assert texts(figure)[:3] == [
        ["picture 3.png", "cat", "dog"],
        ["A: 2 hits, 0 false, 0 missed", "cat 0.90", "dog 0.30"],
        ["B: 0 hits, 3 false, 2 missed", *["cat 0.50"] * 3],
    ]
    assert [len(axes.images) for axes in row] == [2, 2, 1]  # the picture; the polygon; the mask of score 0.9
    overlays = [axes.images[1].get_array() for axes in row[:2]]
    for overlay in overlays:
        assert np.count_nonzero(overlay[..., 3]) == pytest.approx(900, abs=60)
    box = row[0].lines[0].get_xydata()
    assert (box.min(0).tolist(), box.max(0).tolist()) == ([10, 10], [40, 40])
    colours = [[line.get_color() for line in axes.lines] for axes in row]
    assert colours[0] == colours[1]  # of the class, whoever says it
    assert colours[0][0] != colours[0][1]


def test_images_that_cannot_be_read_are_counted(paths, tmp_path):
    (tmp_path / "picture 3.png").write_bytes(b"no picture")
    del paths[5]
    examples = ImageExamples(truth(), [A, B], paths, [1, 2])
    assert list(examples.chosen) == [6]
    assert "2 images that would stand here could not be read." in written(examples, tmp_path)


def test_models_that_agree_have_no_examples(paths, tmp_path):
    assert "No image has other hits" in written(ImageExamples(truth(), [A, A], paths, [1, 2]), tmp_path / "images")
    scores = dict(scores=[[0.1, 0.9]], labels=[0])
    assert "No clip's right class" in written(ClipExamples([scores, scores], ["x.mp4"]), tmp_path / "clips")


SCORES = [
    [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]],
    [[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.5, 0.4, 0.1], [0.5, 0.2, 0.3]],
]
LABELS = [0, 1, 1, 2]


@pytest.fixture
def clips(tmp_path):
    """Four clips of nine frames that brighten: frame t is 20 t."""
    found = [str(tmp_path / f"{i}.mp4") for i in range(4)]
    for path in found:
        writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), 16.0, (64, 48))
        for t in range(9):
            writer.write(np.full((48, 64, 3), 20 * t, np.uint8))
        writer.release()
    return found


def test_clips_that_differ_most_come_first_with_frames_and_classes(clips, tmp_path):
    examples = ClipExamples([dict(scores=s, labels=LABELS) for s in SCORES], clips, ["up", "down", "left"])
    assert list(examples.chosen) == [1, 3, 0]  # by 0.5, 0.4 and 0.1
    assert examples.numbers()[0] == dict(clip=1, path=clips[1], scores=[0.3, 0.8])
    first = examples._draw("AB").axes[:4]
    brightness = [np.asarray(axes.images[0].get_array()).mean() for axes in first[:3]]
    assert brightness == pytest.approx([0, 80, 160], abs=4)
    assert first[0].get_title() == "1.mp4"
    lines = first[3].texts[0].get_text().split("\n")
    assert lines[:5] == ["right: down", "", "A", "0.60 up", "0.30 down *"]
    assert lines[6:9] == ["", "B", "0.80 down *"]
    text = written(examples, tmp_path)
    assert 5000 < (tmp_path / "examples.png").stat().st_size < 600_000
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "→" in line]
    assert rows[1:] == [["down → up", "2", "1", "-1"], ["left → up", "0", "1", "+1"]]


def test_clips_without_files_still_have_their_confusions(tmp_path):
    examples = ClipExamples([dict(scores=s, labels=LABELS) for s in SCORES], [])
    text = written(examples, tmp_path)
    assert "3 clips that would stand here could not be read." in text
    assert "class 1 → class 0" in text
    assert examples.numbers() == []
