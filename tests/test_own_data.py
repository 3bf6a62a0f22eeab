"""--data: one's own images and videos in any config, and every mistake in data told before anything is built."""

import copy
import functools
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from stock_configs import stock

from normplug.openmmlab.data_check import check_data
from normplug.openmmlab.data_files import read_coco
from normplug.openmmlab.data_places import class_counts, data_sets, evaluators
from normplug.openmmlab.own_data import use_data

pytest.importorskip("mmdet.models")
pytest.importorskip("mmaction.models")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import train as train_tool  # noqa: E402

CATEGORIES = [dict(id=7, name="square"), dict(id=3, name="disc")]  # not in the order of their ids, as happens
LAYOUTS = {
    "coco": ("annotations/instances_{0}2017.json", "{0}2017"),
    "without a year": ("annotations/instances_{0}.json", "images/{0}"),
    "flat": ("{0}.json", "{0}"),
    "one folder": ("annotations/{0}.json", "images"),
    "beside": ("{0}.json", ""),
    "roboflow": ("{1}/_annotations.coco.json", "{1}"),
}


def content(number=3):
    images = [dict(id=10 + i, file_name=f"{i}.png", width=64, height=48) for i in range(number)]
    annotations = [
        dict(
            id=i + 1,
            image_id=10 + i // 2,
            category_id=[7, 3][i % 2],
            bbox=[8, 8, 24, 24],
            area=576,
            iscrowd=0,
            segmentation=[[8, 8, 32, 8, 32, 32, 8, 32]],
        )
        for i in range(2 * number)
    ]
    return dict(images=images, annotations=annotations, categories=CATEGORIES)


def make_images(root, layout="flat", **changes):
    for split, other in (("train", "train"), ("val", "valid")):
        file, folder = (form.format(split, other) for form in LAYOUTS[layout])
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / file).write_text(json.dumps(content() | changes))
        for image in content()["images"]:
            cv2.imwrite(str(root / folder / image["file_name"]), np.full((48, 64, 3), 90, np.uint8))
    return root


def make_video(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"mp4v"), 8, (32, 32))
    for i in range(8):
        writer.write(np.full((32, 32, 3), 20 * i, np.uint8))
    writer.release()


@functools.cache
def read(name):
    return Config.fromfile(ROOT / "configs" / f"{name}.py")


def ours(name):
    return copy.deepcopy(read(name))


GN = "mask_rcnn/mask-rcnn_r50_fpn_gn-all_2x_coco"
DIGITS = "digits/mask-rcnn_r18_fpn_gn_digits"
I3D = "i3d/i3d_r50_gn_8xb8-32x2x1-100e_kinetics400-rgb"


# --- images


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found_and_every_place_set(layout, tmp_path):
    cfg = ours(GN)
    told = use_data(cfg, make_images(tmp_path, layout))
    assert "2 classes (square, disc), train 3 images with 6 objects" in told
    for _, dataset in data_sets(cfg):
        assert dataset.metainfo.classes == ("square", "disc")
        assert Path(dataset.data_root, dataset.ann_file).is_file()
        assert Path(dataset.data_root, dataset.data_prefix.img, "0.png").is_file()
    assert [count for *_, count in class_counts(cfg)] == [2, 2]
    for path, metric in evaluators(cfg):
        split = "val" if layout != "roboflow" else "valid"
        assert split in metric.ann_file
        assert Path(metric.ann_file).is_file(), path
    check_data(cfg)


DETECTORS = [  # heads as a list, defaults that no config names, wrappers, losses that weigh classes
    ("mask_rcnn/mask-rcnn_r50_fpn_1x_coco", 2),
    ("cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco", 4),
    ("ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco", 3),
    ("retinanet/retinanet_r50_fpn_1x_coco", 1),
    ("fcos/fcos_r50-caffe_fpn_gn-head_1x_coco", 1),
    ("yolox/yolox_tiny_8xb8-300e_coco", 1),
    ("deformable_detr/deformable-detr_r50_16xb2-50e_coco", 1),
    ("detr/detr_r50_8xb2-150e_coco", 1),
    ("solov2/solov2_r50_fpn_1x_coco", 1),
    ("mask2former/mask2former_r50_8xb2-lsj-50e_coco", 2),
    ("rtmdet/rtmdet-ins_tiny_8xb32-300e_coco", 1),
    ("ssd/ssd300_coco", 1),
]


@pytest.mark.parametrize(("path", "heads"), DETECTORS, ids=lambda value: str(value).split("/")[-1])
def test_stock_detectors_take_the_data_too(path, heads, tmp_path):
    cfg = stock("mmdet", path)
    use_data(cfg, make_images(tmp_path))
    check_data(cfg)
    counts = list(class_counts(cfg))
    assert [count for *_, count in counts] == [2] * heads
    losses = [loss for _, part, *_ in counts for loss in part.values() if isinstance(loss, dict)]
    weights = [loss["class_weight"] for loss in losses if loss.get("class_weight")]
    assert all(len(weight) == 3 for weight in weights if isinstance(weight, list))
    assert ("mask2former" in path) == any(isinstance(weight, list) for weight in weights)


def test_other_metrics_give_way_and_a_set_without_masks_is_refused(tmp_path):
    make_images(tmp_path)
    cfg = stock("mmdet", "pascal_voc/faster-rcnn_r50_fpn_1x_voc0712")  # two sets in one, repeated
    use_data(cfg, tmp_path)
    assert [dict(metric) for _, metric in evaluators(cfg)] == 2 * [
        dict(type="CocoMetric", metric="bbox", ann_file=str(tmp_path / "val.json"))
    ]
    assert [dataset.type for _, dataset in data_sets(cfg)] == ["CocoDataset"] * 3
    check_data(cfg)
    bare = [{key: value for key, value in one.items() if key != "segmentation"} for one in content()["annotations"]]
    make_images(tmp_path, annotations=bare)
    with pytest.raises(ValueError, match=r"predicts masks.*without a segmentation"):
        use_data(ours(GN), tmp_path)
    cfg = ours("faster_rcnn/faster-rcnn_r50_fpn_gn-all_2x_coco")
    use_data(cfg, tmp_path)
    check_data(cfg)


def test_a_config_that_reads_more_than_objects_is_refused(tmp_path):
    make_images(tmp_path)
    with pytest.raises(ValueError, match="also reads a map of the whole image"):
        use_data(stock("mmdet", "htc/htc_r50_fpn_1x_coco"), tmp_path)


def test_heads_that_leave_their_number_of_classes_to_a_default_are_set(tmp_path):
    cfg = ours(GN)
    del cfg.model.roi_head.bbox_head["num_classes"], cfg.model.roi_head.mask_head["num_classes"]
    assert [count for *_, count in class_counts(cfg)] == [80, 80]
    use_data(cfg, make_images(tmp_path))
    assert cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == 2
    cfg = stock("mmaction", "recognition/tpn/tpn-slowonly_r50_8xb8-8x8x1-150e_kinetics400-rgb")
    assert [key for _, _, key, _ in class_counts(cfg)] == ["out_channels", "num_classes"]


def test_roboflows_name_of_the_project_is_no_class(tmp_path):
    project = [dict(id=0, name="shapes", supercategory="none")]
    real = [dict(category, supercategory="shapes") for category in CATEGORIES]
    cfg = ours(GN)
    use_data(cfg, make_images(tmp_path, categories=project + real))
    assert cfg.train_dataloader.dataset.metainfo.classes == ("square", "disc")
    check_data(cfg)


def test_a_class_named_as_its_supercategory_stays_one_where_no_image_shows_it(tmp_path):
    names = [dict(category, supercategory=category["name"]) for category in CATEGORIES]
    make_images(tmp_path, categories=names)
    squares = [one for one in content()["annotations"] if one["category_id"] == 7]
    (tmp_path / "val.json").write_text(json.dumps(content() | dict(categories=names, annotations=squares)))
    cfg = ours(GN)
    use_data(cfg, tmp_path)
    assert cfg.val_dataloader.dataset.metainfo.classes == ("square", "disc")


def test_a_file_is_read_once_and_again_when_it_has_changed(tmp_path):
    make_images(tmp_path)
    assert read_coco(tmp_path / "val.json") is read_coco(tmp_path / "val.json")
    (tmp_path / "val.json").write_text(json.dumps(content(1)))
    assert len(read_coco(tmp_path / "val.json").images) == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "val.json").unlink(), "no annotations for val. Looked for .*val.json"),
        (lambda root: (root / "train.json").write_text("<html>"), "train.json is not json"),
        (lambda root: (root / "train.json").write_text("[]"), r"train.json holds a list at its top; COCO.s json is"),
        (lambda root: (root / "train.json").write_text(json.dumps(content() | dict(images=[]))), "has no 'images'"),
        (lambda root: (root / "train" / "0.png").unlink(), "names the image '0.png', and it is in none of"),
        (
            lambda root: (root / "val.json").write_text(json.dumps(content() | dict(categories=CATEGORIES[::-1]))),
            "Expected the same categories in the same order",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_told(spoil, message, tmp_path):
    make_images(tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        use_data(ours(GN), tmp_path)


# --- mistakes of a config that was set by hand


def annotated(root, **changes):
    (root / "train.json").write_text(json.dumps(content() | changes))


def every(cfg, **changes):
    for _, dataset in data_sets(cfg):
        for key, value in changes.items():
            dataset[key] = value  # update would merge it into what is there


MISTAKES = {
    "classes forgotten": (
        lambda cfg, root: every(cfg, metainfo=None),
        r"has no metainfo.classes and so those of CocoDataset .*train.json has 2 \(square, disc\): write metainfo=",
    ),
    "classes of another set": (
        lambda cfg, root: every(cfg, metainfo=dict(classes=("cat", "dog"))),
        r"has 'cat', 'dog', and .*train.json has no such category, but 'square', 'disc'",
    ),
    "one class misspelt": (
        lambda cfg, root: every(cfg, metainfo=dict(classes=("square", "disk"))),
        r"classes has 'disk', and .* has no such category",
    ),
    "classes in another order": (
        lambda cfg, root: every(cfg, metainfo=dict(classes=("disc", "square"))),
        r"has them in the order \('square', 'disc'\)",
    ),
    "one head forgotten": (
        lambda cfg, root: cfg.model.roi_head.mask_head.update(num_classes=80),
        r"the model has model.roi_head.mask_head.num_classes=80: set it to 2",
    ),
    "too few classes": (
        lambda cfg, root: cfg.model.roi_head.bbox_head.update(num_classes=1),
        r"bbox_head.num_classes=1: set it to 2",
    ),
    "annotation file": (
        lambda cfg, root: cfg.train_dataloader.dataset.update(ann_file="no.json"),
        r"train_dataloader.dataset.ann_file: there is no file .*no.json",
    ),
    "root": (
        lambda cfg, root: every(cfg, data_root="nowhere/"),
        r"train_dataloader.dataset.data_root: there is no folder nowhere",
    ),
    "image folder": (
        lambda cfg, root: cfg.val_dataloader.dataset.update(data_prefix=dict(img="pictures")),
        r"val_dataloader.dataset.data_prefix.img: there is no folder .*pictures",
    ),
    "metric's file": (
        lambda cfg, root: cfg.val_evaluator.update(ann_file="data/coco/annotations/instances_val2017.json"),
        r"val_evaluator.ann_file: there is no file data/coco",
    ),
    "metric of another set": (
        lambda cfg, root: (
            annotated(
                root, images=[dict(image, file_name=f"other/{image['file_name']}") for image in content()["images"]]
            ),
            cfg.val_evaluator.update(ann_file=str(root / "train.json")),
            cfg.pop("train_dataloader"),
        ),
        r"val_evaluator.ann_file is .*train.json, and val_dataloader.dataset reads .*val.json \(3 of 3 images are not",
    ),
    "no json": (lambda cfg, root: (root / "train.json").write_text("version https://git-lfs"), "is not json"),
    "no annotations": (
        lambda cfg, root: annotated(root, annotations=[]),
        r"has no annotations of the classes square, disc",
    ),
    "unknown category": (
        lambda cfg, root: annotated(root, annotations=[dict(content()["annotations"][0], category_id=1)]),
        "1 of 1 annotations have a category_id that no category of the file has, the first is 1; the ids .* are 3, 7",
    ),
    "unknown image": (
        lambda cfg, root: annotated(root, annotations=[dict(content()["annotations"][0], image_id=1)]),
        "1 of 1 annotations have a image_id that no image of the file has",
    ),
    "no masks": (
        lambda cfg, root: annotated(root, annotations=[dict(content()["annotations"][0], segmentation=[])]),
        r"has no mask \(segmentation\) in 1 of 1 annotations",
    ),
    "classes as text": (
        lambda cfg, root: every(cfg, metainfo=dict(classes="square")),
        r"metainfo.classes is the text 'square', expected a tuple: write \('square',\)",
    ),
    "classes in capitals": (
        lambda cfg, root: every(cfg, metainfo=dict(CLASSES=("square", "disc"))),
        r"has no metainfo.classes \(CLASSES is not read\)",
    ),
    "a number of classes for all": (
        lambda cfg, root: every(cfg, metainfo=dict(classes=())),
        "metainfo has no classes",
    ),
    "no box": (
        lambda cfg, root: annotated(root, annotations=[{"id": 1, "image_id": 10, "category_id": 7}]),
        r"annotations\[0\] has no 'bbox'",
    ),
    "no size": (
        lambda cfg, root: annotated(root, images=[dict(id=10, file_name="0.png")]),
        r"images\[0\] has no 'height'",
    ),
    "box as text": (
        lambda cfg, root: annotated(root, annotations=[dict(content()["annotations"][0], bbox="8 8 24 24")]),
        r"annotations\[0\] has bbox='8 8 24 24', expected \[x, y, width, height\]",
    ),
    "boxes from 0 to 1": (
        lambda cfg, root: annotated(root, annotations=[dict(content()["annotations"][0], bbox=[0.1, 0.1, 0.5, 0.5])]),
        r"1 annotations and no box that can be used, the first is \[0.1, 0.1, 0.5, 0.5\]",
    ),
    "ids twice": (
        lambda cfg, root: annotated(root, annotations=2 * content()["annotations"]),
        "6 of 12 annotations have an id that another has",
    ),
    "names twice": (
        lambda cfg, root: annotated(root, categories=[dict(id=7, name="disc"), dict(id=3, name="disc")]),
        "several categories of the same name: disc",
    ),
    "no annotations at all": (
        lambda cfg, root: (root / "val.json").write_text(
            json.dumps({k: content()[k] for k in ("images", "categories")})
        ),
        "has no list of annotations",
    ),
    "metric with another order": (
        lambda cfg, root: (
            (root / "other.json").write_text(
                json.dumps(json.loads((root / "val.json").read_text()) | dict(categories=CATEGORIES[::-1]))
            ),
            cfg.val_evaluator.update(ann_file=str(root / "other.json")),
        ),
        "its categories are disc, square",
    ),
    "missing image": (
        lambda cfg, root: (root / "val" / "1.png").unlink(),
        r"1 of the 3 images in .*val.json are not in .*val, the first is '1.png'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_training(name, tmp_path):
    spoil, message = MISTAKES[name]
    cfg = ours(GN)
    use_data(cfg, make_images(tmp_path))
    check_data(cfg)
    spoil(cfg, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_data(cfg)


def test_what_is_not_used_is_not_looked_for_and_wrappers_are_looked_into(tmp_path):
    cfg = ours(GN)
    use_data(cfg, make_images(tmp_path))
    cfg.test_dataloader.dataset.ann_file = "no.json"
    check_data(cfg, ("train_dataloader", "val_dataloader"))
    cfg.train_dataloader.dataset = dict(type="RepeatDataset", times=2, dataset=cfg.train_dataloader.dataset)
    check_data(cfg, ("train_dataloader",))
    cfg.train_dataloader.dataset.dataset.ann_file = "no.json"
    with pytest.raises(FileNotFoundError, match=r"train_dataloader.dataset.dataset.ann_file: there is no"):
        check_data(cfg, ("train_dataloader",))


# --- videos


def make_videos(root, layout):
    for split in ("train", "val"):
        for name in ("down", "up"):
            place = {"folders": f"{split}/{name}", "kinetics": f"videos_{split}/{name}", "lists": "videos"}[layout]
            make_video(root / place / f"{split}_{name}.mp4")
        lines = {
            "kinetics": f"down/{split}_down.mp4 0\nup/{split}_up.mp4 1\n",
            "lists": f"{split}_down.mp4 0\n{split}_up.mp4 1\n",
        }
        if layout in lines:
            name = {"kinetics": f"kinetics400_{split}_list_videos.txt", "lists": f"{split}.txt"}[layout]
            (root / name).write_text(lines[layout])
    return root


@pytest.mark.parametrize("layout", ["folders", "kinetics", "lists"])
@pytest.mark.parametrize("stock_config", [False, True])
def test_videos_in_every_layout(layout, stock_config, tmp_path):
    cfg = ours(I3D)
    if stock_config:
        cfg = stock("mmaction", "recognition/tsn/tsn_imagenet-pretrained-r50_8xb32-1x1x3-100e_kinetics400-rgb")
    cfg.work_dir = str(tmp_path / "work")
    told = use_data(cfg, make_videos(tmp_path / "data", layout))
    assert "2 classes" in told
    assert cfg.model.cls_head.num_classes == 2
    for _, dataset in data_sets(cfg):
        lines = Path(dataset.ann_file).read_text().split()  # at spaces, or at the tabs of a list that was written
        assert lines[1::2] == ["0", "1"]
        assert all(Path(dataset.data_prefix.video, name).is_file() for name in lines[::2])
    check_data(cfg)


def test_classes_txt_names_the_labels(tmp_path):
    make_videos(tmp_path, "lists")
    (tmp_path / "classes.txt").write_text("down\nup\nsideways\n")
    cfg = ours(I3D)
    use_data(cfg, tmp_path)
    assert cfg.model.cls_head.num_classes == 3
    assert cfg.train_dataloader.dataset.metainfo.classes == ("down", "up", "sideways")


def test_paths_with_spaces_in_folders_of_classes(tmp_path):
    for split in ("train", "val"):
        make_video(tmp_path / "data" / split / "going up" / "a b.mp4")
    cfg = ours(I3D)
    cfg.work_dir = str(tmp_path / "work")
    use_data(cfg, tmp_path / "data")
    check_data(cfg)
    assert (tmp_path / "work" / "train_videos.txt").read_text() == "train/going up/a b.mp4\t0\n"


def test_labels_without_a_class_and_gaps_are_told(tmp_path):
    make_videos(tmp_path, "lists")
    (tmp_path / "train.txt").write_text("train_down.mp4 1\ntrain_up.mp4 2\n")
    with pytest.raises(
        ValueError, match=r"no video of label 0, and there are labels up to 2. Number the classes from 0"
    ):
        use_data(ours(I3D), tmp_path)
    (tmp_path / "classes.txt").write_text("down\nup\n")
    with pytest.raises(ValueError, match=r"has the label 2, and classes.txt names 2 classes"):
        use_data(ours(I3D), tmp_path)
    (tmp_path / "classes.txt").write_text("sideways\ndown\nup\n")
    assert "no video to train on of sideways" in use_data(ours(I3D), tmp_path)


def test_folders_of_frames(tmp_path):
    cfg = stock("mmaction", "recognition/trn/trn_imagenet-pretrained-r50_8xb16-1x1x8-50e_sthv1-rgb")
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / f"rawframes_{split}" / name).mkdir(parents=True)
        (tmp_path / f"{split}_list_rawframes.txt").write_text("a 12 0\nb 9 1\n")
    use_data(cfg, tmp_path)
    assert cfg.model.cls_head.num_classes == 2
    check_data(cfg)
    (tmp_path / "train_list_rawframes.txt").write_text("a 12 0\nb 1\n")
    with pytest.raises(ValueError, match=r"line 2: 'b 1' is not 'path number of frames label': the label is missing"):
        check_data(cfg)


def test_more_outputs_than_labels_are_told_and_trained(tmp_path, capsys):
    """A part of Kinetics is such a set, and so is a forgotten num_classes."""
    cfg = ours(I3D)
    use_data(cfg, make_videos(tmp_path, "lists"))
    cfg.model.cls_head.num_classes = 400
    check_data(cfg)
    assert "num_classes=400, and no video in" in capsys.readouterr().err


def test_images_of_a_challenge_need_no_annotations(tmp_path):
    """COCO's test-dev has none, and its results are only written."""
    cfg = ours(GN)
    use_data(cfg, make_images(tmp_path))
    (tmp_path / "val.json").write_text(json.dumps({key: content()[key] for key in ("images", "categories")}))
    cfg.test_evaluator = dict(type="CocoMetric", metric="bbox", format_only=True, outfile_prefix="results")
    check_data(cfg, ("test_dataloader",))
    cfg.test_evaluator.format_only = False
    with pytest.raises(ValueError, match="has no list of annotations"):
        check_data(cfg, ("test_dataloader",))


def test_data_sets_that_make_or_read_their_files_themselves_are_left_alone(tmp_path):
    check_data(ours(DIGITS))
    cfg = ours(GN)
    for _, dataset in data_sets(cfg):
        dataset.backend_args = dict(backend="petrel")
    check_data(cfg)
    check_data(stock("mmdet", "panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco"))
    cfg = stock("mmdet", "cityscapes/mask-rcnn_r50_fpn_1x_cityscapes")  # of CocoDataset, and it reads as that does
    with pytest.raises(FileNotFoundError, match="there is no folder data/cityscapes"):
        check_data(cfg)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train_up.mp4", r"line 2: 'train_up.mp4' is not 'path label': the label is missing"),
        ("train_up.mp4,1", "the label is missing; write ' ' instead of ','"),
        ("train_up.mp4 one", "the label is 'one', and must be a whole number"),
        ("train_up.mp4 -1", "the label is '-1', and must be a whole number, 0 or more"),
        ("train_up.mp4 1.0", "the label is '1.0'"),
        ("", "line 2, is empty"),
        ("train up.mp4 1", "it has 3 parts; a path that contains ' ' needs another delimiter"),
        (
            "train_up.mp4 2",
            r"has the label 2, and model.cls_head.num_classes=2: labels go from 0 to 1, and 1 of 2 are larger",
        ),
        ("gone.mp4 1", r"1 of the 2 videos in .* are not in .*, the first is 'gone.mp4'"),
    ],
)
def test_mistakes_in_a_list_of_videos(line, message, tmp_path):
    cfg = ours(I3D)
    use_data(cfg, make_videos(tmp_path, "lists"))
    (tmp_path / "train.txt").write_text(f"train_down.mp4 0\n{line}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_data(cfg)


def test_other_places_of_a_video_config_are_checked(tmp_path):
    cfg = ours(I3D)
    use_data(cfg, make_videos(tmp_path, "lists"))
    cfg.val_dataloader.dataset.data_prefix = dict(video="nowhere")
    with pytest.raises(FileNotFoundError, match=r"val_dataloader.dataset.data_prefix: there is no folder nowhere"):
        check_data(cfg)
    cfg.val_dataloader.dataset.ann_file = "nothing.txt"
    with pytest.raises(FileNotFoundError, match=r"val_dataloader.dataset.ann_file: there is no file nothing.txt"):
        check_data(cfg)
    with pytest.raises(ValueError, match="no list of videos for train"):
        use_data(ours(I3D), tmp_path / "videos")


# --- the tools


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # the toolkits' own, of a whole training
@pytest.mark.parametrize("name", [DIGITS, "digits/i3d_r18_gn_digits"], ids=["images", "videos"])
def test_training_on_ones_own_data(name, tmp_path, capsys):
    data = make_images(tmp_path / "d") if "mask" in name else make_videos(tmp_path / "d", "folders")
    argv = [str(ROOT / "configs" / f"{name}.py"), "--data", str(data), "--work-dir", str(tmp_path / "work")]
    assert train_tool.main([*argv, "--cfg-options", "train_cfg.max_epochs=1", f"visualizer.name={tmp_path.name}"]) == 0
    assert "normplug: data of" in capsys.readouterr().err
    assert (tmp_path / "work" / "epoch_1.pth").is_file()


def test_train_ends_with_one_sentence(tmp_path, capsys):
    assert train_tool.main([str(ROOT / "configs" / f"{GN}.py"), "--data", str(tmp_path / "no")]) == 2
    assert train_tool.main([str(ROOT / "configs" / f"{GN}.py"), "--data", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("train.py: --data ") for line in lines)
