"""GroupNorm: nn.GroupNorm with a group size instead of a count, a fused activation, and half precision kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from normplug.layers import _scripted as scripted
from normplug.layers._checks import check_channels, checked
from normplug.layers._symbolic import chosen, node_of
from normplug.ops.group_norm import group_norm

__all__ = ["GroupNorm"]


class _Default(int):
    """An int that is told by identity: 32 because nobody chose differently, not 32 because somebody did."""


DEFAULT_GROUPS = _Default(32)


class GroupNorm(nn.GroupNorm):
    """Group normalization, optionally followed by an activation.

    y = act(weight * (x - mean) / sqrt(var + eps) + bias), mean and population variance over one sample's group
    of neighbouring channels and all its positions. No running statistics: train and eval modes agree. The
    state dict is that of ``nn.GroupNorm``; it does not hold the number of groups, so compare configs before
    loading a checkpoint. Differs from ``nn.GroupNorm`` in keeping the input's dtype under autocast, in exact
    channels-last statistics on CPU, and in returning ``bias`` for a group of a single value.

    Args:
        num_channels: Number of channels C.
        num_groups: Number of groups G; 32 if neither size is named. 'auto' is the largest divisor of C up to 32.
        channels_per_group: Size of a group, C / G, instead of num_groups.
        eps: Added to the variance, inside the root.
        affine: Learn weight and bias per channel.
        act: Activation applied in the same op: 'relu', 'leaky_relu', 'silu', 'gelu' or None.
        bias: With affine, learn the bias.

    A call may bring what else the op does in the same pass: ``residual``, added before the activation, and ``act``, in
    place of the layer's own.

    Shape:
        - Input: (N, C, *), any number of spatial axes; N = 0 is fine. A residual has the shape of the input.
        - Output: shape, dtype and memory format of the input.

    Raises:
        ValueError: If both sizes are given or both are None, the groups do not divide C, the activation is
            unknown, or axis 1 of the input is not C long.

    Reference:
        Y. Wu, K. He, "Group Normalization", ECCV 2018, arXiv 1803.08494, eq. 7.
    """

    _abbr_ = "gn"  # the attribute's name in a backbone (gn1): part of every published checkpoint
    _name_ = "GN"
    family = "group"
    op = "group_norm"
    batch_statistics = False

    @checked
    def __init__(
        self,
        num_channels: int,
        num_groups: int | str | None = DEFAULT_GROUPS,
        channels_per_group: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        act: str | None = None,
        *,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            choose_groups(type(self)._name_, num_channels, num_groups, channels_per_group),
            num_channels,
            eps,
            affine,
            device=device,
            dtype=dtype,
        )
        if not bias:  # not handed up: older torch does not know the argument
            self.register_parameter("bias", None)
        self.act = act

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:  # nn.GroupNorm of older torch takes it for granted
            nn.init.zeros_(self.bias)

    @property
    def num_features(self) -> int:
        """Number of channels, under the name that BatchNorm has for it: mmaction2's non-local blocks ask for that."""
        return self.num_channels

    def forward(self, x: Tensor, residual: Tensor | None = None, act: str | None = None) -> Tensor:
        if torch.jit.is_scripting():
            own = self.num_groups, self.weight, self.bias, self.eps, self.act
            return scripted.group_norm(x, *own, act, residual)
        else:
            return self._forward(x, residual, act)

    def _forward(self, x: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
        if (node := node_of(self, x, residual, act)) is not None:
            return node
        check_channels(self, x, self.num_channels, "num_channels")
        act = self.act if act is None else chosen(act, self.act)
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, act, residual)

    def extra_repr(self) -> str:
        size = self.num_channels // self.num_groups
        bias = ", bias=False" if self.affine and self.bias is None else ""
        act = f", act={self.act!r}" if self.act else ""
        return (
            f"{self.num_channels}, num_groups={self.num_groups}, channels_per_group={size}, eps={self.eps}, "
            f"affine={self.affine}{bias}{act}"
        )


class GroupsError(ValueError):
    """Groups that do not divide the channels."""


_recorded: ContextVar[list[int] | None] = ContextVar("normplug_recorded_groups", default=None)


@contextmanager
def record_groups() -> Iterator[list[int]]:
    """Let every GN be built, with one group, and collect their numbers of channels: what an error can advise then."""
    channels: list[int] = []
    token = _recorded.set(channels)
    try:
        yield channels
    finally:
        _recorded.reset(token)


def choose_groups(name: str, num_channels: int, num_groups: int | str | None, channels_per_group: int | None) -> int:
    """Return the number of groups that one of the two arguments asks for."""
    if (recorded := _recorded.get()) is not None:
        recorded.append(num_channels)
        return 1
    if channels_per_group is not None and num_groups is DEFAULT_GROUPS:
        num_groups = None
    if (num_groups is None) == (channels_per_group is None):
        raise ValueError(
            f"{name} takes exactly one of num_groups and channels_per_group, but got num_groups={num_groups} and "
            f"channels_per_group={channels_per_group}. Give one, for example num_groups=32."
        )
    if num_groups == "auto":
        return max(d for d in range(1, DEFAULT_GROUPS + 1) if num_channels % d == 0)
    by_size = num_groups is None
    request = channels_per_group if by_size else num_groups
    if isinstance(request, str):
        raise ValueError(
            f"{name} got num_groups={request!r}; expected a number or 'auto', the largest divisor up to 32."
        )
    if num_channels % request:
        divisors = [d for d in range(1, num_channels + 1) if num_channels % d == 0]
        default = " (the default)" if num_groups is DEFAULT_GROUPS else ""
        raise GroupsError(
            f"{name} with {num_channels} channels cannot have "
            f"{'channels_per_group' if by_size else 'num_groups'}={request}{default}: it must divide "
            f"{num_channels}. These do: {divisors}; num_groups='auto' takes the largest up to 32."
        )
    return num_channels // request if by_size else int(request)
