"""Stock models whose norms take over the residual sum and the ReLU behind them: the same network in fewer passes."""

import copy
import pickle

import pytest
import torch
from test_adapt import BACKBONES, GN, evaluating, run, shake
from torch import nn

from normplug.openmmlab.adapt import fuse_activations
from normplug.registry import MODELS

pytest.importorskip("mmdet.models")
pytest.importorskip("mmaction.models")

BN, SYNC_BN = dict(type="BNAct"), dict(type="SyncBN")
NORMS = {"GN": GN, "BNAct": BN, "SyncBN": SYNC_BN, "CBN": dict(type="CBN", buffer_num=2, burnin=1)}
# where the only ReLU is one that no norm stands before
NOTHING_TO_FUSE = {"fpn"}
checkpoint_warning = pytest.mark.filterwarnings("ignore:.*use_reentrant")  # the stock blocks' checkpointing


def build(name, norm):
    cfg, shape = BACKBONES[name]
    torch.manual_seed(0)
    return shake(MODELS.build(cfg | dict(norm_cfg=norm))).double(), shape


def doubles(shape):
    """Batch norms of a few values enlarge rounding errors of single precision until nothing can be compared."""
    if isinstance(shape, list):
        return [doubles(s) for s in shape]
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def calls_of(model, kinds):
    count = []
    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda *_: count.append(1))
    return count


@checkpoint_warning
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("norm", NORMS)
def test_outputs_and_gradients_are_the_same(name, norm):
    if (name, norm) == ("v2d", "CBN"):
        pytest.skip("in a pre-activation network norms follow sums, and CBN refuses what is no convolution's output")
    plain, shape = build(name, NORMS[norm])
    fused = fuse_activations(copy.deepcopy(plain), ("cuda", "cpu"))
    fuse_activations(plain, ())
    assert list(fused.state_dict()) == list(plain.state_dict())
    x = doubles(shape)
    of_plain, of_fused = (calls_of(m, nn.ReLU) for m in (plain, fused))
    # twice: the second step of CBN has a history
    want, got = ([run(m, x), run(m, x)] for m in (plain, fused))
    assert len(of_fused) < len(of_plain) or name in NOTHING_TO_FUSE
    for got_step, want_step in zip(got, want, strict=True):
        for g, w in zip(got_step, want_step, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-9 * max(1, w.abs().max().item()))
    if name in ("r18-checkpointed", "3d-r50") and norm in ("BNAct", "SyncBN"):
        return  # recomputation updates the running statistics again, where it does not end before that
    for (key, g), w in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        if torch.is_tensor(g):
            torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-9, msg=key)


@checkpoint_warning
@pytest.mark.parametrize("name", ["r18", "r50", "hrnet", "r50v1d", "3d-r18", "3d-r50", "mask-head"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_silu_is_taken_over_like_a_relu(name, norm):
    plain, shape = build(name, NORMS[norm] | dict(act="silu"))
    fused = fuse_activations(copy.deepcopy(plain), ("cuda", "cpu"))
    fuse_activations(plain, ())
    x = doubles(shape)
    of_plain, of_fused = (calls_of(m, nn.SiLU) for m in (plain, fused))
    want, got = (run(m, x) for m in (plain, fused))
    assert len(of_fused) < len(of_plain) or name in NOTHING_TO_FUSE
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-9 * max(1, w.abs().max().item()))


def test_resnet_50_is_left_with_no_relu_of_its_own():
    for name in ("r50", "v2d", "3d-r50", "box-head"):
        model, shape = build(name, GN)
        fuse_activations(model, ("cpu",))
        count = calls_of(model, nn.ReLU)
        model(doubles(shape))
        # mmdet's box head ends in a fully connected layer with a ReLU, and no norm
        assert len(count) == (1 if name == "box-head" else 0), name


def test_on_cuda_by_default_and_only_there():
    model, shape = build("r50", GN)
    count = calls_of(model, nn.ReLU)
    model(doubles(shape))
    assert len(count) > 0
    assert all(m.fuses_on == {"cuda"} for m in model.modules() if hasattr(m, "fuses_on"))


def test_copies_and_pickles_keep_the_switch():
    model, _ = build("r50", GN)
    fuse_activations(model, ("cpu",))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.layer1[0].fuses_on == {"cpu"}


@pytest.mark.parametrize("name", ["r50", "3d-r18", "mask-head"])
def test_convolutions_fused_with_their_norm_keep_the_relu(name):
    """fuse_conv_bn leaves an Identity where SyncBN was: the ReLU behind it must run again."""
    from mmcv.cnn import fuse_conv_bn

    model, shape = build(name, NORMS["SyncBN"])
    for m in model.modules():
        if hasattr(m, "running_var"):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    fuse_activations(evaluating(model), ("cpu",))
    x = doubles(shape)
    with torch.no_grad():
        want = model(x)
        got = evaluating(fuse_conv_bn(copy.deepcopy(model)))(x)
    for g, w in zip(got if isinstance(got, tuple) else [got], want if isinstance(want, tuple) else [want], strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-9)


def test_convolutions_fused_with_their_norm_keep_the_activation_that_it_chose():
    from mmcv.cnn import fuse_conv_bn

    model, shape = build("r50", dict(type="BNAct", act="silu"))
    x = doubles(shape)
    evaluating(model)
    with torch.no_grad():
        want = model(x)
        got = evaluating(fuse_conv_bn(copy.deepcopy(model)))(x)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-9)


def test_other_activations_and_orders_stay_as_they_are():
    cfg = dict(type="mmdet.FCNMaskHead", in_channels=16, conv_out_channels=16, norm_cfg=GN)
    assert any(hasattr(m, "fuses_on") for m in MODELS.build(cfg).modules())
    from mmcv.cnn import ConvModule

    from normplug.openmmlab.adapt import adapt

    for kwargs in (dict(act_cfg=dict(type="GELU")), dict(order=("norm", "act", "conv")), dict(act_cfg=None)):
        module = adapt(nn.Sequential(ConvModule(16, 16, 3, norm_cfg=GN, **kwargs)))
        assert not any(hasattr(m, "fuses_on") for m in module.modules())
