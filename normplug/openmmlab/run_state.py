"""What a run that goes on needs besides weights, optimizer and schedules, and mmengine does not save or do again.

- The validation after the saved epoch: a checkpoint is written before it, and what follows from its result (a learning
  rate on a plateau, an early stop, the best checkpoint) is not in the file.
- How long EarlyStoppingHook has waited.
- Gradients that are there between two steps: of an accumulation that has begun, or of several optimizers.
"""

from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import EarlyStoppingHook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import IterBasedTrainLoop
from torch import Tensor, nn

from normplug.openmmlab.file_kinds import CheckpointError
from normplug.openmmlab.weight_checks import source

__all__ = ["install", "keep_gradients", "return_gradients", "validate_if_due"]

GRADIENTS = "accumulated_gradients"
EARLY_STOPPING = "early_stopping"


def validate_if_due(runner: Any, saves_best: bool) -> None:
    """Validate where a resumed run stands, as it would have without the interruption, if something depends on that.

    Args:
        runner: Just before its first epoch or iteration.
        saves_best: Whether the best checkpoint depends on it.
    """
    loop = runner.train_loop
    done, last = (loop.iter, loop.max_iters) if isinstance(loop, IterBasedTrainLoop) else (loop.epoch, loop.max_epochs)
    if not (runner._resume and done and hasattr(loop, "_decide_current_val_interval")) or runner.val_loop is None:
        return
    loop._decide_current_val_interval()
    if done < loop.val_begin or (done % loop.val_interval and done != last):
        return
    schedulers = runner.param_schedulers or []
    lists = schedulers.values() if isinstance(schedulers, dict) else [schedulers]
    on_plateau = any(getattr(one, "need_val_args", False) for schedulers in lists for one in schedulers)
    if on_plateau or saves_best or any(isinstance(hook, EarlyStoppingHook) for hook in runner.hooks):
        runner.logger.info("Validating first: what follows from the result is not in the checkpoint")
        runner.val_loop.run()


def keep_gradients(runner: Any, checkpoint: dict) -> None:
    """Put gradients that the next step will find into a checkpoint. Only in one process: ranks differ.

    They are those of an accumulation that has begun; and where there are several optimizers, those that one loss left
    in the parameters of the others.
    """
    wrapper = runner.optim_wrapper
    goes_on = isinstance(wrapper, OptimWrapperDict) or (
        isinstance(wrapper, OptimWrapper) and wrapper.inner_count % wrapper._accumulative_counts != 0
    )
    named = _bare(runner.model).named_parameters() if goes_on and get_world_size() == 1 else ()
    gradients = {name: p.grad.detach().cpu() for name, p in named if p.grad is not None}
    if gradients:
        checkpoint[GRADIENTS] = gradients


def return_gradients(runner: Any, checkpoint: dict) -> None:
    """Give the parameters the gradients that `keep_gradients` saved.

    Raises:
        CheckpointError: If they are not those of the model.
    """
    stored = checkpoint.get(GRADIENTS) if runner._resume and get_world_size() == 1 else None
    if stored is None:
        return
    parameters = dict(_bare(runner.model).named_parameters())
    for name, gradient in stored.items() if isinstance(stored, dict) else [("", None)]:
        parameter = parameters.get(name)
        if parameter is None or not isinstance(gradient, Tensor) or gradient.shape != parameter.shape:
            raise CheckpointError(
                f"{source.get()} has {GRADIENTS!r} that are not those of this model ({name or 'no names'}). Go on with "
                "the config that the run began with, or take that entry out of the file."
            )
        parameter.grad = gradient.to(parameter)


def _bare(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _saves_patience(self: EarlyStoppingHook, runner: Any, checkpoint: dict) -> None:
    state = {"wait_count": self.wait_count, "best_score": self.best_score}
    checkpoint.setdefault(EARLY_STOPPING, {})[self.monitor] = state


def _resumes_patience(self: EarlyStoppingHook, runner: Any, checkpoint: dict) -> None:
    stored = checkpoint.get(EARLY_STOPPING)
    state = stored.get(self.monitor) if runner._resume and isinstance(stored, dict) else None
    if isinstance(state, dict):
        self.wait_count, self.best_score = int(state["wait_count"]), state["best_score"]


def install() -> None:
    """Have every EarlyStoppingHook say in checkpoints how long it has waited."""
    if "before_save_checkpoint" not in vars(EarlyStoppingHook):
        EarlyStoppingHook.before_save_checkpoint = _saves_patience
        EarlyStoppingHook.after_load_checkpoint = _resumes_patience
