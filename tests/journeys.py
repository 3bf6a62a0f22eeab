"""A fresh folder with a copy of this tree and tiny data, and commands typed into its shell."""

import contextlib
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from mmengine.config import Config
from tiny_data import PANORAMA, make_coco, make_kinetics, make_own, make_weights

__all__ = ["Checkout", "Done", "in_shell", "make_checkout", "smaller", "train"]

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", "__pycache__", "*.egg-info", ".*_cache", "build", "dist", "data", "work_dirs", "benchmarks")
# Drawing 300 images takes longer than training on 16
DIGITS = {"detection": dict(num_train=16, num_val=8), "video": dict(num_train=32, num_val=16)}


@dataclass(frozen=True)
class Done:
    """A command that has ended: the line, its exit code, and what it wrote to both outputs."""

    line: str
    code: int
    output: str
    seconds: float

    def __str__(self) -> str:
        end = "\n".join(f"    {text}" for text in self.output.splitlines()[-25:])
        return f"$ {self.line}\nexit code {self.code} after {self.seconds:.0f} s, the end of its output:\n{end}"


@dataclass(frozen=True)
class Checkout:
    """A folder as after ``git clone``, with data and without a network.

    Args:
        root: Folder of the tree; commands are typed here unless they say where.
        env: Environment of its shell, instead of what a virtual environment with ``pip install -e .`` would be.
        ports: For commands that launch processes.
    """

    root: Path
    env: dict[str, str]
    ports: Iterator[int]

    def run(self, line: str, cwd: Path | None = None, timeout: float = 240) -> Done:
        """Type a line; a command that is still running after ``timeout`` seconds is ended with all it started."""
        start = time.monotonic()
        shell = subprocess.Popen(
            ["bash", "-c", line],
            cwd=cwd or self.root,
            env=self.env | {"PORT": str(next(self.ports))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output = shell.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            os.killpg(shell.pid, signal.SIGKILL)
            output = shell.communicate()[0] + f"\nstill running after {timeout} s"
        return Done(line, shell.returncode, output, time.monotonic() - start)


def make_checkout(folder: Path, port: int, few: bool = False) -> Checkout:
    """Copy the tree to ``folder``/normplug and lay the data where the configs look for it.

    The sets of digits, which the configs make themselves, are smaller in the copy: the one line of each base config
    that says how many images or clips there are says fewer. Nothing else of the tree is changed.

    Args:
        folder: An empty folder.
        port: Of the first command that launches processes; each has its own, and so must checkouts at work together.
        few: Two panoramas and two clips to train on, and one of each to validate.
    """
    root = folder / "normplug"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for task, numbers in DIGITS.items():
        base = root / "configs" / "_base_" / f"digits_{task}.py"
        text, found = re.subn(r"(?m)^digits = dict\(.*\)$", f"digits = dict(seed=0, **{numbers})", base.read_text())
        assert found == 1, f"{base} no longer says in one line how large its set is"
        base.write_text(text)
    make_coco(root / "data" / "coco", **(dict(train=2, val=1, sizes=PANORAMA) if few else {}))
    make_kinetics(root / "data" / "kinetics400", **(dict(train=2, val=1) if few else {}))
    data = root / "data"
    make_own(data / "fruit", data / "gestures", data / "coco", data / "kinetics400")
    make_weights(folder / "torch")
    nowhere = "http://127.0.0.1:9"
    env = os.environ | {
        "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(root),
        "TORCH_HOME": str(folder / "torch"),
        "OMP_NUM_THREADS": "1",
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), nowhere),
    }
    env.pop("TRITON_INTERPRET", None)
    return Checkout(root, env, count(port))


def smaller(config: Path | str, epochs: int = 1, workers: bool = True) -> list[str]:
    """Return the settings for --cfg-options that make a training of a config small, and leave it what it is.

    One epoch or two iterations on a few samples; pictures an eighth and frames a quarter of their side, a quarter of
    the frames; a handful of proposals and RoIs. Model, norms, losses, hooks, schedule and pipeline stay.

    Args:
        config: Config file.
        epochs: Length of the training; one is two iterations where the config counts those.
        workers: Whether samples are loaded in processes of their own, as the config says.
    """
    cfg = Config.fromfile(config)
    options = {}
    if cfg.train_cfg.get("type", "EpochBasedTrainLoop") == "IterBasedTrainLoop":
        options |= {"train_cfg.max_iters": 2 * epochs, "train_cfg.val_interval": 2}
    else:
        options["train_cfg.max_epochs"] = epochs
    if "data/digits" in str(cfg.train_dataloader):
        return [f"{key}={value}" for key, value in options.items()]
    options["train_dataloader.batch_size"] = min(2, cfg.train_dataloader.batch_size)
    two_batches = 2 * options["train_dataloader.batch_size"]  # the end of an epoch is logged, the second iteration not
    for loader, samples in (("train_dataloader", two_batches), ("val_dataloader", 2), ("test_dataloader", 2)):
        if not workers:
            options |= {f"{loader}.num_workers": 0, f"{loader}.persistent_workers": False}
        path, dataset = f"{loader}.dataset", cfg[loader].dataset
        while "dataset" in dataset:
            options |= {f"{path}.times": 1} if "times" in dataset else {}
            path, dataset = f"{path}.dataset", dataset.dataset
        options[f"{path}.indices"] = samples
        divisor = 4 if cfg.default_scope == "mmaction" else 8
        options |= dict(_smaller_sizes(f"{path}.pipeline", dataset.pipeline, divisor))
    options |= dict(_smaller_sizes("model.data_preprocessor", cfg.model.get("data_preprocessor") or {}, 8))
    if "rcnn" in (cfg.model.get("train_cfg") or {}):
        options |= {"model.train_cfg.rcnn.sampler.num": 16, "model.train_cfg.rpn_proposal.max_per_img": 32}
        options |= {"model.test_cfg.rpn.max_per_img": 16}
    return [f"{key}={value}".replace(" ", "") for key, value in options.items()]


_SIZES = {"scale", "scales", "scale_range", "size", "crop_size", "input_size", "clip_len", "num_clips"}


def _smaller_sizes(path: str, settings, divisor: int) -> Iterator[tuple[str, object]]:
    """Yield the keys below ``path`` that are lengths in pixels or frames, or numbers of clips, and smaller ones."""
    pairs = settings.items() if isinstance(settings, dict) else enumerate(settings)
    for key, value in pairs:
        if isinstance(value, dict) or (isinstance(value, list) and key not in _SIZES):
            yield from _smaller_sizes(f"{path}.{key}", value, divisor)
        elif key == "num_clips":
            yield f"{path}.{key}", 1
        elif key in _SIZES:
            yield f"{path}.{key}", _divided(value, divisor)


def _divided(value, divisor: int):
    if isinstance(value, list | tuple):
        return type(value)(_divided(v, divisor) for v in value)
    # Ratios, and -1 for "whatever fits", are none of it
    return value // divisor if isinstance(value, int) and value >= 32 else value


def train(config: Path, folder: Path, env: dict[str, str], options: list[str]) -> str:
    """Run tools/train.py as a user of ``folder`` does; return its log, with a traceback where it failed.

    In a process that was forked from one that has imported the toolkits, which is most of what a start takes.
    """
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    log = Path("work_dirs", f"{config.stem}.log")
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.path.insert(0, str(ROOT / "tools"))
        import train as tool

        try:
            code = tool.main([str(config), "--cfg-options", *options])
        except Exception:
            traceback.print_exc()
            code = 1
        print(f"exit code {code}")
    logging.shutdown()
    return log.read_text()


def in_shell(options: list[str]) -> str:
    """Return the options as one types them."""
    return f"--cfg-options {shlex.join(options)}"
