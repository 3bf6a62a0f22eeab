"""Train one model with several normalization layers on embedded data and compare them in one table.

Detection trains Mask R-CNN on images of handwritten digits, video trains I3D on clips of moving digits; both from
scratch. Writes report.md, report.json and curves.png to the work dir and prints the table.

Exit code: 0 all runs finished; 1 some failed, named on stderr; 2 wrong arguments.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mmengine
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import normplug

ROOT = Path(__file__).resolve().parent.parent
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
# task -> (config name, [(key in mmengine's log, column)])
TASKS = {
    "detection": (
        "mask-rcnn_r18_fpn_{}_digits.py",
        [("coco/bbox_mAP", "box AP"), ("coco/segm_mAP", "mask AP")],
    ),
    "video": ("i3d_r18_{}_digits.py", [("acc/top1", "top-1"), ("acc/top5", "top-5")]),
}
TRAIN_LINE = re.compile(r"Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\]")


@dataclass
class Run:
    """One training: what was asked, and what came out."""

    norm: str
    seed: int
    config: str
    work_dir: str
    command: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds_per_iter: float = float("nan")
    peak_memory_mb: float = float("nan")
    parameters: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    failed: str = ""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", choices=TASKS, default="detection")
    p.add_argument("--norms", nargs="+", choices=NORMS, default=["BN", "GN"], metavar="NORM", help=", ".join(NORMS))
    p.add_argument("--batch-size", type=int, help="samples per batch; the learning rate is scaled with it (default 2)")
    p.add_argument("--seeds", type=int, default=1, help="train each norm with the seeds 0 .. SEEDS-1")
    p.add_argument("--epochs", type=int, help="length of training; default: the config's")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto: the first GPU if there is one")
    p.add_argument("--work-dir", type=Path, help="default: work_dirs/quickstart/TASK")
    args = p.parse_args(argv)
    for name in ("batch_size", "seeds", "epochs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device):
        p.error(f"--device must be cpu, cuda, cuda:N or auto, got {args.device!r}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        p.error(f"--device {args.device} was asked for, but torch {torch.__version__} sees no GPU here; use cpu")
    args.work_dir = (args.work_dir or Path("work_dirs", "quickstart", args.task)).resolve()
    args.norms = list(dict.fromkeys(args.norms))
    return args


def plan(args: argparse.Namespace) -> list[Run]:
    """Return the runs, with the command line of each."""
    pattern, _ = TASKS[args.task]
    runs = []
    for seed in range(args.seeds):
        for norm in args.norms:
            config = ROOT / "configs" / "digits" / pattern.format(NORMS[norm])
            name = f"{NORMS[norm]}_seed{seed}_{time.strftime('%Y%m%d_%H%M%S')}"
            run = Run(norm, seed, str(config.relative_to(ROOT)), str(args.work_dir / name))
            run.command = [sys.executable, str(ROOT / "tools" / "train.py"), str(config)]
            run.command += ["--work-dir", run.work_dir, "--seed", str(seed)]
            options = shorten(Config.fromfile(config), args.epochs) if args.epochs else {}
            if args.batch_size:
                run.command.append("--auto-scale-lr")
                options["train_dataloader.batch_size"] = args.batch_size
            if options:
                run.command += ["--cfg-options", *(f"{key}={value}" for key, value in options.items())]
            runs.append(run)
    return runs


def shorten(cfg: Config, epochs: int) -> dict[str, object]:
    """Return the options that fit a config's schedule by epochs to another number of epochs."""
    ratio = epochs / cfg.train_cfg.max_epochs
    options: dict[str, object] = {"train_cfg.max_epochs": epochs}
    for i, scheduler in enumerate(cfg.param_scheduler):
        if not scheduler.get("by_epoch", True):
            continue  # a warm-up counted in iterations stays what it is
        for key in ("begin", "end", "T_max"):
            if key in scheduler:
                options[f"param_scheduler.{i}.{key}"] = round(scheduler[key] * ratio)
        if "milestones" in scheduler:
            options[f"param_scheduler.{i}.milestones"] = [max(1, round(m * ratio)) for m in scheduler.milestones]
    return options


def environment(device: str) -> dict[str, str]:
    env = dict(os.environ, PYTHONUNBUFFERED="1")
    # Threads that wait by spinning slow a machine with other work to do down many times over.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    elif ":" in device:
        env["CUDA_VISIBLE_DEVICES"] = device.split(":")[1]
    return env


def execute(run: Run, env: dict[str, str], progress: Progress, bar) -> None:
    """Train in a process of its own, so that its peak memory is its own, and follow its log."""
    work_dir = Path(run.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    log = work_dir / "run.log"
    with log.open("w") as out:
        child = subprocess.Popen(run.command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        with log.open(errors="replace") as lines:
            while True:
                pid, status, usage = os.wait4(child.pid, os.WNOHANG)
                for line in lines:
                    if found := TRAIN_LINE.search(line):
                        epoch, done, size = map(int, found.groups())
                        progress.update(bar, completed=(epoch - 1) * size + done, total=size * epochs_of(run))
                if pid:
                    break
                time.sleep(0.3)
    except BaseException:
        child.kill()
        raise
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = "".join(f"    {line}\n" for line in log.read_text(errors="replace").splitlines()[-12:])
        run.failed = f"exit code {child.returncode}; the end of {log}:\n{tail}"
        return
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    run.peak_memory_mb = usage.ru_maxrss * unit / 2**20
    read_scalars(run)


def epochs_of(run: Run) -> int:
    for option in run.command:
        if option.startswith("train_cfg.max_epochs="):
            return int(option.split("=")[1])
    return Config.fromfile(ROOT / run.config).train_cfg.max_epochs


def read_scalars(run: Run) -> None:
    """Fill a run with what mmengine logged."""
    times = []
    for file in sorted(Path(run.work_dir).glob("*/vis_data/scalars.json")):
        for entry in map(json.loads, file.read_text().splitlines()):
            if "loss" in entry:
                run.losses.append((entry["step"], entry["loss"]))
                times.append(entry["time"])
                if entry.get("memory"):  # on a GPU: the most that tensors took
                    run.peak_memory_mb = float(entry["memory"])
            elif "step" in entry:
                metrics = {k: v for k, v in entry.items() if "/" in k}
                run.evaluations.append((entry["step"], metrics))
    run.seconds_per_iter = statistics.median(times)
    run.metrics = run.evaluations[-1][1]


def count_parameters(config: str) -> int:
    cfg = Config.fromfile(ROOT / config)
    init_default_scope(cfg.get("default_scope", "mmengine"))
    return sum(p.numel() for p in MODELS.build(cfg.model).parameters())


def spread(values: list[float], digits: int) -> str:
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def table(runs: list[Run], args: argparse.Namespace) -> list[list[str]]:
    """Return the header and one row per norm: means, with the standard deviation over the seeds."""
    columns = TASKS[args.task][1]
    rows = [["norm", *(c for _, c in columns), "s/iter", "peak memory (MB)", "parameters"]]
    for norm in args.norms:
        done = [r for r in runs if r.norm == norm and not r.failed]
        if not done:
            rows.append([norm, *["failed"] * (len(rows[0]) - 1)])
            continue
        row = [norm, *(spread([100 * r.metrics[key] for r in done], 1) for key, _ in columns)]
        row.append(spread([r.seconds_per_iter for r in done], 3))
        row += [f"{max(r.peak_memory_mb for r in done):.0f}", f"{done[0].parameters:,}"]
        rows.append(row)
    return rows


def as_markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def draw(runs: list[Run], args: argparse.Namespace, path: Path) -> None:
    """Plot loss and metric over iterations, a line per run and a colour per norm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = TASKS[args.task][1]
    fig, axes = plt.subplots(1, 1 + len(columns), figsize=(5 * (1 + len(columns)), 4), constrained_layout=True)
    for i, norm in enumerate(args.norms):
        for run in (r for r in runs if r.norm == norm and not r.failed):
            style = {"color": f"C{i}", "label": norm if run.seed == 0 else None, "alpha": 1 if run.seed == 0 else 0.5}
            axes[0].plot(*zip(*run.losses, strict=True), **style)
            for ax, (key, _) in zip(axes[1:], columns, strict=True):
                ends = [step for step, _ in run.evaluations]
                ax.plot(ends, [100 * m[key] for _, m in run.evaluations], marker="o", **style)
    axes[0].set(xlabel="iteration", ylabel="training loss")
    for ax, (_, name) in zip(axes[1:], columns, strict=True):
        ax.set(xlabel="epoch", ylabel=f"{name} (%)", ylim=(0, None))
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in axes:
        ax.grid(alpha=0.3)
    axes[0].legend()
    fig.savefig(path, dpi=120)


def report(runs: list[Run], args: argparse.Namespace, seconds: float) -> str:
    """Write report.json, curves.png and report.md; return the table."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and args.device != "cpu" else None
    facts = {
        "command": " ".join(["python", "tools/quickstart.py", *(sys.argv[1:])]),
        "task": args.task,
        "seconds": round(seconds, 1),
        "device": gpu or f"CPU, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mmengine": mmengine.__version__,
        "normplug": normplug.__version__,
    }
    text = as_markdown(table(runs, args))
    args.work_dir.mkdir(parents=True, exist_ok=True)
    (args.work_dir / "report.json").write_text(json.dumps({**facts, "runs": [asdict(r) for r in runs]}, indent=1))
    if any(not r.failed for r in runs):
        draw(runs, args, args.work_dir / "curves.png")
    memory = "tensors on the GPU" if gpu else "resident memory of the training process, python and libraries included"
    lines = [
        f"# {args.task.capitalize()} on digits: {', '.join(args.norms)}",
        "",
        text,
        "",
        f"Metrics in %, after the last epoch; seeds: {args.seeds} (mean ± standard deviation where more than one); "
        f"s/iter is the median; peak memory: {memory}.",
        "",
        "![curves](curves.png)",
        "",
        *(f"- {key}: `{value}`" for key, value in facts.items()),
        *(f"- failed: {r.norm}, seed {r.seed}: {r.failed.splitlines()[0]}" for r in runs if r.failed),
        "",
    ]
    (args.work_dir / "report.md").write_text("\n".join(lines))
    return text


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    start = time.time()
    console = Console(stderr=True)
    console.print(f"{args.task}: {len(args.norms)} norm(s) x {args.seeds} seed(s), logs in {args.work_dir}")
    runs = plan(args)
    env = environment(args.device)
    parameters = {run.config: count_parameters(run.config) for run in runs}
    columns = (
        TextColumn("{task.description:>18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        total = progress.add_task("all runs", total=len(runs))
        for run in runs:
            run.parameters = parameters[run.config]
            bar = progress.add_task(f"{run.norm} seed {run.seed}", total=None)
            execute(run, env, progress, bar)
            progress.remove_task(bar)
            progress.advance(total)
            names = TASKS[args.task][1] if run.metrics else []
            scores = ", ".join(f"{name} {100 * run.metrics[key]:.1f}" for key, name in names)
            console.print(f"{run.norm}, seed {run.seed}: {run.failed or scores}", highlight=False, markup=False)
    print(report(runs, args, time.time() - start))
    print(f"\n{args.work_dir / 'report.md'}\n{args.work_dir / 'report.json'}\n{args.work_dir / 'curves.png'}")
    return int(any(run.failed for run in runs))


if __name__ == "__main__":
    raise SystemExit(main())
