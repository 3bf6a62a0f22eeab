"""SyncBatchNorm: batch normalization over the batches of all processes, on any backend."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from normplug.layers import _scripted as scripted
from normplug.layers._batch_statistics import LocalBatchNorm, update_running, values_per_channel
from normplug.layers._checks import check_channels, check_has_statistics
from normplug.layers._symbolic import node_of
from normplug.ops._common import dense, for_backward
from normplug.ops.batch_norm import batch_norm_dx, batch_norm_reduce, batch_norm_stats, batch_normalize

__all__ = ["SyncBatchNorm"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class SyncBatchNorm(LocalBatchNorm, _BatchNorm):
    """Batch normalization with statistics over all processes of a group, optionally followed by an activation.

    y = act(weight * (x - mean) / sqrt(var + eps) + bias): output, gradients and running statistics are those of
    one batch norm over the joined batch, however it is split: ranks count by their elements, so batches and maps
    may differ in size, and a rank without any element takes part with nothing. There is one message each way,
    in float32 (float64 for a float64 input). In evaluation, in a process of its own and outside of a process group
    it is plain batch normalization.

    Arguments and state dict are those of ``nn.SyncBatchNorm``. It is no subclass of that: DistributedDataParallel
    refuses every ``nn.SyncBatchNorm`` on CPU, where this layer runs (gloo), and mmengine turns them into another
    class in a single process, where this layer is BN already. It further differs in exchanging sums of squares
    instead of 1/std, and in not waiting for the device. ``SyncBatchNorm.convert_sync_batchnorm(model)`` makes it out
    of the batch norms of a model.

    As with every synchronized batch norm all ranks must reach the layer equally often, forward and backward.
    ``weight`` and ``bias`` get this rank's share of the gradient: DistributedDataParallel joins them.

    Args:
        num_features: Number of channels C.
        eps: Added to the population variance, inside the root.
        momentum: Weight of this batch in the running statistics; None for the mean over all batches.
        affine: Learn weight and bias per channel.
        track_running_stats: Keep running statistics (the unbiased variance) for evaluation.
        process_group: Processes that join their batches; None for all.
        bias: With affine, learn the bias.
        act: Activation applied in the same op: 'relu', 'leaky_relu', 'silu', 'gelu' or None. It is lost if the
            layer is folded into a convolution (mmcv's ``fuse_conv_bn``): leave it None where that is wanted.
        skip_nonfinite: Leave the running statistics as they are where a batch would make one of them NaN or infinite,
            which nothing could undo; all ranks decide alike. The output is that of the batch all the same.

    Shape:
        - Input: (N, C, *), any number of spatial axes; N = 0 is fine.
        - Output: shape, dtype and memory format of the input.

    Raises:
        ValueError: If the activation is unknown, axis 1 of the input is not C long, all ranks together have a
            single value per channel in training, or, on every rank, if they differ in C or in the input's dtype.

    Reference:
        C. Peng et al., "MegDet: A Large Mini-Batch Object Detector", CVPR 2018, arXiv 1711.07240. The exchange of
        mean and centred sum of squares follows T. Chan et al., "Algorithms for computing the sample variance",
        The American Statistician 1983.
    """

    _name_ = "SyncBN"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        act: str | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            act=act,
            skip_nonfinite=skip_nonfinite,
        )
        self.process_group = process_group
        self._agreed: torch.dtype | None = None  # of the input, when the ranks last compared what they have

    def forward(self, x: Tensor, residual: Tensor | None = None, act: str | None = None) -> Tensor:
        if torch.jit.is_scripting():
            assert not self.training, (
                "SyncBN is trained in Python alone: call eval() before what TorchScript made of it"
            )
            own = self.weight, self.bias, self.momentum, self.eps, self.act
            return scripted.batch_norm(x, self.running_mean, self.running_var, None, *own, False, act, residual)
        else:
            return self._forward(x, residual, act)

    def _forward(self, x: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
        if (node := node_of(self, x, residual, act)) is not None:
            return node
        if self.training and world_size(self.process_group) > 1:
            return synchronized(self, x, residual, act or self.act)
        return super()._forward(x, residual, act)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
        """Replace every plain batch norm in module by this layer, with the same parameters, buffers and activation.

        Subclasses with a forward of their own (CBN and other layers) stay: they are no plain batch norms.
        """
        plain = (_BatchNorm.forward, nn.SyncBatchNorm.forward, LocalBatchNorm.forward)
        if isinstance(module, _BatchNorm) and type(module).forward in plain:
            new = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
                process_group,
                act=getattr(module, "act", None),
                skip_nonfinite=getattr(module, "skip_nonfinite", False),
            )
            for name in ("weight", "bias"):
                new.register_parameter(name, getattr(module, name))
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                new.register_buffer(name, getattr(module, name))
            return new.train(module.training)
        for name, child in module.named_children():
            converted = cls.convert_sync_batchnorm(child, process_group)
            if converted is not child:
                module.add_module(name, converted)
        return module


def world_size(group: dist.ProcessGroup | None) -> int:
    """Return how many processes join their batches: 1 outside of a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def synchronized(layer: nn.Module, x: Tensor, residual: Tensor | None = None, act: str | None = None) -> Tensor:
    """Normalize a batch (N, C, *) by the statistics of all ranks, and move the running ones of the layer.

    Args:
        layer: In training; with the parameters, buffers and settings of a SyncBatchNorm, ours or torch's.
        x: This rank's part of the batch.
        residual: Added before the activation.
        act: As in the layer.
    """
    _check_with_others(layer, x)
    x = dense(x)
    own, group = values_per_channel(x), layer.process_group
    with torch.no_grad():
        mean, m2, count = _join(*batch_norm_stats(x), own, group)
        # Two values here are two in all. With fewer the sum must be looked at, which waits for the device.
        everywhere = own if own > 1 else int(count)
        check_has_statistics(layer, x, everywhere)
        if everywhere:
            update_running(layer, mean, m2 / (count - 1))
        share = 1 / count.clamp(min=1)
        rstd = (m2 * share + layer.eps).rsqrt()
    if residual is not None:
        residual = residual.to(x.dtype)
    return _SynchronizedNormalize.apply(x, mean, rstd, share, layer.weight, layer.bias, act, residual, group)


def _check_with_others(layer: nn.Module, x: Tensor) -> None:
    """Refuse an input that is none, on every rank if it is the first."""
    compares = not torch.compiler.is_compiling()
    agreed, channels = getattr(layer, "_agreed", None), layer.num_features
    try:
        check_channels(layer, x, channels)
    except (TypeError, ValueError):
        if compares and agreed is None and isinstance(x, Tensor):
            _compare_ranks(layer.process_group, x, 0, 0)
        raise
    if compares and x.dtype != agreed:
        _compare_ranks(layer.process_group, x, channels, _DTYPES.index(x.dtype))
        layer._agreed = x.dtype


def _compare_ranks(group: dist.ProcessGroup | None, x: Tensor, channels: int, dtype: int) -> None:
    """Raise on every rank if they differ in what makes a message: unequal ones wait for each other or add up."""
    own = torch.tensor([channels, dtype], device=x.device)
    gathered = own.new_empty(dist.get_world_size(group) * len(own))
    dist.all_gather_into_tensor(gathered, own, group=group)
    ranks = gathered.view(-1, len(own)).tolist()
    if any(rank != ranks[0] for rank in ranks):
        told = ", ".join(
            f"rank {i}: {c} channels of {_DTYPES[d]}" if c else f"rank {i}: an input that it refuses"
            for i, (c, d) in enumerate(ranks)
        )
        raise ValueError(
            f"SyncBatchNorm joins the batches of all ranks, which must have the same channels and dtype, but got "
            f"{told}. Build the same model on every rank, and use mixed precision on all of them or on none."
        )


def _join(mean: Tensor, m2: Tensor, count: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Merge mean and centred sum of squares (C,) of all ranks, and add up their counts: equal on every rank."""
    packed = torch.cat([mean, m2, mean.new_full((1,), count)])
    gathered = packed.new_empty(dist.get_world_size(group) * len(packed))
    dist.all_gather_into_tensor(gathered, packed, group=group)
    parts = gathered.view(-1, len(packed)).double()  # a few kilobytes: the merge itself shall lose no digit
    counts = parts[:, -1:]
    means, m2s = parts[:, :-1].chunk(2, dim=1)
    total = counts.sum()
    joined = (counts * means).sum(0) / total.clamp(min=1)
    m2 = (m2s + counts * (means - joined).square()).sum(0)
    return joined.to(mean.dtype), m2.to(mean.dtype), total.to(mean.dtype)


class _SynchronizedNormalize(torch.autograd.Function):
    """batch_normalize by statistics that follow the inputs of all ranks: backward joins its sums over the ranks."""

    @staticmethod
    def forward(ctx, x, mean, rstd, share, weight, bias, act, residual, group):
        y = batch_normalize(x, mean, rstd, weight, bias, act, residual)
        ctx.group = group
        ctx.act, kept = for_backward(act, residual, y)
        ctx.save_for_backward(x, mean, rstd, share, weight, bias, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, mean, rstd, share, weight, bias, residual = ctx.saved_tensors
        args = dy, x, mean, rstd, weight, bias, ctx.act, residual
        needs_x, _, _, _, needs_weight, needs_bias, _, needs_residual, _ = ctx.needs_input_grad
        sums = torch.stack(batch_norm_reduce(*args))
        own_bias, own_weight = sums.clone() if needs_weight or needs_bias else (None, None)
        # Whatever this rank needs: an empty rank whose input has no gradient must not leave the others waiting.
        dist.all_reduce(sums, group=ctx.group)
        dx = dresidual = None
        if needs_x or (needs_residual and residual is not None):
            dx, dresidual = batch_norm_dx(*args, sums[0] * share, sums[1] * share)
        if residual is None:  # then a residual, if there was one, was the last thing added
            dresidual = dy
        return (
            dx if needs_x else None,
            None,
            None,
            None,
            own_weight.to(weight.dtype) if needs_weight else None,
            own_bias.to(bias.dtype) if needs_bias else None,
            None,
            dresidual if needs_residual else None,
            None,
        )
