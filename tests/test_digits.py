"""The embedded digits: what is drawn, how it is labelled, and how a set comes to be where a config looks for it."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
cv2 = pytest.importorskip("cv2")
pytest.importorskip("pycocotools")

from pycocotools import mask as rle  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

from normplug.openmmlab import digits  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
SMALL = {"detection": dict(num_train=6, num_val=4), "video": dict(num_train=8, num_val=8)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Both sets, small; not to be changed."""
    folder = tmp_path_factory.mktemp("digits")
    for task, sizes in SMALL.items():
        assert digits.make(task, folder, **sizes)
    return folder


def contents(folder):
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def frames(file):
    decord = pytest.importorskip("decord")
    reader = decord.VideoReader(str(file))
    return reader.get_batch(range(len(reader))).asnumpy()


# What is drawn


def test_images_and_annotations_are_those_of_their_seed(root, tmp_path):
    digits.make("detection", tmp_path / "again", **SMALL["detection"])
    digits.make("detection", tmp_path / "other", **SMALL["detection"], seed=1)
    want = contents(root / "detection")
    assert len(want) == 6 + 4 + 3  # images, two json files and the manifest
    assert contents(tmp_path / "again" / "detection") == want
    assert not set(contents(tmp_path / "other" / "detection").values()) & set(want.values())


def test_clips_are_those_of_their_seed(root, tmp_path):
    digits.make("video", tmp_path / "again", **SMALL["video"])
    digits.make("video", tmp_path / "other", **SMALL["video"], seed=1)
    for name in ("train.txt", "val.txt", "manifest.json"):
        assert (tmp_path / "again/video" / name).read_bytes() == (root / "video" / name).read_bytes()
    for file in sorted((root / "video").rglob("*.mp4")):
        name = file.relative_to(root)
        want = frames(file)
        assert want.shape == (16, 64, 64, 3)
        assert np.array_equal(frames(tmp_path / "again" / name), want)
        assert not np.array_equal(frames(tmp_path / "other" / name), want)


def test_a_longer_set_begins_with_the_shorter(root, tmp_path):
    digits.make("detection", tmp_path, num_train=8, num_val=5)
    longer = contents(tmp_path / "detection")
    images = {name: value for name, value in contents(root / "detection").items() if name.endswith(".png")}
    assert images.items() <= longer.items()
    old, new = (json.loads((folder / "detection/val.json").read_text()) for folder in (root, tmp_path))
    assert new["annotations"][: len(old["annotations"])] == old["annotations"]


@pytest.mark.parametrize("task", digits.TASKS)
def test_no_source_digit_is_in_train_and_val(task, root):
    sources = json.loads((root / task / "manifest.json").read_text())["sources"]
    train, val = set(sources["train"]), set(sources["val"])
    assert train
    assert val
    assert not train & val
    pools = digits.source_split()
    assert train <= set(pools[0])
    assert val <= set(pools[1])
    assert sorted([*pools[0], *pools[1]]) == list(range(1797))
    for pool in pools:
        assert set(load_digits().target[list(pool)]) == set(range(10))


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_agree_with_the_images(split, root):
    coco = COCO(root / "detection" / f"{split}.json")
    manifest = json.loads((root / "detection/manifest.json").read_text())
    labels = load_digits().target
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == [str(i) for i in range(10)]
    assert min(coco.anns) == 1
    assert {a["source"] for a in coco.anns.values()} == set(manifest["sources"][split])
    for image in coco.imgs.values():
        picture = cv2.imread(str(root / "detection" / split / image["file_name"])).astype(float)
        assert picture.shape == (image["height"], image["width"], 3) == (128, 128, 3)
        annotations = coco.imgToAnns[image["id"]]
        assert 1 <= len(annotations) <= 6
        masks = [coco.annToMask(a).astype(bool) for a in annotations]
        assert np.sum(masks, axis=0).max() == 1, "two instances own one pixel"
        ground = picture[~np.any(masks, axis=0)].mean()
        for a, mask in zip(annotations, masks, strict=True):
            y, x = np.nonzero(mask)
            assert a["bbox"] == [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
            assert a["area"] == mask.sum() > 60
            assert a["category_id"] == labels[a["source"]] + 1
            assert rle.area(a["segmentation"]) == a["area"]
            assert picture[mask].mean() > ground + 20, "there is no chalk under the mask"


def test_masks_are_exact(monkeypatch):
    """With chalk of one colour on black ground, the masks together are where at least half of it arrives."""
    monkeypatch.setattr(digits, "_ground", lambda rng, side: np.zeros((side, side, 3)))
    monkeypatch.setattr(digits, "_chalk", lambda rng: np.full(3, 200.0))
    for seed in range(8):
        picture, instances = digits._detection_image(np.random.default_rng(seed), "train")
        drawn, masked = picture[..., 0] >= 100, np.any([mask for _, mask in instances], axis=0)
        assert masked.sum() > 200
        assert not (masked & ~drawn).any()
        assert (drawn & ~masked).sum() <= 0.01 * masked.sum()  # where two soft edges lie upon each other


def test_a_rendered_digit_looks_like_its_source():
    """Shrunk back to 8x8 it is nearest to itself among all 1,797: the right one, upright and not mirrored."""
    data = load_digits()
    images = data.data / np.linalg.norm(data.data, axis=1, keepdims=True)
    found = []
    for source in range(0, 1797, 50):
        coverage = digits._coverage(source, 64, 64.0, 0.0, np.array([31.5, 31.5]))
        small = coverage.reshape(8, 8, 8, 8).mean((1, 3)).ravel()
        found.append(np.argmax(images @ small) == source)
    assert np.mean(found) > 0.8


# The motions


def centre(coverage):
    y, x = np.mgrid[: len(coverage), : len(coverage)]
    return np.array([(coverage * y).sum(), (coverage * x).sum()]) / coverage.sum()


@pytest.mark.parametrize("motion", digits.MOTIONS)
def test_motion_is_what_its_name_says(motion):
    for seed in range(20):
        path = digits._path(np.random.default_rng(seed), motion)
        assert path.shape == (16, 4)
        steps = (np.diff(path, axis=0) + 0.5) % 1 - 0.5  # on the circle
        moved = np.abs(steps).max(0) > 1e-9
        name, sign = {
            "left": ("x", -1),
            "right": ("x", 1),
            "up": ("y", -1),
            "down": ("y", 1),
            "clockwise": ("angle", 1),
            "counterclockwise": ("angle", -1),
            "grow": ("scale", 1),
            "shrink": ("scale", -1),
        }[motion]
        axis = ["y", "x", "angle", "scale"].index(name)
        assert moved.tolist() == [i == axis for i in range(4)]
        assert (np.sign(steps[:, axis]) == sign).all()
    a = digits._coverage(40, 64, 30.0, 0.0, np.array([31.5, 31.5]))
    # The middle of a digit's upper half goes right when it is turned clockwise.
    turned = digits._coverage(40, 64, 30.0, np.pi / 2, np.array([31.5, 31.5]))
    assert np.allclose(turned, np.rot90(a, -1), atol=1e-6)


def test_moving_digit_is_where_its_path_says():
    """A step of the path to the right is one of the digit in the frames, also across the edge."""
    rng = np.random.default_rng(5)
    for motion, axis, sign in (("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)):
        clip = np.array(list(digits._clip(np.random.default_rng(int(rng.integers(99))), 7, motion)), float)
        clip -= np.median(clip, axis=0)  # the ground stands still
        marks = np.clip(clip.mean(-1), 0, None) > 40
        phase = np.exp(2j * np.pi * np.arange(64) / 64)
        angles = np.angle((marks.sum(2 - axis) * phase).sum(1))
        steps = (np.diff(angles) + np.pi) % (2 * np.pi) - np.pi
        assert (np.sign(steps) == sign).mean() > 0.8, motion


def test_no_frame_gives_the_motion_away():
    """Position, angle and size are distributed alike under all motions, in every frame: the moments of the circle."""
    draws = 2000
    for motion in digits.MOTIONS:
        rng = np.random.default_rng(0)
        paths = np.array([digits._path(rng, motion) for _ in range(draws)])
        for harmonic in (1, 2, 3):
            moments = np.abs(np.exp(2j * np.pi * harmonic * paths).mean(0))
            assert moments.max() < 4 / np.sqrt(draws), (motion, harmonic)


def test_every_motion_is_equally_frequent(root):
    for split, each in (("train", 1), ("val", 1)):
        lines = (root / "video" / f"{split}.txt").read_text().splitlines()
        files, labels = zip(*(line.split() for line in lines), strict=True)
        assert sorted(map(int, labels)) == sorted(list(range(8)) * each)
        assert all((root / "video" / file).is_file() for file in files)
        assert len(json.loads((root / "video/manifest.json").read_text())["sources"][split]) == len(lines)


# How a set comes to be


def test_a_finished_set_is_left_alone(root):
    before = {f: f.stat().st_mtime_ns for f in root.rglob("*")}
    for task, sizes in SMALL.items():
        assert not digits.make(task, root, **sizes)
    assert {f: f.stat().st_mtime_ns for f in root.rglob("*")} == before


def test_a_set_of_other_parameters_is_refused_and_replaced_by_force(tmp_path):
    make = tmp_path / "detection", dict(num_train=2, num_val=1)
    digits.make("detection", tmp_path, **make[1])
    with pytest.raises(ValueError, match=r"'num_train': 2.*'num_train': 3.*--train 3 --val 1 --force"):
        digits.make("detection", tmp_path, num_train=3, num_val=1)
    assert digits.make("detection", tmp_path, num_train=3, num_val=1, force=True)
    assert len(list((make[0] / "train").iterdir())) == 3
    assert [f.name for f in tmp_path.iterdir()] == ["detection"], "scratch folders were left"


def test_a_set_of_an_older_format_is_refused(tmp_path, monkeypatch):
    digits.make("detection", tmp_path, num_train=1, num_val=1)
    monkeypatch.setattr(digits, "_FORMAT", digits._FORMAT + 1)
    with pytest.raises(ValueError, match="--force"):
        digits.make("detection", tmp_path, num_train=1, num_val=1)


@pytest.mark.parametrize("force", [False, True])
def test_other_files_are_never_touched(force, tmp_path):
    (tmp_path / "detection").mkdir()
    (tmp_path / "detection/thesis.txt").write_text("three years")
    with pytest.raises(ValueError, match="is not a digits set"):
        digits.make("detection", tmp_path, num_train=1, num_val=1, force=force)
    assert contents(tmp_path).keys() == {"detection/thesis.txt"}


def test_an_interrupted_set_leaves_nothing(tmp_path):
    def stop(numbers, title):
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        digits.make("detection", tmp_path, num_train=2, num_val=1, track=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("faster", [SMALL["detection"], dict(num_train=1, num_val=1)], ids=["same", "other"])
def test_of_two_that_start_at_once_the_first_to_finish_wins(faster, tmp_path):
    def overtaken(numbers, title):
        if "train" in title:
            assert digits.make("detection", tmp_path, **faster)
        return numbers

    if faster == SMALL["detection"]:
        assert not digits.make("detection", tmp_path, **SMALL["detection"], track=overtaken)
    else:
        with pytest.raises(ValueError, match="--force"):
            digits.make("detection", tmp_path, **SMALL["detection"], track=overtaken)
    assert [f.name for f in tmp_path.iterdir()] == ["detection"]
    assert len(list((tmp_path / "detection/train").iterdir())) == faster["num_train"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(task="segmentation"), r"'segmentation'.*detection, video"),
        (dict(num_train=0), r"num_train=0.*1 or more"),
        (dict(num_val=2.5), r"num_val=2.5.*whole number"),
        (dict(seed=-1), r"seed=-1.*0 or more"),
        (dict(seed=True), r"seed=True"),
    ],
)
def test_wrong_arguments(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        digits.make(given.pop("task", "detection"), tmp_path / "new", **given)
    assert not (tmp_path / "new").exists()


def test_an_opencv_that_writes_no_mp4_says_so(tmp_path, monkeypatch):
    class Closed:
        def __init__(self, *args):
            pass

        def isOpened(self):
            return False

    monkeypatch.setattr(cv2, "VideoWriter", Closed)
    with pytest.raises(RuntimeError, match=r"mp4v.*opencv-python"):
        digits.make("video", tmp_path, num_train=1, num_val=1)
    assert list(tmp_path.iterdir()) == []


def test_tool(tmp_path, capsys):
    import make_digits

    arguments = ["--out", str(tmp_path), "--train", "2", "--val", "1"]
    assert make_digits.main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [f"{tmp_path / task}: made" for task in digits.TASKS]
    assert "video train" in shown.err
    assert make_digits.main(["--task", "video", *arguments]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'video'}: was there\n"
    assert make_digits.main(["--task", "video", *arguments, "--seed", "7"]) == 2
    assert "--seed 7 --train 2 --val 1 --force" in capsys.readouterr().err
    assert make_digits.main(["--task", "video", *arguments, "--seed", "7", "--force"]) == 0
    assert make_digits.main(["--train", "0"]) == 2


# As the toolkits read them


@pytest.mark.parametrize("split", ["train", "val"])
def test_mmdet_reads_what_was_written(split, tmp_path):
    """The registered class, as the config builds it: makes the set, and its masks and boxes arrive unchanged."""
    pytest.importorskip("mmdet.datasets")
    from mmdet.registry import DATASETS
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    cfg = Config.fromfile(ROOT / "configs/_base_/digits_detection.py")
    options = dict(cfg[f"{split}_dataloader"].dataset, data_root=str(tmp_path), **SMALL["detection"])
    options["pipeline"] = cfg.train_pipeline  # the one that reads masks
    with DefaultScope.overwrite_default_scope("mmdet"):
        dataset = DATASETS.build(options)
    assert dataset.metainfo["classes"] == digits.CLASSES
    coco = COCO(tmp_path / "detection" / f"{split}.json")
    assert len(dataset) == len(coco.imgs) == SMALL["detection"][f"num_{split}"]
    for i in range(len(dataset)):
        item = dataset[i]
        annotations = coco.imgToAnns[item["data_samples"].img_id]
        truth = item["data_samples"].gt_instances
        assert item["inputs"].shape == (3, 128, 128)
        assert truth.labels.tolist() == [a["category_id"] - 1 for a in annotations]
        assert np.array_equal(truth.masks.masks, [coco.annToMask(a) for a in annotations])
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
        assert truth.bboxes.tensor.tolist() == corners


def test_mmaction2_reads_what_was_written(tmp_path):
    pytest.importorskip("decord")
    pytest.importorskip("mmaction.datasets")
    from mmaction.registry import DATASETS
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    cfg = Config.fromfile(ROOT / "configs/_base_/digits_video.py")
    for split in ("train", "val"):
        options = dict(cfg[f"{split}_dataloader"].dataset, data_root=str(tmp_path), **SMALL["video"])
        with DefaultScope.overwrite_default_scope("mmaction"):
            dataset = DATASETS.build(options)
        assert dataset.metainfo["classes"] == digits.MOTIONS
        lines = (tmp_path / "video" / f"{split}.txt").read_text().splitlines()
        assert len(dataset) == len(lines) == SMALL["video"][f"num_{split}"]
        for i in (0, len(lines) - 1):
            name, label = lines[i].split()
            item = dataset[i]
            assert item["data_samples"].gt_label.item() == int(label)
            want = frames(tmp_path / "video" / name)[::2]
            assert np.array_equal(item["inputs"].numpy(), want.transpose(3, 0, 1, 2)[None])


def test_the_datasets_log_that_they_made_a_set(tmp_path, monkeypatch):
    pytest.importorskip("mmdet.datasets")
    from normplug.openmmlab import digits_detection

    lines = []
    monkeypatch.setattr(digits_detection, "print_log", lambda text, **kwargs: lines.append(text))
    for _ in range(2):
        digits_detection.DigitsDetection(
            data_root=str(tmp_path), num_train=1, num_val=1, ann_file="detection/val.json", data_prefix=dict(img="")
        )
    assert lines == [f"Made the digits detection set in {tmp_path}/detection"]
    with pytest.raises(ValueError, match="--force"):
        digits_detection.DigitsDetection(data_root=str(tmp_path), num_train=2, num_val=1)


def test_configs_ask_for_the_default_sets():
    """So that `python tools/make_digits.py` makes what they look for."""
    from mmengine.config import Config

    for task in digits.TASKS:
        cfg = Config.fromfile(ROOT / f"configs/_base_/digits_{task}.py", import_custom_modules=False)
        assert cfg.digits == digits.DEFAULTS[task]
        assert cfg.data_root == "data/digits"
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            assert {key: loader.dataset[key] for key in cfg.digits} == cfg.digits
