"""What users mistype, and what their data and launches are like: one sentence, exit code 2, and no traceback."""

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.dataset import Compose
from mmengine.registry import MODELS
from torch import nn

import normplug.__main__
from normplug.openmmlab import digits
from normplug.openmmlab.config_files import read_config
from normplug.openmmlab.data_check import check_data
from normplug.openmmlab.data_files import empty_files, read_coco
from normplug.openmmlab.data_places import LOADERS, data_sets
from normplug.openmmlab.mistakes import FirstIteration, SampleError, _tell_needless_classes, answered, explain
from normplug.openmmlab.settings import check_forms, check_launcher, check_settings, check_work_dir, unknown_settings

pytest.importorskip("mmdet.models")
pytest.importorskip("mmaction.models")
# An error of a warning would be another mistake than the one that is tried
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import _launch  # noqa: E402
import benchmark_train  # noqa: E402
import compare_checkpoints  # noqa: E402
import convert_checkpoint  # noqa: E402
import quickstart  # noqa: E402
import test as test_tool  # noqa: E402
import train as train_tool  # noqa: E402

IMAGES = ROOT / "configs" / "digits" / "mask-rcnn_r18_fpn_gn_digits.py"
CLIPS = ROOT / "configs" / "digits" / "i3d_r18_gn_digits.py"
SIZES = {"detection": dict(num_train=4, num_val=2), "video": dict(num_train=8, num_val=8)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images and eight clips of digits."""
    root = tmp_path_factory.mktemp("digits")
    for task, sizes in SIZES.items():
        digits.make(task, root, seed=0, **sizes)
    return root


@pytest.fixture
def train(data, tmp_path, monkeypatch, capsys):
    """Run tools/train.py on these data; return exit code and what it wrote to stderr."""
    monkeypatch.setattr(logging, "raiseExceptions", False)  # mmengine's logger of an earlier test has that one's stream

    def run(*options, config=IMAGES, flags=(), task="detection", plain=False):
        monkeypatch.chdir(tmp_path)
        sizes = [f"{key}={value}" for key, value in {"data_root": data, **SIZES[task]}.items()]
        given = [f"{loader}.dataset.{size}" for loader in LOADERS for size in sizes]
        if task == "detection":
            file = data / "detection" / "val.json"
            given += [f"{name}.ann_file={file}" for name in ("val_evaluator", "test_evaluator")]
            given += [f"visualizer.name={tmp_path.name}"]
        given = [] if plain else ["--cfg-options", *given, *options]
        capsys.readouterr()
        with contextlib.suppress(SystemExit):
            argv = [str(config), "--work-dir", str(tmp_path / "work"), *flags, *given]
            return train_tool.main(argv), capsys.readouterr().err
        return 2, capsys.readouterr().err

    return run


def told(error: str, tool: str = "train.py") -> str:
    """Return the one sentence of a tool, and fail if there is more."""
    lines = [line for line in error.splitlines() if line.strip()]
    assert "Traceback" not in error
    assert len(lines) == 1, error
    assert lines[0].startswith(f"{tool}: ")
    return lines[0]


# --- settings: told before anything is built

SETTINGS = {
    "train_dataloader.batch_size=0": "train_dataloader.batch_size=0: expected a whole number, 1 or more.",
    "train_dataloader.batch_size=-2": "batch_size=-2: expected a whole number, 1 or more.",
    "train_dataloader.batch_size=two": "batch_size='two': expected a whole number, 1 or more.",
    "val_dataloader.batch_size=1.5": "val_dataloader.batch_size=1.5: expected a whole number",
    "train_dataloader.num_workers=-1": "num_workers=-1: expected a whole number, 0 or more.",
    "train_dataloader.persistent_workers=True": "persistent_workers=True needs num_workers of 1 or more",
    "train_cfg.max_epochs=0": "train_cfg.max_epochs=0: expected a whole number, 1 or more.",
    "train_cfg.max_epochs=-1": "max_epochs=-1: expected",
    "train_cfg.max_epochs=ten": "max_epochs='ten': expected",
    "train_cfg.max_iters=0": "max_iters=0: expected a whole number, 1 or more.",
    "train_cfg.val_interval=0": "val_interval=0: expected",
    "optim_wrapper.optimizer.lr=fast": "optim_wrapper.optimizer.lr='fast': expected a finite number above 0.",
    "optim_wrapper.optimizer.lr=nan": "lr=nan: expected a finite number above 0.",
    "optim_wrapper.optimizer.lr=inf": "lr=inf: expected",
    "optim_wrapper.optimizer.lr=-0.1": "lr=-0.1: expected",
    "optim_wrapper.optimizer.lr=0": "lr=0: expected",
    "optim_wrapper.optimizer.lr=True": "lr=True: expected",
    "optim_wrapper.optimizer.weight_decay=much": "weight_decay='much': expected a finite number, 0 or more.",
    "optim_wrapper.clip_grad.max_norm=x": "optim_wrapper.clip_grad.max_norm='x': expected",
    "optim_wrapper.accumulative_counts=0": "accumulative_counts=0: expected a whole number",
    "param_scheduler.0.milestones=a,b": "param_scheduler.0.milestones=['a', 'b']: expected a list of numbers",
    "param_scheduler.0.milestones=8": "milestones=8: expected a list of numbers, such as [8,11].",
    "param_scheduler.0.begin=x": "param_scheduler.0.begin='x': expected",
    "randomness.seed=-1": "randomness.seed=-1: expected a whole number from 0 to 2**32-1.",
    "randomness.seed=4294967296": "randomness.seed=4294967296: expected",
    "randomness.seed=abc": "randomness.seed='abc': expected",
    "auto_scale_lr.base_batch_size=0": "auto_scale_lr.base_batch_size=0: expected",
    "default_hooks.checkpoint.interval=x": "default_hooks.checkpoint.interval='x': expected",
    "default_hooks.logger.interval=0": "default_hooks.logger.interval=0: expected",
    "log_level=LOUD": "log_level='LOUD': expected one of DEBUG, INFO",
    "default_scope=mmdett": "default_scope='mmdett' is no toolkit: did you mean 'mmdet'?",
    "env_cfg=3": "env_cfg=3 is of type int, expected env_cfg=dict(...).",
    "model=3": "model=3 is of type int, expected model=dict(...).",
    "train_dataloader=3": "train_dataloader=3 is of type int",
    "model.roi_head.bbox_head.num_classes=0": "bbox_head.num_classes=0: expected the number of classes, 1 or more.",
    "model.roi_head.mask_head.num_classes=-3": "mask_head.num_classes=-3: expected",
    "model.roi_head.bbox_head.num_classes=ten": "bbox_head.num_classes='ten': expected",
    "custom_hooks=3": "custom_hooks=3: expected a list, such as [dict(type=...)].",
    "visualizer.vis_backends=a,b": "visualizer.vis_backends.0='a': expected dict(type=...).",
    "randomness=3": "randomness=3 is of type int, expected randomness=dict(...).",
    "resume=maybe": "resume='maybe': expected True or False.",
    "train_dataloader.dataset=None": "train_dataloader.dataset=None: expected dataset=dict(type=...).",
    "train_dataloader.sampler=x": "train_dataloader.sampler='x': expected sampler=dict(type=...).",
    "optim_wrapper.optimizer=None": "optim_wrapper.optimizer=None: expected optimizer=dict(type='SGD', lr=...).",
    "val_cfg=None": "val_dataloader and val_evaluator and no val_cfg: set all three",
}


def check(cfg):
    check_forms(cfg)
    check_settings(cfg, LOADERS[:2])


@pytest.mark.parametrize("option", SETTINGS)
def test_a_value_that_cannot_be_meant(option):
    path, _, value = option.partition("=")
    cfg = Config.fromfile(IMAGES)
    cfg.merge_from_dict({path: DictAction._parse_iterable(value)})
    with pytest.raises(ValueError) as error:
        check(cfg)
    assert SETTINGS[option] in str(error.value)


def test_stock_values_pass():
    for file in (IMAGES, CLIPS, *sorted((ROOT / "configs").glob("[a-z]*/*.py"))[::29]):
        check(Config.fromfile(file))


# Configs of the toolkits that mmengine refuses as well: a comma too many, no val_cfg, no sampler
REFUSED = {
    *("resnest/resnest101_32xb64_in1k.py", "clip/vit-large-p14_headless.py"),
    "minigpt4/minigpt-4_baichuan-7b_caption.py",
}


@pytest.mark.parametrize("toolkit", ["mmdet", "mmaction", "mmseg", "mmpretrain"])
def test_configs_of_the_toolkits_pass(toolkit):
    """One of every folder, for training and for testing: what is refused here could be trained before."""
    root = Path(pytest.importorskip(toolkit).__file__).parent / ".mim" / "configs"
    wrong, looked = {}, 0
    for folder in sorted({file.parent for file in root.rglob("*.py")}):
        if "_base_" in folder.parts or folder.name in ("common", "dsdl"):  # parts, and for another loader
            continue
        file = min(folder.glob("*.py"))
        try:
            cfg = Config.fromfile(file)
        except Exception:  # what mmengine cannot read either: packages that are missing, bases in another style
            continue
        for loaders in (LOADERS[:2], LOADERS[2:]):
            if cfg.get("model") is None or cfg.get(loaders[0]) is None:
                continue
            looked += 1
            try:
                check_forms(cfg)
                check_settings(cfg, loaders)
            except ValueError as error:
                wrong[str(file.relative_to(root))] = str(error)
    assert looked > 50
    assert wrong.keys() <= REFUSED, wrong


EARLY = [
    (["train_dataloader.batch_size=0"], {}, "train_dataloader.batch_size=0"),
    (["param_scheduler.7.end=3"], {}, "Index 7 exceeds the length of list param_scheduler, which is 2"),
    (["param_scheduler.last.end=3"], {}, "param_scheduler is a list, expected a number after it"),
    (["randomness.seed.x=3"], {}, "randomness.seed is 0, which has no 'x' in it"),
    ([], dict(flags=["--seed", "-1"]), "randomness.seed=-1: expected a whole number from 0 to 2**32-1"),
    ([], dict(flags=["--launcher", "pytorch"]), "--launcher pytorch needs RANK, WORLD_SIZE"),
    ([], dict(flags=["--launcher", "slurm"]), "--launcher slurm needs SLURM_PROCID"),
    ([], dict(flags=["--launcher", "mpi"]), "--launcher mpi needs OMPI_COMM_WORLD_LOCAL_RANK"),
    ([], dict(flags=["--work-dir", str(IMAGES)]), f"--work-dir {IMAGES} is a file, expected a folder"),
    ([], dict(flags=["--work-dir", "/proc/none"]), "--work-dir /proc/none cannot be written to"),
    (["model.roi_head.bbox_head.num_classes=5"], {}, "has 10 classes (0, 1, 2, 3, 4 and 5 more), and the model has"),
    (["model.roi_head.bbox_head.num_classes=20"], {}, "bbox_head.num_classes=20: set it to 10"),
    (["model.cls_head.num_classes=2"], dict(config=CLIPS, task="video"), "model.cls_head.num_classes=2, and"),
]


@pytest.mark.parametrize(("options", "how", "words"), EARLY, ids=lambda value: str(value)[:40])
def test_told_before_anything_is_built(options, how, words, train):
    how = dict(how)
    code, error = train(*options, **how)
    assert words in told(error)
    assert code == 2


# --- settings: told by what is built

BUILT = [
    ("model.type=MaskRCN", "model.type='MaskRCN' names no model that is known here: did you mean MaskRCNN or"),
    ("optim_wrapper.optimizer.type=AdamWW", "optim_wrapper.optimizer.type='AdamWW' names no optimizer", "AdamW or"),
    ("optim_wrapper.optimizer.lrr=1", "optim_wrapper.optimizer.lrr is not known to SGD: did you mean lr? It takes"),
    ("param_scheduler.1.type=CosineLR", "param_scheduler.1.type='CosineLR' names no parameter scheduler"),
    ("model.backbone.norm_cfg.type=GNN", "norm_cfg=dict(type='GNN') names a layer that nobody has registered", "GN"),
    ("model.backbone.norm_cfg.num_group=4", "backbone.norm_cfg.num_group is not known to GroupNorm", "num_groups"),
    ("model.backbone.norm_cfg.requires_gard=True", "gard is not known to GroupNorm: did you mean requires_grad?"),
    ("model.backbone.norm_cfg.num_groups=7", "GN with 32 channels cannot have num_groups=7"),
    ("model.backbone.depht=18", "model.backbone.depht is not known to ResNet: did you mean depth?"),
    ("model.backbone.depth=19", "model.backbone (ResNet) cannot be built or run: KeyError: invalid", "--debug"),
    ("model.neck.in_channels=3", "model.neck (FPN)", "AssertionError", "assert isinstance(in_channels,", "--debug"),
    ("train_dataloader.dataset.ann_fil=x", "dataset.ann_fil is not known to DigitsDetection", "ann_file?"),
    ("train_dataloader.dataset.pipeline.2.scael=4", "pipeline.2.scael is not known to Resize: did you mean scale?"),
    ("train_dataloader.dataset.pipeline.0.type=LoadImage", "dataset.pipeline.0.type='LoadImage' names no transform"),
    ("val_evaluator.type=CocoMetrik", "val_evaluator.type='CocoMetrik' names no metric", "did you mean CocoMetric"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("option", "words"), [(option, words) for option, *words in BUILT], ids=lambda v: str(v)[:40])
def test_told_by_what_is_built(option, words, train):
    code, error = train(option)
    sentence = told(error)
    assert all(word in sentence for word in words), sentence
    assert code == 2


# --- the config file

DIGITS = f"_base_ = {str(IMAGES)!r}\n"
FILES = {
    "syntax": ("model = dict(\n", "c.py, line 1: '(' was never closed"),
    "empty": ("", "c.py has no model: expected model=dict(...) in it or in one of its _base_."),
    "no model": (f"{DIGITS}model = None\n", "c.py has no model"),
    "misspelt": ("modle = dict(type='MaskRCNN')\n", "has no model (it has modle)"),
    "no train_dataloader": (f"{DIGITS}train_dataloader = None\n", "c.py has no train_dataloader"),
    "no optim_wrapper": (f"{DIGITS}optim_wrapper = None\n", "c.py has no optim_wrapper"),
    "no base": ("_base_ = './nowhere.py'\n", "there is no file", "nowhere.py that its _base_ names"),
    "no base of a toolkit": ("_base_ = 'mmdet::no/no.py'\n", "a file that its _base_ names is not there"),
    "circle": ("_base_ = './c.py'\n", "its _base_ leads back to itself: c.py -> c.py"),
    "raises": ("a = 1\nb = a / 0\n", "c.py, line 2: ZeroDivisionError: division by zero, in 'b = a / 0'"),
    "name": ("model = dict(type=ResNet)\n", "c.py, line 1: NameError: name 'ResNet' is not defined"),
    "two bases": (f"_base_ = [{str(IMAGES)!r}, {str(CLIPS)!r}]\n", "two of its _base_ files have the same keys"),
    "delete nothing": (f"{DIGITS}tta_model = dict(_delete_=True)\n", "tta_model._delete_=True: there is nothing in a"),
    "delete all": (f"{DIGITS}model = dict(backbone=dict(_delete_=True))\n", "model.backbone has no type"),
    "dict for None": (f"{DIGITS}load_from = dict(a=1)\n", "load_from is a dict here and something else in its _base_"),
    "schedule": (f"{DIGITS}param_scheduler = dict(_delete_=True)\n", "param_scheduler is an empty dict"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_config_file(name, train, tmp_path):
    text, *words = FILES[name]
    (tmp_path / "c.py").write_text(text)
    code, error = train(config=tmp_path / "c.py", plain=name != "delete all")  # that one is built
    assert all(word in told(error) for word in words), error
    assert code == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.json", b'{"model": }', "c.json is not json that can be read"),
        ("c.yml", b"a: [", "c.yml is not yml that can be read"),
        ("c.txt", b"x", "c.txt is no config: the name of one ends in .py"),
        ("c.py", b"\xff\xfe", "c.py is no text in UTF-8"),
    ],
)
def test_another_kind_of_file(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_config(tmp_path / name)
    assert words in str(error.value)


def test_a_config_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is a folder, expected a config file: one of i3d_r18_bn_digits\.py"):
        read_config(IMAGES.parent)
    with pytest.raises(FileNotFoundError, match=rf"There is no config .*Did you mean .*{IMAGES.name}"):
        read_config(IMAGES.with_name(IMAGES.name.replace("mask-rcnn", "maskrcnn")))


# --- keys that nothing reads

UNKNOWN = {
    "optim_wraper.optimizer.lr": "did you mean optim_wrapper.optimizer.lr?",
    "optimizer.lr": "did you mean optim_wrapper.optimizer.lr?",
    "train_dataloader.batchsize": "did you mean train_dataloader.batch_size?",
    "batch_size": "did you mean train_dataloader.batch_size?",
    "lr": "did you mean optim_wrapper.optimizer.lr?",
    "device": "did you mean CUDA_VISIBLE_DEVICES in the environment?",
    "test_evalutor.metric": "did you mean test_evaluator.metric?",
    "devise": "did you mean CUDA_VISIBLE_DEVICES in the environment?",
    "total_epochs": "did you mean train_cfg.max_epochs?",
    "data_root": "did you mean train_dataloader.dataset.data_root?",  # a variable of the file, read long ago
    "randomness.sed": "did you mean randomness.seed?",
    "env_cfg.cudnn_benchmarks": "did you mean env_cfg.cudnn_benchmark?",
    "model.test_cfg.rcnn.scor_thr": "did you mean model.test_cfg.rcnn.score_thr?",
}


def test_a_key_that_nothing_reads_is_told_with_the_nearest():
    cfg = Config.fromfile(IMAGES)
    sentences = unknown_settings(cfg, dict.fromkeys(UNKNOWN, 1))
    assert len(sentences) == len(UNKNOWN)
    for (path, like), sentence in zip(UNKNOWN.items(), sentences, strict=True):
        assert sentence.startswith(f"--cfg-options {path}: nothing reads ")
        assert sentence.endswith(like)


def test_keys_that_are_read_are_not_told():
    read = ("optim_wrapper.optimizer.lr", "optim_wrapper.optimizer.nesterov", "train_dataloader.pin_memory", "compile")
    read += ("model.backbone.with_cp", "param_scheduler.0.verbose", "load_from", "find_unused_parameters", "work_dir")
    read += ("randomness.deterministic", "train_dataloader.dataset.indices", "default_hooks.checkpoint.save_best")
    read += ("model.replace_norm.type", "model.backbone.norm_cfg.requires_grad", "default_hooks.early.type")
    assert unknown_settings(Config.fromfile(IMAGES), dict.fromkeys(read, 1)) == []


# --- data


def spoil(data: Path, tmp_path: Path, change) -> Config:
    """Return the config of copied images whose training annotations are changed."""
    shutil.copytree(data, tmp_path / "d")
    file = tmp_path / "d" / "detection" / "train.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    cfg = Config.fromfile(IMAGES)
    for _, dataset in data_sets(cfg):
        dataset.update(data_root=str(tmp_path / "d"), **SIZES["detection"])
    for name in ("val_evaluator", "test_evaluator"):
        cfg[name].ann_file = str(tmp_path / "d" / "detection" / "val.json")
    return cfg


def first(content):
    return content["annotations"][0]


FAULTS = {
    "no annotations": (lambda c: c.update(annotations=[]), "has no annotations of the classes 0, 1"),
    "NaN": (lambda c: first(c).update(bbox=[float("nan"), 1, 5, 5]), r"annotations\[0\] has bbox=\[nan, 1, 5, 5\]"),
    "infinite": (lambda c: first(c).update(bbox=[1, 1, float("inf"), 5]), "finite and in pixels"),
    "area": (lambda c: first(c).update(area=None), r"annotations\[0\] has area=None, expected a number"),
    "width": (lambda c: c["images"][1].update(width="128"), r"images\[1\] has width='128', height=128"),
    "ids": (lambda c: c["images"][1].update(id=c["images"][0]["id"]), "1 of 4 images have an id that another has"),
    "category": (lambda c: first(c).update(category_id=99), "have a category_id that no category of the file has"),
    "mixed ids": (lambda c: first(c).update(image_id="1"), "image_id that no image of the file has, the first is '1'"),
    "all negative": (
        lambda c: [a.update(bbox=[50, 50, -9, -9]) for a in c["annotations"]],
        "no box that can be used",
    ),
    "polygons": (
        lambda c: [a.update(segmentation=[[1, 2, 3, 4]]) for a in c["annotations"]],
        "have no polygon of 3 corners or more, the first is annotation 1: expected",
    ),
    "no masks": (lambda c: [a.pop("segmentation") for a in c["annotations"]], "has no mask"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_annotations_that_cannot_be_trained_on(name, data, tmp_path):
    change, words = FAULTS[name]
    with pytest.raises(ValueError, match=words):
        check_data(spoil(data, tmp_path, change), LOADERS[:1])


def test_some_boxes_that_are_not_used_are_told(data, tmp_path, capsys):
    def change(content):
        for annotation, box in zip(content["annotations"], ([5, 5, -3, 4], [900, 5, 3, 4], [5, 5, 0, 4]), strict=False):
            annotation["bbox"] = box

    check_data(spoil(data, tmp_path, change), LOADERS[:1])
    assert "3 of the boxes in" in (error := capsys.readouterr().err)
    assert "are not trained on" in error
    assert "annotation 1, [5, 5, -3, 4]" in error


def test_corners_in_place_of_sizes_are_told(data, tmp_path, capsys):
    def change(content):
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["bbox"] = [x, y, x + w, y + h]

    check_data(spoil(data, tmp_path, change), LOADERS[:1])
    assert "reach beyond their image: is their form [x1, y1, x2, y2]" in capsys.readouterr().err
    check_data(spoil(data, tmp_path / "as they are", lambda content: None), LOADERS[:1])
    assert not capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", '{"images"', "version https://git-lfs", '{"a": 1}'])
def test_annotations_of_another_kind(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a.json.*COCO's json is an object with the lists"):
        read_coco(tmp_path / "a.json")


def test_empty_files_are_found_and_missing_ones_are_another_matter(data, tmp_path):
    cfg = spoil(data, tmp_path, lambda content: None)
    (tmp_path / "d" / "detection" / "train" / "000002.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"1 of the 4 images in .*train.json are empty \(0 bytes\), the first is .*002"
    ):
        check_data(cfg, LOADERS[:1])
    assert empty_files(tmp_path / "d" / "detection" / "train", ["000002.png"], seconds=-1) == []
    cfg = Config.fromfile(CLIPS)
    for _, dataset in data_sets(cfg):
        dataset.update(data_root=str(tmp_path / "d"), **SIZES["video"])
    (tmp_path / "d" / "video" / "train" / "000003.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of the 8 videos in .*train.txt are empty"):
        check_data(cfg, LOADERS[:1])


def test_classes_of_digits_that_are_still_to_be_made(tmp_path):
    for file, head in ((IMAGES, "roi_head.mask_head"), (CLIPS, "cls_head")):
        cfg = Config.fromfile(file)
        for _, dataset in data_sets(cfg):
            dataset.data_root = str(tmp_path / "none yet")
        check_data(cfg)
        cfg.merge_from_dict({f"model.{head}.num_classes": 99})
        with pytest.raises(ValueError, match=rf"{head}.num_classes=99: set it to"):
            check_data(cfg)


class Reads:
    """A step of a pipeline."""

    def __init__(self, error):
        self.error = error

    def __call__(self, results):
        raise self.error


def test_the_file_of_a_sample_is_named(tmp_path):
    with answered("t", False):  # has pipelines name their samples
        pass
    whole, empty = tmp_path / "whole.jpg", tmp_path / "empty.jpg"
    whole.write_bytes(b"x")
    empty.write_bytes(b"")
    cases = [
        (whole, KeyError("mask"), "whole.jpg cannot be used: Reads needs 'mask', which its annotation does not have"),
        (whole, AssertionError("failed to load"), "Reads failed with AssertionError: failed to load. Mend the file"),
        (empty, cv2.error("!buf.empty()"), "empty.jpg is empty (0 bytes): put the whole file there"),
        (
            tmp_path / "no.jpg",
            OSError("x"),
            "no.jpg is in the annotations and not on the disk (Reads)",
        ),
    ]
    for file, error, words in cases:
        with pytest.raises(SampleError) as caught:
            Compose([Reads(error)])({"img_path": str(file)})
        assert words in str(caught.value)
        assert explain(caught.value) == str(caught.value)


def test_a_sample_that_another_process_failed_at():
    text = (
        "Caught SampleError in DataLoader worker process 0.\nOriginal Traceback:\n  ...\nx.SampleError: a.jpg is empty."
    )
    assert explain(SampleError(text)) == "a.jpg is empty."


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_ends_training_in_one_sentence(workers, data, train, tmp_path):
    cfg = spoil(data, tmp_path, lambda content: None)
    for file in (tmp_path / "d" / "detection" / "train").glob("*.png"):
        file.write_bytes(file.read_bytes()[:60])
    cfg.train_dataloader.num_workers = workers
    cfg.visualizer.name = tmp_path.name
    cfg.dump(tmp_path / "c.py")
    code, error = train(config=tmp_path / "c.py", plain=True)
    assert ".png cannot be used: LoadImageFromFile failed with" in told(error)
    assert code == 2


# --- the first iteration


class Loop:
    """As much of a runner as the hook looks at."""

    def __init__(self, samples, batch=1):
        loader = torch.utils.data.DataLoader(list(range(samples)), batch_size=batch, drop_last=True)
        self.train_dataloader, self.val_loop, self.cfg = loader, None, Config()


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(
        ValueError, match=r"train_dataloader has no batch: its data set \(list\) holds 0 samples. Check"
    ):
        FirstIteration().before_train(Loop(0))
    with pytest.raises(ValueError, match="3 samples, fewer than a batch, and drop_last=True leaves them out"):
        FirstIteration().before_train(Loop(3, batch=4))
    FirstIteration().before_train(Loop(4, batch=4))


def test_losses_that_are_no_numbers_are_told_once(capsys):
    hook = FirstIteration()
    for _ in range(2):
        hook.after_train_iter(
            Loop(1), 0, outputs={"loss_cls": torch.tensor(float("nan")), "loss_box": torch.tensor(1.0)}
        )
    assert capsys.readouterr().err.count("normplug: loss_cls of the first iteration is NaN or infinite") == 1
    FirstIteration().after_train_iter(Loop(1), 0, outputs={"loss_cls": torch.tensor(1.0)})
    assert not capsys.readouterr().err


def test_after_the_first_iteration_an_error_keeps_its_traceback(capsys):
    answer = answered("train.py", False)
    answer.first.is_done = True
    with pytest.raises(RuntimeError, match="boom"), answer:
        raise RuntimeError("boom")
    assert not capsys.readouterr().err  # what is not known is not explained
    with pytest.raises(SampleError), answer:
        raise SampleError("a.jpg is empty")
    assert capsys.readouterr().err == "train.py: a.jpg is empty\n"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_is_no_error_passes(stop, capsys):
    with pytest.raises(stop), answered("train.py", False):
        raise stop
    assert not capsys.readouterr().err


def fails_by_itself():
    return {}["a key of ours"]


def test_a_fault_of_the_code_is_not_taken_for_a_mistake(capsys):
    """It has its class, its message and its place, and the way to its traceback."""
    with answered("train.py", False) as answer:
        fails_by_itself()
    sentence = told(capsys.readouterr().err)
    assert "KeyError: a key of ours (in " in sentence
    assert "test_mistakes.py, line" in sentence
    assert sentence.endswith("--debug shows the whole traceback.")
    assert answer.code == 2
    assert "int() with base 10" in explain(caught(lambda: int("x"), ValueError))
    assert "--debug" in explain(caught(lambda: unknown_settings(Config(), 0), TypeError))  # ours, and nobody raised it


class Unequal(dict):
    """A part of a config that cannot be compared, as arrays cannot."""

    def __eq__(self, other):
        raise ValueError("The truth value of an array is ambiguous")

    __hash__ = None


def test_an_error_that_cannot_be_placed_is_told_all_the_same():
    cfg = Config(dict(model=dict(type="Conv2d")))
    cfg.model["init_cfg"] = Unequal(type="x")

    def build(cfg):
        MODELS.build({**cfg.model, "in_channels": 3})

    sentence = explain(caught(lambda: build(cfg), TypeError))
    assert sentence.startswith("TypeError: ")
    assert sentence.endswith("--debug shows the whole traceback.")


def caught(call, kind):
    with pytest.raises(kind) as error:
        call()
    return error.value


def test_debug_shows_the_traceback_and_the_sentence(capsys):
    with answered("train.py", True) as answer:
        fails_by_itself()
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert 'return {}["a key of ours"]' in error
    assert error.splitlines()[-1].startswith("train.py: ")
    assert answer.code == 2


def test_one_process_of_a_run_speaks_for_all(tmp_path, monkeypatch, capsys):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        with answered("train.py", False) as answer:
            fails_by_itself()
        assert answer.code == 2
    assert "KeyError" in told(capsys.readouterr().err)


def test_labels_that_a_model_has_no_output_for():
    wrong = caught(lambda: nn.functional.cross_entropy(torch.zeros(1, 3), torch.tensor([6])), IndexError)
    assert "the label 6 that the model has no output for" in explain(wrong)
    assert "set num_classes" in explain(RuntimeError("CUDA error: device-side assert triggered"))


def test_where_in_the_model_shapes_differ():
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(3, 4)))
    sentence = explain(caught(lambda: model(torch.zeros(2, 5)), RuntimeError))
    assert "model.1.0 (Linear) ended in RuntimeError: mat1 and mat2 shapes" in sentence


def test_a_data_set_that_finds_nothing():
    sentence = explain(caught(lambda: np.concatenate([]), ValueError))
    assert "has found no sample: check its data_root, data_prefix, ann_file" in sentence


def test_outputs_without_a_class_are_told(capsys):
    dataset = SimpleNamespace(metainfo=dict(classes=("a", "b")))
    runner = SimpleNamespace(train_dataloader=SimpleNamespace(dataset=dataset))
    head = dict(type="LinearClsHead", num_classes=5)
    runner.cfg = Config(dict(default_scope="mmpretrain", model=dict(type="ImageClassifier", head=head)))
    _tell_needless_classes(runner)
    assert "model.head.num_classes=5, and SimpleNamespace has 2 classes (a, b)" in capsys.readouterr().err
    head["num_classes"] = 2
    runner.cfg = Config(dict(default_scope="mmpretrain", model=dict(type="ImageClassifier", head=head)))
    _tell_needless_classes(runner)
    assert not capsys.readouterr().err


def test_a_machine_that_is_too_small():
    assert "set a smaller train_dataloader.batch_size" in explain(torch.OutOfMemoryError("CUDA out of memory"))
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")
    assert "shared memory (/dev/shm)" in explain(killed)


def test_what_a_class_lacks_is_told():
    cfg = Config(dict(model=dict(type="Conv2d", in_channels=3)))

    def build(cfg):
        MODELS.build(cfg.model)

    assert "model (Conv2d) lacks 'out_channels' and 'kernel_size'" in explain(caught(lambda: build(cfg), TypeError))


# --- launches


def test_processes_of_torchrun_know_their_launcher(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun has started 2 processes, and without --launcher pytorch each would"):
        check_launcher("none")
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    check_launcher("pytorch")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match="more processes than there are GPUs: LOCAL_RANK=3, and 2 GPUs are visible"):
        check_launcher("pytorch")
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="RANK='x' in the environment"):
        check_launcher("pytorch")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_work_dir_that_is_not_ours(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="cannot be written to"):
        check_work_dir(tmp_path)


LAUNCHES = [
    (dict(NNODES="2"), "NNODES=2 needs NODE_RANK and MASTER_ADDR: set NNODES=2 NODE_RANK=0"),
    (dict(NNODES="2", NODE_RANK="1"), "NNODES=2 needs MASTER_ADDR"),
    (dict(NODE_RANK="5"), "NODE_RANK='5' without NNODES"),
    (dict(NNODES="2", NODE_RANK="2", MASTER_ADDR="127.0.0.1"), "NODE_RANK='2': expected a whole number from 0 to 1"),
    (dict(NNODES="two"), "NNODES='two': expected a whole number"),
    (dict(NNODES="0"), "NNODES='0': expected a whole number from 1"),
    (dict(PORT="abc"), "PORT='abc': expected a whole number from 1 to 65535"),
    (dict(PORT="70000"), "PORT='70000': expected"),
    (dict(NNODES="2", NODE_RANK="0", MASTER_ADDR="no host"), "MASTER_ADDR='no host' is no address"),
]


@pytest.mark.parametrize(("settings", "words"), LAUNCHES, ids=str)
def test_a_launch_that_cannot_be(settings, words, monkeypatch, capsys):
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert _launch.main(["train", "c.py", "2"]) == 2
    assert words in told(capsys.readouterr().err, "_dist.sh")


def test_more_processes_than_gpus_and_a_port_in_use(monkeypatch, capsys):
    with socket.create_server(("", 0)) as other:
        monkeypatch.setenv("PORT", str(other.getsockname()[1]))
        assert _launch.main(["train", "c.py", "2"]) == 2
        assert "cannot be used (Address already in use)" in told(capsys.readouterr().err, "_dist.sh")
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
        assert _launch.main(["train", "c.py", "2"]) == 2
        assert "2 processes were asked for and 1 GPUs are visible" in told(capsys.readouterr().err, "_dist.sh")


def meet(port, nodes, seconds=5):
    """Let nodes, given as pairs of what they say of NNODES and NODE_RANK, meet; return what each ends with."""
    ends = {}

    def one(number, count, rank):
        try:
            _launch.meet(count, rank, "127.0.0.1", port, seconds)
            ends[number] = "agreed"
        except _launch.LaunchError as error:
            ends[number] = str(error)

    threads = [threading.Thread(target=one, args=(i, *node)) for i, node in enumerate(nodes)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # in this order
    for thread in threads:
        thread.join()
    return [ends[i] for i in range(len(nodes))]


def test_nodes_meet_and_agree_or_say_why_not():
    port = _launch.free_port()
    assert meet(port, [(2, 0), (2, 1)]) == ["agreed"] * 2
    assert meet(port, [(3, 2), (3, 1), (3, 0)]) == ["agreed"] * 3  # the first may come last
    why = "NNODES=2 on node 0 and NNODES=3 on node 1: expected the same on all."
    assert meet(port, [(2, 0), (3, 1)]) == [why] * 2
    why = "two nodes have NODE_RANK=1: expected 0 to 2, each once."
    assert meet(port, [(3, 0), (3, 1), (3, 1)]) == [why] * 3
    assert meet(port, [(3, 0), (3, 1)], 1) == ["node 2 of 3 has not come in 1 seconds."] * 2
    assert f"has not answered at MASTER_ADDR=127.0.0.1 PORT={port} in 1 seconds" in meet(port, [(2, 1)], 1)[0]


def test_another_program_has_the_first_nodes_port():
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet():
            connection, _ = other.accept()
            connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")
            connection.close()

        threading.Thread(target=greet).start()
        assert "is no node 0 that waits for others" in meet(other.getsockname()[1], [(2, 1)])[0]


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_one_sentence(tmp_path):
    command = [str(ROOT / "tools" / "dist_train.sh"), str(IMAGES), "2", "--work-dir", str(tmp_path)]
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PORT": str(_launch.free_port())}
    done = subprocess.run(
        [*command, "--cfg-options", "train_dataloader.batch_size=0"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "train_dataloader.batch_size=0: expected" in told(done.stderr)


# --- the other tools


@pytest.mark.parametrize(
    ("tool", "name", "argv", "words"),
    [
        (test_tool, "test.py", ["no.py", "a.pth"], "There is no config no.py"),
        (test_tool, "test.py", [str(IMAGES), "no.pth"], "There is no checkpoint no.pth"),
        (compare_checkpoints, "compare_checkpoints.py", ["a.py", "a.pth", "b.py", "b.pth"], "There is no config a.py"),
        (convert_checkpoint, "convert_checkpoint.py", ["a.pth", "b.pth", "--config", "c.py"], "no config c.py"),
        (benchmark_train, "benchmark_train.py", ["--table", "no.json"], "There is no file no.json"),
        (quickstart, "quickstart.py", ["--work-dir", "/proc/none"], "--work-dir /proc/none cannot be written to"),
        (normplug.__main__, "normplug", ["bench", "--table", "no.json"], "There is no file no.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_tools(tool, name, argv, words, capsys):
    assert tool.main(argv) == 2
    assert words in told(capsys.readouterr().err, name)
    assert tool.main([*argv, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [dict(GPUS="x"), dict(GPUS="3", GPUS_PER_NODE="2"), {}], ids=str)
def test_slurm(settings):
    config = str(IMAGES if settings else "no.py")
    done = subprocess.run(
        [ROOT / "tools" / "slurm_train.sh", "p", "j", config, "w"],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    words = {"x": "GPUS=x: expected a whole number", "3": "GPUS=3 is no multiple of GPUS_PER_NODE=2"}
    assert words.get(settings.get("GPUS"), "There is no config no.py") in told(done.stderr, "slurm_train.sh")
    assert done.returncode == 2
