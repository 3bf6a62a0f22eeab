"""What the toolkits would pass over in silence is said, with the line to write instead."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from torch import nn

import normplug
from normplug.openmmlab import advice

pytest.importorskip("mmdet.models")
pytest.importorskip("mmaction.models")

RESNET = dict(type="mmdet.ResNet", depth=18, base_channels=16, stem_channels=16, norm_eval=False)
GN = dict(type="GN", num_groups=8)


@pytest.fixture
def warned(monkeypatch):
    lines = []
    monkeypatch.setattr(advice, "print_log", lambda message, logger, level: lines.append(message))
    return lambda: lines


# --- settings that nothing reads


def inherited(text, base="mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"):
    return Config.fromstring(f"_base_ = {base!r}\n{text}", ".py")


@pytest.mark.parametrize(
    ("text", "unread"),
    [
        ("norm_cfg = dict(type='GN', num_groups=32)", ["model = dict(replace_norm=dict(type='GN', num_groups=32))"]),
        ("conv_cfg = dict(type='ConvWS')", ["model = dict(backbone=dict(conv_cfg=dict(type='ConvWS')))"]),
        ("norm_cfg = dict(type='GN')\nmodel = dict(neck=dict(norm_cfg=norm_cfg))", []),
        ("norm_cfg = dict(type='GN')\nmodel = dict(replace_norm=norm_cfg)", []),
        (
            "norm_cfg = dict(type='GN')\nmodel = dict(neck=dict(norm_cfg=dict(type='SyncBN')))",
            ["model = dict(replace_norm=dict(type='GN'))"],
        ),
        ("model = dict(replace_norm=dict(type='GN'))", []),
        ("norm_cfg = dict(type='GN')\nmodel = dict(replace_norm=dict(type='SyncBN'))", []),
        ("", []),
    ],
)
def test_a_setting_at_the_top_level_that_nothing_reads(text, unread):
    sentences = advice.unread_settings(inherited(text))
    assert len(sentences) == len(unread)
    for sentence, line in zip(sentences, unread, strict=True):
        assert sentence.endswith(line)


def test_runners_of_every_tool_say_so(tmp_path, warned):
    cfg = Config.fromfile(Path(__file__).parents[1] / "configs/digits/mask-rcnn_r18_fpn_bn_digits.py")
    for key in [key for key in cfg if key.startswith(("train", "val", "test", "optim", "param"))]:
        cfg.pop(key)
    cfg.visualizer = dict(type="Visualizer", name="says")  # one of a name is kept, with its folder, for all tests
    cfg.norm_cfg = dict(type="GN", num_groups=4)
    cfg.work_dir, cfg.experiment_name = str(tmp_path), "says"
    Runner.from_cfg(cfg)
    assert len(warned()) == 1
    assert "model = dict(replace_norm=dict(type='GN', num_groups=4))" in warned()[0]


# --- norms that a norm_cfg does not reach


STRAYS = {
    "hourglass": dict(
        type="mmdet.HourglassNet",
        downsample_times=1,
        num_stacks=1,
        stage_channels=(16, 16),
        stage_blocks=(1, 1),
        feat_channel=16,
    ),
    "r2plus1d": dict(
        type="mmaction.ResNet2Plus1d",
        depth=18,
        pretrained=None,
        pretrained2d=False,
        norm_eval=False,
        conv_cfg=dict(type="Conv2plus1d"),
        conv1_kernel=(3, 7, 7),
        conv1_stride_t=1,
        pool1_stride_t=1,
    ),
}


@pytest.mark.parametrize("name", STRAYS)
def test_norms_that_the_config_does_not_reach_are_told_and_the_line_reaches_them(name, warned):
    cfg = STRAYS[name]
    with DefaultScope.overwrite_default_scope(cfg["type"].partition(".")[0]):
        MODELS.build(dict(cfg, norm_cfg=GN))
        (sentence,) = warned()
        assert sentence.endswith("replace_norm=dict(type='GN', num_groups=8)")
        model = MODELS.build(dict(cfg, replace_norm=dict(GN, num_groups="auto")))
    assert len(warned()) == 1
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


@pytest.mark.parametrize(
    "cfg",
    [
        dict(RESNET, norm_cfg=GN),
        dict(RESNET, norm_cfg=dict(type="BN")),
        dict(RESNET, norm_cfg=dict(type="SyncBN")),
        dict(RESNET, norm_cfg=dict(type="CBN")),
    ],
)
def test_a_model_that_is_what_its_config_says_is_not_talked_about(cfg, warned):
    MODELS.build(cfg)
    assert warned() == []


# --- groups that do not fit


def test_the_error_of_groups_names_a_size_for_the_whole_model():
    with pytest.raises(ValueError, match=r"For the whole model: .*channels_per_group=12, which divides all of them"):
        MODELS.build(dict(RESNET, base_channels=24, stem_channels=24, norm_cfg=dict(type="GN")))
    model = MODELS.build(
        dict(RESNET, base_channels=24, stem_channels=24, norm_cfg=dict(type="GN", channels_per_group=12))
    )
    assert model.gn1.num_channels // model.gn1.num_groups == 12
    with pytest.raises(ValueError, match="cannot have num_groups=5: it must divide 16"):
        normplug.layers.GroupNorm(16, 5)  # nothing is recorded any more


def test_nothing_is_advised_where_only_one_channel_fits():
    with pytest.raises(ValueError, match=r"For the whole model: num_groups='auto'\.$"):
        MODELS.build(dict(RESNET, base_channels=24, stem_channels=37, norm_cfg=dict(type="GN")))


# --- norms that keep their initial values


@pytest.mark.parametrize(
    ("cfg", "anew"),
    [
        (dict(RESNET, norm_cfg=GN), 17),
        (dict(RESNET, norm_cfg=dict(type="FRN")), 17),
        (dict(RESNET, norm_cfg=dict(type="SyncBN")), 0),
        (dict(RESNET, norm_cfg=dict(type="EvoNormB0")), 0),  # it takes weight, bias and variance of a BN
        (dict(RESNET, replace_norm=GN), 0),
    ],
    ids=lambda value: str(value.get("norm_cfg", value.get("replace_norm"))) if isinstance(value, dict) else None,
)
def test_norms_without_a_place_in_the_checkpoint_are_told(cfg, anew, warned, tmp_path):
    # Of 20: those in the Sequential of a shortcut have the same name whatever they are.
    torch.save(MODELS.build(RESNET).state_dict(), tmp_path / "bn.pth")
    MODELS.build(dict(cfg, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "bn.pth")))).init_weights()
    assert len(warned()) == (anew > 0)
    if anew:
        assert f"{anew} norms keep their initial values" in warned()[0]
        assert "'bn1'" in warned()[0]
