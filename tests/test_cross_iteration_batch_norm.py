"""CBN against its definition in float64 with old weights kept and derivatives by autograd; its schedule and state."""

import copy
import gc
import io
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE
from mmengine.model import ExponentialMovingAverage, convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.runner.checkpoint import get_state_dict, load_state_dict
from torch import nn
from torch.utils.checkpoint import checkpoint

from normplug.layers import CrossIterationBatchNorm, SyncBatchNorm, WSConv2d
from normplug.layers import _convolution_trace as trace
from normplug.layers._convolution_padding import padding_of
from normplug.openmmlab.adapt import adapt
from normplug.ops.patch_statistics import filter_products, patch_statistics
from normplug.registry import MODELS

CBN = CrossIterationBatchNorm
C = 6
GEOMETRIES = {
    "1d": (nn.Conv1d(4, C, 5, padding=2), (11,)),
    "2d": (nn.Conv2d(4, C, 3, padding=1, bias=False), (7, 9)),
    "3d": (nn.Conv3d(4, C, (1, 3, 2), stride=(1, 2, 2), padding=(0, 1, 1)), (3, 7, 8)),
    "pointwise": (nn.Conv2d(4, C, 1, stride=2), (7, 8)),
    "grouped": (nn.Conv2d(4, C, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(2, 1), groups=2), (9, 11)),
    "depthwise": (nn.Conv2d(3, C, 3, groups=3), (9, 8)),
    "same": (nn.Conv2d(4, C, (3, 5), padding="same", dilation=(2, 1)), (7, 9)),
    "same-even": (nn.Conv1d(4, C, 4, padding="same"), (9,)),
    "valid": (nn.Conv2d(4, C, 3, padding="valid"), (7, 9)),
    "reflect": (nn.Conv2d(4, C, 3, padding=2, padding_mode="reflect"), (7, 9)),
    "replicate": (nn.Conv2d(4, C, 3, stride=2, padding=(1, 2), padding_mode="replicate"), (7, 9)),
    "circular": (nn.Conv2d(4, C, (2, 4), padding="same", padding_mode="circular", dilation=(1, 3)), (10, 11)),
    "ws": (WSConv2d(4, C, 3, padding=1), (7, 9)),
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


class Pair(nn.Module):
    def __init__(self, conv, norm):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x):
        return self.norm(self.conv(x))


def pair(geometry="2d", dtype=torch.float64, **kwargs):
    """A convolution and a CBN behind it, with random parameters."""
    conv = copy.deepcopy(GEOMETRIES[geometry][0])
    conv.reset_parameters()
    norm = CBN(C, **kwargs)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    nn.init.normal_(norm.bias)
    return Pair(conv, norm).to(DEVICE, dtype)


def batch(geometry="2d", n=2, dtype=torch.float64, size=None):
    conv, default = GEOMETRIES[geometry]
    return (0.5 + torch.randn(n, conv.in_channels, *(size or default))).to(DEVICE, dtype)


def batches(count, geometry="2d", **kwargs):
    return [batch(geometry, **kwargs) for _ in range(count)]


def lengths(norm):
    return {call: len(entries) for call, entries in norm._history.items()}


def buffers(module):
    return {name: b.clone() for name, b in module.named_buffers()}


def close(got, want, **kwargs):
    torch.testing.assert_close(got, want, **kwargs)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def step(net, x, optimizer, seed, forward=None):
    """One training step with a random upstream gradient: output and gradients."""
    optimizer.zero_grad()
    y = (forward or net)(x)
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) / y[:, 0].numel() ** 0.5
    y.backward(dy)
    seen = {"y": y.detach().clone()} | {name: p.grad.clone() for name, p in net.named_parameters()}
    optimizer.step()
    return seen


def train(net, xs, lr=0.3, **kwargs):
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.5)
    return [step(net, x, optimizer, seed, **kwargs) for seed, x in enumerate(xs)]


# --- the definition


class Definition(nn.Module):
    """CBN by the paper: keeps the weights of earlier iterations, and differentiates by autograd.

    Mean and second moment of an earlier batch are carried over to the present weights by their first-order
    expansion at the weights of then.
    """

    def __init__(self, pair):
        super().__init__()
        self.conv, self.settings = copy.deepcopy(pair.conv), pair.norm.__dict__
        self.norm = nn.Module()
        self.norm.weight, self.norm.bias = (nn.Parameter(p.detach().clone()) for p in pair.norm.parameters())
        self.running_mean, self.running_var = torch.zeros(C).to(pair.norm.weight), torch.ones(C).to(pair.norm.weight)
        self.earlier, self.calls, self.dropped = [], 0, 0

    def filters(self):
        return self.conv.standardized_weight() if hasattr(self.conv, "standardized_weight") else self.conv.weight

    def moments(self, x):
        """Mean and second moment at the present filters, their derivatives by these, and the filters."""
        w = self.filters().detach().clone().requires_grad_()
        y = plain(self.conv)._conv_forward(x, w, None if self.conv.bias is None else self.conv.bias.detach())
        mean, second = y.transpose(0, 1).flatten(1).mean(1), y.transpose(0, 1).flatten(1).square().mean(1)
        d_mean, d_second = (torch.autograd.grad(m.sum(), w, retain_graph=True)[0] for m in (mean, second))
        return mean.detach(), second.detach(), d_mean, d_second, w.detach()

    def forward(self, x):
        s = self.settings
        self.calls += 1
        y = self.conv(x)
        values = y.transpose(0, 1).flatten(1)
        count, mean, var = values.shape[1], values.mean(1), values.var(1, correction=0)
        means, variances = [mean], [var]
        if self.calls > s["burnin"]:
            w = self.filters().detach()
            for mean0, second0, d_mean, d_second, w0 in self.earlier:
                moved_mean = mean0 + s["rho"] * (d_mean * (w - w0)).flatten(1).sum(1)
                moved_second = second0 + s["rho"] * (d_second * (w - w0)).flatten(1).sum(1)
                means.append(moved_mean)
                variances.append(moved_second - moved_mean.square())
            self.earlier = [self.moments(x), *self.earlier][: s["buffer_num"]]
        elif s["official_burnin_var"]:
            variances = [var * count / (count - 1)]
        means, variances = torch.stack(means), torch.stack(variances)
        keep = (variances >= 0).to(y.dtype) if s["rule"] == "drop" else torch.ones_like(variances)
        self.dropped += int((variances < 0).sum())
        centre = (keep * means).sum(0) / keep.sum(0)
        second = (keep * (variances.clamp(min=0) + means.square())).sum(0) / keep.sum(0)
        spread = second - centre.square()
        den = (spread + s["eps"]).sqrt() if s["eps_mode"] == "inside" else spread.sqrt() + s["eps"]
        with torch.no_grad():
            share = s["momentum"] or 1 / self.calls
            self.running_mean += share * (mean - self.running_mean)
            self.running_var += share * (var * count / (count - 1) - self.running_var)
        z = (y - column(centre, y)) / column(den, y) * column(self.norm.weight, y) + column(self.norm.bias, y)
        return z if s["act"] is None else getattr(F, s["act"])(z)


def column(v, x):
    return v.view(1, -1, *[1] * (x.ndim - 2))


def plain(conv):
    """The stock convolution of the same geometry."""
    kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[conv.weight.ndim]
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is not None)
    return kind(conv.in_channels, conv.out_channels, *geometry, conv.padding_mode)


def compare_with_definition(net, xs, lr=0.3):
    definition = Definition(net)
    for got, want in zip(train(net, xs, lr), train(definition, xs, lr), strict=True):
        close(got, want, rtol=1e-7, atol=1e-8)
    close(net.norm.running_mean, definition.running_mean)
    close(net.norm.running_var, definition.running_var)
    return definition


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equals_the_definition_behind_every_convolution(geometry):
    """Nine steps of SGD, the first two of them burn-in: outputs, all gradients, running statistics."""
    net = pair(geometry, buffer_num=3, burnin=2)
    compare_with_definition(net, batches(9, geometry))
    assert lengths(net.norm) == {0: 3}


@pytest.mark.parametrize(
    "settings",
    [
        {"eps_mode": "outside", "eps": 0.01},
        {"rule": "max"},
        {"rho": 0.5},
        {"rho": 0.0},
        {"buffer_num": 1},
        {"buffer_num": 7},
        {"momentum": None},
        {"act": "relu"},
        {"act": "silu", "rule": "max", "eps_mode": "outside"},
        {"burnin": 3, "official_burnin_var": True},
    ],
    ids=str,
)
def test_equals_the_definition_with_every_option(settings):
    compare_with_definition(pair(**settings), batches(9))


@pytest.mark.parametrize("rule", ["drop", "max"])
@pytest.mark.parametrize("eps_mode", ["inside", "outside"])
def test_equals_the_definition_where_weights_move_far(rule, eps_mode):
    """Steps so large that corrected variances become negative, which the two rules treat differently."""
    definition = compare_with_definition(pair(rule=rule, eps_mode=eps_mode), batches(12), lr=3.0)
    assert definition.dropped > 5


def test_batches_of_different_sizes_weigh_the_same():
    compare_with_definition(pair(), [batch(n=n, size=size) for n in (1, 3) for size in ((7, 9), (12, 5), (4, 4))])


# --- derivatives in closed form


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_derivatives_equal_those_of_autograd(geometry):
    conv = plain(GEOMETRIES[geometry][0]).double()
    x = batch(geometry)
    layer = CBN(C)
    y = conv.train()(x)
    found = trace.take(layer, y)
    mean, var = y.transpose(0, 1).flatten(1).mean(1), y.transpose(0, 1).flatten(1).var(1, correction=0)
    want_mean, want_var = (torch.autograd.grad(m.sum(), conv.weight, retain_graph=True)[0] for m in (mean, var))
    mean_grad, var_grad = patch_statistics(x, y.detach(), mean.detach(), **found.geometry)
    assert len(mean_grad) == conv.groups
    close(mean_grad.repeat_interleave(C // conv.groups, 0), want_mean)
    close(var_grad, want_var)
    products = filter_products(conv.weight.detach(), [mean_grad, 2 * mean_grad], [var_grad, 3 * var_grad])
    for got, grad in zip(products, (want_mean, want_var), strict=True):
        close(got[0], (grad * conv.weight.detach()).flatten(1).sum(1))
    close(products[1][1], 3 * products[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_patch_ops_are_well_formed(layout, dtype):
    x, y, mean = torch.randn(2, 4, 7, 9), torch.randn(2, 6, 7, 9), torch.randn(6)
    x, y = (t.to(DEVICE, dtype).to(memory_format=layout) for t in (x, y))
    args = (x, y, mean.to(DEVICE), [3, 3], [1, 1], [1, 1, 1, 1], [1, 1], 2, "zeros")
    op = torch.ops.normplug.patch_statistics.default
    torch.library.opcheck(op, args)
    real, fake = op(*args), op(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in args))
    assert [t.dtype for t in real] == [t.dtype for t in fake] == [torch.float32] * 2
    assert [t.stride() for t in real] == [t.stride() for t in fake]  # opcheck looks at strides on CUDA only
    weight = torch.randn(6, 2, 3, 3, device=DEVICE).to(dtype)
    torch.library.opcheck(torch.ops.normplug.filter_products.default, (weight, [real[0]] * 2, [real[1]] * 2))


# --- identities


def test_no_buffer_is_batch_norm():
    ours = pair(buffer_num=0)
    bn = Pair(copy.deepcopy(ours.conv), nn.BatchNorm2d(C).double())
    bn.norm.load_state_dict({k: v for k, v in ours.norm.state_dict().items() if k != "cbn_calls"})
    xs = batches(4)
    close(train(ours, xs), train(bn, xs))
    close(buffers(ours), buffers(bn))
    close(ours.eval()(xs[0]), bn.eval()(xs[0]))
    CBN(C, buffer_num=0)(torch.randn(2, C, 3, 3))  # and needs no convolution


def test_fixed_weights_give_batch_norm_over_the_last_batches():
    net = pair(buffer_num=3)
    xs = batches(6)
    for i, x in enumerate(xs):
        window = net.conv(torch.cat(xs[max(0, i - 3) : i + 1])).detach()
        want = F.batch_norm(window, None, None, net.norm.weight, net.norm.bias, training=True)[-len(x) :]
        y = net(x)
        close(y, want)
        y.sum().backward()


def test_after_one_step_the_mean_is_exact():
    """The output is linear in the filters, so the corrected mean is that of the old input under the new filters."""
    net = pair(buffer_num=1, rule="max")
    nn.init.zeros_(net.norm.bias)
    old, new = batches(2)
    step(net, old, torch.optim.SGD([net.conv.weight], 1.0), 0)
    y = net(new)
    middle = torch.cat([net.conv(old), net.conv(new)]).detach().transpose(0, 1).flatten(1).mean(1)
    # y is zero where the convolution gives its mean: y = slope * (out - middle)
    out = net.conv(new).detach()
    slope = (y[0, :, 0, 0] - y[1, :, 2, 3]) / (out[0, :, 0, 0] - out[1, :, 2, 3])
    close(out[0, :, 0, 0] - y[0, :, 0, 0] / slope, middle)


@pytest.mark.parametrize("eps_mode", ["inside", "outside"])
@pytest.mark.parametrize("act", [None, "silu"])
def test_gradient_by_finite_differences(eps_mode, act):
    """The gradient with respect to the convolution's output, the history held fixed."""
    conv = nn.Conv2d(C, C, 1, bias=False).double()  # an identity: its output can be varied at will
    nn.init.dirac_(conv.weight)
    norm = CBN(C, buffer_num=2, eps_mode=eps_mode, act=act).double()
    norm(conv(torch.randn(2, C, 3, 3).double() * 2 + 1))
    history = norm._history

    def normalize(out, residual):
        norm.reset_history()
        norm._history = history
        return norm(conv(out), residual)

    out, residual = (torch.randn(2, C, 2, 3).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(normalize, (out, residual), fast_mode=True)


@pytest.mark.parametrize("eps_mode", ["inside", "outside"])
@pytest.mark.parametrize("rule", ["drop", "max"])
def test_constant_channels_stay_finite(rule, eps_mode):
    net = pair(dtype=torch.float32, rule=rule, eps_mode=eps_mode)
    nn.init.zeros_(net.conv.weight)
    for x in batches(4, dtype=torch.float32):
        y = net(x)
        y.square().sum().backward()
        assert y.isfinite().all()
        assert all(p.grad.isfinite().all() for p in net.parameters())


def test_evaluation_is_batch_norm_by_running_statistics():
    for eps_mode, act in (("inside", None), ("outside", None), ("inside", "relu")):
        net = pair(eps_mode=eps_mode, eps=1e-2, act=act)
        train(net, batches(3))
        before = net.state_dict()
        before = {k: v.clone() for k, v in before.items()}
        norm = net.norm.eval()
        y = torch.randn(2, C, 5, 5).double()  # from nowhere: evaluation needs no convolution
        var = norm.running_var
        den = (var + 1e-2).sqrt() if eps_mode == "inside" else var.sqrt() + 1e-2
        want = (y - column(norm.running_mean, y)) / column(den, y) * column(norm.weight, y) + column(norm.bias, y)
        close(norm(y), want.relu() if act else want)
        same(net.state_dict(), before)


def test_large_mean_and_small_variance():
    """Mean 1000, variance 1 in float32: statistics kept as E[y²] would have lost all digits."""
    conv = nn.Conv2d(4, C, 1)
    nn.init.constant_(conv.bias, 1000.0)
    net = Pair(conv, CBN(C, buffer_num=3)).to(DEVICE)
    exact = copy.deepcopy(net).double()
    xs = batches(5, dtype=torch.float32)
    for got, want in zip(train(net, xs, lr=0.01), train(exact, [x.double() for x in xs], lr=0.01), strict=True):
        close(got["y"].double(), want["y"], rtol=0, atol=2e-3)


# --- schedule


def test_burn_in_is_batch_norm_and_remembers_nothing():
    net, bn = pair(burnin=4), pair(buffer_num=0)
    bn.load_state_dict({k: v for k, v in net.state_dict().items()})
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (net, bn)]
    seen = []
    for seed, x in enumerate(batches(8)):
        got, want = (step(m, x, o, seed)["y"] for m, o in zip((net, bn), optimizers, strict=True))
        same(got, want) if seed < 5 else None  # the fifth call remembers, and has nothing to look back to
        seen.append(lengths(net.norm).get(0, 0))
        bn.load_state_dict(net.state_dict())
    assert seen == [0, 0, 0, 0, 1, 2, 3, 3]
    assert net.norm.cbn_calls == 8
    assert not torch.allclose(got, want)


def test_a_frozen_convolution_makes_it_batch_norm():
    net = pair()
    net.conv.weight.requires_grad_(False)
    for x in batches(3):
        want = F.batch_norm(net.conv(x), None, None, net.norm.weight, net.norm.bias, training=True)
        close(net(x), want)
    assert lengths(net.norm) == {}
    assert net.norm.cbn_calls == 3
    assert trace._local.last.record is None or trace._local.last.record[1] is None


def test_empty_batch_changes_nothing():
    net = pair()
    train(net, batches(2))
    before = copy.deepcopy(net.state_dict())
    for training in (True, False):
        x = batch(n=0).requires_grad_()
        net.train(training)
        y = net(x)
        assert y.shape == (0, C, 7, 9)
        net.zero_grad()
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert all(p.grad.abs().max() == 0 for p in net.norm.parameters())
    same(net.state_dict(), before)


def test_a_head_shared_over_levels_keeps_one_history_per_level():
    """Three sizes go through one convolution and norm; each must meet its own history only."""
    sizes = [(12, 10), (6, 5), (4, 3)]
    shared = pair(buffer_num=2, burnin=1)
    relu = nn.ReLU(inplace=True)  # as ConvModule has it
    apart = nn.ModuleList(copy.deepcopy(shared) for _ in sizes)
    iterations = [[batch(size=size) for size in sizes] for _ in range(5)]
    optimizer = torch.optim.SGD(shared.parameters(), 0.3)
    for xs in iterations:
        for net in apart:  # one layer per level, all with the weights of the shared one
            net.conv.load_state_dict(shared.conv.state_dict())
            for name, p in net.norm.named_parameters():
                p.data.copy_(getattr(shared.norm, name).data)
        optimizer.zero_grad()
        got = [relu(shared(x)) for x in xs]
        want = [relu(net(x)) for net, x in zip(apart, xs, strict=True)]
        close(got, want)
        dys = [torch.randn_like(y) for y in got]
        torch.autograd.backward(got, dys)
        apart.zero_grad()
        torch.autograd.backward(want, dys)
        for name, p in shared.named_parameters():
            close(p.grad, sum(dict(net.named_parameters())[name].grad for net in apart))
        optimizer.step()
    assert lengths(shared.norm) == {0: 2, 1: 2, 2: 2}
    assert shared.norm.cbn_calls == 5
    assert shared.norm.num_batches_tracked == 15


def test_gradient_accumulation_enlarges_the_batch():
    """Between micro-batches the weights stand still: their statistics are those of one larger batch."""
    net = pair(buffer_num=3)
    optimizer = torch.optim.SGD(net.parameters(), 0.3)
    xs = batches(4)
    for i, x in enumerate(xs):
        y = net(x)
        together = net.conv(torch.cat(xs[: i + 1])).detach()
        want = F.batch_norm(together, None, None, net.norm.weight, net.norm.bias, training=True)
        close(y, want[-2:])
        y.square().sum().backward()
    optimizer.step()
    assert lengths(net.norm) == {0: 3}
    assert net.norm.cbn_calls == 4


def test_calls_without_backward_do_not_pile_up():
    """A loop that computes losses and never steps must not look like ever more levels of a shared head."""
    net = pair(buffer_num=2)
    for x in batches(7):
        y = net(x)
    assert max(lengths(net.norm)) <= 1
    del y
    with torch.no_grad():  # statistics are collected like this
        for x in batches(7):
            net(x)
    assert max(lengths(net.norm)) <= 1
    net = pair(buffer_num=2)
    with torch.no_grad():
        for x in batches(7):
            net(x)
    assert lengths(net.norm) == {0: 1}
    train(net, batches(3))
    assert lengths(net.norm) == {0: 2}


def new_weights(net):
    with torch.no_grad():
        net.conv.weight.mul_(0.9)


def evaluation(net):
    net.eval()
    net.train()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_one_imprecise_channel_is_no_transformed_weight(dtype):
    """Where products cancel a channel may be off by its own size in half precision; a wrong weight is off in all."""
    conv = nn.Conv2d(64, C, 3, bias=False)
    with torch.no_grad():
        conv.weight[0] = torch.randn(64, 1, 1) * torch.tensor([1.0, -2.0, 1.0])
    x = (100 + torch.randn(2, 64, 9, 9)).to(dtype)
    y = conv.to(dtype)(x)
    assert padding_of(trace.Convolution(conv, x), y) == trace.Convolution(conv, x).geometry
    assert padding_of(trace.Convolution(conv, x), y * 1.1) is None


# --- convolutions that pad in their own forward


class Padding(nn.Conv2d):
    """Pads its input by the same amount always, and says nothing of it."""

    def __init__(self, *args, amount=(1, 1, 1, 1), mode="constant", **kwargs):
        super().__init__(*args, **kwargs)
        self.amount, self.mode = amount, mode

    def forward(self, x):
        return super().forward(F.pad(x, self.amount, self.mode))


def adaptive(**kwargs):
    return MODELS.build(dict(type="Conv2dAdaptivePadding", in_channels=4, out_channels=C, **kwargs))


def timms(**kwargs):
    return pytest.importorskip("timm.layers").Conv2dSame(4, C, **kwargs)


OWN_PADDING = {
    "adaptive": lambda: adaptive(kernel_size=3, stride=2),
    "adaptive-5": lambda: adaptive(kernel_size=5, stride=2, bias=False),
    "adaptive-dilated": lambda: adaptive(kernel_size=3, dilation=2),
    "adaptive-pointwise": lambda: adaptive(kernel_size=1),
    "timm": lambda: timms(kernel_size=4, stride=3),
    "constant": lambda: Padding(4, C, 3, stride=2),
    "wide": lambda: Padding(4, C, 3, stride=2, amount=(3, 3, 3, 3)),
    "reflect": lambda: Padding(4, C, 3, amount=(2, 2, 2, 2), mode="reflect"),
    "circular": lambda: Padding(4, C, 3, stride=2, mode="circular"),
    "besides": lambda: Padding(4, C, 3, padding=1, dilation=2),
}


class Inputs(torch.overrides.TorchFunctionMode):
    """Holds what the last convolution got."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d:
            self.seen = args[0]
        return function(*args, **(kwargs or {}))


class Explicit(nn.Module):
    """A plain convolution with the filters of another, of what that one makes of its input by padding."""

    def __init__(self, own):
        super().__init__()
        self.plain = nn.Conv2d(
            4, C, own.kernel_size, own.stride, own.padding, own.dilation, bias=own.bias is not None
        ).to(own.weight)
        self.plain.load_state_dict(own.state_dict())
        self.own = [own.eval()]

    def forward(self, x):
        with torch.no_grad(), Inputs() as inputs:
            self.own[0](x)
        return self.plain(inputs.seen)


@pytest.mark.parametrize("kind", OWN_PADDING)
def test_equals_a_convolution_behind_a_padding_that_all_can_see(kind):
    conv = OWN_PADDING[kind]().to(DEVICE, torch.float64)
    net = Pair(conv, CBN(C, buffer_num=2).to(DEVICE, torch.float64))
    wanted = Pair(Explicit(copy.deepcopy(conv)), copy.deepcopy(net.norm))
    xs = [batch(size=size) for size in [(9, 8), (9, 8), (8, 7), (12, 15), (9, 8)]]
    for got, want in zip(train(net, xs), train(wanted, xs), strict=True):
        close(list(got.values()), list(want.values()))
    assert lengths(net.norm) == {0: 2}


@pytest.mark.parametrize("event", [new_weights, evaluation])
def test_an_iteration_ends_without_a_backward_pass(event):
    """Outputs that somebody still holds are not levels of one head if the weights have changed since."""
    net = pair(buffer_num=2)
    held = []
    for x in batches(3):
        held.append(net(x))
        event(net)
    assert lengths(net.norm) == {0: 2}
    assert net.norm.cbn_calls == 3
    held += [net(x) for x in batches(2)]  # these are
    assert lengths(net.norm) == {0: 2, 1: 1}


class Checkpointed(nn.Module):
    def __init__(self, net, use_reentrant):
        super().__init__()
        self.net, self.use_reentrant = net, use_reentrant

    def forward(self, x):
        return checkpoint(self.net, x.requires_grad_(), use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("settings", [{}, {"burnin": 2}, {"buffer_num": 0}, {"act": "relu"}], ids=str)
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved-tensors"])
def test_activation_checkpointing_changes_nothing(use_reentrant, settings):
    bare = nn.Sequential(pair(**settings), nn.Tanh(), nn.Conv2d(C, 4, 1).double(), pair(**settings))
    kept = copy.deepcopy(bare)
    xs = batches(6)
    got = train(bare, xs, forward=Checkpointed(bare, use_reentrant))
    same(got, train(kept, xs))
    same(bare.state_dict(), kept.state_dict())


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved-tensors"])
def test_checkpointing_of_a_shared_head_is_refused(use_reentrant):
    net = pair()
    forward = Checkpointed(net, use_reentrant)
    ys = [forward(x) for x in batches(3)]
    with pytest.raises(ValueError, match=r"called 3 times .*with_cp=False"):
        sum(y.sum() for y in ys).backward()
    net.norm.reset_history()
    y = forward(batch())
    y = forward(batch())  # a step that was skipped leaves the second of two calls clear
    y.sum().backward()


def test_checkpointing_around_the_norm_alone():
    bare, kept = pair(), pair()
    kept.load_state_dict(bare.state_dict())
    xs = batches(5)
    for use_reentrant in (True, False):
        got = train(bare, xs, forward=lambda x, r=use_reentrant: checkpoint(bare.norm, bare.conv(x), use_reentrant=r))
        same(got, train(kept, xs))
        same(bare.state_dict(), kept.state_dict())


@pytest.mark.parametrize("where", ["conv", "norm", "both"])
@pytest.mark.parametrize("geometry", ["1d", "2d", "3d"])
def test_hooks_for_gradients_change_nothing(where, geometry):
    """With a full backward hook, or under fully_shard, a layer gets a view of the tensor that was handed to it."""
    net, kept = pair(geometry), pair(geometry)
    kept.load_state_dict(net.state_dict())
    seen = []
    for layer in [net.conv, net.norm] if where == "both" else [getattr(net, where)]:
        layer.register_full_backward_hook(lambda module, of_input, of_output: seen.append(module))
    xs = [x.requires_grad_() for x in batches(3, geometry)]
    same(train(net, xs), train(kept, xs))
    assert seen


@pytest.mark.parametrize("part", [lambda y: y[:1], lambda y: y.flip(1), lambda y: y.transpose(2, 3)])
def test_a_part_of_an_output_is_no_output(part):
    net = pair()
    with pytest.raises(ValueError, match="must normalize the output of a convolution"):
        net.norm(part(net.conv(batch())))


# --- precision and layouts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_autocast(dtype, layout):
    net = pair(dtype=torch.float32)
    exact = copy.deepcopy(net).double()
    xs = [x.to(memory_format=layout) for x in batches(5, dtype=torch.float32)]

    def forward(x):
        with torch.autocast(DEVICE, dtype):
            out = net.conv(x)
            assert out.dtype == dtype
            y = net.norm(out)
        assert y.dtype == dtype
        assert y.stride() == out.stride()
        return y.float()

    got = train(net, xs, lr=0.01, forward=forward)
    want = train(exact, [x.double() for x in xs], lr=0.01)
    close(got[-1]["y"].double(), want[-1]["y"], rtol=0, atol=16 * torch.finfo(dtype).eps)
    assert {t.dtype for entries in net.norm._history.values() for e in entries for t in e} == {torch.float32}


def test_channels_last_and_contiguous_agree():
    net = pair(dtype=torch.float32)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    xs = batches(4, dtype=torch.float32)
    got = train(last, [x.to(memory_format=torch.channels_last) for x in xs])
    close(got, train(net, xs), rtol=1e-4, atol=1e-4)
    assert got[-1]["y"].is_contiguous(memory_format=torch.channels_last)


def test_parametrized_convolutions():
    """spectral_norm computes the weight from another parameter; that one decides what is trained."""
    net = pair(buffer_num=1)
    nn.utils.parametrizations.spectral_norm(net.conv)
    net.conv.double()
    for x in batches(3):
        net(x).sum().backward()
    assert lengths(net.norm) == {0: 1}
    net.conv.parametrizations.weight.original.requires_grad_(False)
    close(net(x), F.batch_norm(net.conv(x), None, None, net.norm.weight, net.norm.bias, training=True))


# --- state


def resumed(net, save):
    """A new model of the same kind with what the checkpoint of ``net`` holds."""
    file = io.BytesIO()
    torch.save(save(net), file)
    file.seek(0)
    fresh = pair(**SETTINGS)
    return fresh, torch.load(file, weights_only=True)


SETTINGS = {"buffer_num": 2, "burnin": 2}


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("with_mmengine", [False, True], ids=["torch", "mmengine"])
def test_a_resumed_run_goes_on_exactly(steps, with_mmengine):
    net = pair(**SETTINGS)
    xs = batches(steps + 4)
    train(net, xs[:steps])
    fresh, saved = resumed(net, get_state_dict if with_mmengine else nn.Module.state_dict)
    if with_mmengine:
        load_state_dict(fresh, saved, strict=True)
    else:
        fresh.load_state_dict(saved, strict=True)
    assert lengths(fresh.norm) == lengths(net.norm)
    same(train(fresh, xs[steps:]), train(net, xs[steps:]))  # a new optimizer for both
    same(fresh.state_dict(), net.state_dict())


def test_a_history_shares_nothing_with_the_checkpoint_it_came_from():
    net, other = pair(), pair()
    train(net, batches(2))
    saved = net.state_dict()
    other.load_state_dict(saved)
    for key, value in saved.items():
        if "history" in key:
            value.zero_()
    assert other.norm._history[0][0].var.min() > 0


def plain_bn():
    return nn.BatchNorm2d(C).double().state_dict()


@pytest.mark.parametrize("drop", [(), ("num_batches_tracked",)], ids=["bn", "official-cbn"])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_a_checkpoint_without_history_loads_and_starts_empty(drop, with_metadata):
    net = pair()
    train(net, batches(3))
    saved = plain_bn()
    for key in drop:
        del saved[key]
    if not with_metadata:
        saved = dict(saved)
    assert net.norm.load_state_dict(saved, strict=True) == ([], [])
    assert lengths(net.norm) == {}
    assert net.norm.cbn_calls == 0
    load_state_dict(net.norm, dict(saved), strict=True)


def test_what_a_plain_bn_finds_unexpected():
    net = pair()
    train(net, batches(2))
    missing, unexpected = nn.BatchNorm2d(C).load_state_dict(net.norm.state_dict(), strict=False)
    assert not missing
    assert {key.partition(".")[0] for key in unexpected} == {"cbn_calls", "history"}


def test_a_checkpoint_of_other_parts_leaves_the_history():
    net = pair()
    train(net, batches(2))
    net.load_state_dict({f"conv.{k}": v for k, v in net.conv.state_dict().items()}, strict=False)
    assert lengths(net.norm) == {0: 2}
    assert net.norm.cbn_calls == 2


def test_a_broken_history_is_refused():
    net = pair()
    train(net, batches(2))
    saved = net.state_dict()
    del saved["norm.history.0.1.var"]
    with pytest.raises(RuntimeError, match="history of norm: batch 1 of call 0 is incomplete"):
        net.load_state_dict(saved)
    other = Pair(nn.Conv2d(4, 2 * C, 3), CBN(2 * C))
    with pytest.raises(RuntimeError, match=r"\[6\] channels, but this layer has 12"):
        other.load_state_dict(net.state_dict())


def test_a_shorter_buffer_takes_the_newest():
    net, short = pair(buffer_num=3), pair(buffer_num=1)
    train(net, batches(3))
    short.load_state_dict(net.state_dict())
    assert lengths(short.norm) == {0: 1}
    same(short.norm._history[0][0], net.norm._history[0][0])


def test_a_history_of_other_filters_is_ignored():
    net = pair()
    train(net, batches(2))
    net.conv = nn.Conv2d(4, C, 1).double()
    x = batch()
    close(net(x), F.batch_norm(net.conv(x), None, None, net.norm.weight, net.norm.bias, training=True))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"]
)
def test_copies_carry_the_history_and_go_their_own_way(duplicate):
    net = pair()
    train(net, batches(3))
    net(batch())  # in the middle of an iteration
    twin = duplicate(net)
    net.norm._iteration = type(net.norm._iteration)()
    same(twin.state_dict(), net.state_dict())
    xs = batches(2)
    same(train(twin, xs), train(net, xs))
    assert twin.norm._history[0][0].mean is not net.norm._history[0][0].mean


@pytest.mark.parametrize("update_buffers", [True, False])
@pytest.mark.parametrize("before", [0, 2], ids=["new", "with-history"])
def test_moving_average_of_the_weights(before, update_buffers):
    """mmengine's EMA copies the model, and walks over state dicts and buffers of both in parallel."""
    net = pair()
    train(net, batches(before))
    twin = copy.deepcopy(net)
    average = ExponentialMovingAverage(net, momentum=0.5, update_buffers=update_buffers)
    xs = batches(3)
    optimizer = torch.optim.SGD(net.parameters(), 0.3, momentum=0.5)
    for seed, x in enumerate(xs):
        step(net, x, optimizer, seed)
        average.update_parameters(net)
    train(twin, xs)
    same(net.state_dict(), twin.state_dict())  # nothing of the model itself has changed
    assert not torch.equal(average.module.conv.weight, net.conv.weight)
    assert average.module.eval()(xs[0]).isfinite().all()


def test_moving_and_casting_take_the_history_along():
    net = pair()
    train(net, batches(2))
    assert {t.dtype for t in net.norm._history[0][0]} == {torch.float64}
    net.float()
    before = net.norm._history[0][0]
    assert {t.dtype for t in before} == {torch.float32}
    net.half()  # statistics are never rounded to half precision
    same(net.norm._history[0][0], before)
    net.to("meta")
    assert {t.device.type for t in net.norm._history[0][0]} == {"meta"}


def test_reset_history():
    net = pair(burnin=1)
    train(net, batches(3))
    net.norm.reset_history()
    assert lengths(net.norm) == {}
    train(net, batches(1))
    assert lengths(net.norm) == {0: 1}  # burn-in is over


# --- finding the convolution


def transposed():
    return nn.Sequential(nn.ConvTranspose2d(4, C, 3), CBN(C))


def in_place():
    return nn.Sequential(nn.Conv2d(4, C, 3), nn.ReLU(inplace=True), CBN(C))


def between():
    return nn.Sequential(nn.Conv2d(4, C, 3), nn.ReLU(), CBN(C))


def without():
    return nn.Sequential(nn.Linear(9, 9), CBN(4))


class Halved(nn.Module):
    """Does something by a function, which no hook hears of."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, C, 3), CBN(C)

    def __getitem__(self, _):
        return self.norm

    def forward(self, x):
        return self.norm(self.conv(x) / 2)


def twice():
    return nn.Sequential(nn.Conv2d(4, C, 3), CBN(C), CBN(C))


def frozen_in_evaluation():
    return nn.Sequential(nn.Conv2d(4, C, 3).eval(), CBN(C))


class Doubled(nn.Conv2d):
    """A convolution that does not use its weight as it is, and does not say so."""

    def forward(self, x):
        return self._conv_forward(x, self.weight * 2 + 0.1, self.bias)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (transposed, "transposed convolution"),
        (in_place, "changed in place"),
        (between, r"is none\. It is the output of torch\.nn\.modules\.activation\.ReLU\."),
        (without, r"\(2, 4, 7, 9\) that it got is none\. It is the output of torch\.nn\.modules\.linear\.Linear\."),
        (Halved, r"is none\. The last convolution before was Conv2d"),
        (twice, "is none"),
        (frozen_in_evaluation, "in training mode"),
        (lambda: nn.Sequential(Doubled(4, C, 3), CBN(C)), "standardized_weight"),
    ],
    ids=["transposed", "in-place", "between", "without", "no-module", "twice", "conv-in-eval", "other-weight"],
)
@pytest.mark.parametrize("burnin", [0, 5])
def test_what_is_not_the_output_of_a_convolution_is_refused_at_once(build, message, burnin):
    net = build()
    net[-1].burnin = burnin
    with pytest.raises(ValueError, match=message):
        net(batch(dtype=torch.float32))


def test_one_value_per_channel_is_refused():
    net = pair()
    with pytest.raises(ValueError, match=r"single value.*\(1, 6, 1, 1\)"):
        net(batch(n=1, size=(1, 1)))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"buffer_num": -1}, "buffer_num"),
        ({"burnin": 0.5}, "burnin"),
        ({"rho": 2.0}, "rho"),
        ({"eps_mode": "both"}, "'inside' and 'outside'"),
        ({"rule": "mean"}, "'drop' and 'max'"),
        ({"act": "rleu"}, "'relu'"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_arguments_out_of_range(argument, message):
    with pytest.raises(ValueError, match=message):
        CBN(C, **argument)


def test_wrong_number_of_channels():
    with pytest.raises(ValueError, match=r"6.*\(2, 16, 4, 4\)"):
        CBN(C)(torch.randn(2, 16, 4, 4))


def test_the_hook_holds_nothing_longer_than_needed():
    net = pair(dtype=torch.float32)
    x = batch(dtype=torch.float32)
    held = weakref.ref(x)
    conv_alone = nn.Conv2d(4, C, 3)
    y = conv_alone(x)
    assert trace._local.last.record[1] is x
    del y  # nobody can normalize it any more
    assert trace._local.last.record is None
    with torch.no_grad():
        net(x)
    assert trace._local.last.record is None
    del x
    assert held() is None
    net.eval()
    net(batch(dtype=torch.float32))
    assert trace._local.last.record is None


def test_the_hook_is_there_while_a_layer_trains():
    """torch.compile warns about such hooks and every module pays for one: none for inference, none left behind."""
    gc.collect()
    before = len(trace._followers)  # of other tests: a traceback may hold some
    net, other = pair(), pair()
    assert len(trace._followers) == before + 2
    copied = copy.deepcopy(net).eval()
    again = copy.deepcopy(copied)
    assert len(trace._followers) == before + 2
    again.train().train()
    assert len(trace._followers) == before + 3
    other.eval()
    del net, again
    assert len(trace._followers) == before
    assert (trace._hook is None) == (before == 0)
    assert before or not nn.modules.module._global_forward_hooks
    other.train()(batch())
    copied(batch())


def test_threads_do_not_meet():
    nets = [pair() for _ in range(2)]
    twins = [copy.deepcopy(net) for net in nets]
    xs = [batches(4) for _ in nets]
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(train, nets, xs))
    same(got, [train(net, x) for net, x in zip(twins, xs, strict=True)])


def test_inference_compiles():
    net = pair(dtype=torch.float32).eval()
    x = batch(dtype=torch.float32)
    close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), net(x))


@pytest.mark.filterwarnings("ignore:Using `torch.compile.* when there are global hooks")
def test_training_in_a_compiled_model_breaks_the_graph_and_nothing_else():
    net = nn.Sequential(pair(), nn.ReLU(), nn.Conv2d(C, 4, 1).double(), pair())
    twin, xs = copy.deepcopy(net), batches(4)
    close(train(net, xs, forward=torch.compile(net, backend="aot_eager")), train(twin, xs))
    close(net.state_dict(), twin.state_dict())


# --- the toolkits


def test_conversion_to_sync_bn_is_no_silent_end():
    net = pair()
    for convert in (convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm):
        with pytest.raises(ValueError, match="statistics of earlier iterations"):
            convert(net)
    assert type(revert_sync_batchnorm(net).norm) is CBN
    assert type(SyncBatchNorm.convert_sync_batchnorm(net).norm) is CBN
    assert type(convert_sync_batchnorm(net.eval()).norm) is nn.SyncBatchNorm  # then the same numbers


def test_repr_and_state_dict():
    assert "buffer_num=3, burnin=8, rho=0.5" in repr(CBN(C, burnin=8, rho=0.5))
    assert set(CBN(C).state_dict()) == {*nn.BatchNorm2d(C).state_dict(), "cbn_calls"}
    assert not CBN(C, affine=False).state_dict().keys() & {"weight", "bias"}


NORM = {"type": "CBN", "buffer_num": 2, "burnin": 1}
R18 = {"type": "mmdet.ResNet", "depth": 18, "base_channels": 8, "norm_eval": False, "norm_cfg": NORM}


def tensor(*shape):
    return torch.randn(*shape, device=DEVICE)


def pyramid(channels):
    return tuple(tensor(2, c, s, s) for c, s in zip(channels, (32, 16, 8, 4), strict=True))


MODELS_WITH_CBN = {
    "resnet": (R18, lambda: tensor(2, 3, 64, 64)),
    "resnet-bottleneck": (R18 | {"depth": 50, "style": "caffe"}, lambda: tensor(2, 3, 64, 64)),
    "resnet-checkpointed": (R18 | {"with_cp": True}, lambda: tensor(2, 3, 64, 64)),
    "resnet-ws": (R18 | {"conv_cfg": {"type": "ConvWS"}}, lambda: tensor(2, 3, 64, 64)),
    "efficientnet": (
        {"type": "mmdet.EfficientNet", "arch": "b0", "norm_cfg": NORM, "norm_eval": False, "out_indices": (2, 3)},
        lambda: tensor(2, 3, 65, 64),
    ),
    "fpn": (
        {"type": "mmdet.FPN", "in_channels": [4, 8, 8, 16], "out_channels": 8, "num_outs": 5, "norm_cfg": NORM},
        lambda: pyramid((4, 8, 8, 16)),
    ),
    "box-head": (
        {
            "type": "mmdet.Shared4Conv1FCBBoxHead",
            "in_channels": 8,
            "conv_out_channels": 8,
            "fc_out_channels": 16,
            "num_classes": 3,
            "norm_cfg": NORM,
        },
        lambda: tensor(6, 8, 7, 7),
    ),
    "mask-head": (
        {
            "type": "mmdet.FCNMaskHead",
            "num_convs": 4,
            "in_channels": 8,
            "conv_out_channels": 8,
            "num_classes": 3,
            "norm_cfg": NORM,
        },
        lambda: tensor(3, 8, 14, 14),
    ),
    "shared-head": (
        {
            "type": "mmdet.FCOSHead",
            "num_classes": 3,
            "in_channels": 8,
            "feat_channels": 8,
            "stacked_convs": 2,
            "norm_cfg": NORM,
        },
        lambda: (*pyramid((8, 8, 8, 8)), tensor(2, 8, 2, 2)),
    ),
    "resnet3d": (
        {
            "type": "mmaction.ResNet3d",
            "depth": 18,
            "base_channels": 8,
            "pretrained": None,
            "conv1_kernel": (1, 7, 7),
            "norm_eval": False,
            "norm_cfg": NORM,
        },
        lambda: tensor(2, 3, 4, 32, 32),
    ),
    "resnet2plus1d": (
        {
            "type": "ResNet2Plus1d",
            "_scope_": "mmaction",
            "depth": 18,
            "base_channels": 8,
            "pretrained": None,
            "conv1_kernel": (1, 7, 7),
            "pretrained2d": False,
            "conv_cfg": {"type": "Conv2plus1d"},
            "norm_eval": False,
            "norm_cfg": NORM,
        },
        lambda: tensor(2, 3, 4, 32, 32),
    ),
}


def flat(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [t for o in outputs if o is not None for t in flat(o)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS_WITH_CBN)
@pytest.mark.filterwarnings("ignore:.*use_reentrant")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_stock_models_train_from_a_bare_norm_cfg(name):
    scope = "mmaction" if name in ("resnet3d", "resnet2plus1d") else "mmdet"
    pytest.importorskip(f"{scope}.models")
    config, draw = MODELS_WITH_CBN[name]
    with DefaultScope.overwrite_default_scope(scope):  # heads name their losses without one
        net = MODELS.build(copy.deepcopy(config)).to(DEVICE)
    net.train()
    norms = {path: m for path, m in net.named_modules() if isinstance(m, CBN)}
    assert len(norms) >= 4
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(4):
        optimizer.zero_grad()
        outputs = flat(net(draw()))
        sum(y.square().mean() for y in outputs).backward()
        assert all(m.weight.grad.isfinite().all() for m in norms.values())
        optimizer.step()
    levels = 5 if name == "shared-head" else 1
    for path, norm in norms.items():
        assert lengths(norm) == dict.fromkeys(range(levels), 2), path
        assert norm.cbn_calls == 4
        assert norm.num_batches_tracked == 4 * levels


# --- refused when a model is built


def conv_cfg(name):
    return lambda: MODELS.build(dict(type=name, in_channels=4, out_channels=C, kernel_size=3))


NO_CONVOLUTIONS = {
    "DCN": (conv_cfg("DCN"), r"It is the output of mmcv\S+\.DeformConv2dPack\(4, 6, kernel_size=\(3, 3\)\)"),
    "DCNv2": (conv_cfg("DCNv2"), r"It is the output of mmcv\S+\.ModulatedDeformConv2dPack\(4, 6"),
    "ConvAWS": (conv_cfg("ConvAWS"), r"follows ConvAWS2d\(4, 6"),
    "NormedConv2d": (conv_cfg("mmdet.NormedConv2d"), r"follows NormedConv2d\(4, 6"),
    "transposed": (lambda: nn.ConvTranspose2d(4, C, 3), "transposed convolution"),
    "other-weight": (lambda: Doubled(4, C, 3), "standardized_weight"),
}


@pytest.mark.parametrize("name", NO_CONVOLUTIONS)
def test_what_is_no_convolution_is_refused_when_the_model_is_built(name):
    pytest.importorskip("mmdet.models")
    build, message = NO_CONVOLUTIONS[name]
    for net in (nn.Sequential(build(), CBN(C)), nn.ModuleDict({"conv2": build(), "bn2": CBN(C)})):
        at = ("1", "0") if isinstance(net, nn.Sequential) else ("bn2", "conv2")
        state = torch.get_rng_state()
        with pytest.raises(ValueError, match=f"{at[0]} cannot be CBN behind {at[1]}. .*{message}"):
            adapt(net)
        assert torch.equal(torch.get_rng_state(), state)
        adapt(net.eval())


def test_what_trains_is_built():
    for own in OWN_PADDING.values():
        adapt(nn.Sequential(own(), CBN(C)))
    adapt(nn.Sequential(nn.Linear(4, 4), CBN(C)))
    adapt(nn.Sequential(CBN(4), nn.Conv2d(4, C, 3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"layer4\.0\.bn2 cannot be CBN behind layer4\.0\.conv2\. .*\.ModulatedDeformConv2dPack\(64, 64"),
        ({"norm_eval": True}, ""),  # the statistics of its batches are not asked for
        ({"norm_cfg": NORM | {"buffer_num": 0}}, ""),  # batch normalization
    ],
)
def test_a_backbone_with_deformable_convolutions(settings, message):
    pytest.importorskip("mmdet.models")
    dcn = {"dcn": dict(type="DCNv2", deform_groups=1), "stage_with_dcn": (False, False, False, True), "depth": 50}
    if not message:
        assert len(MODELS.build(R18 | dcn | settings).layer4) == 3
        return
    with pytest.raises(ValueError, match=message):
        MODELS.build(R18 | dcn | settings)
    head = dict(type="mmdet.FPN", in_channels=[4], out_channels=8, num_outs=1, norm_cfg=NORM)
    with pytest.raises(ValueError, match=r"lateral_convs\.0\.bn cannot be CBN behind lateral_convs\.0\.conv\. "):
        MODELS.build(head | {"conv_cfg": dict(type="DCNv2")})
