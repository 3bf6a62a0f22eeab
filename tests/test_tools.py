"""The command-line tools: arguments, errors, tables, and a run of each that trains."""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from cases import unpadded
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS, VISUALIZERS, init_default_scope
from mmengine.runner import Runner

from normplug.openmmlab import cli, training_runs

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import convert_checkpoint  # noqa: E402
import quickstart  # noqa: E402
import test as test_tool  # noqa: E402
import train as train_tool  # noqa: E402


@pytest.mark.parametrize("tool", [train_tool, test_tool], ids=["train", "test"])
def test_missing_config_is_named(tool, capsys):
    checkpoint = ["none.pth"] if tool is test_tool else []
    assert tool.main(["configs/no_such.py", *checkpoint]) == 2
    assert "no_such.py" in capsys.readouterr().err


def test_missing_checkpoint_is_named(tmp_path, capsys):
    config = tmp_path / "c.py"
    config.write_text("optim_wrapper = dict(type='OptimWrapper')\n")
    argv = [str(config), "--work-dir", str(tmp_path)]
    assert test_tool.main([*argv, "no_such.pth"]) == 2
    assert train_tool.main([*argv, "--resume", "no_such.pth"]) == 2
    assert train_tool.main([*argv, "--cfg-options", "load_from=no_such.pth"]) == 2
    tools = ("test.py", "train.py", "train.py")
    assert capsys.readouterr().err.splitlines() == [f"{tool}: There is no checkpoint no_such.pth." for tool in tools]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("a.b", "takes KEY=VALUE, got 'a.b'"),
        ("=3", "takes KEY=VALUE, got '=3'"),
        ("a=[1,", "brackets"),
        ("scheduler.7.end=3", "Index 7 exceeds the length of list"),
        ("lr.x=3", "lr"),
    ],
)
@pytest.mark.parametrize("tool", [train_tool, convert_checkpoint], ids=["train", "convert"])
def test_options_that_do_not_fit_are_one_sentence(tool, option, message, tmp_path, capsys):
    config = tmp_path / "c.py"
    config.write_text("scheduler = [dict(end=1)]\nlr = 0.1\n")
    where = ["--config", str(config), "a.pth", "b.pth"] if tool is convert_checkpoint else [str(config)]
    try:
        code = tool.main([*where, "--cfg-options", option])
    except SystemExit as stop:  # argparse's
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_pictures_go_where_the_flag_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for hook, key in (("DetVisualizationHook", "test_out_dir"), ("VisualizationHook", "out_dir")):
        cfg = Config(dict(default_hooks=dict(visualization=dict(type=hook))))
        test_tool.show_predictions(cfg, argparse.Namespace(show=False, wait_time=1, interval=1, show_dir=Path("shown")))
        assert cfg.default_hooks.visualization[key] == str(tmp_path / "shown")


def test_missing_package_is_named(tmp_path, capsys):
    config = tmp_path / "c.py"
    config.write_text("custom_imports = dict(imports=['no_such_package'], allow_failed_imports=False)\n")
    assert train_tool.main([str(config)]) == 2
    error = capsys.readouterr().err
    assert "no_such_package" in error
    assert 'pip install -e ".[openmmlab]"' in error


def test_flags_say_what_they_need(tmp_path, capsys, monkeypatch):
    config = tmp_path / "c.py"
    config.write_text("optim_wrapper = dict(type='OptimWrapper')\n")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert train_tool.main([str(config), "--amp"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    monkeypatch.setattr("normplug.openmmlab.cli.get_device", lambda: "cpu")
    assert train_tool.main([str(config), "--cfg-options", "optim_wrapper.type=AmpOptimWrapper"]) == 2
    assert "optim_wrapper.type=OptimWrapper" in capsys.readouterr().err
    assert train_tool.main([str(config), "--auto-scale-lr"]) == 2
    assert "base_batch_size" in capsys.readouterr().err
    assert test_tool.main([str(config), "a.pth", "--out", "a.json"]) == 2
    assert "*.pkl" in capsys.readouterr().err
    assert test_tool.main([str(config), "a.pth", "--tta"]) == 2
    assert "tta_model, tta_pipeline" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "0"], "--seeds must be 1 or more"),
        (["--batch-size", "-1"], "--batch-size must be 1 or more"),
        (["--device", "tpu"], "cpu, cuda, cuda:N or auto"),
        (["--norms", "GroupNorm"], "invalid choice: 'GroupNorm'"),
        (["--task", "audio"], "invalid choice: 'audio'"),
    ],
)
def test_quickstart_refuses_wrong_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        quickstart.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mask-rcnn_r18_fpn_gn_digits.py", "i3d_r18_gn_digits.py", None])
def test_scalars_reach_tensorboard(name, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cfg = Config.fromfile(ROOT / "configs" / "digits" / name) if name else Config()
    cli.add_tensorboard(cfg)
    cli.add_tensorboard(cfg)  # a config that has it already keeps the one
    assert [b["type"] for b in cfg.visualizer.vis_backends] == ["LocalVisBackend", "TensorboardVisBackend"]
    init_default_scope(cfg.get("default_scope", "mmengine"))
    visualizer = VISUALIZERS.build(cfg.visualizer | dict(save_dir=str(tmp_path), name=f"tensorboard {name}"))
    visualizer.add_scalars({"loss": 0.25}, step=7)
    visualizer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "vis_data")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(7, 0.25)]


def made_up_scalars(work_dir, ap):
    """Two logs, as after a resume: the second repeats iteration 3 and epoch 2."""
    for start, (steps, seconds, score) in {"a": ((1, 2, 3), 0.9, 0.0), "b": ((3, 4, 5), 0.2, ap)}.items():
        folder = work_dir / f"20260101_00000{start}" / "vis_data"
        folder.mkdir(parents=True)
        lines = [{"loss": 3.0 - step / 10, "time": seconds, "step": step} for step in steps]
        lines += [{"coco/bbox_mAP": ap / 2, "coco/segm_mAP": 0.1, "step": 1}] if start == "a" else []
        lines += [{"coco/bbox_mAP": score, "coco/segm_mAP": 0.2, "step": 2}]
        Path(folder, "scalars.json").write_text("\n".join(map(json.dumps, lines)))


def test_a_detector_that_finds_nothing_has_an_ap_of_zero(tmp_path):
    """mmdet then logs no metric, and a classifier always has one."""
    made_up_scalars(tmp_path, 0.5)
    file = tmp_path / "20260101_00000b" / "vis_data" / "scalars.json"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, '{"data_time": 0.002, "time": 0.025, "step": 3}']))
    outcome = training_runs.read_scalars(tmp_path, "detection")
    assert outcome.metrics == {"coco/bbox_mAP": 0, "coco/segm_mAP": 0}
    assert outcome.evaluations[1][1]["coco/bbox_mAP"] == 0.5
    with pytest.raises(RuntimeError, match="no acc/top1 and no acc/top5"):
        training_runs.read_scalars(tmp_path, "video")


def test_a_log_that_was_cut_off(tmp_path):
    made_up_scalars(tmp_path, 0.5)
    file = tmp_path / "20260101_00000a" / "vis_data" / "scalars.json"
    whole = file.read_text()
    file.write_text(whole[:-9])  # killed while it wrote; the resumed training has it again
    assert training_runs.read_scalars(tmp_path, "detection").metrics["coco/bbox_mAP"] == 0.5
    file.write_text(whole[9:])
    with pytest.raises(RuntimeError, match=r"Line 1 of .*scalars\.json"):
        training_runs.read_scalars(tmp_path, "detection")


def test_reports_are_json_with_a_loss_that_is_none(tmp_path):
    run = made_up_run("GN", 0, 0.3, tmp_path)
    run.outcome.losses[0] = (1, float("nan"))
    args = argparse.Namespace(task="detection", norms=["GN"], seeds=1, device="cpu", work_dir=tmp_path)
    _, paths = quickstart.write_report([run], args, 1.0)
    facts = json.loads(paths[-1].read_text(), parse_constant=pytest.fail)
    assert facts["runs"][0]["outcome"]["losses"][0] == [1, None]


def made_up_run(norm, seed, ap, tmp_path):
    run = quickstart.Run(norm, seed, f"{norm}.py", str(tmp_path / f"{norm}{seed}"), parameters=1234567)
    made_up_scalars(Path(run.work_dir), ap)
    run.outcome = training_runs.read_scalars(Path(run.work_dir), "detection")
    run.outcome.peak_memory_mb = 100.0 + seed
    return run


def test_quickstart_report_says_what_was_measured(tmp_path):
    runs = [made_up_run("GN", 0, 0.3, tmp_path), made_up_run("GN", 1, 0.4, tmp_path)]
    runs.append(quickstart.Run("BN", 0, "BN.py", "nowhere", failed="exit code 1; the end of run.log"))
    args = argparse.Namespace(task="detection", norms=["BN", "GN"], seeds=2, device="cpu", work_dir=tmp_path)
    table, paths = quickstart.write_report(runs, args, 12.3)
    assert "| GN | 35.0 ± 7.1 | 20.0 ± 0.0 | 0.550 ± 0.000 | 101 | 1,234,567 |" in unpadded(table)
    assert "| BN | failed |" in unpadded(table)
    assert [p.name for p in paths] == ["report.md", "report.html", "curves.png", "report.json"]
    assert "- failed: BN, seed 0: `exit code 1; the end of run.log`" in paths[0].read_text()
    facts = json.loads(paths[-1].read_text())
    assert [r["outcome"]["metrics"].get("coco/bbox_mAP") for r in facts["runs"]] == [0.3, 0.4, None]
    assert facts["runs"][0]["outcome"]["evaluations"][0] == [1, {"coco/bbox_mAP": 0.15, "coco/segm_mAP": 0.1}]
    assert [step for step, _ in facts["runs"][0]["outcome"]["losses"]] == [1, 2, 3, 4, 5]


@pytest.fixture
def tool(tmp_path):
    """A training that says what it is told to, in the shape of mmengine's log."""

    def start(code, **kwargs):
        command = [sys.executable, "-c", f"import os, subprocess, sys, time\n{code}"]
        return training_runs.Training(command, tmp_path, kwargs.pop("epochs", 2), dict(os.environ), **kwargs)

    return start


def finish(training):
    while not training.poll():
        time.sleep(0.02)


def test_training_is_followed_to_its_end(tool, tmp_path):
    made_up_scalars(tmp_path, 0.5)
    training = tool("print('Epoch(train)  [2][ 20/100]  lr: 1')")
    assert training.total is None
    assert training.fraction == 0
    finish(training)
    assert (training.iterations, training.total, training.fraction) == (120, 200, 0.6)
    outcome = training.outcome("detection")
    assert outcome.metrics["coco/bbox_mAP"] == 0.5
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts what there was before the exec
    assert 1 < outcome.peak_memory_mb <= max(own, 100)  # of a python that does nothing


@pytest.mark.parametrize("epochs", [1, 6, 24])
def test_a_stretched_schedule_is_one_that_mmengine_takes(epochs):
    warm_up = dict(type="LinearLR", start_factor=0.1, by_epoch=True, begin=0, end=1, convert_to_iter_based=True)
    cosine = dict(type="CosineAnnealingLR", by_epoch=True, begin=1, end=12, T_max=11)
    steps = dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11])
    cfg = Config(dict(train_cfg=dict(max_epochs=12), param_scheduler=[warm_up, cosine, steps]))
    cfg.merge_from_dict(training_runs.stretch_schedule(cfg, epochs))
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[2].end == epochs
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    for scheduler in cfg.param_scheduler:
        PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=optimizer, epoch_length=10))


def test_failed_training_shows_its_log(tool):
    training = tool("sys.exit('no such norm')")
    finish(training)
    with pytest.raises(RuntimeError, match=r"(?s)exit code 1; the end of .*run\.log:.*no such norm"):
        training.outcome("detection")
    training = tool("pass")
    finish(training)
    with pytest.raises(RuntimeError, match="ended without an evaluation"):
        training.outcome("detection")


def test_killed_training_leaves_no_process(tool, tmp_path):
    """As torchrun does, the tool starts processes of its own."""
    code = "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    training = tool(code)
    log = tmp_path / "run.log"
    while not log.read_text().strip():
        time.sleep(0.02)
    training.kill()
    training.kill()  # again, as a `finally` may
    status = Path("/proc", log.read_text().strip(), "status")
    for _ in range(100):  # the kill is immediate, its reaping may take a moment
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    pytest.fail("the child of the killed training is still running")


def test_environment_counts_the_visible_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert training_runs.environment("cpu")["CUDA_VISIBLE_DEVICES"] == ""
    assert training_runs.environment("1,2")["CUDA_VISIBLE_DEVICES"] == "1,2"
    assert "CUDA_VISIBLE_DEVICES" not in training_runs.environment("auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert training_runs.environment("1,2")["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert training_runs.environment("auto")["CUDA_VISIBLE_DEVICES"] == "4,5,7"


def test_training_needs_no_seed(tmp_path, monkeypatch):
    """Nor does a config: those for COCO and Kinetics name none."""
    runners = []
    monkeypatch.setattr(train_tool, "build_runner", lambda cfg: runners.append(cfg) or Mock())
    config = tmp_path / "c.py"
    config.write_text(f"_base_ = {str(ROOT / 'configs' / 'digits' / 'i3d_r18_gn_digits.py')!r}\nrandomness = None\n")
    monkeypatch.chdir(tmp_path)  # where no digits are yet
    assert train_tool.main([str(config), "--work-dir", str(tmp_path), "--deterministic"]) == 0
    assert runners[0].randomness == dict(seed=None, deterministic=True)
    Runner.set_randomness(Mock(), **runners[0].randomness)
