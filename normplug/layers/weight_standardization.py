"""Weight standardization: convolutions whose filters have mean 0 and deviation 1."""

from typing import TypeVar

import torch.fx
from torch import Tensor, nn

from normplug.ops.weight_standardize import weight_standardize

# fold_ws is no layer, and what __all__ names is registered as one
__all__ = ["WSConv1d", "WSConv2d", "WSConv3d"]

Model = TypeVar("Model", bound=nn.Module)

torch.fx.wrap("weight_standardize")  # symbolic tracing stops here: inside, it would meet its checks


class _WSConv(nn.Module):
    """What the three convolutions share; their arguments are documented there."""

    op = "weight_standardize"
    family = "weight"
    batch_statistics = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        eps: float = 1e-5,
        correction: int = 1,
        eps_inside: bool = False,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.eps, self.correction, self.eps_inside = eps, correction, eps_inside
        size = self.weight.shape[1:].numel()
        if size <= max(correction, 1):
            raise ValueError(
                f"{type(self).__name__} gives each filter deviation 1, but with in_channels={in_channels}, "
                f"groups={groups} and kernel_size={kernel_size} a filter has {size} value, which has none (its "
                f"deviation takes more than {max(correction, 1)}). Use a plain convolution here, or a larger kernel."
            )

    def forward(self, x: Tensor) -> Tensor:
        return super()._conv_forward(x, self.standardized_weight(), self.bias)

    def standardized_weight(self) -> Tensor:
        """Return the weight that the convolution uses: shape, dtype and layout of ``weight``."""
        return weight_standardize(self.weight, self.eps, self.correction, self.eps_inside)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Called from outside by efficient_conv_bn_eval, with a weight scaled by the BatchNorm behind.
        if weight is not self.weight:
            raise ValueError(self._refusal("a convolution with another weight than its own"))
        return super()._conv_forward(x, self.standardized_weight(), bias)

    def __setattr__(self, name: str, value) -> None:
        if name == "bias" and self._is_fused_bias(value):
            raise ValueError(self._refusal("a new bias"))
        super().__setattr__(name, value)

    def _is_fused_bias(self, value) -> bool:
        """Tell whether this bias comes from fuse_conv_bn: it assigns a weight and a bias, and nobody else a bias.

        Constructors set it once, optimizers and initializers write into it; sharding swaps it for a DTensor.
        """
        parameters = self.__dict__.get("_parameters", {})
        if type(value) is not nn.Parameter or "bias" not in parameters or "_loading" in self.__dict__:
            return False
        known = parameters["bias"]
        return known is not value and (known is None or type(known) is nn.Parameter)

    def _refusal(self, what: str) -> str:
        return (
            f"{type(self).__name__} was given {what}, as fuse_conv_bn and efficient_conv_bn_eval do. They scale the "
            f"filters, and standardization would take that out again without a message. Call "
            f"normplug.layers.weight_standardization.fold_ws(model) first, on a model as it was before: it turns "
            f"these layers into plain convolutions. (To set a bias yourself write into it: conv.bias.data.copy_(...).)"
        )

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._loading = True  # load_state_dict(assign=True) sets parameters by attribute
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            del self._loading

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}, correction={self.correction}, eps_inside={self.eps_inside}"


class WSConv1d(_WSConv, nn.Conv1d):
    """1-D convolution with standardized filters: see ``WSConv2d``.

    Reference:
        S. Qiao et al., "Weight Standardization", 2019, arXiv 1903.10520.
    """

    _name_ = "ConvWS1d"


class WSConv2d(_WSConv, nn.Conv2d):
    """2-D convolution with standardized filters.

    The convolution uses (weight[o] - mean) / (std + eps), mean and standard deviation over all values of filter o.
    Parameters are those of nn.Conv2d. Made for GN behind it; not for the last layer of a network, whose scale
    counts. Takes over mmcv's ConvWS2d with the same numbers, in either memory format. What is standardized is the
    weight at the time of the call, in evaluation too: for inference ``fold_ws`` turns the layers of a model into
    plain convolutions.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of filters.
        kernel_size: As all of nn.Conv2d's arguments up to padding_mode.
        stride: See nn.Conv2d.
        padding: See nn.Conv2d.
        dilation: See nn.Conv2d.
        groups: See nn.Conv2d.
        bias: See nn.Conv2d.
        padding_mode: See nn.Conv2d.
        eps: Added to the standard deviation or, with eps_inside, to the variance.
        correction: The variance divides by the number of values minus this: 1 is unbiased, 0 population.
        eps_inside: Divide by sqrt(var + eps) instead.

    Shape:
        - Input: as nn.Conv2d.
        - Output: as nn.Conv2d.

    Raises:
        ValueError: If a filter has a single value, or when a BatchNorm behind the layer is fused into it.

    Reference:
        S. Qiao et al., "Weight Standardization", 2019, arXiv 1903.10520. Defaults are those of the authors' PyTorch
        code and of mmcv (unbiased, eps outside the root); the authors' BCN models are eps_inside=True, timm's
        StdConv2d is correction=0, eps_inside=True, eps=1e-6.
    """

    _name_ = ("ConvWS", "ConvWS2d")


class WSConv3d(_WSConv, nn.Conv3d):
    """3-D convolution with standardized filters: see ``WSConv2d``.

    Reference:
        S. Qiao et al., "Weight Standardization", 2019, arXiv 1903.10520.
    """

    _name_ = "ConvWS3d"


def fold_ws(model: Model) -> Model:
    """Turn the WSConvs of a model into plain convolutions that compute the same, in place.

    For export, and before a BatchNorm is fused into its convolution. The plain convolution holds the standardized
    weight as a new parameter: make optimizers afterwards.

    Args:
        model: Any module, a WSConv included.

    Returns:
        The model.
    """
    plain = {WSConv1d: nn.Conv1d, WSConv2d: nn.Conv2d, WSConv3d: nn.Conv3d}
    for module in model.modules():
        for ours, stock in plain.items():
            if isinstance(module, ours):
                weight = module.standardized_weight().detach()
                module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
                del module.eps, module.correction, module.eps_inside
                module.__class__ = stock  # and not a new module: hooks and every reference to it stay
    return model
