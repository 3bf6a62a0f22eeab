"""Trainings in processes of their own, followed through their logs: what the quickstart and the study share."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from normplug._version import __version__
from normplug.bench.facts import current_commit

__all__ = [
    "NORMS",
    "TASKS",
    "Outcome",
    "Training",
    "count_parameters",
    "environment",
    "facts",
    "spread",
    "stretch_schedule",
    "toolkit_versions",
]

# label -> its place in the names of configs
NORMS = {
    "BN": "bn",
    "SyncBN": "syncbn",
    "GN": "gn",
    "GN+WS": "gn-ws",
    "CBN": "cbn",
    "EvoNormB0": "evonorm-b0",
    "EvoNormS0": "evonorm-s0",
    "FRN": "frn",
}
# task -> [(key in mmengine's log, column of a table)]
TASKS = {
    "detection": [("coco/bbox_mAP", "box AP"), ("coco/segm_mAP", "mask AP")],
    "video": [("acc/top1", "top-1"), ("acc/top5", "top-5")],
}
PACKAGES = ("torch", "torchvision", "mmengine", "mmcv", "mmcv-lite", "mmdet", "mmaction2")  # that a result depends on
_TRAIN_LINE = re.compile(r"Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\]")


@dataclass
class Outcome:
    """What a training came to.

    Args:
        metrics: Of the last evaluation, by mmengine's keys, from 0 to 1.
        seconds_per_iter: Median over the log.
        peak_memory_mb: Of tensors on a GPU; on a CPU the most that a process of the training had resident (on Linux not
            less than the process that started it).
        losses: Iteration and training loss.
        evaluations: Epoch and metrics.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    seconds_per_iter: float = math.nan
    peak_memory_mb: float = math.nan
    losses: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)


class Training:
    """A training tool at work in a process group of its own, so that its peak memory is its own.

    Args:
        command: ``tools/train.py`` or ``tools/dist_train.sh`` with arguments, `work_dir` among them.
        work_dir: Where the training logs; what it prints is appended to ``run.log`` there.
        epochs: Length of the training, of which `fraction` is a part.
        env: Environment of the process.
        pass_fds: File descriptors that stay open in it.
    """

    def __init__(
        self,
        command: Sequence[str],
        work_dir: Path,
        epochs: int,
        env: Mapping[str, str],
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.work_dir, self.epochs, self.iterations, self._epoch_size = work_dir, epochs, 0, 0
        self._peak_memory_mb = math.nan
        work_dir.mkdir(parents=True, exist_ok=True)
        self._log = work_dir / "run.log"
        with self._log.open("a") as out:
            self._lines = self._log.open(errors="replace")
            self._lines.seek(0, os.SEEK_END)
            self._child = subprocess.Popen(
                list(command),
                env=dict(env),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=tuple(pass_fds),
            )

    @property
    def total(self) -> int | None:
        """Number of iterations of the whole training, once the log has said how many make an epoch."""
        return self._epoch_size * self.epochs or None

    @property
    def fraction(self) -> float:
        """Part of the training that is done, from 0 to 1."""
        return self.iterations / self.total if self.total else 0.0

    def poll(self) -> bool:
        """Read what has been logged since the last call; return whether the training has ended."""
        pid, status, usage = os.wait4(self._child.pid, os.WNOHANG)
        for line in self._lines:
            if found := _TRAIN_LINE.search(line):
                epoch, done, self._epoch_size = map(int, found.groups())
                self.iterations = (epoch - 1) * self._epoch_size + done
        if not pid:
            return False
        self._child.returncode = os.waitstatus_to_exitcode(status)
        self._lines.close()
        self._peak_memory_mb = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB here
        return True

    def kill(self) -> None:
        """End the training and every process it started."""
        if self._child.returncode is None:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
            self._lines.close()

    def outcome(self, task: str) -> Outcome:
        """Return the result of a training that has ended.

        Args:
            task: Key of `TASKS`.

        Raises:
            RuntimeError: If it failed; the message ends with the end of its log.
        """
        if code := self._child.returncode:
            tail = "".join(f"    {line}\n" for line in self._log.read_text(errors="replace").splitlines()[-12:])
            raise RuntimeError(f"exit code {code}; the end of {self._log}:\n{tail}")
        outcome = read_scalars(self.work_dir, task)
        if math.isnan(outcome.peak_memory_mb):
            outcome.peak_memory_mb = self._peak_memory_mb
        return outcome


def read_scalars(work_dir: Path, task: str) -> Outcome:
    """Return what mmengine logged in a work dir; where a resumed training repeats a step, the later line counts.

    A detector that finds nothing, as a diverged one, has AP 0: mmdet logs no metric then.

    Args:
        work_dir: Of one training.
        task: Key of `TASKS`.

    Raises:
        RuntimeError: If there is no evaluation in the log, or one without the task's metrics.
    """
    outcome, losses, evaluations, times = Outcome(), {}, {}, []
    for file in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for entry in _entries(file):
            if "loss" in entry:
                losses[entry["step"]] = entry["loss"]
                times.append(entry["time"])
                if entry.get("memory"):  # on a GPU: the most that tensors took
                    outcome.peak_memory_mb = float(entry["memory"])
            elif "step" in entry:
                evaluations[entry["step"]] = {k: v for k, v in entry.items() if "/" in k}
    if not evaluations:
        raise RuntimeError(f"The training ended without an evaluation: none in {work_dir}/*/vis_data/scalars.json.")
    for metrics in evaluations.values():
        lacking = [key for key, _ in TASKS[task] if key not in metrics]
        if lacking and (metrics or task != "detection"):
            raise RuntimeError(
                f"An evaluation has no {' and no '.join(lacking)}: see {work_dir}/*/vis_data/scalars.json."
            )
        metrics |= dict.fromkeys(lacking, 0.0)
    outcome.losses, outcome.evaluations = sorted(losses.items()), sorted(evaluations.items())
    outcome.seconds_per_iter = statistics.median(times) if times else math.nan
    outcome.metrics = outcome.evaluations[-1][1]
    return outcome


def _entries(file: Path) -> list[dict]:
    """Return what a log holds; a last line that was cut off, as a kill does, is not in it."""
    entries = []
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise RuntimeError(f"Line {number} of {file} is not one that mmengine writes ({error}).") from error
    return entries


def stretch_schedule(cfg: Config, epochs: int) -> dict[str, object]:
    """Return the options that fit a config's schedule by epochs to another number of epochs."""
    ratio = epochs / cfg.train_cfg.max_epochs
    options: dict[str, object] = {"train_cfg.max_epochs": epochs}
    for i, scheduler in enumerate(cfg.param_scheduler):
        if not scheduler.get("by_epoch", True):
            continue  # a warm-up counted in iterations stays what it is
        begin = round(scheduler.get("begin", 0) * ratio)
        for key, least in (("begin", 0), ("end", begin + 1), ("T_max", 1)):  # mmengine refuses those of no length
            if key in scheduler:
                options[f"param_scheduler.{i}.{key}"] = max(least, round(scheduler[key] * ratio))
        if "milestones" in scheduler:
            options[f"param_scheduler.{i}.milestones"] = [max(1, round(m * ratio)) for m in scheduler.milestones]
    return options


def environment(devices: str) -> dict[str, str]:
    """Return the environment of a training on ``cpu``, on the visible GPUs ``0,1``, or with ``auto`` on all of them."""
    env = dict(os.environ, PYTHONUNBUFFERED="1")
    # Threads that wait by spinning slow a machine with other work to do down many times over.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if devices == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    elif devices != "auto":
        visible = env.get("CUDA_VISIBLE_DEVICES")  # those that a scheduler has given us, counted from 0
        numbers = devices.split(",")
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[int(n)] for n in numbers) if visible else devices
    return env


def count_parameters(cfg: Config) -> int:
    """Build the model of a config; return its number of parameters."""
    init_default_scope(cfg.get("default_scope", "mmengine"))
    return sum(p.numel() for p in MODELS.build(cfg.model).parameters())


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean, and with more than one value the standard deviation of the sample."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def facts(use_gpu: bool) -> dict[str, str]:
    """Return device, versions and commit, as a report names them."""
    gpu = torch.cuda.get_device_name() if use_gpu and torch.cuda.is_available() else None
    commit = current_commit()
    return {
        "device": gpu or f"CPU, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **toolkit_versions(),
        "normplug": __version__,
        **({"commit": commit} if commit else {}),
    }


def toolkit_versions() -> dict[str, str]:
    """Return the versions of the packages that a training's result depends on, of those that are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
