"""The kernel of weight_standardize against the formula in float64: in Triton's interpreter where there is no GPU."""

import pytest
import torch
from cases import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from normplug.ops.weight_standardize import reference_many, reference_many_backward

_launch = pytest.importorskip("normplug.kernels._launch")  # no Triton outside of Linux
kernel = pytest.importorskip("normplug.kernels.weight_standardize")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
FORMS = {"mmcv": (1e-5, 1, False), "tf": (1e-2, 0, False), "bcn": (1e-2, 1, True), "timm": (1e-6, 0, True)}
DTYPES_AND_FORMS = pytest.mark.parametrize(
    ("dtype", "form"),
    [
        *((torch.float32, form) for form in FORMS.values()),
        (torch.float16, FORMS["mmcv"]),
        (torch.bfloat16, FORMS["bcn"]),
    ],
    ids=[*FORMS, "mmcv-float16", "bcn-bfloat16"],
)
# 147: a stem, an odd size. 1x1. Small twins of 512 and 4608. Channels innermost. 3-D. A filter of three values.
SHAPES = [(3, 3, 7, 7), (5, 64, 1, 1), (2, 64, 3, 3), (3, 12, 3, 3), (2, 4, 3, 2, 2), (4, 1, 3), (2, 5, 9)]
# Allowed error, in units of the last place of the largest value: half precision errs by its own last rounding, and
# where the interpreter cuts the digits of bfloat16 off, by a whole unit.
ULPS = {torch.float32: 4, torch.float16: 0.6, torch.bfloat16: 1.1 if DEVICE == "cpu" else 0.6}


@pytest.fixture
def small_blocks(monkeypatch):
    """Sizes at which every way through the kernel is taken by small filters."""
    for name, size in dict(SMALL=16, MIDDLE=32, TILE=64, LARGE=128, CHUNK=64).items():
        monkeypatch.setattr(kernel, name, size)
    _launch.forget_plans()
    yield
    _launch.forget_plans()


def formula(weight, eps, correction, eps_inside):
    rows = weight.reshape(len(weight), -1)
    d = rows - rows.mean(1, keepdim=True)
    var = d.square().sum(1, keepdim=True) / (rows.shape[1] - correction)
    return (d / ((var + eps).sqrt() if eps_inside else var.sqrt() + eps)).reshape(weight.shape)


def weights_of(shapes, dtype, mean=0.0, last=True):
    """Return weights, every other one of four axes with its channels innermost."""
    weights = [(mean + torch.randn(shape, device=DEVICE)).to(dtype) for shape in shapes]
    return [
        w.to(memory_format=torch.channels_last) if last and w.ndim == 4 and i % 2 else w for i, w in enumerate(weights)
    ]


def agrees(weights, form):
    """Compare results, statistics and gradients with float64."""
    dtype = weights[0].dtype
    limit = torch.finfo(dtype).eps * ULPS[dtype]
    wide = [w.double().requires_grad_() for w in weights]
    want = [formula(w, *form) for w in wide]
    outs, mean, std = kernel.forward_many(weights, *form)
    for got, exact, weight in zip(outs, want, weights, strict=True):
        assert got.dtype == dtype
        assert got.stride() == weight.stride()
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=limit * exact.abs().max().item())
    rows = [w.detach().flatten(1) for w in wide]
    for got, exact in (
        (mean, torch.cat([r.mean(1, keepdim=True) for r in rows])),
        (std, torch.cat([r.std(1, keepdim=True, correction=form[1]) for r in rows])),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-7 * max(r.abs().max().item() for r in rows))
    grads = [torch.randn_like(out) for out in outs]
    got = kernel.backward_many(grads, weights, mean, std, *form)
    exact = torch.autograd.grad(want, wide, [g.double() for g in grads])
    for dw, e, weight in zip(got, exact, weights, strict=True):
        assert dw.dtype == dtype
        assert dw.stride() == weight.stride()
        torch.testing.assert_close(dw.double(), e, rtol=0, atol=limit * e.abs().max().item())


# --- values and gradients


@DTYPES_AND_FORMS
def test_weights_of_many_sizes_in_one_launch(dtype, form):
    agrees(weights_of(SHAPES, dtype), form)


@DTYPES_AND_FORMS
def test_every_way_through_the_kernel(dtype, form, small_blocks):
    """Blocks of three sizes; a filter of an odd size; filters longer than any block, odd and even."""
    agrees(weights_of([(2, 8, 2, 2), (2, 8, 2, 4), (2, 8, 4, 4), (2, 3, 7), (2, 17, 3, 3), (3, 24, 3, 3)], dtype), form)


def test_filters_at_the_edges_of_the_blocks(small_blocks):
    agrees(
        weights_of([(2, size) for size in (31, 32, 36, 63, 64, 65, 68, 127, 128, 129, 132, 192)], torch.float32),
        FORMS["mmcv"],
    )


@pytest.mark.parametrize("mean", [1, -30, 1000])
@pytest.mark.parametrize("long", [False, True], ids=["block", "long"])
def test_no_digit_is_lost_to_a_large_mean(mean, long, request):
    if long:
        request.getfixturevalue("small_blocks")
    agrees(weights_of([(3, 3, 7, 7), (2, 64, 3, 3)], torch.float32, mean), FORMS["mmcv"])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # numpy, where the interpreter makes float16
@DTYPES_AND_FORMS
@pytest.mark.parametrize("value", [0.0, 0.1, 1000.3])
def test_a_filter_of_equal_values_is_zero_and_its_gradient_finite(dtype, form, value, small_blocks):
    for shape in ((3, 4, 3, 3), (3, 3, 3, 3), (3, 16, 3, 3)):
        weight = torch.randn(shape, device=DEVICE, dtype=dtype)
        weight[1] = value
        out, mean, std = kernel.forward(weight, *form)
        assert not out[1].any()
        assert std[1] == 0
        assert mean[1] == weight[1, 0, 0, 0]
        grad = torch.randn_like(out)
        dw = kernel.backward(grad, weight, mean, std, *form)
        g = grad[1].double()
        exact = (g - g.mean()) / (form[0] ** 0.5 if form[2] else form[0])
        limit = torch.finfo(dtype).eps * ULPS[dtype] * exact.abs().max().item()
        if exact.abs().max() < torch.finfo(dtype).max:  # float16 ends before 1 / eps
            torch.testing.assert_close(dw[1].double(), exact, rtol=0, atol=limit)
        assert not dw.isnan().any()


def test_one_differing_value_has_its_gradient():
    """The smallest deviation that a filter can have without being 0."""
    weight = torch.full((2, 4, 3, 3), 0.1, device=DEVICE)
    weight[0, 0, 0, 0] += 2**-26
    form = 1e-12, 1, False
    wide = weight.double().requires_grad_()
    want = formula(wide, *form)[:1]
    out, mean, std = kernel.forward(weight, *form)
    torch.testing.assert_close(out[:1].double(), want, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out)
    (exact,) = torch.autograd.grad(want, wide, grad[:1].double())
    dw = kernel.backward(grad, weight, mean, std, *form)
    torch.testing.assert_close(dw[0].double(), exact[0], rtol=0, atol=1e-3 * exact[0].abs().max().item())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_shapes(data):
    kernel_sizes = st.sampled_from([(), (1,), (3,), (1, 1), (3, 3), (1, 5), (2, 2, 2)])
    shape = st.tuples(st.integers(0, 3), st.integers(2, 40), kernel_sizes).map(lambda s: (*s[:2], *s[2]))
    shapes = data.draw(st.lists(shape, min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    eps = data.draw(st.sampled_from([1e-5, 0.1]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    weights = weights_of(shapes, dtype, data.draw(st.sampled_from([0, 3])))
    form = eps, data.draw(st.integers(0, 1)), data.draw(st.booleans())
    outs, mean, std = kernel.forward_many(weights, *form)
    want, *statistics = reference_many([w.double() for w in weights], *form)
    grads = [torch.randn_like(out) for out in outs]
    dws = kernel.backward_many(grads, weights, mean, std, *form)
    exact = reference_many_backward([g.double() for g in grads], [w.double() for w in weights], *statistics, *form)
    for got, e in zip((*outs, mean, std, *dws), (*want, *statistics, *exact), strict=True):
        # two values are ±1 whatever they are, and their gradient is what rounding leaves
        scale = max(e.abs().max().item(), 1.0) if e.numel() else 1.0
        few = 64 if got.dtype == torch.float32 else ULPS[got.dtype]
        torch.testing.assert_close(got.double(), e, rtol=0, atol=few * torch.finfo(got.dtype).eps * scale)


# --- layouts, addresses, launches


@DTYPES
def test_gradients_in_any_layout(dtype):
    """A gradient in another layout, a slice, one value for all, and one that differs in an axis of 1 only."""
    weights = weights_of([(4, 8, 3, 3), (4, 8, 3, 3), (4, 8, 1, 1), (4, 6, 5)], dtype)
    form = FORMS["mmcv"]
    outs, mean, std = kernel.forward_many(weights, *form)
    dense = [torch.randn_like(out) for out in outs]
    dense[3].fill_(0.5)
    grads = [
        dense[0].to(memory_format=torch.channels_last),
        torch.cat([dense[1], dense[1]], 1)[:, :8],
        dense[2].to(memory_format=torch.channels_last),
        torch.full((1, 1, 1), 0.5, dtype=dtype, device=DEVICE).expand(4, 6, 5),
    ]
    want = kernel.backward_many(dense, weights, mean, std, *form)
    for got, w in zip(kernel.backward_many(grads, weights, mean, std, *form), want, strict=True):
        assert torch.equal(got, w)
        assert got.stride() == w.stride()


@DTYPES
def test_weights_at_odd_addresses(dtype):
    """A view into a larger tensor: 16 bytes at once would be a misaligned address."""
    flat = torch.randn(2 * 4 * 36 + 1, device=DEVICE).to(dtype)[1:]
    weights = [flat.view(2, 4, 36), flat[: 2 * 4 * 9].view(2, 4, 3, 3)]
    agrees(weights, FORMS["mmcv"])


def test_offsets_beyond_int32():
    """Filter 3,000,000 of a weight with 1000 values per filter; the addresses leave out what comes before it."""
    row, size = 3_000_000, 1000
    weight, out = torch.randn(1, size, device=DEVICE), torch.empty(1, size, device=DEVICE)
    mean, std = torch.empty(1, 1, device=DEVICE), torch.empty(1, 1, device=DEVICE)
    addresses = [t.data_ptr() - 4 * row * size for t in (weight, weight, out)]
    tables = (
        torch.tensor(addresses, device=DEVICE),
        torch.tensor([[0, row, 1, 0, size]], dtype=torch.int32, device=DEVICE),
    )
    for largest in (8192, 512):
        blocks = dict(SMALL=512, MIDDLE=512, TILE=512, LARGE=largest, CHUNK=512)
        kernel._standardize[(1,)](*tables, mean, std, 1e-5, False, 1, False, kernel.DTYPES[torch.float32], **blocks)
        torch.testing.assert_close(out, formula(weight.double(), *FORMS["mmcv"]).float())
        out.zero_()


@DTYPES
def test_the_same_bits_every_time_alone_and_together(dtype):
    weights, form = weights_of(SHAPES, dtype), FORMS["mmcv"]
    outs, mean, std = kernel.forward_many(weights, *form)
    grads = [torch.randn_like(out) for out in outs]
    dws = kernel.backward_many(grads, weights, mean, std, *form)
    again = kernel.forward_many(weights, *form)
    assert all(map(torch.equal, again[0], outs))
    assert torch.equal(again[1], mean)
    assert torch.equal(again[2], std)
    assert all(map(torch.equal, kernel.backward_many(grads, weights, mean, std, *form), dws))
    rank = 0
    for weight, out, grad, dw in zip(weights, outs, grads, dws, strict=True):
        alone, m, s = kernel.forward(weight, *form)
        rows = slice(rank, rank + len(weight))
        rank += len(weight)
        assert torch.equal(alone, out)
        assert torch.equal(m, mean[rows])
        assert torch.equal(s, std[rows])
        assert torch.equal(kernel.backward(grad, weight, m, s, *form), dw)


def test_one_launch_each_way_and_one_table_per_set_of_shapes(monkeypatch):
    launches, start = [], _launch.Step.__call__
    monkeypatch.setattr(_launch.Step, "__call__", lambda *args: launches.append(args) or start(*args))
    kernel._parts.cache_clear()
    for _ in range(2):
        weights = weights_of(SHAPES, torch.float32)
        outs, mean, std = kernel.forward_many(weights, *FORMS["mmcv"])
        kernel.backward_many(outs, weights, mean, std, *FORMS["mmcv"])
    assert len(launches) == 4
    assert kernel._parts.cache_info().misses == 1


def test_parts_cover_every_filter_once_and_the_longest_come_first():
    parts = kernel._parts(((3, 12), (9, 36), (2, 40), (0, 0)), 4, 8, 16, torch.device(DEVICE)).tolist()
    assert parts == [
        [2, 0, 1, 12, 20],
        [2, 1, 1, 13, 20],
        [0, 0, 3, 0, 4],
        [1, 0, 4, 3, 4],
        [1, 4, 4, 7, 4],
        [1, 8, 1, 11, 4],
    ]
    shapes = ((64, 64 * 147), (256, 256 * 64), (512, 512 * 4608), (1024, 1024 * 1024), (100, 100 * 2304))
    parts = kernel._parts(shapes, kernel.SMALL, kernel.MIDDLE, kernel.TILE, torch.device("cpu"))
    for index, (count, values) in enumerate(shapes):
        own = parts[parts[:, 0] == index]
        filters = [row + i for _, row, rows, _, _ in own.tolist() for i in range(rows)]
        assert sorted(filters) == list(range(count))
        assert (own[:, 3] - own[:, 1] == sum(n for n, _ in shapes[:index])).all()
        assert (own[:, 4] == values // count).all()


def test_mixed_dtypes_are_refused():
    weights = [torch.randn(2, 3, device=DEVICE), torch.randn(2, 3, device=DEVICE).half()]
    with pytest.raises(ValueError, match=r"one dtype and device.*float16.*float32.*Call it once for each"):
        kernel.forward_many(weights, *FORMS["mmcv"])


# --- the ops


def test_kernels_and_references_have_the_same_results():
    weights = weights_of(SHAPES, torch.float32)
    form = FORMS["mmcv"]
    got, want = kernel.forward_many(weights, *form), reference_many(weights, *form)
    torch.testing.assert_close(got, want, check_stride=True)
    grads = [torch.randn_like(out) for out in want[0]]
    torch.testing.assert_close(
        kernel.backward_many(grads, weights, *got[1:], *form),
        reference_many_backward(grads, weights, *want[1:], *form),
        check_stride=True,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "op",
    [
        "weight_standardize",
        "weight_standardize_backward",
        "weight_standardize_many",
        "weight_standardize_many_backward",
    ],
)
def test_ops_have_their_kernel(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"normplug::{op}", "CUDA")
