"""What the norms of a model are doing: their weights and statistics, what is frozen, which channels are dead."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from mmcv.cnn import is_norm
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from torch import Tensor, nn

from normplug.layers.weight_standardization import WSConv1d, WSConv2d, WSConv3d
from normplug.openmmlab.checkpoints import place
from normplug.openmmlab.precise_bn import _modes_undone

__all__ = ["Filters", "Norm", "OutputRanges", "Summary", "filters_of", "norms_of", "part_of"]

DEAD = 1e-4  # of the largest range in the layer
RELUS = (nn.ReLU, nn.ReLU6)


@dataclass(frozen=True)
class Summary:
    """Mean, smallest and largest of a tensor's values."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, x: Tensor | None) -> "Summary | None":
        """Summarize a tensor; None where there is none."""
        if x is None or not x.numel():
            return None
        x = x.detach().double()
        return cls(x.mean().item(), x.min().item(), x.max().item())


@dataclass(frozen=True)
class Norm:
    """One norm layer."""

    name: str
    kind: str  # class
    channels: int
    groups: int | None
    state: str
    weight: Summary | None  # of |weight|
    bias: Summary | None
    running_mean: Summary | None
    running_var: Summary | None
    scale: Summary  # of |effective scale|
    scales: list[float] = field(repr=False)  # each channel's
    activation: Summary | None  # v of EvoNorm, tau of FRN
    dead: list[int] | None  # channels; None: the layer was not called

    @property
    def place(self) -> tuple[str, str]:
        """Where the layer is, whatever its kind of norm."""
        return place(self.name)


@dataclass(frozen=True)
class Filters:
    """A convolution, and the standard deviation of each filter's weights before any standardization."""

    name: str
    kind: str
    standardized: bool
    std: Summary


def norms_of(model: nn.Module, ranges: "OutputRanges | None" = None) -> list[Norm]:
    """Describe the norm layers of a model, in its order.

    The effective scale of a channel is what its input is multiplied by in evaluation: weight / sqrt(running_var +
    eps) in batch norms (BN, SyncBN, CBN, frozen). In all others, whose divisor depends on the sample, it is weight.

    Args:
        model: A model of a toolkit, no wrapper around it; its modes are as before afterwards.
        ranges: Output ranges over the data, from which dead channels follow.
    """
    found = [(name, layer) for name, layer in model.named_modules() if is_norm(layer)]
    states = _states(model, [layer for _, layer in found])
    return [_describe(name, layer, state, ranges) for (name, layer), state in zip(found, states, strict=True)]


def _describe(name: str, layer: nn.Module, state: str, ranges: "OutputRanges | None") -> Norm:
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    mean, var = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
    scale = torch.ones(_channels(layer)) if weight is None else weight.detach().double()
    if mean is not None and var is not None:
        outside = getattr(layer, "eps_mode", "inside") == "outside"
        wide = var.detach().double()
        scale = scale.to(wide.device) / (wide.sqrt() + layer.eps if outside else (wide + layer.eps).sqrt())
    scale = scale.abs().flatten()
    act = getattr(layer, "_act_parameter", None)
    kind = getattr(type(layer), "_name_", type(layer).__name__)
    return Norm(
        name=name,
        kind=kind if getattr(layer, "apply_act", True) else f"{kind} without activation",
        channels=_channels(layer),
        groups=getattr(layer, "num_groups", None),
        state=state,
        weight=Summary.of(None if weight is None else weight.abs()),
        bias=Summary.of(bias),
        running_mean=Summary.of(mean),
        running_var=Summary.of(var),
        scale=Summary.of(scale),
        scales=scale.tolist(),
        activation=Summary.of(getattr(layer, act) if act else None),
        dead=None if ranges is None else ranges.dead(name),
    )


def _channels(layer: nn.Module) -> int:
    for attribute in ("num_features", "num_channels"):
        if hasattr(layer, attribute):
            return getattr(layer, attribute)
    return layer.normalized_shape[-1]


def _states(model: nn.Module, layers: list[nn.Module]) -> list[str]:
    """Say of each layer what training would change, as the config's ``frozen_stages`` and ``norm_eval`` have it."""
    states = []
    with _modes_undone(model):
        for layer in layers:
            has_statistics = getattr(layer, "running_var", None) is not None
            if any(p.requires_grad for p in layer.parameters(recurse=False)):
                states.append("trained" if layer.training or not has_statistics else "statistics frozen")
            else:
                states.append("weights frozen" if layer.training and has_statistics else "frozen")
    return states


def filters_of(model: nn.Module) -> list[Filters]:
    """Describe the convolutions of a model, in its order."""
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.conv._ConvNd):
            weight = layer.weight.detach().double().flatten(1)
            kind, is_ws = type(layer).__name__, isinstance(layer, (WSConv1d, WSConv2d, WSConv3d, ConvWS2d))
            found.append(Filters(name, kind, is_ws, Summary.of(weight.std(1, unbiased=False))))
    return found


def part_of(name: str) -> str:
    """Return the part of a detector or recognizer that a layer belongs to: backbone, neck, roi_head.mask_head."""
    top, *rest = name.split(".")
    return f"{top}.{rest[0]}" if top == "roi_head" and rest else top


class OutputRanges:
    """Smallest and largest value that each channel of each norm hands on, over all that a model evaluates.

    What a layer hands on is its output, after the ReLU where an ``nn.ReLU`` follows directly. Where a layer takes a
    residual sum or another activation into its own pass, it is its output without them.
    """

    def __init__(self) -> None:
        self.ranges: dict[str, tuple[Tensor, Tensor]] = {}
        # name, output with its version, smallest, largest: of the norm that has run last, which a ReLU may follow
        self._last: tuple[str, weakref.ref[Tensor], int, Tensor, Tensor] | None = None

    def dead(self, name: str) -> list[int] | None:
        """Return the dead channels of a layer, None if it was never called.

        A channel is dead if what it hands on is the same everywhere on the data: its range, largest minus smallest
        value, is at most 1e-4 of the largest range in its layer. So it is for a weight near zero, and before a ReLU
        where no value is positive.
        """
        if name not in self.ranges:
            return None
        low, high = self.ranges[name]
        span = high - low
        finite = span[span.isfinite()]  # what is infinite or no number is something else than dead
        return torch.nonzero(span <= DEAD * finite.max()).flatten().tolist() if len(finite) else []

    def state(self) -> dict[str, list[list[float]]]:
        """Return the ranges as plain lists: smallest and largest per channel."""
        return {name: [low.tolist(), high.tolist()] for name, (low, high) in self.ranges.items()}

    @classmethod
    def from_state(cls, state: dict[str, list[list[float]]]) -> "OutputRanges":
        """Undo ``state``."""
        ranges = cls()
        ranges.ranges = {name: (torch.tensor(low), torch.tensor(high)) for name, (low, high) in state.items()}
        return ranges

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Look at the norms of a model while it runs."""
        handles = []
        for name, module in model.named_modules():
            if is_norm(module):
                handles.append(module.register_forward_hook(self._norm_hook(name), with_kwargs=True))
            elif isinstance(module, RELUS):
                handles.append(module.register_forward_pre_hook(self._before_relu))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._store()
            self.ranges = {name: (low.float().cpu(), high.float().cpu()) for name, (low, high) in self.ranges.items()}

    def _norm_hook(self, name: str):
        def look(layer: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> None:
            self._store()
            if kwargs.get("residual") is not None or kwargs.get("act") not in (None, "relu"):
                y = layer.forward(args[0])
            if not y.numel():
                return
            channel = y.ndim - 1 if isinstance(layer, nn.LayerNorm) else 1
            others = [axis for axis in range(y.ndim) if axis != channel]
            self._last = name, weakref.ref(y), y._version, y.detach().amin(others), y.detach().amax(others)

        return look

    def _before_relu(self, relu: nn.Module, args: tuple) -> None:
        if self._last is None:
            return
        name, y, version, low, high = self._last
        if y() is args[0] and version == args[0]._version:  # not a sum in place
            self._last = name, y, version, relu.forward(low), relu.forward(high)
            self._store()

    def _store(self) -> None:
        if self._last is not None:
            name, *_, low, high = self._last
            if name in self.ranges:
                low = torch.minimum(low, self.ranges[name][0])
                high = torch.maximum(high, self.ranges[name][1])
            self.ranges[name] = low, high
            self._last = None
