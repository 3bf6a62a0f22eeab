"""FRN: eps of each kind, tiny maps, invariants, without its threshold, other packages' checkpoints and numbers, op."""

import copy
import warnings

import pytest
import torch
from cases import DEVICE, frn
from torch import nn

import normplug.ops._blocks
from normplug import ops
from normplug.layers import FilterResponseNorm

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])


def shaken(layer):
    for p in layer.parameters():
        nn.init.normal_(p, mean=1.0)
    return layer.to(DEVICE)


def parameters64(layer):
    return {name: p.detach().double() for name, p in layer.named_parameters()}


# --- values


@LAYOUTS
@pytest.mark.parametrize("mean", [0, 1000])
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_value_and_gradients_at_the_eps_of_the_paper_and_of_mmcv(eps, mean, layout):
    layer = shaken(FilterResponseNorm(8, eps=eps))
    x = (mean + torch.randn(2, 8, 9, 7, device=DEVICE)).to(memory_format=layout).requires_grad_()
    dy = torch.randn_like(x)
    x64 = x.detach().double().requires_grad_()
    p64 = {name: p.requires_grad_() for name, p in parameters64(layer).items()}
    y, y64 = layer(x), frn(eps)(x64, **p64)
    got = (y, *torch.autograd.grad(y, [x, *layer.parameters()], dy))
    want = (y64, *torch.autograd.grad(y64, [x64, *p64.values()], dy.double()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=0, atol=2e-6 * w.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_square_of_a_half_does_not_overflow(dtype):
    x = torch.full((1, 2, 4, 4), 300.0, dtype=dtype, device=DEVICE)  # 300² is beyond float16
    assert (FilterResponseNorm(2).to(DEVICE)(x) == 1).all()


def test_maps_of_zeros_are_at_the_threshold_and_pass_no_gradient():
    layer = FilterResponseNorm(2).to(DEVICE)
    x = torch.zeros(1, 2, 3, 3, device=DEVICE, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y == 0).all()
    assert (x.grad == 0).all()
    assert (layer.tau.grad == 9).all()
    assert (layer.bias.grad == 0).all()


def test_limits():
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64, device=DEVICE)
    weight, bias, tau = torch.randn(3, 4, dtype=torch.float64, device=DEVICE)
    plain = ops.filter_response_norm(x, weight, bias, None)
    torch.testing.assert_close(ops.filter_response_norm(x, weight, bias, 0 * tau), plain.relu(), rtol=0, atol=0)
    torch.testing.assert_close(ops.filter_response_norm(x, weight, bias, tau - 1e9), plain, rtol=0, atol=0)
    for scale in (7, -7):
        x_hat, other = (ops.filter_response_norm(s * x, weight, 0 * bias, None, 0.0) for s in (1, scale))
        torch.testing.assert_close(other, x_hat * (1 if scale > 0 else -1))


def test_without_eps_the_gradient_is_orthogonal_to_the_input():
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight, bias, tau = torch.randn(3, 4, dtype=torch.float64, device=DEVICE)
    y = ops.filter_response_norm(x, weight, bias, tau, 0.0)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert (x * dx).sum((2, 3)).abs().max() < 1e-12
    assert dx.abs().max() > 0.1


# --- eps


def test_learned_eps():
    layer = FilterResponseNorm(4, learnable_eps=True)
    assert layer.eps == 1e-6
    assert layer.eps_l.shape == (1,)
    assert FilterResponseNorm(4, learnable_eps=True, eps_per_channel=True).eps_l.shape == (4,)
    assert "eps_l" not in dict(FilterResponseNorm(4).named_parameters())
    torch.testing.assert_close(layer.eps_l, torch.full((1,), 1e-4))
    nn.init.constant_(layer.eps_l, -3)  # what is added is its magnitude: the root stays real
    x = torch.zeros(1, 4, 2, 2).index_fill_(1, torch.tensor([0]), 1.0)
    torch.testing.assert_close(layer(x)[0, 0], torch.full((2, 2), 0.5), rtol=1e-6, atol=0)
    layer.reset_parameters()
    torch.testing.assert_close(layer.eps_l, torch.full((1,), 1e-4))
    with pytest.raises(ValueError, match=r"eps_per_channel=True.*learnable_eps=True"):
        FilterResponseNorm(4, eps_per_channel=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_learned_eps_in_a_half_model(dtype):
    layer = FilterResponseNorm(1, learnable_eps=True).to(DEVICE, dtype)
    x = torch.full((1, 1, 1, 1), 1e-2, device=DEVICE, dtype=dtype)
    want = x.double() / (x.double() ** 2 + 1e-6 + layer.eps_l.detach().double()).sqrt()
    torch.testing.assert_close(layer(x), want.to(dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("eps", "at", "slope"), [(1e-6, 1.0, 1e-6), (1e-6, 1e-4, 985.0), (1e-2, 1.0, 0.00985)])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_a_map_of_one_value_gives_a_smooth_sign(eps, at, slope, learned):
    x = torch.tensor([[at]], dtype=torch.float64, device=DEVICE, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64, device=DEVICE)
    y = ops.filter_response_norm(x, one, 0 * one, None, eps * one if learned else eps)
    y.backward()
    torch.testing.assert_close(y.item(), at / (at * at + eps) ** 0.5)
    assert x.grad.item() == pytest.approx(slope, rel=1e-3)


def test_a_map_of_one_value_is_warned_of():
    x = torch.randn(2, 8, 1, 1)
    with pytest.warns(UserWarning, match=r"\(2, 8, 1, 1\).*eps=1e-06.*learnable_eps=True"):
        FilterResponseNorm(8)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FilterResponseNorm(8, eps=1e-2)(x)
        FilterResponseNorm(8, learnable_eps=True)(x)
        FilterResponseNorm(8)(torch.randn(2, 8, 1, 2))


# --- without its activation


@pytest.mark.parametrize("converted", [False, True], ids=["built", "converted"])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_without_activation_it_normalizes_still(converted, learned):
    layer = FilterResponseNorm(8, apply_act=converted, learnable_eps=learned)
    if converted:
        layer.drop_activation()
        layer.drop_activation()  # once more changes nothing
    shaken(layer)
    assert "tau" not in dict(layer.named_parameters())
    assert not layer.contains_activation
    assert FilterResponseNorm.contains_activation
    assert "apply_act=False" in repr(layer)
    layer.reset_parameters()
    shaken(layer)
    x = torch.randn(2, 8, 5, 5, device=DEVICE)
    torch.testing.assert_close(layer(x).double(), frn()(x.double(), **parameters64(layer)), rtol=1e-6, atol=1e-6)
    assert layer(x).min() < 0


# --- checkpoints


def test_plain_norms_checkpoint_leaves_tau():
    stock, layer = nn.GroupNorm(4, 8), FilterResponseNorm(8)
    nn.init.normal_(stock.bias)
    nn.init.constant_(layer.tau, -2)
    layer.load_state_dict(stock.state_dict(), strict=True)
    assert torch.equal(layer.bias, stock.bias)
    assert (layer.tau == -2).all()
    FilterResponseNorm(8, apply_act=False).load_state_dict(stock.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="running_mean"):
        layer.load_state_dict(nn.BatchNorm2d(8).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected.*tau"):
        FilterResponseNorm(8, apply_act=False).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing.*eps_l"):
        FilterResponseNorm(8, learnable_eps=True).load_state_dict(layer.state_dict())


class PytorchFRN(nn.Module):
    """gupta-abhay's pytorch-frn: eps is a parameter, learned or not."""

    def __init__(self, channels, eps):
        super().__init__()
        for name, value in dict(gamma=1.3, beta=-0.2, tau=0.1, eps=eps).items():
            setattr(self, name, nn.Parameter(torch.full((1, channels, 1, 1), value) * (1 + torch.rand(channels, 1, 1))))

    def forward(self, x):
        x = x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + self.eps.abs())
        return torch.max(self.gamma * x + self.beta, self.tau)


def test_takes_the_checkpoint_of_pytorch_frn():
    theirs, x = PytorchFRN(8, 0.3), torch.randn(2, 8, 5, 5)
    ours = FilterResponseNorm(8, learnable_eps=True, eps_per_channel=True)
    given = theirs.state_dict()
    ours.load_state_dict(given, strict=True)
    assert set(given) == {"gamma", "beta", "tau", "eps"}  # the caller's dict is as it was
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    nn.init.constant_(theirs.eps, 1e-6)
    ours = FilterResponseNorm(8)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), theirs(x))
    with pytest.raises(RuntimeError, match=r"checkpoint is 1e-06.*eps=1e-05"):
        FilterResponseNorm(8, eps=1e-5).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("apply_act", [True, False])
def test_timm_computes_the_same(apply_act):
    timm = pytest.importorskip("timm.layers")
    theirs = shaken(timm.FilterResponseNormTlu2d(16, apply_act=apply_act))
    ours = FilterResponseNorm(16, eps=1e-5, apply_act=apply_act).to(DEVICE)  # timm's default
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(4, 16, 6, 6, device=DEVICE, requires_grad=True)
    dy, results = torch.randn_like(x), []
    for layer in (ours, theirs):
        y = layer(x)
        results.append((y, *torch.autograd.grad(y, [x, *(p for _, p in sorted(layer.named_parameters()))], dy)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


# --- what the toolkits do to norms


def test_toolkits_take_it_for_a_norm_but_not_for_a_batch_norm():
    cnn = pytest.importorskip("mmcv.cnn")
    from mmengine.model import revert_sync_batchnorm

    name, layer = cnn.build_norm_layer(dict(type="FRN", requires_grad=False), 8, postfix=3)
    assert name == "frn3"
    assert layer.eps == 1e-5  # mmcv's, whatever the class says
    assert not any(p.requires_grad for p in layer.parameters())
    assert cnn.is_norm(layer)
    model, x = nn.Sequential(nn.Conv2d(4, 8, 3), shaken(FilterResponseNorm(8)).cpu()).eval(), torch.randn(2, 4, 6, 6)
    for convert in (cnn.fuse_conv_bn, nn.SyncBatchNorm.convert_sync_batchnorm, revert_sync_batchnorm):
        other = convert(copy.deepcopy(model))
        assert type(other[1]) is FilterResponseNorm
        assert torch.equal(other(x), model(x))


# --- the op


def arguments(layout, dtype=torch.float64, shape=(2, 4, 2, 3)):
    x = torch.randn(shape, device=DEVICE).to(dtype).to(memory_format=layout).requires_grad_()
    return x, *(torch.randn(shape[1], device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3))


@LAYOUTS
@pytest.mark.parametrize("block", [None, 1, 12], ids=lambda b: f"blocks-{b or 'default'}")
def test_gradients(layout, block, monkeypatch):
    if block:  # single maps or samples, and several at a time
        monkeypatch.setattr(normplug.ops._blocks, "BLOCK", block)
    args = arguments(layout)
    torch.testing.assert_close(ops.filter_response_norm(*args), frn()(*args))
    assert torch.autograd.gradcheck(ops.filter_response_norm, args)
    assert torch.autograd.gradcheck(lambda *a: ops.filter_response_norm(*a, None), args[:3])
    for size in (1, 4):
        eps = torch.rand(size, dtype=torch.float64, device=DEVICE, requires_grad=True)
        assert torch.autograd.gradcheck(ops.filter_response_norm, (*args, eps))


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_is_well_formed(layout, dtype):
    args = (*arguments(layout, dtype, (3, 6, 5, 7)), 1e-6)
    op = torch.ops.normplug.filter_response_norm.default
    torch.library.opcheck(op, args)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    assert [t.stride() for t in op(*meta)] == [t.stride() for t in op(*args)]  # opcheck looks at strides on CUDA only
    with pytest.raises(ValueError, match=r"\(N, C, \*\)"):
        ops.filter_response_norm(args[0][0, 0, 0], *args[1:4])


@LAYOUTS
def test_backward_keeps_the_input_and_statistics_only(layout):
    layer, kept = FilterResponseNorm(8).to(DEVICE), []
    x = torch.randn(2, 8, 16, 16, device=DEVICE).to(memory_format=layout).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    (large,) = [t for t in kept if t.numel() > 64]
    assert large.data_ptr() == x.data_ptr()


def test_an_empty_batch_goes_both_ways():
    for layer in (FilterResponseNorm(8), FilterResponseNorm(8, learnable_eps=True)):
        for shape in [(0, 8, 4, 4), (0, 8), (2, 8, 0, 4)]:
            x = torch.randn(shape, requires_grad=True)
            layer(x).sum().backward()
            assert x.grad.shape == shape
        assert all(p.grad.eq(0).all() for p in layer.parameters())
