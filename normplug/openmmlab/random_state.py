"""Resuming with the random numbers that an uninterrupted run would have drawn."""

import random

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor

from normplug.openmmlab.file_kinds import CheckpointError
from normplug.openmmlab.weight_checks import source

__all__ = ["RandomStateHook"]


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Save the state of every rank's random generators, and start each epoch from the state the last one ended in.

    mmengine saves none of it, so a resumed run samples other RoIs and dropout masks than one that went on. With this
    hook an epoch depends on the checkpoint before it and on nothing else: not on whether the run was interrupted, nor
    on an evaluation between. Random numbers drawn in data loader workers are not covered: mmengine seeds workers when
    they start, so they repeat after a resume.

    A checkpoint without these states, or with those of another number of ranks, resumes as mmengine does.
    """

    KEY = "random_states"
    priority = "NORMAL"  # before CheckpointHook, which saves what after_train_epoch remembers

    def __init__(self) -> None:
        self.states: list[dict] = []  # one per rank

    def after_train_epoch(self, runner) -> None:
        self.states = all_gather_object(_current_state())

    def before_train_epoch(self, runner) -> None:
        if len(self.states) == get_world_size():
            _restore(self.states[get_rank()])

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        if self.states:
            checkpoint[self.KEY] = self.states

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if runner._resume:
            self.states = checkpoint.get(self.KEY, [])
            if not isinstance(self.states, list) or not all(_is_state(state) for state in self.states):
                raise CheckpointError(
                    f"{source.get()} has {self.KEY!r} that are no states of random generators. Expected: what this "
                    "hook saved. Without that entry the run goes on with other random numbers."
                )


def _current_state() -> dict:
    """Return the states in types that load with ``weights_only=True``."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()  # of this rank's device
    return state


def _is_state(state) -> bool:
    return (
        isinstance(state, dict)
        and isinstance(state.get("torch"), Tensor)
        and state["torch"].dtype == torch.uint8
        and all(isinstance(state.get(name), list) for name in ("numpy", "python"))
    )


def _restore(state: dict) -> None:
    torch.set_rng_state(state["torch"].cpu())
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
