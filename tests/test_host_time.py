"""What a GPU's user pays on the host, shown without a GPU: launches, allocations, compilations, the warm-up."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from normplug import layers, warming
from normplug.bench import compilations, host, paper
from normplug.ops import group_norm
from normplug.ops._registration import has_triton

if not has_triton():
    pytest.skip("Triton comes with torch on Linux only", allow_module_level=True)

from normplug.kernels import _launch
from normplug.kernels._recording import record

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_INTERPRETER = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}


def run(code, **env):
    """Run code in a process where Triton compiles; return what it printed, as JSON."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=WITHOUT_INTERPRETER | env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


class Operations(TorchDispatchMode):
    """Counts the operations of torch."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def meta(shape, channels_last=False):
    form = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=torch.bfloat16, device="meta").to(memory_format=form)


LARGE, SMALL = (2, 256, 200, 336), (2, 256, 14, 14)
# norm, shape, channels-last -> kernels started forward and backward, tensors allocated
COSTS = {
    ("group_norm", LARGE, False): (2, 2, 4, 7),
    ("group_norm", LARGE, True): (2, 2, 4, 7),
    ("group_norm", SMALL, False): (1, 2, 3, 5),
    ("evonorm_s0", LARGE, False): (2, 2, 4, 6),
    ("filter_response_norm", LARGE, False): (2, 2, 3, 6),
    ("batch_norm", LARGE, False): (2, 2, 5, 7),
    ("batch_norm", LARGE, True): (2, 2, 5, 7),
}


@pytest.mark.parametrize(("norm", "shape", "channels_last"), COSTS)
def test_launches_and_allocations(norm, shape, channels_last, monkeypatch):
    """Each is host time: about a microsecond for a kernel or a tensor; views and casts, of which none is left, too."""
    module = importlib.import_module(f"normplug.kernels.{norm}")
    counters = torch.zeros(9, dtype=torch.int32, device="meta")  # on a GPU they are kept
    monkeypatch.setattr(importlib.import_module("normplug.kernels._groups"), "gates", lambda *_: counters)
    x, w = meta(shape, channels_last), torch.empty(shape[1], device="meta")
    given = {
        "group_norm": (32, w, w, 1e-5, "relu", None),
        "batch_norm": (w, w, 1e-5, "relu", None),
        "evonorm_s0": (32, w, w, w, 1e-5),
        "filter_response_norm": (w, w, w, 1e-6),
    }[norm]
    results: list = []
    record(lambda: results.extend(module.forward(x, *given)))
    statistics = results[1:3] if norm != "filter_response_norm" else results[1:]
    behind = {"group_norm": ("relu", None), "batch_norm": ("relu", None)}.get(norm, ())
    parameters = {"evonorm_s0": (w, w), "filter_response_norm": (w, w, w)}.get(norm, (w, w))
    costs = []
    for call in (
        lambda: module.forward(x, *given),
        lambda: module.backward(x, x, *statistics, *parameters, *behind),
    ):
        with Operations() as operations:
            launches = record(call)
        costs.append((len(launches), operations.count))
    (forward, of_forward), (backward, of_backward) = costs
    third = 1 if norm in ("evonorm_s0", "filter_response_norm") else 0  # its gradient, in the place of an empty dz
    assert (forward, backward) == COSTS[norm, shape, channels_last][:2]
    assert set(of_forward) <= {"empty_like", "new_empty"}
    assert set(of_backward) <= {"empty_like", "new_empty"}
    allocated = COSTS[norm, shape, channels_last][2:]
    assert (of_forward.total(), of_backward.total() - third) == allocated


def test_kernels_and_bytes_of_a_model_on_paper():
    rows = {(row["model"], row["layout"]): row for row in paper.run()["rows"]}
    for model, number in ("Mask R-CNN", 69), ("I3D", 53):
        contiguous, channels_last = (rows[model, layout] for layout in ("contiguous", "channels-last"))
        assert contiguous["layers"] == channels_last["layers"] == number
        for row in contiguous, channels_last:  # 1 + 2 where a group fits into a program, else 2 + 2
            assert 3 * number < row["kernels"] < 4 * number
        assert contiguous["least"] == channels_last["least"]
        assert contiguous["least"] < contiguous["bytes"] <= 8 / 5 * contiguous["least"]
    # the stem alone: 2 x 64 x 400 x 672 values of 2 bytes, five times; by passes eight times
    stem = paper._count("stem", [shape for shape in paper.select("all", "act") if shape.place == "stem"][:1], False)
    assert (stem["bytes"], stem["least"], stem["kernels"]) == (8 * 68_812_800, 5 * 68_812_800, 4)


@pytest.mark.slow
def test_compilations_of_a_training_run():
    code = """
import json, torch
from normplug.bench import compilations as c
norms = "group_norm", "batch_norm"
print(json.dumps([[c.count(norm, torch.bfloat16, last)[-1] for last in (False, True)] for norm in norms]))
"""
    for counts in run(code):
        assert max(counts) <= compilations.GOAL


@pytest.mark.slow
def test_the_warm_up_leaves_nothing_to_compile(tmp_path):
    """Its processes write to the cache in which a training process looks: there a start adds nothing."""
    code = """
import json, os, torch
from normplug import layers, warming

def main():
    from normplug.kernels._stub_driver import H100, stub_driver
    from normplug.bench import host
    warming.SIZES_OF_MAPS = [(14, 14), (100, 168)]
    net = torch.nn.Sequential(layers.GroupNorm(256, act="relu"))
    starts = warming.starts_of(warming.calls_of(net, 2, torch.bfloat16))
    seen = []
    number = warming.compile_all(starts, H100, 2, lambda done, total: seen.append((done, total)))
    folder = os.environ["TRITON_CACHE_DIR"]
    before = set(os.listdir(folder))
    with host.without_launching() as launches:
        for shape in ((2, 256, 14, 14), (2, 256, 100, 168)):
            x, residual = (torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
            net[0](x, residual).sum().backward()
            net[0](x).sum().backward()
    print(json.dumps([number, seen[-1], launches.count, len(before), sorted(set(os.listdir(folder)) - before)]))

if __name__ == "__main__":
    main()
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    number, last, started, kept, new = run(
        f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", TRITON_CACHE_DIR=str(tmp_path / "cache")
    )
    assert last == [number, number]
    assert started > 8
    assert kept >= number
    assert new == []


def test_the_warm_up_knows_every_layer_that_starts_kernels():
    """Those that are looked for and found, whatever their settings; a rank that is alone with it does not wait."""
    for layer in (getattr(layers, name) for name in layers.__all__):
        if not (isinstance(layer, type) and getattr(layer, "op", "weight_standardize") != "weight_standardize"):
            continue
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), layer(32))
        starts = warming.starts_of(itertools.islice(warming.calls_of(net, 2, torch.bfloat16), 4))
        assert starts or layer is layers.FrozenBatchNorm, layer  # torch's own, without activation and residual
        assert all(start.kernel.startswith("normplug.kernels.") for start in starts)


@pytest.mark.parametrize("cuda", [False, True])
def test_the_hook_compiles_ahead_of_training_on_a_gpu(cuda, monkeypatch):
    pytest.importorskip("mmengine")
    from mmengine.registry import HOOKS

    module = importlib.import_module("normplug.openmmlab.compile_kernels")
    called = []
    monkeypatch.setattr(module, "warm_up", lambda *args: called.append(args) or 7)

    class Net(torch.nn.Module):
        def parameters(self):
            yield type("Weight", (), {"is_cuda": cuda})

    class AmpOptimWrapper:
        cast_dtype = torch.bfloat16

    class Runner:
        model, optim_wrapper = Net(), AmpOptimWrapper()
        train_dataloader = type("Loader", (), {"batch_size": 3})

    HOOKS.build(dict(type="CompileKernelsHook", jobs=5)).before_train(Runner)
    assert [args[1:4] for args in called] == ([(3, torch.bfloat16, 5)] if cuda else [])
    Runner.optim_wrapper = object()
    assert module.dtype_of(Runner.optim_wrapper) == torch.float32


@pytest.mark.slow
def test_the_benchmark_of_host_time_measures_both_sides():
    code = """
import json
from dataclasses import asdict
from normplug.bench import host
host.CASES = host.CASES[:2]
print(json.dumps([asdict(t) for t in host.measure(rounds=2, calls=5)]))
"""
    rows = run(code)
    assert [row["launches"] for row in rows] == [4, 3, 4, 3]
    assert all(row["ours"] > 0 < row["torch"] for row in rows)
    assert len(host.markdown({"rows": rows}).splitlines()) == 2 + len(rows) + 2


def test_a_step_starts_its_kernel_directly_from_the_second_call(monkeypatch):
    started, direct = [], []

    class Compiled:
        function, packed_metadata = "f", "m"

        def run(self, *args):
            direct.append(args)

    class Kernel:
        arg_names = "x_ptr", "size", "BLOCK"

    monkeypatch.setattr(_launch, "run", lambda *args, **constants: started.append((args, constants)) or Compiled())
    step = _launch.Step(Kernel, 7, [5], {"BLOCK": 64}, warps=2)
    step(11, "x")
    step(11, "y")
    assert len(started) == 1
    assert direct == [(7, 1, 1, 11, "f", "m", None, None, None, "y", 5, 64)]


def test_whoever_listens_to_ops_still_hears_them(monkeypatch):
    """Kernels are started without the dispatcher only where no mode and no profiler asks for the op."""
    from normplug.ops import _registration

    started = []
    kernels = {name: lambda *args, name=name: started.append(name) for name in _registration.KERNELS}
    monkeypatch.setattr(_registration, "KERNELS", kernels)
    monkeypatch.setattr(_registration, "FIRST_DEVICE", -1)
    monkeypatch.setattr(importlib.import_module("normplug.ops.group_norm"), "_leave_to_aten", lambda *_: False)
    x = torch.randn(2, 8, 3, 3)

    def go(x):
        return group_norm(x, 2)

    with pytest.raises(TypeError, match="NoneType"), torch.no_grad():
        go(x)  # the stand-in for the kernel returns nothing
    assert started == ["group_norm"]
    with Operations() as operations:
        go(x)
    assert operations.count["normplug::group_norm"] == 1
    with torch.profiler.profile() as profile:
        go(x)
    assert "normplug::group_norm" in {event.key for event in profile.key_averages()}
    torch.compile(go, fullgraph=True, backend="aot_eager")(x.requires_grad_()).sum().backward()
    assert started == ["group_norm"]
