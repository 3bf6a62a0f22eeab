"""Our layers found where others look for batch norms by class, and left alone where that would spoil them.

``isinstance(layer, nn.BatchNorm2d)`` holds for none of ours, and ``isinstance(layer, _BatchNorm)`` not for EvoNormB0.
So while such a function runs, a layer has two classes: its own, and that of the batch norm in whose place it stands.
Whatever the function does, for whatever reason and in whichever order, it does to ours too. What goes through a state
dict by position meets CBN's history there, which grows; it goes by the names of parameters and buffers instead.
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mmengine.model.averaged_model as averaged
import mmengine.utils.dl_utils as dl_utils
import torch
from mmengine.hooks import EMAHook
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.optim import swa_utils

from normplug.layers import CrossIterationBatchNorm
from normplug.layers._batch_statistics import ConversionGuard, values_per_channel
from normplug.openmmlab.classes import is_ours, stock_class
from normplug.openmmlab.replacing import replace_everywhere
from normplug.ops.batch_norm import batch_norm_stats

__all__ = [
    "as_batch_norms",
    "beyond_tensors",
    "count_flops",
    "find_in_conversion",
    "find_in_update",
    "install",
    "is_batch_norm",
    "keep_activation",
    "synchronize_by_name",
    "teach_by_name",
]

STOCK = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


# --- by class


def is_batch_norm(layer: nn.Module) -> bool:
    """Tell whether a layer of ours stands for a batch norm: it averages statistics of batches, or did before."""
    return is_ours(layer) and (isinstance(layer, _BatchNorm) or getattr(stock_class(layer), "batch_statistics", False))


@contextmanager
def as_batch_norms(model: nn.Module, which: Callable[[nn.Module], bool] = is_batch_norm) -> Iterator[list[nn.Module]]:
    """Have layers of ours be found as nn.BatchNorm1d, 2d or 3d for a while, by the layer that stands before each.

    Args:
        model: The layers are looked for in it.
        which: Tells whether a layer is to be found.

    Yields:
        The layers.
    """
    own: dict[nn.Module, type] = {}
    axes = 2
    try:
        for layer in model.modules():
            if isinstance(layer, _ConvNd):
                axes = len(layer.kernel_size)
            elif isinstance(layer, nn.Linear):
                axes = 1
            elif which(layer) and not isinstance(layer, tuple(STOCK.values())):
                own[layer] = type(layer)
                layer.__class__ = _found_as(type(layer), STOCK[axes])
        yield list(own)
    finally:
        for layer, cls in own.items():
            layer.__class__ = cls


@functools.cache
def _found_as(cls: type, stock: type) -> type:
    bases = (cls, stock) if issubclass(cls, _BatchNorm) else (_HasMean, cls, stock)
    return type(cls.__name__, bases, {"__doc__": cls.__doc__, "__module__": cls.__module__})


class _HasMean:
    """A running mean for those that read and write one in every batch norm, of a layer that keeps none."""

    @property
    def running_mean(self) -> Tensor:
        return torch.zeros_like(self.running_var)

    @running_mean.setter
    def running_mean(self, value: Tensor) -> None:
        pass


def _averages(layer: nn.Module) -> bool:
    return is_batch_norm(layer) and getattr(layer, "batch_statistics", False)


def _finding(update: Any) -> Any:
    """Have a function that sets the running statistics of its argument ``model`` find all of ours."""

    @functools.wraps(update)
    def update_all(*args: Any, **kwargs: Any) -> Any:
        model = inspect.signature(update).bind(*args, **kwargs).arguments["model"]
        with as_batch_norms(model, _averages) as layers, _means_over_batches(layers):
            return update(*args, **kwargs)

    return update_all


@contextmanager
def _means_over_batches(layers: list[nn.Module]) -> Iterator[None]:
    """Let a momentum of None mean for EvoNormB0 what it means for batch norms that count: the mean over all batches."""
    counts: dict[nn.Module, int] = {}

    def choose(layer: nn.Module, args: tuple) -> None:
        if layer.training and (layer.momentum is None or layer in counts):
            counts[layer] = counts.get(layer, 0) + _counts(layer, args[0])
            layer.momentum = 1 / max(counts[layer], 1)

    without = [layer for layer in layers if layer._buffers.get("num_batches_tracked") is None]
    hooks = [layer.register_forward_pre_hook(choose) for layer in without]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _counts(layer: nn.Module, x: Tensor) -> bool:
    """Tell whether a batch (N, C, *) will move the statistics of a layer."""
    finite = not layer.skip_nonfinite or all(statistic.isfinite().all() for statistic in batch_norm_stats(x))
    return finite and values_per_channel(x) > 0


def _finding_any(has_batch_norm: Any) -> Any:
    @functools.wraps(has_batch_norm)
    def has_any(model: nn.Module) -> bool:
        return has_batch_norm(model) or any(map(_averages, model.modules()))

    return has_any


def find_in_update(module: ModuleType) -> None:
    """Have ``update_bn_stats`` of mmpretrain, and of fvcore, find all of ours."""
    replace_everywhere(module.update_bn_stats, _finding(module.update_bn_stats))


def find_in_conversion(module: ModuleType) -> None:
    """Have mmdet's ``FrozenBatchNorm2d.convert_frozen_batchnorm`` take ours too, and refuse what it would drop."""
    convert = module.FrozenBatchNorm2d.convert_frozen_batchnorm.__func__

    @functools.wraps(convert)
    def convert_all(cls: type, module: nn.Module) -> nn.Module:
        for layer in module.modules():
            if isinstance(layer, ConversionGuard) and (lost := layer.lost_in_fusion()):
                raise ValueError(
                    f"{layer} cannot become a FrozenBatchNorm2d, which would drop {lost}. normplug's FrozenBatchNorm "
                    f"has an activation: name it in norm_cfg, dict(type='FrozenBatchNorm', act=...)."
                )
        with as_batch_norms(module, lambda layer: isinstance(layer, ConversionGuard) and is_batch_norm(layer)):
            return convert(cls, module)

    module.FrozenBatchNorm2d.convert_frozen_batchnorm = classmethod(convert_all)


# --- by class, and wrongly


def keep_activation(module: ModuleType) -> None:
    """Let ``efficient_conv_bn_eval`` of mmengine and mmcv pass over what it would drop: an activation, say."""
    efficient = module.efficient_conv_bn_eval_forward

    @functools.wraps(efficient)
    def forward(bn: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
        if isinstance(bn, ConversionGuard) and bn.lost_in_fusion():
            return bn(type(conv).forward(conv, x))
        return efficient(bn, conv, x)

    replace_everywhere(efficient, forward)


def count_flops(module: ModuleType) -> None:
    """Have mmcv's ``get_model_complexity_info`` count our layers as the stock ones that they derive from."""
    stock = module.get_modules_mapping

    @functools.wraps(stock)
    def mapping() -> dict:
        return _ByBase(stock())

    module.get_modules_mapping = mapping


class _ByBase(dict):
    """A mapping of classes in which those of ours, which it lacks, stand where their nearest base stands."""

    def __contains__(self, cls: object) -> bool:
        return super().__contains__(cls) or self._base(cls) is not None

    def __missing__(self, cls: type) -> Any:
        return self[self._base(cls)]

    def _base(self, cls: Any) -> type | None:
        if not any(base.__module__.startswith("normplug.layers.") for base in cls.__mro__):
            return None
        alike = nn.BatchNorm2d if issubclass(cls, _BatchNorm) else None
        return next((base for base in cls.__mro__ if super(_ByBase, self).__contains__(base)), alike)


# --- by position in a state dict


def _named(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that a module saves, by name: always the same ones."""
    saved = module.state_dict(keep_vars=True)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor for name, tensor in tensors if name in saved}


def beyond_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Return what a layer saves and holds in neither parameter nor buffer: CBN's history, which it never writes to."""
    known = {*layer._parameters, *layer._buffers}
    return {key: value for key, value in layer.state_dict().items() if key not in known}


def teach_by_name(module: ModuleType) -> None:
    """Have mmdet's MeanTeacherHook average buffers, where it does, by name: CBN's student has a history to itself."""
    stock = module.MeanTeacherHook.momentum_update

    @functools.wraps(stock)
    def momentum_update(self: Any, model: nn.Module, momentum: float) -> None:
        if self.skip_buffers:
            stock(self, model, momentum)
            return
        student = _named(model.student)
        for name, tensor in _named(model.teacher).items():
            if tensor.is_floating_point():
                tensor.data.mul_(1 - momentum).add_(student[name].data, alpha=momentum)

    module.MeanTeacherHook.momentum_update = momentum_update


def synchronize_by_name(module: ModuleType) -> None:
    """Have mmdet's SyncNormHook average all running statistics over ranks, and leave the histories of CBN to each."""
    stock = module.SyncNormHook.before_val_epoch

    def get_norm_states(model: nn.Module) -> OrderedDict:
        layers = {name: m for name, m in model.named_modules() if isinstance(m, _NormBase) or is_batch_norm(m)}
        return OrderedDict((f"{name}.{key}", t) for name, m in layers.items() for key, t in _named(m).items())

    @functools.wraps(stock)
    def before_val_epoch(self: Any, runner: Any) -> None:
        histories = {m: beyond_tensors(m) for m in runner.model.modules() if isinstance(m, CrossIterationBatchNorm)}
        stock(self, runner)
        for layer, history in histories.items():
            layer.load_state_dict(history, strict=False)

    module.get_norm_states = get_norm_states
    module.SyncNormHook.before_val_epoch = before_val_epoch


def _average_by_name(create: Any) -> Any:
    @functools.wraps(create)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        _forget(self)
        if self.update_buffers:
            self.avg_parameters = _named(self.module)

    return init


def _forget(model: nn.Module) -> None:
    """Drop the earlier batches in a copy that is not trained."""
    for layer in model.modules():
        if isinstance(layer, CrossIterationBatchNorm):
            layer.reset_history()


def _average_without_history(load: Any) -> Any:
    @functools.wraps(load)
    def after_load_checkpoint(self: EMAHook, runner: Any, checkpoint: dict) -> None:
        load(self, runner, checkpoint)
        _forget(self.ema_model)

    return after_load_checkpoint


# --- what is there from the beginning


def install() -> None:
    """Mend what torch and mmengine look for; the toolkits' modules are mended when they are imported."""
    if hasattr(averaged.BaseAveragedModel.__init__, "__wrapped__"):
        return
    replace_everywhere(swa_utils.update_bn, _finding(swa_utils.update_bn))
    replace_everywhere(dl_utils.has_batch_norm, _finding_any(dl_utils.has_batch_norm))
    averaged.BaseAveragedModel.__init__ = _average_by_name(averaged.BaseAveragedModel.__init__)
    EMAHook.after_load_checkpoint = _average_without_history(EMAHook.after_load_checkpoint)
