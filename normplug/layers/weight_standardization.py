"""Weight standardization: convolutions whose filters have mean 0 and deviation 1."""

import threading
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from normplug.layers import _scripted as scripted
from normplug.layers._checks import checked
from normplug.layers._symbolic import Proxy, node_of
from normplug.ops._common import check_tensor, with_plain_strides
from normplug.ops._registration import in_torch
from normplug.ops.weight_standardize import weight_standardize, weight_standardize_many

# fold_ws and standardize_together are no layers, and what __all__ names is registered as one
__all__ = ["WSConv1d", "WSConv2d", "WSConv3d"]

Model = TypeVar("Model", bound=nn.Module)


class _WSConv(nn.Module):
    """What the three convolutions share; their arguments are documented there."""

    op = "weight_standardize"
    family = "weight"
    batch_statistics = False

    @checked
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
        if torch.jit.is_scripting():
            own = self.weight, self.bias, self.stride, self.dilation, self.groups
            padding = self._reversed_padding_repeated_twice, self.padding_mode
            return scripted.convolution(x, *own, *padding, self.eps, self.correction, self.eps_inside)
        else:
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if (node := node_of(self, x)) is not None:
            return node
        if not isinstance(x, Proxy):
            check_tensor(type(self).__name__, x)
            if not in_torch():  # other strides of an axis of length 1 are an error in backward, on a CPU
                x = with_plain_strides(x)
        return super()._conv_forward(x, self.standardized_weight(), self.bias)

    def standardized_weight(self) -> Tensor:
        """Return the weight that the convolution uses: shape, dtype and layout of ``weight``."""
        done = None if torch.compiler.is_compiling() else _standardized_for(self)
        return weight_standardize(self.weight, self.eps, self.correction, self.eps_inside) if done is None else done

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


# --- all weights of a model in one launch


def standardize_together(model: Model, devices: Collection[str] = ("cuda",)) -> Model:
    """Say on which devices a call of a model standardizes the weights of all its WSConvs in one launch.

    Models built from a config do so on CUDA. Elsewhere, and in a model of which this is not said, every layer
    standardizes its own weight when it is called. An empty collection turns it off, modules inside included.

    The numbers are the same, bit for bit, except that a layer which runs several times in one call has its gradients
    added before they pass through the standardization and not after it. What the model's own forward writes to
    ``weight.data`` of a trained layer counts from the next call on. In a call without gradients the standardized
    weights of all layers are there at once.

    The gradients of all these weights are ready at the end of the backward pass. Where the all-reduce of
    DistributedDataParallel takes long and should start before, turn the whole model off and then its stages on, one
    by one.

    Args:
        model: Any module.
        devices: Device types, as in ``tensor.device.type``.

    Returns:
        The model.
    """
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in [*hooks.items()]:
                if isinstance(hook, _Begin):
                    hook.devices = frozenset(devices)
                if isinstance(hook, (_Begin, _End)) and not devices:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
    if devices and not _is_begun(model):
        model.register_forward_pre_hook(_Begin(devices))
        model.register_forward_hook(_End(), always_call=True)
    return model


class _Call:
    """A running call of a model, and what it has standardized: for a layer the weight, its version and the result."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.results: dict[nn.Module, tuple[Tensor, int | None, Tensor]] = {}
        self.is_complete = True

    def standardize(self, layers: list[nn.Module], eps: float, correction: int, eps_inside: bool) -> None:
        weights = [layer._parameters["weight"] for layer in layers]  # while fx traces, layer.weight is none
        outs = weight_standardize_many(weights, eps, correction, eps_inside)
        for layer, weight, out in zip(layers, weights, outs, strict=True):
            self.results[layer] = weight, None if weight.is_inference() else weight._version, out


class _Calls(threading.local):
    """The calls that run in this thread, the innermost last; layers in other threads standardize their own weights."""

    def __init__(self) -> None:
        self.stack: list[_Call] = []

    def end(self, model: nn.Module) -> None:
        for i, call in enumerate(self.stack):
            if call.model is model:
                del self.stack[i:]  # with what KeyboardInterrupt may have left behind it
                break


_calls = _Calls()


class _Begin:
    """Hook before a forward: standardize what no model around this one has. An object is copied and pickled with it."""

    def __init__(self, devices: Collection[str]) -> None:
        self.devices = frozenset(devices)

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or in_torch():
            return
        if hasattr(model.forward, "_torchdynamo_orig_callable"):  # compiled alone: what is done here, it would not see
            return
        _calls.end(model)
        call, groups = _Call(model), defaultdict(list)
        for layer, is_inner in _layers(model):
            weight = layer._parameters.get("weight")  # None: a parametrization computes it whenever it is asked for
            if type(weight) not in (nn.Parameter, Tensor) or weight.ndim != len(layer.kernel_size) + 2:
                continue  # sharded: the layer will have another when its turn comes
            if weight.device.type not in self.devices:
                continue
            if _standardized_for(layer) is not None:
                if all(other.is_complete for other in _calls.stack):
                    return  # a model around this one has done it all: do not look for more
                continue
            trains = torch.is_grad_enabled() and weight.requires_grad
            if is_inner and torch.is_grad_enabled() and not trains:
                call.is_complete = False  # a momentum encoder, updated before it is called: its own hook does it then
                continue
            groups[weight.device, weight.dtype, trains, layer.eps, layer.correction, layer.eps_inside].append(layer)
        for (_, _, _, *form), layers in groups.items():
            if len(layers) > 1:
                call.standardize(layers, *form)
        if call.results:
            _calls.stack.append(call)


class _End:
    """Hook behind a forward, also one that raises: what was standardized for it is forgotten."""

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            _calls.end(model)


def _is_begun(model: nn.Module) -> bool:
    hooks = model._forward_pre_hooks
    return bool(hooks) and any(isinstance(hook, _Begin) for hook in hooks.values())


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """Yield every WSConv in a model, and whether it belongs to a model inside that does the same."""
    todo, seen = [(model, False)], set()
    while todo:
        module, is_inner = todo.pop()
        if isinstance(module, _WSConv):
            if module not in seen:
                seen.add(module)
                yield module, is_inner
        elif module._modules and module not in seen:
            seen.add(module)
            is_inner |= module is not model and _is_begun(module)
            todo += [(child, is_inner) for child in reversed(module._modules.values()) if child is not None]


def _standardized_for(layer: nn.Module) -> Tensor | None:
    """Return what a running call has standardized for a layer, if that is what the layer would compute now."""
    for call in reversed(_calls.stack):
        if layer in call.results:
            known, version, out = call.results[layer]
            weight = layer.weight
            if (
                weight is known
                and (version is None or version == weight._version)
                and (out.requires_grad or not (torch.is_grad_enabled() and weight.requires_grad))
                and (torch.is_inference_mode_enabled() or not out.is_inference())
            ):
                return out
    return None


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
    return standardize_together(model, devices=())
