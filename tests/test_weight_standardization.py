"""Weight standardization: mmcv's numbers, gradients, degenerate filters, layouts, folding, and refusing to be fused."""

import copy
import io

import pytest
import torch
from cases import DEVICE
from torch import nn

import normplug.ops._blocks
from normplug.layers import WSConv1d, WSConv2d, WSConv3d
from normplug.layers.weight_standardization import fold_ws
from normplug.ops import weight_standardize, weight_standardize_many

SHAPES = pytest.mark.parametrize(
    "shape", [(5, 3, 4), (6, 4, 3, 3), (4, 8, 1, 1), (3, 1, 3, 3), (3, 2, 2, 3, 2)], ids=str
)
FORMS = pytest.mark.parametrize(
    ("correction", "eps_inside"), [(1, False), (0, False), (1, True), (0, True)], ids=["mmcv", "tf", "bcn", "timm"]
)
CONVS = pytest.mark.parametrize(("cls", "dim"), [(WSConv1d, 1), (WSConv2d, 2), (WSConv3d, 3)], ids=["1d", "2d", "3d"])


def formula(weight, eps=1e-5, correction=1, eps_inside=False):
    rows = weight.reshape(len(weight), -1)
    d = rows - rows.mean(1, keepdim=True)
    var = d.square().sum(1, keepdim=True) / (rows.shape[1] - correction)
    return (d / ((var + eps).sqrt() if eps_inside else var.sqrt() + eps)).reshape(weight.shape)


def last(weight):
    """Return the weight with its input channels innermost."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return weight.to(memory_format=formats.get(weight.ndim, torch.contiguous_format))


# --- the op


@SHAPES
@FORMS
@pytest.mark.parametrize("block", [None, 10], ids=["whole", "blocks"])
def test_values_and_gradients(shape, correction, eps_inside, block, monkeypatch):
    if block:
        monkeypatch.setattr(normplug.ops._blocks, "BLOCK", block)
    for arrange in (torch.clone, last):
        weight = arrange(torch.randn(shape, dtype=torch.float64, device=DEVICE)).requires_grad_()
        form = 1e-2, correction, eps_inside  # a large eps, so that its place shows
        got = weight_standardize(weight, *form)
        torch.testing.assert_close(got, formula(weight, *form))
        assert got.stride() == weight.stride()
        grad = torch.randn_like(got).contiguous()
        dw = torch.autograd.grad(got, weight, grad)[0]
        torch.testing.assert_close(dw, torch.autograd.grad(formula(weight, *form), weight, grad)[0])
        assert dw.stride() == weight.stride()


def test_gradcheck():
    weight = torch.randn(3, 2, 2, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(weight_standardize, (weight,))


@pytest.mark.parametrize("mean", [0, 10], ids=["mean-0", "mean-10"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (4, 640, 3, 3)], ids=str)
def test_precision(shape, dtype, mean):
    weight = (mean + torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()
    w64 = weight.detach().double().requires_grad_()
    got, want = weight_standardize(weight), formula(w64)
    grad = torch.randn_like(got)
    dw, dw64 = torch.autograd.grad(got, weight, grad)[0], torch.autograd.grad(want, w64, grad.double())[0]
    assert got.dtype == dw.dtype == dtype
    for g, w in ((got, want), (dw, dw64)):
        ulps = 0.6 if dtype != torch.float32 else 16 if mean else 4
        limit = ulps * torch.finfo(dtype).eps * w.abs().max().item()
        torch.testing.assert_close(g.double(), w, rtol=0, atol=limit)


def test_many_weights_are_standardized_as_each_of_them():
    weights = [last(torch.randn(s, device=DEVICE)).requires_grad_() for s in [(4, 3, 3, 3), (8, 4, 1, 1), (2, 3, 4)]]
    got = weight_standardize_many(weights)
    for g, w in zip(got, weights, strict=True):
        assert torch.equal(g, weight_standardize(w))
        assert g.stride() == w.stride()
    grads = [torch.randn_like(g) for g in got]
    each = torch.autograd.grad([weight_standardize(w) for w in weights], weights, grads)
    for g, w in zip(torch.autograd.grad(got, weights, grads), each, strict=True):
        assert torch.equal(g, w)
    for used in ([1], [0, 2]):  # a weight without part in the loss has no gradient, as if it were not there
        outs = weight_standardize_many(weights)
        some = torch.autograd.grad([outs[i] for i in used], weights, [grads[i] for i in used], allow_unused=True)
        for i in range(3):
            assert torch.equal(some[i], each[i]) if i in used else some[i] is None
    assert weight_standardize_many([]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arrange", [torch.clone, last], ids=["contiguous", "channels-last"])
def test_ops_are_well_formed(dtype, arrange):
    weights = [
        arrange(torch.randn(s, device=DEVICE)).to(dtype).requires_grad_()
        for s in [(4, 3, 3, 3), (8, 4, 1, 1), (4, 1, 3, 3)]
    ]
    one, many = torch.ops.normplug.weight_standardize.default, torch.ops.normplug.weight_standardize_many.default
    torch.library.opcheck(many, (weights, 1e-5, 1, False))
    torch.library.opcheck(one, (weights[0], 1e-5, 0, True))
    for weight in weights:
        meta, real = one(weight.to("meta"), 1e-5, 1, False), one(weight, 1e-5, 1, False)
        assert [t.stride() for t in meta] == [t.stride() for t in real]  # opcheck looks at strides on CUDA only


def test_properties():
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    out = weight_standardize(weight)
    rows = out.flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(rows.std(1), torch.ones(6, dtype=torch.float64), rtol=1e-4, atol=0)
    torch.testing.assert_close(weight_standardize(3 * weight + 2), out, rtol=0, atol=1e-4)
    dw = torch.autograd.grad(out, weight, torch.randn_like(out))[0].flatten(1)
    assert dw.sum(1).abs().max() < 1e-12
    centred = (weight - weight.mean((1, 2, 3), keepdim=True)).flatten(1)
    assert (dw * centred).sum(1).abs().max() < 1e-3


@FORMS
@pytest.mark.parametrize("value", [0.0, 0.1, 3.0])
def test_a_filter_of_equal_values_gives_zero_and_finite_gradients(value, correction, eps_inside):
    for dtype in (torch.float32, torch.float16):
        weight = torch.randn(3, 4, 3, 3, dtype=dtype, device=DEVICE)
        weight[1] = value
        weight.requires_grad_()
        out = weight_standardize(weight, 1e-5, correction, eps_inside)
        # 0.1 is no float: the mean of many is one rounding off, and eps is 1e-5 only
        assert out[1].abs().max() <= (0 if value in (0, 0.5) else 0.05)
        (dw,) = torch.autograd.grad(out, weight, torch.randn_like(out))
        assert dw.float().isfinite().all() or dtype == torch.float16  # 1 / eps is beyond float16
        assert not dw.isnan().any()


# --- the layers


def test_mmcvs_numbers():
    conv_ws = pytest.importorskip("mmcv.cnn.bricks.conv_ws")
    for kwargs in (dict(), dict(stride=2, padding=1, bias=False), dict(groups=4, dilation=2)):
        theirs = conv_ws.ConvWS2d(8, 12, 3, **kwargs).to(DEVICE)
        ours = WSConv2d(8, 12, 3, **kwargs).to(DEVICE)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        x = torch.randn(2, 8, 9, 9, device=DEVICE)
        y, want = ours(x), theirs(x)
        torch.testing.assert_close(y, want, rtol=0, atol=2e-6 * want.abs().max().item())
        dy = torch.randn_like(y)
        got, want = (torch.autograd.grad(f, [*m.parameters()], dy) for f, m in ((y, ours), (want, theirs)))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=2e-6 * w.abs().max().item())
        flat = ours.weight.flatten(1)
        w_hat = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-5)
        torch.testing.assert_close(ours.standardized_weight().flatten(1), w_hat, rtol=1e-6, atol=1e-6)


def test_timms_numbers():
    timm = pytest.importorskip("timm.layers")
    theirs = timm.StdConv2d(8, 12, 3, padding=1)
    ours = WSConv2d(8, 12, 3, padding=1, bias=False, eps=1e-6, correction=0, eps_inside=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(ours(x), theirs(x))


@CONVS
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_layer_is_its_convolution_with_the_standardized_weight(cls, dim, padding_mode):
    layer = cls(4, 6, 3, stride=2, padding=2, groups=2, padding_mode=padding_mode, dtype=torch.float64, eps=1e-2)
    stock = getattr(nn, f"Conv{dim}d")(
        4, 6, 3, stride=2, padding=2, groups=2, padding_mode=padding_mode, dtype=torch.float64
    )
    stock.bias = layer.bias
    with torch.no_grad():
        stock.weight.copy_(formula(layer.weight, 1e-2))
    x = torch.randn(2, 4, *[7] * dim, dtype=torch.float64)
    torch.testing.assert_close(layer(x), stock(x))
    torch.testing.assert_close(layer(x[0]), stock(x[0]))  # without a batch axis
    assert layer(x[:0]).shape == stock(x[:0]).shape
    assert "eps=0.01, correction=1, eps_inside=False" in repr(layer)
    twin = copy.deepcopy(layer)
    twin.load_state_dict(stock.state_dict(), strict=True)


def test_special_geometries_agree():
    weight = torch.randn(6, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(weight_standardize(weight[..., None])[..., 0], weight_standardize(weight))
    flat, deep = WSConv2d(4, 6, 3).double(), WSConv3d(4, 6, (1, 3, 3)).double()
    deep.load_state_dict({"weight": flat.weight[:, :, None], "bias": flat.bias})
    x = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(deep(x)[:, :, 1], flat(x[:, :, 1]))


@CONVS
def test_channels_last_weights(cls, dim):
    layer = cls(4, 6, 3)
    twin = copy.deepcopy(layer)
    twin.weight.data = last(twin.weight.data)
    x = torch.randn(2, 4, *[5] * dim)
    y, want = twin(last(x)), layer(x)
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(twin.weight.grad, layer.weight.grad, rtol=1e-4, atol=1e-4)


def test_filters_of_one_value_are_refused():
    for kwargs in (dict(groups=8), dict(groups=8, correction=0)):
        with pytest.raises(ValueError, match=r"WSConv2d.*in_channels=8, groups=8 and kernel_size=1.*1 value.*plain"):
            WSConv2d(8, 8, 1, **kwargs)
    with pytest.raises(ValueError, match=r"\(8, 1, 1, 1\)"):
        weight_standardize(torch.randn(8, 1, 1, 1))
    with pytest.raises(TypeError):
        WSConv2d(8, 8, 3, pading=1)
    WSConv2d(8, 8, (1, 2), groups=8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_from_float32(dtype):
    layer = WSConv2d(16, 8, 3, padding=1).to(DEVICE)
    x = torch.randn(2, 16, 5, 5, device=DEVICE)
    want = layer(x)
    with torch.autocast(DEVICE, dtype):
        y = layer(x)
        assert layer.standardized_weight().dtype == torch.float32
    assert y.dtype == dtype
    scale = want.abs().max().item()
    torch.testing.assert_close(y.float(), want, rtol=0, atol=2 * torch.finfo(dtype).eps * scale)
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    half = copy.deepcopy(layer).to(dtype)
    assert half(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(half.standardized_weight(), formula(half.weight.double()).to(dtype))


def test_compiles_without_graph_break():
    model = nn.Sequential(WSConv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), WSConv2d(8, 8, 1, bias=False))
    x = torch.randn(2, 4, 6, 6)
    want = model(x)
    grads = torch.autograd.grad(want.square().sum(), [*model.parameters()])
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got.square().sum(), [*model.parameters()]), grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


def test_the_weight_of_the_moment_counts():
    """Evaluation keeps no copy that a write to ``.data`` (mmengine's EMA) or loading could leave behind."""
    layer, x = WSConv2d(4, 8, 3).eval(), torch.randn(1, 4, 5, 5)
    for change in (
        lambda: layer.weight.data.copy_(torch.randn(8, 4, 3, 3)),
        lambda: layer.load_state_dict(WSConv2d(4, 8, 3).state_dict()),
        lambda: setattr(layer, "weight", nn.Parameter(torch.randn(8, 4, 3, 3))),
    ):
        with torch.inference_mode():
            layer(x)
        change()
        torch.testing.assert_close(layer(x), nn.functional.conv2d(x, formula(layer.weight), layer.bias))


# --- folding, and not being folded


@CONVS
def test_fold_leaves_plain_convolutions_that_compute_the_same(cls, dim):
    shared = cls(4, 4, 3, padding=1)
    model = nn.Sequential(cls(4, 4, 3, padding=1, bias=False), nn.Sequential(shared, nn.ReLU()), shared).eval()
    shared.weight.requires_grad_(False)
    calls = []
    shared.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 4, *[5] * dim)
    want = model(x)
    stock = getattr(nn, f"Conv{dim}d")
    folded = fold_ws(model)
    assert folded is model
    assert [type(m) for m in model.modules() if m is not model and not isinstance(m, (nn.Sequential, nn.ReLU))] == [
        stock
    ] * 2
    torch.testing.assert_close(model(x), want, rtol=0, atol=0)
    assert len(calls) == 4
    assert model[2] is model[1][0]
    assert not model[2].weight.requires_grad
    assert model[0].weight.requires_grad
    assert model[0].weight.is_leaf
    assert repr(model[0]) == repr(stock(4, 4, 3, padding=1, bias=False))
    torch.testing.assert_close(copy.deepcopy(model)(x), want, rtol=0, atol=0)
    assert type(fold_ws(cls(4, 4, 3))) is stock


@pytest.mark.parametrize("bias", [False, True])
def test_fusing_is_refused_and_works_after_folding(bias):
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    cnn = pytest.importorskip("mmcv.cnn")
    model = nn.Sequential(WSConv2d(4, 8, 3, bias=bias), nn.BatchNorm2d(8))
    nn.init.normal_(model[1].weight)
    nn.init.uniform_(model[1].running_var)
    nn.init.normal_(model[1].running_mean)
    model.eval()
    x = torch.randn(2, 4, 6, 6)
    want = model(x)
    with pytest.raises(ValueError, match=r"WSConv2d.*fuse_conv_bn.*fold_ws"):
        cnn.fuse_conv_bn(copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"WSConv2d.*fuse_conv_bn.*fold_ws"):
        fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(model(x), want)
    fused = cnn.fuse_conv_bn(fold_ws(copy.deepcopy(model)))
    assert type(fused[1]) is nn.Identity
    torch.testing.assert_close(fused(x), want, rtol=1e-4, atol=1e-4)


def test_efficient_evaluation_of_mmcv_is_refused():
    cnn = pytest.importorskip("mmcv.cnn")
    convs, norm = dict(conv_cfg=dict(type="ConvWS")), dict(norm_cfg=dict(type="BN"))
    module = cnn.ConvModule(4, 8, 3, **convs, **norm, efficient_conv_bn_eval=True)
    x = torch.randn(2, 4, 6, 6)
    assert module(x).shape == (2, 8, 4, 4)  # training goes through the layer as it is
    with pytest.raises(ValueError, match=r"WSConv2d.*efficient_conv_bn_eval.*fold_ws"):
        module.eval()(x)
    want = cnn.ConvModule(4, 8, 3, **convs, **norm).eval()
    want.load_state_dict(module.state_dict())
    torch.testing.assert_close(fold_ws(module)(x), want(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(want.conv._conv_forward(x, want.conv.weight, None), want.conv(x))


def test_symbolic_tracing():
    layer, x = WSConv2d(4, 8, 3), torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))


@pytest.mark.parametrize("bias", [False, True])
def test_everything_else_that_sets_parameters_works(bias):
    layer = WSConv2d(4, 8, 3, bias=bias)
    state = {k: torch.randn_like(v) for k, v in layer.state_dict().items()}
    layer.load_state_dict(state)
    layer.load_state_dict(state, assign=True)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    with torch.device("meta"):
        other = WSConv2d(4, 8, 3, bias=bias)
    other.load_state_dict(state, assign=True)
    x = torch.randn(2, 4, 5, 5)
    want = layer(x)
    torch.testing.assert_close(other(x), want)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(layer), copy.deepcopy(layer).double().float(), torch.load(stream, weights_only=False)):
        torch.testing.assert_close(twin(x), want)
    doubled = {k: 2 * v for k, v in layer.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(layer, doubled, x),
        want if not bias else want + layer.bias.view(8, 1, 1),
        rtol=1e-4,
        atol=1e-3,
    )
    layer.weight = nn.Parameter(layer.weight.detach().clone())  # tying weights, say
    layer.bias = layer.bias
    layer.to_empty(device="cpu").reset_parameters()
    layer.bias = None
    assert layer(x).shape == want.shape


# --- in the toolkits


def test_names_in_the_registry():
    cnn = pytest.importorskip("mmcv.cnn")
    for name, cls in (("ConvWS", WSConv2d), ("ConvWS2d", WSConv2d), ("ConvWS1d", WSConv1d), ("ConvWS3d", WSConv3d)):
        conv = cnn.build_conv_layer(dict(type=name, eps=1e-4), 4, 8, 3, padding=1, bias=False)
        assert type(conv) is cls
        assert conv.eps == 1e-4
        module = cnn.ConvModule(4, 8, 3, conv_cfg=dict(type=name), norm_cfg=dict(type="GN", num_groups=2), padding=1)
        assert type(module.conv) is cls
        assert module.conv.bias is None
        dim = module.conv.weight.ndim - 2
        assert module(torch.randn(2, 4, *[5] * dim)).shape == (2, 8, *[5] * dim)


def test_initializers_take_it_for_a_convolution():
    from mmengine.model.weight_init import initialize

    layer = WSConv2d(4, 8, 3)
    initialize(layer, dict(type="Constant", val=2, bias=3, layer="Conv2d"))
    assert (layer.weight == 2).all()
    assert (layer.bias == 3).all()
