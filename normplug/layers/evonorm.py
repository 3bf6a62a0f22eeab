"""EvoNorm-S0 and EvoNorm-B0: normalization and activation in one layer, found by search."""

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from normplug.layers import _scripted as scripted
from normplug.layers._batch_statistics import update_running, values_per_channel
from normplug.layers._checks import check_channels, check_has_statistics, checked, has_single_values
from normplug.layers._contained_activation import ContainedActivation
from normplug.layers._symbolic import node_of
from normplug.ops._common import acc_dtype
from normplug.ops.batch_norm import batch_normalize, is_exact_in_aten, stock_batch_norm
from normplug.ops.evonorm_b0 import evonorm_b0
from normplug.ops.evonorm_s0 import evonorm_s0

__all__ = ["EvoNormB0", "EvoNormS0"]


class _EvoNorm(ContainedActivation):
    """What the EvoNorms share: without their activation they are weight * x + bias, no v and no statistics."""

    def _affine_only(self, x: Tensor) -> Tensor:
        return x if self.weight is None else affine(x, self.weight, self.bias)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return weight * x + bias, both per channel (C,), in the layout and dtype of x (N, C, *)."""
    if has_torch_function_unary(x):
        return handle_torch_function(affine, (x,), x, weight, bias)
    # BatchNorm's evaluation with mean 0 and variance + eps = 1: one pass. (0 for the variance and 1 for eps, because
    # not every version of torch takes an eps of 0.)
    weight, bias = weight.to(acc_dtype(x)), bias.to(acc_dtype(x))
    zeros = torch.zeros_like(weight)
    if not is_exact_in_aten(x):
        return batch_normalize(x, zeros, torch.ones_like(zeros), weight, bias)
    return stock_batch_norm(x, zeros, zeros, weight, bias, False, 0.0, eps=1.0)


class EvoNormS0(_EvoNorm, nn.GroupNorm):
    """EvoNorm-S0: sigmoid-gated input over the deviation of its group. Contains its activation.

    y = weight * x * sigmoid(v * x) / sqrt(var + eps) + bias, with the population variance of one sample's group of
    neighbouring channels and all its positions. No running statistics: train and eval modes agree. A subclass of
    nn.GroupNorm, for whose rules of weight decay and initialization it qualifies; GN checkpoints load, v keeps its
    initial value then. With ``apply_act=False``, for norms before a residual sum, it is weight * x + bias as in the
    authors' code.

    Args:
        num_channels: Number of channels C.
        num_groups: Number of groups, lowered until it divides C; 32 if neither size is given.
        channels_per_group: Size of a group instead of num_groups; must divide C.
        eps: Added to the variance, inside the root.
        affine: Learn weight and bias per channel.
        apply_act: Normalize and activate; otherwise scale and shift only.

    Shape:
        - Input: (N, C, *), any number of spatial axes; N = 0 is fine.
        - Output: shape, dtype and memory format of the input.

    Raises:
        ValueError: If both sizes are given, channels_per_group does not divide C, axis 1 of the input is not C long,
            or a group of one sample holds a single value.

    Reference:
        H. Liu, A. Brock, K. Simonyan, Q. Le, "Evolving Normalization-Activation Layers", NeurIPS 2020, arXiv
        2004.02967, table 2. eps and the rule for groups are those of the authors' TensorFlow code.
    """

    _abbr_ = "gn"  # the attribute's name in a backbone: weight and bias of GN checkpoints find their place
    _name_ = "EvoNormS0"
    op = "evonorm_s0"
    family = "evonorm"
    contains_activation = True
    batch_statistics = False

    @checked
    def __init__(
        self,
        num_channels: int,
        num_groups: int | None = None,
        channels_per_group: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        apply_act: bool = True,
        *,
        device=None,
        dtype=None,
    ) -> None:
        groups = _choose_groups(num_channels, num_groups, channels_per_group)
        super().__init__(groups, num_channels, eps, affine, device=device, dtype=dtype)
        self._set_up(apply_act, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            if self.v is None:
                return scripted.affine(x, self.weight, self.bias, x)
            else:
                return scripted.evonorm_s0(x, self.num_groups, self.weight, self.bias, self.v, self.eps)
        else:
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if (node := node_of(self, x)) is not None:
            return node
        check_channels(self, x, self.num_channels, "num_channels")
        if not self.apply_act:
            return self._affine_only(x)
        if self.num_groups == self.num_channels and has_single_values(x):
            raise ValueError(
                f"EvoNormS0 divides by the deviation of a group, but with num_channels={self.num_channels}, "
                f"num_groups={self.num_groups} and an input of shape {tuple(x.shape)} a group holds a single value. "
                f"Use fewer groups, for example channels_per_group=16, or larger maps."
            )
        return evonorm_s0(x, self.num_groups, self.weight, self.bias, self.v, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.num_channels}, num_groups={self.num_groups}, eps={self.eps}, affine={self.affine}, "
            f"apply_act={self.apply_act}"
        )


class EvoNormB0(_EvoNorm, nn.GroupNorm):
    """EvoNorm-B0: input over the larger of its batch's and its instance's measure. Contains its activation.

    y = weight * x / max(sqrt(batch_var + eps), v * x + sqrt(instance_var + eps)) + bias, with the population
    variances of a channel over batch and positions, and over one sample's positions. Training uses the variance of
    the batch and averages it into ``running_var``, which eval uses; the instance variance is always the input's. A
    subclass of nn.GroupNorm, for whose rules of weight decay and initialization it qualifies, and not of
    _BatchNorm, whose evaluation form and fusion into convolutions are not this layer's. BN checkpoints load; v
    keeps its initial value then. With ``apply_act=False``, for norms before a residual sum, it is weight * x + bias
    as in the authors' code. Statistics are those of one process.

    Args:
        num_channels: Number of channels C.
        eps: Added to both variances, inside the root.
        momentum: Share of the batch in the running variance: new = (1 - momentum) * old + momentum * batch.
        running_unbiased: Average the unbiased variance, as torch's BatchNorm does, not the population variance.
        affine: Learn weight and bias per channel.
        apply_act: Normalize and activate; otherwise scale and shift only.
        skip_nonfinite: Leave the running variance as it is where a batch would make a value of it NaN or infinite,
            which nothing could undo. The output is that of the batch all the same.

    Shape:
        - Input: (N, C, *), any number of spatial axes; N = 0 is fine and leaves running_var alone.
        - Output: shape, dtype and memory format of the input.

    Raises:
        ValueError: If momentum is None, axis 1 of the input is not C long, or a training batch has a single value
            per channel.

    Reference:
        H. Liu, A. Brock, K. Simonyan, Q. Le, "Evolving Normalization-Activation Layers", NeurIPS 2020, arXiv
        2004.02967, table 2. eps and the population variance in running_var are those of the authors' TensorFlow
        code.
    """

    _abbr_ = "bn"  # the attribute's name in a backbone: weight, bias and running_var of BN checkpoints find their place
    _name_ = "EvoNormB0"
    _aliases = (*_EvoNorm._aliases, ("moving_variance", "running_var"))
    _ignored = ("running_mean", "num_batches_tracked", "running_var")
    op = "evonorm_b0"
    family = "evonorm"
    contains_activation = True
    batch_statistics = True

    @checked
    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        running_unbiased: bool = False,
        affine: bool = True,
        apply_act: bool = True,
        skip_nonfinite: bool = False,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_channels, num_channels, eps, affine, device=device, dtype=dtype)
        self.momentum, self.running_unbiased, self.skip_nonfinite = momentum, running_unbiased, skip_nonfinite
        self.register_buffer("running_var", torch.ones(num_channels, device=device, dtype=dtype))
        self._set_up(apply_act, device, dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Set the running variance to that of a new layer, as a batch norm's method of this name does."""
        if getattr(self, "running_var", None) is not None:
            nn.init.ones_(self.running_var)

    def drop_activation(self) -> None:
        super().drop_activation()
        self.batch_statistics = False
        if "running_var" in self._buffers:
            del self.running_var

    drop_activation.__doc__ = _EvoNorm.drop_activation.__doc__

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            if self.v is None:
                return scripted.affine(x, self.weight, self.bias, x)
            else:
                assert not self.training, "EvoNormB0 is trained in Python alone: call eval() before TorchScript's layer"
                return scripted.evonorm_b0(x, self.weight, self.bias, self.v, self.running_var, self.eps)
        else:
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if (node := node_of(self, x)) is not None:
            return node
        check_channels(self, x, self.num_channels, "num_channels")
        if not self.apply_act:
            return self._affine_only(x)
        if not self.training:
            return evonorm_b0(x, self.weight, self.bias, self.v, self.running_var, self.eps)[0]
        count = values_per_channel(x)
        check_has_statistics(self, x, count)
        y, var = evonorm_b0(x, self.weight, self.bias, self.v, None, self.eps)
        if count > 0:
            if self.running_unbiased:
                var = var * (count / (count - 1))
            update_running(self, None, var)
        return y

    def _apply(self, fn, recurse: bool = True):
        before = self._buffers.get("running_var")
        super()._apply(fn, recurse)
        after = self._buffers.get("running_var")
        if after is not None and after.dtype in (torch.float16, torch.bfloat16) and before.dtype.itemsize >= 4:
            # A running average in half precision stops moving: the buffer keeps its dtype in a half model.
            self.running_var = after.to(before.dtype) if before.is_meta else before.to(after.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.num_channels}, eps={self.eps}, momentum={self.momentum}, "
            f"running_unbiased={self.running_unbiased}, affine={self.affine}, apply_act={self.apply_act}"
            + (", skip_nonfinite=True" if self.skip_nonfinite else "")
        )


def _choose_groups(num_channels: int, num_groups: int | None, channels_per_group: int | None) -> int:
    """Return the number of groups that one of the two arguments asks for, 32 if none does."""
    if num_groups is not None and channels_per_group is not None:
        raise ValueError(
            f"EvoNormS0 takes one of num_groups and channels_per_group, but got num_groups={num_groups} and "
            f"channels_per_group={channels_per_group}. Leave one out; without both, num_groups is 32."
        )
    if channels_per_group is not None:
        if num_channels % channels_per_group:
            divisors = [d for d in range(1, num_channels + 1) if num_channels % d == 0]
            raise ValueError(
                f"EvoNormS0 with {num_channels} channels cannot have channels_per_group={channels_per_group}: it "
                f"must divide {num_channels}. These do: {divisors}."
            )
        return num_channels // channels_per_group
    wish = 32 if num_groups is None else num_groups
    return next(g for g in range(min(wish, num_channels), 0, -1) if num_channels % g == 0)
