"""Less memory: what a norm hands to the next convolution is computed again in backward instead of being kept."""

import weakref
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn

from normplug.layers.evonorm import EvoNormS0
from normplug.layers.filter_response_norm import FilterResponseNorm
from normplug.layers.group_norm import GroupNorm

__all__ = ["RecomputeNormsHook", "recompute_norms"]

# Norms whose output follows from their input alone: no running statistics, no other samples, the same bits again.
PURE = (GroupNorm, EvoNormS0, FilterResponseNorm)


def recompute_norms(model: nn.Module) -> nn.Module:
    """Let a model keep one tensor per convolution, norm and activation, not two.

    Backward of a convolution needs its input, which is the output of the norm before it; that one needs its own input
    and can be computed again from it. So the outputs of GN, EvoNormS0 and FRN are not stored: when backward asks for
    one, the layer runs again. Results are the same bits; the cost is one forward of each such norm. What a norm
    made from a residual too (the end of a residual block) is stored as before, and so is everything that something
    else changes in place. That includes the ReLU behind a norm where norms do not take it over: see
    ``normplug.openmmlab.adapt.fuse_activations``.

    Args:
        model: The model whose ``forward`` is run, as built; wrap it for distributed training afterwards.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: If the model has no such norm.
    """
    if not any(isinstance(m, PURE) for m in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no norm whose output can be computed again: GN, EvoNormS0 and FRN can; "
            f"BN, SyncBN and CBN depend on other samples. Leave recompute_norms out, or use one of these norms."
        )
    model.register_forward_pre_hook(_begin)
    model.register_forward_hook(_end, always_call=True)
    return model


@HOOKS.register_module()
class RecomputeNormsHook(Hook):
    """``recompute_norms`` as one line of a config: ``custom_hooks = [dict(type='RecomputeNormsHook')]``."""

    def before_run(self, runner) -> None:
        model = runner.model
        recompute_norms(model.module if is_model_wrapper(model) else model)


class _Again:
    """Stands in the graph for the output of a norm."""

    def __init__(self, norm: nn.Module, x: Tensor, act: str | None) -> None:
        self.norm, self.x, self.act = norm, x.detach(), act
        self.last: weakref.ref[Tensor] | None = None  # several consumers of one output often ask one after the other

    def output(self) -> Tensor:
        y = self.last() if self.last is not None else None
        if y is None:
            with torch.no_grad():
                y = self.norm(self.x) if self.act is None else self.norm(self.x, act=self.act)
            self.last = weakref.ref(y)
        return y


class _Recorder:
    """Remembers which tensors norms have returned while a model runs forward."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[int, tuple[weakref.ref[Tensor], int, _Again]] = {}
        self.saved = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self.hooks = [
            m.register_forward_hook(self._remember, with_kwargs=True) for m in model.modules() if isinstance(m, PURE)
        ]
        self.saved.__enter__()

    def close(self) -> None:
        self.saved.__exit__(None, None, None)
        for hook in self.hooks:
            hook.remove()
        self.outputs.clear()

    def _remember(self, norm: nn.Module, args: tuple, kwargs: dict[str, Any], y: Tensor) -> None:
        if torch.is_grad_enabled() and len(args) == 1 and kwargs.get("residual") is None:
            again = _Again(norm, args[0], kwargs.get("act"))
            self.outputs[y.data_ptr()] = weakref.ref(y), y._version, again

    def _pack(self, t: Tensor) -> Tensor | _Again:
        y, version, again = self.outputs.get(t.data_ptr(), (lambda: None, 0, None))
        own = y()  # alive: its memory has not been given to another tensor
        if own is None or t._version != version or t.shape != own.shape or t.stride() != own.stride():
            return t
        return again if t.dtype == own.dtype else t


def _unpack(packed: Tensor | _Again) -> Tensor:
    return packed.output() if isinstance(packed, _Again) else packed


_RECORDERS = "_normplug_recorders"


def _begin(model: nn.Module, _args: tuple) -> None:
    model.__dict__.setdefault(_RECORDERS, []).append(_Recorder(model))


def _end(model: nn.Module, _args: tuple, _result: Any) -> None:
    if model.__dict__.get(_RECORDERS):
        model.__dict__[_RECORDERS].pop().close()
