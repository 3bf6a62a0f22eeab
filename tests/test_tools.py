"""The command-line tools: arguments, errors, tables, and a run of each that trains."""

import argparse
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import quickstart  # noqa: E402
import test as test_tool  # noqa: E402
import train as train_tool  # noqa: E402


@pytest.mark.parametrize("tool", [train_tool, test_tool], ids=["train", "test"])
def test_missing_config_is_named(tool, capsys):
    checkpoint = ["none.pth"] if tool is test_tool else []
    assert tool.main(["configs/no_such.py", *checkpoint]) == 2
    assert "no_such.py" in capsys.readouterr().err


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


def made_up_run(norm, seed, ap, tmp_path):
    run = quickstart.Run(norm, seed, f"{norm}.py", str(tmp_path / f"{norm}{seed}"))
    folder = Path(run.work_dir, "20260101_000000", "vis_data")
    folder.mkdir(parents=True)
    lines = [{"loss": 3.0 - i, "time": t, "step": i + 1} for i, t in enumerate([0.9, 0.2, 0.3])]
    lines += [{"coco/bbox_mAP": ap / 2, "coco/segm_mAP": 0.1, "step": 1}]
    lines += [{"coco/bbox_mAP": ap, "coco/segm_mAP": 0.2, "step": 2}]
    Path(folder, "scalars.json").write_text("\n".join(map(json.dumps, lines)))
    run.peak_memory_mb, run.parameters = 100.0 + seed, 1234567
    quickstart.read_scalars(run)
    return run


def test_quickstart_report_says_what_was_measured(tmp_path):
    runs = [made_up_run("GN", 0, 0.3, tmp_path), made_up_run("GN", 1, 0.4, tmp_path)]
    runs.append(quickstart.Run("BN", 0, "BN.py", "nowhere", failed="exit code 1; the end of run.log"))
    args = argparse.Namespace(task="detection", norms=["BN", "GN"], seeds=2, device="cpu", work_dir=tmp_path)
    quickstart.report(runs, args, 12.3)
    text = (tmp_path / "report.md").read_text()
    assert "| GN   | 35.0 ± 7.1 | 20.0 ± 0.0 | 0.300 ± 0.000 | 101              | 1,234,567  |" in text
    assert "| BN   | failed" in text
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    facts = json.loads((tmp_path / "report.json").read_text())
    assert [r["metrics"].get("coco/bbox_mAP") for r in facts["runs"]] == [0.3, 0.4, None]
    assert facts["runs"][0]["evaluations"][0] == [1, {"coco/bbox_mAP": 0.15, "coco/segm_mAP": 0.1}]
