"""The benchmark: what it counts, what it refuses to time, and what it makes of its rows. No number of it is tested."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from cases import unpadded
from torch import nn

from normplug.__main__ import main
from normplug.bench import cases, cpu_goals, measure, peers, report, runner, shapes
from normplug.bench.facts import slug
from normplug.bench.runner import OURS

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
    rows = runner.measure_case(case(), CPU, EAGER, 0.001, 1.0)
    assert {(r.who, r.status) for r in rows} == {(OURS, "wrong" if fault != "shape" else "failed")}
    assert all(r.ms is None and r.message for r in rows)


def test_an_op_that_raises_is_reported(monkeypatch):
    def fail(*_):
        raise RuntimeError("no such kernel")

    broken("group_norm_relu", monkeypatch, fail)
    rows = runner.measure_case(case(), CPU, EAGER, 0.001, 1.0)
    assert {(r.status, r.message) for r in rows} == {("failed", "RuntimeError: no such kernel")}


def test_an_op_that_does_not_exist_yet_is_reported(monkeypatch):
    def absent(*_):
        from normplug.ops import no_such_norm

        return no_such_norm

    broken("group_norm_relu", monkeypatch, absent)
    rows = runner.measure_case(case(), CPU, EAGER, 0.001, 1.0)
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
        for who in (OURS, *EAGER)
        for direction in runner.PASSES
    }
    for row in result["rows"]:
        assert row["status"] == "ok"
        assert row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["copy_fraction"] == pytest.approx(row["gb_per_s"] / result["bandwidth"]["copy_gb_per_s"])
        assert row["peak_bytes"] >= row["kept_bytes"] > 0
    assert "x torch eager" in unpadded(text.out)
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
    order = runner.plan(["group_norm", "evonorm_s0"], "all", ["float32", "bfloat16"], ["contiguous"])
    first = {(op.name, dtype) for op, _, dtype, _ in order[:4]}
    assert first == {(op, dtype) for op in ("group_norm", "evonorm_s0") for dtype in ("float32", "bfloat16")}


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
    facts = dict(device="GPU X", device_type=device_type, driver="1", cuda="2", threads=1, python="3", commit="c")
    facts |= dict(versions={"torch": "9.9", "apex": None}, date="today", command="bench")
    bandwidth = {"copy_gb_per_s": 100.0, "copy_gb_per_s_at_the_end": 99.0}
    return {"facts": facts, "bandwidth": bandwidth, "rows": [asdict(row) for row in rows]}


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
    line = "| group_norm_relu | bfloat16 | contiguous | forward+backward | 2 | 80.0 | 0.80 | 4.00 | 1.00 (1) |"
    assert line in text
    assert "| group_norm_relu, group_norm_add_relu | bfloat16 | torch eager | 3 | 4.00 | 2 | reached |" in text
    assert (
        "| group_norm_relu, group_norm_add_relu | bfloat16 | copy bandwidth | 0.85 | 0.80 | 2 | not reached |" in text
    )
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


# --- the check on a GPU machine

CHECK = ROOT / "tools" / "gpu_check.sh"


@pytest.mark.slow
def test_gpu_check_says_that_there_is_no_gpu(tmp_path):
    env = dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHON=sys.executable)
    done = subprocess.run([CHECK, tmp_path / "out"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sees no GPU here" in done.stderr
    assert not (tmp_path / "out").exists()


FAKE = """#!/usr/bin/env bash
# An interpreter on a machine with a GPU, for gpu_check.sh: the parts are told by their arguments.

out=$(sed -n 's/.*--out \\([^ ]*\\).*/\\1/p' <<<"$*")
case "$*" in
    -) exit 0 ;;
    "- "*) exec {python} "$@" ;;
    *get_device_name*) echo some-gpu ;;
    "-m normplug env") echo "torch: 9.9" ;;
    "-c import xdist") exit 1 ;;
    *pytest*) echo "tests/test_layers.py {outcome}"; exit {code} ;;
    *"normplug bench"*) cp {rows} "$out"; [ {code} = 0 ] && echo "table of ops" ;;
    *benchmark_train*) exit {code} ;;
    *) exit 99 ;;
esac
"""


@pytest.mark.slow
@pytest.mark.parametrize(("code", "outcome"), [(0, "passed"), (1, "failed")])
def test_gpu_check_writes_what_was_measured(code, outcome, tmp_path):
    """With a stand-in for the interpreter: what it does with the parts, and with parts that fail."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(made_up_result([made_up("group_norm", OURS, 0.1)])))
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(python=sys.executable, outcome=outcome, code=code, rows=rows))
    fake.chmod(0o755)
    done = subprocess.run(
        [CHECK, "out", "abc123"], env=dict(os.environ, PYTHON=str(fake)), cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode == code, done.stderr
    (table,) = tmp_path.glob("out/some-gpu/*.md")
    (data,) = tmp_path.glob("out/some-gpu/*.json")
    assert done.stdout.split() == [str(table), str(data)]
    text, found = table.read_text(), json.loads(data.read_text())
    assert ("table of ops" in text) == (code == 0)
    assert ("| group_norm | bfloat16 | contiguous |" in text) == (code == 1)  # made from the rows
    assert "train: nothing was measured" in text
    assert f"test_layers.py {outcome}" in text
    assert found["ops"]["rows"][0]["ms"] == 0.1
    assert bool(found["failed"]) == (code == 1)
    if code:
        assert "tests (exit code 1)" in text.splitlines()[0]
