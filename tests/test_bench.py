"""The benchmark: what it counts, what it refuses to time, and what it makes of its rows. No number of it is tested."""

import functools
import inspect
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from cases import unpadded
from torch import nn

from normplug import bench
from normplug.__main__ import main
from normplug.bench import against, cases, cpu_goals, measure, peers, report, runner, shapes
from normplug.bench.facts import conditions, slug
from normplug.bench.runner import AGAIN, OURS

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
EAGER = ["torch eager"]


@pytest.fixture(autouse=True)
def as_outside_of_tests():
    """Time is measured with the settings that users have."""
    torch.use_deterministic_algorithms(False)


# --- bytes


@pytest.mark.parametrize(
    ("op", "forward", "both"),
    [
        ("group_norm", 2, 5),  # x, y; dy, x, dx
        ("group_norm_relu", 2, 5),
        ("group_norm_add_relu", 3, 8),  # x, residual, y; dy, x, residual, dx, dresidual
        ("batch_norm_add_relu", 3, 8),
        ("evonorm_s0", 2, 5),
        ("weight_standardize_many", 2, 5),
    ],
)
def test_bytes_are_counted_tensor_by_tensor(op, forward, both):
    op = cases.OPS[op]
    shape = shapes.Shape("a", "b", op.role, ((3, 64, 5, 7),))
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        values, vector = 3 * 64 * 5 * 7 * size, len(op.vectors) * 64 * 4
        assert cases.count_bytes(op, shape, dtype, backward=False) == forward * values + vector
        assert cases.count_bytes(op, shape, dtype, backward=True) == both * values + 3 * vector


def test_bytes_of_many_filters_are_those_of_each():
    op = cases.OPS["weight_standardize_many"]
    (many,) = shapes.select("tiny", "weights")
    each = [shapes.Shape("a", "b", "weights", (dims,)) for dims in many.dims]
    args = torch.float32, True
    assert cases.count_bytes(op, many, *args) == sum(cases.count_bytes(op, one, *args) for one in each)


# --- shapes


def inputs_of_norms(model, x):
    """Count shapes of what goes into each GN of a ResNet on the meta device, with what follows the GN."""
    seen = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm):
            # mmdet: layer1.0.gn3, layer1.0.downsample.1; mmaction2: layer1.0.conv3.bn, layer1.0.downsample.bn
            last = name.endswith("gn3") or ".conv3." in name
            role = "plain" if ".downsample" in name else "add" if last else "act"
            module.register_forward_pre_hook(lambda _, args, role=role: seen.update([(role, tuple(args[0].shape))]))
    model.train()
    model(x)
    return seen


def in_table(model, *places):
    found = [s for s in shapes.ALL if s.model == model and s.role != "weights"]
    return Counter({(s.role, s.dims[0]): s.layers for s in found if s.place.startswith(places)})


@pytest.mark.slow
def test_shapes_of_the_detector_are_those_of_its_backbone():
    mmdet = pytest.importorskip("mmdet.models")
    with torch.device("meta"):
        backbone = mmdet.ResNet(depth=50, norm_cfg=dict(type="GN", num_groups=32), norm_eval=False, style="pytorch")
        found = inputs_of_norms(backbone, torch.empty(2, 3, 800, 1344))
    assert found == in_table("Mask R-CNN", "stem", "stage")


@pytest.mark.slow
def test_shapes_of_i3d_are_those_of_its_backbone():
    pytest.importorskip("mmaction.models")
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    backbone = Config.fromfile(ROOT / "configs/i3d/i3d_r50_gn_8xb8-32x2x1-100e_kinetics400-rgb.py").model.backbone
    backbone.update(pretrained=None, pretrained2d=False)
    with DefaultScope.overwrite_default_scope("mmaction"), torch.device("meta"):
        model = MODELS.build(backbone)
        found = inputs_of_norms(model, torch.empty(8, 3, 32, 224, 224))
    assert found == in_table("I3D", "stem", "stage")
    filters = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Conv3d)]
    (table,) = [s for s in shapes.ALL if s.model == "I3D" and s.role == "weights"]
    assert sorted(filters) == sorted(table.dims)


def test_quick_shapes_are_some_of_all():
    for role in shapes.ROLES:
        quick, every = shapes.select("quick", role), shapes.select("all", role)
        assert quick
        assert set(quick) < set(every)
        assert shapes.select("tiny", role)


# --- right before fast


def case(op="group_norm_relu", dtype="float32", layout="contiguous"):
    return cases.OPS[op], shapes.select("tiny", cases.OPS[op].role)[0], dtype, layout


def measured():
    return [row for rows in runner.measure_case(case(), CPU, EAGER, 0.001, 1.0) for row in rows]


def broken(op, monkeypatch, change):
    """Let our op return something else."""
    right = cases.OPS[op]
    wrong = cases.Op(**{**vars(right), "ours": lambda **tensors: change(right.ours(**tensors), tensors)})
    monkeypatch.setitem(cases.OPS, op, wrong)


def one_value(y, _):
    return y + 1e-3 * (y == y.max())


BREAKS = {
    "value": one_value,
    "gradient": lambda y, t: y + t["x"].to(y.dtype) * 1e-2 - t["x"].detach().to(y.dtype) * 1e-2,
    "weight": lambda y, t: y.detach() + (y - y.detach()) * 1.001,
    "nan": lambda y, _: torch.where(y == y.max(), torch.nan, y),
    "shape": lambda y, _: y[:1],
}


@pytest.mark.parametrize("fault", BREAKS)
def test_a_broken_op_is_reported_and_not_timed(fault, monkeypatch):
    broken("group_norm_relu", monkeypatch, BREAKS[fault])
    rows = measured()
    assert {(r.who, r.status) for r in rows} == {(OURS, "wrong" if fault != "shape" else "failed")}
    assert all(r.ms is None and r.message for r in rows)


def test_an_op_that_raises_is_reported(monkeypatch):
    def fail(*_):
        raise RuntimeError("no such kernel")

    broken("group_norm_relu", monkeypatch, fail)
    rows = measured()
    assert {(r.status, r.message) for r in rows} == {("failed", "RuntimeError: no such kernel")}


def test_an_op_that_does_not_exist_yet_is_reported(monkeypatch):
    def absent(*_):
        from normplug.ops import no_such_norm

        return no_such_norm

    broken("group_norm_relu", monkeypatch, absent)
    rows = measured()
    assert {r.status for r in rows} == {"unavailable"}
    assert "no_such_norm" in rows[0].message
    assert str(ROOT) not in rows[0].message


@pytest.mark.parametrize("dtype", runner.DTYPES)
@pytest.mark.parametrize("op", cases.OPS)
def test_our_ops_pass_the_gate(op, dtype):
    for layout in (False, True):
        problem = cases.make_problem(
            cases.OPS[op], shapes.select("tiny", cases.OPS[op].role)[0], runner.DTYPES[dtype], layout, CPU
        )
        ours = peers.Contender(OURS, lambda problem=problem: problem.op.ours(**problem.tensors), problem.tensors)
        with runner.lone_process_group(CPU, op.startswith("sync")):
            assert measure.compare(problem, ours, ours=True) == ""


@pytest.mark.parametrize("op", [op for op in cases.OPS if not op.startswith("sync")])
def test_peers_compute_the_same(op):
    problem = cases.make_problem(cases.OPS[op], shapes.select("tiny", cases.OPS[op].role)[0], torch.float32, False, CPU)
    wanted = [p for p in peers.PEERS if "compile" not in p and p not in ("apex", "liger")]
    made = peers.peers_of(problem, wanted)
    assert "torch eager" in made
    for make in made.values():
        contender = make()
        assert measure.compare(problem, contender, ours=False) == "", contender.name


def test_a_3d_layer_reaches_timm_as_a_2d_one():
    pytest.importorskip("timm.layers")
    shape = next(s for s in shapes.TINY if s.role == "act" and len(s.dims[0]) == 5)
    for channels_last in (False, True):
        problem = cases.make_problem(cases.OPS["evonorm_b0"], shape, torch.float32, channels_last, CPU)
        assert measure.compare(problem, peers.peers_of(problem, ["timm"])["timm"](), ours=False) == ""


def test_memory_counts_what_is_allocated():
    x = torch.zeros(1000, requires_grad=True)
    contender = peers.Contender("double", lambda: x * 2, {"x": x})
    peak, kept = measure.memory(contender, [torch.ones(1000)], CPU)
    assert 4000 <= kept < 4100  # y
    assert 8000 <= peak < 8200  # y and dx


def test_quantiles():
    assert measure.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert measure.quantile([1.0, 2.0], 0.25) == 1.25


# --- from beginning to end


def run(argv, capsys):
    code = main(["bench", "--device", "cpu", *argv])
    return code, capsys.readouterr()


def test_tiny_run(tmp_path, capsys):
    out = tmp_path / "a" / "rows.json"
    argv = ["--ops", "group_norm_relu", "weight_standardize", "--dtypes", "float32", "--layouts", "contiguous"]
    code, text = run([*argv, "--peers", *EAGER, "--each", "0.002", "--out", str(out)], capsys)
    assert code == 0
    result = json.loads(out.read_text())
    assert {"torch", "timm", "apex", "liger-kernel", "normplug"} <= set(result["facts"]["versions"])
    assert result["bandwidth"]["copy_gb_per_s"] > 0
    whos = {(r["op"], r["who"], r["direction"]) for r in result["rows"]}
    assert whos == {
        (op, who, direction)
        for op in ("group_norm_relu", "weight_standardize")
        for who in (OURS, AGAIN, *EAGER)
        for direction in runner.PASSES
    }
    for row in result["rows"]:
        assert row["status"] == "ok"
        assert row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["copy_fraction"] == pytest.approx(row["gb_per_s"] / result["bandwidth"]["copy_gb_per_s"])
        assert row["peak_bytes"] >= row["kept_bytes"] > 0
    assert "| x normplug again | x torch eager |" in unpadded(text.out)
    assert "Clocks and temperature: not recorded (no GPU here" in text.out
    assert "[1/3]" in text.err  # progress
    assert "[1/3]" not in unpadded(text.out)
    assert main(["bench", "--table", str(out)]) == 0
    assert capsys.readouterr().out == text.out


def test_when_the_time_is_up_the_rest_is_not_run(capsys):
    code, text = run(["--ops", "group_norm_relu", "--dtypes", "float32", "--seconds", "0"], capsys)
    assert code == 0
    assert "| group_norm_relu | normplug | not run | 8 | the time was up |" in unpadded(text.out)


def test_wrong_results_fail_the_command(monkeypatch, capsys):
    broken("group_norm_relu", monkeypatch, BREAKS["gradient"])
    argv = ["--ops", "group_norm_relu", "--dtypes", "float32", "--layouts", "contiguous", "--peers", *EAGER]
    code, text = run(argv, capsys)
    assert code == 1
    assert "gradient of x is off by" in unpadded(text.out)


def test_a_missing_device_is_an_argument_error(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    assert main(["bench", "--device", "abacus"]) == 2
    assert "sees no such GPU" in capsys.readouterr().err


def test_cases_begin_with_something_of_everything():
    """The smallest and the largest map of each op, in each dtype, and both layouts, before anything a second time."""
    ops, dtypes, layouts = ["group_norm", "evonorm_s0"], ["bfloat16", "float32"], list(runner.LAYOUTS)
    order = runner.plan(ops, "all", dtypes, layouts)
    ends = {}
    for op in ops:
        by_size = sorted(shapes.select("all", cases.OPS[op].role), key=lambda shape: torch.Size(shape.dims[0]).numel())
        ends[op] = by_size[0], by_size[-1]
    first = [(op.name, dtype, shape) for op, shape, dtype, _ in order[:8]]
    assert set(first) == {(op, dtype, end) for op in ops for dtype in dtypes for end in ends[op]}
    assert [dtype for _, dtype, _ in first] == ["bfloat16"] * 4 + ["float32"] * 4
    for op in ops:
        assert {layout for o, _, _, layout in order[:8] if o.name == op} == set(layouts)
    whole = {
        (o, s, d, la) for o in ops for s in shapes.select("all", cases.OPS[o].role) for d in dtypes for la in layouts
    }
    assert len(order) == len(whole)
    assert {(op.name, *rest) for op, *rest in order} == whole


# --- stopped


TINY_RUN = ["--ops", "group_norm_relu", "--dtypes", "float32", "--peers", *EAGER, "--each", "0.002"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_reports_what_was_measured(number, tmp_path, monkeypatch, capsys):
    """Between the passes of the second case: its forward rows are in the file already."""
    out, passes, timed = tmp_path / "rows.json", [], runner.time_in_turns

    def stopping(batches, *args):
        if OURS in batches:
            passes.append(json.loads(out.read_text())["rows"] if out.exists() else [])
            if len(passes) == 4:
                os.kill(os.getpid(), number)
        return timed(batches, *args)

    monkeypatch.setattr(runner, "time_in_turns", stopping)
    before = signal.getsignal(number)
    code, text = run([*TINY_RUN, "--out", str(out)], capsys)
    assert code == 128 + number
    assert signal.getsignal(number) is before
    assert [len(rows) for rows in passes] == [0, 3, 6, 9]  # ours, again, torch eager
    rows = json.loads(out.read_text())["rows"]
    assert [(r["who"], r["status"]) for r in rows[9:]] == [(OURS, "not run")] * 5
    assert rows[9]["direction"] == "forward+backward"
    assert {r["message"] for r in rows[9:]} == {f"stopped by {number.name}"}
    assert "| group_norm_relu | tiny 2-D |" in unpadded(text.out)
    assert f"| not run | 5 | stopped by {number.name} |" in unpadded(text.out)
    assert list(tmp_path.iterdir()) == [out]


def test_a_second_signal_ends_as_ever():
    before = signal.getsignal(signal.SIGINT)
    with bench._stoppable():
        assert signal.getsignal(signal.SIGINT) is not before
        with pytest.raises(runner.Stopped):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before
    with bench._stoppable():
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_stopped_before_its_first_case_has_a_report(monkeypatch, capsys):
    monkeypatch.setattr(runner, "copy_bandwidth", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    code, text = run(TINY_RUN, capsys)
    assert code == 128 + signal.SIGTERM
    assert "Copy bandwidth in this run: - GB/s before" in text.out
    assert "| not run | 8 | stopped by SIGTERM |" in unpadded(text.out)


# --- clocks


class Event:
    """A CUDA event that writes down when it is recorded; there is a GPU only in its name."""

    log: ClassVar[list[str]] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.log.append("event")

    def elapsed_time(self, _):
        return 1.0


class Buffer:
    def sum(self):
        Event.log.append("flush")


@pytest.fixture
def fake_gpu(monkeypatch):
    Event.log = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: Event.log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: None)
    monkeypatch.setattr(measure, "_more_than_l2", lambda _: Buffer())
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: len(Event.log)))


def test_the_cache_is_flushed_outside_of_the_time(fake_gpu):
    batch = measure.batch_of(lambda: Event.log.append("call"), torch.device("cuda", 0))
    times, hosts = batch(2, 0.1, True)
    assert Event.log == ["wait", *["flush", "event", "call", "event"] * 2, "wait"]
    assert len(times) == 2
    assert hosts == [1000, 1000]  # of the call alone
    Event.log.clear()
    batch(2, 0.1, False)
    assert Event.log == ["wait", "call", *["event", "call", "event"] * 2, "wait"]


def test_cold_and_warm_are_two_columns():
    def batch(count, _host, cold):
        return [3.0 if cold else 2.0] * count, [0.5] * count

    timing = measure.time_in_turns({"a": batch}, torch.device("cuda", 0), 0.1)["a"]
    assert (timing.median, timing.warm, timing.host) == (3.0, 2.0, 0.5)
    assert measure.time_in_turns({"a": batch}, CPU, 0.1)["a"].warm is None
    rows = [made_up("group_norm", OURS, 0.3, warm_ms=0.1), made_up("group_norm", AGAIN, 0.33, warm_ms=0.1)]
    text = unpadded(report.markdown(made_up_result(rows)))
    assert "| 26.7 | 0.27 | 3.00 | 0.100 | 1.10 |" in text  # GB/s, of copy, warm, host, again
    assert "0.3000 (0.3000 to 0.3000) | 0.1000 |" in text
    assert "second over first, is 1.100 to 1.100 in 1 cases" in text


def test_the_ceiling_is_a_copy_of_random_bits(monkeypatch):
    copies = []
    monkeypatch.setattr(
        measure, "batch_of", lambda call, _: copies.append(call) or (lambda n, *_: ([1.0] * n, [1.0] * n))
    )
    assert measure.copy_bandwidth(CPU, 1 << 20) == pytest.approx(2 * 2**20 / 1e6)
    source = inspect.getclosurevars(copies[0]).nonlocals["source"]
    assert source.nbytes == 1 << 20
    assert source.unique().numel() > 0.99 * source.numel()


SMI = """#!/bin/sh
[ "$1" = --id=GPU-abc ] && echo "1980, 1980, 2619, 41, 113.25, 0x0000000000000000"
"""


def test_clocks_come_from_nvidia_smi(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    uuid = "abc"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))
    gpu = torch.device("cuda", 0)
    found = conditions(gpu)
    assert (found["SM clock, MHz"], found["temperature, °C"]) == ("1980", "41")
    table = unpadded(report.markdown(made_up_result([]) | {"conditions": {"before": found, "after": {}}}))
    assert "| temperature, °C | 41 | - |" in table
    uuid = "another"
    assert conditions(gpu) == {}
    assert conditions(CPU) == {}
    smi.unlink()
    assert conditions(gpu) == {}


# --- memory that holds nothing right


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize("size", [64, 5000, 300_000, 10_000_000])
def test_memory_is_poisoned_while_a_result_is_checked(size):
    with measure.poisoned(CPU):
        assert (torch.empty(size) == torch.full((1,), 0xFE, dtype=torch.uint8).repeat(4).view(torch.float32)).all()
    torch.ones(size)
    assert (torch.empty(size) > -1e38).any()  # and no longer


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_kernel_that_writes_nothing_is_wrong(monkeypatch):
    """Neither its own earlier result nor anybody else's lies in what it returns."""
    seen = []

    def unwritten(y, _):
        seen.append(torch.empty_like(y).detach())
        return y * 0 + seen[-1]

    broken("group_norm_relu", monkeypatch, unwritten)
    rows = measured()
    assert {(r.who, r.status) for r in rows} == {(OURS, "wrong")}
    assert (seen[-1] < -1e38).all()


def test_on_a_gpu_every_free_block_is_filled(monkeypatch):
    def segment(kind, *blocks, device=None, stream=7):
        blocks = [{"state": state, "size": size} for state, size in blocks]
        return {"device": device, "stream": stream, "segment_type": kind, "blocks": blocks}

    free, used = "inactive", "active_allocated"
    segments = [
        segment("small", (free, 512), (used, 1024), (free, 5 << 19)),
        segment("large", (used, 3 << 20), (free, 4 << 20)),
        segment("large", (free, 8 << 20), device=1),
        segment("large", (free, 8 << 20), stream=8),
    ]
    made, empty = [], torch.empty
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: made.append(empty(*args, **kwargs)) or made[-1])
    measure._fill_free_blocks(CPU)
    assert [len(t) for t in made] == [512, 1 << 20, 1 << 20, 1 << 19, 4 << 20]
    for t, dtype in itertools.product(made, (torch.bfloat16, torch.float16, torch.float32, torch.float64)):
        assert t.view(dtype).isnan().all()


# --- in place


class KeepsOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0]


class ReturnsView(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x.flatten() * 2).view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


@pytest.mark.parametrize(
    ("norm", "in_place"), [(lambda x: x * 2, True), (KeepsOutput.apply, False), (ReturnsView.apply, False)]
)
def test_peers_add_and_rectify_in_place_where_autograd_allows_it(norm, in_place):
    op, shape = cases.OPS["group_norm_add_relu"], shapes.select("tiny", "add")[0]
    problem = cases.make_problem(op, shape, torch.float32, False, CPU)
    outs = []

    def watched(x):
        outs.append(norm(x))
        return outs[-1]

    contender = peers._with_sum_and_relu("a peer", problem, watched, {})
    y = contender.call()
    assert (y.data_ptr() == outs[-1].data_ptr()) == in_place
    got = torch.autograd.grad(y, list(contender.leaves.values()), problem.dys[0])
    x, residual = (contender.leaves[name].detach().requires_grad_() for name in ("x", "residual"))
    z = x.exp() if norm == KeepsOutput.apply else x * 2
    want = torch.autograd.grad((z + residual).relu(), (x, residual), problem.dys[0])
    torch.testing.assert_close(got, want)


# --- another version


@pytest.mark.parametrize("mode", ["--host", "--compilations", "--cpu-goals", "--table=rows.json"])
def test_another_version_goes_with_the_ops(mode, capsys):
    assert main(["bench", mode, "--against", "main"]) == 2
    assert f"--against main goes with the ops: leave out {mode.split('=')[0]}" in capsys.readouterr().err


def git(folder, *args):
    subprocess.run(["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *args], check=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A checkout whose tag 'slip' has a GroupNorm that is wrong, and whose tag 'empty' has no normplug."""
    root = tmp_path_factory.mktemp("repository")
    git(root, "init", "-q")
    git(root, "commit", "-q", "--allow-empty", "-m", "empty")
    git(root, "tag", "empty")
    shutil.copytree(ROOT / "normplug", root / "normplug", ignore=shutil.ignore_patterns("__pycache__"))
    for tag, more in (("good", ""), ("slip", SLIP)):
        with (root / "normplug" / "ops" / "__init__.py").open("a") as file:
            file.write(more)
        git(root, "add", "-A")
        git(root, "commit", "-q", "-m", tag)
        git(root, "tag", tag)
    return root


SLIP = """
_right = group_norm
def group_norm(*args):
    return _right(*args) * 1.01
"""


@pytest.mark.slow
def test_another_version_is_measured_in_turns(repository, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(bench, "unpacked", functools.partial(against.unpacked, root=repository))
    out = tmp_path / "rows.json"
    assert main(["bench", "--device", "cpu", *TINY_RUN, "--against", "good", "--out", str(out)]) == 0
    rows = [r for r in json.loads(out.read_text())["rows"] if r["who"] == "normplug@good"]
    assert [(r["status"], r["direction"]) for r in rows] == [("ok", p) for p in runner.PASSES] * 4
    assert all(r["ms"] > 0 and r["peak_bytes"] > 0 for r in rows)
    assert "| x normplug again | x normplug@good | x torch eager |" in unpadded(capfd.readouterr().out)


@pytest.mark.slow
def test_the_other_version_runs_its_own_code_and_may_die(repository):
    op, shape, _, _ = case()
    with against.unpacked("slip", repository) as folder:
        with against.Other("slip", folder, CPU) as other:
            assert "output y0 is off by" in other.ask("prepare", op.name, shape, torch.float32, False)
            with pytest.raises(RuntimeError, match="Error: "):
                other.ask("prepare", op.name, shapes.Shape("a", "b", "act", ((2, 33, 4, 4),)), torch.float32, False)
            other.process.kill()
            given = [row for rows in runner.measure_case(case(), CPU, EAGER, 0.001, 1.0, other) for row in rows]
        assert {r.status for r in given if r.who != other.name} == {"ok"}
        dead = [r for r in given if r.who == other.name]
        assert {(r.status, r.message) for r in dead} == {
            ("failed", "RuntimeError: the process of normplug@slip has ended")
        }
    assert not folder.exists()


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("no-such-branch", "no commit, branch or tag of"),
        ("--help", "no commit, branch or tag of"),
        ("", "no commit, branch or tag of"),
        ("empty", "has no folder normplug/"),
        (None, "takes a git checkout of normplug"),
    ],
)
def test_a_version_that_is_not_there_is_an_argument_error(ref, said, repository, tmp_path, monkeypatch, capsys):
    root = tmp_path if ref is None else repository
    monkeypatch.setattr(bench, "unpacked", functools.partial(against.unpacked, root=root))
    assert main(["bench", "--device", "cpu", f"--against={'main' if ref is None else ref}"]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert said in sentence


# --- tables


def made_up(op, who, ms, dtype="bfloat16", place="a", **more):
    row = runner.Row(op, "Model", place, [[2, 64, 8, 8]], dtype, "contiguous", "forward+backward", who)
    ms = ms or float("nan")
    row.bytes, row.ms, row.ms_low, row.ms_high, row.repetitions, row.host_ms = 8_000_000, ms, ms, ms, 5, 0.1
    row.gb_per_s, row.peak_bytes, row.kept_bytes = row.bytes / ms / 1e6, 10_000_000, 5_000_000
    row.copy_fraction = row.gb_per_s / 100
    for name, value in more.items():
        setattr(row, name, value)
    return row


def made_up_result(rows, device_type="cuda"):
    found = dict(device="GPU X", device_type=device_type, driver="1", cuda="2", threads=1, python="3", commit="c")
    found |= dict(versions={"torch": "9.9", "apex": None}, date="today", command="bench")
    bandwidth = {"copy_gb_per_s": 100.0, "copy_gb_per_s_at_the_end": 99.0}
    return {"facts": found, "bandwidth": bandwidth, "rows": [asdict(row) for row in rows]}


def test_table_has_geometric_means_and_goals():
    rows = [
        made_up("group_norm_relu", OURS, 0.1),
        made_up("group_norm_relu", "torch eager", 0.2),
        made_up("group_norm_relu", OURS, 0.1, place="b"),
        made_up("group_norm_relu", "torch eager", 0.8, place="b"),
        made_up("group_norm_relu", "liger", 0.1, place="b"),
        made_up("evonorm_s0", OURS, None, status="not run", message="the time was up"),
    ]
    text = unpadded(report.markdown(made_up_result(rows)))
    # sqrt(2 * 8) = 4; 80 GB/s of 100
    line = (
        "| group_norm_relu | bfloat16 | contiguous | forward+backward | 2 | 80.0 | 0.80 | - | 0.100 | 4.00 | 1.00 (1) |"
    )
    assert line in text
    assert "| group_norm_relu, group_norm_add_relu | bfloat16 | torch eager | 2 | 4.00 | 2 | reached |" in text
    fused = "| group_norm_relu, group_norm_add_relu | bfloat16 |"
    assert f"{fused} copy bandwidth, maps below L2 | 0.6 | 0.80 | 2 | reached |" in text
    assert f"{fused} copy bandwidth, maps above L2 | 0.8 | not measured | 0 | - |" in text
    assert "| evonorm_s0 | bfloat16 | timm | 6 | not measured | 0 | - |" in text
    assert "| evonorm_s0 | normplug | not run | 1 | the time was up |" in text
    assert "not installed: apex" in text


def test_where_launches_cost_more_than_kernels_the_goal_counts_them():
    ours = made_up("weight_standardize_many", OURS, 0.1, dtype="float32", host_ms=0.3)
    mmcv = made_up("weight_standardize_many", "mmcv", 0.2, dtype="float32", host_ms=6.0)
    text = unpadded(report.markdown(made_up_result([ours, mmcv])))
    assert "| weight_standardize_many | float32 | mmcv | 10 | 20.00 | 1 | reached |" in text


def test_no_goals_of_a_gpu_on_a_cpu():
    text = report.markdown(made_up_result([made_up("group_norm", OURS, 0.1)], device_type="cpu"))
    assert "## Goals" not in text


def test_slug():
    assert slug("NVIDIA H200") == "nvidia-h200"


# --- the comparison on the CPU


@pytest.mark.parametrize(
    ("ratios", "goal", "at_least", "reached"),
    [
        ([2.0, 8.0], 4.0, True, True),
        ([2.0, 7.9], 4.0, True, False),
        ([0.5], 0.6, False, True),
        ([0.7], 0.6, False, False),
    ],
)
def test_goals_are_reached_by_geometric_mean(ratios, goal, at_least, reached):
    parts = [cpu_goals.Part("a", 1, r, r, r, r, 1) for r in ratios]
    found = cpu_goals.Comparison("a", "b", "a / b", goal, at_least, parts=parts).close()
    assert found.reached is reached
    assert cpu_goals.Comparison("a", "b", "a / b", goal, at_least).close().reached is None


def test_cbn_by_autograd_computes_cbn():
    """The peer is the same layer: output, gradients and the effect of a full window."""
    from normplug.layers import CrossIterationBatchNorm

    norms = CrossIterationBatchNorm(6), cpu_goals.ByAutograd(6), cpu_goals.ByAutograd(6, fused=True)
    stacks = [cpu_goals.Stack(6, norm) for norm in norms]
    for _ in range(6):
        x, dy = torch.randn(2, 6, 5, 7), torch.randn(2, 6, 5, 7)
        outs = [stack.step(x.clone().requires_grad_(), dy * 10) for stack in stacks]
        for out in outs[1:]:
            torch.testing.assert_close(out, outs[0], rtol=1e-4, atol=1e-4)
    assert len(norms[1].earlier) == 3
    for stack in stacks[1:]:
        torch.testing.assert_close(stack.conv.weight, stacks[0].conv.weight, rtol=1e-4, atol=1e-5)


def test_cpu_goals_run(monkeypatch, tmp_path, capsys):
    tiny = [(2, 64, 4, 4)]
    monkeypatch.setattr(cpu_goals, "CONVOLUTIONS", [((2, 8, 6, 6), 8)])
    monkeypatch.setattr(cpu_goals, "select_shapes", lambda *_: shapes.select("tiny", "weights"))
    monkeypatch.setattr(cpu_goals.measure, "__defaults__", (tiny,))
    out = tmp_path / "goals.json"
    code = main(["bench", "--cpu-goals", "--seconds", "0", "--out", str(out)])
    text = unpadded(capsys.readouterr().out)
    found = json.loads(out.read_text())["rows"]
    assert code == int(any(c["reached"] is False for c in found))
    assert len(found) == 10
    measured = [c for c in found if c["parts"]]
    assert {c["what"].split(",")[0] for c in measured} >= {"GN with ReLU", "CBN"}
    assert all(c["reached"] is not None for c in measured)
    assert all(c["message"] for c in found if not c["parts"])
    for c in found:
        assert c["what"] in text
    assert main(["bench", "--table", str(out)]) == 0
    assert unpadded(capsys.readouterr().out) == text
