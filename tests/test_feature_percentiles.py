"""Percentiles of the features before norms: right, cheap on large maps, the same with activation checkpointing."""

import json

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.checkpoint import checkpoint

import normplug  # noqa: F401
from normplug.openmmlab.feature_percentiles import FeaturePercentileHook, sample


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_sample_is_spread_evenly_and_draws_nothing(layout):
    x = torch.randn(8, 16, 50, 60).mul(torch.linspace(0.1, 4, 16).view(1, 16, 1, 1)).to(memory_format=layout)
    state = torch.get_rng_state()
    values = sample(x, 20000)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(values, sample(x, 20000))
    at = torch.tensor([0.01, 0.2, 0.8, 0.99])
    torch.testing.assert_close(values.quantile(at), x.flatten().quantile(at), rtol=0.05, atol=0.02)
    where = torch.arange(x.numel()).view(x.shape)
    places = sample(where, 20000)
    assert places.unique().numel() == 20000
    for axis, size in enumerate(x.shape):  # every sample, channel, row and column, about equally often
        seen = torch.unravel_index(places, x.shape)[axis].bincount(minlength=size)
        assert seen.min() > 0.8 * 20000 / size
        assert seen.max() < 1.2 * 20000 / size
    assert torch.equal(sample(x[:1, :2], 10**6), x[:1, :2].flatten())


@MODELS.register_module()
class Checkpointed(BaseModel):
    def __init__(self, with_cp=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.head, self.with_cp = nn.Linear(4, 1), with_cp

    def forward(self, *samples, mode):
        x = torch.stack(samples)
        x = checkpoint(self.body, x, use_reentrant=False) if self.with_cp else self.body(x)
        return {"loss": (self.head(x) - 1).square().mean()}


@DATASETS.register_module()
class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.tensor([float(i), i * i / 4])


def config(work_dir, iterations, with_cp=False, resume=False):
    """A config as a user writes it: plain data, hooks by name."""
    return Config(
        dict(
            default_scope="mmengine",
            custom_imports=dict(imports=["normplug"], allow_failed_imports=False),
            model=dict(type="Checkpointed", with_cp=with_cp),
            work_dir=str(work_dir),
            train_dataloader=dict(
                dataset=dict(type="Points"),
                batch_size=4,
                sampler=dict(type="InfiniteSampler"),
                collate_fn=dict(type="pseudo_collate"),
            ),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.05)),
            train_cfg=dict(by_epoch=False, max_iters=iterations),
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=5, by_epoch=False)),
            custom_hooks=[
                dict(type="FeaturePercentileHook", layers="body.1", interval=2),
                dict(type="PreciseBNHook", num_batches=2, before_train=True),
            ],
            randomness=dict(seed=1),
            resume=resume,
            experiment_name=f"{work_dir}-{iterations}",
            log_level="ERROR",
        )
    )


def train(*args, **kwargs):
    torch.manual_seed(0)
    runner = Runner.from_cfg(config(*args, **kwargs))
    runner.train()
    hook = next(hook for hook in runner.hooks if isinstance(hook, FeaturePercentileHook))
    return runner, hook


def test_a_run_from_a_config_with_the_hooks(tmp_path):
    runner, hook = train(tmp_path / "plain", 6)
    rows = hook.history["body.1"]
    assert [row[0] for row in rows] == [1, 2, 4, 6]
    assert all(row[1:] == sorted(row[1:]) for row in rows)
    png = tmp_path / "plain" / runner.timestamp / "feature_percentiles.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    scalars = [json.loads(line) for line in (png.parent / "vis_data" / "scalars.json").read_text().splitlines()]
    written = {s["step"]: s["features/body.1/p99"] for s in scalars if "features/body.1/p99" in s}
    assert written == {row[0]: pytest.approx(row[-1]) for row in rows}
    assert not runner.model.body[1]._forward_pre_hooks
    _, recomputed = train(tmp_path / "checkpointed", 6, with_cp=True)
    assert recomputed.history == hook.history


def test_a_resumed_run_goes_on_with_the_curves(tmp_path):
    _, whole = train(tmp_path / "whole", 8)
    train(tmp_path / "cut", 5)
    _, hook = train(tmp_path / "cut", 8, resume=True)
    assert [row[0] for row in hook.history["body.1"]] == [1, 2, 4, 6, 8]
    assert hook.history["body.1"][:3] == whole.history["body.1"][:3]


class OneIteration:
    """As much of a runner as the hook asks for."""

    def __init__(self, model):
        self.model, self.iter, self.scalars = model, 0, {}
        self.visualizer = self

    def add_scalars(self, scalars, step):
        self.scalars = scalars


def test_values_are_those_before_the_norm_over_all_calls():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))
    runner, hook = OneIteration(model), FeaturePercentileHook(["0", "2"], percentiles=(0, 50, 100))
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    xs = [torch.randn(5, 3), torch.randn(2, 3) * 3]
    for x in xs:
        model(x)
    hook.after_train_iter(runner, 0)
    values = torch.cat([x.flatten() for x in xs]).double()
    want = [values.min(), values.median(), values.max()]
    assert [runner.scalars[f"features/0/p{p}"] for p in (0, 100)] == [want[0], want[2]]
    assert runner.scalars["features/2/p0"] == 0  # behind a ReLU


def test_other_ranks_look_at_nothing(monkeypatch):
    monkeypatch.setattr("normplug.openmmlab.feature_percentiles.is_main_process", lambda: False)
    model = nn.Sequential(nn.BatchNorm1d(3))
    runner, hook = OneIteration(model), FeaturePercentileHook("0")
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    assert not model[0]._forward_pre_hooks
    hook.after_train_iter(runner, 0)
    hook.after_train(runner)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="from 1"):
        FeaturePercentileHook("a", interval=0)
    with pytest.raises(ValueError, match="0 to 100"):
        FeaturePercentileHook("a", percentiles=(1, 101))
    with pytest.raises(ValueError, match=r"bn9.*are called 0"):
        FeaturePercentileHook("bn9").before_train(OneIteration(nn.Sequential(nn.BatchNorm1d(3))))
