"""``--resume`` without a file: from the newest whole checkpoint of the work dir, and never silently from none."""

import functools
import logging
import re
import zipfile
from pathlib import Path

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import FlexibleRunner, Runner
from torch import Tensor

from normplug.openmmlab.checkpoints import load
from normplug.openmmlab.file_kinds import CheckpointError
from normplug.openmmlab.weight_checks import is_finite

__all__ = ["ResumeError", "install", "newest_whole_checkpoint"]

_LAST = "last_checkpoint"  # mmengine's note of the newest one: a path
_PUBLISHED = re.compile(r"best_.*|.*-[0-9a-f]{8}\.pth")  # without optimizer: no state to go on from


class ResumeError(CheckpointError):
    """There is something to go on from in a work dir, and none of it can be used."""


def newest_whole_checkpoint(work_dir: str | Path, folder: str | Path | None = None) -> tuple[Path | None, list[str]]:
    """Find the checkpoint from which a run goes on.

    The newest is the one that says it was saved last, which a copy or a move of the work dir does not change.
    ``last_checkpoint`` may be missing, empty, or name a folder that is no longer there.

    Args:
        work_dir: Of the run.
        folder: Where its checkpoints are, if not there (``out_dir`` of the CheckpointHook).

    Returns:
        Its path, or None if there is no checkpoint at all; and what is wrong with each newer one, in a sentence.

    Raises:
        ResumeError: If there are checkpoints and none is whole, or ``last_checkpoint`` names one and there is none.
    """
    work_dir = Path(work_dir)
    noted = _noted(work_dir)
    folders = {work_dir, Path(folder or work_dir)} | ({noted.parent} if noted else set())
    found = [path for place in folders if place.is_dir() for path in place.glob("*.pth")]
    found = [path for path in found if not _PUBLISHED.fullmatch(path.name)]
    if noted and noted.exists() and noted not in found:  # of another name
        found.append(noted)
    passed_over, ages = [], {}
    for path in found:
        try:
            ages[path] = _age(path)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            passed_over.append(f"{path} is not whole ({error})")
    for path in sorted(ages, key=ages.__getitem__, reverse=True):
        part = _broken(path)
        if part is None:
            return path, passed_over
        passed_over.append(f"{path} is not whole ({part} in it differs from its checksum)")
    if passed_over:
        raise ResumeError(
            f"--resume finds no whole checkpoint: {'; '.join(passed_over)}. To start anew, choose another --work-dir "
            "or delete these files; to go on from a file elsewhere, name it: --resume FILE."
        )
    if (work_dir / _LAST).exists():
        raise ResumeError(
            f"--resume finds no checkpoint in {work_dir}, but {work_dir / _LAST} says that there was one: "
            f"{noted or 'it is empty'}. Put the checkpoint back or name it, --resume FILE; to start anew, delete "
            f"{work_dir / _LAST}."
        )
    return None, []


def _noted(work_dir: Path) -> Path | None:
    """The checkpoint that ``last_checkpoint`` names, in the work dir if it was moved with that."""
    note = work_dir / _LAST
    text = note.read_text(errors="replace").strip().strip("\0") if note.is_file() else ""
    if not text:
        return None
    path = Path(text)
    try:
        return path if path.exists() else work_dir / path.name
    except (OSError, ValueError):  # what a crash left there is no name that a file may have
        return None


def _age(path: Path) -> tuple[str, int, float]:
    """When a checkpoint was saved and how far it is, for sorting. Raises whatever its reading does."""
    changed = path.stat().st_mtime
    if path.is_dir():  # a strategy's, of several files
        return "", 0, changed
    # With mmap the weights stay on the disk.
    meta = load(path, map_location="cpu", mmap=zipfile.is_zipfile(path))["meta"]
    return str(meta.get("time", "")), int(meta["iter"]), changed


def _broken(path: Path) -> str | None:
    """Return the part of a checkpoint that is not what it was when it was saved, by the file's own checksums."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _resumes_from_whole(load_or_resume):
    @functools.wraps(load_or_resume)
    def load_or_resume_from_whole(self) -> None:
        if self._resume is True and self._load_from is None and not self._has_loaded and not _is_remote(self):
            answer = [_choose(self) if is_main_process() else None]
            broadcast_object_list(answer)  # every rank goes on from the same file, or none does
            path, passed_over, problem = answer[0]
            if problem:
                raise ResumeError(problem)
            for sentence in passed_over:
                self.logger.log(logging.WARNING, f"{sentence}: passed over")
            if path:
                self.logger.info(f"Going on from {path}")
                self._load_from = path
            else:
                self.logger.warning(f"{self.work_dir} holds no checkpoint to resume from: training starts anew")
                return
        load_or_resume(self)

    return load_or_resume_from_whole


def _is_remote(runner) -> bool:
    """Whether the checkpoints are in a store such as ``s3://``: mmengine finds them there, by its own note."""
    note = Path(runner.work_dir, _LAST)
    return note.is_file() and "://" in note.read_text(errors="replace")


def _tells_why(resume):
    @functools.wraps(resume)
    def resume_or_tell(self, filename, *args, **kwargs) -> None:
        try:
            resume(self, filename, *args, **kwargs)
            _check_optimizer(self.optim_wrapper)
        except (CheckpointError, OSError):
            raise
        except Exception as error:  # all that is done there is to take over what the file has
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ResumeError(
                f"{filename} is nothing to go on from ({reason}). Expected: a checkpoint that the same run saved, with "
                "the same config. To start anew from its weights, leave out --resume and write --cfg-options "
                f"load_from={filename}."
            ) from error

    return resume_or_tell


# What optimizers remember of each value of a parameter
_OF_ITS_SHAPE = {"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "grad_avg"}


def _check_optimizer(wrapper: OptimWrapper | OptimWrapperDict) -> None:
    """Raise ValueError if what an optimizer remembers is of another model, or not finite: torch looks at neither."""
    for one in wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]:
        for parameter, state in one.optimizer.state.items():
            for name, value in state.items():
                if name in _OF_ITS_SHAPE and isinstance(value, Tensor) and value.shape != parameter.shape:
                    raise ValueError(
                        f"the optimizer's {name} of a parameter of shape {tuple(parameter.shape)} has shape "
                        f"{tuple(value.shape)}"
                    )
                if isinstance(value, Tensor) and value.is_floating_point() and not is_finite(value):
                    raise ValueError(f"the optimizer's {name} is not finite")


def _choose(runner) -> tuple[str | None, list[str], str]:
    folder = next((hook.out_dir for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
    if folder and folder != runner.work_dir:
        folder = Path(folder, Path(runner.work_dir).name)  # as the hook makes it
    try:
        path, passed_over = newest_whole_checkpoint(runner.work_dir, folder)
    except ResumeError as error:
        return None, [], str(error)
    return path and str(path), passed_over, ""


def install() -> None:
    """Have every Runner resume in this way."""
    for kind in (Runner, FlexibleRunner):
        if not hasattr(kind.load_or_resume, "__wrapped__"):
            kind.load_or_resume = _resumes_from_whole(kind.load_or_resume)
            kind.resume = _tells_why(kind.resume)
