"""Stock models with our layers: activations, statistics, inflation; and the registry that adapts what it builds."""

import copy
import importlib
import pickle

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, Registry
from torch import nn

import normplug
from normplug.layers.weight_standardization import WSConv2d, standardize_together
from normplug.openmmlab.adapt import adapt, install
from normplug.openmmlab.placement import ActivationInNorm

mmdet = pytest.importorskip("mmdet.models")
mmaction = pytest.importorskip("mmaction.models")

GN = dict(type="GN", num_groups=4)
PLUGIN = dict(cfg=dict(type="ContextBlock", ratio=1 / 4), stages=(True, True), position="after_conv3")
TWO_STAGES = dict(base_channels=8, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1))
HRNET = {
    f"stage{i}": dict(
        num_modules=1,
        num_branches=i,
        block="BOTTLENECK" if i == 1 else "BASIC",
        num_blocks=(1,) * i,
        num_channels=(64,) if i == 1 else tuple(8 * 2**j for j in range(i)),
    )
    for i in (1, 2, 3, 4)
}


class GNReLU(normplug.layers.GroupNorm):
    """A layer that contains its activation, and whose network can be written with stock layers."""

    contains_activation = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, act="relu")

    def drop_activation(self):
        self.act, self.contains_activation = None, False


MODELS.register_module(module=GNReLU)
GN_RELU = GN | dict(type="GNReLU")
REGNET = dict(w0=16, wa=24.48, wm=2.0, group_w=8, depth=5, bot_mul=1.0)
IMAGE, CLIP = (2, 3, 32, 32), (2, 3, 4, 32, 32)
PYRAMID = [(2, 16, 16 // 2**i, 16 // 2**i) for i in range(4)]
VIDEO = dict(
    pretrained=None,
    base_channels=8,
    num_stages=2,
    stage_blocks=(1, 2),
    spatial_strides=(1, 2),
    temporal_strides=(1, 1),
    dilations=(1, 1),
    inflate=(1, 1),
    out_indices=(0, 1),
)
BACKBONES = {
    "r18": (dict(type="mmdet.ResNet", depth=18, **TWO_STAGES), IMAGE),
    "r50": (dict(type="mmdet.ResNet", depth=50, **TWO_STAGES), IMAGE),
    "r50-caffe": (dict(type="mmdet.ResNet", depth=50, **TWO_STAGES, style="caffe"), IMAGE),
    "r50-plugins": (dict(type="mmdet.ResNet", depth=50, **TWO_STAGES, plugins=[PLUGIN]), IMAGE),
    "r18-checkpointed": (dict(type="mmdet.ResNet", depth=18, **TWO_STAGES, with_cp=True), IMAGE),
    "r50v1d": (dict(type="mmdet.ResNetV1d", depth=50, **TWO_STAGES), IMAGE),
    "x50": (dict(type="mmdet.ResNeXt", depth=50, groups=2, base_width=4, **TWO_STAGES), IMAGE),
    "regnet": (dict(type="mmdet.RegNet", arch=REGNET), IMAGE),
    "hrnet": (dict(type="mmdet.HRNet", extra=HRNET), IMAGE),
    "v2d": (
        dict(type="ResNetV2", depth=50, base_channels=8, deep_stem=True, avg_down=True, conv_cfg=None),
        (2, 3, 64, 64),
    ),
    "hourglass": (
        dict(
            type="mmdet.HourglassNet",
            downsample_times=2,
            num_stacks=2,
            stage_channels=[16, 16, 16],
            stage_blocks=[1, 1, 1],
            feat_channel=16,
        ),
        IMAGE,
    ),
    "action-r18": (dict(type="mmaction.ResNet", depth=18, pretrained=None), IMAGE),
    "tsm": (dict(type="mmaction.ResNetTSM", depth=50, num_segments=2, pretrained=None), (2, 3, 64, 64)),
    "x3d": (dict(type="mmaction.X3D", gamma_w=1, gamma_b=1, gamma_d=1), CLIP),
    "fpn": (dict(type="mmdet.FPN", in_channels=[16] * 4, out_channels=16, num_outs=5), PYRAMID),
    "3d-r18": (dict(type="mmaction.ResNet3d", depth=18, **VIDEO), CLIP),
    "3d-r50": (dict(type="mmaction.ResNet3d", depth=50, with_cp=True, **VIDEO), CLIP),
    "3d-slowonly": (dict(type="mmaction.ResNet3dSlowOnly", depth=50, **VIDEO), CLIP),
    "mask-head": (dict(type="mmdet.FCNMaskHead", in_channels=16, conv_out_channels=16), (3, 16, 14, 14)),
    "box-head": (
        dict(type="mmdet.Shared4Conv1FCBBoxHead", in_channels=16, conv_out_channels=16, fc_out_channels=8),
        (3, 16, 7, 7),
    ),
    "retina-head": (
        dict(type="mmdet.RetinaHead", num_classes=3, in_channels=16, feat_channels=16),
        PYRAMID + PYRAMID[-1:],
    ),
    "fcos-head": (dict(type="mmdet.FCOSHead", num_classes=3, in_channels=16, feat_channels=16), PYRAMID + PYRAMID[-1:]),
}
# Classes of which nothing is known here but what watching their forward shows.
for toolkit in ("mmseg", "mmpretrain"):
    importlib.import_module(f"{toolkit}.models")  # as a tool of the toolkit does: its names are in the registry then
WATCHED = {
    "seg-r18": (dict(type="mmseg.ResNet", depth=18, **TWO_STAGES, contract_dilation=True), IMAGE),
    "seg-r50v1c": (dict(type="mmseg.ResNetV1c", depth=50, stem_channels=8, with_cp=True, **TWO_STAGES), IMAGE),
    "seg-s50": (dict(type="mmseg.ResNeSt", depth=50, stem_channels=8, radix=2, **TWO_STAGES), IMAGE),
    "seg-unet": (
        dict(
            type="mmseg.UNet",
            upsample_cfg=dict(type="mmseg.InterpConv"),
            base_channels=8,
            num_stages=2,
            strides=(1, 1),
            enc_num_convs=(2, 2),
            dec_num_convs=(2,),
            downsamples=(True,),
            enc_dilations=(1, 1),
            dec_dilations=(1,),
        ),
        IMAGE,
    ),
    "cls-r18": (dict(type="mmpretrain.ResNet", depth=18, stem_channels=8, **TWO_STAGES), IMAGE),
    "cls-r50v1d": (dict(type="mmpretrain.ResNetV1d", depth=50, stem_channels=8, **TWO_STAGES), IMAGE),
    "cls-cifar": (dict(type="mmpretrain.ResNet_CIFAR", depth=18, stem_channels=8, **TWO_STAGES), IMAGE),
    "cls-se50": (dict(type="mmpretrain.SEResNet", depth=50, stem_channels=8, se_ratio=4, **TWO_STAGES), IMAGE),
    "cls-s50": (dict(type="mmpretrain.ResNeSt", depth=50, stem_channels=8, **TWO_STAGES), IMAGE),
    "cls-regnet": (dict(type="mmpretrain.RegNet", arch=REGNET | dict(depth=5)), IMAGE),
    "cls-res2net": (dict(type="mmpretrain.Res2Net", depth=50, base_width=4, stem_channels=8, **TWO_STAGES), IMAGE),
    "cls-densenet": (dict(type="mmpretrain.DenseNet", arch=dict(growth_rate=4, depths=[2, 2], init_channels=8)), IMAGE),
    "res2net": (dict(type="mmdet.Res2Net", depth=50, base_width=4, **TWO_STAGES), IMAGE),
}


def inputs(shape):
    if isinstance(shape, list):
        return [inputs(s) for s in shape]
    return torch.randn(shape, requires_grad=True)


def evaluating(model):
    model.eval()  # returns nothing in mmdet's and mmaction2's backbones
    return model


def flat(result):
    """Every tensor of nested outputs."""
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


def shake(model):
    """Move every norm off its initial ones and zeros: zero-initialized branches would hide what is wrong in them."""
    for name, p in model.named_parameters():
        if p.ndim == 1:
            nn.init.normal_(p, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    return model


def run(model, x):
    """Return the outputs and all gradients."""
    y, leaves = flat(model(x)), [*flat(x), *model.parameters()]
    for leaf in leaves:
        leaf.grad = None
    sum(t.square().mean() for t in y).backward()  # not autograd.grad: the toolkits' checkpointing refuses it
    return y + [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.filterwarnings("ignore:.*use_reentrant")  # the stock blocks' checkpointing
@pytest.mark.parametrize("name", [*BACKBONES, *WATCHED])
def test_contained_activation_leaves_the_network_what_it_was(name):
    """GN that contains its ReLU must be the network of GN and ReLU: exactly one ReLU where the stock model has one."""
    cfg, shape = (BACKBONES | WATCHED)[name]
    stock = shake(MODELS.build(cfg | dict(norm_cfg=GN)))
    ours = MODELS.build(cfg | dict(norm_cfg=GN_RELU))
    ours.load_state_dict(stock.state_dict(), strict=True)
    x = inputs(shape)
    for got, want in zip(run(ours, x), run(stock, x), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:.*use_reentrant")
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("act", ["silu", "leaky_relu", "gelu"])
def test_the_activation_of_the_norms_takes_the_place_of_every_relu_behind_them_and_their_sums(name, act):
    cfg, shape = BACKBONES[name]
    stock = shake(MODELS.build(cfg | dict(norm_cfg=GN)))
    ours = MODELS.build(cfg | dict(norm_cfg=GN | dict(act=act)))
    ours.load_state_dict(stock.state_dict(), strict=True)
    for path, relu in list(stock.named_modules()):
        # What stands behind fully connected layers and convolutions without a norm, and behind norms that are not ours:
        # the plugin's, and those of the hourglass modules, to which mmdet does not hand norm_cfg on.
        other = path == "relu" and name in ("box-head", "mask-head")
        other = other or any(part in path for part in ("se_module", "context_block", "hourglass_modules"))
        if type(relu) is nn.ReLU and not other:
            own = {"silu": nn.SiLU, "leaky_relu": nn.LeakyReLU, "gelu": nn.GELU}[act]()
            stock.get_submodule(path.rpartition(".")[0]).register_module(path.rpartition(".")[2], own)
    x = inputs(shape)
    for got, want in zip(run(ours, x), run(stock, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * max(1, want.abs().max().item()))
    text = repr(ours)
    assert repr(adapt(ours)) == text


SILU = GN | dict(act="silu")


def test_an_act_is_the_activation_behind_the_norm_and_no_longer_in_it():
    module = MODELS.build(conv_module(norm_cfg=SILU))
    assert type(module.activate) is nn.SiLU
    assert module.norm.act is None
    assert MODELS.build(conv_module(norm_cfg=SILU, act_cfg=None)).norm.act is None
    gate = MODELS.build(conv_module(norm_cfg=SILU, act_cfg=dict(type="Sigmoid")))
    assert isinstance(gate.activate, nn.Sigmoid)
    assert gate.norm.act is None
    relu = MODELS.build(conv_module(norm_cfg=GN | dict(act="relu"), act_cfg=dict(type="LeakyReLU")))
    assert type(relu.activate) is nn.ReLU


def test_blocks_that_are_called_by_another_name_activate_once():
    """DetectoRS calls the layers of mmdet's blocks itself, once more."""
    cfg = dict(type="mmdet.DetectoRS_ResNet", depth=50, output_img=True, rfp_inplanes=16, deep_stem=True, **TWO_STAGES)
    stock = shake(MODELS.build(cfg | dict(norm_cfg=GN)))
    ours = MODELS.build(cfg | dict(norm_cfg=SILU))
    ours.load_state_dict(stock.state_dict(), strict=True)
    for path, relu in list(stock.named_modules()):
        if type(relu) is nn.ReLU:
            setattr(stock.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], nn.SiLU())
    x, rfp = torch.randn(2, 3, 32, 32), [torch.randn(2, 16, 8, 8), torch.randn(2, 16, 4, 4)]
    with torch.no_grad():
        for got, want in zip(ours.rfp_forward(x, rfp), stock.rfp_forward(x, rfp), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("deep_stem", [False, True])
def test_both_forwards_of_detectors_activate_once(deep_stem):
    cfg = dict(type="mmdet.DetectoRS_ResNet", depth=50, rfp_inplanes=16, deep_stem=deep_stem, **TWO_STAGES)
    stock = shake(MODELS.build(cfg | dict(norm_cfg=GN)))
    ours = MODELS.build(cfg | dict(norm_cfg=GN_RELU))
    ours.load_state_dict(stock.state_dict(), strict=True)
    x, rfp = torch.randn(2, 3, 32, 32), [torch.randn(2, 16, 8, 8), torch.randn(2, 16, 4, 4)]
    with torch.no_grad():
        want, got = (flat([m(x), m.rfp_forward(x, rfp)]) for m in (stock, ours))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_other_norms_of_a_block_do_not_choose_for_it():
    from mmcv.cnn import ConvModule
    from mmdet.models.backbones.resnet import BasicBlock

    block = BasicBlock(8, 8, norm_cfg=GN)
    block.attention = ConvModule(8, 8, 1, norm_cfg=SILU)
    adapt(block)
    assert type(block.relu) is nn.ReLU
    assert type(block.attention.activate) is nn.SiLU


def test_users_subclasses_keep_what_is_no_relu():
    from mmaction.models.backbones.resnet3d import BasicBlock3d
    from mmdet.models.backbones.resnet import BasicBlock

    class Gate(BasicBlock3d):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.relu = nn.Hardsigmoid()

    class Mine(BasicBlock):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            del self.relu

    assert type(adapt(Gate(8, 8, norm_cfg=SILU)).relu) is nn.Hardsigmoid
    with pytest.raises(ValueError, match=r"GroupNorm has act='silu'.*Mine.*places_activations"):
        adapt(Mine(8, 8, norm_cfg=SILU))
    Mine.places_activations = True
    assert adapt(Mine(8, 8, norm_cfg=SILU)).norm1.act == "silu"


def test_any_backbone_that_has_its_relu_beside_the_norms_takes_an_act():
    cfg = dict(type="mmdet.Res2Net", depth=50, base_channels=16, norm_cfg=dict(type="GN", num_groups=1, act="silu"))
    model = MODELS.build(cfg)
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())
    assert not any(getattr(m, "act", None) for m in model.modules())


def test_an_act_in_a_class_of_unknown_forward_is_refused():
    from mmdet.models.layers import SimplifiedBasicBlock

    with pytest.raises(ValueError, match=r"act='silu'.*SimplifiedBasicBlock.*Leave act out"):
        adapt(SimplifiedBasicBlock(8, 8, norm_cfg=SILU))


@pytest.mark.parametrize("depth", [18, 50])
def test_checkpointed_blocks_still_run_their_branch_again_in_backward(depth):
    cfg = dict(type="mmdet.ResNet", depth=depth, base_channels=8, with_cp=True, norm_cfg=GN_RELU)
    model, calls = MODELS.build(cfg), []
    model.layer2[0].conv2.register_forward_hook(lambda *_: calls.append(1))
    run(model, inputs(IMAGE))
    assert len(calls) == 2
    with torch.no_grad():
        model(inputs(IMAGE))
    assert len(calls) == 3


activating = pytest.mark.parametrize("norm", ["EvoNormS0", "EvoNormB0", "FRN"])
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.SiLU)


@activating
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.filterwarnings("ignore:.*use_reentrant", "ignore:FRN got an input of shape")  # the last maps are 1 x 1
def test_no_activation_follows_a_norm_that_contains_one_and_every_sum_has_its_relu(name, norm):
    cfg, shape = BACKBONES[name]
    model = MODELS.build(cfg | dict(norm_cfg=dict(type=norm)))
    stock = MODELS.build(cfg | dict(norm_cfg=GN))
    from_norm = set()

    def watch(model, count):
        def after_norm(module, args, y):
            if hasattr(module, "drop_activation") and module.contains_activation:
                from_norm.add(y.data_ptr())
                kept.append(y)  # an address is free again once its tensor is gone

        def after_activation(module, args, y):
            assert args[0].data_ptr() not in from_norm, "two activations in a row"
            count.append(1)

        kept = []
        for module in model.modules():
            if isinstance(module, ACTIVATIONS):
                module.inplace = False
                module.register_forward_hook(after_activation)
            else:
                module.register_forward_hook(after_norm)

    ours, theirs, evos = [], [], [m for m in model.modules() if hasattr(m, "drop_activation")]
    watch(model, ours)
    watch(stock, theirs)
    with torch.no_grad():
        model(inputs(shape))
        stock(inputs(shape))
    assert evos
    contained = sum(m.contains_activation for m in evos)
    if "head" not in name:  # a head's layers run once for each level
        assert len(ours) + contained == len(theirs)


@activating
def test_resnet_has_the_names_of_the_stock_resnet(norm):
    cfg, _ = BACKBONES["r50"]
    ours, stock = (MODELS.build(cfg | dict(norm_cfg=n)) for n in (dict(type=norm), GN))
    abbr = ours.norm1_name.removesuffix("1")
    theirs = {k.replace("gn", abbr) for k in stock.state_dict()}
    assert theirs <= set(ours.state_dict())
    assert {k.rpartition(".")[2] for k in set(ours.state_dict()) - theirs} <= {"v", "tau", "running_var"}
    assert not any(k.endswith(".v") for k in ours.state_dict() if f"{abbr}3." in k or "downsample" in k)
    x = torch.randn(IMAGE)
    want = evaluating(ours)(x)
    twin = evaluating(MODELS.build(cfg | dict(norm_cfg=dict(type=norm))))
    twin.load_state_dict(ours.state_dict(), strict=True)
    for y, w in zip(twin(x), want, strict=True):
        torch.testing.assert_close(y, w, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["r50", "3d-r18", "box-head", "fpn"])
def test_adapting_again_changes_nothing_and_copies_are_adapted(name):
    cfg, shape = BACKBONES[name]
    model = evaluating(shake(MODELS.build(cfg | dict(norm_cfg=GN_RELU))))
    x, text = inputs(shape), repr(model)
    want = flat(model(x))
    assert adapt(nn.Sequential(model))[0] is model
    for twin in (adapt(model), copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert repr(twin) == text
        assert isinstance(adapt(twin), type(model))
        assert repr(twin) == text
        for got, w in zip(flat(twin(x)), want, strict=True):
            torch.testing.assert_close(got, w, rtol=0, atol=0)
    if name == "r50":
        from mmdet.models.backbones.resnet import Bottleneck, ResNet

        assert isinstance(model.layer1[0], Bottleneck)
        assert isinstance(model, ResNet)


def test_models_without_our_layers_are_not_touched():
    for name in ("r50", "3d-r18", "fpn"):
        model = MODELS.build(BACKBONES[name][0] | dict(norm_cfg=dict(type="BN3d" if "3d" in name else "BN")))
        assert not any(type(m).__module__.startswith("normplug") for m in model.modules())


def stock_block(forward):
    """A toolkit's block with this forward: conv1, norm1, conv2 and norm2 of 8 channels, and one relu."""
    from mmdet.models.backbones.resnet import BasicBlock

    return type("Block", (BasicBlock,), dict(forward=forward, __module__="mmdet.models.backbones.mine"))(
        8, 8, norm_cfg=GN_RELU
    )


REFUSED = {
    "the values decide": lambda self, x: self.relu(self.norm1(x)) if x.sum() > 0 else x,
    "its forward cannot be watched": lambda self, x: self.relu(self.norm1(x)) if x.shape[2] > 4 else self.norm1(x),
    "was not seen to call it": lambda self, x: self.relu(self.norm1(self.conv1(x))),
    "in one place and none in another": lambda self, x: self.relu(self.norm2(self.norm1(x))) + self.norm2(x),
    "in the midst": lambda self, x: self.norm2(self.conv2(self.relu(self.relu(self.norm1(x)) + x))) + x,
    "calls relu behind it": lambda self, x: nn.functional.relu(self.norm1(x)) + self.norm2(x),
}


@pytest.mark.parametrize("why", REFUSED)
def test_where_it_cannot_be_seen_what_follows_a_norm_it_is_refused(why):
    block = stock_block(REFUSED[why])
    text = repr(block)
    expected = "its forward cannot be watched" if why == "the values decide" else why
    with pytest.raises(ValueError, match=rf"GNReLU contains its activation.*Block.*{expected}.*places_activations"):
        adapt(block)
    assert repr(block) == text


SEEN = {
    "sum": lambda self, x: self.relu(self.norm2(self.conv2(self.relu(self.norm1(x)))) + x),
    "before": lambda self, x: self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))),
    "behind an identity": lambda self, x: self.relu(self.identity(self.norm2(self.relu(self.norm1(x))))),
    "none": lambda self, x: self.norm2(self.conv2(self.norm1(x))) * 2,
    "twice": lambda self, x: self.relu(self.norm1(self.relu(self.norm1(x)))) + self.norm2(x),
    "all sizes": lambda self, x: self.relu(self.norm2(self.norm1(x).reshape(*x.shape))),
    "sizes": lambda self, x: self.relu(self.norm2(self.norm1(x).reshape(x.shape[0], 8, *x.shape[2:]))),
}


@pytest.mark.parametrize("forward", SEEN)
def test_every_way_to_activate_behind_a_norm_is_the_same_network(forward):
    ours = stock_block(SEEN[forward])
    ours.identity = nn.Identity()
    stock = copy.deepcopy(shake(ours))
    for norm in (stock.norm1, stock.norm2):
        norm.act, norm.contains_activation = None, False
    adapt(ours)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    for got, want in zip(run(ours, x), run(stock, x), strict=True):
        torch.testing.assert_close(got, want)
    text = repr(ours)
    assert repr(adapt(ours)) == text


def test_watching_leaves_no_trace():
    from mmdet.models.backbones.resnet import BasicBlock

    class Counts(BasicBlock):
        def forward(self, x):
            self.last, self.calls = x, self.calls + 1
            return self.relu(self.norm1(x)) + self.norm2(x)

    block = Counts(8, 8, norm_cfg=GN_RELU)
    block.register_buffer("calls", torch.zeros(()))
    adapt(block)
    assert block.calls == 0
    assert not hasattr(block, "last")
    assert isinstance(block.relu, ActivationInNorm)


def test_a_class_may_place_activations_itself(monkeypatch):
    from mmdet.models.backbones.res2net import Bottle2neck

    monkeypatch.setattr(Bottle2neck, "places_activations", True, raising=False)
    model = MODELS.build(
        dict(type="mmdet.Res2Net", depth=50, base_channels=16, norm_cfg=dict(type="GNReLU", num_groups=1))
    )
    assert model.layer1[0].norm1.act == "relu"
    assert model.layer1[0].downsample[-1].act == "relu"
    assert isinstance(model.stem[2], ActivationInNorm)


def test_a_users_own_class_is_left_as_it_is():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = MODELS.build(dict(type="GN", num_channels=8, num_groups=2, act="relu"))
            self.steps = nn.Sequential(nn.Conv2d(8, 8, 1), copy.deepcopy(self.norm), nn.Conv2d(8, 8, 1))

    net = adapt(Net())
    assert net.norm.act == net.steps[1].act == "relu"


def conv_module(**kwargs):
    return dict(type="ConvModule", in_channels=8, out_channels=8, kernel_size=1, norm_cfg=GN_RELU) | kwargs


def test_conv_module_shows_who_activates():
    module = MODELS.build(conv_module())
    assert isinstance(module.activate, ActivationInNorm)
    assert "ActivationInNorm" in repr(module)
    assert module.norm.act == "relu"
    assert MODELS.build(conv_module(act_cfg=None)).norm.act is None
    pre = MODELS.build(conv_module(order=("norm", "act", "conv")))  # a pre-activation block: the same place
    assert isinstance(pre.activate, ActivationInNorm)


def test_a_gate_is_no_activation_to_replace():
    module = MODELS.build(conv_module(act_cfg=dict(type="Sigmoid")))
    assert isinstance(module.activate, nn.Sigmoid)
    assert module.norm.act is None


def test_conv_module_with_the_activation_elsewhere_is_refused():
    with pytest.raises(ValueError, match=r"order=\('act', 'conv', 'norm'\).*does not follow the norm"):
        MODELS.build(conv_module(order=("act", "conv", "norm")))


# --- ConvWS


@pytest.mark.filterwarnings("ignore:.*use_reentrant")
def test_all_weights_of_a_detector_are_standardized_at_once(monkeypatch):
    """Once for the detector, and not again for its backbone, neck and head, which have been built before it."""
    ws = dict(conv_cfg=dict(type="ConvWS"), norm_cfg=GN)
    model = MODELS.build(
        dict(
            type="mmdet.RetinaNet",
            backbone=dict(type="mmdet.ResNet", depth=18, with_cp=True, **TWO_STAGES, **ws),
            neck=dict(type="mmdet.FPN", in_channels=[8, 16], out_channels=16, num_outs=5, **ws),
            bbox_head=dict(type="mmdet.RetinaHead", num_classes=3, in_channels=16, feat_channels=16, **ws),
        )
    )
    alone = standardize_together(copy.deepcopy(model), devices=())
    launches, op = [], importlib.import_module("normplug.ops.weight_standardize")
    standardize = op._standardize
    monkeypatch.setattr(op, "_standardize", lambda w, *options: launches.append(len(w)) or standardize(w, *options))
    x = inputs(IMAGE)
    want = run(alone, x)
    count = sum(isinstance(module, WSConv2d) for module in model.modules())
    assert count == 22
    standardize_together(model, ("cpu", "cuda"))
    launches.clear()
    got = run(model, x)
    assert launches[0] == count
    assert set(launches[1:]) == {1}  # the blocks, which run again in backward
    assert len(launches) == 1 + sum(isinstance(module, WSConv2d) for module in model.backbone.modules()) - 1
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if i < 10:
            assert torch.equal(g, w)
        else:  # the head runs five times: its gradients are added in another place
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    launches.clear()
    model.backbone(x)
    assert launches == [count - 4 - 8]
    plain = MODELS.build(dict(type="mmdet.FPN", in_channels=[8, 16], out_channels=16, num_outs=5, norm_cfg=GN))
    assert not plain._forward_pre_hooks


# --- the registries


def test_every_registry_adapts_once():
    install()
    child = Registry("model", parent=MODELS, scope="made_later")
    for registry in (MODELS, child, *MODELS.children.values()):
        layers, build = [], registry.build_func
        while hasattr(build, "__wrapped__"):
            layers.append(build.__code__.co_name)
            build = build.__wrapped__
        assert layers == ["build_and_advise", "build_and_replace", "build_and_adapt"]
    MODELS.children.pop("made_later")


def test_registries_made_before_normplug_came_adapt_too(monkeypatch):
    root = Registry("model", scope="root_of_a_toolkit")
    grandchild = Registry("model", parent=Registry("model", parent=root, scope="child"), scope="grandchild")
    monkeypatch.setattr("normplug.openmmlab.adapt.MODELS", root)
    assert not hasattr(grandchild.build_func, "adapts")
    install()
    assert grandchild.build_func.adapts


def test_lists_and_other_results_pass_through():
    sequence = MODELS.build([conv_module(), conv_module(act_cfg=None)])
    assert isinstance(sequence[0].activate, ActivationInNorm)
    MODELS.register_module(name="a_dict", module=lambda: {"no": "module"})
    try:
        assert MODELS.build(dict(type="a_dict")) == {"no": "module"}
    finally:
        MODELS.module_dict.pop("a_dict")


@pytest.mark.parametrize("key", ["norm_cfg", "conv_cfg"])
def test_an_unknown_layer_is_called_by_its_name(key):
    backbone = dict(type="mmdet.ResNet", depth=18) | {key: dict(type="SN2")}
    with pytest.raises(KeyError, match=rf"{key}=dict\(type='SN2'\).*custom_imports.*GN"):
        MODELS.build([dict(type="ConvModule", in_channels=3, out_channels=3, kernel_size=1), backbone])


def test_a_missing_package_is_named(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "mmrotate" else find(name, *a))
    with pytest.raises(KeyError, match=r"mmrotate, which is not installed.*pip install mmrotate"):
        MODELS.build(dict(type="mmrotate.OrientedResNet"))


# --- 2-D checkpoints in 3-D networks


FLAT = dict(
    conv1_kernel=(1, 7, 7),
    conv1_stride_t=1,
    pool1_stride_t=1,
    inflate=(0, 0, 0, 0),
    with_pool2=False,
    zero_init_residual=False,
    base_channels=8,
)


def save(state, folder):
    path = folder / "checkpoint.pth"
    torch.save(state, path)
    return str(path)


def image_network(depth=18, **kwargs):
    cfg = dict(type="mmdet.ResNet", depth=depth, base_channels=8, out_indices=(3,))
    return evaluating(shake(MODELS.build(cfg | kwargs)))


def clip_network(pretrained, depth=18, **kwargs):
    model = MODELS.build(dict(type="mmaction.ResNet3d", depth=depth, pretrained=pretrained) | FLAT | kwargs)
    model.init_weights()
    return evaluating(model)


RECIPES = {
    "GN": (dict(norm_cfg=GN), dict(norm_cfg=GN)),
    "SyncBN": (dict(norm_cfg=dict(type="BN")), dict(norm_cfg=dict(type="SyncBN"))),
    "GN+WS": (
        dict(norm_cfg=GN, conv_cfg=dict(type="ConvWS")),
        dict(norm_cfg=GN, conv_cfg=dict(type="ConvWS3d")),
    ),
}


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("recipe", RECIPES)
def test_inflated_network_sees_in_every_frame_what_the_image_network_saw(recipe, depth, tmp_path):
    flat_cfg, video_cfg = RECIPES[recipe]
    image = image_network(depth, **flat_cfg)
    for name, buffer in image.named_buffers():
        if name.endswith(("mean", "var")):
            nn.init.uniform_(buffer, 0.5, 2.0)
    clip = clip_network(save(image.state_dict(), tmp_path), depth, **video_cfg)
    x = torch.randn(2, 3, 32, 32)
    want = image(x)[0].unsqueeze(2).expand(-1, -1, 3, -1, -1)
    got = clip(x.unsqueeze(2).repeat(1, 1, 3, 1, 1))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_checkpoint_names_are_torchvisions():
    import torchvision

    with torch.device("meta"):
        theirs = {k for k in torchvision.models.resnet50().state_dict() if not k.startswith("fc.")}
    assert set(image_network(50, norm_cfg=dict(type="BN")).state_dict()) == theirs


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_temporal_kernels_add_up_to_the_image_kernel_and_the_report_is_complete(norm, tmp_path):
    image = image_network(50, norm_cfg=dict(type="BN") if norm == "BN" else GN)
    state = image.state_dict() | {"fc.weight": torch.zeros(5, 64), "fc.bias": torch.zeros(5)}
    cfg = dict(conv1_kernel=(5, 7, 7), inflate=(1, 1, 1, 1), base_channels=8, zero_init_residual=False)
    video_norm = dict(type="SyncBN") if norm == "BN" else GN
    model = MODELS.build(
        dict(
            type="mmaction.ResNet3d",
            depth=50,
            pretrained=save({"state_dict": state}, tmp_path),
            norm_cfg=video_norm,
            **cfg,
        )
    )
    loaded = model.inflate_weights(MMLogger.get_current_instance())
    assert set(loaded) == set(model.state_dict())
    assert set(state) - set(loaded.values()) == {"fc.weight", "fc.bias"}
    for new, tensor in model.state_dict().items():
        old = state[loaded[new]]
        torch.testing.assert_close(tensor.sum(2) if old.ndim == 4 else tensor, old)
    assert loaded["conv1.conv.weight"] == "conv1.weight"
    name = "bn" if norm == "BN" else "gn"
    assert loaded[f"layer2.0.conv3.{name}.bias"] == f"layer2.0.{name}3.bias"
    assert loaded[f"layer2.0.downsample.{name}.bias"] == "layer2.0.downsample.1.bias"


@activating
@pytest.mark.parametrize("source", ["BN", "GN"])
def test_a_norm_that_activates_starts_from_another_norms_weight_and_bias(norm, source, tmp_path):
    image = image_network(50, norm_cfg=dict(type="BN") if source == "BN" else GN)
    old = image.state_dict()
    model = clip_network(save(old, tmp_path), 50, norm_cfg=dict(type=norm))
    own = source.lower()
    block = model.layer3[0]
    for layer, name in (
        (block.conv1.norm, f"{own}1"),
        (block.conv3.norm, f"{own}3"),
        (block.downsample.norm, "downsample.1"),
    ):
        torch.testing.assert_close(layer.weight, old[f"layer3.0.{name}.weight"])
        torch.testing.assert_close(layer.bias, old[f"layer3.0.{name}.bias"])
    assert (block.conv1.norm.tau == 0 if norm == "FRN" else block.conv1.norm.v == 1).all()
    if norm == "EvoNormB0" and source == "BN":
        torch.testing.assert_close(block.conv1.norm.running_var, old["layer3.0.bn1.running_var"])


def test_a_backbone_parameter_without_a_source_is_an_error(tmp_path):
    state = image_network(18, norm_cfg=GN).state_dict()
    del state["layer2.0.gn1.weight"], state["layer1.0.conv2.weight"]
    with pytest.raises(ValueError, match=r"3 of its parameters(.|\n)*layer1\.0\.conv2\.weight is missing") as error:
        clip_network(save(state, tmp_path), norm_cfg=GN)
    assert "layer2.0.conv1.gn.weight (16,)" in str(error.value)
    with pytest.raises(ValueError, match=r"has shape \(8, 3, 7, 7\)"):
        clip_network(save(image_network(18, norm_cfg=GN).state_dict(), tmp_path), norm_cfg=GN, base_channels=16)


def test_detectrons_network_for_bgr_gives_the_same_for_rgb(tmp_path):
    bgr = image_network(norm_cfg=GN)
    path = save(bgr.state_dict(), tmp_path)
    rgb = image_network(norm_cfg=GN, init_cfg=dict(type="Pretrained", checkpoint=f"detectron-as-rgb://{path}"))
    rgb.init_weights()
    pixels = torch.randint(0, 256, (2, 3, 40, 48)).float()  # RGB, as a decoder gives them
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    centred = pixels - mean.view(3, 1, 1)
    want = bgr(centred.flip(1))[0]
    torch.testing.assert_close(rgb(centred / std.view(3, 1, 1))[0], want, rtol=1e-4, atol=1e-4)
    clip = clip_network(f"detectron-as-rgb://{path}", norm_cfg=GN)
    got = clip((centred / std.view(3, 1, 1)).unsqueeze(2).repeat(1, 1, 2, 1, 1))
    torch.testing.assert_close(got[:, :, 1], want, rtol=1e-3, atol=1e-3)


def test_only_an_image_network_can_be_made_rgb(tmp_path):
    path = save({"conv1.weight": torch.zeros(4, 1, 3, 3)}, tmp_path)
    with pytest.raises(ValueError, match="0 convolutions with 3 input channels"):
        clip_network(f"detectron-as-rgb://{path}", norm_cfg=GN)


def test_a_lateral_connection_adds_nothing_to_an_inflated_pathway(tmp_path):
    """SlowFast's slow pathway has more input channels than any 2-D network; those of the fast one start at zero."""
    state = image_network(50, norm_cfg=GN).state_dict()
    pathway = dict(type="resnet3d", depth=50, base_channels=8, norm_cfg=GN, conv1_kernel=(1, 7, 7), channel_ratio=2)
    model = MODELS.build(
        dict(
            type="mmaction.ResNet3dSlowFast",
            pretrained=None,
            channel_ratio=2,
            slow_pathway=pathway | dict(pretrained=save(state, tmp_path), lateral=True, inflate=(0, 0, 1, 1)),
            fast_pathway=pathway | dict(pretrained=None, lateral=False, base_channels=4),
        )
    )
    model.init_weights()
    weight, old = model.slow_path.layer2[0].conv1.conv.weight, state["layer2.0.conv1.weight"]
    assert weight.shape[1] > old.shape[1]
    torch.testing.assert_close(weight[:, : old.shape[1]].sum(2), old)
    assert (weight[:, old.shape[1] :] == 0).all()
    torch.testing.assert_close(model.slow_path.layer2[0].conv1.norm.weight, state["layer2.0.gn1.weight"])


@pytest.mark.parametrize("depth", [18, 50])
def test_zero_init_residual_and_init_of_every_norm_in_3d(depth):
    model = MODELS.build(dict(type="mmaction.ResNet3d", depth=depth, pretrained=None, base_channels=8, norm_cfg=GN))
    model.init_weights()
    shake(model).init_weights()
    last = "conv2" if depth == 18 else "conv3"
    for name, module in model.named_modules():
        if hasattr(module, "norm_name"):
            assert (module.norm.weight == (0 if name.endswith(last) else 1)).all(), name
            assert (module.norm.bias == 0).all()
