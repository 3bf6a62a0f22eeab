"""Every backbone of the toolkits with every norm: a sample of what tools/compatible_models.py tries; whole models."""

import re
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from stock_configs import stock
from torch import nn

from normplug import layers

for toolkit in ("mmdet", "mmaction", "mmseg", "mmpretrain"):
    pytest.importorskip(f"{toolkit}.models")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import compatible_models  # noqa: E402
from compatible_models import BACKBONES, NORMS, attempt, attempt_conv_ws, config  # noqa: E402
from test_adapt import shake  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:FRN got an input of shape"),  # global pooling leaves single values
    pytest.mark.filterwarnings("ignore:.*use_reentrant"),
    pytest.mark.filterwarnings("ignore:``build_loss`` would be deprecated"),
    pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore`` is False"),
    pytest.mark.filterwarnings("ignore:The `__call__` method of"),
]
NO_BACKBONES = {"DeconvModule", "InterpConv"}  # of UNet: what it makes a map larger with


@pytest.fixture(autouse=True)
def registered():
    for toolkit in BACKBONES:
        compatible_models.register(toolkit)


# --- the table


def page():
    """The cells of the page by backbone and column, with the reasons in the place of their numbers."""
    text = compatible_models.PAGE.read_text().partition(compatible_models.HEADING)[2].partition("\n## ")[0]
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    header, body = rows[0], rows[2:]
    cells = {}
    for toolkit, name, _, *row in body:
        row = [reasons[cell.strip("()")] if cell.startswith("(") else cell for cell in row]
        cells[toolkit, name] = dict(zip(header[3:], row, strict=True))
    return cells


def test_the_page_has_every_backbone_that_is_registered():
    registered = {
        (toolkit, name)
        for toolkit in BACKBONES
        for name, cls in MODELS.children[toolkit].module_dict.items()
        if isinstance(cls, type)
        and cls.__module__.startswith(f"{toolkit}.models.backbones")
        and name not in NO_BACKBONES
    }
    assert registered == {(toolkit, name) for toolkit, samples in BACKBONES.items() for name in samples}
    cells = page()
    assert set(cells) == registered
    assert {*NORMS, "ConvWS"} == set(cells["mmdet", "ResNet"])
    assert {reason for row in cells.values() for reason in row.values()} <= {"yes", *compatible_models.REASONS.values()}


SAMPLE = {
    "mmdet": ["TridentResNet", "DetectoRS_ResNeXt"],
    "mmaction": ["X3D", "ResNet3dCSN", "MobileOneTSM"],
    "mmseg": ["ResNetV1d", "ResNeSt", "ERFNet", "TIMMBackbone", "SwinTransformer", "STDCContextPathNet"],
    "mmpretrain": ["ResNet", "ResNet_CIFAR", "SEResNeXt", "RegNet", "ResNeSt", "ConvNeXt", "XCiT", "VisionTransformer"],
}


@pytest.mark.parametrize(("toolkit", "name"), [(t, name) for t, names in SAMPLE.items() for name in names])
@pytest.mark.parametrize("norm", ["EvoNormS0", "FRN", "BNAct"])
def test_the_page_is_true(toolkit, name, norm):
    assert compatible_models.reason(attempt(toolkit, name, norm)) == page()[toolkit, name][norm]


@pytest.mark.parametrize(
    ("toolkit", "name"), [("mmseg", "ResNet"), ("mmpretrain", "ResNeXt"), ("mmpretrain", "MobileOne")]
)
def test_the_page_is_true_of_standardized_weights(toolkit, name):
    assert compatible_models.reason(attempt_conv_ws(toolkit, name)) == page()[toolkit, name]["ConvWS"]


def test_an_activation_behind_a_norm_that_contains_one_is_seen(monkeypatch):
    """That the attempts see what they are to see: a network that nobody has adapted."""
    monkeypatch.setattr("normplug.openmmlab.adapt.place_activations", lambda model: None)
    assert "an activation follows a norm" in attempt("mmpretrain", "ResNet", "EvoNormS0")


def test_only_its_own_section_of_the_page_is_written_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(compatible_models, "PAGE", tmp_path / "page.md")
    compatible_models.PAGE.write_text("# Title\n\n## Layers\n\nlayers\n\n## Models\n\nold\n\n## More\n\nmore\n")
    compatible_models.write_page("## Models\n\nnew\n")
    assert compatible_models.PAGE.read_text() == (
        "# Title\n\n## Layers\n\nlayers\n\n## Models\n\nnew\n\n## More\n\nmore\n"
    )


# --- classes that normalize something else, or in another layout


@pytest.mark.parametrize("norm", ["GN", "SyncBN", "FRN"])
@pytest.mark.parametrize(("toolkit", "name"), [("mmdet", "SwinTransformer"), ("mmpretrain", "VisionTransformer")])
def test_norms_of_channels_are_refused_for_tokens(toolkit, name, norm):
    with (
        DefaultScope.overwrite_default_scope(toolkit),
        pytest.raises(ValueError, match=r"tokens \(N, L, C\).*LayerNorms"),
    ):
        MODELS.build(config(toolkit, name, NORMS[norm]))


@pytest.mark.parametrize("norm", ["GN", "BNAct", "FRN"])
def test_convnext_tells_its_norms_where_the_channels_are(norm):
    from mmpretrain.models.backbones.convnext import ConvNeXtBlock

    block = MODELS.build(dict(type="mmpretrain.ConvNeXt", norm_cfg=NORMS[norm]))
    block = next(m for m in block.modules() if isinstance(m, ConvNeXtBlock))
    x = torch.randn(2, block.norm.num_features, 5, 6)
    last = block.norm(x.permute(0, 2, 3, 1), data_format="channel_last")
    torch.testing.assert_close(last.permute(0, 3, 1, 2), block.norm(x, data_format="channel_first"))
    torch.testing.assert_close(block.norm(x), block.norm(x, data_format="channel_first"))


def test_behind_a_global_pooling_a_group_of_evonorm_holds_two_channels():
    model = MODELS.build(dict(type="mmpretrain.ResNeSt", depth=50, norm_cfg=dict(type="EvoNormS0")))
    attention = model.layer1[0].conv2
    assert attention.norm1.num_channels // attention.norm1.num_groups == 2
    assert attention.norm0.num_groups == 32
    head = MODELS.build(dict(type="mmseg.FastSCNN", norm_cfg=dict(type="EvoNormS0")))
    assert all(norm.num_groups < norm.num_channels for norm in [head.global_feature_extractor.ppm[0][1].norm])


# --- norms that are called bn, and what is asked of them

every_norm = pytest.mark.parametrize("norm", [name for name in NORMS if name != "FrozenBatchNorm"])
VIDEO = dict(pretrained=None, base_channels=8, conv1_kernel=(1, 7, 7))


def build(cfg):
    with DefaultScope.overwrite_default_scope("mmaction"):  # its own layers are looked up there
        return MODELS.build(cfg)


@every_norm
def test_non_local_blocks_ask_every_norm_for_its_channels(norm):
    cfg = dict(
        type="mmaction.ResNet3d",
        depth=50,
        non_local=((0, 0, 0), (1, 0, 0, 0), (0, 0, 0, 0, 0, 0), (0, 0, 0)),
        non_local_cfg=dict(sub_sample=True, use_scale=False, norm_cfg=NORMS[norm], mode="embedded_gaussian"),
        norm_cfg=NORMS[norm],
    )
    model = MODELS.build(cfg | VIDEO)
    model.init_weights()
    model(torch.randn(2, 3, 4, 32, 32)).mean().backward()
    assert model.layer2[0].non_local_block.in_channels == model.layer2[0].conv3.norm.num_features == 64


@every_norm
@pytest.mark.parametrize("name", ["X3D", "ResNetAudio", "ResNet3d"])
def test_the_last_norm_of_a_residual_branch_starts_at_zero(name, norm):
    if (name, norm) == ("ResNetAudio", "CBN"):
        with pytest.raises(ValueError, match=r"cannot be CBN behind conv1\.conv"):  # a convolution of two convolutions
            build(dict(type="mmaction.ResNetAudio", norm_cfg=NORMS[norm], depth=50, pretrained=None))
        return
    cfg = dict(type=f"mmaction.{name}", norm_cfg=NORMS[norm], zero_init_residual=True)
    cfg |= dict(gamma_d=1) if name == "X3D" else dict(depth=50, pretrained=None, base_channels=8)
    model = build(cfg)
    model.init_weights()
    names = [key for key, m in model.named_modules() if hasattr(m, "norm_name")]
    for key in names:
        module = model.get_submodule(key)
        if module.norm is not None and "conv_" not in key:
            assert (module.norm.weight == (0 if key.endswith("conv3") else 1)).all(), key
            assert key + "." + module.norm_name in dict(model.named_modules())


@pytest.mark.parametrize("norm", sorted(NORMS.keys() - {"CBN"}))
def test_frozen_stages_of_an_audio_network_freeze_its_first_norm(norm):
    cfg = dict(type="mmaction.ResNetAudio", depth=50, pretrained=None, base_channels=8, frozen_stages=1)
    model = build(cfg | dict(norm_cfg=NORMS[norm]))
    model.train()
    assert not model.conv1.norm.training
    assert not any(p.requires_grad for p in model.conv1.norm.parameters())
    assert not any(p.requires_grad for p in model.layer1.parameters())
    assert all(p.requires_grad for p in model.layer2.parameters())


@every_norm
@pytest.mark.parametrize("name", ["ResNet", "ResNetTSM", "ResNetTIN"])
def test_the_weights_of_an_image_network_become_those_of_every_norm(name, norm, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    source = shake(torchvision.models.resnet50(weights=None)).state_dict()
    torch.save(source, tmp_path / "resnet50.pth")
    cfg = dict(type=f"mmaction.{name}", depth=50, pretrained=str(tmp_path / "resnet50.pth"), norm_cfg=NORMS[norm])
    if name != "ResNet":
        cfg["num_segments"] = 2
    model = MODELS.build(cfg)
    model.init_weights()
    for own, theirs in (
        ("conv1", "bn1"),
        ("layer3.1.conv3", "layer3.1.bn3"),
        ("layer2.0.downsample", "layer2.0.downsample.1"),
    ):
        module = next(
            m for key, m in model.named_modules() if re.sub(r"\.(net|block)\b", "", key) == own and hasattr(m, "norm")
        )
        for key in ("weight", "bias"):
            torch.testing.assert_close(getattr(module.norm, key), source[f"{theirs}.{key}"], rtol=0, atol=0)


# --- whole models, by their toolkit's Runner

MODEL = {
    "pspnet": ("mmseg", "pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024"),
    "deeplabv3+": ("mmseg", "deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024"),
    "upernet": ("mmseg", "upernet/upernet_r50_4xb2-40k_cityscapes-512x1024"),
    "classifier": ("mmpretrain", "resnet/resnet50_8xb32_in1k"),
}
numbers = count()


def with_norm(cfg, norm):
    """Change every norm_cfg of a config, as a user does by one variable at its top."""
    if isinstance(cfg, dict):
        for key, value in cfg.items():
            if key == "norm_cfg":
                cfg[key] = dict(norm)
            else:
                with_norm(value, norm)
    elif isinstance(cfg, list | tuple):
        for value in cfg:
            with_norm(value, norm)


def samples(toolkit):
    if toolkit == "mmseg":
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        found = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 19, (1, 64, 64)))) for _ in range(2)]
    else:
        from mmpretrain.structures import DataSample

        found = [DataSample().set_gt_label(i) for i in range(2)]
    return [dict(inputs=torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8), data_samples=sample) for sample in found]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm"), zip(MODEL, ["EvoNormS0", "FRN"] * len(MODEL), strict=False))
def test_whole_models_train_a_step_by_their_runner(name, norm, tmp_path):
    toolkit, path = MODEL[name]
    model = stock(toolkit, path).model.to_dict()
    model["backbone"].setdefault("norm_cfg", dict(type="BN"))
    with_norm(model, dict(type=norm))
    runner = Runner(
        model,
        str(tmp_path),
        default_scope=toolkit,
        experiment_name=f"family-{next(numbers)}",
        log_level="ERROR",
        train_dataloader=dict(
            dataset=samples(toolkit),
            batch_size=2,
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=False),
            collate_fn=dict(type="pseudo_collate" if toolkit == "mmseg" else "default_collate"),
        ),
        train_cfg=dict(by_epoch=False, max_iters=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=1e-3)),
        default_hooks=dict(checkpoint=None, logger=None),
    )
    norms = [m for m in runner.model.modules() if isinstance(m, layers.EvoNormS0 | layers.FilterResponseNorm)]
    assert len(norms) > 50
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in runner.model.modules())
    before = [p.detach().clone() for p in norms[0].parameters()]
    runner.train()
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(norms[0].parameters(), before, strict=True))
