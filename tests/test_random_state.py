"""A resumed run draws the random numbers that an uninterrupted one draws."""

import random

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

import normplug  # noqa: F401
from normplug.openmmlab.random_state import RandomStateHook


class Noisy(BaseModel):
    """A model whose loss depends on all three generators."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, *samples, mode):
        noise = torch.rand(()) + np.random.rand() + random.random()
        x = torch.tensor(samples)
        return {"loss": (self.layer(torch.stack([x.float(), x.float() * noise], 1)) - 1).square().mean()}


def train(work_dir, epochs, resume=False):
    torch.manual_seed(0)  # the model's initial weights, drawn before the runner seeds
    runner = Runner(
        Noisy(),
        work_dir=str(work_dir),
        train_dataloader={
            "dataset": list(range(6)),
            "batch_size": 2,
            "sampler": {"type": "DefaultSampler"},
            "collate_fn": {"type": "pseudo_collate"},
        },
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        custom_hooks=[{"type": "RandomStateHook"}],
        randomness={"seed": 3},
        resume=resume,
        experiment_name=f"{work_dir}-{epochs}-{resume}",
        log_level="ERROR",
    )
    runner.train()
    return runner.model.state_dict()


@pytest.mark.slow
def test_resumed_equals_uninterrupted(tmp_path):
    want = train(tmp_path / "whole", 4)
    train(tmp_path / "cut", 2)
    got = train(tmp_path / "cut", 4, resume=True)
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_the_state_survives_a_safe_load(tmp_path):
    class Runner:
        _resume = True

    hook, runner = RandomStateHook(), Runner()
    hook.after_train_epoch(runner)
    checkpoint = {}
    hook.before_save_checkpoint(runner, checkpoint)
    drawn = [torch.rand(3), np.random.rand(3), random.random()]
    torch.save(checkpoint, tmp_path / "c.pth")
    other = RandomStateHook()
    other.after_load_checkpoint(runner, torch.load(tmp_path / "c.pth", weights_only=True))
    other.before_train_epoch(runner)
    assert torch.equal(torch.rand(3), drawn[0])
    assert np.array_equal(np.random.rand(3), drawn[1])
    assert random.random() == drawn[2]


def test_states_of_another_number_of_ranks_are_left_alone():
    hook = RandomStateHook()
    hook.states = [{}, {}]
    hook.before_train_epoch(None)  # would fail on the empty states
