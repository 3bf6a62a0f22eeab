"""Random calls, every pair of dense layouts, and the calls that were wrong once: all against formulas in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE
from hypothesis import Phase, given, note, reject, settings
from hypothesis import strategies as st
from random_calls import (
    CONVOLUTIONS,
    LAYERS,
    Call,
    Formula,
    Layout,
    TooCloseToCall,
    build,
    campaign,
    check_layout,
    dense_layouts,
    draw_call,
    place,
    results,
    run,
    table,
)

from normplug.layers import BatchNormAct
from normplug.ops._common import ACTIVATIONS
from normplug.registry import MODELS

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def is_right(call):
    wrong = {column: error for column, error in run(call).items() if error.share > 1}
    assert not wrong, f"{wrong}\n{call}"


@settings(max_examples=400, derandomize=True, database=None, deadline=None, phases=[Phase.generate, Phase.shrink])
@given(st.randoms(use_true_random=False))
def test_random_calls(random):
    call = draw_call(random)
    note(str(call))
    try:
        is_right(call)
    except TooCloseToCall:
        reject()


def test_a_campaign_covers_every_layer_and_counts():
    rows, wrong, too_close = campaign(150)
    assert {layer for layer, _ in rows} == set(LAYERS)
    assert sum(row.cases for row in rows.values()) + too_close == 150
    assert not wrong
    assert table(rows).count("\n") == len(rows) + 1


def test_a_campaign_finds_what_is_wrong(monkeypatch):
    def slightly_wrong(x, *args, **kwargs):
        y = F.batch_norm(x, *args, **kwargs)
        return y + 1e-3 * (y - y.detach())  # the output is right

    monkeypatch.setattr("normplug.layers._batch_statistics.stock_batch_norm", slightly_wrong)
    _, wrong, _ = campaign(60, layer="BNAct")
    assert wrong
    assert all("dx off" in line or "parameters off" in line for line in wrong)
    assert not any(line.startswith("y") for line in wrong)


# --- layouts

SHAPES = [(3, 4, 3, 1), (1, 4, 3, 2), (3, 4, 1, 1), (2, 4, 3, 2), (1, 4, 2, 1, 3), (3, 4, 1), (3, 4, 5), (3, 4)]
BN = {"momentum": 0.1, "track_running_stats": True}
CBN = {"buffer_num": 0, "burnin": 0, "official_burnin_var": False, "rule": "drop", "eps_mode": "inside"}
WS = {"correction": 1, "eps_inside": False}
CONV = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 2}
LAYOUT_CASES = {
    "GN": ("GN", {"num_groups": 2}),
    "GN-silu": ("GN", {"num_groups": 2, "act": "silu"}),
    "EvoNormS0": ("EvoNormS0", {"num_groups": 2}),
    "EvoNormS0-affine": ("EvoNormS0", {"num_groups": 2, "apply_act": False}),
    "EvoNormB0": ("EvoNormB0", {"momentum": 0.1, "running_unbiased": False}),
    "EvoNormB0-affine": ("EvoNormB0", {"momentum": 0.1, "running_unbiased": False, "apply_act": False}),
    "FRN": ("FRN", {}),
    "FRN-learned-eps": ("FRN", {"learnable_eps": True}),
    "FrozenBatchNorm": ("FrozenBatchNorm", {}),
    "BNAct": ("BNAct", BN),
    "BNAct-gelu": ("BNAct", {**BN, "act": "gelu"}),
    "SyncBN": ("SyncBN", BN),
    "CBN": ("CBN", BN | CBN),
    "ConvWS1d": ("ConvWS1d", WS),
    "ConvWS2d": ("ConvWS2d", WS),
    "ConvWS3d": ("ConvWS3d", WS),
}
DENSE = Layout((0, 1), (1, 1))  # stands for a layout that is given later


def pairs(shape, out):
    """Yield every dense layout of x with every one of dy; of five axes with those in use, and the same for both."""
    layouts = list(dense_layouts(out))
    usual = [t for t in layouts if t.order in (tuple(range(len(out))), (0, *range(2, len(out)), 1))]
    for x in dense_layouts(shape):
        for dy in layouts if len(shape) < 5 else [*usual, x]:
            yield x, dy


def inputs(case):
    """Return the shapes that a layer takes, each with the modes between which it tells."""
    name, kwargs = LAYOUT_CASES[case]
    ranks = [int(name[6]) + 2] if name in CONVOLUTIONS else [2, 3, 4, 5]
    return [
        (s, training) for s in SHAPES if len(s) in ranks for training in (True, False)[: 1 + ("momentum" in kwargs)]
    ]


@pytest.mark.parametrize(
    ("case", "shape", "training"),
    [(case, *given) for case in LAYOUT_CASES for given in inputs(case)],
    ids=lambda value: {True: "train", False: "eval"}.get(value, str(value)),
)
def test_every_dense_layout_of_input_and_gradient(case, shape, training):
    name, kwargs = LAYOUT_CASES[case]
    conv = CONV if name in CONVOLUTIONS else {}
    call = Call(name, {"eps": 0.1, **kwargs}, shape, F64, F64, DENSE, DENSE, training=training, conv=conv)
    layer, _ = build(call)
    x = torch.randn(shape, dtype=F64, device=DEVICE)
    dy = torch.randn(layer(x).shape if conv else shape, dtype=F64, device=DEVICE)
    before = [b.clone() for b in layer.buffers()]
    want = Formula(call).results(layer, x, None, dy, None, None)
    tried = 0
    for x_layout, dy_layout in pairs(shape, dy.shape):
        for buffer, value in zip(layer.buffers(), before, strict=True):
            buffer.copy_(value)
        placed = place(x, x_layout).requires_grad_()
        got = results(layer, placed, None, place(dy, dy_layout))
        wrong = [n for n, w in want.items() if w is not None and not torch.allclose(got[n], w, rtol=1e-9, atol=1e-9)]
        assert not wrong, f"{wrong} of x {x_layout} and dy {dy_layout}"
        if not conv:
            check_layout(placed, got["y"])
        tried += 1
    assert tried >= 4


TOKENS = Layout((0, 2, 1, 3), (1, 1, 1, 1), spare=1)  # of tokens.transpose(1, 2).unsqueeze(-1)
PLAIN = Layout((0, 1, 2, 3), (1, 1, 1, 1))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_transforms_of_functions_in_a_layout_that_does_not_tell(training):
    """vmap, jvp, and second derivatives go through the same views."""
    layer = BatchNormAct(4, track_running_stats=not training).double().train(training).requires_grad_(False)
    x, v = place(torch.randn(3, 4, 5, 1, dtype=F64), TOKENS), torch.randn(3, 4, 5, 1, dtype=F64)

    def loss(x):
        return layer(x).pow(3).sum()

    def both(function, *args):
        plain = [t.clone(memory_format=torch.contiguous_format) for t in args]
        torch.testing.assert_close(function(*args), function(*plain))

    both(lambda x: torch.func.jvp(loss, (x,), (v,))[1], x)
    both(lambda x: torch.func.grad(lambda x: (torch.func.grad(loss)(x) * v).sum())(x), x)
    both(lambda x: torch.func.vmap(torch.func.grad(loss))(torch.stack([x, 2 * x])), x)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    got, want = (torch.autograd.grad(f(x), x, v)[0] for f in (compiled, layer))
    torch.testing.assert_close(got, want)


# --- wrong once

WRONG_ONCE = {
    "gradient of tokens, training": Call("SyncBN", {"eps": 1e-5, **BN}, (8, 16, 3, 1), F32, F32, TOKENS, PLAIN),
    "gradient of tokens, half": Call(
        "BNAct", {"eps": 1e-5, **BN}, (8, 16, 3, 1), BF16, F32, TOKENS, PLAIN, training=False
    ),
    "gradient of tokens, frozen": Call("FrozenBatchNorm", {"eps": 1e-5}, (8, 16, 3, 1), F32, F32, TOKENS, PLAIN),
    "gradient of tokens, CBN in evaluation": Call(
        "CBN", {"eps": 1e-5, **BN, **CBN}, (8, 16, 3, 1), F32, F32, TOKENS, PLAIN, training=False
    ),
    "gradient of tokens, affine only": Call(
        "EvoNormS0", {"eps": 1e-5, "num_groups": 2, "apply_act": False}, (8, 16, 3, 1), F32, F32, TOKENS, PLAIN
    ),
    "slope of leaky_relu": Call(
        "BNAct", {"eps": 1e-5, **BN, "act": "leaky_relu"}, (5, 4, 3, 3), F64, F64, PLAIN, PLAIN
    ),
    "bias of half input": Call(
        "FrozenBatchNorm", {"eps": 1e-5}, (5, 2, 9, 9), F16, F16, PLAIN, Layout((0, 1, 2, 3), (1, 1, 1, 1), (2, 3))
    ),
    "bias of half input, float32 parameters": Call(
        "EvoNormB0",
        {"eps": 1e-5, "momentum": 0.1, "running_unbiased": False, "apply_act": False},
        (5, 3, 9, 9),
        BF16,
        F32,
        PLAIN,
        Layout((0, 1, 2, 3), (1, 1, 1, 1), (0,)),
    ),
    "half parameters": Call(
        "SyncBN",
        {"eps": 1e-5, **BN},
        (5, 8, 9, 9),
        BF16,
        BF16,
        Layout((3, 0, 2, 1), (1, 1, 1, 1)),
        PLAIN,
        training=False,
    ),
    "half running statistics": Call(
        "BNAct", {"eps": 1e-5, **BN, "momentum": None}, (3, 4, 9, 9), F16, F16, PLAIN, PLAIN, steps=4
    ),
    "output of GN is channels-last": Call("GN", {"eps": 1e-5, "num_groups": 2}, (2, 6, 9, 1), F32, F32, TOKENS, PLAIN),
}


WRONG_ONCE["GN of one channel that looks channels-last, mean 1000"] = Call(
    "GN", {"eps": 1e-5, "num_groups": 1}, (2, 1, 3, 9), F32, F32, Layout((0, 2, 3, 1), (1, 1, 1, 1)), PLAIN, mean=1000.0
)
WRONG_ONCE["convolution of one position, ended in an error"] = Call(
    "ConvWS1d",
    {"eps": 1e-5, "correction": 1, "eps_inside": False},
    (1, 8, 1),
    F64,
    F64,
    Layout((0, 1, 2), (1, 1, 1), spare=7),
    Layout((0, 1, 2), (1, 1, 1)),
    conv={"in_channels": 8, "out_channels": 2, "groups": 2, "kernel_size": 3, "padding": 1, "stride": 2},
)
WRONG_ONCE["tau of FRN that no value meets"] = Call(
    "FRN", {"eps": 1e-6}, (2, 4, 9, 9), F32, F32, PLAIN, Layout((0, 2, 3, 1), (1, 1, 1, 1)), mean=1000.0
)


@pytest.mark.parametrize("what", WRONG_ONCE)
def test_what_was_wrong_once(what):
    for seed in range(5):
        is_right(replace(WRONG_ONCE[what], seed=seed))


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradients_of_activations_are_as_exact_as_their_type(act, dtype):
    function, gradient = ACTIVATIONS[act]
    z = torch.cat([torch.linspace(-20, 20, 1001), torch.tensor([0.0])]).to(dtype)
    z64 = z.double().requires_grad_()
    (want,) = torch.autograd.grad(function(z64).sum(), z64)
    got = gradient(torch.ones_like(z), z)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["BNAct", "SyncBN", "CBN"])
def test_a_single_value_has_no_statistics_in_evaluation_either(name):
    layer = MODELS.get(name)(6, track_running_stats=False).eval()
    with pytest.raises(ValueError, match=r"single value per channel: got .*\(1, 6, 1, 1\).*with running statistics"):
        layer(torch.randn(1, 6, 1, 1))
