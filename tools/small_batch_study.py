"""Train the same model at several batch sizes with several norms, and draw error against batch size.

The figure that made Group Normalization known, for detection and video: within a row every cell sees the same number
of samples, with a learning rate in proportion to its batch. A study that was stopped goes on where it was when the same
command is given again; cells that are finished are not run again.

    quick     digits, detection and video, about half an hour on two CPU cores
    coco      Mask R-CNN R50-FPN on COCO, configs/small_batch/, 8 GPUs for each training
    kinetics  I3D ResNet-50 on Kinetics-400, configs/small_batch/ and configs/i3d/, 8 GPUs for each training

Writes report.md, report.html, report.json and a PNG for each task to the work dir, and prints the tables.

Exit code: 0 all cells finished; 1 some failed, named on stderr; 2 wrong arguments; 130 stopped.
"""

import argparse
import copy
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from mmengine.config import Config
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import normplug  # noqa: F401  registers the layers, and lets the toolkits import
from normplug.openmmlab import training_runs
from normplug.openmmlab.mistakes import add_debug, answered
from normplug.openmmlab.settings import check_work_dir
from normplug.openmmlab.training_runs import NORMS, TASKS, Outcome, Training, spread
from normplug.reporting import Report, markdown_table, write_json

ROOT = Path(__file__).resolve().parent.parent
GIB_PER_JOB = 4  # what a training of the quick preset may need on a CPU


@dataclass(frozen=True)
class Part:
    """The cells of one figure.

    Args:
        task: Key of `TASKS`.
        pattern: Path of the configs under configs/, with {norm}; without {batch} the one config is run at all sizes.
        norms: Labels of `NORMS`, or what stands in the place of {norm}.
        batch_sizes: Samples per GPU.
        seeds: Number of seeds, from 0.
        gpus: GPUs of each training.
        epochs: Length, where it is not the config's.
        options: What else differs from the config, key and value.
    """

    task: str
    pattern: str
    norms: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    seeds: int = 1
    gpus: int = 1
    epochs: int | None = None
    options: tuple[tuple[str, object], ...] = ()


# A quarter of the RoIs and of the mask head's convolutions: six epochs in the time of three. A batch of 8 needs them.
SMALL_HEADS = (("model.train_cfg.rcnn.sampler.num", 24), ("model.roi_head.mask_head.num_convs", 1))
PRESETS = {
    "quick": [
        Part(
            "detection",
            "digits/mask-rcnn_r18_fpn_{norm}_digits.py",
            ("BN", "GN"),
            (1, 2, 4, 8),
            seeds=2,
            epochs=6,
            options=SMALL_HEADS,
        ),
        Part("video", "digits/i3d_r18_{norm}_digits.py", ("BN", "GN"), (1, 2, 4, 8, 16), seeds=2),
    ],
    "coco": [
        Part(
            "detection",
            "small_batch/mask-rcnn_r50_fpn_{norm}_8xb{batch}-1x_coco.py",
            ("frozen-bn-4conv1fc", "bn-all", "syncbn-all", "gn-all", "gn-ws-all"),
            (1, 2, 4, 8),
            gpus=8,
        )
    ],
    "kinetics": [
        Part(
            "video",
            "*/i3d_r50_{norm}_8xb{batch}-32x2x1-100e_kinetics400-rgb.py",
            ("BN", "SyncBN", "GN", "GN+WS", "CBN", "EvoNormS0"),
            (1, 2, 4, 8),
            gpus=8,
        )
    ],
}


@dataclass(frozen=True)
class Cell:
    """One training of a study."""

    part: Part
    norm: str
    batch_size: int
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.part.task}, {self.norm}, batch {self.batch_size}, seed {self.seed}"

    @property
    def config(self) -> Path:
        return find_config(self.part, self.norm, self.batch_size)

    @property
    def epochs(self) -> int:
        return self.part.epochs or read(self.config).train_cfg.max_epochs

    @property
    def result(self) -> Path:
        return self.folder / "result.json"


@cache
def read(config: Path) -> Config:
    """Return a config, not to be changed."""
    return Config.fromfile(config)


def find_config(part: Part, norm: str, batch_size: int) -> Path:
    """Return the config of a cell.

    Raises:
        FileNotFoundError: If there is none; the message lists the norms that have one at this batch size.
    """
    pattern = part.pattern.format(norm=NORMS.get(norm, norm), batch=batch_size)
    if found := sorted((ROOT / "configs").glob(pattern)):
        return found[0]
    place = re.compile(re.escape(part.pattern.format(norm="@", batch=batch_size).split("/")[-1]).replace("@", "(.+)"))
    files = (ROOT / "configs").glob(part.pattern.format(norm="*", batch=batch_size))
    known = sorted({found.group(1) for file in files if (found := place.fullmatch(file.name))})
    labels = {slug: label for label, slug in NORMS.items()}
    raise FileNotFoundError(
        f"There is no config configs/{pattern} for the norm {norm!r} at batch size {batch_size}. Norms with one: "
        f"{', '.join(labels.get(name, name) for name in known) or 'none'}."
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="quick")
    p.add_argument("--task", choices=TASKS, help="only this task of the preset")
    p.add_argument("--norms", nargs="+", metavar="NORM", help="instead of the preset's; a name that its configs have")
    p.add_argument("--batch-sizes", nargs="+", type=int, metavar="N", help="samples per GPU, instead of the preset's")
    p.add_argument("--seeds", type=int, help="train each cell with the seeds 0 .. SEEDS-1, instead of the preset's")
    p.add_argument("--epochs", type=int, help="length of each training; default: the config's")
    p.add_argument("--gpus", type=int, help="GPUs of each training, instead of the preset's; the learning rate follows")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: GPUs if there are any")
    p.add_argument("--jobs", type=int, help="trainings at a time; default: as many as the devices hold")
    p.add_argument("--work-dir", type=Path, help="default: work_dirs/small_batch_study/PRESET")
    add_debug(p)
    args = p.parse_args(argv)
    for name in ("seeds", "epochs", "gpus", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name} must be 1 or more, got {value}")
    if any(size < 1 for size in args.batch_sizes or []):
        p.error(f"--batch-sizes must be 1 or more, got {args.batch_sizes}")
    args.work_dir = (args.work_dir or Path("work_dirs", "small_batch_study", args.preset)).resolve()
    args.parts = [customize(part, args) for part in PRESETS[args.preset] if args.task in (None, part.task)]
    if not args.parts:
        p.error(
            f"the preset {args.preset} has no {args.task}; it has {', '.join(x.task for x in PRESETS[args.preset])}"
        )
    try:
        args.slots = device_slots(args)
        for cell in cells(args):
            cell.config  # noqa: B018  missing ones are heard before anything is trained
    except (ValueError, FileNotFoundError) as error:
        p.error(str(error))
    return args


def customize(part: Part, args: argparse.Namespace) -> Part:
    """Return the part with what the command line says instead of the preset."""
    asked = {
        "norms": tuple(dict.fromkeys(args.norms or ())),
        "batch_sizes": tuple(sorted(set(args.batch_sizes or ()))),
        "seeds": args.seeds,
        "gpus": args.gpus,
        "epochs": args.epochs,
    }
    return replace(part, **{name: value for name, value in asked.items() if value})


def device_slots(args: argparse.Namespace) -> list[str]:
    """Return the devices of each of the trainings that run at a time, as `training_runs.environment` takes them.

    Raises:
        ValueError: If the machine has not the devices that are asked for.
    """
    need = max(part.gpus for part in args.parts)
    have = torch.cuda.device_count() if args.device != "cpu" else 0
    if args.device == "cuda" and not have:
        raise ValueError(f"--device cuda was asked for, but torch {torch.__version__} sees no GPU here; use cpu")
    if have:
        if have < need:
            raise ValueError(
                f"each training of this study takes {need} GPUs, but {have} are visible; give --gpus {have}"
            )
        slots = [",".join(map(str, range(i, i + need))) for i in range(0, have - need + 1, need)]
        return slots[: args.jobs]
    if need > 1:
        raise ValueError(
            f"each training of this study takes {need} GPUs and none is visible; give --gpus 1 to train on CPU"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return ["cpu"] * (args.jobs or max(1, min(os.cpu_count() or 1, int(memory / GIB_PER_JOB))))


def cells(args: argparse.Namespace) -> list[Cell]:
    """Return the cells in the order they are run: all of a seed first, so that there is soon something to look at."""
    found = []
    for seed in range(max(part.seeds for part in args.parts)):
        for part in args.parts:
            for batch_size in part.batch_sizes if seed < part.seeds else ():
                for norm in part.norms:
                    name = f"{NORMS.get(norm, norm)}_b{batch_size}_seed{seed}"
                    found.append(Cell(part, norm, batch_size, seed, args.work_dir / part.task / name))
    return found


def options(cell: Cell) -> dict[str, object]:
    """Return what a cell changes in its config: its length, and where it is one config for all sizes also the batch."""
    cfg, epochs = read(cell.config), cell.epochs
    changed = training_runs.stretch_schedule(cfg, epochs) if epochs != cfg.train_cfg.max_epochs else {}
    changed.update(cell.part.options)
    if "{batch}" not in cell.part.pattern:
        changed["train_dataloader.batch_size"] = cell.batch_size
        changed["train_cfg.val_interval"] = epochs  # at the end alone: most of a small model's time would go there
        ratio = cfg.auto_scale_lr.base_batch_size / (cell.batch_size * cell.part.gpus)
        for i, scheduler in enumerate(cfg.param_scheduler):
            if not scheduler.get("by_epoch", True):  # a warm-up counted in iterations: the same number of samples
                for key in ("begin", "end"):
                    if scheduler.get(key):
                        changed[f"param_scheduler.{i}.{key}"] = max(1, round(scheduler[key] * ratio))
    return changed


def command(cell: Cell) -> list[str]:
    """Return the command line of a cell; it goes on from the last checkpoint, if there is one."""
    if cell.part.gpus > 1:
        line = [str(ROOT / "tools" / "dist_train.sh"), str(cell.config), str(cell.part.gpus)]
    else:
        line = [sys.executable, str(ROOT / "tools" / "train.py"), str(cell.config)]
    line += ["--work-dir", str(cell.folder), "--seed", str(cell.seed), "--auto-scale-lr", "--resume"]
    if changed := options(cell):
        line += ["--cfg-options", *(f"{key}={value}" for key, value in changed.items())]
    return line


def settings(cell: Cell) -> dict[str, object]:
    """Return what makes a cell's result its own: the resolved config and the arguments."""
    cfg = copy.deepcopy(read(cell.config))
    cfg.merge_from_dict(options(cell))
    return {
        "config": str(cell.config.relative_to(ROOT)),
        "options": options(cell),
        "gpus": cell.part.gpus,
        "digest": hashlib.sha256(cfg.pretty_text.encode()).hexdigest(),
    }


def finished(cell: Cell) -> dict | None:
    """Return the stored result of a cell, or None if there is none yet; note in its folder what it is a run of.

    Raises:
        ValueError: If the folder holds a run of other settings.
    """
    note = cell.folder / "cell.json"
    own = json.loads(json.dumps(settings(cell)))
    if note.exists() and json.loads(note.read_text()) != own:
        raise ValueError(
            f"{cell.folder} holds a training with other settings (see {note}). Use another --work-dir, or delete "
            f"that folder to train it anew."
        )
    cell.folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(own, indent=1))
    return json.loads(cell.result.read_text()) if cell.result.exists() else None


def store(cell: Cell, outcome: Outcome, seconds: float, use_gpu: bool) -> dict:
    """Write the result of a cell, whole or not at all."""
    result = {**asdict(outcome), "seconds": round(seconds, 1), **training_runs.facts(use_gpu)}
    draft = cell.result.with_suffix(".tmp")
    draft.write_text(json.dumps(result))
    draft.replace(cell.result)
    return result


class Study:
    """The trainings of a study, some at a time.

    Args:
        todo: Cells, in the order they start.
        results: Of the cells that were finished before.
        slots: Devices of each training that runs at a time.
        lock: File whose lock the trainings share, so that it is held until the last one has ended.
    """

    def __init__(self, todo: Iterable[Cell], results: dict[Cell, dict], slots: Sequence[str], lock: int) -> None:
        self.results, self.failed, self._lock = dict(results), dict[Cell, str](), lock
        self._waiting, self._free = list(todo), list(enumerate(slots))
        self._running: dict[Cell, tuple[Training, tuple[int, str], float]] = {}
        self._all = [*self._waiting, *results]

    def run(self, progress: Progress) -> None:
        """Train everything that is not finished yet."""
        done = len(self.results)
        total = progress.add_task("study", total=len(self._all), completed=done, note="")
        bars = {}
        try:
            while self._waiting or self._running:
                while self._waiting and self._free:
                    cell = self._waiting.pop(0)
                    self._start(cell, self._free.pop(0))
                    bars[cell] = progress.add_task(str(cell), total=1.0, note="")
                for cell in list(self._running):
                    if self._poll(cell):
                        progress.remove_task(bars[cell])
                        note = self.failed.get(cell) or scores(cell.part.task, self.results[cell])
                        progress.console.print(f"{cell}: {note}", highlight=False, markup=False)
                    else:
                        progress.update(bars[cell], completed=self._running[cell][0].fraction)
                partly = sum(training.fraction for training, *_ in self._running.values())
                ended = len(self._all) - len(self._waiting) - len(self._running)
                progress.update(total, completed=ended + partly, note=self.remaining())
                time.sleep(0.3)
        finally:
            for training, *_ in self._running.values():
                training.kill()

    def _start(self, cell: Cell, slot: tuple[int, str]) -> None:
        index, devices = slot
        env = training_runs.environment(devices)
        env["PORT"] = str(int(os.environ.get("PORT", "29500")) + index)
        if devices == "cpu":
            share = (os.cpu_count() or 1) // (len(self._free) + len(self._running) + 1)
            env.setdefault("OMP_NUM_THREADS", str(max(1, share)))
        training = Training(command(cell), cell.folder, cell.epochs, env, pass_fds=[self._lock])
        self._running[cell] = (training, slot, time.time())

    def _poll(self, cell: Cell) -> bool:
        training, slot, start = self._running[cell]
        if not training.poll():
            return False
        del self._running[cell]
        self._free.append(slot)
        try:
            self.results[cell] = store(cell, training.outcome(cell.part.task), time.time() - start, slot[1] != "cpu")
        except RuntimeError as error:
            self.failed[cell] = str(error)
        return True

    def remaining(self) -> str:
        """Return how long the rest may take, judged by what has finished."""
        slots = len(self._free) + len(self._running)
        left = 0.0
        for cell in [*self._waiting, *self._running]:
            expected = self._expected_seconds(cell)
            if expected is None:
                return ""
            left += expected * (1 - (self._running[cell][0].fraction if cell in self._running else 0))
        return f"about {math.ceil(left / slots / 60)} min left" if left else ""

    def _expected_seconds(self, cell: Cell) -> float | None:
        alike = [
            r["seconds"] for c, r in self.results.items() if c.part == cell.part and c.batch_size == cell.batch_size
        ]
        alike = alike or [r["seconds"] for c, r in self.results.items() if c.part == cell.part]
        return statistics.mean(alike) if alike else None


def scores(task: str, result: dict) -> str:
    return ", ".join(f"{name} {100 * result['metrics'][key]:.1f}" for key, name in TASKS[task])


def tables(part: Part, results: dict[Cell, dict], failed: Iterable[Cell]) -> list[tuple[str, list[list[str]]]]:
    """Return for each metric of a part its name and a table: norms by batch sizes."""
    found = []
    for key, name in TASKS[part.task]:
        rows = [["norm", *(f"batch {size}" for size in part.batch_sizes)]]
        for norm in part.norms:
            row = [norm]
            for size in part.batch_sizes:
                values = [100 * r["metrics"][key] for c, r in results.items() if of(c, part, norm, size)]
                lost = sum(of(c, part, norm, size) for c in failed)
                text = spread(values, 1) if values else "-"
                row.append(f"{text} ({lost} failed)" if lost else text)
            rows.append(row)
        found.append((name, rows))
    return found


def of(cell: Cell, part: Part, norm: str, batch_size: int) -> bool:
    return (cell.part, cell.norm, cell.batch_size) == (part, norm, batch_size)


def draw(part: Part, results: dict[Cell, dict]):
    """Plot error against batch size, large batches left as in the paper; a dot per seed; return the figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = TASKS[part.task]
    fig, axes = plt.subplots(1, len(columns), figsize=(5 * len(columns), 4), constrained_layout=True)
    for ax, (key, name) in zip(axes, columns, strict=True):
        for i, norm in enumerate(part.norms):
            errors = {
                size: values
                for size in part.batch_sizes
                if (values := [100 - 100 * r["metrics"][key] for c, r in results.items() if of(c, part, norm, size)])
            }
            ax.plot(list(errors), [statistics.mean(v) for v in errors.values()], color=f"C{i}", label=norm)
            for size, values in errors.items():
                ax.plot([size] * len(values), values, ".", color=f"C{i}", alpha=0.6)
        ax.set(xlabel="batch size (samples per GPU)", ylabel=f"100 - {name} (%)", xscale="log")
        ax.set_xticks(part.batch_sizes, map(str, part.batch_sizes))
        ax.minorticks_off()
        ax.invert_xaxis()
        ax.grid(alpha=0.3)
    axes[0].legend()
    return fig


def write_report(args: argparse.Namespace, study: Study, seconds: float) -> list[Path]:
    """Write report.md, report.html, a PNG for each task, and report.json; print the tables; return the paths."""
    facts = {
        "command": shlex.join(["python", "tools/small_batch_study.py", *sys.argv[1:]]),
        "seconds in this call": round(seconds, 1),
        "trainings at a time": len(args.slots),
        **training_runs.facts(args.slots[0] != "cpu"),
    }
    report = Report(
        "Error against batch size",
        "Within a figure every training sees the same number of samples, at a learning rate in proportion to its "
        "batch. Metrics in %, after the last epoch, mean ± standard deviation over the seeds.",
    )
    for part in args.parts:
        report.heading(f"{part.task.capitalize()}: configs/{part.pattern}")
        for name, rows in tables(part, study.results, study.failed):
            report.table(rows, f"{name}; seeds: {part.seeds}; GPUs of each training: {part.gpus}.")
            print(f"\n{part.task}, {name}\n\n{markdown_table(rows)}")
        if any(cell.part == part for cell in study.results):
            caption = f"Error against batch size, {part.task}: mean over the seeds, and a dot for each."
            report.figure(draw(part, study.results), part.task, caption)
    report.heading("How it was made")
    report.facts(facts | {f"failed: {cell}": text.splitlines()[0] for cell, text in study.failed.items()})
    paths = report.write(args.work_dir)
    records = [
        {"task": c.part.task, "norm": c.norm, "batch_size": c.batch_size, "seed": c.seed, **settings(c), **result}
        for c, result in study.results.items()
    ]
    return [*paths, write_json(args.work_dir / "report.json", {**facts, "cells": records})]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    with answered("small_batch_study.py", args.debug) as answer:
        answer.code = run(args)
    return answer.code


def run(args: argparse.Namespace) -> int:
    """Train what is not yet trained, and report. Returns the exit code."""
    start = time.time()
    console = Console(stderr=True)
    check_work_dir(args.work_dir)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as for Ctrl-C
    with (args.work_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"small_batch_study.py: {args.work_dir} is in use: by another study, or by a training that a "
                "killed one left behind. Wait for it, end it, or use another --work-dir.",
                file=sys.stderr,
            )
            return 2
        try:
            results = {cell: finished(cell) for cell in cells(args)}
        except ValueError as error:
            print(f"small_batch_study.py: {error}", file=sys.stderr)
            return 2
        todo = [cell for cell, result in results.items() if result is None]
        results = {cell: result for cell, result in results.items() if result is not None}
        console.print(f"{len(todo)} of {len(todo) + len(results)} trainings to do, {len(args.slots)} at a time, "
                      f"in {args.work_dir}")  # fmt: skip
        study = Study(todo, results, args.slots, lock.fileno())
        columns = (
            TextColumn("{task.description:>34}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        try:
            with Progress(*columns, console=console) as progress:
                study.run(progress)
        except KeyboardInterrupt:
            console.print("Stopped; the same command goes on from here.")
            return 130
        paths = write_report(args, study, time.time() - start)
    print("", *paths, sep="\n")
    for cell, message in study.failed.items():
        print(f"{cell}: {message}", file=sys.stderr)
    return int(bool(study.failed))


if __name__ == "__main__":
    raise SystemExit(main())
