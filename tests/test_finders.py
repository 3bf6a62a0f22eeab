"""What looks for batch norms by class finds ours as it finds stock ones; what goes by position is not led astray."""

import copy
import importlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import EMAHook, SyncBuffersHook
from mmengine.model import ExponentialMovingAverage, StochasticWeightAverage
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.utils.dl_utils import has_batch_norm
from torch import nn
from torch.optim import swa_utils

from normplug import layers
from normplug.layers import BatchNormAct, CrossIterationBatchNorm, EvoNormB0, FrozenBatchNorm, SyncBatchNorm
from normplug.openmmlab.finders import as_batch_norms
from normplug.openmmlab.replacement import replace_norm

C = 6
NORMS = {name: dict(type=name) for name in ("BNAct", "CBN", "SyncBN", "EvoNormB0")}
each_norm = pytest.mark.parametrize("norm", NORMS)
pytestmark = pytest.mark.filterwarnings("ignore::ImportWarning", "ignore::SyntaxWarning", "ignore:.*use_reentrant")


def toolkit(name):
    return pytest.importorskip(name)


def ours(model):
    return {name: m for name, m in model.named_modules() if type(m).__module__.startswith("normplug.layers.")}


# --- train() of the toolkits


FREEZING = {
    "partial_bn": ("mmaction", dict(type="ResNet", depth=18, partial_bn=True)),
    "partial_bn-frozen_stages": ("mmaction", dict(type="ResNet", depth=18, partial_bn=True, frozen_stages=1)),
    "partial_bn-TSM": ("mmaction", dict(type="ResNetTSM", depth=18, partial_bn=True, num_segments=2)),
    "partial_bn-TIN": ("mmaction", dict(type="ResNetTIN", depth=50, partial_bn=True, num_segments=8, shift_div=4)),
    "norm_eval": ("mmaction", dict(type="ResNet", depth=18, norm_eval=True)),
    "norm_eval-CSN": ("mmaction", dict(type="ResNet3dCSN", depth=50, base_channels=8, pretrained=None, norm_eval=True)),
    "bn_frozen-CSN": (
        "mmaction",
        dict(type="ResNet3dCSN", depth=50, base_channels=8, pretrained=None, norm_eval=True, bn_frozen=True),
    ),
    "norm_eval-EfficientNet": ("mmdet", dict(type="EfficientNet", arch="b0", norm_eval=True)),
    "shared head": ("mmdet", dict(type="ResLayer", depth=50, stage=1, norm_eval=True)),
    "norm_eval-mmpretrain": ("mmpretrain", dict(type="EfficientNet", arch="b0", norm_eval=True)),
    "norm_eval-V2": ("mmpretrain", dict(type="ShuffleNetV2", widen_factor=0.5, norm_eval=True)),
    "norm_eval-mmseg": ("mmseg", dict(type="MobileNetV2", widen_factor=0.25, norm_eval=True)),
    "nothing": ("mmaction", dict(type="ResNet", depth=18)),
}


def state_of(model, norms):
    """Modes of the norms, and which of their parameters that every batch norm has are trained."""
    modes = {name: model.get_submodule(name).training for name in norms}
    trained = {name: p.requires_grad for name, p in model.named_parameters() if not name.endswith(".v")}
    return modes, trained


@pytest.mark.parametrize("case", FREEZING)
@each_norm
def test_a_backbone_in_training_freezes_of_ours_what_it_freezes_of_stock_ones(case, norm):
    scope, cfg = FREEZING[case]
    toolkit(f"{scope}.models")
    three = "3d" in cfg["type"]
    stock = MODELS.build(dict(cfg, type=f"{scope}.{cfg['type']}", norm_cfg=dict(type="BN3d" if three else "BN")))
    model = MODELS.build(dict(cfg, type=f"{scope}.{cfg['type']}", norm_cfg=NORMS[norm]))
    classes = {name: type(m) for name, m in ours(model).items()}
    assert classes
    for mode in (True, False, True):
        stock.train(mode), model.train(mode)
        assert state_of(model, classes) == state_of(stock, classes)
        assert {name: type(m) for name, m in ours(model).items()} == classes
    for layer in ours(model).values():
        assert len({p.requires_grad for p in layer.parameters()}) == 1  # an activation's parameter goes with the weight


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", ["ResNet", "VGG"])
@each_norm
def test_mmcvs_own_backbones(name, frozen, norm):
    backbone = getattr(toolkit("mmcv.cnn"), name)
    kwargs = dict(bn_eval=True, bn_frozen=frozen) | (dict(with_bn=True, depth=11) if name == "VGG" else dict(depth=18))
    if norm == "CBN":
        kwargs["frozen_stages"] = -1
    stock = backbone(**kwargs)
    model = replace_norm(backbone(**kwargs), NORMS[norm])
    stock.train(), model.train()
    assert state_of(model, ours(model)) == state_of(stock, ours(model))
    assert not any(m.training for m in ours(model).values())


def test_what_says_norm_eval_and_does_not_freeze_stays_so():
    toolkit("mmpretrain.models")
    cfg = dict(type="mmpretrain.Conformer", arch="tiny", norm_eval=True)
    model = replace_norm(MODELS.build(cfg), dict(type="BNAct"))
    model.train()
    assert all(m.training for m in ours(model).values())


def test_a_layer_stands_for_the_batch_norm_of_as_many_axes_as_the_layer_before_it():
    make = (nn.Conv1d(3, C, 1), nn.Conv2d(3, C, 1), nn.Conv3d(3, C, 1), nn.Linear(3, C))
    stock = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.BatchNorm1d)
    for before, cls in zip(make, stock, strict=True):
        model = nn.Sequential(before, EvoNormB0(C), BatchNormAct(C), nn.ReLU())
        with as_batch_norms(model) as found:
            assert found == [model[1], model[2]]
            assert all(isinstance(layer, cls) for layer in found)
            assert sum(isinstance(layer, other) for other in set(stock) for layer in found) == 2
            with as_batch_norms(model) as again:
                assert again == []
        assert [type(layer) for layer in found] == [EvoNormB0, BatchNormAct]


def test_the_classes_come_back_after_an_error():
    model = nn.Sequential(nn.Conv2d(3, C, 1), EvoNormB0(C))
    with pytest.raises(KeyError), as_batch_norms(model):
        raise KeyError
    assert type(model[1]) is EvoNormB0


@pytest.mark.parametrize("norm", ["GN", "EvoNormS0", "FRN", *NORMS])
def test_tsms_optimizer_finds_every_parameter_of_norms(norm):
    toolkit("mmaction.models"), toolkit("mmaction.engine")
    cfg = dict(type="mmaction.ResNet", depth=18, norm_cfg=dict(type=norm), conv_cfg=dict(type="ConvWS"))
    model = nn.Sequential(MODELS.build(cfg), nn.Linear(4, 4))
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type="SGD", lr=0.1, weight_decay=1e-4),
            constructor="mmaction.TSMOptimWrapperConstructor",
            paramwise_cfg=dict(fc_lr5=False),
        ),
    )
    norms = [m for m in ours(model).values() if not isinstance(m, layers.WSConv2d)]
    of_norms = {id(p) for m in norms for p in m.parameters()}
    assert of_norms
    decayed = {id(p) for group in wrapper.param_groups if group["weight_decay"] for p in group["params"]}
    known = {id(p) for group in wrapper.param_groups for p in group["params"]}
    assert known >= {id(p) for p in model.parameters()}
    assert not decayed & of_norms
    assert {id(p) for p in wrapper.param_groups[4]["params"]} == of_norms


# --- statistics set anew


def net(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, C, 3), norm)


def batches(number=4):
    generator = torch.Generator().manual_seed(1)
    return [3 * torch.randn(8, 3, 9, 9, generator=generator) + 1 for _ in range(number)]


def spoilt(model):
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(100)
    return model


def mean_variance(model, correction):
    with torch.no_grad():
        return torch.stack([model[0](x).var((0, 2, 3), correction=correction) for x in batches()]).mean(0)


@pytest.mark.parametrize(
    ("layer", "correction"), [(EvoNormB0, 0), (BatchNormAct, 1), (SyncBatchNorm, 1), (CrossIterationBatchNorm, 1)]
)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside a BN"])
def test_update_bn_of_torch(layer, correction, alone):
    model = spoilt(net(layer(C)))
    whole = model if alone else nn.Sequential(model, nn.BatchNorm2d(C))
    swa_utils.update_bn(batches(), whole)
    torch.testing.assert_close(model[1].running_var, mean_variance(model, correction))
    assert model[1].momentum == 0.1
    assert type(model[1]) is layer
    assert not model[1]._forward_pre_hooks


def test_update_bn_passes_what_is_not_finite_over_where_it_is_told_to():
    model = spoilt(net(EvoNormB0(C, skip_nonfinite=True)))
    spoil = torch.full((8, 3, 9, 9), float("nan"))
    swa_utils.update_bn([spoil, *batches(2), spoil, *batches()[2:]], model)
    torch.testing.assert_close(model[1].running_var, mean_variance(model, 0))


def test_update_bn_leaves_the_constants_of_a_frozen_one():
    model = net(FrozenBatchNorm(C))
    nn.init.uniform_(model[1].running_var)
    before = copy.deepcopy(model.state_dict())
    swa_utils.update_bn(batches(), nn.Sequential(model, nn.BatchNorm2d(C)))
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_functorch_leaves_a_frozen_one_as_it_is():
    model = torch.func.replace_all_batch_norm_modules_(net(FrozenBatchNorm(C)))
    assert model(batches()[0]).isfinite().all()


def test_functorch_does_not_spoil_what_it_passes_over():
    model = torch.func.replace_all_batch_norm_modules_(net(EvoNormB0(C)))
    run = torch.vmap(lambda x: torch.func.functional_call(model, dict(model.named_parameters()), (x,)))
    x = torch.stack(batches(2))
    with pytest.raises(RuntimeError, match="vmap: "):
        run(x)
    model.eval()
    torch.testing.assert_close(run(x), torch.stack([model(one) for one in x]))


def test_a_frozen_one_without_memory_can_be_made_new():
    layer = FrozenBatchNorm(C, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    torch.testing.assert_close(dict(layer.state_dict()), dict(FrozenBatchNorm(C).state_dict()))


def test_a_frozen_one_loads_a_checkpoint_that_has_no_count():
    state = {key: value for key, value in nn.BatchNorm2d(C).state_dict().items() if key != "num_batches_tracked"}
    FrozenBatchNorm(C).load_state_dict(state, strict=True)


class Batch(dict):
    """What mmpretrain's function hands to a model."""


class Model(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.net = net(norm)

    def data_preprocessor(self, data, training):
        return Batch(x=data)

    def forward(self, x):
        return self.net(x)


class Loader(list):
    batch_size = 8


@pytest.mark.parametrize(("layer", "correction"), [(EvoNormB0, 0), (BatchNormAct, 1), (CrossIterationBatchNorm, 1)])
def test_update_bn_stats_of_mmpretrain(layer, correction):
    hook = toolkit("mmpretrain.engine.hooks.precise_bn_hook")
    model = Model(spoilt(layer(C)))
    with torch.no_grad():
        hook.update_bn_stats(model, Loader(batches()), num_samples=32, logger="silent")
    torch.testing.assert_close(model.net[1].running_var, mean_variance(model.net, correction))
    assert "running_mean" not in vars(model.net[1])
    assert model.net[1].momentum == 0.1


@pytest.mark.parametrize("layer", [EvoNormB0, BatchNormAct, SyncBatchNorm, CrossIterationBatchNorm])
def test_update_bn_stats_of_fvcore(layer):
    precise = toolkit("fvcore.nn.precise_bn")
    stock, model = net(nn.BatchNorm2d(C)), spoilt(net(layer(C)))
    for one in (stock, model):
        precise.update_bn_stats(one, batches(), num_iters=4, progress=None)
    # for EvoNormB0 it takes the population variance for an unbiased one: of 392 values
    torch.testing.assert_close(model[1].running_var, stock[1].running_var, rtol=1e-2, atol=0)
    assert (model[1].running_var < 99).all()


@each_norm
def test_accumulation_of_gradients_is_warned_of(norm):
    from mmengine.optim import OptimWrapper

    layer = MODELS.build(NORMS[norm] | ({"num_channels": C} if norm == "EvoNormB0" else {"num_features": C}))
    assert has_batch_norm(net(layer))
    assert not has_batch_norm(net(layers.GroupNorm(C, 2)))
    wrapper = OptimWrapper(torch.optim.SGD(net(layer).parameters(), lr=0.1), accumulative_counts=2)
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmengine.optim.optimizer.optimizer_wrapper.print_log", lambda text, **_: told.append(text))
        wrapper.initialize_count_status(net(layer), 0, 9)
    assert any("BatchNorm" in text for text in told)


# --- conversions and folding by class


@each_norm
def test_conversion_to_mmdets_frozen_batch_norm(norm):
    frozen = toolkit("mmdet.models.layers.brick_wrappers").FrozenBatchNorm2d
    layer = MODELS.build(NORMS[norm] | ({"num_channels": C} if norm == "EvoNormB0" else {"num_features": C}))
    model = net(layer)
    for _, tensor in itertools.chain(model[1].named_parameters(), model[1].named_buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2)
    want = model.eval()(batches()[0])
    converted = frozen.convert_frozen_batchnorm(model)
    assert isinstance(converted[1], frozen) == (norm != "EvoNormB0")
    torch.testing.assert_close(converted(batches()[0]), want)


def test_conversion_refuses_what_it_would_drop():
    frozen = toolkit("mmdet.models.layers.brick_wrappers").FrozenBatchNorm2d
    with pytest.raises(ValueError, match=r"act='relu'.*would drop its activation 'relu'"):
        frozen.convert_frozen_batchnorm(net(BatchNormAct(C, act="relu")))


LOSING = [
    pytest.param(BatchNormAct(C, act="relu"), id="BNAct"),
    pytest.param(FrozenBatchNorm(C, act="silu"), id="FrozenBatchNorm"),
    pytest.param(CrossIterationBatchNorm(C, eps=0.3, eps_mode="outside"), id="CBN"),
]


@pytest.mark.parametrize("norm", [*LOSING, pytest.param(BatchNormAct(C), id="nothing lost")])
def test_efficient_conv_bn_eval_drops_nothing(norm):
    from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval_for_single_model

    toolkit("mmcv")
    from mmcv.cnn import ConvModule

    nn.init.uniform_(norm.running_var, 0.5, 2)
    model = net(norm).eval()
    module = ConvModule(3, C, 3, bias=True, norm_cfg=dict(type="BN"), act_cfg=None).eval()
    module.conv, module.bn = model[0], norm
    module.turn_on_efficient_conv_bn_eval(True)
    x = batches()[0]
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)
        turn_on_efficient_conv_bn_eval_for_single_model(model)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conv_cfg", [None, dict(type="ConvWS")], ids=["conv", "ConvWS"])
@pytest.mark.parametrize("cfg", [dict(type="RepVGG", arch="A0", base_channels=16), dict(type="MobileOne", arch="s0")])
def test_branches_become_one_convolution(cfg, conv_cfg):
    toolkit("mmpretrain.models")
    if cfg["type"] == "MobileOne" and conv_cfg:
        pytest.skip("some of its filters have a single value, which has no deviation")
    model = MODELS.build(dict(cfg, type=f"mmpretrain.{cfg['type']}", norm_cfg=dict(type="BN"), conv_cfg=conv_cfg))
    model.eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_var, 0.5, 2)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        want = model(x)[-1]
        model.switch_to_deploy()
        torch.testing.assert_close(model(x)[-1], want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


@pytest.mark.parametrize("name", sorted({"GN", "FRN", "EvoNormS0", "EvoNormB0", "BNAct", "SyncBN", "CBN"}))
def test_mmcvs_counter_of_operations_counts_ours(name, capsys):
    count = toolkit("mmcv.cnn").get_model_complexity_info
    group = name in ("GN", "FRN", "EvoNormS0", "EvoNormB0")
    more = {"num_groups": 2} if name == "GN" else {}
    layer = MODELS.build(dict(type=name, **{"num_channels" if group else "num_features": C}, **more))
    stock = nn.GroupNorm(2, C) if group else nn.BatchNorm2d(C)
    flops = [
        count(nn.Sequential(conv, norm), (3, 9, 9), print_per_layer_stat=False, as_strings=False)[0]
        for conv, norm in ((nn.Conv2d(3, C, 3), stock), (layers.WSConv2d(3, C, 3), layer))
    ]
    assert flops[0] == flops[1] > 0


# --- state dicts by position


def trained(model, steps=3):
    model.train()
    for x in batches(steps):
        model(x).square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-3 * p.grad
                p.grad = None
    return model


ALL = [BatchNormAct, CrossIterationBatchNorm, EvoNormB0, FrozenBatchNorm]
each_layer = pytest.mark.parametrize("layer", ALL)


def numbers(model):
    """Parameters and buffers that are averaged."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: t.detach().clone() for name, t in named if t.is_floating_point()}


def between(a, b, share):
    return {name: (1 - share) * a[name] + share * b[name] for name in a}


@each_layer
def test_mean_teacher_averages_buffers(layer):
    hooks = toolkit("mmdet.engine.hooks")
    model = nn.Module()
    model.student, model.teacher = (nn.Sequential(*net(layer(C)), nn.Conv2d(C, 4, 1)) for _ in range(2))
    hook = hooks.MeanTeacherHook(momentum=0.25, skip_buffer=False)
    runner = SimpleNamespace(model=model, iter=0)
    hook.before_train(runner)
    for _ in range(2):
        trained(model.student)
        student, teacher = numbers(model.student), numbers(model.teacher)
        state = copy.deepcopy(model.student.state_dict())
        hook.after_train_iter(runner, 0)
        torch.testing.assert_close(numbers(model.teacher), between(teacher, student, 0.25))
        torch.testing.assert_close(dict(model.student.state_dict()), dict(state), rtol=0, atol=0)
        runner.iter += 1
    assert len(model.teacher.state_dict()) == len(nn.Sequential(*net(layer(C)), nn.Conv2d(C, 4, 1)).state_dict())


@each_layer
@pytest.mark.parametrize("kind", ["mmengine", "swa", "torch"])
def test_averaged_models_average_buffers(layer, kind):
    """Made of a model that has a history, and going on with one that has none."""
    model = trained(net(layer(C)))
    if kind == "torch":
        average = swa_utils.AveragedModel(model, avg_fn=lambda a, s, n: 0.75 * a + 0.25 * s, use_buffers=True)
    elif kind == "mmengine":
        average = ExponentialMovingAverage(model, momentum=0.25, update_buffers=True)
    else:
        average = StochasticWeightAverage(model, update_buffers=True)
    average.update_parameters(model)
    torch.testing.assert_close(numbers(average.module), numbers(model))
    before = numbers(average.module)
    trained(model)
    if layer is CrossIterationBatchNorm:
        model[1].reset_history()
    average.update_parameters(model)
    share = 0.5 if kind == "swa" else 0.25
    torch.testing.assert_close(numbers(average.module), between(before, numbers(model), share))


def ema(model, **kwargs):
    hook = EMAHook("ExponentialMovingAverage", momentum=0.25, **kwargs)
    runner = SimpleNamespace(model=model, iter=0, epoch=0, max_epochs=2, max_iters=9, _resume=False)
    hook.before_run(runner)
    return hook, runner


@pytest.mark.parametrize("begin", [0, 7])
@each_layer
def test_ema_hook(layer, begin):
    model = trained(net(layer(C)))
    history = dict(copy.deepcopy(model.state_dict()))
    hook, runner = ema(model, update_buffers=True, begin_iter=begin)
    hook.after_load_checkpoint(runner, {"state_dict": history})
    for _ in range(2):
        trained(model, 1)
        hook.after_train_iter(runner, 0)
        if layer is CrossIterationBatchNorm:
            model[1].reset_history()
    kept = copy.deepcopy((model.state_dict(), hook.ema_model.state_dict()))
    hook.before_val_epoch(runner)
    torch.testing.assert_close(numbers(model), {k: kept[1][f"module.{k}"] for k in numbers(model)})
    hook.after_val_epoch(runner)
    saved = {"state_dict": model.state_dict()}
    hook.before_save_checkpoint(runner, saved)
    again = net(layer(C))
    other, runner = ema(again, update_buffers=True)
    runner._resume = True
    saved = copy.deepcopy(saved)
    other.after_load_checkpoint(runner, saved)
    again.load_state_dict(saved["state_dict"])
    torch.testing.assert_close(dict(again.state_dict()), dict(kept[0]), rtol=0, atol=0)
    torch.testing.assert_close(dict(other.ema_model.state_dict()), dict(kept[1]), rtol=0, atol=0)


@pytest.mark.parametrize("layer", [BatchNormAct, CrossIterationBatchNorm, EvoNormB0])
def test_sync_norm_hook_averages_statistics_and_keeps_histories(layer, monkeypatch):
    module = importlib.import_module(toolkit("mmdet").__name__ + ".engine.hooks.sync_norm_hook")
    model = trained(net(layer(C)))
    before, other = copy.deepcopy(model.state_dict()), numbers(trained(net(layer(C)), 5))

    def with_other_rank(states, op):
        assert op == "mean"
        return {k: (v + other[k]) / 2 if k in other else v for k, v in states.items()}

    monkeypatch.setattr(module, "get_dist_info", lambda: (0, 2))
    monkeypatch.setattr(module, "all_reduce_dict", with_other_rank)
    module.SyncNormHook().before_val_epoch(SimpleNamespace(model=model))
    averaged = {key: value for key, value in model.state_dict().items() if "running" in key}
    torch.testing.assert_close(averaged, {k: (before[k] + other[k]) / 2 for k in averaged})
    own = {key: value for key, value in before.items() if key.startswith("1.") and key not in other}
    torch.testing.assert_close({key: model.state_dict()[key] for key in own}, own, rtol=0, atol=0)
    assert len(model.state_dict()) == len(before)


@each_layer
def test_copies_and_buffers_of_a_training_layer_keep_their_number(layer):
    model = net(layer(C))
    number = len(list(model.buffers()))
    trained(model)
    assert len(list(model.buffers())) == number
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_sync_buffers_hook_sees_every_running_statistic(monkeypatch):
    seen = []
    monkeypatch.setattr("mmengine.hooks.sync_buffer_hook.all_reduce_params", lambda buffers, op: seen.extend(buffers))
    hook = SyncBuffersHook()
    hook.distributed = True
    model = net(EvoNormB0(C))
    hook.before_val_epoch(SimpleNamespace(model=model))
    assert any(buffer is model[1].running_var for buffer in seen)
