"""Every layer and op: settings and inputs that are none are refused in a sentence, odd ones that are some are taken."""

import inspect
import re
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, DEVICE, INTERPRETED
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from normplug import layers, ops
from normplug.registry import MODELS, config_names

C = 32
LAYERS = [getattr(layers, name) for name in layers.__all__]
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def settings(layer):
    return inspect.signature(layer).parameters


def required(layer):
    """The arguments that a layer cannot do without, in the size of the tests: what a new layer has fits, too."""
    names = [name for name, p in settings(layer).items() if p.default is inspect.Parameter.empty]
    return {name: 3 if name == "kernel_size" else C for name in names}


def build(layer, **kwargs):
    return layer(**{**required(layer), **kwargs}).to(DEVICE)


def feature_map(layer, n=2, size=5):
    """An input with the number of spatial axes that a layer takes."""
    axes = next((a for a, conv in ((1, nn.Conv1d), (3, nn.Conv3d)) if issubclass(layer, conv)), 2)
    return torch.randn(n, C, *[size] * axes, device=DEVICE)


# --- settings

NAN, INF = float("nan"), float("inf")
# A value that is of no use, by what the annotation of an argument names.
WRONG = {
    bool: ["False", "yes", 2, 0.5, [True]],
    int: [True, False, 8.0, 2.5, -1, "8", NAN, INF, [True], torch.tensor(8.0)],
    float: [True, "1e-5", NAN, INF, -INF, -1, -1e-9, [1e-5], torch.tensor(1e-5)],
    str: [5, True, "nonsense", ["relu"]],
}
LEAST = {"buffer_num": 0, "burnin": 0, "correction": 0, "padding": 0}


def wrong_settings():
    for layer in LAYERS:
        for name, parameter in settings(layer).items():
            kinds = get_args(parameter.annotation) or (parameter.annotation,)
            values = (
                list(WRONG[next((k for k in (bool, float, int, str) if k in kinds), None)]) if kinds[0] in WRONG else []
            )
            if type(None) not in kinds and values and "groups" not in name:
                values.append(None)
            if int in kinds and name not in LEAST:
                values.append(0)
            if name in ("momentum", "rho"):
                values += [5, 1.0001]
            if name == "dtype":
                values = [torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn, "float32", [1]]
            if str in kinds:
                values = [value for value in values if value != "8"]  # a word, which is tried as one
            yield from ((layer, name, value) for value in values)


@pytest.mark.parametrize(
    ("layer", "name", "value"), wrong_settings(), ids=lambda v: v.__name__ if isinstance(v, type) else repr(v)
)
def test_a_setting_that_is_none_is_refused_when_the_layer_is_built(layer, name, value):
    with pytest.raises(ValueError) as caught:
        build(layer, **{name: value})
    assert name.removesuffix("s") in str(caught.value)
    assert str(value if isinstance(value, str) else repr(value)) in str(caught.value)


def test_the_message_says_what_was_given_what_is_expected_and_how_to_fix_it():
    for kwargs, message in (
        ({"num_groups": 8.0}, "GroupNorm takes an integer of 1 or more or None or 'auto' as num_groups, but got "
         "num_groups=8.0. Write num_groups=8."),
        ({"eps": NAN}, "GroupNorm takes a finite number of 0 or more as eps, but got eps=nan. Correct it, or leave it "
         "out for eps=1e-05."),
        ({"num_channels": 0}, "GroupNorm takes an integer of 1 or more as num_channels, but got num_channels=0. "
         "Correct num_channels where the layer is built."),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            build(layers.GroupNorm, **kwargs)


@pytest.mark.parametrize("name", [name for layer in LAYERS for name in config_names(layer)])
def test_a_config_is_told_the_same(name):
    cfg = {"type": name, **required(MODELS.get(name)), "eps": -1}
    with pytest.raises(ValueError, match=r"takes a finite number of 0 or more as eps, but got eps=-1"):
        MODELS.build(cfg)


@each_layer
def test_numbers_of_numpy_arrive_as_those_of_python(layer):
    kwargs = {name: np.int64(value) for name, value in required(layer).items()} | {"eps": np.float32(0.5)}
    for name, parameter in settings(layer).items():
        if parameter.annotation is bool and name != "eps_per_channel":  # that one needs another
            kwargs[name] = np.bool_(parameter.default)
    built = build(layer, **kwargs)
    assert repr(built) == repr(build(layer, eps=0.5))
    plain = (int, float, bool, str, tuple, type(None), nn.Module)
    assert not [name for name, value in vars(built).items() if isinstance(value, np.generic)]
    assert type(built.eps) in plain


def test_ends_of_ranges_are_in_them():
    for kwargs in ({"eps": 0}, {"momentum": 0}, {"momentum": 1}, {"momentum": None}):
        build(layers.BatchNormAct, **kwargs)
    build(layers.CrossIterationBatchNorm, buffer_num=0, burnin=0, rho=1)
    build(layers.WSConv2d, correction=0, padding=0, stride=[2, 1], kernel_size=(3, 1))
    with pytest.raises(ValueError, match=r"integers of 1 or more as stride, but got stride=\(2, True\)"):
        build(layers.WSConv2d, stride=(2, True))


# --- kinds of input


def quantized(x):
    with torch.no_grad():
        return torch.quantize_per_tensor(x.cpu(), 0.1, 0, torch.qint8)


# name -> what is given instead of a feature map x, and what the message advises
KINDS = {
    "int64": (lambda x: x.long(), r"torch\.int64.*x\.float\(\)"),
    "uint8": (lambda x: x.abs().byte(), r"torch\.uint8.*x\.float\(\)"),
    "bool": (lambda x: x > 0, r"torch\.bool.*x\.float\(\)"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), r"torch\.float8_e4m3fn.*x\.float\(\)"),
    "complex64": (lambda x: x.to(torch.complex64), r"torch\.complex64.*real and imaginary"),
    "sparse": (lambda x: x.to_sparse(), r"torch\.sparse_coo.*to_dense"),
    "mkldnn": (lambda x: x.cpu().to_mkldnn(), r"torch\._mkldnn.*to_dense"),
    "quantized": (quantized, r"quantized.*qint8.*dequantize"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), r"nested.*to_padded_tensor"),
    "jagged": (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), r"nested.*to_padded_tensor"),
    "list of numbers": (lambda x: [[1.0, 2.0]], r"list\. .*as_tensor"),
    "list of tensors": (lambda x: [x, x], r"list of 2 elements.*once for each"),
    "tuple of tensors": (lambda x: (x,), r"tuple of 1 elements.*once for each"),
    "numpy": (lambda x: x.cpu().numpy(), r"ndarray.*as_tensor"),
    "number": (lambda x: 3.0, r"float\. .*as_tensor"),
    "None": (lambda x: None, r"None\. .*returned nothing"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
# torch warns that some of them are prototypes
pytestmark = pytest.mark.filterwarnings("ignore:.*(prototype|quantize|nested|Sparse|is deprecated)")


@each_kind
@each_mode
@each_layer
def test_a_layer_refuses_what_is_no_dense_floating_point_tensor(layer, training, kind):
    make, advice = KINDS[kind]
    with pytest.raises(TypeError, match=rf"(?s)^{layer.__name__} takes a dense tensor.*as input, but got .*{advice}"):
        build(layer).train(training)(make(feature_map(layer)))


@each_kind
@pytest.mark.parametrize("layer", [m for m in LAYERS if "residual" in inspect.signature(m.forward).parameters])
def test_a_layer_refuses_a_residual_of_another_kind(layer, kind):
    if kind == "None":
        return  # that is no residual
    make, advice = KINDS[kind]
    x = feature_map(layer)
    with pytest.raises(TypeError, match=rf"as residual, but got .*{advice}"):
        build(layer).eval()(x, make(x))


ONE = torch.ones(C, device=DEVICE)
# op -> call with an input and further arguments
OPS = {
    "batch_norm_act": lambda x, **p: ops.batch_norm_act(x, **p),
    "batch_normalize": lambda x, **p: ops.batch_normalize(x, **{"mean": ONE, "rstd": ONE, **p}),
    "evonorm_b0": lambda x, **p: ops.evonorm_b0(x, **{"weight": ONE, "bias": ONE, "v": ONE, **p}),
    "evonorm_s0": lambda x, **p: ops.evonorm_s0(x, **{"num_groups": 2, "weight": ONE, "bias": ONE, "v": ONE, **p}),
    "filter_response_norm": lambda x, **p: ops.filter_response_norm(x, **{"weight": ONE, "bias": ONE, "tau": ONE, **p}),
    "group_norm": lambda x, **p: ops.group_norm(x, **{"num_groups": 2, **p}),
    "weight_standardize": lambda x, **p: ops.weight_standardize(x, **p),
    "weight_standardize_many": lambda x, **p: ops.weight_standardize_many([x], **p),
}
each_op = pytest.mark.parametrize("op", OPS)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("name", ["weight", "bias", "residual"])
def test_an_op_refuses_what_lies_on_another_device(name, device):
    """A kernel would read the address of the one in the memory of the other."""
    with FakeTensorMode():
        x = torch.empty(2, C, 5, 5, device="cuda:0")
        value = torch.empty(x.shape if name == "residual" else C, device=device)
        with pytest.raises(ValueError, match=f"{name} on {device} and an input on cuda:0"):
            ops.group_norm(x, 2, **{name: value})


def test_every_op_is_tried():
    assert set(OPS) == set(ops.__all__)


@each_kind
@each_op
def test_an_op_refuses_what_is_no_dense_floating_point_tensor(op, kind):
    make, advice = KINDS[kind]
    name = op.removesuffix("_many")
    with pytest.raises(TypeError, match=rf"(?s)^{name} takes a dense tensor.*, but got .*{advice}"):
        OPS[op](make(torch.randn(2, C, 5, 5, device=DEVICE)))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.ones(C, dtype=torch.complex64), TypeError, "complex64"),
        (torch.ones(C, dtype=torch.int64), TypeError, "int64"),
        ([1.0] * C, TypeError, "list"),
        (torch.ones(C - 1), ValueError, rf"one value of {{}} per channel, but got \({C - 1},\)"),
        (torch.ones(1), ValueError, r"one value of {} per channel, but got \(1,\)"),
        (torch.ones(1, C, 1, 1), ValueError, r"one value of {} per channel, but got \(1, "),
    ],
    ids=["complex", "integers", "list", "one too few", "one", "four axes"],
)
@each_op
def test_an_op_refuses_parameters_that_are_not_one_number_per_channel(op, value, error, message):
    x = torch.randn(2, C, 5, 5, device=DEVICE)
    value = value.to(DEVICE) if isinstance(value, torch.Tensor) else value
    names = {"mean", "rstd", "weight", "bias", "v", "batch_var", "tau"} & set(
        inspect.signature(getattr(ops, op)).parameters
    )
    for name in names if "standardize" not in op else ():
        with pytest.raises(error, match=message.format(name)):
            OPS[op](x, **{name: value})


def test_groups_of_an_op_are_integers():
    for op in ("group_norm", "evonorm_s0"):
        for groups in (True, 2.0, "2", None):
            with pytest.raises(ValueError, match=f"{op} takes an integer as num_groups, but got {groups!r}"):
                OPS[op](torch.randn(2, C, 5, device=DEVICE), num_groups=groups)


def test_an_act_that_is_no_word():
    for act in (5, True, ["relu"]):
        with pytest.raises(ValueError, match="is no activation"):
            ops.group_norm(torch.randn(2, C, 5, device=DEVICE), 2, act=act)


# --- shapes without values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@each_mode
@each_layer
def test_the_meta_device_infers_shapes(layer, training, dtype):
    """Forward and backward, as for planning memory and for building large models."""
    net = build(layer)
    if layer is layers.CrossIterationBatchNorm:
        net = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), net)
    net = net.to("meta", dtype).train(training)
    x = feature_map(layer).to("meta", dtype).requires_grad_()
    for _ in range(2):  # CBN joins the second batch with the first
        y = net(x)
        assert y.is_meta
        assert y.dtype == dtype
        assert y.shape[:2] == x.shape[:2]
        assert isinstance(net, nn.modules.conv._ConvNd) or y.shape == x.shape
        y.sum().backward()
    assert x.grad.is_meta
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("kwargs", [{"act": "silu"}, {"momentum": None}, {"affine": False}], ids=str)
@each_mode
@each_layer
def test_the_meta_device_with_other_settings(layer, training, kwargs):
    (name,) = kwargs
    if name not in settings(layer) or (layer is layers.EvoNormB0 and name == "momentum"):
        return
    x = feature_map(layer).to("meta")
    if "buffer_num" in settings(layer):
        kwargs = {"buffer_num": 0, **kwargs}
    assert build(layer, **kwargs).to("meta").train(training)(x).is_meta


@pytest.mark.parametrize("shape", [(0, C, 4, 4), (2, C, 0, 4), (0, C, 0, 0), (0, C)], ids=str)
@each_mode
@pytest.mark.parametrize("layer", [m for m in LAYERS if not issubclass(m, nn.modules.conv._ConvNd)])
def test_an_input_without_values_gives_an_output_without_values(layer, training, shape):
    """As nn.BatchNorm2d has it; nn.GroupNorm refuses maps without positions, which ours takes."""
    norm = build(layer).train(training)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    y = norm(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in norm.parameters())
    torch.testing.assert_close(dict(norm.named_buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize("op", [op for op in OPS if "standardize" not in op])
def test_an_op_takes_an_input_without_channels(op):
    nothing = torch.empty(0, device=DEVICE)
    x = torch.empty(2, 0, 4, device=DEVICE, requires_grad=True)
    names = {"mean", "rstd", "weight", "bias", "v", "tau"} & set(inspect.signature(getattr(ops, op)).parameters)
    y = OPS[op](x, **dict.fromkeys(names, nothing))
    y = y[0] if isinstance(y, tuple) else y
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape


# --- large and small values

# Scales at which torch's own norms are right: squares of the largest and the sum of squares stay finite.
SCALES = {torch.float32: (1e-30, 1e-10, 1e10, 1e18), torch.bfloat16: (1e-30, 1e18), torch.float16: (1e-3, 1e4)}
SCALED = [(dtype, scale) for dtype, scales in SCALES.items() for scale in scales]


@pytest.mark.parametrize(("dtype", "scale"), SCALED, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_are_right_as_far_as_squares_are_finite(case, dtype, scale):
    layer = MODELS.get(case.layer)(6, **case.kwargs).to(DEVICE, dtype).train(case.training)
    x = (torch.randn(3, 6, 7, 5).clamp(-3, 3) * scale).to(DEVICE, dtype).requires_grad_()
    dy = torch.randn_like(x)
    x64 = x.detach().double().requires_grad_()
    want = case.formula(x64, **{name: p.detach().double() for name, p in layer.named_parameters()})
    if want.abs().max() > torch.finfo(dtype).max:
        return  # an affine map of large numbers, or a norm by running statistics
    (want_dx,) = torch.autograd.grad(want, x64, dy.double())
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    ulps = 16 * case.condition if dtype == torch.float32 else 1.1 if INTERPRETED else 0.6
    for got, exact in ((y, want), (dx, want_dx)):
        if exact.abs().max() < torch.finfo(dtype).tiny / torch.finfo(dtype).eps:
            continue  # what is left of its digits in this dtype is none of ours
        error = (got.double() - exact).abs().max()
        assert error <= ulps * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of numpy, in Triton's interpreter
@pytest.mark.parametrize("scale", [1e10, 1e18, 1e19, 1e20])
def test_where_the_squares_of_group_norm_overflow_stock_is_no_better(scale):
    x = torch.randn(2, 8, 5, 5, device=DEVICE) * scale
    want = F.group_norm(x.double(), 2)
    stock, ours = (
        bool(torch.allclose(y.double(), want, rtol=1e-3, atol=1e-3)) for y in (F.group_norm(x, 2), ops.group_norm(x, 2))
    )
    assert ours >= stock
