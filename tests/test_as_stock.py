"""What can be done to a stock norm or to mmcv's ConvWS can be done to ours: torch's own samples, and torch's tools."""

import copy
import inspect
import io
from unittest import mock

import pytest
import torch
import torch.nn.utils.parametrizations
from cases import DEVICE
from mmcv.cnn import build_norm_layer
from test_export import CONVOLUTIONS, NORMS, C, Net, assert_same, build, each, inputs
from torch import nn
from torch.nn.utils import parametrize, prune, skip_init
from torch.optim.swa_utils import AveragedModel

from normplug import layers, ops, replace_norm
from normplug.layers import BatchNormAct, CrossIterationBatchNorm, GroupNorm, SyncBatchNorm

with mock.patch.object(torch.backends, "disable_global_flags"):  # else no test could set a flag from here on
    from torch.testing._internal.common_modules import module_db

HAS_BIAS = "bias" in inspect.signature(nn.GroupNorm).parameters  # of today's torch

# --- torch's own samples


def ours_for(stock, args, kwargs):
    if stock is not nn.GroupNorm:
        return BatchNormAct(*args, **kwargs)
    groups, channels, *rest = args
    named = dict(zip(("eps", "affine"), rest, strict=False))
    return GroupNorm(channels, num_groups=groups, **named, **kwargs)


def samples():
    for info in module_db:
        if info.module_cls in (nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            for training in (True, False):
                yield pytest.param(info, training, id=f"{info.module_cls.__name__}-{'train' if training else 'eval'}")


@pytest.mark.parametrize(("info", "training"), samples())
def test_torchs_own_samples(info, training):
    """Values, gradients and state are those of the stock layer, for all that torch tries its modules with."""
    cls, tried = info.module_cls, 0
    for sample in info.module_inputs_func(info, DEVICE, torch.float64, True, training):
        (x, *rest), given = sample.forward_input.args, sample.constructor_input
        args = [a for a in given.args if not isinstance(a, torch.dtype)]
        kwargs = {k: v for k, v in given.kwargs.items() if k not in ("device", "dtype")}
        if x.ndim < 2:  # a single sample without a batch axis, which torch's documentation does not promise
            continue
        stock = cls(*args, **kwargs).to(DEVICE, torch.float64).train(training)
        ours = ours_for(cls, args, kwargs).to(DEVICE, torch.float64).train(training)
        for p in stock.parameters():
            nn.init.normal_(p, mean=1.0)
        ours.load_state_dict(stock.state_dict(), strict=True)
        results = []
        for layer in (stock, ours):
            xi = x.detach().clone().requires_grad_()
            y = layer(xi, *rest)
            torch.manual_seed(1)
            results.append([y, *torch.autograd.grad(y, [xi, *layer.parameters()], torch.randn_like(y))])
        torch.testing.assert_close(results[1], results[0])
        state, want = ours.state_dict(), stock.state_dict()
        if x.numel() == 0:  # no batch, and none that counts: torch averages nothing, but counts it
            state.pop("num_batches_tracked", None), want.pop("num_batches_tracked", None)
        torch.testing.assert_close(state, want)
        tried += 1
    assert tried > 1


# --- the bias of today's nn.GroupNorm


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_without_a_bias(affine):
    _, layer = build_norm_layer(dict(type="GN", num_groups=2, bias=False, affine=affine), C)
    assert list(layer.state_dict()) == (["weight"] if affine else [])
    assert ("bias=False" in repr(layer)) == affine
    layer.reset_parameters()
    layer.double().requires_grad_()
    x = torch.randn(2, C, 5, dtype=torch.float64, requires_grad=True)
    y, want = layer(x), nn.functional.group_norm(x, 2, layer.weight, None, layer.eps)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    for got, grad in zip(*(torch.autograd.grad(z, [x, *layer.parameters()], dy) for z in (y, want)), strict=True):
        torch.testing.assert_close(got, grad)
    if HAS_BIAS:
        layer.load_state_dict(nn.GroupNorm(2, C, affine=affine, bias=False).state_dict(), strict=True)


@pytest.mark.parametrize("kind", [GroupNorm, BatchNormAct, SyncBatchNorm, CrossIterationBatchNorm])
def test_conversions_keep_it(kind):
    old = BatchNormAct(C, bias=False)
    nn.init.normal_(old.weight)
    model = nn.Sequential(nn.Conv2d(3, C, 1), old)
    replace_norm(model, dict(type=kind._name_, **({"num_groups": 2} if kind is GroupNorm else {})))
    assert (type(model[1]), model[1].bias) == (kind, None)
    torch.testing.assert_close(model[1].weight, old.weight)
    if kind is SyncBatchNorm:
        assert SyncBatchNorm.convert_sync_batchnorm(old).bias is None


def test_torch_that_knows_no_bias(monkeypatch):
    """Before it had the argument, its ``reset_parameters`` took the bias for granted."""

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    monkeypatch.setattr(nn.GroupNorm, "reset_parameters", reset_parameters)
    layer = GroupNorm(C, 2, bias=False)
    layer.reset_parameters()
    assert layer.bias is None


# --- inputs


@pytest.mark.parametrize("axes", [6, 7])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NORMS)
def test_any_number_of_axes(name, training, axes):
    """As for one spatial axis that is as long as all of them."""
    net, again = (nn.Sequential(nn.Conv1d(C, C, 1), build(name)) for _ in range(2))
    again.load_state_dict(net.state_dict(), strict=False)
    if isinstance(net[1], CrossIterationBatchNorm):
        training = False  # where it follows a convolution: torch has none of so many axes
    layer, flat = net[1].train(training), again[1].train(training)
    x = torch.randn(2, C, *[2] * (axes - 2), device=DEVICE, requires_grad=True)
    y, want = layer(x), flat(x.flatten(2)).view(x.shape)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(want, x, dy))


@pytest.mark.parametrize("name", [*NORMS, *CONVOLUTIONS])
def test_a_complex_input_is_refused(name):
    layer = build(name)
    x, _ = inputs(layer)
    with pytest.raises(TypeError, match=r"complex64.*real and imaginary part apart"):
        layer(torch.complex(x, x))


def test_complex_input_of_the_ops_themselves_is_refused():
    """Not cut to its real part: whoever calls an op by its registered name passes by the checks."""
    x, w = torch.randn(2, C, 5, dtype=torch.complex64, device=DEVICE), torch.ones(C, device=DEVICE)
    own = torch.ops.normplug
    for op, args in (
        (own.group_norm, (x, 2, w, w, 1e-5, None, None)),
        (own.evonorm_s0, (x, 2, w, w, w, 1e-5)),
        (own.evonorm_b0, (x, w, w, w, None, 1e-5)),
        (own.filter_response_norm, (x, w, w, w, 1e-5)),
        (own.batch_norm_act, (x, w, w, 1e-5, None, None)),
        (own.weight_standardize, (x, 1e-5, 1, False)),
    ):
        with pytest.raises(TypeError, match="complex64"):
            op(*args)
    with pytest.raises(TypeError, match="complex64"):
        ops.group_norm(x.real.contiguous(), 2, residual=x)


# --- torch's tools


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@each
def test_a_weight_that_is_computed(name):
    """parametrize, prune, and on convolutions the norms of a weight."""
    layer, want = build(name), build(name)
    if "weight" not in dict(layer.named_parameters()):
        return
    want.load_state_dict(layer.state_dict())
    x, _ = inputs(layer)
    parametrize.register_parametrization(layer, "weight", Doubled())
    want.weight.data.mul_(2)
    assert_same(layer, want, x)
    layer(x).sum().backward()
    parametrize.remove_parametrizations(layer, "weight")
    assert_same(layer, want, x)
    for key in ("weight", "bias"):
        if getattr(layer, key) is not None:
            prune.l1_unstructured(layer, key, 0.5)
            layer(x).sum().backward()
            prune.remove(layer, key)
    if name in CONVOLUTIONS:
        for norm in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
            normed = copy.deepcopy(layer)
            norm(normed)
            normed.train()(x).sum().backward()
            assert normed.eval()(x).isfinite().all()


@each
def test_made_without_values(name):
    make, want = {**NORMS, **CONVOLUTIONS}[name], build(name)
    with torch.device("meta"):
        layer = make()
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point())
    layer.to_empty(device=DEVICE).reset_parameters()
    fresh = make()
    for each_layer in (layer, fresh):
        torch.manual_seed(0)
        each_layer.reset_parameters()
    torch.testing.assert_close(dict(layer.named_parameters()), {k: v.to(DEVICE) for k, v in fresh.named_parameters()})
    layer.eval().load_state_dict(want.state_dict())
    assert_same(layer, want, inputs(layer)[0])


def test_made_without_initialization():
    for name in layers.__all__:
        cls = getattr(layers, name)
        args = (C, C, 3) if issubclass(cls, nn.modules.conv._ConvNd) else (C,)
        kwargs = {"num_groups": 2} if "num_groups" in inspect.signature(cls).parameters else {}
        assert skip_init(cls, *args, **kwargs).weight.shape[0] == C


@each
def test_averaged_saved_and_called_with_other_parameters(name):
    net = Net(build(name))
    x, _ = inputs(net.layer)
    averaged = AveragedModel(net)
    averaged.update_parameters(net)
    assert_same(averaged.eval(), net, x)
    saved = io.BytesIO()
    torch.save(net, saved)
    saved.seek(0)
    assert_same(torch.load(saved, weights_only=False), net, x)
    net.load_state_dict(net.state_dict(), assign=True)
    zeros = {key: torch.zeros_like(p) for key, p in net.named_parameters()}
    called = torch.func.functional_call(net, zeros, (x,))
    other = copy.deepcopy(net)
    other.load_state_dict(zeros, strict=False)
    torch.testing.assert_close(called, other(x))
    # A class with __torch_function__ that changes nothing, as torchvision's images are
    image = x.as_subclass(type("Image", (torch.Tensor,), {}))
    torch.testing.assert_close(net(image).as_subclass(torch.Tensor), net(x))
