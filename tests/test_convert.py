"""Trained BN models turned into others: what the names become, and how close calibration brings them."""

import copy

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

import normplug
from normplug.openmmlab.convert import convert_norm
from normplug.openmmlab.precise_bn import estimate_statistics

pytest.importorskip("mmdet.models")
pytest.importorskip("mmaction.models")
torchvision = pytest.importorskip("torchvision")

BN = dict(type="BN")
MODELS_2D = {
    "resnet": dict(type="mmdet.ResNet", depth=18, base_channels=16, stem_channels=16, norm_eval=False),
    "bottleneck": dict(type="mmdet.ResNet", depth=50, base_channels=8, stem_channels=8, norm_eval=False),
    "video": dict(type="mmaction.ResNet3d", depth=18, base_channels=16, pretrained=None, norm_eval=False),
}


def build(name, norm_cfg=None):
    if name == "torchvision":
        return torchvision.models.resnet18(weights=None)
    norm_cfg = norm_cfg or dict(type="BN3d" if name == "video" else "BN")
    return MODELS.build(MODELS_2D[name] | dict(norm_cfg=norm_cfg))


def images(name, number=3, size=96):
    """Of one texture each, with some difference in colour: more than that no affine map of a GN's output can know."""
    shape = (2, 3, 4, size // 2, size // 2) if name == "video" else (4, 3, size, size)
    return [torch.randn(shape) + 0.2 * torch.randn(shape[0], 3, *[1] * (len(shape) - 2)) for _ in range(number)]


def trained(name, number=2, size=32):
    """A BN model with statistics that fit its weights, and weights that are not all one."""
    model, data = build(name), images(name, number, size)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.2, 0.3)
    model.train()
    estimate_statistics(model, data)
    model.eval()
    return model, data


def output(model, x):
    model.eval()
    with torch.no_grad():
        y = model(x)
    return y if isinstance(y, torch.Tensor) else y[-1]


def error(model, x, want):
    return ((output(model, x) - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name", ["resnet", "video", "torchvision"])
def test_calibrated_gn_starts_closer(name):
    model, data = trained(name, 3, 96)
    held_out = images(name, 1)[0]
    want = output(model, held_out)
    plain, fitted = copy.deepcopy(model), copy.deepcopy(model)
    assert convert_norm(plain, "BN", "GN", num_groups=8) is plain
    convert_norm(fitted, "BN", "GN", data, num_groups=8)
    before, after = error(plain, held_out, want), error(fitted, held_out, want)
    assert after < 0.5 * before
    assert not any(type(m) is nn.BatchNorm2d for m in fitted.modules())


@pytest.mark.parametrize("name", ["resnet", "bottleneck", "video"])
@pytest.mark.parametrize("kind", ["GN", "EvoNormS0", "EvoNormB0", "FRN", "FrozenBatchNorm", "SyncBN"])
def test_the_result_is_the_model_that_a_config_builds(name, kind):
    model, data = trained(name, 1, 48)
    groups = dict(num_groups=8) if kind == "GN" else {}
    convert_norm(model, "BN", kind, data, **groups)
    built = build(name, dict(type=kind, **groups))
    assert list(built.state_dict()) == list(model.state_dict())
    built.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(output(built, data[0]), output(model, data[0]))
    assert output(model, data[0]).isfinite().all()


@pytest.mark.parametrize("kind", ["BNAct", "SyncBN", "FrozenBatchNorm", "CBN"])
@pytest.mark.parametrize("name", ["resnet", "torchvision"])
def test_batch_norms_of_other_kinds_compute_the_same(name, kind):
    model, data = trained(name)
    want = output(model, data[0])
    convert_norm(model, "BN", kind, data)
    torch.testing.assert_close(output(model, data[0]), want)
    convert_norm(model, kind, "GN", data, num_groups=8)  # and are converted themselves
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


@pytest.mark.parametrize("kind", ["SyncBN", "FrozenBatchNorm", "BN"])
@pytest.mark.parametrize("name", ["resnet", "bottleneck"])
def test_an_activation_that_the_norms_chose_stays(name, kind):
    model = build(name, dict(type="BNAct", act="silu"))
    data = images(name, 2, 32)
    model.train()
    estimate_statistics(model, data)
    want = output(model, data[0])
    convert_norm(model, "BNAct", kind, data)
    torch.testing.assert_close(output(model, data[0]), want)


def test_an_activation_inside_a_norm_is_inherited_or_refused():
    norm = normplug.layers.BatchNormAct(6, act="silu")
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm).eval()
    x = torch.randn(1, 3, 12, 12)
    model.train()
    estimate_statistics(model, [x])
    want = output(model, x)
    with pytest.raises(ValueError, match=r"'silu' itself, and BatchNorm2d has none"):
        convert_norm(model, "BNAct", "BN")
    convert_norm(model, "BNAct", "GN", [x], channels_per_group=1)  # one sample: the same function
    assert model[1].act == "silu"
    torch.testing.assert_close(output(model, x), want, rtol=1e-4, atol=1e-4)


def test_identical_statistics_match_exactly():
    """A group per channel and one sample, whose own statistics are the running ones: the same function."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    for i in (1, 4):
        nn.init.uniform_(model[i].weight, -1.5, 1.5)
        nn.init.normal_(model[i].bias)
    x = torch.randn(1, 3, 12, 12)
    estimate_statistics(model, [x])
    want, weights = output(model, x), [model[i].weight.clone() for i in (1, 4)]
    biases = [model[i].bias.clone() for i in (1, 4)]
    convert_norm(model, "BN", "GN", [x], channels_per_group=1)
    torch.testing.assert_close(output(model, x), want, rtol=1e-5, atol=1e-5)
    for i, weight, bias in zip((1, 4), weights, biases, strict=True):
        torch.testing.assert_close(model[i].weight, weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model[i].bias, bias, rtol=1e-4, atol=1e-5)


def test_a_layer_is_the_least_squares_fit_over_batches_and_calls():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, xs):
            return [self.norm(x) for x in xs]

    model = Shared()
    nn.init.normal_(model.norm.running_mean)
    batches = [[torch.randn(2, 4, 6), 3 + torch.randn(1, 4, 2)], [torch.randn(5, 4, 3)]]
    old = copy.deepcopy(model.norm).eval()
    convert_norm(model, "BN", "GN", batches, num_groups=2)
    flat = [x for batch in batches for x in batch]
    bare = normplug.layers.GroupNorm(4, 2)
    with torch.no_grad():
        xs, ys = (torch.cat([f(x).transpose(0, 1).flatten(1) for x in flat], 1) for f in (bare, old))
        for c in range(4):
            design = torch.stack([xs[c], torch.ones_like(xs[c])], 1)
            slope, offset = torch.linalg.lstsq(design, ys[c, :, None]).solution.flatten()
            torch.testing.assert_close(model.norm.weight[c], slope, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model.norm.bias[c], offset, rtol=1e-4, atol=1e-5)


def test_frozen_parameters_modes_and_constant_channels_stay():
    model = build("resnet")
    model.frozen_stages = 1
    model.train()
    frozen = {name.replace("bn", "gn") for name, p in model.named_parameters() if not p.requires_grad}
    dead = model.layer2[0].conv1
    nn.init.zeros_(dead.weight)
    modes = {name.replace("bn", "gn"): m.training for name, m in model.named_modules()}
    nn.init.constant_(model.layer2[0].bn1.weight, 0.7)
    convert_norm(model, "BN", "GN", images("resnet", 1, 32), num_groups=8)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert (model.layer2[0].gn1.weight == 0.7).all()
    model(images("resnet", 1)[0])[-1].sum().backward()


class OfNobody(nn.Module):
    """A class of the user's, of which we do not know where it activates."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


def test_norms_with_an_activation_take_the_place_of_those_of_torchvision():
    model, data = trained("torchvision")
    convert_norm(model, "BN", "EvoNormS0", data)
    activates = {name: m.apply_act for name, m in model.named_modules() if hasattr(m, "apply_act")}
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert {name for name, does in activates.items() if does} == {"bn1", *(f"{block}.bn1" for block in blocks)}
    inputs = []  # of each, whether it has anything to do
    for block in blocks:  # a ReLU behind each sum, and none behind the norms
        assert not isinstance(model.get_submodule(block).relu, nn.ReLU)
        model.get_submodule(block).last_activation.register_forward_pre_hook(
            lambda _, args: inputs.append((args[0] < 0).any())
        )
    model(torch.randn(2, 3, 64, 64))
    assert len(inputs) == len(blocks)
    assert all(inputs)


def test_what_cannot_be_converted_is_told_before_anything_changes():
    model, data = trained("torchvision")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"conv1|bn1 has 64 channels"):
        convert_norm(model, "BN", "GN", data, num_groups=48)
    with pytest.raises(ValueError, match="contains its activation"):
        convert_norm(OfNobody(), "BN", "EvoNormS0", data)
    with pytest.raises(ValueError, match="no SyncBN"):
        convert_norm(model, "SyncBN", "GN", data)
    with pytest.raises(ValueError, match="used up"):
        convert_norm(model, "BN", "GN", iter(data))
    with pytest.raises(ValueError, match="registered"):
        convert_norm(model, "BN", "NoSuchNorm", data)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="running statistics"):
        convert_norm(nn.Sequential(normplug.layers.GroupNorm(4, 2)), "GN", "FrozenBatchNorm")


@pytest.mark.slow
def test_a_whole_detector_is_converted_and_still_detects():
    """Neck and heads too: heads of the boxes that the model itself proposes, and named as the config names them."""
    from pathlib import Path

    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.structures import InstanceData

    path = Path(__file__).parent.parent / "configs/_base_/models/mask-rcnn_r18_fpn_digits.py"
    cfg = Config.fromfile(path).model

    def detector(norm_cfg):
        for part in (cfg.backbone, cfg.neck, cfg.roi_head.bbox_head, cfg.roi_head.mask_head):
            part.norm_cfg = norm_cfg
        return MODELS.build(cfg | dict(_scope_="mmdet"))

    model = detector(BN)
    sample = DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1.0, 1.0)))
    batches = [dict(inputs=[torch.randint(0, 255, (3, 64, 64))], data_samples=[sample.clone()]) for _ in range(2)]
    convert_norm(model, "BN", "GN", batches, num_groups=8)
    built = detector(dict(type="GN", num_groups=8))
    built.load_state_dict(model.state_dict(), strict=True)
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == sum(isinstance(m, nn.GroupNorm) for m in built.modules())
    assert any((m.weight != 1).any() for m in model.roi_head.bbox_head.modules() if isinstance(m, nn.GroupNorm))
    assert isinstance(model.test_step(batches[0])[0].pred_instances, InstanceData)
