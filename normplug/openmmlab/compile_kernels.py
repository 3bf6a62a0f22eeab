"""Compiling the kernels of a model's norms ahead of the first iteration, as one line of a config."""

import logging

import torch
from mmengine.dist import barrier, get_local_rank
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.utils import ProgressBar

from normplug.ops._registration import has_triton
from normplug.warming import warm_up

__all__ = ["CompileKernelsHook"]


@HOOKS.register_module()
class CompileKernelsHook(Hook):
    """Compile all kernels that the norms may need for images of any size before training begins, in parallel.

    Without it each is compiled when the first batch comes that needs it, on every rank, a few tenths of a second each.
    With ``custom_hooks = [dict(type='CompileKernelsHook')]`` one rank of every machine does it ahead, on all its cores,
    while the others wait, and all find the results in Triton's cache. On a CPU nothing is done.

    Args:
        jobs: Processes to compile in; as many as there are cores unless given.
    """

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs

    def before_train(self, runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not (has_triton() and next(model.parameters()).is_cuda):
            return
        if get_local_rank() == 0:
            size = runner.train_dataloader.batch_size or 1
            bar: ProgressBar | None = None

            def progress(_done: int, total: int) -> None:
                nonlocal bar
                bar = bar or ProgressBar(total)
                bar.update()

            number = warm_up(model, size, dtype_of(runner.optim_wrapper), self.jobs, progress)
            print_log(f"{number} kernels of norms are compiled", logger="current", level=logging.INFO)
        barrier()


def dtype_of(optim_wrapper) -> torch.dtype:
    """Return the dtype that maps have in training: that of autocast where a wrapper uses it, else float32."""
    if not type(optim_wrapper).__name__.startswith("Amp"):
        return torch.float32
    return getattr(optim_wrapper, "cast_dtype", None) or torch.get_autocast_dtype("cuda")
