"""FrozenBatchNorm: batch normalization whose statistics and parameters are constants."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normplug.layers import _scripted as scripted
from normplug.layers._batch_statistics import ConversionGuard, normalize_by_running
from normplug.layers._checks import check_channels, checked
from normplug.layers._symbolic import chosen, node_of

__all__ = ["FrozenBatchNorm"]


class FrozenBatchNorm(ConversionGuard, _BatchNorm):
    """Batch normalization by fixed statistics, weight and bias, optionally followed by an activation.

    y = act(weight * (x - running_mean) / sqrt(running_var + eps) + bias), in training too: nothing in it is ever
    trained, moved or decayed, and ``train()`` leaves it in eval mode. The state dict is that of ``nn.BatchNorm2d``,
    so checkpoints of BN, SyncBN and CBN load; a new layer, before that, is the identity but for eps.

    Weight and bias are buffers: optimizers, ``requires_grad`` in a norm_cfg, and DistributedDataParallel have
    nothing to find. What asks for norms by class (initializers, ``frozen_stages``, conv-BN fusion) sees a BatchNorm.

    Args:
        num_features: Number of channels C.
        eps: Added to the variance, inside the root.
        act: Activation applied in the same op: 'relu', 'leaky_relu', 'silu', 'gelu' or None. It is lost if the
            layer is folded into a convolution (mmcv's ``fuse_conv_bn``): leave it None where that is wanted.

    Shape:
        - Input: (N, C, *), any number of spatial axes; N = 0 is fine.
        - Output: shape, dtype and memory format of the input.

    Raises:
        ValueError: If the activation is unknown or axis 1 of the input is not C long.

    Reference:
        K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385, appendix A: the
        statistics of pre-training are fixed when a detector is fine-tuned. There weight and bias train on; with
        Detectron's AffineChannel, and here, they do not.
    """

    _abbr_ = "bn"  # the attribute's name in a backbone (bn1): part of every published checkpoint
    family = "batch"
    op = "batch_norm"
    batch_statistics = False

    @checked
    def __init__(
        self, num_features: int, eps: float = 1e-5, act: str | None = None, *, device=None, dtype=None
    ) -> None:
        super().__init__(num_features, eps, device=device, dtype=dtype)
        for name in ("weight", "bias"):
            value = self._parameters.pop(name)
            self.register_buffer(name, value.detach())
        self.affine = False  # no parameters: torch's convert_sync_batchnorm copies them before it can be told no
        self.track_running_stats = False  # constants: what resets or drops running statistics passes them over
        self.act = act
        self.training = False

    def reset_parameters(self) -> None:
        """Set statistics, weight and bias to those of a new layer."""
        for name, value in (("running_mean", 0), ("running_var", 1), ("weight", 1), ("bias", 0)):
            nn.init.constant_(getattr(self, name), value)
        self.num_batches_tracked.zero_()

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        return super().train(False)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if f"{prefix}running_var" in state_dict:  # old checkpoints have no count, which torch adds where it tracks
            state_dict.setdefault(f"{prefix}num_batches_tracked", self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def lost_in_conversion(self) -> str:
        return "what makes it frozen"

    def forward(self, x: Tensor, residual: Tensor | None = None, act: str | None = None) -> Tensor:
        if torch.jit.is_scripting():
            own = self.weight, self.bias, self.momentum, self.eps, self.act
            return scripted.batch_norm(x, self.running_mean, self.running_var, None, *own, False, act, residual)
        else:
            return self._forward(x, residual, act)

    def _forward(self, x: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
        if (node := node_of(self, x, residual, act)) is not None:
            return node
        check_channels(self, x, self.num_features)
        act = self.act if act is None else chosen(act, self.act)
        args = x, self.running_mean, self.running_var, self.weight, self.bias, self.eps
        return normalize_by_running(*args, act, residual)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}" + (f", act={self.act!r}" if self.act else "")
