"""tools/small_batch_study.py: which cells a study has, what each trains, and that no finished cell is run again."""

import fcntl
import json
import sys
from pathlib import Path

import pytest
from cases import unpadded
from mmengine.config import Config

from normplug.openmmlab import cli

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import small_batch_study as study  # noqa: E402

VIDEO = ["--device", "cpu", "--task", "video", "--norms", "BN", "GN", "--batch-sizes", "2", "8", "--seeds", "2"]


def planned(argv, tmp_path, gpus=8):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.device_count", lambda: gpus)
        return study.cells(study.parse_args([*argv, "--work-dir", str(tmp_path)]))


@pytest.mark.parametrize(("preset", "count"), [("quick", 36), ("coco", 20), ("kinetics", 24)])
def test_every_cell_of_a_preset_has_its_config(preset, count, tmp_path):
    """At the batch size that the cell says, with a learning rate in proportion to it."""
    cells = planned(["--preset", preset], tmp_path)
    assert len({cell.folder for cell in cells}) == len(cells) == count
    rates = {}
    for cell in cells:
        if preset != "quick" and cell.norm != cell.part.norms[0]:
            continue  # that each is built at its own size is in test_configs.py
        cfg = Config.fromfile(cell.config)
        cfg.merge_from_dict(study.options(cell))
        assert cfg.train_dataloader.batch_size == cell.batch_size, cell
        total = cell.batch_size * cell.part.gpus
        per_sample = cfg.optim_wrapper.optimizer.lr / cfg.auto_scale_lr.base_batch_size  # --auto-scale-lr: times total
        rates.setdefault((cell.part.task, cell.norm), set()).add(round(per_sample, 9))
        if preset == "quick":
            warm_up = cfg.param_scheduler[0].end
            assert warm_up * total == pytest.approx(100 if cell.part.task == "detection" else 80, abs=0.5 * total)
    assert all(len(found) == 1 for found in rates.values()), rates


def test_the_command_line_of_a_cell(tmp_path):
    alone, *_ = planned([*VIDEO, "--epochs", "6"], tmp_path)
    line = study.command(alone)
    assert line[:3] == [sys.executable, str(ROOT / "tools/train.py"), str(ROOT / "configs/digits/i3d_r18_bn_digits.py")]
    assert {"--auto-scale-lr", "--resume", "train_cfg.max_epochs=6", "train_dataloader.batch_size=2"} <= set(line)
    assert "train_cfg.val_interval=6" in line
    together = planned(["--preset", "coco", "--gpus", "4", "--norms", "gn-all", "--batch-sizes", "2"], tmp_path)[0]
    line = study.command(together)
    config = "configs/small_batch/mask-rcnn_r50_fpn_gn-all_8xb2-1x_coco.py"
    assert line[:3] == [str(ROOT / "tools/dist_train.sh"), str(ROOT / config), "4"]
    assert "--cfg-options" not in line  # a config of its own for each batch size: trained as it stands


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--norms", "XN"], "no config configs/digits/mask-rcnn_r18_fpn_XN_digits.py for the norm 'XN'"),
        (
            ["--preset", "kinetics", "--norms", "FRN", "--batch-sizes", "1"],
            "Norms with one: BN, CBN, EvoNormS0, GN, GN+WS",
        ),
        (["--preset", "coco", "--gpus", "9"], "takes 9 GPUs, but 8 are visible; give --gpus 8"),
        (["--preset", "coco", "--task", "video"], "the preset coco has no video; it has detection"),
        (["--batch-sizes", "0"], "--batch-sizes must be 1 or more"),
        (["--preset", "coco", "--device", "cpu"], "takes 8 GPUs and none is visible; give --gpus 1"),
    ],
)
def test_wrong_arguments(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        planned(argv, tmp_path)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_devices_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert study.parse_args(["--preset", "quick"]).slots == [str(i) for i in range(8)]
    assert study.parse_args(["--preset", "quick", "--jobs", "2"]).slots == ["0", "1"]
    assert study.parse_args(["--preset", "coco", "--gpus", "3"]).slots == ["0,1,2", "3,4,5"]
    assert study.parse_args(["--jobs", "3", "--device", "cpu"]).slots == ["cpu"] * 3


TRAINING = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
with open(folder.parent / "trained", "a") as log:
    log.write(folder.name + "\\n")
if folder.name in os.environ.get("FAIL", ""):
    sys.exit("no such norm")
print("Epoch(train)  [1][ 1/3]", flush=True)
if "HANG" in os.environ:
    __import__("time").sleep(60)
logs = folder / "20260101_000000" / "vis_data"
logs.mkdir(parents=True)
scores = {"acc/top1": float(sys.argv[2]), "acc/top5": 0.9, "step": 3}
if folder.parent.name == "detection":
    scores = {"coco/bbox_mAP": float(sys.argv[2]), "coco/segm_mAP": 0.9, "step": 3}
lines = [{"loss": 1.0, "time": 0.1, "step": 1}, scores]
if folder.name in os.environ.get("DIVERGE", ""):
    lines = [{"loss": float("nan"), "time": 0.1, "step": 1}, {"time": 0.1, "step": 3}]
(logs / "scalars.json").write_text("\\n".join(map(json.dumps, lines)))
"""


@pytest.fixture
def trainings(monkeypatch, tmp_path):
    """Trainings that take no time; returns which cells were trained since the last call."""

    def command(cell):
        score = 0.5 + 0.1 * cell.seed + (0.2 if cell.norm == "GN" else 0)
        return [sys.executable, "-c", TRAINING, str(cell.folder), str(score)]

    def since():
        log = tmp_path / "video" / "trained"
        names = sorted(log.read_text().split()) if log.exists() else []
        log.unlink(missing_ok=True)
        return names

    monkeypatch.setattr(study, "command", command)
    return since


ALL = sorted(f"{norm}_b{size}_seed{seed}" for norm in ("bn", "gn") for size in (2, 8) for seed in (0, 1))


@pytest.mark.slow
def test_finished_cells_are_not_run_again(trainings, tmp_path, monkeypatch, capsys):
    argv = [*VIDEO, "--work-dir", str(tmp_path)]
    monkeypatch.setenv("FAIL", "gn_b8_seed1")
    assert study.main(argv) == 1
    assert trainings() == ALL
    text = capsys.readouterr()
    assert "video, GN, batch 8, seed 1: exit code 1" in text.err
    assert "| BN | 55.0 ± 7.1 | 55.0 ± 7.1 |\n| GN | 75.0 ± 7.1 | 70.0 (1 failed) |" in unpadded(text.out)
    monkeypatch.delenv("FAIL")
    assert study.main(argv) == 0
    assert trainings() == ["gn_b8_seed1"]
    assert "| GN | 75.0 ± 7.1 | 75.0 ± 7.1 |" in unpadded(capsys.readouterr().out)
    assert study.main([*argv, "--seeds", "3", "--batch-sizes", "8"]) == 0  # a larger study keeps what there is
    assert trainings() == ["bn_b8_seed2", "gn_b8_seed2"]
    assert len(json.loads((tmp_path / "report.json").read_text())["cells"]) == 6
    assert (tmp_path / "video.png").stat().st_size > 10_000
    assert "data:image/png" in (tmp_path / "report.html").read_text()


ONE_SIZE = ["--device", "cpu", "--batch-sizes", "2", "--seeds", "1"]


@pytest.mark.slow
def test_a_detector_that_diverged_has_an_ap_of_zero(trainings, tmp_path, monkeypatch, capsys):
    """It finds nothing, and mmdet then logs no metric."""
    monkeypatch.setenv("DIVERGE", "bn_b2_seed0")
    assert study.main([*ONE_SIZE, "--task", "detection", "--work-dir", str(tmp_path)]) == 0
    assert "| BN | 0.0 |\n| GN | 70.0 |" in unpadded(capsys.readouterr().out)
    assert (tmp_path / "detection.png").stat().st_size > 10_000
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.slow
def test_a_cell_without_its_metrics_has_failed_and_stops_no_other(trainings, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIVERGE", "bn_b2_seed0")
    assert study.main([*ONE_SIZE, "--task", "video", "--work-dir", str(tmp_path)]) == 1
    text = capsys.readouterr()
    assert "| BN | - (1 failed) |\n| GN | 70.0 |" in unpadded(text.out)
    assert "no acc/top1 and no acc/top5" in text.err


@pytest.mark.slow
def test_a_stopped_study_goes_on(trainings, tmp_path, monkeypatch):
    argv = [*VIDEO, "--jobs", "2", "--work-dir", str(tmp_path)]
    running = []

    class Training(study.Training):
        def poll(self):
            running.append(self)
            if self.iterations:
                raise KeyboardInterrupt
            return super().poll()

    monkeypatch.setenv("HANG", "1")
    with monkeypatch.context() as patch:
        patch.setattr(study, "Training", Training)
        assert study.main(argv) == 130
    assert all(training._child.returncode for training in running)
    assert trainings() == ["bn_b2_seed0", "gn_b2_seed0"]
    monkeypatch.delenv("HANG")
    assert study.main(argv) == 0
    assert trainings() == ALL


@pytest.mark.slow
def test_other_settings_in_a_folder_are_refused(trainings, tmp_path, capsys):
    argv = [*VIDEO, "--work-dir", str(tmp_path)]
    assert study.main([*argv, "--norms", "BN", "--batch-sizes", "2"]) == 0
    assert trainings() == ["bn_b2_seed0", "bn_b2_seed1"]
    assert study.main([*argv, "--epochs", "1"]) == 2
    assert "holds a training with other settings" in capsys.readouterr().err
    assert trainings() == []


@pytest.mark.slow
def test_a_folder_in_use_is_refused(trainings, tmp_path, capsys):
    """Also by a training whose study was killed: it has inherited the lock."""
    argv = [*VIDEO, "--work-dir", str(tmp_path)]
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        orphan = study.Training(
            [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "x", 1, {}, [lock.fileno()]
        )
    assert study.main(argv) == 2
    assert "is in use" in capsys.readouterr().err
    orphan.kill()
    assert study.main(argv) == 0
    assert trainings() == ALL


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ImportWarning", "ignore::SyntaxWarning")  # mmcv's and mmaction2's own
def test_cell_is_a_training_that_the_tool_accepts(tmp_path):
    """What a cell asks of tools/train.py resolves to a config whose runner can be built."""
    cell = planned([*VIDEO, "--batch-sizes", "16", "--epochs", "1"], tmp_path)[1]
    import train

    args = train.parse_args(study.command(cell)[2:])
    cfg = cli.load_config(args)
    cli.scale_lr(cfg)
    runner = cli.build_runner(cfg)
    runner.train_loop  # noqa: B018  built on first use
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    assert runner.optim_wrapper.param_groups[0]["lr"] == pytest.approx(0.04)
    assert len(runner.train_loop.dataloader) == 40
