"""The Triton kernels: against formulas in float64, on a GPU or, without one, in Triton's interpreter."""

import importlib
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, affine, batch_norm, evonorm_b0, evonorm_s0, group_norm
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import normplug.ops  # noqa: F401
from normplug.ops._common import for_backward
from normplug.ops._registration import has_triton

if not has_triton():
    pytest.skip("Triton comes with torch on Linux only", allow_module_level=True)

from normplug.kernels import _launch, _passes

ROOT = Path(__file__).resolve().parent.parent
CUDA = DEVICE == "cuda"
ACTS = {None: lambda z: z, "relu": F.relu, "leaky_relu": F.leaky_relu, "silu": F.silu, "gelu": F.gelu}
# In units of the last place of the largest value. float32: sums of a few thousand terms, subtracted from each other;
# half types: their one rounding, which Triton's interpreter does by cutting off where the type is bfloat16.
ULPS = {torch.float32: 24, torch.float16: 0.6, torch.bfloat16: 0.6 if CUDA else 1.1}
DTYPES = st.sampled_from(list(ULPS))


def kernel(name):
    return importlib.import_module(f"normplug.kernels.{name}")


def sized(tile=None, on_chip=None):
    """Let tiles have so many values, and kernels that hold groups whole."""
    _launch.TILE, _launch.ON_CHIP = tile or _launch.TILE, on_chip or _launch.ON_CHIP
    _launch.forget_plans()


@pytest.fixture(autouse=True)
def restored_tiles():
    before = _launch.TILE, _launch.ON_CHIP
    yield
    sized(*before)


def frn(x, weight, bias, tau, eps=1e-6):
    square = x.square().mean(tuple(range(2, x.ndim)), keepdim=True) if x.ndim > 2 else x.square()
    tau = tau.view(1, -1, *[1] * (x.ndim - 2))
    return torch.maximum(affine(x / (square + eps).sqrt(), weight, bias), tau)


def group_norm_by_kernel(dy, x, weight, bias, _v, residual, act, groups):
    k = kernel("group_norm")
    y, mean, rstd = k.forward(x, groups, weight, bias, 1e-5, act, residual)
    dx, dweight, dbias, dresidual = k.backward(dy, x, mean, rstd, weight, bias, *for_backward(act, residual, y))
    return [y, dx, dweight, dbias, None, dresidual if dresidual.numel() else dy]


def batch_norm_by_kernel(dy, x, weight, bias, _v, residual, act, _groups):
    k, count = kernel("batch_norm"), x.numel() // x.shape[1]
    mean, m2 = k.stats(x)
    given = mean, (m2 / count + 1e-5).rsqrt(), weight, bias
    y = k.normalize(x, *given, act, residual, None, None)
    given = *given, *for_backward(act, residual, y)
    dbias, dweight = k.reduce(dy, x, *given)
    dx, dresidual = k.dx(dy, x, *given, dbias / count, dweight / count)
    return [y, dx, dweight, dbias, None, dresidual if dresidual.numel() else dy]


def evonorm_s0_by_kernel(dy, x, weight, bias, v, _residual, _act, groups):
    k = kernel("evonorm_s0")
    y, mean, rstd = k.forward(x, groups, weight, bias, v, 1e-5)
    dx, dweight, dbias, dv = k.backward(dy, x, mean, rstd, weight, v)
    return [y, dx, dweight, dbias, dv]


def evonorm_b0_by_kernel(dy, x, weight, bias, v, _residual, _act, _groups):
    k = kernel("evonorm_b0")
    y, mean, std, var = k.forward(x, weight, bias, v, None, 1e-5)
    dx, dweight, dbias, dv = k.backward(dy, x, mean, std, var, weight, v, 1e-5, True)
    return [y, dx, dweight, dbias, dv]


def frn_by_kernel(dy, x, weight, bias, v, _residual, _act, _groups):
    k = kernel("filter_response_norm")
    y, rstd = k.forward(x, weight, bias, v, 1e-6)
    dx, dweight, dbias, dtau = k.backward(dy, x, rstd, weight, bias, v)
    return [y, dx, dweight, dbias, dtau]


# name -> (by kernels, formula for a number of groups, takes v?)
NORMS = {
    "group_norm": (group_norm_by_kernel, group_norm, False),
    "batch_norm": (batch_norm_by_kernel, lambda groups: batch_norm(), False),
    "evonorm_s0": (evonorm_s0_by_kernel, evonorm_s0, True),
    "evonorm_b0": (evonorm_b0_by_kernel, lambda groups: evonorm_b0(), True),
    "filter_response_norm": (frn_by_kernel, lambda groups: frn, True),
}


def tensors(shape, dtype, channels_last, mean=0.0, has_residual=False):
    """Return dy, x, weight, bias, v and a residual."""
    form = torch.contiguous_format
    if channels_last and len(shape) > 3:
        form = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = (mean + torch.randn(shape)).to(DEVICE, dtype).to(memory_format=form)
    dy = torch.randn_like(x)
    weight, bias = (1 + torch.randn(shape[1], device=DEVICE) for _ in range(2))
    v = torch.rand(shape[1], device=DEVICE)  # positive: for a negative one EvoNormB0 divides by small differences
    return dy, x, weight, bias, v, torch.randn_like(x) if has_residual else None


def by_formula(norm, dy, x, weight, bias, v, residual, act, groups):
    """Return value and gradients in float64."""
    _, formula, takes_v = NORMS[norm]
    given = [x, weight, bias, v if takes_v else None, residual]
    x, weight, bias, v, residual = given = [None if t is None else t.double().requires_grad_() for t in given]
    y = formula(groups)(x, weight, bias, v) if takes_v else formula(groups)(x, weight, bias)
    y = ACTS[act](y if residual is None else y + residual)
    wanted = [t for t in given if t is not None]
    found = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, dy.double()), strict=True))
    return [y.detach(), *(found.get(id(t)) for t in given)]


def compare(norm, dy, x, weight, bias, v, residual, act, groups, scale=1.0):
    got = NORMS[norm][0](dy, x, weight, bias, v, residual, act, groups)
    want = by_formula(norm, dy, x, weight, bias, v, residual, act, groups)
    names = ["y", "dx", "dweight", "dbias", "dv", "dresidual"][: len(got)]
    for name, g, w in zip(names, got, want[: len(got)], strict=True):
        if w is None:
            continue
        if name in ("y", "dx"):
            assert g.dtype == x.dtype
            assert g.stride() == x.stride()
        ulps = scale * (ULPS[g.dtype] if g.dtype != torch.float32 else ULPS[torch.float32])
        largest = max(w.abs().max().item(), dy.abs().max().item())  # parts of dx may cancel down to nothing
        error = (g.double() - w).abs().max().item() / (torch.finfo(g.dtype).eps * largest)
        assert error <= ulps, f"{name} is {error:.1f} ulps off"


# Values of a group that a program holds: by passes, on chip.
WAYS = [1, 16384]
# Channels; maps have four times as many values. In the interpreter a program takes milliseconds.
MOST = 40 if CUDA else 12


@st.composite
def cases(draw):
    """A shape with odd sizes, maps of one value and video, cut into few or many tiles."""
    groups = draw(st.integers(1, 4))
    channels = groups * draw(st.integers(1, MOST // groups))
    axes = draw(st.integers(1, 3))
    longest = round((4 * MOST) ** (1 / axes))
    shape = (draw(st.integers(1, 2)), channels, *draw(st.lists(st.integers(1, longest), min_size=axes, max_size=axes)))
    return {
        "shape": shape,
        "groups": groups,
        "dtype": draw(DTYPES),
        "channels_last": draw(st.booleans()),
        "act": draw(st.sampled_from(list(ACTS))),
        "residual": draw(st.booleans()),
        "mean": draw(st.sampled_from([0.0, 3.0])),
        "tile": draw(st.sampled_from([128, 2048])),
        "on_chip": draw(st.sampled_from(WAYS)),
    }


# Shrinking a failure takes the interpreter minutes.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate, *([Phase.shrink] if CUDA else [])]
# Two values per statistic are ±1 whatever they are, and dx a difference of rounding errors: the formula's own too.
MANY_ENOUGH = 6


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=40, phases=PHASES, deadline=None, derandomize=True)
@given(case=cases())
def test_any_shape_layout_and_dtype(norm, case):
    torch.manual_seed(0)
    shape, groups = case["shape"], case["groups"]
    positions = torch.Size(shape[2:]).numel()
    per_statistic = {"group_norm": shape[1] // groups * positions, "evonorm_s0": shape[1] // groups * positions}
    values = per_statistic.get(norm, positions if norm != "batch_norm" else shape[0] * positions)
    if values < MANY_ENOUGH:
        shape = (shape[0], *[6 * groups] * 1, *shape[2:]) if norm in per_statistic else (*shape[:2], 7)
    sized(case["tile"], case["on_chip"])
    alone = norm.startswith(("evonorm", "filter"))
    data = tensors(shape, case["dtype"], case["channels_last"], case["mean"], case["residual"] and not alone)
    # x - mean loses as many digits as the mean has more than x - mean
    compare(norm, *data, None if alone else case["act"], groups, scale=4 if case["mean"] else 2)


@pytest.mark.slow
@pytest.mark.parametrize("on_chip", WAYS, ids=["split", "on-chip"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("norm", ["group_norm", "batch_norm"])
def test_mean_1000_and_variance_1(norm, channels_last, on_chip):
    """E[x²] - E[x]² in float32 returns noise here. What is allowed is the spacing of float32 at 1000."""
    sized(512, on_chip)
    dy, x, weight, bias, v, _ = tensors((2, 8, 25, 37), torch.float32, channels_last, 1000.0)
    compare(norm, dy, x, weight, bias, v, None, None, 2, scale=1000 / 24)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("on_chip", WAYS, ids=["split", "on-chip"])
@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_on_every_run(norm, on_chip, channels_last):
    sized(512 if channels_last else 128, on_chip)
    data = tensors((2, 4, 9, 20), torch.float32, channels_last)
    first, second = (NORMS[norm][0](*data, None, 2) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a is b is None or torch.equal(a, b)


def empty_is_nan(x, *size, dtype=None, **where):
    """Do what ``Tensor.new_empty`` does, but leave no right result of an earlier call in the memory."""
    kind = dtype or x.dtype
    size = size[0] if isinstance(size[0], tuple) else size
    return torch.full(size, math.nan if kind.is_floating_point else -1, dtype=kind, **({"device": x.device} | where))


@pytest.mark.slow
@pytest.mark.skipif(CUDA, reason="there the order is as it comes")
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("norm", ["group_norm", "batch_norm", "evonorm_b0"])
def test_same_bits_whoever_comes_last(norm, channels_last, monkeypatch):
    """The last program joins what all have found: it need not be that of the highest number."""
    from triton.runtime.interpreter import interpreter_builder as builder

    sized(128 if channels_last else 32, 1)
    monkeypatch.setattr(torch.Tensor, "new_empty", empty_is_nan)
    data = tensors((1, 4, 5, 8), torch.float32, channels_last)
    want, place = NORMS[norm][0](*data, None, 2), builder.set_grid_idx
    random_order, order = random.Random(0), []

    def moved(x, y, z):
        if x == 0:
            order[:] = range(builder.grid_dim[0])
            random_order.shuffle(order)
        place(order[x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", moved)
    for a, b in zip(NORMS[norm][0](*data, None, 2), want, strict=True):
        assert a is b is None or torch.equal(a, b)
    assert not _launch._gates[data[1].device, 0].any(), "a gate is not left open"


@pytest.mark.parametrize(("channels_last", "groups"), [(True, 32), (True, 5), (True, 1), (False, 32), (False, 160)])
def test_a_gate_is_that_of_whole_groups(channels_last, groups):
    """Also where groups of 32 channels lie across tiles of 64, and where one has more than a tile."""
    at = _launch.Layout.of(torch.Size((2, 160, 40, 56)), channels_last)
    tiles, size = _launch.tiling(at), 160 // groups
    gathering = _passes.Gathering.of(at, tiles, 2, size)
    width = tiles.block_inner if channels_last else tiles.block_outer
    covered = gathering.together * width
    assert covered % size == 0 or covered >= 160
    assert gathering.gates == 2 * -(-tiles.channel_tiles // gathering.together)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2, 24])
@pytest.mark.parametrize("norm", ["group_norm", "batch_norm"])
def test_more_parts_and_groups_than_are_joined_at_a_time(norm, groups, monkeypatch):
    """Channels-last, of 72 channels in tiles of 32: 10 parts by 4, 24 groups by 8, 72 channels of a group by 16."""
    sized(128, 1)
    monkeypatch.setattr(_passes, "IN_ROWS", 128)
    monkeypatch.setattr(_passes, "AT_ONCE", 128)
    assert _launch.tiling(_launch.Layout.of(torch.Size((2, 72, 5, 8)), True))[:2] == (4, 32)
    compare(norm, *tensors((2, 72, 5, 8), torch.float32, True, 3.0), None, groups, scale=4)


@pytest.mark.parametrize("norm", NORMS)
def test_empty(norm):
    if norm == "batch_norm":
        pytest.skip("divides by the count: the op has its own tests of empty batches")
    data = tensors((0, 8, 9, 2), torch.float32, False)
    y, dx, *grads = NORMS[norm][0](*data, None, 2)
    assert y.shape == dx.shape == (0, 8, 9, 2)
    for g in grads:
        assert g is None or g.numel() == 0 or (g.shape == (8,) and not g.any())


def test_group_of_one_value_passes_no_gradient():
    dy, x, weight, bias, *_ = tensors((3, 8, 1, 1), torch.float32, False, 5.0)
    y, dx, dweight, *_ = group_norm_by_kernel(dy, x, weight, bias, None, None, None, 8)
    assert torch.equal(y, bias.view(1, 8, 1, 1).expand(3, 8, 1, 1))
    assert not dx.any()
    assert not dweight.any()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in the interpreter
def test_nan_and_infinity_stay_in_their_group():
    x = torch.randn(2, 8, 5, 5, device=DEVICE)
    x[0, 0, 0, 0], x[1, 7, 0, 0] = float("nan"), float("inf")
    y, *_ = kernel("group_norm").forward(x, 2, None, None, 1e-5, "relu", None)
    assert y[0, :4].isnan().all()
    assert y[0, 4:].isfinite().all()
    assert y[1, :4].isfinite().all()
    assert y[1, 4:].isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in the interpreter
@pytest.mark.parametrize("on_chip", WAYS, ids=["split", "on-chip"])
@pytest.mark.parametrize("argument", range(6), ids=["dy", "x", "weight", "bias", "v", "residual"])
@pytest.mark.parametrize("norm", NORMS)
def test_nan_comes_out_wherever_the_formula_has_it(norm, argument, on_chip):
    """A maximum of a GPU returns the number of a number and NaN."""
    sized(on_chip=on_chip)
    alone = norm.startswith(("evonorm", "filter"))
    if argument == 5 and alone:
        pytest.skip("takes no residual")
    data = tensors((2, 4, 9, 8), torch.float32, False, has_residual=not alone)
    data[argument].view(-1)[1] = float("nan")
    act = None if alone else "relu"
    got = NORMS[norm][0](*data, act, 2)
    want = by_formula(norm, *data, act, 2)
    assert torch.equal(got[0].isnan(), want[0].isnan())
    for g, w in zip(got, want[: len(got)], strict=True):
        assert w is None or not (w.isnan() & ~g.isnan()).any()


def test_slices_of_memory_that_are_not_aligned():
    memory = torch.randn(2 * 8 * 12 * 10 + 1, device=DEVICE)
    x = memory[1:].view(2, 8, 12, 10)
    want, *_ = kernel("group_norm").forward(x.clone(), 2, None, None, 1e-5, None, None)
    got, *_ = kernel("group_norm").forward(x, 2, None, None, 1e-5, None, None)
    assert torch.equal(got, want)


@pytest.mark.parametrize("on_chip", WAYS, ids=["split", "on-chip"])
@pytest.mark.parametrize("norm", NORMS)
def test_parameters_of_any_stride_address_and_dtype(norm, on_chip):
    """Every other value of a tensor, one for all channels, a view at an odd address, half and double precision."""
    sized(on_chip=on_chip)
    dy, x, *parameters, _ = tensors((1, 4, 9, 8), torch.float32, False)
    for change in (
        lambda p: torch.stack([p, p + 9], 1)[:, 0],
        lambda p: p[:1].expand(4),
        lambda p: torch.cat([p[:1], p])[1:],
        lambda p: p.half(),
        lambda p: p.double(),
    ):
        changed = [change(p) for p in parameters]
        plain = [p.float().contiguous() for p in changed]
        got, want = (NORMS[norm][0](dy, x, *given, None, None, 2) for given in (changed, plain))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)


def test_splits_of_sums_are_uneven_and_complete():
    """5 tiles in 4 programs: two each, the last one has one, none is lost."""
    sized(64, 1)
    at = _launch.Layout.of(torch.Size((1, 1, 5 * 64)), channels_last=False)
    tiles = _launch.tiling(at)
    assert (tiles.block_outer, tiles.block_inner, tiles.position_tiles) == (1, 64, 5)
    data = tensors((1, 1, 5 * 64), torch.float32, False)
    compare("group_norm", *data, None, 1)


def test_sums_have_the_dtype_of_the_statistics():
    dy, x, *_ = tensors((2, 4, 5), torch.float32, False)
    for dtype in (torch.float32, torch.float64):
        mean, rstd = torch.zeros(2, 4, dtype=dtype, device=DEVICE)
        assert {s.dtype for s in kernel("batch_norm").reduce(dy, x, mean, rstd, None, None, None, None)} == {dtype}


@pytest.mark.slow
@pytest.mark.skipif(CUDA, reason="the next test has the memory")
def test_offsets_beyond_32_bits():
    command = [sys.executable, str(ROOT / "tests" / "far_offsets.py")]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.skipif(not CUDA, reason="more than 2**31 values take a GPU's memory")
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_more_than_2_to_the_31_values(channels_last):
    """The last sample is normalized as if it were alone."""
    n, shape = 33, (32, 1448, 1448)
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("takes 30 GiB of GPU memory")
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.zeros(n, *shape, device=DEVICE, dtype=torch.bfloat16).to(memory_format=form)
    assert x.numel() > 2**31
    x[-1].normal_()
    dy = torch.zeros_like(x)
    dy[-1].normal_()
    k = kernel("group_norm")
    big = k.forward(x, 32, None, None, 1e-5, "relu", None)
    one = k.forward(x[-1:].clone(memory_format=form), 32, None, None, 1e-5, "relu", None)
    torch.testing.assert_close(big[0][-1:], one[0])
    dx, *_ = k.backward(dy, x, big[1], big[2], None, None, "relu", None)
    want, *_ = k.backward(dy[-1:].clone(memory_format=form), x[-1:], one[1], one[2], None, None, "relu", None)
    torch.testing.assert_close(dx[-1:], want)


OPS = ["group_norm", "group_norm_backward", "batch_norm_stats", "batch_normalize", "batch_norm_reduce", "batch_norm_dx"]
OPS += ["evonorm_s0", "evonorm_s0_backward", "evonorm_b0", "evonorm_b0_backward"]
OPS += ["filter_response_norm", "filter_response_norm_backward"]


@pytest.mark.parametrize("op", OPS)
def test_op_runs_its_kernel_on_cuda(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"normplug::{op}", "CUDA")


@pytest.mark.slow
@pytest.mark.skipif(CUDA, reason="there all tests of ops and layers run on the kernels")
def test_ops_and_layers_pass_their_tests_on_kernels():
    files = ["test_layers.py", "test_group_norm.py", "test_batch_norm_op.py", "test_evonorm.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "interpreted", "-p", "no:cacheprovider", *files]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(command, cwd=ROOT / "tests", env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(2400)
def test_kernels_compile_without_spills_and_with_wide_loads():
    """For sm_80 and sm_90, every dtype and layout, on a machine without either."""
    command = [sys.executable, str(ROOT / "tools" / "kernel_facts.py"), "--check"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
