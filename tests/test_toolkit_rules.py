"""What mmengine, mmcv, mmdet and mmaction2 do to norms, done to each of ours: weight decay, freezing, init, fusion.

The toolkits recognize norms by class. These tests hold every layer, in a stock 2-D and a stock 3-D backbone, to being
treated as the norm it is, and as no other.
"""

import copy
import importlib
import warnings

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import normplug  # noqa: F401

ConvWS2d = pytest.importorskip("mmcv.cnn.bricks.conv_ws").ConvWS2d
pytest.importorskip("mmdet.models")
pytest.importorskip("mmaction.models")

NORMS = {
    "GN": dict(type="GN", num_groups=4),
    "BNAct": dict(type="BNAct"),
    "SyncBN": dict(type="SyncBN"),
    "CBN": dict(type="CBN", buffer_num=1, burnin=1),
    "EvoNormB0": dict(type="EvoNormB0"),
    "EvoNormS0": dict(type="EvoNormS0"),
    "FRN": dict(type="FRN", eps=1e-4),  # the last maps are single values, for which a smaller one is warned of
}
HAS_STATISTICS = {"BNAct", "SyncBN", "CBN", "EvoNormB0"}
FOLDABLE = {"BNAct", "SyncBN", "CBN"}
BACKBONES = {
    "2d": dict(type="mmdet.ResNet", base_channels=8, norm_eval=False),
    "3d": dict(type="mmaction.ResNet3d", base_channels=8, pretrained=None, conv1_kernel=(1, 7, 7), norm_eval=False),
}


each_norm = pytest.mark.parametrize("norm", NORMS)
each_backbone = pytest.mark.parametrize("dim", BACKBONES)
each_depth = pytest.mark.parametrize("depth", [18, 50])


def build(dim, norm, depth=18, **kwargs):
    return MODELS.build(BACKBONES[dim] | dict(depth=depth, norm_cfg=NORMS.get(norm, norm)) | kwargs)


def norms_of(model):
    return {name: m for name, m in model.named_modules() if type(m).__module__.startswith("normplug.layers.")}


def shake(model):
    """Random weights, biases and statistics: ones and zeros agree with too much."""
    for norm in norms_of(model).values():
        for p in norm.parameters():
            nn.init.normal_(p, 1.0, 0.3)
        for name, buffer in norm.named_buffers():
            if name == "running_var":
                nn.init.uniform_(buffer, 0.5, 2.0)
            elif name == "running_mean":
                nn.init.normal_(buffer)
    return model


def statistics(model):
    return {
        f"{path}.{name}": buffer.clone()
        for path, norm in norms_of(model).items()
        for name, buffer in norm.named_buffers()
        if name.startswith("running_")
    }


def images(dim, size=32):
    return torch.randn((2, 3, size, size) if dim == "2d" else (2, 3, 4, size, size))


def features(model, x):
    y = model(x)
    return [y] if isinstance(y, torch.Tensor) else list(y)


def step(model, x):
    sum(y.square().mean() for y in features(model, x)).backward()


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- weight decay


@each_norm
@each_backbone
def test_norm_decay_mult_takes_every_parameter_of_the_norms_and_no_other(dim, norm):
    model = build(dim, norm)
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type="SGD", lr=0.1, weight_decay=1e-4),
            paramwise_cfg=dict(norm_decay_mult=0.0, bias_lr_mult=2.0, bias_decay_mult=3.0),
        ),
    )
    ours = {id(p) for m in norms_of(model).values() for p in m.parameters()}
    groups = wrapper.optimizer.param_groups
    assert len(groups) == len(list(model.parameters()))
    for group in groups:
        (p,) = group["params"]
        assert group["weight_decay"] == (0.0 if id(p) in ours else 1e-4)
        assert group["lr"] == 0.1  # bias_lr_mult is for the biases of convolutions
    own = {"EvoNormB0": ".v", "EvoNormS0": ".v", "FRN": ".tau"}.get(norm)
    if own:
        assert any(name.endswith(own) for name, p in model.named_parameters() if id(p) in ours)


# --- freezing


@each_norm
@each_backbone
def test_norm_eval_freezes_every_statistic(dim, norm):
    model = shake(build(dim, norm, norm_eval=True))
    model.train()
    before = statistics(model)
    assert bool(before) == (norm in HAS_STATISTICS)
    step(model, images(dim))
    assert not changed(before, statistics(model))
    assert all(not norms_of(model)[name.rpartition(".")[0]].training for name in before)
    assert model.training
    assert all(p.grad is not None for m in norms_of(model).values() for p in m.parameters())  # weights still train
    model.norm_eval = False
    model.train()
    step(model, images(dim))
    assert changed(before, statistics(model)) == set(before)


@each_norm
@each_backbone
def test_frozen_stages_freeze_parameters_and_statistics(dim, norm):
    model = shake(build(dim, norm, frozen_stages=1))
    model.train()
    before = statistics(model)
    step(model, images(dim))
    moved = changed(before, statistics(model))
    frozen = {name for name in before if not name.startswith(("layer2", "layer3", "layer4"))}
    assert moved == set(before) - frozen
    for name, p in model.named_parameters():
        assert p.requires_grad == name.startswith(("layer2", "layer3", "layer4")), name
    for name, m in norms_of(model).items():
        assert m.training == name.startswith(("layer2", "layer3", "layer4")), name


# --- initialization


@each_norm
@each_backbone
@each_depth
def test_zero_init_residual_makes_every_block_an_identity(dim, norm, depth):
    model = shake(build(dim, norm, depth, zero_init_residual=True))
    model.init_weights()
    model.train()
    last = ("norm3" if depth == 50 else "norm2") if dim == "2d" else ("conv3" if depth == 50 else "conv2")
    blocks = [b for i in (1, 2, 3, 4) for b in getattr(model, f"layer{i}")]
    for block in blocks:
        final = getattr(block, last) if dim == "2d" else getattr(block, last).norm
        assert (final.weight == 0).all()
        assert (final.bias == 0).all()
    identity = blocks[1]
    x = torch.randn(2, identity.conv1.in_channels, *[4] * (2 if dim == "2d" else 3))
    torch.testing.assert_close(identity(x), x.relu(), rtol=0, atol=0)


@each_norm
@each_backbone
def test_initializing_sets_every_norm_to_weight_one_and_bias_zero(dim, norm):
    model = shake(build(dim, norm, zero_init_residual=False))
    model.init_weights()
    for name, m in norms_of(model).items():
        assert (m.weight == 1).all(), name
        assert (m.bias == 0).all(), name


# --- folding into the convolution, and conversions


@each_norm
@each_backbone
@each_depth
def test_fuse_conv_bn_folds_what_is_a_batch_norm_in_eval_mode_and_nothing_else(dim, norm, depth):
    from mmcv.cnn.utils import fuse_conv_bn

    model = shake(build(dim, norm, depth))
    model.eval()
    x = images(dim)
    with torch.no_grad():
        want = features(model, x)
        count = len(norms_of(model))
        fused = fuse_conv_bn(copy.deepcopy(model))
        got = features(fused, x)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-3 * w.abs().max().item())
    folds = norm in FOLDABLE and dim == "2d"  # mmcv folds into Conv2d only
    assert len(norms_of(fused)) == (0 if folds else count)


@each_norm
@each_backbone
def test_conversions_to_and_from_sync_bn_leave_the_others_alone(dim, norm):
    model = shake(build(dim, norm))
    model.eval()
    x = images(dim)
    with torch.no_grad():
        want = features(model, x)
        count = len(norms_of(model))
        for convert, converted in (
            (revert_sync_batchnorm, {"SyncBN"}),
            (nn.SyncBatchNorm.convert_sync_batchnorm, FOLDABLE),
        ):
            other = convert(copy.deepcopy(model))
            if norm not in converted:
                assert len(norms_of(other)) == count
            assert not isinstance(next(iter(norms_of(other).values()), None), _BatchNorm) or norm in FOLDABLE
            if convert is revert_sync_batchnorm or norm not in FOLDABLE:  # torch's SyncBN needs a GPU
                for g, w in zip(features(other, x), want, strict=True):
                    torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4 * w.abs().max().item())


# --- one line in a config


def load_stock(path):
    mmdet = importlib.import_module("mmdet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmengine imports pkg_resources
        return Config.fromfile(f"{mmdet.__path__[0]}/.mim/configs/{path}")


@pytest.mark.parametrize(
    "path", ["gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py", "gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py"]
)
def test_custom_imports_is_the_only_change_that_mmdets_configs_need(path):
    cfg = load_stock(path)
    with torch.device("meta"):
        model = MODELS.build(cfg.model | dict(_scope_="mmdet"))
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 53 + 8 + 4 + 4  # backbone, FPN, box head, mask head
    assert all(type(m) is MODELS.get("GN") for m in norms)
    if "ws" in path:
        convs = [m for m in model.modules() if type(m) is MODELS.get("ConvWS")]
        assert type(convs[0]).__module__.startswith("normplug.")
        assert len(convs) == len(norms)


STOCK = {
    "GN": (dict(norm_cfg=dict(type=nn.GroupNorm, num_groups=4)), dict(norm_cfg=NORMS["GN"])),
    "BNAct": (dict(norm_cfg=dict(type="BN")), dict(norm_cfg=NORMS["BNAct"])),
    "SyncBN": (dict(norm_cfg=dict(type=nn.SyncBatchNorm)), dict(norm_cfg=NORMS["SyncBN"])),
    "CBN": (dict(norm_cfg=dict(type="BN")), dict(norm_cfg=NORMS["CBN"])),
    "ConvWS": (
        dict(norm_cfg=NORMS["GN"], conv_cfg=dict(type=ConvWS2d)),
        dict(norm_cfg=NORMS["GN"], conv_cfg=dict(type="ConvWS")),
    ),
}


@pytest.mark.parametrize("name", STOCK)
@each_depth
def test_published_checkpoints_of_the_stock_layers_load_completely(name, depth):
    theirs, ours = STOCK[name]
    stock = MODELS.build(BACKBONES["2d"] | dict(depth=depth) | theirs)
    model = MODELS.build(BACKBONES["2d"] | dict(depth=depth) | ours)
    for buffer in stock.state_dict().values():
        if buffer.is_floating_point() and buffer.ndim == 1:
            nn.init.uniform_(buffer, 0.5, 1.5)
    result = model.load_state_dict(stock.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    stock.eval()
    model.eval()
    x = images("2d")
    with torch.no_grad():
        if name == "SyncBN":
            stock = revert_sync_batchnorm(stock)
        for got, want in zip(features(model, x), features(stock, x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
