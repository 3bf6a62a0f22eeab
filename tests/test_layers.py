"""Every layer of the table against its formula in float64: values, gradients, dtypes, layouts, state, repr."""

import copy

import pytest
import torch
from cases import BFLOAT16_ULPS, CASES, DEVICE

import normplug  # noqa: F401
from normplug.registry import MODELS

SHAPES = [(2, 6), (2, 6, 5), (3, 6, 7, 5), (2, 6, 3, 5, 4), (0, 6, 4)]  # odd sizes, video, empty
# Allowed error, in units of the last place of the largest value. The wide types compute and keep their own last
# places: subtracting a mean of 10 costs a few of them (E[x²] - E[x]² costs hundreds). The half types compute in
# float32 and may be wrong by their one rounding only.
ULPS = {torch.float64: 16, torch.float32: 16, torch.float16: 0.6, torch.bfloat16: BFLOAT16_ULPS}
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def build(case, dtype=torch.float32):
    layer = MODELS.get(case.layer)(6, **case.kwargs)
    for p in layer.parameters():
        torch.nn.init.normal_(p, mean=1.0)  # left at one, a forgotten weight goes unnoticed
    return layer.to(DEVICE, dtype).train(case.training)


def compare(got, want, dtype, mean=0, condition=1):
    ulps = ULPS[dtype] * (4 * condition if mean and ULPS[dtype] > 1 else 1)
    for g, w in zip(got, want, strict=True):
        ulp = torch.finfo(dtype).eps * (w.abs().max().item() if w.numel() else 0.0)
        torch.testing.assert_close(g.double(), w, rtol=0, atol=ulps * ulp)


def value_and_gradients(layer, x, dy):
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)


@pytest.mark.parametrize("mean", [0, 10])  # a lost sign shows at 0, cancellation at 10
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ULPS, ids=str)
@each_case
def test_value_and_gradients(case, dtype, shape, mean):
    if shape == (2, 6) and not case.pairs:
        shape = (5, 6)
    layer = build(case, dtype)
    x = (mean + torch.randn(shape)).to(DEVICE, dtype).requires_grad_()
    dy = torch.randn_like(x)  # not y.sum(): a norm's gradient of that is about zero
    x64 = x.detach().double().requires_grad_()
    p64 = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    y64 = case.formula(x64, **p64)
    want = (y64, *torch.autograd.grad(y64, [x64, *p64.values()], dy.double()))
    got = value_and_gradients(layer, x, dy)
    assert got[0].dtype == got[1].dtype == dtype
    compare(got, want, dtype, mean, case.condition)


@pytest.mark.parametrize("shape", [(2, 6, 7, 5), (2, 6, 3, 5, 4)], ids=str)
@each_case
def test_channels_last_stays_and_agrees(case, shape):
    layer = build(case)
    x = (10 + torch.randn(shape)).to(DEVICE)
    dy = torch.randn_like(x)
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    want = value_and_gradients(copy.deepcopy(layer).double(), x.double().requires_grad_(), dy.double())
    x, dy = x.to(memory_format=last).requires_grad_(), dy.to(memory_format=last)
    got = value_and_gradients(layer, x, dy)
    assert got[0].is_contiguous(memory_format=last)
    assert got[1].is_contiguous(memory_format=last)
    compare(got, want, torch.float32, mean=10)


@each_case
def test_views_and_slices_agree(case):
    layer = build(case)
    x = torch.randn(4, 7, 9, 12, device=DEVICE)[1:3, 1:, ::2, ::3].requires_grad_()
    assert not x.is_contiguous()
    dy = torch.randn(2, 6, 5, 4, device=DEVICE)
    want = value_and_gradients(copy.deepcopy(layer), x.detach().clone().contiguous().requires_grad_(), dy)
    for g, w in zip(value_and_gradients(layer, x, dy), want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_case
def test_autocast_keeps_half_precision(case, dtype):
    layer = build(case)
    x = (10 + torch.randn(3, 6, 7, 5)).to(DEVICE, dtype).requires_grad_()
    with torch.autocast(DEVICE, dtype):
        y = layer(x)
    assert y.dtype == dtype
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.dtype == dtype
    exact = case.formula(x.detach().double(), **{k: p.detach().double() for k, p in layer.named_parameters()})
    compare([y], [exact], dtype)


@each_case
def test_state_dict_round_trip(case):
    layer, other = build(case), build(case)
    other.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(3, 6, 4, 4, device=DEVICE)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


@each_case
def test_copies_and_prints(case):
    layer = build(case)
    twin = copy.deepcopy(layer)
    assert repr(twin) == repr(layer)
    assert "6" in repr(layer)
    x = torch.randn(3, 6, 4, 4, device=DEVICE)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)


@each_case
def test_compiles_without_graph_break(case):
    layer = build(case)
    x = torch.randn(3, 6, 4, 4, device=DEVICE)
    want = copy.deepcopy(layer)(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)


@each_case
def test_one_value_per_channel_and_sample(case):
    if not case.single:
        pytest.skip("refused by this layer in training: see its own tests")
    layer = build(case)
    x = torch.randn(1, 6, 1, 1, device=DEVICE, requires_grad=True)
    got = value_and_gradients(layer, x, torch.ones_like(x))
    assert all(g.isfinite().all() for g in got)


@each_case
def test_wrong_input_is_named(case):
    layer = build(case)
    with pytest.raises(ValueError, match=r"6.*\(2, 16, 4, 4\)"):
        layer(torch.randn(2, 16, 4, 4, device=DEVICE))
    with pytest.raises(ValueError, match="axes"):
        layer(torch.randn(6, device=DEVICE))


@each_case
def test_every_layer_takes_eps_and_a_misspelt_argument_fails(case):
    cls = MODELS.get(case.layer)
    assert cls(6, **case.kwargs | {"eps": 1e-3}).eps == 1e-3
    with pytest.raises(TypeError):
        cls(6, num_group=3)
