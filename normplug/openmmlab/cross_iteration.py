"""CBN behind something that is no convolution, or hides its filters: said when the model is built.

In a training step the layer says it by itself, but then the data has been read and the GPUs are waiting. So the layer
before each CBN, where it is known, is tried on random numbers as soon as a model is built.
"""

import contextlib
import copy
import sys
import weakref

import torch
from torch import nn

from normplug.layers import CrossIterationBatchNorm

__all__ = ["check_cross_iteration"]

# Their forward is a convolution by the weight that they show.
PLAIN = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # parts are built, and looked at, before the whole


def check_cross_iteration(model: nn.Module) -> None:
    """Refuse a CBN that could not train behind the layer that is before it.

    Layers that will not be trained (``norm_eval=True``, frozen stages) are left alone, and so is what cannot be tried.

    Raises:
        ValueError: If one could not; it says which, and why.
    """
    evaluated = {part for m in model.modules() if getattr(m, "norm_eval", False) for part in m.modules()}
    for path, module in model.named_modules():
        for name, norm in module.named_children():
            if not isinstance(norm, CrossIterationBatchNorm) or norm in _seen or norm in evaluated:
                continue
            before = _before(module, name) if norm.training and norm.buffer_num else None
            if before and (reason := _refusal(module._modules[before])):
                inside = f"{path}." if path else ""
                raise ValueError(f"{inside}{name} cannot be CBN behind {inside}{before}. {reason}")
            _seen.add(norm)


def _before(owner: nn.Module, name: str) -> str | None:
    """Return the child whose output a norm gets, by the ways in which the toolkits name and order theirs."""
    names = list(owner._modules)
    earlier = names[: names.index(name)]
    if isinstance(owner, _conv_modules()):
        return "conv" if owner.order.index("norm") == owner.order.index("conv") + 1 else None
    if isinstance(owner, nn.Sequential):
        return earlier[-1] if earlier else None
    conv = "conv" + name[len(name.rstrip("0123456789")) :]
    return conv if conv in earlier else None


def _conv_modules() -> tuple[type, ...]:
    bricks = sys.modules.get("mmcv.cnn.bricks.conv_module")
    return () if bricks is None else (bricks.ConvModule,)


def _refusal(layer: nn.Module) -> str:
    """Return what CBN would say of the layer in its first step; nothing if it would train."""
    sizes = [getattr(layer, name, None) for name in ("in_channels", "kernel_size", "stride", "dilation")]
    weight = next(layer.parameters(), None)
    if type(layer).forward in PLAIN or None in sizes or weight is None or weight.is_meta:
        return ""
    channels, *geometry = sizes
    geometry = [(n,) * 2 if isinstance(n, int) else n for n in geometry]
    size = [d * (k - 1) + 1 + 3 * s for k, s, d in zip(*geometry, strict=False)]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        x = torch.randn(2, channels, *size).to(weight)
        y, trial = None, copy.deepcopy(layer).train()
        with contextlib.suppress(Exception):  # it wants something else, and its model will give it
            y = trial(x)
        if not isinstance(y, torch.Tensor) or y.ndim != x.ndim:
            return ""
        try:
            CrossIterationBatchNorm(y.shape[1], buffer_num=1).to(weight)(y)
        except ValueError as error:
            return str(error)
    return ""
