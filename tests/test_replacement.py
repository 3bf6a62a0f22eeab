"""One line that gives any model another norm: what it reaches, what the old weights become, what it says."""

import copy
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from stock_configs import stock
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normplug import layers, replace_norm
from normplug.openmmlab.checkpoints import CheckpointNormHook
from normplug.openmmlab.cli import parse_norm
from normplug.openmmlab.precise_bn import estimate_statistics

for toolkit in ("mmdet", "mmaction", "mmseg", "mmpretrain"):
    pytest.importorskip(f"{toolkit}.models")
torchvision = pytest.importorskip("torchvision")

pytestmark = [  # mmseg's own
    pytest.mark.filterwarnings("ignore:``build_loss`` would be deprecated"),
    pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore`` is False"),
]
GN = dict(type="GN", num_groups="auto")
RESNET = dict(type="mmdet.ResNet", depth=18, base_channels=16, stem_channels=16, norm_eval=False)
VIDEO = dict(type="mmaction.ResNet3d", depth=18, base_channels=16, pretrained=None, norm_eval=False)


def build(cfg, scope=None):
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(cfg)


def randomize(model):
    """Norms as after a training: no weight, bias or statistic at its initial value."""
    for m in model.modules():
        if isinstance(m, _BatchNorm):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.2, 0.3)
            nn.init.normal_(m.running_mean, 0, 2)
            nn.init.uniform_(m.running_var, 0.2, 4)
    return model


def norms_in(model, kind=(nn.modules.batchnorm._NormBase, nn.GroupNorm)):
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


@pytest.fixture
def log(caplog):
    """The lines for the log; tests before may have left a Runner's logger, which takes them otherwise."""
    caplog.set_level(logging.INFO)
    logging.getLogger("mmengine").propagate = True
    from mmengine.logging import MMLogger

    for logger in MMLogger._instance_dict.values():
        logger.addHandler(caplog.handler)
    yield lambda: [message for message in caplog.messages if message.startswith("normplug: ")]
    for logger in MMLogger._instance_dict.values():
        logger.removeHandler(caplog.handler)


STOCK = {
    "mmdet": ["retinanet/retinanet_r50_fpn_1x_coco", "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco"],
    "mmaction": [
        "recognition/tsn/tsn_imagenet-pretrained-r50_8xb32-1x1x3-100e_kinetics400-rgb",
        "recognition/r2plus1d/r2plus1d_r34_8xb8-8x8x1-180e_kinetics400-rgb",
    ],
    "mmseg": ["pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024"],
    "mmpretrain": ["resnet/resnet50_8xb32_in1k", "mobilenet_v2/mobilenet-v2_8xb32_in1k"],
}
STOCK["mmdet"] += ["cornernet/cornernet_hourglass104_10xb5-crop511-210e-mstest_coco"]


@pytest.mark.slow
@pytest.mark.parametrize(("toolkit", "path"), [(t, p) for t, paths in STOCK.items() for p in paths])
def test_one_line_reaches_every_norm_of_a_stock_config(toolkit, path, log):
    """Stray ones too: those of R(2+1)D's Conv2plus1d and of Hourglass know no norm_cfg."""
    cfg = stock(toolkit, path)
    before = len(norms_in(build(cfg.model, cfg.default_scope)))
    cfg.merge_from_dict(dict(model=dict(replace_norm=dict(type="GN", num_groups="auto"))))
    model = build(cfg.model, cfg.default_scope)
    norms = norms_in(model)
    assert len(norms) == before > 20
    assert {type(m) for m in norms.values()} == {layers.GroupNorm}
    assert "replace_norm" in cfg.model, "the config is not ours to change: it is written to the work dir"
    assert "became dict(type='GN', num_groups='auto')" in log()[-1]


def test_the_result_is_the_model_that_norm_cfg_builds():
    ours = build(dict(RESNET, replace_norm=dict(type="GN", num_groups=16)))
    theirs = build(dict(RESNET, norm_cfg=dict(type="GN", num_groups=16)))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    for ours_y, theirs_y in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(ours_y, theirs_y, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["EvoNormS0", "EvoNormB0", "FRN"])
def test_activations_are_put_right_for_layers_that_contain_theirs(kind):
    ours, theirs = build(dict(RESNET, replace_norm=dict(type=kind))), build(dict(RESNET, norm_cfg=dict(type=kind)))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [type(m).__name__ for m in ours.modules()][1:] == [type(m).__name__ for m in theirs.modules()][1:]


# --- the weights


def expected_gn(bn, groups):
    """Weight and bias with which GN does what BN does if each sample has the population's moments, in float64."""
    mean, var, weight, bias = (
        t.detach().double().view(groups, -1) for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    group_mean = mean.mean(1, keepdim=True)
    group_std = ((var + mean.square()).mean(1, keepdim=True) - group_mean.square() + bn.eps).sqrt()
    slope = weight / (var + bn.eps).sqrt()
    return (slope * group_std).flatten(), (bias + slope * (group_mean - mean)).flatten()


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_gn_is_fitted_to_the_running_statistics(dimensions):
    bn = randomize([nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dimensions - 1](48))
    model = replace_norm(nn.Sequential(nn.Identity(), copy.deepcopy(bn)), dict(type="GN", num_groups=8))
    weight, bias = expected_gn(bn, 8)
    torch.testing.assert_close(model[1].weight.double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].bias.double(), bias, rtol=1e-5, atol=1e-5)


def test_frn_is_fitted_to_the_running_statistics_and_its_threshold_is_the_relu():
    model = build(dict(type="ConvModule", in_channels=3, out_channels=8, kernel_size=3, norm_cfg=dict(type="BN")))
    bn = randomize(model).norm
    replace_norm(model, dict(type="FRN", eps=1e-6))
    mean, var = bn.running_mean.double(), bn.running_var.double()
    slope = bn.weight.double() / (var + bn.eps).sqrt()
    torch.testing.assert_close(model.norm.weight.double(), slope * (var + mean**2 + 1e-6).sqrt(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.norm.bias.double(), bn.bias.double() - slope * mean, rtol=1e-5, atol=1e-5)
    assert not model.norm.tau.any()


@pytest.mark.parametrize(("kind", "limit"), [("GN", 0.6), ("EvoNormS0", 0.9), ("FRN", 0.6)])
def test_a_fitted_model_starts_closer_to_the_old_one_than_with_weights_copied(kind, limit):
    """A ResNet-18 with random weights, and statistics that are those of its data."""
    torch.manual_seed(1)
    model, x = build(RESNET), torch.randn(4, 3, 96, 96) + 0.2 * torch.randn(4, 3, 1, 1)
    for m in norms_in(model).values():
        nn.init.uniform_(m.weight, 0.5, 1.5)
        nn.init.normal_(m.bias, 0.2, 0.3)
    model.train()
    estimate_statistics(model, [x])
    model.eval()
    norm_cfg = dict(type=kind) | (dict(num_groups=8) if kind == "GN" else {})
    fitted, copied = build(dict(RESNET, replace_norm=norm_cfg)), build(dict(RESNET, norm_cfg=norm_cfg))
    fitted.load_state_dict(model.state_dict())
    renamed = {key: model.state_dict().get(key.replace("gn", "bn").replace("frn", "bn")) for key in copied.state_dict()}
    copied.load_state_dict({key: value for key, value in renamed.items() if value is not None}, strict=False)

    def error(other):
        other.eval()
        with torch.no_grad():
            return ((other(x)[-1] - model(x)[-1]).norm() / model(x)[-1].norm()).item()

    assert error(fitted) < limit * error(copied), (error(fitted), error(copied))


def files_of(model, tmp_path, name="resnet18.pth"):
    torch.save(dict(state_dict=model.state_dict()), tmp_path / name)
    return str(tmp_path / name)


WAYS = {  # how toolkits load the weights of a backbone
    "mmdet's init_cfg": lambda file: dict(RESNET, init_cfg=dict(type="Pretrained", checkpoint=file)),
    "mmseg's init_cfg": lambda file: dict(
        RESNET, type="mmseg.ResNet", init_cfg=dict(type="Pretrained", checkpoint=file)
    ),
    "mmaction's pretrained": lambda file: dict(type="mmaction.ResNet", depth=18, pretrained=file, norm_eval=False),
    "mmaction's inflation": lambda file: dict(VIDEO, base_channels=64, pretrained=file, pretrained2d=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_bn_checkpoint_goes_over_in_whatever_way_a_toolkit_loads_it(way, tmp_path, log):
    torch.manual_seed(0)
    narrow = way.endswith("init_cfg")
    source = randomize(build(RESNET) if narrow else torchvision.models.resnet18(weights=None))
    file = files_of(source, tmp_path) if narrow else str(tmp_path / "resnet18.pth")
    if not narrow:
        torch.save(source.state_dict(), file)
    cfg = WAYS[way](file)
    ours, theirs = build(dict(cfg, replace_norm=dict(type="GN", num_groups=8))), build(cfg)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1)  # mmengine builds it before it initializes
    theirs.init_weights()
    ours.init_weights()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in ours.parameters()}
    assert any("20 fitted to the running statistics" in line for line in log())

    bns = norms_in(theirs, _BatchNorm)
    gns = norms_in(ours, layers.GroupNorm)
    assert len(gns) == len(bns) == 20
    for gn, bn in zip(gns.values(), bns.values(), strict=True):
        weight, bias = expected_gn(bn, 8)
        torch.testing.assert_close(gn.weight.double(), weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gn.bias.double(), bias, rtol=1e-5, atol=2e-5)
    convs = (nn.Conv2d, nn.Conv3d)
    for a, b in zip(norms_in(ours, convs).values(), norms_in(theirs, convs).values(), strict=True):
        torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=0)
    norm = next(iter(gns.values()))
    norm.weight.data.fill_(7)
    if ours.is_init:
        ours.init_weights()  # a second call is a warning in mmengine, and changes nothing here either
        assert (norm.weight == 7).all()


@pytest.mark.parametrize("kind", ["SyncBN", "CBN", "FrozenBatchNorm"])
def test_batch_norms_of_other_kinds_keep_what_was_loaded(kind, tmp_path, log):
    cfg = dict(RESNET, init_cfg=dict(type="Pretrained", checkpoint=files_of(randomize(build(RESNET)), tmp_path)))
    ours, theirs = build(dict(cfg, replace_norm=dict(type=kind))), build(cfg)
    ours.init_weights()
    theirs.init_weights()
    assert any("20 kept" in line for line in log())
    x = torch.randn(2, 3, 32, 32)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x)[-1], theirs(x)[-1])


def test_without_a_checkpoint_the_norms_start_as_the_toolkit_starts_them(log):
    """Zero in the last norm of a residual branch, as zero_init_residual of mmdet and of mmaction2 has it."""
    for cfg in (dict(RESNET, zero_init_residual=True), dict(VIDEO, zero_init_residual=True)):
        model = build(dict(cfg, replace_norm=GN))
        model.init_weights()
        zero = [name for name, m in norms_in(model, layers.GroupNorm).items() if not m.weight.any()]
        assert len(zero) == 8
        assert all("2" in name.rpartition(".")[2] or "conv2" in name for name in zero)
        assert "20 at their initial values" in log()[-1]


def test_a_model_inside_another_initializes_itself(tmp_path):
    """mmengine's bookkeeping of the outer init_weights meets parameters that it has not seen."""
    file = files_of(randomize(build(RESNET)), tmp_path)
    backbone = dict(RESNET, replace_norm=GN, init_cfg=dict(type="Pretrained", checkpoint=file))
    cfg = stock("mmdet", "retinanet/retinanet_r18_fpn_1x_coco")
    cfg.model.backbone = backbone
    cfg.model.neck.in_channels = [16, 32, 64, 128]
    model = build(cfg.model, "mmdet")
    model.init_weights()
    assert (model.backbone.gn1.weight != 1).all()


def test_a_checkpoint_of_the_old_network_loads_and_the_own_one_as_it_is(tmp_path, log):
    old = randomize(build(RESNET))
    model = build(dict(RESNET, replace_norm=GN))
    assert model.load_state_dict(old.state_dict()) == ([], [])  # strict
    torch.testing.assert_close(model.gn1.weight.double(), expected_gn(old.bn1, 16)[0], rtol=1e-5, atol=1e-6)
    assert log()[-1].endswith("weights of 20 GroupNorm for BatchNorm2d: 20 fitted to the running statistics")

    again = build(dict(RESNET, replace_norm=GN))
    load_checkpoint(again, files_of(old, tmp_path), strict=True)
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)

    nn.init.normal_(model.gn1.weight)
    own = build(dict(RESNET, replace_norm=GN))
    own.load_state_dict(model.state_dict())
    torch.testing.assert_close(own.gn1.weight, model.gn1.weight, rtol=0, atol=0)


def test_a_checkpoint_of_the_old_network_is_taken_as_weights_and_not_to_resume_from():
    model, old = build(dict(RESNET, replace_norm=GN)), randomize(build(RESNET))
    hook = CheckpointNormHook()
    hook.after_load_checkpoint(
        SimpleNamespace(model=model, _resume=False, _train_loop=None), dict(state_dict=old.state_dict())
    )
    with pytest.raises(ValueError, match="norms are not the model's"):
        hook.after_load_checkpoint(SimpleNamespace(model=model, _resume=True), dict(state_dict=old.state_dict()))


def test_a_checkpoint_of_another_width_is_the_loaders_to_refuse():
    model, other = build(dict(RESNET, replace_norm=GN)), build(dict(RESNET, base_channels=8, stem_channels=8))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(other.state_dict())


def test_copies_and_pickles_go_on_loading_old_checkpoints():
    model, old = build(dict(RESNET, replace_norm=GN)), randomize(build(RESNET)).state_dict()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.load_state_dict(old)
        twin.init_weights()
        assert list(twin.state_dict()) == list(model.state_dict())
        assert twin.gn1 is not model.gn1


# --- where


@pytest.mark.parametrize(
    ("where", "prefixes"),
    [
        ("backbone", {"backbone"}),
        ("head", {"roi_head"}),
        (["neck", "roi_head.mask_head"], {"neck", "roi_head.mask_head"}),
        ("backbone.layer[34]", {"backbone.layer3", "backbone.layer4"}),
        ("backbone.layer4.*.bn3", {"backbone.layer4"}),
        ("*.bn1", {"backbone"}),
    ],
)
def test_where_names_parts(where, prefixes):
    cfg = stock("mmdet", "mask_rcnn/mask-rcnn_r50_fpn_1x_coco")
    for part in (cfg.model.neck, cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head):
        part.norm_cfg = dict(type="BN")
    cfg.model.roi_head.bbox_head.update(type="Shared4Conv1FCBBoxHead", conv_out_channels=8)
    before = norms_in(build(cfg.model, "mmdet"))
    model = build(replace_norm(cfg.model, GN, where=where), "mmdet")
    replaced = norms_in(model, layers.GroupNorm)
    assert replaced
    assert all(any(name.startswith(f"{prefix}.") for prefix in prefixes) for name in replaced)
    if where in ("backbone", "head", ["neck", "roi_head.mask_head"], "backbone.layer[34]"):
        expected = [name for name in before if any(name.startswith(f"{prefix}.") for prefix in prefixes)]
        assert len(replaced) == len(expected)


def test_rules_for_different_places():
    cfg = dict(RESNET)
    replace_norm(cfg, dict(type="GN", num_groups=8), where="layer1")
    replace_norm(cfg, dict(type="SyncBN"), where="layer4")
    model = build(cfg)
    kinds = {name.partition(".")[0]: type(m).__name__ for name, m in norms_in(model).items()}
    assert kinds == {
        "bn1": "BatchNorm2d",
        "layer1": "GroupNorm",
        "layer2": "BatchNorm2d",
        "layer3": "BatchNorm2d",
        "layer4": "SyncBatchNorm",
    }
    model.load_state_dict(randomize(build(RESNET)).state_dict())


def test_a_shared_norm_stays_shared():
    bn = randomize(nn.BatchNorm2d(8))
    model = nn.ModuleDict(dict(a=nn.Sequential(nn.Conv2d(3, 8, 1), bn), b=nn.Sequential(nn.Conv2d(3, 8, 1), bn)))
    replace_norm(model, GN)
    assert model["a"][1] is model["b"][1]
    assert isinstance(model["a"][1], layers.GroupNorm)


def test_frozen_parameters_and_arguments_that_were_set_stay():
    cfg = dict(RESNET, frozen_stages=1, norm_cfg=dict(type="BN", eps=1e-3, momentum=0.03))
    model = build(dict(cfg, replace_norm=GN))
    assert not any(p.requires_grad for p in model.layer1.parameters())
    assert all(p.requires_grad for p in model.layer2.parameters())
    assert model.gn1.eps == 1e-3
    assert build(dict(cfg, replace_norm=dict(type="SyncBN"))).bn1.momentum == 0.03
    frozen = build(dict(RESNET, replace_norm=dict(type="GN", num_groups=8, requires_grad=False)))
    assert not any(m.weight.requires_grad for m in norms_in(frozen, layers.GroupNorm).values())


def test_norm_eval_does_not_freeze_the_statistics_that_were_asked_for(log):
    cfg = dict(RESNET, norm_eval=True)
    model = build(dict(cfg, replace_norm=dict(type="SyncBN")))
    model.train()
    assert all(m.training for m in norms_in(model).values())
    assert "norm_eval is off in the model" in log()[-1]
    assert build(dict(cfg, replace_norm=GN)).norm_eval
    assert build(dict(cfg, replace_norm=dict(type="FrozenBatchNorm"))).norm_eval
    with pytest.raises(ValueError, match="15 of them would stay"):
        build(dict(cfg, replace_norm=dict(type="SyncBN", where="layer4")))


def test_batch_and_instance_norm_have_the_dimensions_of_what_they_replace():
    for cfg, kind in ((RESNET, nn.BatchNorm2d), (VIDEO, nn.BatchNorm3d)):
        gn = dict(type="GN", num_groups=8)
        model = replace_norm(build(dict(cfg, replace_norm=gn)), dict(type="BN"))
        assert {type(m) for m in norms_in(model).values()} == {kind}
    model = build(dict(RESNET, replace_norm=dict(type="IN")))
    assert {type(m) for m in norms_in(model).values()} == {nn.InstanceNorm2d}
    assert "in1" in dict(model.named_modules()), "as mmcv calls it"


def test_token_norms_stay_and_are_told(log):
    cfg = stock("mmdet", "detr/detr_r50_8xb2-150e_coco")
    model = build(replace_norm(cfg, GN).model, "mmdet")
    assert not norms_in(model, _BatchNorm)
    assert norms_in(model, nn.LayerNorm)
    assert "53 BatchNorm2d became" in log()[-1]
    assert "LayerNorm" in log()[-1]


def test_what_is_there_already_is_not_replaced(log):
    model = build(dict(RESNET, norm_cfg=dict(type="GN", num_groups=16)))
    norm = model.gn1
    assert replace_norm(model, dict(type="GN", num_groups=16)).gn1 is norm
    assert "already" in log()[-1]


# --- what cannot be done


@pytest.mark.parametrize(
    ("norm_cfg", "where", "message"),
    [
        (dict(type="GN"), None, r"num_groups=32 does not divide the channels of 5 of 20 norms \(bn1: 16"),
        (dict(type="GN"), None, r"num_groups='auto'.*or channels_per_group=16, which divides all"),
        (dict(type="GN", channels_per_group=32), None, "channels_per_group=32 does not divide"),
        (dict(type="GN", num_group=8), None, "GN has no argument 'num_group'.*Did you mean 'num_groups'"),
        (dict(type="GN", num_groups="all"), None, "'auto'"),
        (dict(type="GroupNormm"), None, "no norm is registered as 'GroupNormm'"),
        (dict(type="LN"), None, r"dict\(type='GN', num_groups=1\)"),
        (dict(type="GN"), "roi_head", "in bn1, layer1, layer2"),
        ("GN", None, r"takes a norm_cfg such as dict\(type='GN'"),
    ],
)
def test_mistakes_are_told_before_anything_changes(norm_cfg, where, message):
    model = build(RESNET)
    before = list(model.named_modules())
    with pytest.raises(ValueError, match=message):
        replace_norm(model, norm_cfg, where)
    assert list(model.named_modules()) == before


def test_mistakes_in_a_config():
    with pytest.raises(ValueError, match="must be like dict"):
        build(dict(RESNET, replace_norm="GN"))
    with pytest.raises(ValueError, match="got one without"):
        replace_norm(Config(dict(lr=1)), GN)


def test_norms_of_a_class_of_your_own_keep_theirs():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x.abs())

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Odd(8), nn.BatchNorm2d(8))
    replace_norm(model, GN)
    assert type(model[1]) is Odd
    assert type(model[2]) is layers.GroupNorm
    with pytest.raises(ValueError, match="EvoNormS0 contains its activation"):
        replace_norm(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), dict(type="EvoNormS0"))


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (3, 3), (32, 32), (48, 24), (62, 31), (37, 1), (256, 32)])
def test_auto_is_the_largest_divisor_up_to_32(channels, groups):
    assert layers.GroupNorm(channels, "auto").num_groups == groups


# --- the tools' flag


def test_norm_flag():
    assert parse_norm(["GN"]) == dict(type="GN")
    words = ["GN", "num_groups=auto", "where=[backbone,head]", "eps=1e-3"]
    assert parse_norm(words) == dict(type="GN", num_groups="auto", where=["backbone", "head"], eps=1e-3)
    for words, message in ((["num_groups=32"], "begins with the name"), (["GN", "32"], "KEY=VALUE"), (["Gn"], "'Gn'")):
        with pytest.raises(ValueError, match=message):
            parse_norm(words)
