"""One norm in another's place: its arguments and state, its name in the toolkits' classes, its weight and bias."""

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normplug.openmmlab.classes import is_toolkits, owner_of
from normplug.openmmlab.placement import ActivationInNorm, is_watched

__all__ = [
    "LineFit",
    "activation_behind",
    "channels_of",
    "check_place",
    "exchange",
    "is_same_function",
    "put",
    "split",
    "successor",
    "take_state",
    "without_act",
]


def is_same_function(new: nn.Module, old: nn.Module) -> bool:
    """Whether a norm computes in evaluation what the other did, once it has its state."""
    return isinstance(new, _BatchNorm) and isinstance(old, _BatchNorm)


def successor(old: nn.Module, name: str, kind: type[nn.Module], norm_cfg: dict[str, Any]) -> nn.Module:
    """Return a norm of another kind with the channels, device, dtype, mode and usable state of an old one.

    Args:
        old: The norm that it is to follow.
        name: Path of the old one, for errors.
        kind: Class of the new one.
        norm_cfg: Its arguments. eps, momentum, affine, bias and act, where it takes them, are the old one's unless
            named.

    Raises:
        ValueError: If the class does not take these arguments, this number of channels or the old norm's ``act``.
    """
    channels, accepted = channels_of(old), inspect.signature(kind).parameters
    inherited = {"eps": old.eps}
    if act := getattr(old, "act", None):  # of a norm that activates by itself; in toolkits' classes others do it
        if "act" not in accepted:
            raise ValueError(
                f"{name} applies the activation {act!r} itself, and {kind.__name__} has none of that name. Convert to "
                f"a norm that takes act, such as GN or BNAct, or put the activation behind the norm first."
            )
        inherited["act"] = act
    if "affine" in accepted and getattr(old, "weight", None) is None:
        inherited["affine"] = False
    elif "bias" in accepted and getattr(old, "bias", None) is None:
        inherited["bias"] = False
    if "momentum" in accepted and issubclass(kind, _BatchNorm) and isinstance(old, _BatchNorm):
        inherited["momentum"] = old.momentum
    like = next(iter(old.state_dict().values()), torch.empty(0))
    try:
        new = kind(channels, **{**inherited, **norm_cfg}).to(like.device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} has {channels} channels. {error}") from error
    if like.is_floating_point():
        new.to(like.dtype)
    take_state(new, old)
    for key, p in new.named_parameters():
        theirs = getattr(old, key, None) if key in old._parameters else old._parameters.get("weight")
        if theirs is not None:
            p.requires_grad_(theirs.requires_grad)
    return new.train(old.training)


def channels_of(norm: nn.Module) -> int:
    """Return the number of channels of a norm; torchvision's FrozenBatchNorm2d has only its tensors to tell."""
    return getattr(norm, "num_features", None) or getattr(norm, "num_channels", None) or len(norm.weight)


def check_place(model: nn.Module, name: str, new: nn.Module) -> None:
    """Refuse a norm that contains its activation where nobody knows which activation it would have to replace.

    Raises:
        ValueError: If the class around is no toolkit's and of no package whose backbones the toolkits hand on.
    """
    owner = owner_of(name.rpartition(".")[0], model) if "." in name else model
    if getattr(new, "contains_activation", False) and not (is_toolkits(owner) or is_watched(owner)):
        raise ValueError(
            f"{type(new).__name__} contains its activation, but {name} sits in {type(owner).__name__}, of which "
            f"normplug does not know where it applies activations. Use a norm without one, for example GN."
        )


def take_state(new: nn.Module, old: nn.Module) -> None:
    """Copy what the two state dicts have in common."""
    own = new.state_dict()
    new.load_state_dict({key: value for key, value in old.state_dict().items() if key in own}, strict=False)


def split(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds the one called ``name``, and what it is called there."""
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def put(model: nn.Module, name: str, new: nn.Module) -> str:
    """Put a layer in another's place, under the name that the toolkits would have given it.

    Returns:
        The layer's own name now: ``bn1`` becomes ``gn1`` in a class that looks its norms up by name.
    """
    parent, own = split(model, name)
    renamed = own
    if _names_of_norms(parent, own):
        from mmcv.cnn.bricks.norm import infer_abbr  # here: without mmcv there is no such class

        renamed = infer_abbr(type(new)) + own.lstrip("abcdefghijklmnopqrstuvwxyz_")
    exchange(parent, own, renamed, new)
    return renamed


def exchange(parent: nn.Module, own: str, renamed: str, new: nn.Module) -> None:
    """Have ``new``, called ``renamed``, where the child ``own`` was, in the same order."""
    for key in _names_of_norms(parent, own):
        setattr(parent, key, renamed)
    children = dict(parent._modules)
    parent._modules.clear()
    for key, child in children.items():
        parent._modules[renamed if key == own else key] = new if key == own else child


def _names_of_norms(parent: nn.Module, own: str) -> list[str]:
    """The attributes by which mmdet's blocks and mmcv's ConvModule find the norm of that name."""
    return [key for key, value in vars(parent).items() if value == own and re.fullmatch(r"norm\d*_name", key)]


def activation_behind(model: nn.Module, name: str) -> nn.Module | None:
    """The activation that a norm which contains one would replace, as far as it can be seen: else a ReLU."""
    parent, own = split(model, name)
    found = getattr(parent, "activate", None)
    if isinstance(parent, nn.Sequential):
        names = list(parent._modules)
        behind = names[names.index(own) + 1 :]
        found = parent._modules[behind[0]] if behind else None
    return found if isinstance(found, nn.Module) and not isinstance(found, ActivationInNorm) else nn.ReLU()


def without_act(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm puts out before its own activation."""
    act = getattr(norm, "act", None)
    if act is None:
        return norm.forward(x)
    norm.act = None
    try:
        return norm.forward(x)
    finally:
        norm.act = act


class LineFit:
    """Weight and bias of a norm by least squares, such that it puts out what an old norm, in eval mode, does.

    Between the constructor and ``finish`` the new norm has weight 1 and bias 0: what it puts out then is what weight
    and bias act on. Sums are kept per channel, over batches, in float64 and without cancellation. Where the new norm
    contains an activation its output is fitted to that of the old one and the activation behind it; FRN's threshold
    becomes 0, the ReLU.

    Args:
        new: The norm to fit, in eval mode.
        old: The norm that it follows.
        activation: What stands behind the old one.
    """

    def __init__(self, new: nn.Module, old: nn.Module, activation: nn.Module) -> None:
        self.new, self.old, self.activation = new, old.eval(), activation
        self.threshold = getattr(new, "tau", None)
        if self.threshold is not None:
            self.threshold.fill_(float("-inf"))  # fitted without the threshold, which then is where the ReLU has it
        self.activates = getattr(new, "contains_activation", False) and self.threshold is None
        self.fallback = new.weight.clone()
        new.weight.fill_(1)
        new.bias.fill_(0)
        self.count, self.sums = 0, None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take an input (N, C, *) of the norms, and what the new one makes of it before its own ``act``."""
        want = without_act(self.old, x)
        want = self.activation(want.clone()) if self.activates else want
        x, y = (t.detach().double().transpose(0, 1).flatten(1) for t in (y, want))
        count = x.shape[1]
        if not count:
            return
        x_mean, y_mean = x.mean(1), y.mean(1)
        x, y = x - x_mean[:, None], y - y_mean[:, None]
        new = x_mean, y_mean, x.square().sum(1), (x * y).sum(1)
        if self.sums is None:
            self.count, self.sums = count, new
            return
        total = self.count + count
        by_x, by_y = new[0] - self.sums[0], new[1] - self.sums[1]
        share, both = count / total, self.count * count / total
        self.sums = (
            self.sums[0] + by_x * share,
            self.sums[1] + by_y * share,
            self.sums[2] + new[2] + by_x.square() * both,
            self.sums[3] + new[3] + by_x * by_y * both,
        )
        self.count = total

    def finish(self) -> None:
        """Write weight and bias. A channel that was constant keeps its old weight; without any input all stay."""
        slope, offset = self.fallback, self.new.bias
        if self.sums is not None:
            x_mean, y_mean, xx, xy = self.sums
            constant = xx <= 1e-12 * self.count * (1 + x_mean.square())
            slope = torch.where(constant, self.fallback.double(), xy / xx.clamp(min=1e-300))
            offset = y_mean - slope * x_mean
        self.new.weight.copy_(slope)
        self.new.bias.copy_(offset)
        if self.threshold is not None:
            self.threshold.zero_()
