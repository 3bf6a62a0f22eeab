"""CUDA graphs: what breaks their capture, and what they would replay that was true only when they were captured.

Where there is no GPU, tensors without memory stand for CUDA's: no number can be read from them, and a tensor of the
host next to one of them is a copy, which a capture does not allow or which a replay repeats.
"""

import os
import weakref
from pathlib import Path

import pytest
import torch
from cases import DEVICE
from test_bad_input import C, build, each_layer, each_mode, feature_map, settings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normplug import layers
from normplug.ops._registration import has_triton

if not has_triton():
    pytest.skip("Triton comes with torch on Linux only", allow_module_level=True)

from normplug.kernels import weight_standardize as kernel
from normplug.kernels._recording import record

FORM = (1e-5, 1, False)
CUDA = DEVICE == "cuda"


class OnlyDevice(TorchDispatchMode):
    """Refuse every operation that reads or writes memory of the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, out)):
            assert not (isinstance(t, torch.Tensor) and t.is_cpu), f"{func} has a tensor of the host"
        return out


@pytest.fixture
def facts(monkeypatch):
    """The tool that knows every launch. It switches the interpreter off, which kernels imported later must not see."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "tools"))
    before = dict(os.environ)
    import kernel_facts

    os.environ.update(before)
    return kernel_facts


def test_no_launch_needs_the_host_when_it_is_captured(facts, monkeypatch):
    number = 0
    for _, _, call in facts.calls():
        record(call)  # the warm-up
        with monkeypatch.context() as patch, OnlyDevice():
            patch.setattr(kernel, "_is_capturing", lambda device: True)
            number += len(record(call))
    assert number > 100


@each_mode
@each_layer
@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_layer_needs_the_host_when_it_is_captured(layer, training, momentum):
    kwargs = {"momentum": momentum} if "momentum" in settings(layer) else {}
    if layer is layers.CrossIterationBatchNorm and training:
        pytest.skip("says that it cannot be captured")
    if momentum is None and (not kwargs or layer is layers.EvoNormB0):
        pytest.skip("has no such momentum")
    net = build(layer, **kwargs).to("meta").train(training)
    x = feature_map(layer).to("meta").requires_grad_()
    net(x).sum().backward()
    with OnlyDevice():
        net(x).sum().backward()


def test_cbn_says_that_it_cannot_be_captured(monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, C, 3), layers.CrossIterationBatchNorm(C)).to(DEVICE)
    x = torch.randn(2, 3, 5, 5, device=DEVICE)
    net(x)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph while it trains"):
            net[1](net[0](x))


def test_torch_is_told_what_a_graph_must_not_repeat():
    tags = [str(tag) for tag in torch.ops.normplug.recomputing.default.tags]
    assert ("Tag.cudagraph_unsafe" in tags) == hasattr(torch.Tag, "cudagraph_unsafe")


# --- weight standardization, whose launch reads addresses


def weights():
    return [torch.randn(shape, device=DEVICE) for shape in ((4, 8, 3, 3), (6, 4, 1, 1), (3, 5))]


def results(given):
    outs, mean, std = kernel.forward_many(given, *FORM)
    return [*outs, mean, std, *kernel.backward_many(outs, given, mean, std, *FORM)]


@pytest.fixture
def capturing(monkeypatch):
    def start():
        monkeypatch.setattr(kernel, "_is_capturing", lambda device: True)

    kernel._parts.cache_clear()
    monkeypatch.setattr(kernel, "_captured", {})
    return start


def test_captured_addresses_come_from_no_memory_of_the_host(capturing, monkeypatch):
    given = weights()
    want = results(given)
    capturing()
    tables, made = [], kernel._addresses
    monkeypatch.setattr(kernel, "_addresses", lambda *args: tables.append(made(*args)) or tables[-1])
    monkeypatch.setattr(torch, "tensor", None)
    torch.testing.assert_close(results(given), want, rtol=0, atol=0)
    assert [t.tolist()[1::3] for t in tables] == [[w.data_ptr() for w in given]] * 2


def test_a_first_call_cannot_be_captured(capturing):
    capturing()
    with pytest.raises(RuntimeError, match=r"a set of 3 weights for the first time.*Run the same.*once before"):
        kernel.forward_many(weights(), *FORM)
    kernel.forward(weights()[0], *FORM)  # one weight takes no table


def test_what_a_graph_reads_is_kept(capturing):
    given = weights()
    results(given)
    table = weakref.ref(kernel._parts(tuple((len(w), w.numel()) for w in given), *sizes(), torch.device(DEVICE)))
    capturing()
    results(given)
    kernel._parts.cache_clear()
    assert table() is not None


def test_what_no_graph_reads_is_not_kept(capturing):
    given = weights()
    results(given)
    table = weakref.ref(kernel._parts(tuple((len(w), w.numel()) for w in given), *sizes(), torch.device(DEVICE)))
    kernel._parts.cache_clear()
    assert table() is None


def sizes():
    return kernel.SMALL, kernel.MIDDLE, kernel.TILE


def test_one_weight_takes_no_table(monkeypatch):
    weight = weights()[0]
    outs, mean, std = kernel.forward_many([weight, weight], *FORM)
    monkeypatch.setattr(kernel, "_addresses", None)
    monkeypatch.setattr(kernel, "_parts", None)
    got = kernel.forward(weight, *FORM)
    want = outs[0], mean[: len(weight)], std[: len(weight)]
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    kernel.backward(weight, weight, *got[1:], *FORM)


@pytest.mark.skipif(not CUDA, reason="CUDA graphs take a GPU")
def test_a_graph_standardizes_what_the_weights_are_when_it_is_replayed():
    given = weights()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = results(given)
    kernel._parts.cache_clear()
    for w in given:
        w.normal_()
    others = [torch.randn(1000, device=DEVICE).cpu() for _ in range(100)]  # to be written where the host has room
    graph.replay()
    torch.testing.assert_close(got, results(given), rtol=0, atol=0)
    assert others
