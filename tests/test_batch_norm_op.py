"""The parts of batch normalization: sums, normalization, gradients for statistics that follow x in part, schemas."""

import pytest
import torch
from cases import BFLOAT16_ULPS, DEVICE
from torch.nn import functional as F

from normplug.ops.batch_norm import (
    batch_norm_act,
    batch_norm_dx,
    batch_norm_reduce,
    batch_norm_stats,
    batch_normalize,
)

LAYOUTS = [torch.contiguous_format, torch.channels_last]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
each_act = pytest.mark.parametrize("act", [None, "relu", "leaky_relu", "silu", "gelu"])
with_and_without_residual = pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])


def tensor(*shape, layout=torch.contiguous_format, dtype=torch.float64):
    x = torch.randn(*shape, dtype=dtype, device=DEVICE)
    return x.to(memory_format=layout) if x.ndim == 4 else x


def per_channel(v, x):
    return v.view(1, -1, *[1] * (x.ndim - 2))


def moments(x):
    rest = (0, *range(2, x.ndim))
    mean = x.mean(rest)
    return mean, (x - per_channel(mean, x)).square().mean(rest)


def formula(x, mean, rstd, weight, bias, act, residual):
    z = (x - per_channel(mean, x)) * per_channel(rstd, x)
    if weight is not None:
        z = z * per_channel(weight, x)
    if bias is not None:
        z = z + per_channel(bias, x)
    if residual is not None:
        z = z + residual
    return z if act is None else getattr(F, act)(z)


def gradients(y, inputs, dy):
    return torch.autograd.grad(y, [t for t in inputs if t is not None], dy)


@each_layout
@pytest.mark.parametrize("mean", [0, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sums_of_many_values_with_a_large_mean(layout, mean, dtype):
    """2 x 50 x 76 values: sums in one float32 accumulator are off by 2e-3 at mean 1000, E[x²] - E[x]² by 1."""
    x = (mean + torch.randn(2, 32, 50, 76)).to(DEVICE, dtype).to(memory_format=layout)
    got_mean, m2 = batch_norm_stats(x)
    want_mean, want_var = moments(x.double())
    assert got_mean.dtype == m2.dtype == torch.float32
    torch.testing.assert_close(got_mean.double(), want_mean, rtol=1e-7, atol=2e-7)
    torch.testing.assert_close(m2.double() / (2 * 50 * 76), want_var, rtol=2e-6, atol=0)


@each_layout
def test_large_mean(layout):
    x = (1000 + torch.randn(2, 32, 50, 76)).to(DEVICE).to(memory_format=layout)
    y, _, _ = batch_norm_act(x)
    want = formula(x.double(), moments(x.double())[0], (moments(x.double())[1] + 1e-5).rsqrt(), *[None] * 4)
    # x itself is rounded to 2**-14; the mean and the shift by it can be off by as much
    torch.testing.assert_close(y.double(), want, rtol=0, atol=2e-4)


@each_act
@with_and_without_residual
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@each_layout
def test_batch_norm_act(act, with_residual, affine, layout):
    x = tensor(3, 4, 3, 5, layout=layout).requires_grad_()
    residual = tensor(3, 4, 3, 5, layout=layout).requires_grad_() if with_residual else None
    weight, bias = (tensor(4).requires_grad_() if affine else None for _ in range(2))
    mean, var = moments(x)
    want = formula(x, mean, (var + 1e-3).rsqrt(), weight, bias, act, residual)
    y, got_mean, got_var = batch_norm_act(x, weight, bias, 1e-3, act, residual)
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close((y, got_mean, got_var), (want, mean, var))
    assert not got_mean.requires_grad
    assert not got_var.requires_grad
    inputs, dy = (x, weight, bias, residual), torch.randn_like(y)
    for got, expected in zip(gradients(y, inputs, dy), gradients(want, inputs, dy), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("under", ["eager", "functorch"])
def test_variance_with_bessels_correction(under):
    x = torch.randn(3, 4, 5, 2, device=DEVICE)

    def go(x):
        return batch_norm_act(x, act="relu", correction=1)

    y, _, var = go(x) if under == "eager" else torch.func.jvp(go, (x,), (x,))[0]
    torch.testing.assert_close(var, x.var((0, 2, 3)))
    torch.testing.assert_close(y, batch_norm_act(x, act="relu")[0])
    assert not batch_norm_act(x[:1, :, :1, :1], correction=1)[2].any()


@each_act
@with_and_without_residual
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 5), (2, 4, 3, 5), (2, 4, 2, 3, 3)], ids=str)
def test_statistics_that_follow_the_input_in_part(act, with_residual, shape):
    """The definition of the shares, by autograd: d mean = share * dx, d var = 2 * share * (x - mean) * dx."""
    x = tensor(*shape).requires_grad_()
    residual = tensor(*shape).requires_grad_() if with_residual else None
    weight, bias, mean, shares = tensor(4).requires_grad_(), tensor(4).requires_grad_(), tensor(4), torch.rand(2, 4)
    rstd, (mean_share, var_share) = 0.5 + tensor(4).abs(), shares.to(x) / 10
    rest, moved = (0, *range(2, x.ndim)), x - x.detach()
    following_mean = mean + mean_share * moved.sum(rest)
    d_var = 2 * var_share * ((x.detach() - per_channel(mean, x)) * moved).sum(rest)
    following_rstd = rstd - 0.5 * rstd**3 * d_var
    want = formula(x, following_mean, following_rstd, weight, bias, act, residual)
    y = batch_normalize(x, mean, rstd, weight, bias, act, residual, mean_share, var_share)
    torch.testing.assert_close(y, want)
    inputs, dy = (x, weight, bias, residual), torch.randn_like(y)
    for got, expected in zip(gradients(y, inputs, dy), gradients(want, inputs, dy), strict=True):
        torch.testing.assert_close(got, expected)


@each_act
def test_constant_statistics(act):
    x, residual, weight, bias = (tensor(*s).requires_grad_() for s in ((2, 4, 3), (2, 4, 3), (4,), (4,)))
    mean, rstd = tensor(4), tensor(4).exp()
    assert torch.autograd.gradcheck(
        lambda x, w, b, r: batch_normalize(x, mean, rstd, w, b, act, r), (x, weight, bias, residual), fast_mode=True
    )


@pytest.mark.parametrize("act", [None, "silu"])
@with_and_without_residual
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_layout
def test_half_precision_is_rounded_once(act, with_residual, dtype, layout):
    x = (10 + tensor(3, 6, 7, 5, layout=layout)).to(dtype).requires_grad_()
    residual = tensor(3, 6, 7, 5, layout=layout).to(dtype).requires_grad_() if with_residual else None
    weight, bias = (tensor(6, dtype=torch.float32).requires_grad_() for _ in range(2))  # as under autocast
    y, _, _ = batch_norm_act(x, weight, bias, 1e-5, act, residual)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    twins = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias, residual)]
    mean, var = moments(twins[0])
    want = formula(twins[0], mean, (var + 1e-5).rsqrt(), *twins[1:3], act, twins[3])
    dy = torch.randn_like(y)
    got = (y, *gradients(y, (x, weight, bias, residual), dy))
    for g, w in zip(got, (want, *gradients(want, twins, dy.double())), strict=True):
        ulps = 64 if g.dtype != dtype else BFLOAT16_ULPS if dtype == torch.bfloat16 else 0.6
        torch.testing.assert_close(g.double(), w, rtol=0, atol=ulps * torch.finfo(g.dtype).eps * w.abs().max().item())


@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3, 5), (2, 4, 0, 5)], ids=str)
def test_empty_batch(act, shape):
    x, residual = (tensor(*shape).requires_grad_() for _ in range(2))
    weight, bias = (tensor(4).requires_grad_() for _ in range(2))
    y, mean, var = batch_norm_act(x, weight, bias, 1e-5, act, residual)
    assert y.shape == x.shape
    assert mean.tolist() == var.tolist() == [0] * 4
    dx, dweight, dbias, dresidual = gradients(y, (x, weight, bias, residual), torch.ones_like(y))
    assert dx.shape == dresidual.shape == x.shape
    assert dweight.tolist() == dbias.tolist() == [0] * 4


def test_a_constant_channel_stays_finite():
    x = torch.full((2, 4, 3, 3), 3.0, device=DEVICE, requires_grad=True)
    y, _, var = batch_norm_act(x)
    assert var.max() == 0
    assert torch.autograd.grad(y, x, torch.randn_like(y))[0].isfinite().all()
    assert y.abs().max() < 1e-3


def test_gradients_of_another_layout_and_of_one_value():
    x = tensor(2, 4, 3, 5, layout=torch.channels_last).requires_grad_()
    y, _, _ = batch_norm_act(x, act="relu")
    dy = tensor(2, 4, 3, 5)
    (same,) = torch.autograd.grad(y, x, dy.contiguous(memory_format=torch.channels_last), retain_graph=True)
    (other,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    torch.testing.assert_close(same, other, rtol=0, atol=0)
    assert other.is_contiguous(memory_format=torch.channels_last)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_only_what_is_asked_for_is_computed():
    x, weight = tensor(2, 4, 3), tensor(4).requires_grad_()
    y, _, _ = batch_norm_act(x, weight)
    (dweight,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert dweight.shape == (4,)
    residual = tensor(2, 4, 3).requires_grad_()
    y, _, _ = batch_norm_act(x, act="relu", residual=residual)
    (got,) = torch.autograd.grad(y, residual, torch.ones_like(y))
    torch.testing.assert_close(got, (y > 0).to(got.dtype))


def test_errors():
    x = tensor(2, 4, 3)
    with pytest.raises(ValueError, match=r"'rleu'.*'relu'"):
        batch_norm_act(x, act="rleu")
    with pytest.raises(ValueError, match="residual"):
        batch_norm_act(x, residual=tensor(2, 4, 2))
    with pytest.raises(ValueError, match=r"\(N, C, \*\)"):
        batch_norm_act(tensor(4))
    with pytest.raises(ValueError, match="together"):
        batch_normalize(x, tensor(4), tensor(4), mean_share=tensor(4))


@pytest.mark.parametrize("act", [None, "relu"])
@with_and_without_residual
@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, LAYOUTS[0]), (torch.bfloat16, LAYOUTS[1])], ids=["float-nchw", "bfloat-nhwc"]
)
def test_ops_are_well_formed(act, with_residual, dtype, layout):
    x, dy = (tensor(2, 6, 5, 7, layout=layout, dtype=dtype) for _ in range(2))
    residual = tensor(2, 6, 5, 7, layout=layout, dtype=dtype) if with_residual else None
    weight, bias, mean, share = (tensor(6, dtype=torch.float32) for _ in range(4))
    rstd = tensor(6, dtype=torch.float32).exp()
    parts = (dy, x, mean, rstd, weight, bias, act, residual)
    checked = [
        (batch_norm_stats, (x,)),
        (batch_norm_reduce, parts),
        (batch_norm_dx, (*parts, share, share)),
        (batch_norm_dx, (*parts, None, None)),
        (batch_normalize, (x, mean, rstd, weight, bias, act, residual, share, share)),
    ]
    for function, args in checked:
        op = getattr(torch.ops.normplug, function.__name__).default
        if function is batch_normalize:
            grads = [t.requires_grad_() if t is not None else None for t in (x, weight, bias, residual)]
            args = (grads[0], mean, rstd, *grads[1:3], act, grads[3], share, share)
        torch.library.opcheck(op, args)
        meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in args]
        fake, real = op(*meta), op(*args)
        for f, r in zip(*((t if isinstance(t, tuple) else (t,)) for t in (fake, real)), strict=True):
            assert f.stride() == r.stride()  # opcheck looks at strides on CUDA only
            assert f.dtype == r.dtype
