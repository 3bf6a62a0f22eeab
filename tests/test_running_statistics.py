"""Running statistics, of every layer that has them: moved once per step, and not by a batch that is not finite."""

import copy
import inspect

import pytest
import torch
from cases import DEVICE
from torch import nn
from torch.utils.checkpoint import checkpoint

from normplug import layers
from normplug.layers._batch_statistics import recomputing, update_running
from normplug.registry import MODELS

C = 6
NAN, INF = float("nan"), float("inf")
ALL = [getattr(layers, name) for name in layers.__all__]
KEEPING = [layer for layer in ALL if issubclass(layer, nn.Module) and layer.batch_statistics]
# Each with its plain forward, and with the one that does more than torch's own op.
CASES = [
    pytest.param(layer, kwargs, id=f"{layer.__name__}{''.join('-' + str(v) for v in kwargs.values())}")
    for layer in KEEPING
    for kwargs in ({}, {"act": "silu"}, {"momentum": None})
    if not kwargs or (set(kwargs) <= set(inspect.signature(layer).parameters) and layer is not layers.EvoNormB0)
]
each = pytest.mark.parametrize(("layer", "kwargs"), CASES)
each_compiled = pytest.mark.parametrize(("layer", "kwargs"), [case for case in CASES if "None" not in case.id])
# A graph may break where CBN follows its convolution, by a hook for all modules, and where a count is read.
pytestmark = pytest.mark.filterwarnings("ignore:.*([Gg]raph break|global hooks|scalar)")


def test_the_layers_are_those_with_a_running_variance():
    built = [layer for layer in ALL if "num_features" in inspect.signature(layer).parameters or layer in KEEPING]
    assert {layer for layer in built if "running_var" in dict(layer(C).named_buffers())} - {
        layers.FrozenBatchNorm
    } == set(KEEPING)


class Net(nn.Module):
    """A norm behind a convolution, the two of them checkpointed or not."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.use_reentrant = nn.Conv2d(4, C, 3), norm, None

    def inner(self, x):
        return self.norm(self.conv(x))

    def forward(self, x):
        if self.use_reentrant is None:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


def buffers(net):
    return {name.replace("_orig_mod.", ""): buffer.clone() for name, buffer in net.named_buffers()}


def steps(net, number=3):
    """Train on batches that are the same for every net; return all gradients and buffers."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        x = torch.randn(4, 4, 7, 7, generator=generator).to(DEVICE).requires_grad_()
        net(x).square().mean().backward()
    return {**{name.replace("_orig_mod.", ""): p.grad for name, p in net.named_parameters()}, **buffers(net)}


def compiled(net, what):
    torch._dynamo.reset()
    if what == "norm":
        net.norm = torch.compile(net.norm, backend="aot_eager")
    return torch.compile(net, backend="aot_eager") if what == "net" else net


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@each
def test_checkpointing_moves_them_once_per_step(layer, kwargs, use_reentrant):
    net = Net(layer(C, **kwargs)).to(DEVICE)
    again = copy.deepcopy(net)
    again.use_reentrant = use_reentrant
    torch.testing.assert_close(steps(again), steps(net), rtol=0, atol=0)


# A compiled norm in a checkpointed function runs as it was compiled in both passes: its graph has to ask.
@pytest.mark.slow
@pytest.mark.parametrize(("what", "use_reentrant"), [("norm", True), ("norm", False), ("net", False)])
@each_compiled
def test_and_so_it_does_in_a_compiled_model(layer, kwargs, use_reentrant, what):
    net = Net(layer(C, **kwargs)).to(DEVICE)
    again = copy.deepcopy(net)
    again.use_reentrant = use_reentrant
    torch.testing.assert_close(steps(compiled(again, what)), steps(compiled(net, what)), rtol=0, atol=0)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_layer_has_no_op_that_only_checkpointing_needs(strict):
    x = torch.randn(4, C, 5, 5, device=DEVICE)
    layer = layers.BatchNormAct(C).to(DEVICE)
    graph = torch.export.export(layer, (x,), strict=strict).graph
    assert not [node for node in graph.nodes if "normplug" in str(node.target)]


def test_a_nested_checkpoint_moves_them_once():
    net = nn.Sequential(nn.Conv2d(4, C, 3), layers.BatchNormAct(C), nn.Conv2d(C, C, 3), layers.SyncBatchNorm(C))
    again = copy.deepcopy(net)

    def outer(x):
        x = checkpoint(again[:2], x, use_reentrant=False)
        return checkpoint(again[2:], x, use_reentrant=False)

    x = torch.randn(4, 4, 9, 9, requires_grad=True)
    net(x).square().mean().backward()
    checkpoint(outer, x, use_reentrant=False).square().mean().backward()
    torch.testing.assert_close(buffers(again), buffers(net), rtol=0, atol=0)
    assert not recomputing()


@pytest.mark.parametrize("frozen", ["eval", "FrozenBatchNorm"])
def test_checkpointing_leaves_frozen_ones_alone(frozen):
    norm = layers.FrozenBatchNorm(C) if frozen == "FrozenBatchNorm" else layers.BatchNormAct(C).eval()
    net = Net(norm)
    net.use_reentrant = False
    before = buffers(net)
    steps(net)
    torch.testing.assert_close(buffers(net), before, rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["SyncBN", "BNAct", "EvoNormB0"])
@pytest.mark.filterwarnings("ignore:.*use_reentrant", "ignore::ImportWarning")  # mmdet's and mmcv's own
def test_with_cp_of_a_backbone_moves_them_once(norm):
    pytest.importorskip("mmdet.models")
    cfg = dict(type="mmdet.ResNet", depth=18, base_channels=8, norm_cfg=dict(type=norm), norm_eval=False)
    net = MODELS.build(cfg)
    again = MODELS.build(cfg | dict(with_cp=True))
    again.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for model in (net, again):
        model.train()
        assert model.layer1[0].with_cp == (model is again)
        sum(y.square().mean() for y in model(x)).backward()
    torch.testing.assert_close(buffers(again), buffers(net), rtol=0, atol=0)


# --- batches that are not finite


def batch(norm, bad=None):
    """A convolution's output for CBN to follow, any tensor for the others; with one value that is no number."""
    x = torch.randn(4, C, 5, 5, device=DEVICE)
    if bad is not None:
        x[1, 2, 0, 0] = bad
    return x


def pair(layer, kwargs):
    more = {"buffer_num": 0} if layer is layers.CrossIterationBatchNorm else {}
    guarded = layer(C, **kwargs, **more, skip_nonfinite=True).to(DEVICE)
    plain = layer(C, **kwargs, **more).to(DEVICE)
    plain.load_state_dict(guarded.state_dict())
    return guarded, plain


@pytest.mark.parametrize("bad", [NAN, INF, 1e30])
@each
def test_a_batch_that_is_not_finite_is_passed_over(layer, kwargs, bad):
    guarded, plain = pair(layer, kwargs)
    first, spoilt, last = batch(layer), batch(layer, bad), batch(layer)
    guarded(first), plain(first)
    torch.testing.assert_close(buffers(guarded), buffers(plain), rtol=0, atol=0)
    before = buffers(guarded)
    y = guarded(spoilt)
    torch.testing.assert_close(buffers(guarded), before, rtol=0, atol=0)
    unguarded = copy.deepcopy(plain)
    torch.testing.assert_close(unguarded(spoilt), y, rtol=0, atol=0, equal_nan=True)
    assert not all(buffer.isfinite().all() for buffer in buffers(unguarded).values())  # else there is nothing to guard
    guarded(last), plain(last)  # the next batch counts as if the spoilt one had not been
    torch.testing.assert_close(buffers(guarded), buffers(plain), rtol=0, atol=0)
    assert guarded.eval()(last).isfinite().all()
    assert "skip_nonfinite=True" in repr(guarded)
    assert "skip_nonfinite" not in repr(plain)


@each_compiled
def test_a_compiled_layer_passes_it_over_too(layer, kwargs):
    guarded, plain = pair(layer, kwargs)
    graph = layer is not layers.CrossIterationBatchNorm
    run = torch.compile(guarded, backend="aot_eager", fullgraph=graph)
    first, last = batch(layer), batch(layer)
    run(first), run(batch(layer, NAN)), run(last)
    plain(first), plain(last)
    torch.testing.assert_close(buffers(guarded), buffers(plain))


def test_a_channel_that_is_spoilt_already_does_not_stop_the_others():
    guarded, plain = pair(layers.SyncBatchNorm, {})
    guarded.running_mean[3] = NAN
    x = batch(layers.SyncBatchNorm)
    guarded(x), plain(x)
    want = buffers(plain)
    want["running_mean"][3] = NAN
    torch.testing.assert_close(buffers(guarded), want, rtol=0, atol=0, equal_nan=True)


def test_checkpointing_a_guarded_layer():
    net = Net(layers.BatchNormAct(C, skip_nonfinite=True)).to(DEVICE)
    again = copy.deepcopy(net)
    again.use_reentrant = False
    torch.testing.assert_close(steps(again), steps(net), rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["SyncBN", "BNAct", "CBN", "EvoNormB0"])
def test_one_word_of_a_config_switches_it_on(norm):
    pytest.importorskip("mmcv")
    from mmcv.cnn import build_norm_layer

    _, layer = build_norm_layer(dict(type=norm, skip_nonfinite=True), C)
    assert layer.skip_nonfinite


def test_conversion_keeps_the_guard_or_refuses():
    net = nn.Sequential(layers.BatchNormAct(C, skip_nonfinite=True))
    assert layers.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))[0].skip_nonfinite
    with pytest.raises(ValueError, match="skip_nonfinite"):
        nn.SyncBatchNorm.convert_sync_batchnorm(net)


# --- an eps of 0


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("layer", "kwargs"),
    [
        *((layer, {}) for layer in ALL if issubclass(layer, nn.modules.batchnorm._NormBase)),
        (layers.CrossIterationBatchNorm, {"eps_mode": "outside"}),
    ],
)
def test_torch_is_never_given_an_eps_that_some_version_refuses(layer, kwargs, training, eps, monkeypatch):
    """torch 2.10 and 2.11 want more than 0, later ones only in training; without one a layer computes the same."""
    stock, given = torch.batch_norm, []

    def watched(*args):
        given.append(args[7])
        return stock(*args)

    monkeypatch.setattr(torch, "batch_norm", watched)  # what F.batch_norm calls when it has looked at eps
    net = Net(layer(C, eps=eps, **kwargs).to(DEVICE)).to(DEVICE).train(training)
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2)
    mean, var = net.norm.running_mean.double(), net.norm.running_var.double()
    x = torch.randn(2, 4, 5, 5, device=DEVICE)
    y, z = net(x), net.conv(x).double()
    assert all(e > 0 for e in given)
    if net.norm.training:
        var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    divisor = var.sqrt() + eps if kwargs else (var + eps).sqrt()
    want = (z - mean.view(-1, 1, 1)) / divisor.view(-1, 1, 1)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, 1])
def test_one_kernel_moves_mean_and_variance_on_a_gpu(momentum, monkeypatch):
    plain, together = (layers.BatchNormAct(C, momentum=momentum, act="relu") for _ in range(2))
    calls, foreach = [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: calls.append(len(args[0])) or foreach(*args))
    mean, var = torch.randn(C), torch.rand(C)
    with torch.no_grad():
        update_running(plain, mean, var)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        update_running(together, mean, var)
    assert calls == [2]
    for a, b in zip(plain.buffers(), together.buffers(), strict=True):
        assert torch.equal(a, b)
