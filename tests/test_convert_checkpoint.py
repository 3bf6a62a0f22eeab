"""tools/convert_checkpoint.py: the converted model computes what the source's does.

The source models are torchvision's and timm's, or plain ones written here, under the key names that the published files
have: Detectron's and detectron2's and BiT's from their repositories' code, Howal's from its fork of mmdet 0.6.
"""

import io
import pickle
import re
import struct
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from safetensors.torch import save_file
from timm.layers import GroupNormAct, StdConv2d
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn
from torch.nn import functional as F

import normplug  # noqa: F401  registers the layers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from convert_checkpoint import main  # noqa: E402  found through the line above

# mmcv's, mmdet's and mmaction2's own, while they are imported
pytestmark = pytest.mark.filterwarnings("ignore::ImportWarning", "ignore::SyntaxWarning")

RGB_MEAN, RGB_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
DETECTRON_BGR_MEAN = [102.9801, 115.9465, 122.7717]
BIT_CONV = dict(type="ConvWS", eps=1e-8, correction=0, eps_inside=True)


def group_norm(channels, **kwargs):
    return nn.GroupNorm(32, channels, **kwargs)


def randomize(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.02, module.weight[0].numel() ** -0.5)  # standardization notices the mean
        for name, t in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            with torch.no_grad():
                if name == "bias" or name == "running_mean":
                    t.normal_(0, 0.3)
                elif t.ndim == 1:  # weight, running_var
                    t.uniform_(0.4, 1.2)
    return model.double().eval()


def resnet(norm=group_norm, block=Bottleneck, layers=(3, 4, 6, 3), **kwargs):
    return randomize(ResNet(block, layers, channels=(32, 64, 128, 256), norm_layer=norm, **kwargs))


def features(net, x):
    maps = []
    x = net.maxpool(net.act1(net.bn1(net.conv1(x))) if hasattr(net, "act1") else net.relu(net.bn1(net.conv1(x))))
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        maps.append(x := stage(x))
    return maps


def state_of(model):
    return {key: value.float() if value.is_floating_point() else value for key, value in model.state_dict().items()}


def detector_cfg(norm="GN", backbone=None, **backbone_options):
    """A small Mask R-CNN; its own backbone, or a ResNet-50 with the options."""
    cfg = Config.fromfile(ROOT / f"configs/digits/mask-rcnn_r18_fpn_{norm.lower()}_digits.py")
    if backbone_options:
        norm_cfg = dict(type="GN", num_groups=32)
        resnet50 = dict(
            type="ResNet",
            depth=50,
            base_channels=32,
            stem_channels=64,
            style="pytorch",
            norm_cfg=norm_cfg,
            norm_eval=True,
        )
        cfg.model.backbone = ConfigDict(backbone or resnet50 | backbone_options)
    return cfg


def build(cfg):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model).double().eval()


def loaded_backbone(cfg, state):
    backbone = build(cfg).backbone
    backbone.load_state_dict(state, strict=True)
    return backbone


def assert_same(got, want, tolerance=1e-5):
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert (g - w).abs().max() <= tolerance * w.abs().max()


@pytest.fixture
def run(tmp_path, capsys):
    """Run the tool on a file, or on a state dict; return the converted weights and what was printed."""

    def run(source, cfg, *flags, fails=None):
        if not isinstance(source, Path):
            torch.save(source, tmp_path / "source.pth")
            source = tmp_path / "source.pth"
        cfg.dump(tmp_path / "config.json")
        out = tmp_path / "new folder" / "out.pth"
        out.unlink(missing_ok=True)
        code = main([str(source), str(out), "--config", str(tmp_path / "config.json"), *flags])
        printed = capsys.readouterr()
        if fails is not None:
            assert code == 2
            assert re.search(fails, printed.err), printed.err
            assert not out.exists()
            return None, printed.err
        assert code == 0, printed.err
        return torch.load(out, weights_only=True)["state_dict"], printed.out

    return run


def rows(printed):
    """The printed table: source keys and what was done, by target key."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("| ")]
    return {target: (source, done) for source, target, _, done in cells[1:]}


X = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ---- torchvision, timm


@pytest.fixture(scope="module")
def full_size():
    return randomize(timm.create_model("resnet50_gn"))


def test_torchvision_resnet50(run):
    source = randomize(torchvision.models.resnet50())
    cfg = detector_cfg(base_channels=64, norm_cfg=dict(type="BN"))
    state, printed = run(state_of(source), cfg)
    assert_same(loaded_backbone(cfg, state)(X), features(source, X))
    assert rows(printed)["layer1.0.downsample.1.bias"] == ("layer1.0.downsample.1.bias", "")
    assert "Source: torchvision" in printed
    assert "classifier of ImageNet: fc.weight, fc.bias" in printed
    assert "The config's is the same." in printed


def test_timm_resnet50_gn(run, full_size):
    cfg = detector_cfg(base_channels=64)
    assert_same(loaded_backbone(cfg, run(state_of(full_size), cfg)[0])(X), features(full_size, X))


@pytest.mark.parametrize("norm", ["BN", "FrozenBatchNorm", "SyncBN"])
def test_batch_norm_of_any_kind(run, norm):
    source, cfg = resnet(nn.BatchNorm2d), detector_cfg(norm_cfg=dict(type=norm))
    assert_same(loaded_backbone(cfg, run(state_of(source), cfg)[0])(X), features(source, X))


def test_timm_resnet_d(run):
    source = resnet(nn.BatchNorm2d, stem_width=32, stem_type="deep", avg_down=True)
    cfg = detector_cfg(type="ResNetV1d", norm_cfg=dict(type="BN"))
    state, printed = run(state_of(source), cfg)
    assert_same(loaded_backbone(cfg, state)(X), features(source, X))
    assert rows(printed)["stem.7.bias"] == ("bn1.bias", "")


def test_safetensors_and_init_cfg(run, tmp_path):
    source = resnet()
    save_file(state_of(source), tmp_path / "model.safetensors")
    cfg = detector_cfg(out_indices=(0, 1, 2, 3))
    run(tmp_path / "model.safetensors", cfg)
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "new folder" / "out.pth"))
    model = build(cfg).float()
    model.init_weights()
    assert_same(model.double().backbone(X), features(source, X))


# ---- BiT


@pytest.mark.parametrize("conv_cfg", [BIT_CONV, None], ids=["standardized by the layers", "written out"])
def test_bit_of_timm(run, conv_cfg):
    source = randomize(timm.create_model("resnetv2_50x1_bit"))
    cfg = detector_cfg(backbone=dict(type="ResNetV2", depth=50, conv_cfg=conv_cfg), depth=50)
    cfg.model.data_preprocessor |= dict(mean=[127.5] * 3, std=[127.5] * 3)
    state, printed = run(state_of(source), cfg)
    want = source.forward_intermediates(X, intermediates_only=True, norm=True)
    assert_same(loaded_backbone(cfg, state)(X)[:3], want[-4:-1])
    assert_same(loaded_backbone(cfg, state)(X)[3:], [source.forward_features(X)])
    assert ("standardized" in rows(printed)["layer2.0.downsample.weight"][1]) == (conv_cfg is None)
    assert rows(printed)["layer2.0.gn1.bias"][0] == "stages.1.blocks.0.norm1.bias"
    assert "bit-timm" in printed


RESNET_V2_D = dict(type="ResNetV2", depth=50, deep_stem=True, avg_down=True, conv_cfg=None)


@pytest.mark.parametrize(
    ("name", "norm_cfg"),
    [
        ("resnetv2_50d_gn", dict(type="GN", num_groups=32)),
        ("resnetv2_50d_evos", dict(type="EvoNormS0", num_groups=32)),
        ("resnetv2_50d", dict(type="BN")),
    ],
)
def test_resnet_v2_d_of_timm(run, name, norm_cfg):
    source = randomize(timm.create_model(name))
    cfg = detector_cfg(backbone=RESNET_V2_D | dict(norm_cfg=norm_cfg), depth=50)
    cfg.model.data_preprocessor |= dict(mean=[127.5] * 3, std=[127.5] * 3)
    state, printed = run(state_of(source), cfg)
    odd = torch.randn(1, 3, 70, 94, dtype=torch.float64)  # the pools meet borders
    want = source.forward_intermediates(odd, intermediates_only=True, norm=True)
    assert_same(loaded_backbone(cfg, state)(odd), [*want[-4:-1], source.forward_features(odd)])
    assert "resnetv2-timm" in printed
    assert "Warning" not in printed
    leaf = "v" if name.endswith("evos") else "bias"
    assert {of for target, (of, _) in rows(printed).items() if target.endswith(f".{leaf}")} == {
        key for key in source.state_dict() if key.endswith(f".{leaf}") and "head" not in key
    }
    if name == "resnetv2_50d":
        run(state_of(source), cfg, "--fold-bn", fails="in front of activation and convolution")
        frozen, _ = run(state_of(source), cfg, "--freeze-bn")
        assert_same(loaded_backbone(cfg, frozen)(odd)[3:], [source.forward_features(odd)])
        whole = {f"backbone.{key}": value for key, value in state.items()}
        run(whole, cfg, "--part", "backbone", "--fold-bn", fails="in front of activation and convolution")


def test_another_shortcut_is_refused(run):
    """The weights of a convolution with stride and of one behind a pooling have the same shape."""
    d, bit = (state_of(timm.create_model(name)) for name in ("resnetv2_50d_gn", "resnetv2_50x1_bit"))
    gn = dict(norm_cfg=dict(type="GN", num_groups=32))
    cfg = detector_cfg(backbone=RESNET_V2_D | dict(avg_down=False) | gn, depth=50)
    run(d, cfg, fails="source's network pool by averages.*Set avg_down=True")
    cfg = detector_cfg(backbone=dict(type="ResNetV2", depth=50, avg_down=True), depth=50)
    run(bit, cfg, fails="source's network convolve with a stride.*Set avg_down=False")
    v1d = state_of(resnet(nn.BatchNorm2d, stem_width=32, stem_type="deep", avg_down=True))
    run(v1d, detector_cfg(deep_stem=True, norm_cfg=dict(type="BN")), fails="ResNet convolve.*Set avg_down=True")


def test_another_activation_is_told(run):
    source = state_of(resnet())
    _, printed = run(source, detector_cfg(norm_cfg=dict(type="GN", num_groups=32, act="silu")))
    assert "the model has SiLU, and the source's networks have ReLU" in printed


def test_bit_npz(run, tmp_path):
    """timm reads the same file: its own reader is the oracle."""
    small = dict(layers=[3, 4, 6, 3], channels=(128, 256, 512, 1024), stem_chs=32, stem_type="fixed", num_classes=5)
    small |= dict(norm_layer=partial(GroupNormAct, num_groups=32), conv_layer=partial(StdConv2d, eps=1e-10))
    reader = timm.models.resnetv2.ResNetV2(**small)
    arrays = {}
    for key, value in randomize(reader).float().state_dict().items():
        value = value.numpy()
        key = key.replace("head.fc", "head.conv2d").replace("stem.conv", "root_block.standardized_conv2d")
        key = re.sub(r"stages\.(\d)\.blocks\.(\d)", lambda m: f"block{int(m[1]) + 1}.unit{int(m[2]) + 1:02d}", key)
        key = re.sub(r"norm(\d)", lambda m: f"{' abc'[int(m[1])]}.group_norm", key)
        key = re.sub(r"(?<=\.)conv(\d)\.", lambda m: f"{' abc'[int(m[1])]}.standardized_conv2d.", key)
        key = key.replace("downsample.conv", "a.proj.standardized_conv2d").replace(
            "group_norm.weight", "group_norm.gamma"
        )
        key = re.sub(r"^norm\.weight", "group_norm.gamma", re.sub(r"^norm\.bias", "group_norm.beta", key))
        key = key.replace("group_norm.bias", "group_norm.beta")
        key = re.sub(r"(conv2d)\.weight", r"\1.kernel", key)
        arrays["resnet/" + key.replace(".", "/")] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    np.savez(tmp_path / "BiT-M-R50x1.npz", **arrays)
    source = timm.models.resnetv2.ResNetV2(**small)
    source.load_pretrained(str(tmp_path / "BiT-M-R50x1.npz"))
    source.double().eval()
    cfg = detector_cfg(
        backbone=dict(type="ResNetV2", depth=50, base_channels=32, conv_cfg=BIT_CONV | dict(eps=1e-10)), d=1
    )
    state, printed = run(tmp_path / "BiT-M-R50x1.npz", cfg)
    assert_same(loaded_backbone(cfg, state)(X)[3:], [source.forward_features(X)])
    assert "Warning: the config prepares images otherwise" in printed
    assert "mean=[127.5, 127.5, 127.5]" in printed


def test_bit_fits_no_post_activation_network(run):
    _, error = run(
        state_of(timm.create_model("resnetv2_50x1_bit")), detector_cfg(base_channels=64), fails="do not match"
    )
    assert "norm.weight" in error


# ---- weight standardization


class StandardizedConv2d(nn.Conv2d):
    """The formula in the authors' repository: unbiased deviation, eps outside the root."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / (w.flatten(1).std(1) + 1e-5).view(-1, 1, 1, 1), None, self.stride, self.padding)


def standardized(model):
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = StandardizedConv2d
    return model


@pytest.mark.parametrize("conv_cfg", [dict(type="ConvWS"), None], ids=["ConvWS", "written out"])
def test_weight_standardization_of_its_authors(run, conv_cfg):
    source = standardized(resnet())
    weights = {f"module.{key}": value for key, value in state_of(source).items()}
    file = dict(epoch=90, state_dict=weights, acc=75.0, best_acc=76.0, optimizer=dict(state={}, param_groups=[]))
    cfg = detector_cfg(conv_cfg=conv_cfg)
    state, printed = run(file, cfg)
    assert_same(loaded_backbone(cfg, state)(X), features(source, X))
    assert rows(printed)["conv1.weight"] == ("module.conv1.weight", "" if conv_cfg else "standardized")
    assert "module.fc.weight" in printed


def test_whether_convolutions_are_standardized_is_not_guessed(run):
    source, cfg = standardized(resnet()), detector_cfg(conv_cfg=dict(type="ConvWS"))
    run(state_of(source), cfg, fails="--standardized yes")
    state, _ = run(state_of(source), cfg, "--standardized", "yes")
    assert_same(loaded_backbone(cfg, state)(X), features(source, X))
    cfg.model.backbone.conv_cfg = BIT_CONV
    run(state_of(source), cfg, "--standardized", "yes", fails=r"conv_cfg=dict\(type='ConvWS', eps=1e-05, correction=1")


# ---- Detectron and Detectron2

STAGES = {"layer1": "res2", "layer2": "res3", "layer3": "res4", "layer4": "res5"}
SUFFIX = {"weight": "w", "bias": "b"}


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote its str, which was both."""

    def save(self, obj, save_persistent_id=True):
        if not isinstance(obj, str | bytes):
            return super().save(obj, save_persistent_id)
        data = obj.encode("latin1") if isinstance(obj, str) else obj
        self.write(b"T" + struct.pack("<i", len(data)) + data)


def write_pickle(path, data, python2=False):
    if not python2:
        path.write_bytes(pickle.dumps(data, protocol=2))
        return path
    stream = io.BytesIO()
    Python2Pickler(stream, 2).dump(data)
    path.write_bytes(stream.getvalue().replace(b"cnumpy._core.", b"cnumpy.core."))
    return path


def caffe2_blob(key, norm="gn"):
    """Detectron's name of what torchvision calls conv1, layer1.0.bn2, layer1.0.downsample.0, ..."""
    layer, _, leaf = key.rpartition(".")
    for ours, theirs in STAGES.items():
        layer = layer.replace(ours, theirs)
    layer = layer.replace(".", "_").replace("downsample_0", "branch1").replace("downsample_1", f"branch1_{norm}")
    layer = re.sub(r"(res\d_\d+)_conv(\d)", lambda m: f"{m[1]}_branch2{' abc'[int(m[2])]}", layer)
    layer = re.sub(r"(res\d_\d+)_bn(\d)", lambda m: f"{m[1]}_branch2{' abc'[int(m[2])]}_{norm}", layer)
    layer = {"bn1": "conv1_gn" if norm == "gn" else "res_conv1_bn", "fc": "pred"}.get(layer, layer)
    leaf = "s" if leaf == "weight" and layer.endswith(f"_{norm}") else SUFFIX[leaf]
    return f"{layer}_{leaf}"


def detectron2_name(key):
    for ours, theirs in STAGES.items():
        key = key.replace(ours, theirs)
    key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    key = re.sub(r"bn(\d)", r"conv\1.norm", key)
    return f"stem.{key}" if key.startswith(("conv1", "fc")) else key


def numpy_of(state):
    return {key: value.numpy() for key, value in state.items()}


def caffe2_of(model, norm="gn"):
    return numpy_of({caffe2_blob(key, norm): value for key, value in state_of(model).items()})


def seen_by(mean, std, order, images):
    """Images (N, 3, H, W), RGB in grey levels, as a data_preprocessor with mean and std in that order makes them."""
    images = images.flip(1) if order == "BGR" else images
    return (images - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)


@pytest.fixture(scope="module")
def group_normalized():
    return resnet()


@pytest.mark.parametrize("python2", [False, True], ids=["Python 3", "Python 2"])
def test_detectron_group_norm(run, tmp_path, group_normalized, python2):
    blobs = caffe2_of(group_normalized)
    assert {"conv1_w", "conv1_gn_s", "res2_0_branch1_gn_b", "res4_5_branch2c_w", "pred_b"} <= blobs.keys()
    blobs["conv1_w_momentum"] = blobs["conv1_w"]
    file = write_pickle(tmp_path / "R-50-GN.pkl", {"blobs": blobs, "cfg": "MODEL: {}"} if python2 else blobs, python2)
    cfg = detector_cfg(out_indices=(0, 1, 2, 3))
    state, printed = run(file, cfg)
    images = 255 * torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)).double()
    want = features(group_normalized, seen_by(DETECTRON_BGR_MEAN, [1, 1, 1], "BGR", images))
    got = loaded_backbone(cfg, state)(seen_by(DETECTRON_BGR_MEAN[::-1], RGB_STD, "RGB", images))
    assert_same(got, want)
    source, done = rows(printed)["conv1.weight"]
    assert source == "conv1_w"
    assert "BGR to RGB" in done
    assert "times std: 58.395, 57.12, 57.375 for 1, 1, 1" in done
    assert rows(printed)["layer3.5.gn3.bias"] == ("res4_5_branch2c_gn_b", "")
    assert "mean=[122.7717, 115.9465, 102.9801], std=[58.395, 57.12, 57.375], bgr_to_rgb=True" in printed
    assert "the same but for the mean, by 0.9 grey levels" in printed
    assert "state of the optimizer: conv1_w_momentum" in printed


def test_images_can_stay_those_of_the_source(run, tmp_path, group_normalized):
    file, cfg = write_pickle(tmp_path / "R-50-GN.pkl", caffe2_of(group_normalized)), detector_cfg(depth=50)
    state, printed = run(file, cfg, "--keep-images")
    assert_same(loaded_backbone(cfg, state)(X), features(group_normalized, X))
    assert "Warning: the config prepares images otherwise" in printed
    cfg.model.data_preprocessor |= dict(mean=DETECTRON_BGR_MEAN, std=[1, 1, 1], bgr_to_rgb=False)
    state, printed = run(file, cfg)
    assert_same(loaded_backbone(cfg, state)(X), features(group_normalized, X))
    assert "The config's is the same." in printed


def test_a_config_that_sees_bgr(run, group_normalized):
    images = 255 * torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)).double()
    cfg = detector_cfg(depth=50)
    cfg.model.data_preprocessor |= dict(mean=RGB_MEAN[::-1], std=[2, 3, 4], bgr_to_rgb=False)
    state, printed = run(state_of(group_normalized), cfg)
    got = loaded_backbone(cfg, state)(seen_by(RGB_MEAN[::-1], [2, 3, 4], "BGR", images))
    assert_same(got, features(group_normalized, seen_by(RGB_MEAN, RGB_STD, "RGB", images)))
    assert "mean=[103.53, 116.28, 123.675], std=[2.0, 3.0, 4.0], bgr_to_rgb=False" in printed


def test_detectron_affine_channel_of_the_caffe_style(run, tmp_path):
    source = resnet(nn.BatchNorm2d)
    for name, module in source.named_modules():
        if isinstance(module, nn.BatchNorm2d):  # AffineChannel
            module.running_mean.zero_()
            module.running_var.fill_(1 - 1e-5)
        if re.fullmatch(r"layer[234]\.0", name):  # the MSRA networks have the stride in the first convolution
            module.conv1.stride, module.conv2.stride = (2, 2), (1, 1)
    state = {key: value for key, value in state_of(source).items() if key.endswith(("weight", "bias"))}
    blobs = numpy_of({caffe2_blob(key, "bn"): value for key, value in state.items()})
    blobs["conv1_b"] = np.ones(64, np.float32)  # in the file, and not in the network
    file = write_pickle(tmp_path / "R-50.pkl", blobs)
    cfg = detector_cfg(norm_cfg=dict(type="FrozenBatchNorm"), style="caffe")
    cfg.model.data_preprocessor |= dict(mean=DETECTRON_BGR_MEAN, std=[1, 1, 1], bgr_to_rgb=False)
    converted, printed = run(file, cfg)
    assert_same(loaded_backbone(cfg, converted)(X), features(source, X))
    assert rows(printed)["bn1.running_var"] == ("", "constant 1 - eps")
    assert "leave it unread: conv1_b" in printed
    assert "style" not in printed
    cfg.model.backbone.style = "pytorch"
    assert "the backbone has style='pytorch'" in run(file, cfg)[1]


def test_detectron2_backbone(run, tmp_path):
    source = resnet(nn.BatchNorm2d)
    arrays = numpy_of({detectron2_name(key): value for key, value in state_of(source).items()})
    assert {"stem.conv1.norm.running_var", "res2.0.shortcut.norm.weight", "res5.2.conv3.weight"} <= arrays.keys()
    file = dict(model=arrays, __author__="torchvision", matching_heuristics=True)
    cfg = detector_cfg(norm_cfg=dict(type="BN"))
    state, _ = run(write_pickle(tmp_path / "R-50.pkl", file), cfg, "--images", "imagenet")
    assert_same(loaded_backbone(cfg, state)(X), features(source, X))


class Detector(nn.Module):
    """Mask R-CNN's convolutions in plain torch; layers are named as in mmdet 1, and the background is class 0."""

    def __init__(self, norm, classes=3, channels=64, batch_norm_backbone=False, full_size=False):
        super().__init__()
        bias = norm is None
        block, layers, maps, hidden = BasicBlock, (2, 2, 2, 2), (32, 64, 128, 256), 256
        if full_size:  # of COCO
            classes, channels = 80, 256
            block, layers, maps, hidden = Bottleneck, (3, 4, 6, 3), (256, 512, 1024, 2048), 1024

        def conv(*args, **kwargs):
            layer = nn.Sequential()
            layer.add_module("conv", nn.Conv2d(*args, bias=bias, **kwargs))
            layer.add_module("bn", norm(args[1]))
            return layer

        of_backbone = nn.BatchNorm2d if batch_norm_backbone else norm
        widths = [width // block.expansion for width in maps]
        self.backbone = ResNet(block, layers, channels=widths, norm_layer=of_backbone)
        del self.backbone.fc
        self.neck, self.rpn_head, self.bbox_head, self.mask_head = (nn.Module() for _ in range(4))
        self.neck.lateral_convs = nn.ModuleList(conv(c, channels, 1) for c in maps)
        self.neck.fpn_convs = nn.ModuleList(conv(channels, channels, 3, padding=1) for _ in range(4))
        self.rpn_head.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_head.rpn_cls, self.rpn_head.rpn_reg = nn.Conv2d(channels, 3, 1), nn.Conv2d(channels, 12, 1)
        self.bbox_head.shared_convs = nn.ModuleList(conv(channels, channels, 3, padding=1) for _ in range(4))
        self.bbox_head.shared_fcs = nn.ModuleList([nn.Linear(49 * channels, hidden)])
        self.bbox_head.fc_cls = nn.Linear(hidden, classes + 1)
        self.bbox_head.fc_reg = nn.Linear(hidden, 4 * (classes + 1))
        self.mask_head.convs = nn.ModuleList(conv(channels, channels, 3, padding=1) for _ in range(4))
        self.mask_head.upsample = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.mask_head.conv_logits = nn.Conv2d(channels, classes + 1, 1)

    def forward(self, x, boxes, masks):
        maps = [lateral(m) for lateral, m in zip(self.neck.lateral_convs, features(self.backbone, x), strict=True)]
        for i in (3, 2, 1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], size=maps[i - 1].shape[2:])
        maps = [conv(m) for conv, m in zip(self.neck.fpn_convs, maps, strict=True)]
        rpn = self.rpn_head.rpn_conv(maps[0]).relu()
        for conv in self.bbox_head.shared_convs:
            boxes = conv(boxes).relu()
        boxes = self.bbox_head.shared_fcs[0](boxes.flatten(1)).relu()
        for conv in self.mask_head.convs:
            masks = conv(masks).relu()
        masks = self.mask_head.conv_logits(self.mask_head.upsample(masks).relu())
        heads = self.rpn_head.rpn_cls(rpn), self.rpn_head.rpn_reg(rpn), self.bbox_head.fc_cls(boxes)
        return [*maps, *heads, self.bbox_head.fc_reg(boxes), masks]


BOXES, MASKS = torch.randn(2, 64, 7, 7).double(), torch.randn(2, 64, 14, 14).double()


def in_mmdets_order(outputs):
    """Scores with the background at the end, boxes and masks without it."""
    *rest, scores, boxes, masks = outputs
    return [*rest, torch.cat([scores[:, 1:], scores[:, :1]], 1), boxes[:, 4:], masks[:, 1:]]


def run_detector(cfg, state):
    model = build(cfg)
    model.load_state_dict(state, strict=True)
    maps = model.extract_feat(X)
    rpn = [level[0] for level in model.rpn_head(maps)]
    return [*maps, *rpn, *model.roi_head.bbox_head(BOXES), model.roi_head.mask_head(MASKS)]


def three_classes(norm="GN", **norm_options):
    cfg = detector_cfg(norm)
    cfg.model.backbone.stem_channels = 64
    heads = cfg.model.roi_head
    heads.bbox_head |= dict(num_classes=3, reg_class_agnostic=False)
    heads.mask_head |= dict(num_classes=3, class_agnostic=False)
    for part in (cfg.model.neck, heads.bbox_head, heads.mask_head, cfg.model.backbone):
        part.norm_cfg |= dict(num_groups=32) if norm == "GN" else norm_options
    return cfg


def caffe2_detector_blob(key):
    if key.startswith("backbone."):
        return caffe2_blob(key.removeprefix("backbone."))
    last = {0: "res2_1_sum", 1: "res3_1_sum", 2: "res4_1_sum", 3: "res5_1_sum"}
    norm, leaf = ".bn." in key, key.rpartition(".")[2]
    layer = key.rpartition(".")[0].removesuffix(".conv").removesuffix(".bn")
    part, _, index = layer.rpartition(".")
    layer = {
        "neck.lateral_convs": lambda i: f"fpn_inner_{last[i]}" + ("" if i == 3 else "_lateral"),
        "neck.fpn_convs": lambda i: f"fpn_{last[i]}",
        "bbox_head.shared_convs": lambda i: f"head_conv{i + 1}",
        "bbox_head.shared_fcs": lambda i: f"fc{i + 6}",
        "mask_head.convs": lambda i: f"_mask_fcn{i + 1}",
    }.get(part, lambda i: "")(int(index) if index.isdigit() else 0) or {
        "rpn_head.rpn_conv": "conv_rpn_fpn2",
        "rpn_head.rpn_cls": "rpn_cls_logits_fpn2",
        "rpn_head.rpn_reg": "rpn_bbox_pred_fpn2",
        "bbox_head.fc_cls": "cls_score",
        "bbox_head.fc_reg": "bbox_pred",
        "mask_head.upsample": "conv5_mask",
        "mask_head.conv_logits": "mask_fcn_logits",
    }[layer]
    return f"{layer}_gn_{'s' if leaf == 'weight' else 'b'}" if norm else f"{layer}_{SUFFIX[leaf]}"


def detectron2_detector_name(key):
    if key.startswith("backbone."):
        return "backbone.bottom_up." + detectron2_name(key.removeprefix("backbone."))
    key = key.replace(".bn.", ".norm.").replace(".conv.", ".")
    for pattern, name in (
        (r"neck\.lateral_convs\.(\d)", lambda m: f"backbone.fpn_lateral{int(m[1]) + 2}"),
        (r"neck\.fpn_convs\.(\d)", lambda m: f"backbone.fpn_output{int(m[1]) + 2}"),
        (r"rpn_head\.rpn_conv", "proposal_generator.rpn_head.conv"),
        (r"rpn_head\.rpn_cls", "proposal_generator.rpn_head.objectness_logits"),
        (r"rpn_head\.rpn_reg", "proposal_generator.rpn_head.anchor_deltas"),
        (r"bbox_head\.shared_convs\.(\d)", lambda m: f"roi_heads.box_head.conv{int(m[1]) + 1}"),
        (r"bbox_head\.shared_fcs\.0", "roi_heads.box_head.fc1"),
        (r"bbox_head\.fc_cls", "roi_heads.box_predictor.cls_score"),
        (r"bbox_head\.fc_reg", "roi_heads.box_predictor.bbox_pred"),
        (r"mask_head\.convs\.(\d)", lambda m: f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}"),
        (r"mask_head\.upsample", "roi_heads.mask_head.deconv"),
        (r"mask_head\.conv_logits", "roi_heads.mask_head.predictor"),
    ):
        key = re.sub(pattern, name, key)
    return key


@pytest.fixture(scope="module")
def mask_rcnn():
    return randomize(Detector(group_norm))


def test_detectron_detector(run, tmp_path, mask_rcnn):
    blobs = numpy_of({caffe2_detector_blob(key): value for key, value in state_of(mask_rcnn).items()})
    cfg = three_classes()
    cfg.model.data_preprocessor |= dict(mean=DETECTRON_BGR_MEAN, std=[1, 1, 1], bgr_to_rgb=False)
    state, printed = run(write_pickle(tmp_path / "model_final.pkl", dict(blobs=blobs, cfg=""), python2=True), cfg)
    assert_same(run_detector(cfg, state), in_mmdets_order(mask_rcnn(X, BOXES, MASKS)))
    assert "LegacyAnchorGenerator" in printed
    assert "background from first to last" in rows(printed)["roi_head.bbox_head.fc_cls.bias"][1]


def test_detectron2_detector(run, tmp_path, mask_rcnn):
    state = {detectron2_detector_name(key): value for key, value in state_of(mask_rcnn).items()}
    for key, first in (("box_predictor.cls_score", None), ("box_predictor.bbox_pred", 4), ("mask_head.predictor", 1)):
        for leaf in ("weight", "bias"):  # detectron2 has mmdet's order
            name = f"roi_heads.{key}.{leaf}"
            state[name] = state[name][first:] if first else torch.cat([state[name][1:], state[name][:1]])
    arrays = numpy_of(state) | {"proposal_generator.anchor_generator.cell_anchors.0": np.zeros((3, 4), np.float32)}
    arrays |= {"pixel_mean": np.array(RGB_MEAN[::-1]).reshape(3, 1, 1), "pixel_std": np.ones((3, 1, 1))}
    cfg = three_classes()
    cfg.model.data_preprocessor |= dict(mean=RGB_MEAN[::-1], std=[1, 1, 1], bgr_to_rgb=False)
    file = write_pickle(tmp_path / "model_final_dc5d9e.pkl", dict(model=arrays, __author__="Detectron2 Model Zoo"))
    converted, printed = run(file, cfg)
    assert_same(run_detector(cfg, converted), in_mmdets_order(mask_rcnn(X, BOXES, MASKS)))
    assert "The config's is the same." in printed
    assert "Warning" not in printed


# ---- mmdet's own, old and new


def test_backbone_of_a_detector(run, mask_rcnn):
    """mmdet 1's detector as the start of another: its backbone only."""
    cfg = three_classes()
    state, printed = run(state_of(mask_rcnn), cfg, "--part", "backbone")
    assert_same(loaded_backbone(cfg, state)(X), features(mask_rcnn.backbone, X))
    assert "no part of the backbone: neck.lateral_convs.0.conv.weight" in printed


class AuthorsCBN(nn.Module):
    """Howal's CBN in evaluation: by running statistics, eps outside the root; it counts no batches."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias"):
            self.register_parameter(name, nn.Parameter(torch.ones(channels)))
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        mean, var, weight, bias = (
            t.view(-1, 1, 1) for t in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return weight * (x - mean) / (var.sqrt() + 1e-5) + bias


def test_cross_iteration_batch_norm_of_its_authors(run):
    source = randomize(Detector(AuthorsCBN, batch_norm_backbone=True))
    cfg = three_classes("CBN", eps_mode="outside")
    cfg.model.backbone.norm_cfg = dict(type="BN")
    file = dict(meta=dict(epoch=12), state_dict=state_of(source), optimizer=dict(state={}, param_groups=[]))
    state, printed = run(file, cfg)
    assert_same(run_detector(cfg, state), in_mmdets_order(source(X, BOXES, MASKS)))
    assert "mmdet1" in printed
    assert rows(printed)["neck.fpn_convs.0.bn.cbn_calls"] == ("", "starts at 0")
    assert "eps_mode" not in printed
    assert "give the config's CBN eps_mode='outside'" in run(file, three_classes("CBN"))[1]


@pytest.mark.parametrize("conv_cfg", [None, dict(type="ConvWS")], ids=["GN", "GN+WS"])
def test_mmdet_detectors(run, conv_cfg):
    cfg = three_classes()
    for part in (cfg.model.backbone, cfg.model.neck, cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head):
        part.conv_cfg = conv_cfg
    source = build(cfg)
    for module in source.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    state, printed = run(dict(meta=dict(epoch=24), state_dict=state_of(source)), cfg)
    assert_same(run_detector(cfg, state), run_detector(cfg, source.state_dict()), 1e-6)
    assert "Source: mmdet," in printed
    plain = cfg.copy()
    plain.model.backbone.conv_cfg = None
    flags = ("--part", "backbone", *(("--standardized", "yes") if conv_cfg else ()))
    state, _ = run(state_of(source), plain, *flags)
    assert_same(loaded_backbone(plain, state)(X), source.backbone(X))


def test_open_mmlab_backbone(run, group_normalized):
    weights = {re.sub(r"bn(\d)", r"gn\1", key): value for key, value in state_of(group_normalized).items()}
    cfg = detector_cfg(depth=50)
    state, printed = run(dict(state_dict=weights), cfg)
    assert_same(loaded_backbone(cfg, state)(X), features(group_normalized, X))
    assert "Source: mmdet-backbone" in printed


def test_c4_has_its_last_stage_in_the_head(run, full_size):
    cfg = Config.fromfile(ROOT / "configs/mask_rcnn/mask-rcnn_r50-c4_gn-all_8xb1-2x_coco.py")
    state, _ = run(state_of(full_size), cfg, "--keep-images")
    model = build(cfg)
    parts = [{k: v for k, v in state.items() if k.startswith("layer4") == head} for head in (False, True)]
    model.backbone.load_state_dict(parts[0], strict=True)
    model.roi_head.shared_head.load_state_dict(parts[1], strict=True)
    (map_,) = model.backbone(X)
    assert_same([map_, model.roi_head.shared_head(map_)], features(full_size, X)[2:])


# ---- I3D


def i3d_cfg(norm_cfg, conv_cfg=None, **kwargs):
    cfg = Config.fromfile(ROOT / "configs/digits/i3d_r18_bn_digits.py")
    cfg.model.backbone |= dict(depth=50, base_channels=64, num_stages=2, stage_blocks=(1, 2), out_indices=(0, 1))
    cfg.model.backbone |= dict(spatial_strides=(1, 2), temporal_strides=(1, 1), dilations=(1, 1), inflate=(1, 1))
    cfg.model.backbone |= dict(
        norm_cfg=norm_cfg, conv_cfg=conv_cfg or dict(type="Conv3d"), conv1_kernel=(5, 7, 7), **kwargs
    )
    return cfg


def still_clip(backbone, frames=4):
    """Maps of a clip that stands still, with no zeros before its first and behind its last frame."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv3d):
            time = module.padding[0]
            module.padding = (0, *module.padding[1:])
            module.register_forward_pre_hook(
                lambda m, args, time=time: F.pad(args[0], (0, 0, 0, 0, time, time), mode="replicate")
            )
    return backbone(X.unsqueeze(2).repeat(1, 1, frames, 1, 1))


@pytest.mark.parametrize(
    ("norm", "norm_cfg", "conv_cfg"),
    [
        (nn.BatchNorm2d, dict(type="BN3d"), dict(type="Conv3d")),
        (group_norm, dict(type="GN", num_groups=32), dict(type="Conv3d")),
        (group_norm, dict(type="GN", num_groups=32), dict(type="ConvWS3d")),
    ],
    ids=["BN", "GN", "GN+WS"],
)
@pytest.mark.parametrize("style", ["3x1x1", "3x3x3"])
def test_a_still_clip_gives_what_the_image_gave(run, norm, norm_cfg, conv_cfg, style):
    source = ResNet(Bottleneck, (1, 2, 1, 1), norm_layer=norm)
    source = randomize(standardized(source) if conv_cfg["type"] == "ConvWS3d" else source)
    cfg = i3d_cfg(norm_cfg, conv_cfg, inflate_style=style)
    flags = ["--standardized", "yes"] if conv_cfg["type"] == "ConvWS3d" else []
    state, printed = run(state_of(source), cfg, "--drop", "layer3.*", "layer4.*", *flags)
    maps = still_clip(loaded_backbone(cfg, state))
    want = [m.unsqueeze(2).expand_as(got) for m, got in zip(features(source, X), maps, strict=False)]
    assert_same(maps, want)
    assert "inflated over T=5" in rows(printed)["conv1.conv.weight"][1]
    assert "as asked: layer3.0.conv1.weight" in printed


def test_detectron_for_i3d_sees_rgb(run, tmp_path):
    source = randomize(ResNet(Bottleneck, (1, 2, 1, 1), norm_layer=group_norm))
    cfg = i3d_cfg(dict(type="GN", num_groups=32))
    file = write_pickle(tmp_path / "R-50-GN.pkl", caffe2_of(source))
    state, printed = run(file, cfg, "--drop", "res4_*", "res5_*")
    first = loaded_backbone(cfg, state).conv1.conv.weight.sum(2) / torch.tensor(RGB_STD).double().view(1, 3, 1, 1)
    assert_same([first], [source.conv1.weight.flip(1)])
    cfg.model.backbone |= dict(pretrained=str(tmp_path / "new folder" / "out.pth"), pretrained2d=False)
    model = build(cfg).float()
    model.init_weights()
    assert all(torch.equal(value, state[key]) for key, value in model.backbone.state_dict().items())
    assert "BGR to RGB" in rows(printed)["conv1.conv.weight"][1]


# ---- BN, frozen and folded


@pytest.mark.parametrize("flag", ["--freeze-bn", "--fold-bn"])
def test_batch_norm_is_merged(run, flag):
    source = resnet(nn.BatchNorm2d)
    cfg = detector_cfg(norm_cfg=dict(type="FrozenBatchNorm"))
    state, printed = run(state_of(source), cfg, flag)
    assert_same(loaded_backbone(cfg, state)(X), features(source, X))
    assert not state["layer1.0.bn2.running_mean"].any()
    assert torch.allclose(state["layer1.0.bn2.running_var"] + 1e-5, torch.ones(32))
    assert (state["layer1.0.bn2.weight"] == 1).all() == (flag == "--fold-bn")
    assert torch.equal(state["conv1.weight"], source.conv1.weight.float()) == (flag == "--freeze-bn")
    assert "Warning" not in printed
    assert "Not used, a counter of training: bn1.num_batches_tracked, layer1.0.bn1.num_batches_tracked" in printed
    cfg.model.backbone |= dict(norm_cfg=dict(type="BN"), norm_eval=False)
    assert "Warning: norms of the config train by batch statistics" in run(state_of(source), cfg, flag)[1]


@pytest.mark.parametrize("leaf", ["bias", "running_mean", "running_var"])
@pytest.mark.parametrize("flag", ["--freeze-bn", "--fold-bn"])
def test_half_a_batch_norm_is_not_merged(run, flag, leaf):
    weights = state_of(resnet(nn.BatchNorm2d))
    del weights[f"layer2.1.bn3.{leaf}"]
    cfg = detector_cfg(depth=50, norm_cfg=dict(type="FrozenBatchNorm"))
    run(weights, cfg, flag, fails=r"layer2\.1\.bn3" + ("" if leaf == "running_mean" else f" has no {leaf}"))
    run(weights, cfg, fails=r"layer2\.1\.bn3")


def test_batch_norm_folds_into_a_model_without_norms(run):
    source = randomize(Detector(nn.BatchNorm2d))
    cfg = three_classes("BN")
    for part in (cfg.model.neck, cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head):
        part.norm_cfg = None
    state, _ = run(state_of(source), cfg, "--fold-bn")
    assert_same(run_detector(cfg, state), in_mmdets_order(source(X, BOXES, MASKS)))
    assert "neck.fpn_convs.0.conv.bias" in state
    run(state_of(source), cfg, fails="have no place in the model")


def test_batch_norm_does_not_fold_into_standardized_filters(run):
    weights = {f"module.{key}": value for key, value in state_of(standardized(resnet(nn.BatchNorm2d))).items()}
    cfg = detector_cfg(norm_cfg=dict(type="BN"), conv_cfg=dict(type="ConvWS"))
    run(weights, cfg, "--standardized", "yes", "--fold-bn", fails="takes a folded scale out again")


def test_a_bias_in_front_of_batch_norm_moves_into_the_mean(run):
    source = resnet(nn.BatchNorm2d)
    source.layer1[0].conv1.bias = nn.Parameter(torch.randn(32).double())
    source.layer1[0].conv2.bias = nn.Parameter(torch.zeros(32).double())
    cfg = detector_cfg(norm_cfg=dict(type="BN"))
    state, printed = run(state_of(source), cfg)
    assert_same(loaded_backbone(cfg, state)(X), features(source, X))
    assert "a bias of zeros that the model does not have: layer1.0.conv2.bias" in printed


# ---- refusals


class Evil:
    def __reduce__(self):
        return exec, ("open('executed', 'w').close()",)


@pytest.mark.parametrize("write", [pickle.dumps, partial(pickle.dumps, protocol=0)], ids=["protocol 4", "protocol 0"])
def test_a_program_is_not_executed(run, tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(write({"blobs": {"conv1_w": Evil()}}))
    run(tmp_path / "evil.pkl", detector_cfg(), fails=r"built.*\.exec")
    assert not (tmp_path / "executed").exists()


def test_getattr_and_object_arrays_are_refused(run, tmp_path):
    run(
        write_pickle(tmp_path / "a.pkl", {"conv1_w": np.array([Evil()])}), detector_cfg(), fails="exec|dtype of numbers"
    )
    run(
        write_pickle(tmp_path / "b.pkl", {"conv1_w": getattr}),
        detector_cfg(),
        fails="builtin__?.getattr|builtins.getattr",
    )


def test_wrong_files(run, tmp_path):
    cfg = detector_cfg()
    run(tmp_path / "none.pkl", cfg, fails="There is no checkpoint")
    for name, content in {"a.pkl": b"<html>not found</html>", "b.pkl": pickle.dumps({"a": np.ones(9)})[:-5]}.items():
        (tmp_path / name).write_bytes(content)
        run(tmp_path / name, cfg, fails="no checkpoint but|not a whole pickle")
    run(write_pickle(tmp_path / "c.pkl", {"epoch": 3}), cfg, fails="without tensors")
    run({"encoder.weight": torch.ones(2, 2)}, cfg, fails="no known format: encoder.weight.*caffe2")
    lost = state_of(ResNet(BasicBlock, (2, 2, 2, 2)))
    del lost["layer1.0.conv1.weight"]
    run(lost, cfg, fails=r"would be torchvision with a key .*layer1\\.0\\.conv1\\.weight")
    parallel = {f"module.{key}": value for key, value in lost.items()}
    _, told = run(parallel, cfg, fails="would be torchvision with a key")
    assert "would be jhu" not in told  # its networks have no running statistics
    cfg.model.backbone.colour = "blue"
    run(lost | {"layer1.0.conv1.weight": torch.ones(1)}, cfg, fails="model cannot be built: .*colour")
    del cfg.model.backbone["colour"]
    run(state_of(ResNet(BasicBlock, (2, 2, 2, 2))), cfg, "--format", "caffe2", fails="not the keys of Detectron")


def test_another_architecture_is_refused(run, group_normalized):
    weights = state_of(group_normalized)
    run(weights, detector_cfg(depth=101), fails=r"would not be set.*(?s:.*)layer3\.6\.conv1\.weight")
    run(
        weights,
        detector_cfg(num_stages=3, out_indices=(0, 1, 2), strides=(1, 2, 2), dilations=(1, 1, 1)),
        fails="no place",
    )
    run(weights, detector_cfg(base_channels=64), fails="differ in shape")
    run(weights, detector_cfg(norm_cfg=dict(type="BN")), fails="norms are not the model's")
    run(state_of(resnet(nn.BatchNorm2d)), detector_cfg(depth=50), fails="norms are not the model's")
    run(weights, detector_cfg(), "--part", "model", fails="would not be set")


def test_every_key_counts(run, group_normalized):
    weights = state_of(group_normalized)
    del weights["layer2.1.bn3.bias"]
    cfg = detector_cfg(depth=50)
    run(weights, cfg, fails=r"1 of the model would not be set.*\n  layer2.1.gn3.bias 256")
    state, printed = run(weights, cfg, "--allow-unset", "layer2.1.gn3.*", "layer3.*")
    assert "layer2.1.gn3.bias" not in state
    assert "as allowed: layer2.1.gn3.bias\n" in printed  # what the source has is in the file
    assert torch.equal(state["layer2.1.gn3.weight"], weights["layer2.1.bn3.weight"].float())
    weights["layer2.1.bn3.bias"] = torch.ones(7)
    state, printed = run(weights, cfg, "--allow-unset", "layer2.1.gn3.*")
    assert "layer2.1.gn3.bias" not in state
    assert "Not used, of another shape than the model's, which may stay unset: layer2.1.bn3.bias" in printed
    run(weights, cfg, "--allow-unset", "*", "--drop", "*", fails="Nothing of the source would be in the file")
    weights = state_of(group_normalized) | {"layer1.0.se.weight": torch.ones(4)}
    run(weights, cfg, fails="1 of the source have no place in the model.*\n  layer1.0.se.weight")
    state, _ = run(weights, cfg, "--drop", "*.se.*")
    loaded_backbone(cfg, state)


def test_other_groups_eps_and_mean_are_told(run, group_normalized):
    cfg = detector_cfg(norm_cfg=dict(type="GN", num_groups=16, eps=1e-3))
    cfg.model.data_preprocessor.mean = [100, 100, 100]
    _, printed = run(state_of(group_normalized), cfg)
    assert "16 groups" in printed
    assert "eps=0.001" in printed
    assert "prepares images otherwise: dict(mean=[100.0" in printed


# ---- the pre-activation backbone


@pytest.mark.parametrize(("kwargs", "stem"), [({}, "conv1"), (dict(deep_stem=True), "stem")])
def test_resnet_v2_freezes_stages(kwargs, stem):
    net = MODELS.build(dict(type="ResNetV2", depth=50, frozen_stages=1, **kwargs)).train()
    frozen = {name.split(".")[0] for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {stem, "layer1"}
    assert not getattr(net, stem).training
    assert not net.layer1.training
    assert net.layer2.training


@pytest.mark.parametrize("norm_cfg", [dict(type="EvoNormS0"), dict(type="GN", num_groups=32, act="silu")], ids=str)
def test_resnet_v2_takes_norms_that_contain_their_activation(norm_cfg):
    cfg = dict(type="ResNetV2", depth=50, base_channels=32, norm_cfg=norm_cfg, out_indices=(1, 3))
    net = MODELS.build(cfg).eval()
    assert not any(isinstance(m, nn.ReLU) for m in net.modules())
    assert [tuple(y.shape) for y in net(X.float())] == [(1, 256, 8, 8), (1, 1024, 2, 2)]


@pytest.mark.parametrize("wrong", [dict(depth=18), dict(depth=50, out_indices=(4,))], ids=str)
def test_resnet_v2_of_no_such_shape(wrong):
    with pytest.raises(ValueError, match=r"depths \[50, 101, 152\]"):
        MODELS.build(dict(type="ResNetV2", **wrong))
