"""A trained model with another norm than it was trained with, calibrated to start close to what it was."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from normplug.openmmlab.adapt import adapt
from normplug.openmmlab.successors import (
    LineFit,
    activation_behind,
    check_place,
    is_same_function,
    put,
    successor,
    without_act,
)

__all__ = ["convert_norm"]


def convert_norm(
    model: nn.Module,
    source: str,
    target: str,
    data: Iterable | None = None,
    *,
    run: Callable[[nn.Module, Any], Any] | None = None,
    **norm_cfg: Any,
) -> nn.Module:
    """Turn every norm of one kind in a trained model into another, in place, and fit the new ones to the old ones.

    A new norm takes what it can use of the old one's state. SyncBN, CBN and frozen BN in the place of BN then compute
    the same in evaluation, and no data is needed. For the others, layer by layer in forward order, weight and bias of
    each channel are chosen by least squares such that the layer puts out what the old norm, in eval mode, puts out for
    the same input: that of the calibration data in the partly converted model. A channel that is constant there keeps
    its old weight. Where a norm contains the activation, what is fitted is its output: for EvoNorm to that of the
    old norm and the activation it replaces; FRN's threshold becomes 0, the ReLU. EvoNorm's v stays 1: expect a worse
    start than from GN.

    Names follow the toolkits': the state dict is that of a model built with the new norm_cfg (``bn1`` becomes
    ``gn1``), unless the class around names its norms itself, as torchvision's does. The model is adapted
    (``normplug.openmmlab.adapt``) and keeps its modes. Create the optimizer afterwards.

        convert_norm(model, "BN", "GN", loader, num_groups=32)

    Args:
        model: A trained model, no wrapper around it.
        source: Config name of the norms to replace; 'BN' means nn.BatchNorm1d, 2d and 3d.
        target: Config name of the norms to put there.
        data: Calibration batches, gone through several times: a list or a data loader without shuffling. A dozen
            batches will do; each layer costs a pass up to it. None leaves the new norms uncalibrated.
        run: Called with model and batch; runs the forward pass. Default: ``model.test_step(batch)`` for models of
            mmengine, which prepares the batch as in evaluation, else ``model(batch)``.
        **norm_cfg: Arguments of the new norm, such as ``num_groups``; eps, and the ``act`` of a norm that activates by
            itself, are the old norm's unless given. In a toolkit's model an ``act`` given here changes the activations
            too: the model then starts as another one.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: If the model has no norm of that kind; the new one does not take a layer's number of channels, needs
            running statistics that the old one has not, cannot apply the old one's ``act``, or contains its activation
            where the class around is no toolkit's; or data is an iterator, which can be gone through only once. The
            model is untouched then.
    """
    if data is not None and iter(data) is data:
        raise ValueError(
            f"convert_norm goes through the calibration data once per layer, and {type(data).__name__} is used up "
            f"after one. Give a list of batches, or the data loader itself."
        )
    old = {name: m for name, m in model.named_modules() if _is_kind(m, source)}
    if not old:
        kinds = sorted({type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower()})
        raise ValueError(f"The model has no {source} to convert. Its norms are of class {', '.join(kinds) or 'none'}.")
    # What stands behind a norm now: adapt() takes some of these away.
    activations = {name: activation_behind(model, name) for name in old}
    kind = MODELS.get(target)
    if kind is None:
        raise ValueError(f"No norm is registered as {target!r}: see python -m normplug list.")
    new = {name: successor(layer, name, kind, norm_cfg) for name, layer in old.items()}
    for name, layer in new.items():
        _check_fits(model, name, old[name], layer)
    pairs = []
    for name, layer in new.items():
        put(model, name, layer)
        pairs.append((layer, old[name], activations[name]))
    adapt(model)
    if data is not None:
        _calibrate(model, [pair for pair in pairs if not is_same_function(*pair[:2])], data, run or _run)
    return model


def _is_kind(module: nn.Module, kind: str) -> bool:
    if kind == "BN":
        return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return type(module) is MODELS.get(kind) or (kind == "SyncBN" and type(module) is nn.SyncBatchNorm)


def _check_fits(model: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    if getattr(new, "running_var", None) is not None and getattr(old, "running_var", None) is None:
        raise ValueError(
            f"{name} is {old}, without running statistics, and {type(new).__name__} evaluates by them. Build the "
            f"model with the new norm_cfg and let PreciseBNHook(before_train=True) estimate them."
        )
    check_place(model, name, new)


# --- calibration


class _Reached(Exception):
    """The layer being fitted has run: the rest of the pass is of no use."""


def _calibrate(model: nn.Module, pairs: list[tuple], data: Iterable, run: Callable) -> None:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for new, old, activation, calls in _in_forward_order(model, pairs, data, run):
                if getattr(new, "weight", None) is not None and getattr(new, "bias", None) is not None:
                    _fit(model, new, old, activation, calls, data, run)
    finally:
        for module, mode in modes.items():
            if module.training != mode:
                module.train(mode) if next(module.children(), None) is None else setattr(module, "training", mode)


def _run(model: nn.Module, batch: Any) -> Any:
    return model.test_step(batch) if hasattr(model, "test_step") else model(batch)


def _in_forward_order(model: nn.Module, pairs: list[tuple], data: Iterable, run: Callable) -> list[tuple]:
    """The pairs that run, in the order of their first calls, each with its number of calls per batch."""
    calls: dict[nn.Module, list[int]] = {}
    index = 0

    def count(layer: nn.Module, args: tuple) -> None:
        per_batch = calls.setdefault(layer, [])
        per_batch.extend([0] * (index + 1 - len(per_batch)))
        per_batch[index] += 1

    handles = [new.register_forward_pre_hook(count) for new, _, _ in pairs]
    try:
        for index, batch in enumerate(data):  # noqa: B007  read by count
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    known = {new: (new, old, activation) for new, old, activation in pairs}
    return [(*known[layer], per_batch) for layer, per_batch in calls.items()]


def _fit(model, new, old, activation, calls: list[int], data: Iterable, run: Callable) -> None:
    fit, seen = LineFit(new, old, activation), 0

    def look(layer: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> None:
        nonlocal seen
        if kwargs or len(args) > 1 or getattr(layer, "act", None):  # done in the same pass: y without it
            y = without_act(layer, args[0])
        fit.add(args[0], y)
        seen += 1
        if seen == wanted:
            raise _Reached

    handle = new.register_forward_hook(look, with_kwargs=True)
    try:
        for i, batch in enumerate(data):
            seen, wanted = 0, calls[i] if i < len(calls) else 0
            with contextlib.suppress(_Reached):
                run(model, batch)
    finally:
        handle.remove()
    fit.finish()
