"""Training with parameters, gradients and optimizer state sharded over the processes: mmengine's FSDPStrategy."""

from typing import Any

import torch
from mmengine._strategy import FSDPStrategy as StockFSDPStrategy
from mmengine.device import get_device
from mmengine.optim import BaseOptimWrapper
from mmengine.registry import STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import clip_grad_norm_

__all__ = ["FSDPStrategy"]


@STRATEGIES.register_module(force=True)  # takes over mmengine's name
class FSDPStrategy(StockFSDPStrategy):
    """mmengine's strategy for torch's FullyShardedDataParallel, with four repairs.

    * Gradients are clipped by their norm over all shards. mmengine's are clipped on every process by the norm of the
      shard that it has, which scales the parts of a weight differently.
    * Training can be resumed: the state of the optimizer is loaded as torch 2.1 and newer expect it.
    * Checkpoints are those of an unsharded model unless told otherwise. A file per shard, mmengine's default, holds
      pickled classes, and those are not loaded.
    * Where there is no accelerator it runs on the CPU, over gloo.

    Takes effect with ``runner_type='FlexibleRunner'``; our tools set that in a config that has a strategy.

    Args:
        state_dict_cfg: 'full', or a dict as mmengine has it.
        **kwargs: Those of mmengine's class, above all ``model_wrapper``, with its ``auto_wrap_policy``.

    Raises:
        ValueError: If state_dict_cfg is 'local'.

    Reference:
        Y. Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", arXiv 2304.11277.
    """

    def __init__(self, *, state_dict_cfg: str | dict = "full", **kwargs: Any) -> None:
        if state_dict_cfg == "local":
            raise ValueError(
                "FSDPStrategy was given state_dict_cfg='local'. Its checkpoints hold classes of torch, and only "
                "tensors and plain values are loaded: training could not be resumed. Leave it out, or set it to 'full'."
            )
        super().__init__(state_dict_cfg=state_dict_cfg, **kwargs)

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if get_device() == "cpu":  # mmengine names the GPU of LOCAL_RANK
            self.model_wrapper = dict(
                type="MMFullyShardedDataParallel", device_id=torch.device("cpu"), **(self.model_wrapper or {})
            )
        return super()._wrap_model(model)

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> BaseOptimWrapper:
        """Build the optimizer wrapper, as mmengine does, and have it clip by the norm over all shards."""
        built = super().build_optim_wrapper(optim_wrapper, model)
        if isinstance(model, FullyShardedDataParallel) and getattr(built, "clip_func", None) is clip_grad_norm_:
            built.clip_func = lambda _, **kwargs: model.clip_grad_norm_(**kwargs)
        return built

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the state of an optimizer, sharded or not."""
        # By name: torch 2.1 changed the order of these arguments.
        sharded = FullyShardedDataParallel.optim_state_dict_to_load(
            optim_state_dict=state_dict, model=self.model, optim=self.optim_wrapper.optimizer
        )
        self.optim_wrapper.load_state_dict(sharded)
