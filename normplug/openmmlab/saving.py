"""A run that is saved can always go on: checkpoints are whole or not there, and one run at a time has a work dir.

mmengine's CheckpointHook deletes the old checkpoint, writes the new one in place, and then says in ``last_checkpoint``
where it is: a run that ends in between, by a kill or a full disk, can be left with nothing. Here a checkpoint is
written beside its place, moved there when it is whole, noted in ``last_checkpoint``, and only then old ones go.
"""

import re
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import mmengine.hooks
import mmengine.runner.checkpoint as mmengine_checkpoint
from filelock import FileLock, Timeout
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.registry import HOOKS

from normplug.openmmlab import run_state
from normplug.openmmlab.atomic import atomic_write, remove_partial

__all__ = ["CheckpointHook", "CheckpointNotSavedError", "WorkDirInUseError", "install"]

LOCK = ".training"  # the file in a work dir that the run which trains there has locked


class CheckpointNotSavedError(OSError):
    """A checkpoint could not be written, for want of space or of rights. The ones before it are whole."""


class WorkDirInUseError(ValueError):
    """Another run trains in this work dir."""


class WholeFiles(LocalBackend):
    """A folder of this machine where a file that is being written has no name until it is whole."""

    def put(self, obj: bytes | memoryview, filepath: str | Path) -> None:
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(filepath) as file:
            file.write(obj)


def _whole_files(*args: Any, **kwargs: Any) -> Any:
    """Take the place of mmengine's ``get_file_backend`` where checkpoints are written."""
    backend = get_file_backend(*args, **kwargs)
    return WholeFiles() if type(backend) is LocalBackend else backend


class _RemovesLater:
    """A file backend that only notes what is to be removed."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.removals: list[tuple[str, partial]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self.removals.append((path, partial(self._backend.remove, path)))

    def rmtree(self, path: str) -> None:
        self.removals.append((path, partial(self._backend.rmtree, path)))


class CheckpointHook(mmengine.hooks.CheckpointHook):
    """mmengine's CheckpointHook, with which no moment is without a whole checkpoint. It has its name in the registry.

    Args:
        skip_failed_saves: Train on if a checkpoint cannot be written (a full disk), with an error in the log, and save
            at the next interval; else the run ends. Either way what was saved before stays.
        *args, **kwargs: As in mmengine.

    Raises:
        CheckpointNotSavedError: If a checkpoint cannot be written, unless ``skip_failed_saves``.
        WorkDirInUseError: If another run trains in this work dir.
    """

    def __init__(self, *args: Any, skip_failed_saves: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip_failed_saves = skip_failed_saves
        self._lock: FileLock | None = None

    def before_train(self, runner) -> None:
        if is_main_process():
            self._lock = _lock(runner)
        info = runner.message_hub.runtime_info
        if "keep_ckpt_ids" in info:  # from a checkpoint, and names of files to delete are made of it
            kept = info["keep_ckpt_ids"]
            info["keep_ckpt_ids"] = [step for step in kept if type(step) is int] if isinstance(kept, list) else []
        super().before_train(runner)
        self._find_best(info)
        if is_main_process():
            remove_partial(self.out_dir)  # of an earlier run: this one has the folder for itself
            if runner.iter == 0:
                self._warn_of_earlier_run(runner)
        run_state.validate_if_due(runner, saves_best=bool(self.save_best))

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        run_state.keep_gradients(runner, checkpoint)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        run_state.return_gradients(runner, checkpoint)

    def after_train(self, runner) -> None:
        super().after_train(runner)
        if self._lock is not None:
            self._lock.release()

    def _find_best(self, info: dict) -> None:
        """Look for the best checkpoint in this run's folder only: its path is from a file, and will be deleted."""
        if not self.save_best:
            return
        single = len(self.key_indicators) == 1
        stored = {"best_ckpt": self.best_ckpt_path} if single else dict(self.best_ckpt_path_dict)
        for key, path in stored.items():
            name = re.split(r"[/\\]", path)[-1] if isinstance(path, str) else ""
            here = self.file_backend.join_path(self.out_dir, name)
            found = here if name.startswith("best_") and self.file_backend.exists(here) else None
            if single:
                self.best_ckpt_path = found
            else:
                self.best_ckpt_path_dict[key] = found
            info["best_ckpt" if single else f"best_ckpt_{key}"] = found

    def _warn_of_earlier_run(self, runner) -> None:
        earlier = sorted(path.name for path in Path(self.out_dir).glob(re.sub("{.*?}", "*", self.filename_tmpl)))
        if earlier:
            runner.logger.warning(
                f"{self.out_dir} holds {len(earlier)} checkpoints of an earlier run ({', '.join(earlier[:3])}...), and "
                "this run starts anew: it overwrites those of the same name as it comes to them. To go on with the "
                "earlier run: --resume; to keep both: another --work-dir."
            )

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        """Write the checkpoint of a step, then ``last_checkpoint``, then delete those beyond max_keep_ckpts."""
        info = runner.message_hub.runtime_info
        name = self.filename_tmpl.format(step)
        path = self.file_backend.join_path(self.out_dir, name)
        before = dict(info)
        outdated = []
        if self.max_keep_ckpts > 0:
            kept = [other for other in self.keep_ckpt_ids if other != step] + [step]
            outdated, kept = kept[: -self.max_keep_ckpts], kept[-self.max_keep_ckpts :]
            runner.message_hub.update_info("keep_ckpt_ids", kept)
        runner.message_hub.update_info("last_ckpt", path)
        try:
            runner.save_checkpoint(
                self.out_dir,
                name,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
            if is_main_process():
                with atomic_write(Path(runner.work_dir, "last_checkpoint")) as file:
                    file.write(path.encode())
        except OSError as error:
            info.clear()
            info.update(before)
            self._failed(runner, path, error)
            return
        self.last_ckpt = path
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
        if is_main_process():
            for other in outdated:
                old = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(other))
                if self.file_backend.isfile(old):
                    self.file_backend.remove(old)
                elif self.file_backend.isdir(old):  # of DeepSpeed
                    self.file_backend.rmtree(old)

    def _save_best_checkpoint(self, runner, metrics: dict) -> None:
        """Delete the best checkpoint until now when there is a better one on the disk, and not before."""
        if not self.save_best:
            return  # before_train, which looks for the backend, is not called where a run only evaluates
        info, backend = runner.message_hub.runtime_info, self.file_backend
        before = dict(info)
        paths = getattr(self, "best_ckpt_path", None), dict(getattr(self, "best_ckpt_path_dict", {}))
        self.file_backend = later = _RemovesLater(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        except OSError as error:
            if isinstance(error, CheckpointNotSavedError):
                raise
            info.clear()
            info.update(before)
            self.best_ckpt_path, self.best_ckpt_path_dict = paths
            later.removals.clear()
            self._failed(runner, "The best checkpoint", error)
        finally:
            self.file_backend = backend
        new = {value for key, value in info.items() if key.startswith("best_ckpt")}
        for path, remove in later.removals:
            if path not in new:
                remove()

    def _failed(self, runner, path: str, error: OSError) -> None:
        reason = f"{path} could not be written ({error.strerror or error})"
        last = f" {self.last_ckpt} is whole." if self.last_ckpt else ""
        if self.skip_failed_saves:
            runner.logger.error(f"{reason}, and training goes on without it.{last}")
            return
        raise CheckpointNotSavedError(
            f"{reason}.{last} Make room and go on with --resume; or let runs train on without a checkpoint that "
            "cannot be written: --cfg-options default_hooks.checkpoint.skip_failed_saves=True."
        ) from error


def _lock(runner) -> FileLock:
    """Lock the work dir for this process; the lock ends with the process, however that ends."""
    # One lock per folder and process: runs that follow each other in a process share it.
    lock = FileLock(Path(runner.work_dir, LOCK).absolute(), is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise WorkDirInUseError(
            f"Another run is training in {runner.work_dir}, and two in one folder delete each other's checkpoints. "
            "Expected: a work dir for each. Choose another with --work-dir, or end that run first."
        ) from error
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        runner.logger.warning(f"{runner.work_dir} cannot be locked ({error}): see that no other run trains there")
    return lock


def install() -> None:
    """Have every Runner of this process save in this way, by whichever name its config calls the hook."""
    mmengine_checkpoint.get_file_backend = _whole_files
    mmengine.hooks.CheckpointHook = CheckpointHook  # for configs that import it
    HOOKS.register_module(name="CheckpointHook", module=CheckpointHook, force=True)
    run_state.install()
