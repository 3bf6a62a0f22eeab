"""Break trainings in the ways they break in practice, go on, and compare with trainings that nobody touched.

Each trial trains a small I3D on clips of moving digits in a work dir of its own, is ended by a fault, and goes on with
--resume. It is held if the last checkpoint is equal to the bit to that of the same training without a fault: weights,
optimizer, EMA, schedule, random numbers and the history of the loss.

Prints one line per trial that was not held, and a table. Exit code: 0 all were held, 1 not all, 2 wrong arguments.
"""

import argparse
import importlib.util
import itertools
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from normplug.openmmlab import digits
from normplug.reporting import markdown_table

ROOT = Path(__file__).resolve().parent.parent
NORMS = {"GN": "gn", "SyncBN": "syncbn", "CBN": "cbn", "EvoNormB0": "evonorm-b0", "EMA": "gn"}
EPOCHS, CLIPS, KEEP = 4, 16, 1
BOUND = 120  # seconds in which what must end has to end
# What the processes of trials import, once for all of them
PRELOAD = ["normplug", "mmaction.datasets", "mmaction.engine", "mmaction.evaluation", "mmaction.models"]


@dataclass(frozen=True)
class Trial:
    """One training with one fault.

    Attributes:
        work_dir: Where it trains, and what it prints (``log``).
        arguments: Of ``tools/train.py``.
        wanted: The last checkpoint of the training without a fault.
        seconds: How long that took.
        steps: How often it opened, renamed or deleted a file for its checkpoints.
        size: Bytes of the smallest checkpoint.
        rng: Draws the moment.
        number: Of the trials with this fault.
    """

    work_dir: Path
    arguments: tuple[str, ...]
    wanted: dict
    seconds: float
    steps: int
    size: int
    rng: random.Random
    number: int = 0


class NotHeldError(Exception):
    """A trial did not end as it must."""


# ---- faults: each ends a training and goes on with it, or raises NotHeldError


def moment(trial: Trial) -> None:
    """kill -9 at a random moment"""
    process = start(trial, [])
    process.join(trial.rng.uniform(0.1, 1.0) * trial.seconds)
    process.kill()
    go_on(trial)


def save(trial: Trial) -> None:
    """kill -9 at a random step of saving: before a file is opened, renamed or deleted"""
    ends(start(trial, [], ("die at step", trial.rng.randint(1, trial.steps))), -signal.SIGKILL)
    go_on(trial)


def write(trial: Trial) -> None:
    """a kill by the kernel in the middle of writing a checkpoint"""
    ends(start(trial, [], ("die in checkpoint", trial.rng.randint(1, EPOCHS))), -signal.SIGXFSZ)
    go_on(trial)


def full(trial: Trial) -> None:
    """the disk takes no more checkpoint: the training must end with one sentence and exit code 1"""
    ends(start(trial, [], ("fail in checkpoints from", trial.rng.randint(2, EPOCHS))), 1)
    said(trial, r"\.pth could not be written \(File too large\)\. \S+\.pth is whole")
    go_on(trial)


def skip(trial: Trial) -> None:
    """the disk does not take one checkpoint, with skip_failed_saves=True: the training must not end"""
    options = ["default_hooks.checkpoint.skip_failed_saves=True"]
    ends(start(trial, options, ("fail in checkpoint", trial.rng.randint(1, EPOCHS - 1))), 0)
    said(trial, "could not be written .* training goes on without it")
    equal(trial)


def damage(trial: Trial) -> None:
    """kill -9, then the newest checkpoint is cut short, or last_checkpoint is empty, lost, or of another folder"""
    options = ["default_hooks.checkpoint.max_keep_ckpts=3"]
    ends(start(trial, options, ("die in checkpoint", EPOCHS)), -signal.SIGXFSZ)
    match trial.number % 4:
        case 0:
            newest = trial.work_dir / f"epoch_{EPOCHS - 1}.pth"
            os.truncate(newest, trial.rng.randrange(newest.stat().st_size))
        case 1:
            (trial.work_dir / "last_checkpoint").write_text("")
        case 2:
            (trial.work_dir / "last_checkpoint").unlink()
        case 3:
            moved = trial.work_dir.with_name(trial.work_dir.name + "-moved")
            trial.work_dir.rename(moved)
            trial = replace(trial, work_dir=moved)
    go_on(trial)


def two(trial: Trial) -> None:
    """a second training starts in the work dir: it must end at once, and the first must not notice"""
    first = start(trial, [])
    wait_for(trial, "Epoch.train.")
    os.kill(first.pid, signal.SIGSTOP)
    ends(start(trial, [], log="second.log"), 2)
    said(trial, "Another run is training in", log="second.log")
    os.kill(first.pid, signal.SIGCONT)
    ends(first, 0)
    equal(trial)


def rank(trial: Trial) -> None:
    """kill -9 of one of two processes under torchrun: both must end within two minutes, and say why"""
    launched = launch(trial, [])
    wait_for(trial, rf"Epoch.train.\s*\[{trial.rng.randint(2, EPOCHS)}\]")
    os.kill(worker(launched.pid, 1), signal.SIGKILL)
    if ended(launched) == 0:
        raise NotHeldError("torchrun ended with exit code 0")
    said(trial, "Signal 9 .SIGKILL. received by PID")
    if ended(launch(trial, ["--resume"])):
        raise NotHeldError("the training did not go on")
    equal(trial)


def restart(trial: Trial) -> None:
    """kill -9 of one of two processes under torchrun --max-restarts=1: it must go on by itself"""
    launched = launch(trial, ["--resume"], "--max-restarts=1")
    wait_for(trial, rf"Epoch.train.\s*\[{trial.rng.randint(2, EPOCHS)}\]")
    os.kill(worker(launched.pid, 1), signal.SIGKILL)
    if code := ended(launched, 3 * BOUND):
        raise NotHeldError(f"torchrun ended with exit code {code}")
    equal(trial)


FAULTS: dict[str, Callable[[Trial], None]] = {
    fault.__name__: fault for fault in (moment, save, write, full, skip, damage, two, rank, restart)
}
LAUNCHED = ("rank", "restart")  # in two processes
REPEATED = ("moment", "save", "write")  # as often as --trials says


# ---- trainings


def start(
    trial: Trial,
    options: Sequence[str],
    fault: tuple[str, int] | None = None,
    more: Sequence[str] = (),
    log: str = "log",
) -> multiprocessing.Process:
    """Start a training in a process that has imported what it needs."""
    trial.work_dir.mkdir(exist_ok=True)
    (trial.work_dir / log).touch()
    arguments = [*trial.arguments, *options, "--work-dir", str(trial.work_dir), *more]
    context = multiprocessing.get_context("forkserver")
    saboteur = Saboteur(*fault or ("nothing", 0), int(trial.rng.uniform(0.2, 1.0) * trial.size))
    process = context.Process(target=train, args=(arguments, trial.work_dir / log, saboteur))
    process.start()
    return process


def train(arguments: list[str], log: Path, saboteur: "Saboteur") -> None:
    """Train in this process, and have the fault happen."""
    with log.open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(saboteur.look)
    spec = importlib.util.spec_from_file_location("train", ROOT / "tools" / "train.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    sys.exit(tool.main(arguments))


class Saboteur:
    """Watches what a process does with files, whichever code does it, and strikes while it saves a checkpoint.

    Args:
        fault: What to do.
        number: At which step or checkpoint, from 1.
        size: Bytes after which the writing of a file ends.
    """

    def __init__(self, fault: str, number: int, size: int) -> None:
        self.fault, self.number, self.size = fault, number, size
        self.steps = self.checkpoints = 0

    def look(self, event: str, args: tuple) -> None:
        if event not in ("open", "os.rename", "os.remove") or not isinstance(args[0], str):
            return
        name = os.path.basename(args[0])
        writes = event != "open" or bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        if not writes or not (".pth" in name or "last_checkpoint" in name):
            return
        self.steps += 1
        size = os.path.getsize(args[0]) if event == "os.rename" else 0
        print(f"saving, step {self.steps}: {event} {name}, {size} bytes", flush=True)
        if self.fault == "die at step" and self.steps == self.number:
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "open" and ".pth" in name:
            self.checkpoints += 1
            self.limit_files()

    def limit_files(self) -> None:
        """Let no file grow beyond a part of a checkpoint; the kernel then kills the process, or writing fails."""
        reached = self.checkpoints >= self.number
        exactly = self.checkpoints == self.number
        limited = {"die in checkpoint": exactly, "fail in checkpoint": exactly, "fail in checkpoints from": reached}
        if self.fault == "die in checkpoint":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        size = self.size if limited.get(self.fault) else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def ends(process: multiprocessing.Process, code: int) -> None:
    """Wait for a process, and check its exit code (negative: a signal)."""
    process.join(BOUND)
    if process.is_alive():
        process.kill()
        raise NotHeldError(f"a training did not end within {BOUND} s")
    if process.exitcode != code:
        raise NotHeldError(f"a training ended with {process.exitcode}, expected {code}")


def go_on(trial: Trial) -> None:
    """Resume in one process to the end, and compare."""
    ends(start(trial, [], more=["--resume"]), 0)
    equal(trial)


def launch(trial: Trial, more: Sequence[str], *options: str) -> subprocess.Popen:
    """Start a training of two processes under torchrun."""
    trial.work_dir.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    command += [str(ROOT / "tools" / "train.py"), *trial.arguments, "--work-dir", str(trial.work_dir), *more]
    with (trial.work_dir / "log").open("a") as out:
        return subprocess.Popen(
            [*command, "--launcher", "pytorch"], stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def ended(launched: subprocess.Popen, seconds: float = BOUND) -> int:
    try:
        return launched.wait(seconds)
    except subprocess.TimeoutExpired as error:
        launched.kill()
        raise NotHeldError(f"torchrun did not end within {seconds} s") from error


def worker(launcher: int, number: int) -> int:
    """Return the process id of a rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return next(int(pid) for pid in children if f"\0RANK={number}\0" in Path(f"/proc/{pid}/environ").read_text())


def wait_for(trial: Trial, pattern: str) -> None:
    """Wait until the training says something."""
    for _ in range(20 * BOUND):
        if re.search(pattern, (trial.work_dir / "log").read_text()):
            return
        time.sleep(0.05)
    raise NotHeldError(f"a training did not come to {pattern!r} within {BOUND} s")


def said(trial: Trial, pattern: str, log: str = "log") -> None:
    """Check that a training that ended said why, and no more than that."""
    text = (trial.work_dir / log).read_text()
    if not re.search(pattern, text):
        raise NotHeldError(f"a training did not say {pattern!r}; its last words: {text[-300:]!r}")
    if "Traceback" in text and "torch.distributed" not in text:
        raise NotHeldError(f"a training ended with a traceback: {text[-300:]!r}")


def last_checkpoint(work_dir: Path) -> dict:
    """Return what a training came to, without what times and places change in it."""
    checkpoint = torch.load(work_dir / f"epoch_{EPOCHS}.pth")
    scalars = checkpoint["message_hub"]["log_scalars"]
    history = {name: row["log_history"] for name, row in scalars.items() if not re.search("time|memory", name)}
    kept = ("state_dict", "ema_state_dict", "optimizer", "param_schedulers", "random_states")
    progress = {name: checkpoint["meta"][name] for name in ("epoch", "iter")}
    return {**{name: checkpoint.get(name) for name in kept}, "history": history, "progress": progress}


def equal(trial: Trial) -> None:
    """Check that a training came to what it comes to without a fault."""
    try:
        got = last_checkpoint(trial.work_dir)
    except FileNotFoundError as error:
        raise NotHeldError(f"there is no last checkpoint: {error}") from error
    if places := list(differences(got, trial.wanted, "checkpoint")):
        raise NotHeldError(f"{len(places)} values differ, the first {places[0]}")
    if left := [path.name for path in trial.work_dir.glob(".*.partial")]:
        raise NotHeldError(f"half files are left: {left}")


def differences(got, wanted, place: str) -> Iterator[str]:
    """Where two nested values differ, tensors to the bit."""
    if isinstance(wanted, torch.Tensor):
        if not (isinstance(got, torch.Tensor) and got.dtype == wanted.dtype and torch.equal(got, wanted)):
            yield place
    elif isinstance(wanted, dict):
        for key in wanted.keys() | got.keys():
            yield from differences(got.get(key), wanted.get(key), f"{place}.{key}")
    elif isinstance(wanted, list | tuple):
        for i, (one, other) in enumerate(itertools.zip_longest(got, wanted)):
            yield from differences(one, other, f"{place}[{i}]")
    elif got != wanted:
        yield place


# ---- the campaign


def undisturbed(norm: str, folder: Path, together: bool) -> Trial:
    """Train without a fault, in one process or in two, and return what its trials have in common."""
    config = folder / f"{norm}.py"
    config.write_text(
        f"_base_ = {str(ROOT / 'configs' / 'digits' / f'i3d_r18_{NORMS[norm]}_digits.py')!r}\n"
        + ("custom_hooks = [dict(type='EMAHook')]\n" if norm == "EMA" else "")
    )
    options = [f"train_cfg.max_epochs={EPOCHS}", f"default_hooks.checkpoint.max_keep_ckpts={KEEP}"]
    options += ["default_hooks.logger.interval=1", "train_dataloader.batch_size=2"]
    for loader in ("train", "val", "test"):
        dataset = f"{loader}_dataloader.dataset"
        options += [f"{dataset}.num_train={CLIPS}", f"{dataset}.num_val=2", f"{dataset}.data_root={folder / 'digits'}"]
    arguments = (str(config), "--seed", "0", "--no-validate", "--cfg-options", *options)
    trial = Trial(folder / f"undisturbed-{norm}-{together}", arguments, {}, 0, 0, 0, random.Random(0))
    begin = time.monotonic()
    if together:
        ended(launch(trial, []), 3 * BOUND)
    else:
        ends(start(trial, []), 0)
    seconds = time.monotonic() - begin
    log = (trial.work_dir / "log").read_text()
    trial = replace(trial, wanted=last_checkpoint(trial.work_dir), seconds=seconds)
    if together:
        return trial
    steps, sizes = re.findall(r"saving, step (\d+)", log), re.findall(r"os.rename \S+\.pth\S+, (\d+) bytes", log)
    return replace(trial, steps=int(steps[-1]), size=min(map(int, sizes)))


def main(argv: Sequence[str] | None = None) -> int:
    faults = "\n".join(f"  {name:8} {fault.__doc__}" for name, fault in FAULTS.items())
    p = argparse.ArgumentParser(
        description=f"{__doc__}\nfaults:\n{faults}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--norms", nargs="+", choices=NORMS, default=list(NORMS), metavar="NORM", help=", ".join(NORMS))
    p.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT", help="see above")
    p.add_argument("--trials", type=int, default=5, help=f"of {', '.join(REPEATED)} each (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    args = p.parse_args(argv)
    if args.trials < 1:
        p.error(f"--trials must be 1 or more, got {args.trials}")
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    held: dict[tuple[str, str], list[bool]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        digits.make("video", folder / "digits", num_train=CLIPS, num_val=2)
        for norm in args.norms:
            common: dict[bool, Trial] = {}
            for fault in args.faults:
                together = fault in LAUNCHED
                if together not in common:
                    common[together] = undisturbed(norm, folder, together)
                for i in range(args.trials if fault in REPEATED else 4 if fault == "damage" else 1):
                    rng = random.Random(f"{args.seed} {norm} {fault} {i}")
                    trial = replace(common[together], work_dir=folder / f"{norm}-{fault}-{i}", rng=rng, number=i)
                    try:
                        FAULTS[fault](trial)
                        held[norm, fault].append(True)
                    except NotHeldError as error:
                        held[norm, fault].append(False)
                        print(f"{norm}, {fault} {i}: {error}", flush=True)
                    shutil.rmtree(trial.work_dir, ignore_errors=True)
                print(f"{norm}, {fault}: held {sum(held[norm, fault])} of {len(held[norm, fault])}", file=sys.stderr)
    rows = [[norm, *(f"{sum(held[norm, f])} of {len(held[norm, f])}" for f in args.faults)] for norm in args.norms]
    print(markdown_table([["held", *args.faults], *rows]))
    tried = list(itertools.chain.from_iterable(held.values()))
    print(f"{len(tried)} trials, {sum(tried)} held")
    return 0 if all(tried) else 1


if __name__ == "__main__":
    raise SystemExit(main())
