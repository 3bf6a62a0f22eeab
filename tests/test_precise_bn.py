"""Running statistics over the data: exact, for layers in training only, and nothing else moved."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn

import normplug
from normplug.openmmlab.precise_bn import PreciseBNHook, estimate_statistics
from normplug.openmmlab.random_state import _current_state, _restore


class Net(nn.Module):
    """Unlike layers in a row, each with its own kind of statistics; dropout, and one layer that is frozen."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3, momentum=0.3)
        self.sync = normplug.layers.SyncBatchNorm(3)
        self.frozen = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.cbn = MODELS.build(dict(type="CBN", num_features=4, buffer_num=2))
        self.evo = normplug.layers.EvoNormB0(4)
        self.drop = nn.Dropout(0.2)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x):
        return self.drop(self.evo(self.cbn(self.conv(self.frozen(self.sync(self.bn(x)))))))


def batches():
    return [torch.randn(n, 3, 6, w) * (1 + n) + 5 * n for n, w in ((2, 6), (1, 9), (4, 5))]


def inputs_of(model, name, data):
    """What a layer saw, over all batches: (C, values)."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        for x in data:
            model(x)
    handle.remove()
    return torch.cat([x.transpose(0, 1).flatten(1) for x in seen], 1)


def test_poisoned_statistics_are_healed():
    model, data = Net().train(), batches()
    model(data[0] / 0)
    model.frozen.reset_running_stats()
    assert not model.sync.running_var.isfinite().all()
    assert not model.eval()(data[0]).isfinite().all()
    assert estimate_statistics(model, data) == 4
    assert model.eval()(data[0]).isfinite().all()


def test_a_batch_that_is_not_finite_is_left_out_where_the_layer_says_so():
    data = batches()
    for skip, want in ((False, 0), (True, 1)):
        layer = normplug.layers.SyncBatchNorm(3, skip_nonfinite=skip)
        before = layer.running_var.clone()
        assert estimate_statistics(layer, [*data, data[0] / 0]) == want
        assert layer.running_var.equal(before) == (not skip)
    alone = normplug.layers.SyncBatchNorm(3)
    estimate_statistics(alone, data)
    torch.testing.assert_close(layer.state_dict(), alone.state_dict())


def test_statistics_are_those_of_all_values_together():
    model, data = Net().train(), batches()
    model.drop.p = 0.0
    twin = copy.deepcopy(model)
    assert estimate_statistics(model, data) == 4
    for name in ("bn", "sync", "cbn", "evo"):
        # What an earlier layer puts out in training does not depend on running statistics; CBN's window does on CBN's.
        x = inputs_of(copy.deepcopy(twin).train(), name, data)
        layer = model.get_submodule(name)
        torch.testing.assert_close(layer.running_var.double(), x.var(1, correction=0), rtol=1e-5, atol=1e-6)
        if name != "evo":
            torch.testing.assert_close(layer.running_mean.double(), x.mean(1), rtol=1e-5, atol=1e-5)


def test_one_batch_makes_evaluation_what_training_was():
    model, x = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 7 + torch.randn(4, 3, 8, 8)
    want = model.train()(x)
    estimate_statistics(model, [x])
    torch.testing.assert_close(model.eval()(x), want)


def test_nothing_else_changes():
    model = Net().eval()
    model.train()
    model(batches()[0]).sum().backward()  # CBN now has a history
    before, own = copy.deepcopy(model.state_dict()), {m: m.training for m in model.modules()}
    data, random_state = batches(), _current_state()
    drawn = torch.randn(20), torch.rand(3), np.random.rand(3), random.random()
    _restore(random_state)
    estimate_statistics(model, data)
    assert torch.equal(torch.randn(20), drawn[0])
    assert torch.equal(torch.rand(3), drawn[1])
    assert np.array_equal(np.random.rand(3), drawn[2])
    assert random.random() == drawn[3]
    after = model.state_dict()
    assert set(after) == set(before)
    assert any("history" in key for key in before)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {f"{n}.running_{s}" for n in ("bn", "sync", "cbn") for s in ("mean", "var")} | {"evo.running_var"}
    assert {m: m.training for m in model.modules()} == own
    assert model.bn.momentum == 0.3
    model.eval()
    estimate_statistics(model, batches())
    assert not any(m.training for m in model.modules())


def test_a_shared_layer_counts_every_call_and_an_empty_call_nothing():
    bn, xs = nn.BatchNorm1d(2), [torch.randn(3, 2, 5), torch.randn(1, 2, 9) + 4, torch.empty(0, 2, 4)]
    estimate_statistics(bn, [xs], run=lambda model, batch: [model(x) for x in batch if len(x)])
    joined = torch.cat([x.transpose(0, 1).flatten(1) for x in xs], 1)
    torch.testing.assert_close(bn.running_mean, joined.mean(1))
    torch.testing.assert_close(bn.running_var, joined.var(1, correction=0))


def test_infinite_values_and_no_batches():
    bn = nn.BatchNorm1d(2)
    assert estimate_statistics(bn, [torch.tensor([[1.0, 2.0], [float("inf"), 0.0]])]) == 0
    assert (bn.running_var == 1).all()
    with pytest.raises(ValueError, match="not one batch"):
        estimate_statistics(bn, [])
    assert estimate_statistics(nn.Linear(2, 2), []) == 0


def one_of_two(rank, path, out):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(3)
    data = batches()
    estimate_statistics(bn, [data[0], data[1]] if rank == 0 else [data[2]])
    torch.save(bn.state_dict(), f"{out}{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_with_unequal_data_agree_on_the_whole(tmp_path):
    mp.spawn(one_of_two, (tmp_path / "rendezvous", str(tmp_path / "rank")), nprocs=2)
    states = [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]
    torch.manual_seed(0)
    want = nn.BatchNorm2d(3)
    estimate_statistics(want, batches())
    for name, value in want.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], value)


# --- in a Runner


class Tiny(BaseModel):
    def __init__(self):
        super().__init__()
        self.bn, self.linear = nn.BatchNorm1d(2), nn.Linear(2, 1)
        self.seen = []

    def forward(self, *samples, mode):
        x = torch.stack([torch.as_tensor(s).float() for s in samples])
        if mode == "predict":
            self.seen.append(self.bn.running_mean.clone())
            return list(self.linear(self.bn(x)))
        return {"loss": (self.linear(self.bn(x)) - 1).square().mean() * (1 + torch.rand(()))}


DATA = [np.array([i, 10.0 * i]) for i in range(6)]
MEAN = torch.tensor([2.5, 25.0])
VAR = torch.tensor(np.var(DATA, axis=0)).float()


def run(work_dir, *hooks, by_epoch=True, model=None):
    torch.manual_seed(0)
    loader = {"dataset": DATA, "batch_size": 2, "collate_fn": {"type": "pseudo_collate"}}
    epochs = dict(by_epoch=True, max_epochs=2) if by_epoch else dict(by_epoch=False, max_iters=6, val_interval=3)
    sampler = {"type": "DefaultSampler" if by_epoch else "InfiniteSampler"}
    runner = Runner(
        model or Tiny(),
        work_dir=str(work_dir),
        train_dataloader=loader | {"sampler": sampler},
        val_dataloader=loader | {"sampler": {"type": "DefaultSampler", "shuffle": False}},
        val_cfg={},
        val_evaluator=[],
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01}},
        train_cfg=epochs,
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1, "by_epoch": by_epoch}},
        custom_hooks=list(hooks),
        randomness={"seed": 3},
        experiment_name=str(work_dir),  # two tests' runs of one name would share a visualizer
        log_level="ERROR",
    )
    runner.train()
    return runner


@pytest.mark.parametrize("by_epoch", [True, False])
def test_validation_and_checkpoints_have_them_and_training_is_the_same(tmp_path, by_epoch):
    plain = run(tmp_path / "plain", by_epoch=by_epoch).model
    runner = run(tmp_path / "precise", dict(type="PreciseBNHook", num_batches=None), by_epoch=by_epoch)
    for name, p in runner.model.named_parameters():
        assert torch.equal(p, plain.get_parameter(name)), name  # same batches, same random numbers
    assert runner.model.bn.num_batches_tracked == plain.bn.num_batches_tracked == 6
    assert len(runner.model.seen) == 6  # two validations of three batches
    assert all(torch.allclose(mean, MEAN) for mean in runner.model.seen)
    saved = torch.load(next(tmp_path.glob("precise/*_6.pth" if not by_epoch else "precise/epoch_1.pth")))["state_dict"]
    torch.testing.assert_close(saved["bn.running_mean"], MEAN)
    torch.testing.assert_close(saved["bn.running_var"], VAR)
    assert not torch.allclose(plain.bn.running_mean, MEAN)


def test_with_ema_the_averaged_model_is_the_one_measured(tmp_path):
    class Shifted(Tiny):  # its statistics follow a weight
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(2))
            self.shifts = []

        def forward(self, *samples, mode):
            if mode == "predict":
                self.shifts.append(self.shift.detach().clone())
            return super().forward(*(torch.as_tensor(s).float() + self.shift for s in samples), mode=mode)

    model = Shifted()
    hooks = [dict(type="EMAHook", momentum=0.5), dict(type="PreciseBNHook", num_batches=None)]
    runner = run(tmp_path / "ema", *hooks, model=model)
    assert not torch.equal(model.shifts[0], model.shifts[-1])
    for mean, shift in zip(runner.model.seen, runner.model.shifts, strict=True):
        torch.testing.assert_close(mean, MEAN + shift)


def test_warm_up_moves_averages_only(tmp_path):
    class Still(PreciseBNHook):
        def before_train(self, runner):
            weights = copy.deepcopy(dict(runner.model.named_parameters()))
            super().before_train(runner)
            bn = runner.model.bn
            assert bn.num_batches_tracked == 3  # all of the data, once
            want, batches = torch.zeros(2), [torch.tensor(np.stack(b)) for b in self._loader]
            for batch in batches:
                want = want.lerp(batch.float().mean(0), 0.1)
            torch.testing.assert_close(bn.running_mean, want)
            assert all(torch.equal(p, weights[name]) for name, p in runner.model.named_parameters())
            runner.model.linear.checked = True

    hook = Still(num_batches=1, before_val=False, before_train="statistics only")
    assert run(tmp_path / "warm", hook).model.linear.checked


def test_estimated_before_training(tmp_path):
    class Start(PreciseBNHook):
        def before_train(self, runner):
            super().before_train(runner)
            runner.model.start = runner.model.bn.running_mean.clone()

    runner = run(tmp_path / "start", Start(num_batches=None, before_val=False, before_train=True))
    torch.testing.assert_close(runner.model.start, MEAN)


@pytest.mark.parametrize("kwargs", [dict(num_batches=0), dict(before_train="statistics")])
def test_wrong_arguments(kwargs):
    with pytest.raises(ValueError, match="PreciseBNHook"):
        PreciseBNHook(**kwargs)


def test_mmdets_batch_sampler_and_another_loader():
    pytest.importorskip("mmdet.models")
    from mmdet.datasets import AspectRatioBatchSampler
    from mmengine.dataset import DefaultSampler

    from normplug.openmmlab.precise_bn import _in_own_order

    class Shapes(list):
        def get_data_info(self, i):
            return self[i]

    data = Shapes([dict(width=w, height=4) for w in (3, 5, 3, 5, 3, 5)])
    sampler = AspectRatioBatchSampler(DefaultSampler(data, seed=0), batch_size=3)
    loader = torch.utils.data.DataLoader(data, batch_sampler=sampler, collate_fn=list)
    own = _in_own_order(loader, seed=1)
    assert type(own.batch_sampler) is AspectRatioBatchSampler
    assert all(len({d["width"] for d in batch}) == 1 for batch in own)
    assert sum(map(len, own)) == 6
