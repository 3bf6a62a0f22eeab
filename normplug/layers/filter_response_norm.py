"""Filter Response Normalization and its Thresholded Linear Unit, in one layer."""

import warnings

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from normplug.layers import _scripted as scripted
from normplug.layers._checks import check_channels, checked, has_single_values
from normplug.layers._contained_activation import ContainedActivation
from normplug.layers._symbolic import node_of
from normplug.ops._common import acc_dtype
from normplug.ops.filter_response_norm import filter_response_norm

__all__ = ["FilterResponseNorm"]


class FilterResponseNorm(ContainedActivation, nn.GroupNorm):
    """Each map over its root mean square, then a learned threshold. Contains its activation.

    y = max(weight * x / sqrt(mean(x²) + eps) + bias, tau), with the mean over one sample's positions of a channel.
    No mean is subtracted. No running statistics: train and eval modes agree. A subclass of nn.GroupNorm, for whose
    rules of weight decay and initialization it qualifies; GN checkpoints load, tau keeps its initial 0 then. With
    ``apply_act=False``, for norms before a residual sum, it normalizes without tau: y = weight * x̂ + bias.

    The paper trains with a warm-up of the learning rate and finds that needed. Its eps is 1e-6; mmcv sets 1e-5 where
    a config names none. On maps of a single value x̂ is nearly the sign of x, and passes almost no gradient unless eps
    is large or learned.

    Args:
        num_channels: Number of channels C.
        eps: Added to the mean square, inside the root.
        learnable_eps: Add abs(eps_l) as well, a parameter that starts at 1e-4: for maps of one or few positions.
        eps_per_channel: Give eps_l a value per channel instead of one.
        apply_act: Apply the threshold tau.

    Shape:
        - Input: (N, C, *), any number of spatial axes; N = 0 is fine.
        - Output: shape, dtype and memory format of the input.

    Raises:
        ValueError: If eps_per_channel is asked for without learnable_eps, or axis 1 of the input is not C long.

    Reference:
        S. Singh, S. Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of
        Deep Neural Networks", CVPR 2020, arXiv 1911.09737, eq. 1 to 4.
    """

    _abbr_ = "frn"
    _name_ = "FRN"
    _act_parameter = "tau"
    _act_initial = 0.0
    op = "filter_response_norm"
    family = "frn"
    contains_activation = True
    batch_statistics = False

    @checked
    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        learnable_eps: bool = False,
        eps_per_channel: bool = False,
        apply_act: bool = True,
        *,
        device=None,
        dtype=None,
    ) -> None:
        if eps_per_channel and not learnable_eps:
            raise ValueError(
                "FRN got eps_per_channel=True with learnable_eps=False, but only a learned eps can differ between "
                "channels. Set learnable_eps=True as well, or leave eps_per_channel out."
            )
        super().__init__(num_channels, num_channels, eps, device=device, dtype=dtype)
        shape = (num_channels if eps_per_channel else 1,)
        self.eps_l = nn.Parameter(torch.full(shape, 1e-4, device=device, dtype=dtype)) if learnable_eps else None
        self._set_up(apply_act, device, dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if getattr(self, "eps_l", None) is not None:
            nn.init.constant_(self.eps_l, 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return scripted.filter_response_norm(x, self.weight, self.bias, self.tau, self.eps, self.eps_l)
        else:
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if (node := node_of(self, x)) is not None:
            return node
        check_channels(self, x, self.num_channels, "num_channels")
        eps = self.eps
        if self.eps_l is not None:
            eps = _learned(eps, self.eps_l, x)
        elif eps < 1e-4 and has_single_values(x):
            warnings.warn(
                f"FRN got an input of shape {tuple(x.shape)}: over a single value it is nearly the sign of x, whose "
                f"gradient vanishes with eps={eps}. Use learnable_eps=True, an eps of 1e-2, or larger maps.",
                stacklevel=3,
            )
        return filter_response_norm(x, self.weight, self.bias, self.tau, eps)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        theirs = state_dict.pop(prefix + "eps", None)  # pytorch-frn keeps its eps there, learned or not
        if theirs is not None and self.eps_l is not None:
            state_dict.setdefault(prefix + "eps_l", theirs)
        elif theirs is not None and not torch.allclose(theirs.double(), theirs.new_tensor(self.eps).double(), 1e-3, 0):
            error_msgs.append(
                f"{prefix}eps of the checkpoint is {theirs.flatten()[0].item():g}, but this FRN was built with "
                f"eps={self.eps:g}. Build it with the checkpoint's, or with learnable_eps=True if it was learned."
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_channels}, eps={self.eps}, learnable_eps={self.eps_l is not None}, apply_act={self.apply_act}"
        )


def _learned(eps: float, learned: Tensor, x: Tensor) -> Tensor:
    """Return eps + abs(learned), wide enough for what is done to x."""
    if has_torch_function_unary(x):
        return handle_torch_function(_learned, (x,), eps, learned, x)
    return eps + learned.to(acc_dtype(x)).abs()
