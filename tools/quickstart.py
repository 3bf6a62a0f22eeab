"""Train one model with several normalization layers on embedded data and compare them in one table.

Detection trains Mask R-CNN on images of handwritten digits, video trains I3D on clips of moving digits; both from
scratch. Writes report.md, report.html, report.json and curves.png to the work dir, and prints the table.

Exit code: 0 all runs finished; 1 some failed, named on stderr; 2 wrong arguments.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import quote

import torch
from mmengine.config import Config
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import normplug  # noqa: F401  registers the layers, and lets the toolkits import
from normplug.openmmlab import training_runs
from normplug.openmmlab.mistakes import add_debug, answered
from normplug.openmmlab.settings import check_work_dir
from normplug.openmmlab.training_runs import NORMS, TASKS, Outcome, Training, spread
from normplug.reporting import Report, markdown_table, write_json

ROOT = Path(__file__).resolve().parent.parent
LINES, MARKS = ("-", (0, (5, 2)), (0, (2, 1)), "-."), "osD^vPX*"
CONFIGS = {"detection": "mask-rcnn_r18_fpn_{}_digits.py", "video": "i3d_r18_{}_digits.py"}


@dataclass
class Run:
    """One training: what was asked, and what came out."""

    norm: str
    seed: int
    config: str
    work_dir: str
    epochs: int = 0
    command: list[str] = field(default_factory=list)
    parameters: int = 0
    outcome: Outcome = field(default_factory=Outcome)
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
    add_debug(p)
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
    runs = []
    files = {norm: ROOT / "configs" / "digits" / CONFIGS[args.task].format(NORMS[norm]) for norm in args.norms}
    configs = {norm: Config.fromfile(file) for norm, file in files.items()}
    parameters = {norm: training_runs.count_parameters(cfg) for norm, cfg in configs.items()}
    for seed in range(args.seeds):
        for norm, config in files.items():
            cfg = configs[norm]
            name = f"{NORMS[norm]}_seed{seed}_{time.strftime('%Y%m%d_%H%M%S')}"
            run = Run(norm, seed, str(config.relative_to(ROOT)), str(args.work_dir / name))
            run.epochs, run.parameters = args.epochs or cfg.train_cfg.max_epochs, parameters[norm]
            run.command = [sys.executable, str(ROOT / "tools" / "train.py"), str(config)]
            run.command += ["--work-dir", run.work_dir, "--seed", str(seed)]
            options = training_runs.stretch_schedule(cfg, args.epochs) if args.epochs else {}
            if args.batch_size:
                run.command.append("--auto-scale-lr")
                options["train_dataloader.batch_size"] = args.batch_size
            if options:
                run.command += ["--cfg-options", *(f"{key}={value}" for key, value in options.items())]
            runs.append(run)
    return runs


def execute(run: Run, task: str, env: dict[str, str], progress: Progress, bar) -> None:
    """Train, moving the bar."""
    training = Training(run.command, Path(run.work_dir), run.epochs, env)
    try:
        while not training.poll():
            progress.update(bar, completed=training.iterations, total=training.total)
            time.sleep(0.3)
    finally:
        training.kill()
    try:
        run.outcome = training.outcome(task)
    except RuntimeError as error:
        run.failed = str(error)


def table(runs: list[Run], args: argparse.Namespace) -> list[list[str]]:
    """Return the header and one row per norm: means, with the standard deviation over the seeds."""
    columns = TASKS[args.task]
    rows = [["norm", *(c for _, c in columns), "s/iter", "peak memory (MB)", "parameters"]]
    for norm in args.norms:
        done = [r for r in runs if r.norm == norm and not r.failed]
        if not done:
            rows.append([norm, *["failed"] * (len(rows[0]) - 1)])
            continue
        row = [norm, *(spread([100 * r.outcome.metrics[key] for r in done], 1) for key, _ in columns)]
        row.append(spread([r.outcome.seconds_per_iter for r in done], 3))
        row += [f"{max(r.outcome.peak_memory_mb for r in done):.0f}", f"{done[0].parameters:,}"]
        rows.append(row)
    return rows


def draw(runs: list[Run], args: argparse.Namespace):
    """Plot loss and metric over iterations, a line per run and a colour per norm; return the figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = TASKS[args.task]
    fig, axes = plt.subplots(1, 1 + len(columns), figsize=(5 * (1 + len(columns)), 4), constrained_layout=True)
    once = max(len(run.outcome.evaluations) for run in runs if not run.failed) == 1
    for i, norm in enumerate(args.norms):
        for run in (r for r in runs if r.norm == norm and not r.failed):
            # Of curves that lie on each other (SyncBN on BN) the lower one is broader and shows through the gaps.
            style = {"color": f"C{i}", "linestyle": LINES[i % len(LINES)], "alpha": 1 if run.seed == 0 else 0.5}
            style["linewidth"] = max(1.2, 3 - 0.8 * i)
            style["label"] = norm if run.seed == 0 else None
            axes[0].plot(*zip(*run.outcome.losses, strict=True), **style)
            for ax, (key, _) in zip(axes[1:], columns, strict=True):
                ends = [i if once else step for step, _ in run.outcome.evaluations]
                ax.plot(ends, [100 * m[key] for _, m in run.outcome.evaluations], marker=MARKS[i % len(MARKS)], **style)
    axes[0].set(xlabel="iteration", ylabel="training loss")
    for ax, (_, name) in zip(axes[1:], columns, strict=True):
        ax.margins(0.15)
        ax.set_ylabel(f"{name} (%)")
        if once:  # one evaluation is no curve
            ax.set_xticks(range(len(args.norms)), args.norms)
        else:
            ax.set_xlabel("epoch")
            ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in axes:
        ax.grid(alpha=0.3)
    axes[0].legend()
    return fig


def write_report(runs: list[Run], args: argparse.Namespace, seconds: float) -> tuple[str, list[Path]]:
    """Write report.md, report.html, curves.png and report.json; return the table and the paths."""
    facts = {
        "command": " ".join(["python", "tools/quickstart.py", *(sys.argv[1:])]),
        "task": args.task,
        "seconds": round(seconds, 1),
        **training_runs.facts(args.device != "cpu"),
    }
    links = [f"{r.norm}, seed {r.seed}: {_link('config', ROOT / r.config, args)}, {_logs(r, args)}" for r in runs]
    rows = table(runs, args)
    memory = (
        "resident memory of the training process, python and libraries included"
        if facts["device"].startswith("CPU")
        else "tensors on the GPU"
    )
    report = Report(f"{args.task.capitalize()} on digits: {', '.join(args.norms)}")
    report.table(
        rows,
        f"Metrics in %, after the last epoch; seeds: {args.seeds} (mean ± standard deviation where more than one); "
        f"s/iter is the median; peak memory: {memory}.",
    )
    if any(not r.failed for r in runs):
        report.figure(draw(runs, args), "curves", "Training loss over iterations, and the metrics after each epoch.")
    report.heading("Configs and logs")
    report.text("\n".join(f"- {line}" for line in links))
    report.heading("How this was made")
    report.facts(facts | {f"failed: {r.norm}, seed {r.seed}": r.failed.splitlines()[0] for r in runs if r.failed})
    paths = report.write(args.work_dir)
    data = write_json(args.work_dir / "report.json", {**facts, "runs": [asdict(r) for r in runs]})
    return markdown_table(rows), [*paths, data]


def _link(name: str, file: Path, args: argparse.Namespace) -> str:
    """A link that works from the report's folder."""
    return f"[{name}]({quote(os.path.relpath(file, args.work_dir))})"


def _logs(run: Run, args: argparse.Namespace) -> str:
    logs = [("what it printed", Path(run.work_dir, "run.log"))]
    logs += [("scalars", file) for file in sorted(Path(run.work_dir).glob("*/vis_data/scalars.json"))]
    return ", ".join(_link(name, file, args) for name, file in logs)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    with answered("quickstart.py", args.debug) as answer:
        answer.code = compare(args)
    return answer.code


def compare(args: argparse.Namespace) -> int:
    """Train what was asked for, one run after the other, and report. Returns the exit code."""
    check_work_dir(args.work_dir)
    start = time.time()
    console = Console(stderr=True)
    console.print(f"{args.task}: {len(args.norms)} norm(s) x {args.seeds} seed(s), logs in {args.work_dir}")
    runs = plan(args)
    env = training_runs.environment("auto" if args.device == "cuda" else args.device.removeprefix("cuda:"))
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
            bar = progress.add_task(f"{run.norm} seed {run.seed}", total=None)
            execute(run, args.task, env, progress, bar)
            progress.remove_task(bar)
            progress.advance(total)
            names = TASKS[args.task] if not run.failed else []
            scores = ", ".join(f"{name} {100 * run.outcome.metrics[key]:.1f}" for key, name in names)
            console.print(f"{run.norm}, seed {run.seed}: {run.failed or scores}", highlight=False, markup=False)
    text, paths = write_report(runs, args, time.time() - start)
    print(text, "", *paths, sep="\n")
    return int(any(run.failed for run in runs))


if __name__ == "__main__":
    raise SystemExit(main())
