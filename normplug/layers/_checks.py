"""Checks of input that several layers share."""

from torch import Tensor, nn

__all__ = ["check_channels", "check_has_statistics", "check_rank"]


def check_rank(layer: nn.Module, x: Tensor, ranks: tuple[int, ...] = (2, 3, 4, 5)) -> None:
    """Raise ValueError if x has not one of the ranks."""
    if x.ndim not in ranks:
        raise ValueError(
            f"{type(layer).__name__} expects an input of {' or '.join(map(str, ranks))} axes, (N, C) and up to "
            f"three spatial ones, but got {x.ndim}: {tuple(x.shape)}. Add the missing axes with unsqueeze, or "
            f"fold the surplus ones into N."
        )


def check_channels(layer: nn.Module, x: Tensor, num_features: int, name: str = "num_features") -> None:
    """Raise ValueError if axis 1 of x is not num_features long."""
    check_rank(layer, x)
    if x.shape[1] != num_features:
        kind = type(layer).__name__
        rest = ", *" if x.ndim > 2 else ""
        raise ValueError(
            f"{kind} was built with {name}={num_features}, so it expects input of shape (N, {num_features}{rest}), "
            f"but got {tuple(x.shape)}. Channels sit on axis 1: permute a channels-last tensor, or build the "
            f"layer with {name}={x.shape[1]}."
        )


def check_has_statistics(layer: nn.Module, x: Tensor, count: int) -> None:
    """Raise ValueError if a batch offers one value per channel to statistics over it: its variance would be 0."""
    if count == 1:
        running = "call .eval() to use the running statistics" if layer.training else "build it with running statistics"
        raise ValueError(
            f"{type(layer).__name__} takes its statistics over the batch and cannot do so on a single value per "
            f"channel: got an input of shape {tuple(x.shape)}. Use more samples or larger maps, {running}, or "
            f"choose a layer without batch statistics such as GN."
        )
