"""FrozenBatchNorm: BatchNorm's evaluation for ever, as one line of a stock config."""

import copy

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn

import normplug

pytest.importorskip("mmdet.models")
pytest.importorskip("mmaction.models")

BACKBONES = {
    "2d": dict(type="mmdet.ResNet", depth=18, base_channels=8, norm_eval=False),
    "3d": dict(type="mmaction.ResNet3d", depth=18, base_channels=8, pretrained=None, norm_eval=False),
}
each_backbone = pytest.mark.parametrize("dim", BACKBONES)


def trained_bn(dim):
    model = MODELS.build(BACKBONES[dim] | dict(norm_cfg=dict(type="BN" if dim == "2d" else "BN3d")))
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t in (m.weight, m.running_var):
                nn.init.uniform_(t, 0.5, 1.5)
            for t in (m.bias, m.running_mean):
                nn.init.normal_(t)
    return model


def frozen_from(bn, dim):
    # requires_grad=True stands in the norm_cfg of most stock configs; it must not thaw anything
    model = MODELS.build(BACKBONES[dim] | dict(norm_cfg=dict(type="FrozenBatchNorm", requires_grad=True)))
    result = model.load_state_dict(bn.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    return model


def images(dim):
    return torch.randn((2, 3, 32, 32) if dim == "2d" else (2, 3, 4, 32, 32))


def features(model, x):
    y = model(x)
    return [y] if isinstance(y, torch.Tensor) else list(y)


@each_backbone
def test_a_bn_checkpoint_gives_its_evaluation_in_training_too(dim):
    bn = trained_bn(dim)
    frozen, x = frozen_from(bn, dim), images(dim)
    bn.eval()
    frozen.train()  # mmdet's train() returns nothing
    assert frozen.training
    for got, want in zip(features(frozen, x), features(bn, x), strict=True):
        assert torch.equal(got, want)
    bn.load_state_dict(frozen.state_dict(), strict=True)


@each_backbone
def test_a_training_step_moves_convolutions_only(dim):
    frozen = frozen_from(trained_bn(dim), dim)
    frozen.train()
    before = copy.deepcopy(frozen.state_dict())
    assert all("conv" in name or "downsample.0" in name or ".conv." in name for name, _ in frozen.named_parameters())
    cfg = dict(optimizer=dict(type="SGD", lr=0.1, weight_decay=0.1), paramwise_cfg=dict(norm_decay_mult=0.0))
    optimizer = build_optim_wrapper(frozen, cfg).optimizer
    sum(y.square().mean() for y in features(frozen, images(dim))).backward()
    optimizer.step()
    after = frozen.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, _ in frozen.named_parameters()}


def test_fusion_folds_it_and_conversions_are_told_no():
    from mmcv.cnn.utils import fuse_conv_bn

    frozen, x = frozen_from(trained_bn("2d"), "2d"), images("2d")
    with torch.no_grad():
        want = features(frozen, x)
        fused = fuse_conv_bn(copy.deepcopy(frozen))
        for g, w in zip(features(fused, x), want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-3 * w.abs().max().item())
    assert not any(isinstance(m, normplug.layers.FrozenBatchNorm) for m in fused.modules())
    with pytest.raises(ValueError, match="frozen"):
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(frozen))
    normplug.layers.SyncBatchNorm.convert_sync_batchnorm(frozen)
    assert not any(isinstance(m, normplug.layers.SyncBatchNorm) for m in frozen.modules())


def test_zero_init_residual_and_frozen_stages_do_as_with_bn():
    model = MODELS.build(
        BACKBONES["2d"] | dict(norm_cfg=dict(type="FrozenBatchNorm"), frozen_stages=1, zero_init_residual=False)
    )
    model.init_weights()
    model.train()
    layers = [m for m in model.modules() if isinstance(m, normplug.layers.FrozenBatchNorm)]
    assert layers
    assert not any(m.training for m in layers)
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in layers)


def test_a_half_model_and_a_residual():
    layer = normplug.layers.FrozenBatchNorm(4)
    x, residual = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(layer(x, residual=residual, act="relu"), (x / (1 + 1e-5) ** 0.5 + residual).relu())
    assert layer.half()(x.half()).dtype == torch.float16
