"""GroupNorm: sizes, errors, degenerate groups, residual, checkpoints of nn.GroupNorm, the op's schema.

On a CPU ATen does most of the work in full precision; what is said of values and gradients holds both ways.
"""

import importlib

import pytest
import torch
from cases import DEVICE, INTERPRETED
from torch import nn

from normplug.layers import GroupNorm
from normplug.ops import group_norm


def leave_to_op(monkeypatch):
    module = importlib.import_module("normplug.ops.group_norm")  # the package's attribute is the function
    monkeypatch.setattr(module, "_leave_to_aten", lambda x, num_groups: False)


@pytest.fixture(params=["aten", "op", "op-blocks-1", "op-blocks-12"])
def way(request, monkeypatch):
    """Who computes: ATen, or the op, also cut into blocks of single rows and groups, or of several."""
    if request.param != "aten":
        leave_to_op(monkeypatch)
    if "blocks" in request.param:
        monkeypatch.setattr("normplug.ops._blocks.BLOCK", int(request.param.rpartition("-")[2]))


def test_default_is_32_groups():
    assert GroupNorm(64).num_groups == 32
    assert GroupNorm(64, channels_per_group=16).num_groups == 4


def test_errors_name_what_works():
    with pytest.raises(ValueError, match=r"16 channels.*num_groups=32 \(the default\).*\[1, 2, 4, 8, 16\]"):
        GroupNorm(16)
    with pytest.raises(ValueError, match=r"channels_per_group=5.*\[1, 2, 4, 8, 16\]"):
        GroupNorm(16, channels_per_group=5)
    with pytest.raises(ValueError, match="exactly one of num_groups and channels_per_group"):
        GroupNorm(64, num_groups=32, channels_per_group=2)
    with pytest.raises(ValueError, match="exactly one of num_groups and channels_per_group"):
        GroupNorm(64, num_groups=None)
    with pytest.raises(ValueError, match="num_groups=0"):
        GroupNorm(64, num_groups=0)
    with pytest.raises(ValueError, match=r"'rleu'.*'relu'"):
        GroupNorm(64, act="rleu")
    with pytest.raises(ValueError, match="residual"):
        GroupNorm(64)(torch.zeros(2, 64, 4, 4), torch.zeros(2, 64, 2, 2))
    with pytest.raises(ValueError, match="divides 6"):
        group_norm(torch.zeros(2, 6), 4)


def test_stock_checkpoint_loads_both_ways():
    stock, ours = nn.GroupNorm(8, 64), GroupNorm(64, 8)
    nn.init.normal_(stock.weight)
    assert ours.load_state_dict(stock.state_dict(), strict=True)
    assert stock.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 64, 7, 7)
    torch.testing.assert_close(ours(x), stock(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.usefixtures("way")
def test_large_mean(layout):
    """Mean 1000, variance 1: what E[x²] - E[x]² in float32 gets wrong (torch's own channels-last CPU op does)."""
    x = (1000 + torch.randn(2, 32, 16, 16)).to(DEVICE).to(memory_format=layout).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y, want = group_norm(x, 8), nn.functional.group_norm(x64, 8)
    # x itself is rounded to 2**-14; the mean can be off by as much
    torch.testing.assert_close(y.double(), want, rtol=0, atol=2e-4)
    dy = torch.randn_like(x)
    (dx,), (dx64,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(want, x64, dy.double())
    torch.testing.assert_close(dx.double(), dx64, rtol=0, atol=2e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_a_group_of_one_value_gives_the_bias(layout):
    x = torch.randn(2, 6, 1, 1, device=DEVICE).to(memory_format=layout).requires_grad_()
    weight, bias = torch.randn(6, device=DEVICE), torch.randn(6, device=DEVICE)
    y = group_norm(x, 6, weight, bias)
    torch.testing.assert_close(y, bias.view(1, 6, 1, 1).expand(2, -1, -1, -1), rtol=0, atol=0)
    assert torch.autograd.grad(y.sum(), x)[0].abs().max() == 0


@pytest.mark.parametrize("act", [None, "relu", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.usefixtures("way")
def test_residual_and_activation_gradients(act, affine, layout):
    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64, device=DEVICE)

    x, residual = (tensor(2, 4, 3, 2).to(memory_format=layout).requires_grad_() for _ in range(2))
    weight, bias = (tensor(4).requires_grad_() if affine else None for _ in range(2))

    def op(x, weight, bias, residual):
        return group_norm(x, 2, weight, bias, 1e-5, act, residual)

    z = nn.functional.group_norm(x, 2, weight, bias) + residual
    want = z if act is None else getattr(nn.functional, act)(z)
    torch.testing.assert_close(op(x, weight, bias, residual), want)
    assert torch.autograd.gradcheck(op, (x, weight, bias, residual))


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="of the work on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_the_op_does_half_precision_and_large_channels_last_inputs(layout, dtype, monkeypatch):
    module, calls = importlib.import_module("normplug.ops.group_norm"), []
    op = module._call
    monkeypatch.setattr(module, "_call", lambda *args: calls.append(1) or op(*args))
    for size in (4, 64):
        monkeypatch.setattr(module, "FRESH", 4 * 8 * 16 * 16)
        x = torch.randn(1, 8, size, size, dtype=dtype).to(memory_format=layout)
        group_norm(x, 2, act="relu")
    half, last = dtype == torch.bfloat16, layout == torch.channels_last
    assert len(calls) == (2 if half else 1 if last else 0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_the_op_keeps_the_input_and_statistics_only(act, layout, monkeypatch):
    leave_to_op(monkeypatch)
    layer, kept = GroupNorm(8, 2, act=act).to(DEVICE), []
    x = torch.randn(2, 8, 16, 16, device=DEVICE).to(memory_format=layout).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    (large,) = [t for t in kept if t.numel() > 64]
    assert large.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_op_is_well_formed(act, with_residual, dtype, layout):
    x = torch.randn(2, 6, 5, 7, device=DEVICE, dtype=dtype).to(memory_format=layout).requires_grad_()
    residual = torch.randn_like(x).requires_grad_() if with_residual else None
    weight, bias = (torch.randn(6, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(2))
    op = torch.ops.normplug.group_norm.default
    torch.library.opcheck(op, (x, 3, weight, bias, 1e-5, act, residual))
    fake = op(x.to("meta"), 3, weight.to("meta"), bias.to("meta"), 1e-5, act, None)
    real = op(x, 3, weight, bias, 1e-5, act, None)
    assert [t.stride() for t in fake] == [t.stride() for t in real]  # opcheck looks at strides on CUDA only
