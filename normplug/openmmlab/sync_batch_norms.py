"""Every way to a synchronized batch norm leads to ours where processes talk over the CPU, and one always does.

``norm_cfg=dict(type='SyncBN')`` is ours everywhere. There are others: ``use_syncbn=True``, RTMDet's default;
``sync_bn`` in a config; ``convert_sync_batchnorm`` of torch and of mmengine; an ``nn.SyncBatchNorm`` that somebody has
built. They lead to torch's layer, which runs on accelerators only, and which DistributedDataParallel refuses without
one. mmcv's own, ``MMSyncBN``, needs its compiled ops and a process group already when it is built: that name stands for
ours.
"""

import functools
import inspect
from types import ModuleType
from typing import Any

import mmengine.model.utils as mmengine_utils
import torch.distributed as dist
from mmengine.device import get_device
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normplug.layers._batch_statistics import ConversionGuard, LocalBatchNorm
from normplug.layers.frozen_batch_norm import FrozenBatchNorm
from normplug.layers.sync_batch_norm import SyncBatchNorm, synchronized, world_size
from normplug.openmmlab.replacing import replace_everywhere

__all__ = ["MMSyncBatchNorm", "install", "take_over_mmcvs"]


class MMSyncBatchNorm(SyncBatchNorm):
    """SyncBatchNorm with the arguments of mmcv's own, ``MMSyncBN``.

    Ranks count by their elements, which is mmcv's ``stats_mode='N'``; with equal batches its 'default' is the same.
    Weights start at 1, as in torch, and not at random numbers between 0 and 1.

    Args:
        num_features, eps, momentum, affine, track_running_stats: As in SyncBatchNorm.
        group: Processes that join their batches; None for all.
        stats_mode: 'default' or 'N'.

    Raises:
        ValueError: If stats_mode is neither.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        group: dist.ProcessGroup | None = None,
        stats_mode: str = "default",
    ) -> None:
        if stats_mode not in ("default", "N"):
            raise ValueError(f"MMSyncBN knows stats_mode 'default' and 'N', but got {stats_mode!r}.")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, group)


def take_over_mmcvs(module: ModuleType) -> None:
    """Put ours in the place of what mmcv.ops.sync_bn has and has registered."""
    replace_everywhere(module.SyncBatchNorm, MMSyncBatchNorm)
    MODELS.register_module(name="MMSyncBN", module=MMSyncBatchNorm, force=True)


def _is_over_cpu() -> bool:
    return dist.is_available() and dist.is_initialized() and get_device() == "cpu"


def _converted(module: nn.Module, group: dist.ProcessGroup | None, cause: str) -> nn.Module:
    """Return module with our SyncBatchNorm for its batch norms; one that is frozen has nothing to synchronize."""
    for layer in module.modules():
        if isinstance(layer, ConversionGuard) and not isinstance(layer, LocalBatchNorm | FrozenBatchNorm):
            _refuse_loss(layer, cause)
    return SyncBatchNorm.convert_sync_batchnorm(module, group)


def _refuse_loss(layer: ConversionGuard, cause: str) -> None:
    if layer.lost_in_conversion():
        raise ValueError(f"{layer.refusal()}{cause}")


def _torchs_way(convert: Any) -> Any:
    @functools.wraps(convert)
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
        cause = ""
        if "use_syncbn" in inspect.signature(type(module).__init__).parameters:
            kind = type(module).__name__
            cause = (
                f" It is {kind} that converts its batch norms, by use_syncbn=True, its default. Write model=dict("
                f"use_syncbn=False) or --cfg-options model.use_syncbn=False."
            )
        if _is_over_cpu():
            return _converted(module, process_group, cause)
        for layer in module.modules() if cause else ():
            if isinstance(layer, ConversionGuard):
                _refuse_loss(layer, cause)
        return convert(module, process_group)

    return classmethod(convert_sync_batchnorm)


def _mmengines_way(convert: Any) -> Any:
    @functools.wraps(convert)
    def convert_sync_batchnorm(module: nn.Module, implementation: str = "torch") -> nn.Module:
        cause = f" It is sync_bn={implementation!r} in the config that converts the model: take it out."
        if _is_over_cpu() and implementation in ("torch", "mmcv"):
            return _converted(module, None, cause)
        for layer in module.modules():
            if isinstance(layer, ConversionGuard):
                _refuse_loss(layer, cause)
        return convert(module, implementation)

    return convert_sync_batchnorm


def _also_on_the_cpu(forward: Any) -> Any:
    @functools.wraps(forward)
    def forward_anywhere(self: nn.SyncBatchNorm, input: Tensor) -> Tensor:
        if input.device.type == "cpu" and self.training and world_size(self.process_group) > 1:
            return synchronized(self, input)
        return forward(self, input)

    return forward_anywhere


def _takes_those_on_the_cpu(handle: Any) -> Any:
    @functools.wraps(handle)
    def make_ours_on_the_cpu(self: DistributedDataParallel, module: nn.Module) -> None:
        if self.device_type != "cpu":
            handle(self, module)
            return
        for layer in module.modules():  # what derives from it and has a forward of its own calls that of its base
            if type(layer) is nn.SyncBatchNorm:
                layer.__class__ = SyncBatchNorm
                layer.act, layer.skip_nonfinite, layer._agreed = None, False, None

    return make_ours_on_the_cpu


def install() -> None:
    """Have conversions, torch's layer itself and DistributedDataParallel work on the CPU too."""
    torchs = nn.SyncBatchNorm
    if hasattr(torchs.forward, "__wrapped__"):
        return
    torchs.convert_sync_batchnorm = _torchs_way(torchs.convert_sync_batchnorm)
    stock = mmengine_utils.convert_sync_batchnorm
    replace_everywhere(stock, _mmengines_way(stock))
    torchs.skip_nonfinite = False  # what `synchronized` asks its layers
    torchs.forward = _also_on_the_cpu(torchs.forward)
    DistributedDataParallel._passing_sync_batchnorm_handle = _takes_those_on_the_cpu(
        DistributedDataParallel._passing_sync_batchnorm_handle
    )
