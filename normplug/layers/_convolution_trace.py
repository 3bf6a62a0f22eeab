"""Tells a layer which convolution has just computed its input, and from what.

Cross-Iteration BN needs the input and the weight of the convolution before it, but a norm layer is called with the
output only. One forward hook for all modules notes the last convolution of each thread; a layer asks for it with
the tensor it got. Unlike the autograd graph, the hook also sees what runs without one (the first pass of reentrant
checkpointing) and never triggers a recomputation. It is there as long as a layer that needs it is in training mode.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from normplug.ops._registration import in_torch

__all__ = ["Convolution", "described", "eagerly", "follow", "forget", "leave", "take"]


@dataclass(frozen=True)
class Convolution:
    """The convolution that computed a tensor, and its input (None if the filters are frozen)."""

    module: _ConvNd
    input: Tensor | None

    @property
    def trainable(self) -> bool:
        """Whether its filters are being trained; a bias alone does not count."""
        # FSDP with use_orig_params=False leaves no parameters, but views of a flat one among the attributes.
        weights = {**vars(self.module), **dict(self.module.named_parameters())}
        return any(isinstance(w, Tensor) and w.requires_grad for name, w in weights.items() if name != "bias")

    @property
    def version(self) -> tuple[int, ...]:
        """A value that changes when an optimizer has changed the convolution."""
        return tuple(p._version for p in self.module.parameters())

    def filters(self) -> Tensor:
        """Return the weight that it really uses, without a gradient.

        Raises:
            ValueError: If a sharded model has put the weight away when the convolution was done.
        """
        conv = self.module
        with torch.no_grad(), _gathered(conv):
            standardized = getattr(conv, "standardized_weight", None)
            weight = (conv.weight if standardized is None else standardized()).detach()
        expected = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
        if weight.shape != expected or _is_put_away(weight):
            raise ValueError(
                f"CBN corrects its statistics by the weight of {described(conv)}, of shape {expected}, but got one "
                f"of shape {tuple(weight.shape)}{' without memory' * (weight.shape == expected)}. Under FSDP make one "
                f"unit of the convolution and the norm behind it, as ModuleWrapPolicy({{ConvModule}}) does, or take "
                f"fully_shard."
            )
        return weight

    def bias(self) -> Tensor | None:
        """Return its bias, without a gradient."""
        with torch.no_grad(), _gathered(self.module):
            return None if self.module.bias is None else self.module.bias.detach()

    @property
    def geometry(self) -> dict[str, Any]:
        """The arguments of ``patch_statistics`` that describe it."""
        conv = self.module
        if not isinstance(conv.padding, str):
            padding = [p for p in conv.padding for _ in range(2)]
        else:  # an odd number of zeros has the surplus one behind
            totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
            padding = [n for t in totals for n in ((t // 2, t - t // 2) if conv.padding == "same" else (0, 0))]
        return {
            "kernel_size": conv.kernel_size,
            "stride": conv.stride,
            "padding": padding,
            "dilation": conv.dilation,
            "groups": conv.groups,
            "padding_mode": conv.padding_mode,
        }


class _Last:
    """What the last convolution of a thread left: it holds the input no longer than the output lives."""

    def __init__(self) -> None:
        self.record: tuple[_ConvNd, Tensor | None, weakref.ref, int] | None = None
        # for error messages: the last convolution, and the last module that put out a tensor
        self.module: weakref.ref = weakref.ref(self)
        self.source: weakref.ref = weakref.ref(self)
        self.made: weakref.ref = weakref.ref(self)

    def note(self, conv: _ConvNd, x: Tensor | None, y: Tensor) -> None:
        self.record = conv, x, weakref.ref(y, self._gone), _version(y)
        self.module = weakref.ref(conv)

    def note_source(self, module: nn.Module, y: Tensor) -> None:
        """Remember which module made a tensor: the innermost, which is the first to be heard of."""
        if self.made() is not y:
            self.source, self.made = weakref.ref(module), weakref.ref(y)

    def _gone(self, ref: weakref.ref) -> None:
        # Autograd drops tensors from threads of its own: not through threading.local, but through self.
        if self.record is not None and self.record[2] is ref:
            self.record = None


class _Local(threading.local):
    def __init__(self) -> None:
        self.last = _Last()


_local = _Local()
_followers: dict[int, weakref.finalize] = {}
_hook: Any = None
_eagerly: Any = None


def follow(layer: nn.Module) -> None:
    """Note convolutions as long as ``layer`` exists, or until ``leave``."""
    global _hook, _eagerly
    if id(layer) not in _followers:
        _followers[id(layer)] = weakref.finalize(layer, _remove, id(layer))
        _followers[id(layer)].atexit = False
    if _eagerly is None:
        _eagerly = torch.compiler.disable(_call)  # not earlier: it imports the compiler
    if _hook is None:
        _hook = nn.modules.module.register_module_forward_hook(_note)


def leave(layer: nn.Module) -> None:
    """Note convolutions for this layer no longer."""
    if id(layer) in _followers:
        _followers[id(layer)].detach()
        _remove(id(layer))


def _remove(key: int) -> None:
    global _hook
    _followers.pop(key, None)
    if not _followers and _hook is not None:
        _hook.remove()
        _hook = None


def take(layer: nn.Module, x: Tensor) -> Convolution:
    """Return the convolution whose output x is, and stop holding on to its input.

    Raises:
        ValueError: If x is not the unchanged output of a convolution that ran just before.
    """
    record, _local.last.record, module = _local.last.record, None, _local.last.module()
    name = type(layer).__name__
    remedy = (
        f"{name} corrects its statistics by the weight of that convolution. Put {name} directly behind a Conv1d, "
        f"Conv2d or Conv3d that is in training mode, or use another norm here, for example GN or BN."
    )
    if record is None or not _is_same(x, record[2]()):
        source = _local.last.source() if _local.last.made() is x else None
        if source is not None:
            made = f" It is the output of {described(source)}."
        elif isinstance(module, _ConvNd):
            made = f" The last convolution before was {module}; something lies between."
        else:
            made = ""
        raise ValueError(
            f"{name} must normalize the output of a convolution, but the tensor {tuple(x.shape)} that it got is "
            f"none.{made} {remedy}"
        )
    conv, inputs, _, version = record
    if conv.transposed:
        raise ValueError(f"{name} cannot follow a transposed convolution, but got the output of {conv}. {remedy}")
    if version != _version(x):
        raise ValueError(
            f"{name} must normalize the output of a convolution as it is, but the output of {conv} was changed in "
            f"place before it got here. {remedy}"
        )
    return Convolution(conv, inputs)


def described(module: nn.Module) -> str:
    """Say which module it is, in one line: its class, and its sizes if it is a convolution of some kind."""
    sizes = [getattr(module, name, None) for name in ("in_channels", "out_channels", "kernel_size")]
    told = f"({sizes[0]}, {sizes[1]}, kernel_size={sizes[2]})" if None not in sizes else ""
    return f"{type(module).__module__}.{type(module).__qualname__}{told}"


def forget(x: Tensor) -> None:
    """Stop holding on to the input of the convolution that computed x, if it was the last."""
    record = _local.last.record
    if record is not None and _is_same(x, record[2]()):
        _local.last.record = None


def _is_same(x: Tensor, y: Tensor | None) -> bool:
    """Tell whether x is y, or what hooks make of it that wait for a gradient (full backward hooks, FSDP): all of y."""
    if x is y:
        return True
    if y is None or x._base is not y:
        return False
    return (x.shape, x.stride(), x.storage_offset()) == (y.shape, y.stride(), y.storage_offset())


def _is_put_away(weight: Tensor) -> bool:
    """Tell whether FSDP has freed the memory of a weight; of tensors of torch.func that cannot be asked."""
    return not in_torch() and weight.numel() > 0 and weight.untyped_storage().nbytes() == 0


@contextmanager
def _gathered(conv: _ConvNd) -> Iterator[None]:
    """Give a convolution the parameters that it was called with: fully_shard may have split them since."""
    own = conv._parameters
    whole = {name: p.full_tensor() for name, p in own.items() if hasattr(p, "full_tensor")}
    conv.__dict__["_parameters"] = {**own, **whole}
    try:
        yield
    finally:
        conv.__dict__["_parameters"] = own


def eagerly(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function as it is, also from within torch.compile, where the graph then breaks."""
    return _eagerly(function, *args) if torch.compiler.is_compiling() else function(*args)


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _note(module: nn.Module, args: tuple, output: Any) -> None:
    if not isinstance(output, Tensor):
        return
    if isinstance(module, _ConvNd) and module.training and args:
        eagerly(_note_convolution, module, args[0], output)
    if not torch.compiler.is_compiling():
        _local.last.note_source(module, output)


def _note_convolution(conv: _ConvNd, x: Tensor, y: Tensor) -> None:
    # A frozen weight needs no input; one that is no parameter is computed from others, as by spectral_norm.
    weight = conv._parameters.get("weight")
    _local.last.note(conv, x if weight is None or weight.requires_grad else None, y)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
