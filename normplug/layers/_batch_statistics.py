"""What layers with running statistics share: their update, the normalization by them, a guard against conversion."""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from normplug.layers import _scripted as scripted
from normplug.layers._checks import check_channels, check_has_statistics, checked
from normplug.layers._quantization import let_fuse
from normplug.layers._symbolic import chosen, node_of
from normplug.ops._common import acc_dtype, add_and_activate, check_act, check_residual
from normplug.ops._registration import UNCAPTURABLE, in_torch, is_exporting, is_recorded
from normplug.ops.batch_norm import batch_norm_act, batch_normalize, is_exact_in_aten, stock_batch_norm

__all__ = [
    "ConversionGuard",
    "LocalBatchNorm",
    "normalize_by_running",
    "recomputing",
    "update_running",
    "values_per_channel",
]

Running = tuple[Tensor | None, ...]  # running mean, running variance, number of batches


def values_per_channel(x: Tensor) -> int:
    """Return the number of values per channel of x (N, C, *)."""
    return x.numel() // x.shape[1]


def recomputing() -> bool:
    """Tell whether this thread is running a backward pass: forward is only called there to recompute activations."""
    # A private name, in torch since 2.0. Without it a checkpointed call counts twice, as it does for BN.
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() >= 0


# Not by custom_op: what that adds to a call is several times what this one does. A CUDA graph would repeat what was so
# when it was captured; torch that has the tag leaves the op out of the graphs that it makes.
torch.library.define("normplug::recomputing", "(Tensor x) -> Tensor", tags=UNCAPTURABLE)


@torch.library.impl("normplug::recomputing", "CompositeExplicitAutograd")
def _recomputing(x: Tensor) -> Tensor:
    """Return ``recomputing()`` on the device of x: for a compiled graph, which asks whenever it runs."""
    return torch.full((), recomputing(), device=x.device)


@torch.library.register_fake("normplug::recomputing")
def _recomputing_fake(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.bool)


def _may_be_repeated() -> bool:
    """Tell whether this forward pass is, or a graph that is being made of it may be, one that has counted before."""
    if torch.compiler.is_compiling():
        return not is_exporting()  # what is exported is for others to run, who have no op of ours
    return recomputing()


def running_to_move(layer: nn.Module) -> Running:
    """Return mean, variance and count for a batch to move, and to be handed to ``keep_running`` then.

    They are the layer's own buffers. Where it is open whether the batch counts they are copies: activation
    checkpointing may be running a forward pass again that has counted, or ``skip_nonfinite`` wants to see the result.
    """
    own = _running(layer)
    if layer.skip_nonfinite or _may_be_repeated():
        return tuple(None if buffer is None else buffer.clone() for buffer in own)
    return own


def keep_running(layer: nn.Module, moved: Running) -> None:
    """Write what a batch made of copies into the layer, if the batch counts; all without asking the device."""
    repeated = _may_be_repeated()
    if (repeated and not torch.compiler.is_compiling()) or not (repeated or layer.skip_nonfinite):
        return
    pairs = [(own, new) for own, new in zip(_running(layer), moved, strict=True) if own is not None]
    passed_over = torch.ops.normplug.recomputing(pairs[0][0]) if repeated else False
    if layer.skip_nonfinite:
        # A channel that was spoilt before, by a checkpoint say, does not stop the others.
        spoilt = torch.stack([(own.isfinite() & ~new.isfinite()).any() for own, new in pairs]).any()
        passed_over = spoilt | passed_over
    for own, new in pairs:
        own.copy_(torch.where(passed_over, own, new))


def _running(layer: nn.Module) -> Running:
    if not getattr(layer, "track_running_stats", True):
        return None, None, None
    return tuple(layer._buffers.get(name) for name in ("running_mean", "running_var", "num_batches_tracked"))


def update_running(layer: nn.Module, mean: Tensor | None, var: Tensor) -> None:
    """Move the running statistics of a layer in training towards those of its batch, as nn.BatchNorm does.

    Args:
        layer: Its buffers are those of a batch norm, or some of them; without ``running_var`` nothing happens.
        mean: Mean of the batch (C,); None for a layer that keeps none.
        var: The variance that the layer averages (C,).
    """
    running_mean, running_var, count = moved = running_to_move(layer)
    if running_var is None:
        return
    if count is not None:
        count.add_(1)
    wide = acc_dtype(running_var)
    factor: float | Tensor = layer.momentum
    if factor is None:  # the mean over all batches; a tensor, so that no device has to wait for the host
        factor = 1 / count.to(wide)
    mean, var = (None if t is None else t.detach() for t in (mean, var))
    pairs = [(running, new) for running, new in ((running_mean, mean), (running_var, var)) if running is not None]
    together = _move_together(pairs, wide, factor)
    if together:
        torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), factor)
    for running, new in [] if together else pairs:
        if running.dtype == wide:
            running.lerp_(new.to(wide), factor)
        else:  # a half type is rounded once, and not at every operation
            running.copy_(torch.lerp(running.to(wide), new.to(wide), factor))
    keep_running(layer, moved)


def _move_together(pairs: list[tuple[Tensor, Tensor]], wide: torch.dtype, factor: float | Tensor) -> bool:
    """Tell whether one kernel can move all: on a GPU, where the start of another is what it costs."""
    return (
        len(pairs) > 1
        and not isinstance(factor, Tensor)
        and not torch.compiler.is_compiling()
        and not in_torch()
        and all(running.is_cuda and running.dtype == new.dtype == wide for running, new in pairs)
    )


def _is_stock(x: Tensor, act: str | None, residual: Tensor | None, eps: float) -> bool:
    """Tell whether torch's own batch norm can do it: since 2.10 it refuses an eps of 0, in some versions always."""
    return act is None and residual is None and (x.numel() > 0) is not False and eps * eps > 0 and is_exact_in_aten(x)


def normalize_by_running(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None = None,
    residual: Tensor | None = None,
    eps_outside: bool = False,
) -> Tensor:
    """Return act(bn(x) + residual) by running mean and variance; eps_outside: divide by √var + eps."""
    if has_torch_function_unary(x):
        args = x, mean, var, weight, bias, eps, act, residual, eps_outside
        return handle_torch_function(normalize_by_running, (x,), *args)
    wide = acc_dtype(x)
    if _is_stock(x, act, residual, eps) and (not eps_outside or var.dtype == wide):
        if eps_outside:  # (√var + eps)², in two parts: torch takes no eps of 0
            var, eps = torch.add(var, var.sqrt(), alpha=2 * eps), eps * eps
        return stock_batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    mean, var = mean.to(wide), var.to(wide)
    if is_recorded() and eps * eps > 0:  # what reads a graph, or counts its operations, knows torch's batch norm
        check_act(act)
        check_residual("batch_normalize", x, residual)
        if eps_outside:
            var, eps = var + 2 * eps * var.sqrt(), eps * eps
        weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
        z = F.batch_norm(x.to(wide), mean, var, weight, bias, False, 0.0, eps)
        return add_and_activate(z, act, residual, x.dtype)
    rstd = 1 / (var.sqrt() + eps) if eps_outside else (var + eps).rsqrt()
    return batch_normalize(x, mean, rstd, weight, bias, act, residual)


class ConversionGuard(nn.Module):
    """Base of batch norms that a generic BatchNorm conversion would silently turn into something else.

    ``convert_sync_batchnorm`` of torch and mmengine (``sync_bn='torch'`` in a config) replaces every subclass of
    ``_BatchNorm`` by ``nn.SyncBatchNorm``. It copies an attribute ``qconfig`` if there is one: there it can be told no.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        let_fuse(cls)

    def lost_in_conversion(self) -> str:
        """Return what a stock layer would not do, or nothing if it would do the same."""
        raise NotImplementedError

    def lost_in_fusion(self) -> str:
        """Return what a convolution that takes the layer over in evaluation would not do, or nothing."""
        act = getattr(self, "act", None)
        return f"its activation {act!r}" if act else ""

    def refusal(self) -> str:
        """Return what to say to somebody who converts the layer all the same."""
        return (
            f"{self} cannot be replaced by a stock batch norm, which would drop {self.lost_in_conversion()}. Name the "
            f"layer you want in norm_cfg instead of converting the model, or convert only the parts that have plain "
            f"batch norms."
        )

    __jit_unused_properties__ = ("qconfig",)

    @property
    def qconfig(self) -> Any:
        if "_qconfig" in self.__dict__:
            return self.__dict__["_qconfig"]
        lost = self.lost_in_conversion()
        # Tracing, copying and documentation tools look at every attribute, and are answered as by any other layer.
        if lost and sys._getframe(1).f_code.co_name == "convert_sync_batchnorm":
            raise ValueError(self.refusal())
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        self.__dict__["_qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        if self.__dict__.pop("_qconfig", self) is self:
            raise AttributeError("qconfig")


class LocalBatchNorm(ConversionGuard):
    """Batch norm by the statistics of this process, and what a batch norm with an activation has besides.

    A layer lists _BatchNorm among its own bases and not through this class: mmengine's initializers look at the names
    of the direct bases only.
    """

    _abbr_ = "bn"  # the attribute's name in a backbone (bn1): part of every published checkpoint
    family = "batch"
    op = "batch_norm"
    batch_statistics = True

    @checked
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
        skip_nonfinite: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # not handed up: older torch does not know the argument
            self.register_parameter("bias", None)
        self.act, self.skip_nonfinite = act, skip_nonfinite

    def lost_in_conversion(self) -> str:
        if self.act:
            return f"its activation {self.act!r}"
        return "its skip_nonfinite" if self.skip_nonfinite else ""

    def forward(self, x: Tensor, residual: Tensor | None = None, act: str | None = None) -> Tensor:
        if torch.jit.is_scripting():
            assert not (self.training and self.skip_nonfinite), "skip_nonfinite has no form in TorchScript: call eval()"
            own = self.weight, self.bias, self.momentum, self.eps, self.act
            running = self.running_mean, self.running_var, self.num_batches_tracked
            return scripted.batch_norm(x, *running, *own, self.training, act, residual)
        else:
            return self._forward(x, residual, act)

    def _forward(self, x: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
        if (node := node_of(self, x, residual, act)) is not None:
            return node
        check_channels(self, x, self.num_features)
        act = self.act if act is None else chosen(act, self.act)
        if not self.training and self.running_mean is not None:
            args = x, self.running_mean, self.running_var, self.weight, self.bias, self.eps
            return normalize_by_running(*args, act, residual)
        check_has_statistics(self, x, values_per_channel(x))
        # Momentum None makes torch read its count on the host, which waits for a device and breaks CUDA graphs.
        if _is_stock(x, act, residual, self.eps) and (x.is_cpu or self.momentum is not None or not self.training):
            return self._stock(x)
        y, mean, var = batch_norm_act(x, self.weight, self.bias, self.eps, act, residual, correction=1)
        if self.training and values_per_channel(x):
            update_running(self, mean, var)
        return y

    def _stock(self, x: Tensor) -> Tensor:
        """Run torch's own batch norm on batch statistics: its numbers to the last bit."""
        mean = var = count = None
        if self.training:
            mean, var, count = moved = running_to_move(self)
        factor = 0.0 if self.momentum is None else self.momentum
        if count is not None:
            count.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(count)
        y = stock_batch_norm(x, mean, var, self.weight, self.bias, True, factor, self.eps)
        if mean is not None:
            keep_running(self, moved)
        return y

    def extra_repr(self) -> str:
        changed = (f", act={self.act!r}" if self.act else "") + (", skip_nonfinite=True" if self.skip_nonfinite else "")
        return super().extra_repr() + changed
