"""What layers with running statistics share: their update, the normalization by them, a guard against conversion."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normplug.layers._checks import check_channels, check_has_statistics
from normplug.ops._common import acc_dtype, check_act
from normplug.ops.batch_norm import batch_norm_act, batch_normalize, is_exact_in_aten, stock_batch_norm

__all__ = ["ConversionGuard", "LocalBatchNorm", "normalize_by_running", "update_running", "values_per_channel"]


def values_per_channel(x: Tensor) -> int:
    """Return the number of values per channel of x (N, C, *)."""
    return x.numel() // x.shape[1]


def update_running(layer: _BatchNorm, mean: Tensor, unbiased_var: Tensor) -> None:
    """Move the running statistics of a layer in training towards those of its batch, as nn.BatchNorm does."""
    if not layer.track_running_stats or layer.running_mean is None:
        return
    layer.num_batches_tracked.add_(1)
    wide = acc_dtype(layer.running_mean)
    if layer.momentum is not None:
        factor: float | Tensor = layer.momentum
    else:  # the mean over all batches; a tensor, so that no device has to wait for the host
        factor = 1 / layer.num_batches_tracked.to(wide)
    for running, new in ((layer.running_mean, mean), (layer.running_var, unbiased_var)):
        if running.dtype == wide:
            running.lerp_(new.to(wide), factor)
        else:  # a half type is rounded once, and not at every operation
            running.copy_(torch.lerp(running.to(wide), new.to(wide), factor))


def normalize_by_running(
    layer: _BatchNorm, x: Tensor, act: str | None = None, residual: Tensor | None = None, eps_outside: bool = False
) -> Tensor:
    """Return act(bn(x) + residual) by the running statistics; eps_outside: divide by √var + eps."""
    var, eps = layer.running_var, layer.eps
    if act is None and residual is None and x.numel() and is_exact_in_aten(x):
        if eps_outside:
            var, eps = (var.sqrt() + eps).square(), 0.0
        return stock_batch_norm(x, layer.running_mean, var, layer.weight, layer.bias, False, 0.0, eps)
    wide = acc_dtype(x)
    var = var.to(wide)
    rstd = 1 / (var.sqrt() + eps) if eps_outside else (var + eps).rsqrt()
    return batch_normalize(x, layer.running_mean.to(wide), rstd, layer.weight, layer.bias, act, residual)


class ConversionGuard(nn.Module):
    """Base of batch norms that a generic BatchNorm conversion would silently turn into something else.

    ``convert_sync_batchnorm`` of torch and mmengine (``sync_bn='torch'`` in a config) replaces every subclass of
    ``_BatchNorm`` by ``nn.SyncBatchNorm``. It copies an attribute ``qconfig`` if there is one, and nothing else asks
    a float model for that: there, and only there, it can be told no.
    """

    def lost_in_conversion(self) -> str:
        """Return what a stock layer would not do, or nothing if it would do the same."""
        raise NotImplementedError

    @property
    def qconfig(self) -> Any:
        if "_qconfig" in self.__dict__:
            return self.__dict__["_qconfig"]
        lost = self.lost_in_conversion()
        if lost:
            raise ValueError(
                f"{self} cannot be replaced by a stock batch norm, which would drop {lost}. "
                f"Name the layer you want in norm_cfg instead of converting the model, or convert only the parts "
                f"that have plain batch norms."
            )
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        self.__dict__["_qconfig"] = value


class LocalBatchNorm(ConversionGuard):
    """Batch norm by the statistics of this process, and what a batch norm with an activation has besides.

    A layer lists _BatchNorm among its own bases and not through this class: mmengine's initializers look at the names
    of the direct bases only.
    """

    _abbr_ = "bn"  # the attribute's name in a backbone (bn1): part of every published checkpoint
    family = "batch"
    op = "batch_norm"
    batch_statistics = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        act: str | None = None,
    ) -> None:
        check_act(act)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # not handed up: older torch does not know the argument
            self.register_parameter("bias", None)
        self.act = act

    def lost_in_conversion(self) -> str:
        return f"its activation {self.act!r}" if self.act else ""

    def forward(self, x: Tensor, residual: Tensor | None = None, act: str | None = None) -> Tensor:
        check_channels(self, x, self.num_features)
        act = act or self.act
        if not self.training and self.running_mean is not None:
            return normalize_by_running(self, x, act, residual)
        check_has_statistics(self, x, values_per_channel(x))
        if act is None and residual is None and x.numel() and is_exact_in_aten(x):
            return self._stock(x)
        y, mean, var = batch_norm_act(x, self.weight, self.bias, self.eps, act, residual)
        count = values_per_channel(x)
        if self.training and count:
            with torch.no_grad():
                update_running(self, mean, var * (count / (count - 1)))
        return y

    def _stock(self, x: Tensor) -> Tensor:
        """Run torch's own batch norm on batch statistics: its numbers to the last bit."""
        count = self.num_batches_tracked if self.training and self.track_running_stats else None
        factor = 0.0 if self.momentum is None else self.momentum
        if count is not None:
            count.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(count)
        mean, var = (self.running_mean, self.running_var) if count is not None else (None, None)
        return stock_batch_norm(x, mean, var, self.weight, self.bias, True, factor, self.eps)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", act={self.act!r}" if self.act else "")
