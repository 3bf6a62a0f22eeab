"""Running statistics that are those of the data, not an average over the last few batches."""

import copy
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from mmengine.dist import all_gather
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import BatchSampler, DataLoader

from normplug.layers._batch_statistics import values_per_channel
from normplug.openmmlab.finders import beyond_tensors
from normplug.openmmlab.random_state import _current_state, _restore
from normplug.ops.batch_norm import batch_norm_stats

__all__ = ["PreciseBNHook", "estimate_statistics"]

WARM_UP = "statistics only"


def estimate_statistics(model: nn.Module, batches: Iterable, run: Callable[[nn.Module, Any], Any] | None = None) -> int:
    """Set the running statistics of a model's batch norms to those of its layers' inputs over all the batches.

    Mean and population variance are those of all values together, merged by count in float64: batches and maps
    may differ in size, a layer may run several times, and with one batch eval mode gives what training gave. In a
    distributed run the values of all ranks count, and every rank gets the same result; each must bring equally many
    batches if layers synchronize.

    Layers are run in training mode. BatchNorm of every kind (SyncBN and CBN too: the statistics of the input, not of
    the window) and EvoNorm-B0's variance are set. Whatever is in eval mode once ``model.train()`` has run
    (``norm_eval``, ``frozen_stages``, frozen layers) is left alone. Afterwards modes, all other buffers, CBN's history
    and the random numbers are as before. What a model keeps in plain Python attributes is not restored.
    A batch that is not finite leaves a layer's statistics as they were; where the layer has ``skip_nonfinite`` only
    that batch is left out.

    Args:
        model: The model, no wrapper around it.
        batches: What ``run`` takes, one after the other.
        run: Called with model and batch; runs the forward pass. Default: ``model(batch)``.

    Returns:
        Number of layers that were set.

    Raises:
        ValueError: If there is no batch.
    """
    run = run or (lambda model, batch: model(batch))
    with torch.no_grad(), _undone(model):
        layers = _in_training(model)
        moments = {layer: _Moments(layer) for layer in layers}
        hooks = [layer.register_forward_pre_hook(moments[layer].see) for layer in layers]
        try:
            number = 0
            for batch in batches if layers else ():
                run(model, batch)
                number += 1
        finally:
            for hook in hooks:
                hook.remove()
        if layers and not number:
            raise ValueError(
                "Running statistics were to be estimated, but there was not one batch. Give a data loader that has "
                "some; a generator that has been used up has none."
            )
        _join(list(moments.values()))
    return sum(moment.write() for moment in moments.values())


class _Moments:
    """Count, mean and sum of squared deviations per channel of all that a layer has seen, in float64."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.count = layer, 0.0
        self.mean = torch.zeros_like(layer.running_var, dtype=torch.float64)
        self.m2 = torch.zeros_like(self.mean)

    def see(self, layer: nn.Module, args: tuple) -> None:
        x = args[0]
        if x.numel():
            with torch.autocast(x.device.type, enabled=False):
                mean, m2 = batch_norm_stats(x)
            if getattr(layer, "skip_nonfinite", False) and not (mean.isfinite().all() and m2.isfinite().all()):
                return
            self.add(values_per_channel(x), mean.double(), m2.double())

    def add(self, count: float, mean: Tensor, m2: Tensor) -> None:
        total = self.count + count
        if count:
            delta = mean - self.mean
            self.mean = self.mean + delta * (count / total)
            self.m2 = self.m2 + m2 + delta.square() * (self.count * count / total)
        self.count = total

    def write(self) -> bool:
        """Set the layer's statistics, unless there were no values or some that are no numbers."""
        if not self.count:
            return False
        unbiased = getattr(self.layer, "running_unbiased", False) and self.count > 1
        var = self.m2 / (self.count - 1 if unbiased else self.count)
        if not (self.mean.isfinite().all() and var.isfinite().all()):
            print_log(f"{self.layer} got values that are not finite: its statistics stay.", "current", level=30)
            return False
        self.layer.running_var.copy_(var)
        if getattr(self.layer, "running_mean", None) is not None:
            self.layer.running_mean.copy_(self.mean)
        return True


def _join(moments: list[_Moments]) -> None:
    """Merge the moments of all ranks: the same on each."""
    if not moments:
        return
    packed = torch.cat([torch.cat([m.mean.new_tensor([m.count]), m.mean, m.m2]) for m in moments])
    everywhere = all_gather(packed)
    if len(everywhere) == 1:
        return
    for moment in moments:
        moment.count, moment.mean, moment.m2 = 0.0, torch.zeros_like(moment.mean), torch.zeros_like(moment.m2)
    for rank in everywhere:
        for moment in moments:
            channels = len(moment.mean)
            count, mean, m2, rank = rank.split([1, channels, channels, len(rank) - 1 - 2 * channels])
            moment.add(count.item(), mean, m2)


def _in_training(model: nn.Module) -> list[nn.Module]:
    """The layers that average batch statistics and are in training mode."""
    return [
        layer
        for layer in model.modules()
        if layer.training
        and getattr(layer, "running_var", None) is not None
        and (isinstance(layer, _BatchNorm) or getattr(layer, "batch_statistics", False))
        and getattr(layer, "track_running_stats", True)
    ]


@contextmanager
def _random_numbers_undone():
    state = _current_state()
    try:
        yield
    finally:
        _restore(state)


@contextmanager
def _modes_undone(model: nn.Module):
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        yield
    finally:
        for module, mode in modes.items():
            if module.training != mode:
                # Layers do more than set the flag (CBN follows its convolution); containers would overrule theirs.
                module.train(mode) if next(module.children(), None) is None else setattr(module, "training", mode)


@contextmanager
def _undone(model: nn.Module):
    """Training mode for a while; then modes, buffers, the layers' extra state and random numbers as before."""
    with _random_numbers_undone(), _modes_undone(model):
        buffers = {buffer: buffer.clone() for buffer in model.buffers()}
        extra = {layer: beyond_tensors(layer) for layer in _in_training(model)}
        try:
            yield
        finally:
            for buffer, value in buffers.items():
                buffer.copy_(value)
            for layer, state in extra.items():
                if state:
                    layer.load_state_dict(state, strict=False)


@HOOKS.register_module()
class PreciseBNHook(Hook):
    """Re-estimates running statistics over the training data, before each validation and, if asked, before training.

    Running averages hold the last few batches, taken while the weights moved; with small batches that is noise
    which evaluation then normalizes by. This hook sets them to the statistics of the data under the present
    weights; see ``estimate_statistics`` for which layers, and what is left as it was. It acts at the end of the epoch
    or iteration after which validation comes, and at the end of training, before the checkpoint is written: that has
    the statistics that are evaluated then. With an EMAHook it acts when the averaged weights are in place, and the
    statistics are theirs; the epoch's checkpoint is written before that, the ``save_best`` one after.

    Batches are those of the training data loader, with its pipeline, batch size and collation, but in an order of
    the hook's own, the same each time; the training loop's sampler is not advanced.

    Switch on with ``custom_hooks = [dict(type="PreciseBNHook", num_batches=200)]``.

    Args:
        num_batches: Batches per rank; None for all the data.
        before_val: Estimate before each validation and at the end of training.
        before_train: False; True to estimate once before training; or 'statistics only', a warm-up for models
            that train on pairs or single samples and lean on their averages: all the data once, whatever num_batches,
            in training mode, every layer moving its averages by its own rule and momentum, no parameter touched.
            Skipped in a resumed run.
        dataloader: Config of another data loader to take batches from, for example one of larger batches.
        seed: Of the order of the batches.

    Raises:
        ValueError: If num_batches is below 1 or before_train is none of the three.
    """

    priority = "LOW"  # after EMAHook has swapped weights, before CheckpointHook saves them

    def __init__(
        self,
        num_batches: int | None = 200,
        before_val: bool = True,
        before_train: bool | str = False,
        dataloader: dict | None = None,
        seed: int = 0,
    ) -> None:
        if num_batches is not None and num_batches < 1:
            raise ValueError(f"PreciseBNHook needs num_batches of 1 or more, or None for all, but got {num_batches}.")
        if before_train not in (False, True, WARM_UP):
            raise ValueError(f"PreciseBNHook knows before_train False, True and {WARM_UP!r}, but got {before_train!r}.")
        self.num_batches, self.each_val, self.at_start = num_batches, before_val, before_train
        self.dataloader, self.seed = dataloader, seed
        self._loader: DataLoader | None = None
        self._training = self._fresh = False

    # --- when

    def before_train(self, runner) -> None:
        self._training = True
        if self.at_start and runner.iter == 0:
            self._warm_up(runner) if self.at_start == WARM_UP else self._estimate(runner)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._fresh = False

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop) and _validation_follows(loop, loop.iter + 1, loop.max_iters):
            self._before_validation(runner)

    def after_train_epoch(self, runner) -> None:
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop) and _validation_follows(loop, loop.epoch + 1, loop.max_epochs):
            self._before_validation(runner)

    def before_val_epoch(self, runner) -> None:  # in a loop of another kind, or with EMA
        if self._training and self.each_val and not self._fresh:
            self._estimate(runner)

    def after_train(self, runner) -> None:
        self._training = False

    def _before_validation(self, runner) -> None:
        averages = any(isinstance(hook, EMAHook) for hook in runner.hooks)
        if self.each_val and not (averages and runner.val_loop is not None):
            self._estimate(runner)

    # --- what

    def _estimate(self, runner) -> None:
        model = _unwrapped(runner.model)
        with _random_numbers_undone():  # a data loader draws from them before the first batch
            batches = self._batches(runner)
            count = min(len(batches), self.num_batches or len(batches))
            number = estimate_statistics(model, islice(batches, count), lambda _, batch: self.run(runner, batch))
        self._fresh = True
        print_log(f"PreciseBNHook: statistics of {number} layers, over {count} batches per rank", "current")

    def _warm_up(self, runner) -> None:
        model = _unwrapped(runner.model)
        with torch.no_grad(), _random_numbers_undone(), _modes_undone(model):
            batches = self._batches(runner)
            for batch in batches:
                self.run(runner, batch)
        print_log(f"PreciseBNHook: averages moved by {len(batches)} batches per rank", "current")

    def run(self, runner, batch) -> None:
        """Run the forward pass of a training step; override it for models whose ``train_step`` is their own."""
        model = _unwrapped(runner.model)
        with runner.optim_wrapper.optim_context(model):
            model._run_forward(model.data_preprocessor(batch, True), mode="loss")

    def _batches(self, runner) -> DataLoader:
        if self._loader is None:
            if self.dataloader is not None:
                self._loader = Runner.build_dataloader(copy.deepcopy(self.dataloader), seed=self.seed)
            else:
                self._loader = _in_own_order(runner.train_dataloader, self.seed)
        return self._loader


def _validation_follows(loop, done: int, last: int) -> bool:
    if loop.runner.val_loop is None or done == last:
        return done == last
    return done >= loop.val_begin and done % loop.val_interval == 0


def _in_own_order(loader: DataLoader, seed: int) -> DataLoader:
    """Return a loader over the same data: the training loop's sampler and workers must not move."""
    from mmengine.dataset import DefaultSampler

    sampler = DefaultSampler(loader.dataset, shuffle=True, seed=seed)  # equally long on every rank
    theirs = loader.batch_sampler
    batch_size, drop_last = theirs.batch_size, getattr(theirs, "drop_last", False)
    try:
        batch_sampler = type(theirs)(sampler, batch_size, drop_last)
    except TypeError:  # a sampler with arguments of its own
        batch_sampler = BatchSampler(sampler, batch_size, drop_last)
    return DataLoader(
        loader.dataset,
        batch_sampler=batch_sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model
