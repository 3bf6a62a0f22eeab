"""What a stock norm can be turned into, ours can: graphs of torch.fx, traces, TorchScript, exported programs, ONNX."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from cases import DEVICE
from torch import nn
from torch.export import Dim

from normplug import layers
from normplug.layers import (
    BatchNormAct,
    CrossIterationBatchNorm,
    EvoNormB0,
    EvoNormS0,
    FilterResponseNorm,
    FrozenBatchNorm,
    GroupNorm,
    SyncBatchNorm,
    WSConv1d,
    WSConv2d,
    WSConv3d,
)

C = 8
NORMS = {
    "GN": lambda: GroupNorm(C, 2),
    "GN-silu": lambda: GroupNorm(C, 2, act="silu"),
    "GN-no-bias": lambda: GroupNorm(C, channels_per_group=2, bias=False),
    "GN-no-affine": lambda: GroupNorm(C, 2, affine=False),
    "BNAct": lambda: BatchNormAct(C),
    "BNAct-relu": lambda: BatchNormAct(C, act="relu"),
    "BNAct-by-batch": lambda: BatchNormAct(C, track_running_stats=False),
    "SyncBN": lambda: SyncBatchNorm(C),
    "CBN": lambda: CrossIterationBatchNorm(C, act="gelu"),
    "CBN-eps-outside": lambda: CrossIterationBatchNorm(C, eps=0.1, eps_mode="outside"),
    "FrozenBatchNorm": lambda: FrozenBatchNorm(C),
    "FrozenBatchNorm-leaky": lambda: FrozenBatchNorm(C, act="leaky_relu"),
    "EvoNormS0": lambda: EvoNormS0(C, 2),
    "EvoNormS0-affine": lambda: EvoNormS0(C, apply_act=False),
    "EvoNormS0-no-affine": lambda: EvoNormS0(C, affine=False),
    "EvoNormB0": lambda: EvoNormB0(C),
    "EvoNormB0-affine": lambda: EvoNormB0(C, apply_act=False),
    "FRN": lambda: FilterResponseNorm(C),
    "FRN-no-act": lambda: FilterResponseNorm(C, apply_act=False),
    "FRN-learned-eps": lambda: FilterResponseNorm(C, learnable_eps=True, eps_per_channel=True),
}
CONVOLUTIONS = {
    "ConvWS1d": lambda: WSConv1d(C, C, 3, padding=1),
    "ConvWS2d": lambda: WSConv2d(C, C, 3, stride=2, padding=1, groups=2, bias=False),
    "ConvWS2d-same-reflect": lambda: WSConv2d(C, C, (3, 2), dilation=2, padding="same", padding_mode="reflect"),
    "ConvWS3d": lambda: WSConv3d(C, C, 3, eps_inside=True, correction=0),
}
each_norm = pytest.mark.parametrize("name", NORMS)
each = pytest.mark.parametrize("name", {**NORMS, **CONVOLUTIONS})
# torch.jit is on its way out, and says so wherever it is called
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*empty non-base:UserWarning"),
]


def shaken(layer):
    """The layer in evaluation, with values that a forgotten one of them would be seen by."""
    for key, t in (*layer.named_parameters(), *layer.named_buffers()):
        if t.is_floating_point():
            nn.init.uniform_(t, 0.5, 2) if key == "running_var" else nn.init.normal_(t, mean=1.0)
    return layer.to(DEVICE).eval()


def build(name):
    return shaken({**NORMS, **CONVOLUTIONS}[name]())


def inputs(layer, sizes=((2, 7), (1, 9))):
    """Inputs of several sizes, the first for the tracer."""
    axes = next((a for a, conv in ((1, nn.Conv1d), (3, nn.Conv3d)) if isinstance(layer, conv)), 2)
    return [torch.randn(n, C, *[p, *[6, 5][: axes - 1]], device=DEVICE) for n, p in sizes]


class Net(nn.Module):
    """A layer within a model, with a convolution before it."""

    def __init__(self, layer):
        super().__init__()
        axes = inputs(layer)[0].ndim - 2
        self.conv, self.layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](C, C, 1), layer
        self.to(DEVICE).train(layer.training)

    def forward(self, x):
        return self.layer(self.conv(x)).relu()


def assert_same(got, want, x):
    with torch.no_grad():
        torch.testing.assert_close(got(x), want(x))


# --- torch.fx


@each
def test_fx_of_a_layer_by_itself(name):
    layer = build(name)
    if name == "BNAct-by-batch":  # as torch's batch norms: one that asks how many values there are
        with pytest.raises(torch.fx.proxy.TraceError, match="control flow"):
            torch.fx.symbolic_trace(layer)
        return
    graph = torch.fx.symbolic_trace(layer)
    saved = io.BytesIO()
    torch.save(graph, saved)
    saved.seek(0)
    for again in (graph, copy.deepcopy(graph), torch.load(saved, weights_only=False), torch.fx.symbolic_trace(graph)):
        for x in inputs(layer):
            torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@each
def test_fx_of_a_model_has_the_layer_as_one_node(name, training):
    net = Net(build(name)).train(training)
    graph = torch.fx.symbolic_trace(net)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["conv", "layer"]
    assert type(graph.layer) is type(net.layer)
    want, got = copy.deepcopy(net), copy.deepcopy(graph)
    for x in inputs(net.layer):
        torch.testing.assert_close(got(x), want(x), rtol=0, atol=0)
    torch.testing.assert_close(got.state_dict(), want.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["GN-silu", "BNAct-relu", "CBN", "FrozenBatchNorm-leaky"])
def test_fx_takes_what_a_call_brings(name):
    layer = build(name)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, x.neg(), "relu") + self.layer(x, act="gelu") + self.layer(x)

    (x, _), block = inputs(layer), Block()
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), block(x), rtol=0, atol=0)
    alone = torch.fx.symbolic_trace(layer)
    torch.testing.assert_close(alone(x, x.neg(), "relu"), layer(x, x.neg(), "relu"), rtol=0, atol=0)
    torch.testing.assert_close(alone(x), layer(x), rtol=0, atol=0)


def test_torchvision_finds_the_features_before_and_behind_a_layer():
    from torchvision.models.feature_extraction import create_feature_extractor

    net = Net(build("EvoNormS0"))
    x, _ = inputs(net.layer)
    features = create_feature_extractor(net, ["conv", "layer"])(x)
    torch.testing.assert_close(features, {"conv": net.conv(x), "layer": net.layer(net.conv(x))})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("norm", ["GN", "SyncBN", "EvoNormB0", "FRN", "CBN", "BNAct"])
def test_fx_and_a_trace_of_toolkits_models(norm):
    pytest.importorskip("mmdet.models")
    from mmdet.registry import MODELS

    cfg = dict(type="mmdet.ResNet", depth=18, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,))
    net = MODELS.build(dict(cfg, norm_cfg=dict(type=norm), conv_cfg=dict(type="ConvWS"), norm_eval=False))
    net.to(DEVICE).eval()
    x = torch.randn(1, 3, 32, 32, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))
    torch.testing.assert_close(torch.jit.trace(net, x)(x), net(x))


# --- TorchScript


@each
def test_torchscript(name):
    """Values in every dtype and at every rank; the layer that was given stays what it is."""
    layer = build(name)
    net = Net(layer)
    script, alone = torch.jit.script(net), torch.jit.script(layer)
    assert type(net.layer) is type(layer)
    saved = io.BytesIO()
    torch.jit.save(script, saved)
    saved.seek(0)
    loaded = torch.jit.load(saved)
    assert loaded.state_dict().keys() <= net.state_dict().keys()
    for x in inputs(layer):
        assert_same(script, net, x)
        assert_same(loaded, net, x)
    if name in NORMS:
        x, _ = inputs(layer)
        for other in (x.flatten(2), x.unsqueeze(4).unsqueeze(4), x[:0], x.to(memory_format=torch.channels_last)):
            assert_same(alone, layer, other)
    for dtype in (torch.float64, torch.bfloat16):
        half = copy.deepcopy(layer).to(dtype)
        for t in half.buffers():
            t.data = t.to(dtype) if t.is_floating_point() else t
        assert_same(torch.jit.script(half), half, x.to(dtype))


def train(net, xs):
    """Outputs and gradients of a step with each input, and the state then."""
    results = []
    for x in xs:
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        torch.manual_seed(1)
        results.append([y, *torch.autograd.grad(y, [leaf, *net.parameters()], torch.randn_like(y))])
    return results, dict(net.state_dict())


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchscript_trains_a_batch_norm(momentum, act, dtype):
    layer = shaken(BatchNormAct(C, momentum=momentum, act=act)).train().to(dtype)
    script = torch.jit.script(copy.deepcopy(layer))
    xs = [x.to(dtype) for x in inputs(layer)]
    tolerances = {} if dtype == torch.float32 else dict(rtol=0.02, atol=0.02)
    torch.testing.assert_close(train(script, xs), train(layer, xs), **tolerances)


@pytest.mark.parametrize("name", ["SyncBN", "CBN", "EvoNormB0"])
def test_torchscript_does_not_train_what_it_cannot(name):
    layer = build(name).train()
    x, _ = inputs(layer)
    with pytest.raises(torch.jit.Error, match=r"is trained in Python alone: call eval\(\)"):
        torch.jit.script(layer)(x)


# --- programs for inputs of any size


class Side(nn.Module):
    """Layers side by side: what makes a graph of one makes one of all, in less time."""

    def __init__(self, names, dtype=torch.float32):
        super().__init__()
        self.names, self.layers = list(names), nn.ModuleList(build(name).to(dtype) for name in names)
        for t in self.buffers():
            t.data = t.to(dtype) if t.is_floating_point() else t
        self.eval()

    def forward(self, x):
        return [layer(x) for layer in self.layers]

    def sizes(self, **limits):
        """What may differ from call to call: samples, and each spatial axis."""
        return {0: Dim("n"), **{i: Dim(f"axis{i}", **limits) for i in range(2, inputs(self.layers[0])[0].ndim)}}

    def inputs(self):
        x, other = inputs(self.layers[0], sizes=((2, 7), (3, 10)))
        dtype = next(self.parameters()).dtype
        return x.to(dtype), torch.cat([other, other[:, :, 4:]], 2).to(dtype)

    def compare(self, run, **tolerances):
        for x in self.inputs():
            for name, got, want in zip(self.names, run(x), self(x), strict=True):
                torch.testing.assert_close(got, want.detach(), **tolerances, msg=lambda m, name=name: f"{name}: {m}")


def sides():
    """All norms, and each convolution; with what a kernel needs in the way of room."""
    yield pytest.param(NORMS, {}, id="norms")
    yield from (pytest.param([name], {"min": 4}, id=name) for name in CONVOLUTIONS)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("names", "limits"), sides())
def test_exported_for_inputs_of_any_size(names, limits, strict):
    net = Side(names)
    exported = torch.export.export(net, net.inputs()[:1], dynamic_shapes={"x": net.sizes(**limits)}, strict=strict)
    assert not [node for node in exported.graph.nodes if "normplug" in str(node.target)]
    saved = io.BytesIO()
    torch.export.save(exported, saved)
    saved.seek(0)
    net.compare(torch.export.load(saved).module(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["BNAct", "BNAct-relu", "SyncBN", "EvoNormB0"])
def test_exported_in_training(name):
    """Of layers with running statistics, too: they move, and the program can be saved."""
    layer = build(name).train()
    xs = inputs(layer)
    dims = {axis: Dim(f"axis{axis}") for axis in (0, 2, 3)}
    saved = io.BytesIO()
    torch.export.save(torch.export.export(copy.deepcopy(layer), (xs[0],), dynamic_shapes=(dims,)), saved)
    saved.seek(0)
    torch.testing.assert_close(train(torch.export.load(saved).module(), xs), train(layer, xs))


@pytest.mark.parametrize(("names", "limits"), sides())
def test_compiled_for_inputs_of_any_size(names, limits):
    net = Side(names)
    net.compare(torch.compile(net, dynamic=True, fullgraph=True, backend="aot_eager"))


def test_a_trace_of_cbn_in_training_says_what_it_has_not():
    net = nn.Sequential(nn.Conv2d(C, C, 3), CrossIterationBatchNorm(C)).to(DEVICE)
    with pytest.warns(torch.jit.TracerWarning, match=r"has no history of batches. Call eval\(\) before"):
        torch.jit.trace(net, inputs(net[1])[0], check_trace=False)


def test_a_trace_is_of_no_certain_size():
    for names in (NORMS, *([name] for name in CONVOLUTIONS)):
        net = Side(names)
        net.compare(torch.jit.trace(net, net.inputs()[0]))


def run_by_onnx(file):
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda x: map(torch.from_numpy, session.run(None, {given.name: x.numpy()}))


# They warn of what they have been told, and of themselves
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.skipif(DEVICE != "cpu", reason="onnxruntime is that for CPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "trace"])
@pytest.mark.parametrize(("names", "limits"), sides())
def test_onnx(names, limits, dynamo, dtype, tmp_path):
    if names is not NORMS and dtype == torch.float16:
        pytest.skip("onnxruntime has no convolution of half precision on a CPU")
    # Batch norm by the batch, in evaluation: the older exporter has no path for torch's own either.
    net = Side([name for name in names if dynamo or name != "BNAct-by-batch"], dtype)
    x, file = net.inputs()[0], str(tmp_path / "net.onnx")
    if dynamo:
        torch.onnx.export(net, (x,), file, dynamo=True, dynamic_shapes={"x": net.sizes(**limits)}, verbose=False)
    else:
        axes = {"x": [0, *range(2, x.ndim)]}
        torch.onnx.export(net, (x,), file, dynamo=False, dynamic_axes=axes, input_names=["x"], opset_version=17)
    tolerances = dict(atol=2e-5, rtol=1e-4) if dtype == torch.float32 else {}
    net.compare(run_by_onnx(file), **tolerances)


# --- quantization


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("behind", [(), (nn.ReLU(),)], ids=["", "relu"])
@pytest.mark.parametrize("name", ["BNAct", "SyncBN", "CBN", "FrozenBatchNorm"])
def test_a_batch_norm_is_fused_into_its_convolution(name, behind):
    from torch.ao.quantization import fuse_modules, fuse_modules_qat

    layer = NORMS[name]() if name != "CBN" else CrossIterationBatchNorm(C)
    net = nn.Sequential(nn.Conv2d(C, C, 3), shaken(layer), *behind).to(DEVICE).eval()
    fused = fuse_modules(net, [[str(i) for i in range(len(net))]])
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    assert_same(fused, net, inputs(layer)[0])
    with pytest.raises(ValueError, match="no batch norm that torch can train in quantization"):
        fuse_modules_qat(net.train() if name != "FrozenBatchNorm" else net, [["0", "1"]])


@pytest.mark.parametrize(
    ("name", "lost"),
    [("BNAct-relu", "its activation 'relu'"), ("CBN", "its activation"), ("CBN-eps-outside", "its eps outside")],
)
def test_what_fusion_would_drop_is_refused(name, lost):
    from torch.ao.quantization import fuse_modules

    net = nn.Sequential(nn.Conv2d(C, C, 3), build(name)).eval()
    with pytest.raises(ValueError, match=rf"cannot be fused into the convolution before it, which would drop {lost}"):
        fuse_modules(net, [["0", "1"]])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@each_norm
def test_graph_mode_quantization_leaves_the_layer_in_full_precision(name):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    net = Net(build(name))
    x, _ = inputs(net.layer)
    prepared = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping(), (x,))
    prepared(x)
    got, want = convert_fx(prepared)(x), net(x)
    assert (got - want).norm() < 0.1 * want.norm()


# --- what looks at every attribute


@each
def test_attributes_are_without_side_effects(name):
    for layer in (build(name), build(name).train()):
        assert not hasattr(layer, "qconfig")
        for key, _ in inspect.getmembers(layer):
            getattr(layer, key, None)
        again = pickle.loads(pickle.dumps(layer))
        x, _ = inputs(layer)
        torch.testing.assert_close(again.eval()(x), layer.eval()(x), rtol=0, atol=0)


def test_every_layer_is_tried_here():
    tried = {type(make()).__name__ for make in {**NORMS, **CONVOLUTIONS}.values()}
    assert tried == set(layers.__all__)
