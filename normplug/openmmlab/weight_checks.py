"""Whether weights can be used, and by this model: numbers with data, finite, of its names, shapes and kinds."""

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

import mmengine.runner
import mmengine.runner.checkpoint as mmengine_checkpoint
import torch
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from normplug.openmmlab.file_kinds import CheckpointError

__all__ = ["check_fit", "check_weights", "expect_whole_model", "install", "is_finite", "source", "weights_of"]

# The file that was read last, for messages: mmengine hands on its content only.
source: ContextVar[str] = ContextVar("normplug_source", default="The checkpoint")
# Why the next weights must be those of the whole model; empty if they may be a part.
_whole: ContextVar[str] = ContextVar("normplug_whole", default="")


def weights_of(checkpoint: Any, where: object = "The checkpoint") -> Mapping[str, Any]:
    """Return the state dict of a checkpoint: what is under ``state_dict``, or all of it.

    Raises:
        CheckpointError: If that is no dict of something by name.
    """
    weights = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{where} holds {_described(weights)} in place of weights. {_EXPECTED}")
    if not weights:
        raise CheckpointError(f"{where} holds no weights: its state_dict is empty. {_EXPECTED}")
    if wrong := [key for key in weights if not isinstance(key, str)]:
        raise CheckpointError(f"{where} has weights under {wrong[0]!r}, which is no name. {_EXPECTED}")
    return weights


def check_weights(
    weights: Mapping[str, Any], where: object = "The checkpoint", parameters: Iterable[str] | None = None
) -> list[str]:
    """Check that a state dict holds numbers that a model can compute with.

    Args:
        weights: The state dict.
        where: The file, for the message.
        parameters: Keys of what is learned. By default all that are floating-point and no running statistics.

    Returns:
        Remarks: running statistics that are not finite, with which a model can train on but not be evaluated.

    Raises:
        CheckpointError: If it holds anything but tensors, tensors without data, sparse or quantized ones, or learned
            values that are not finite.
    """
    tensors = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
    others = [key for key in weights if key not in tensors and not key.endswith("_extra_state")]
    if others:
        raise CheckpointError(
            f"{where} has {len(others)} entries among its weights that are no tensors, the first {others[0]!r}: "
            f"{_described(weights[others[0]])}. {_EXPECTED} If the weights are in there, the file is of another "
            "project, for which there is tools/convert_checkpoint.py (docs/checkpoints.md)."
        )
    for told, is_so in _UNUSABLE.items():
        if wrong := [key for key, value in tensors.items() if is_so(value)]:
            raise CheckpointError(f"{where} has {len(wrong)} {told}, the first {wrong[0]!r}. {_EXPECTED}")
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not is_finite(value)]
    learned = set(bad) - {key for key in bad if _is_statistic(key)} if parameters is None else set(bad) & {*parameters}
    if learned:
        first = next(key for key in bad if key in learned)
        raise CheckpointError(
            f"{where} has NaN or infinite values in {len(learned)} of its {len(tensors)} weights, the first {first!r}: "
            "the training that wrote it had diverged, or the file is damaged. Take an earlier checkpoint."
        )
    nan = [key for key in bad if tensors[key].isnan().any()]
    if not nan:
        return []
    return [
        f"{where} has NaN in {len(nan)} buffers, the first {nan[0]!r}: evaluation gives NaN until the running "
        "statistics are computed anew, which PreciseBNHook does."
    ]


_EXPECTED = "Expected: tensors by name, as torch.save(dict(state_dict=model.state_dict()), path) writes them."
_UNUSABLE = {
    "tensors without data (on the device 'meta')": lambda value: value.is_meta,
    "sparse tensors": lambda value: value.layout != torch.strided,
    "quantized tensors": lambda value: value.is_quantized,
}


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}, {str(value)[:40]!r}"


def is_finite(value: Tensor) -> bool:
    # min and max carry a NaN, and need no copy of the tensor
    if not value.numel():
        return True
    if value.element_size() == 1:  # float8 has neither
        value = value.float()
    low, high = value.detach().aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _is_statistic(key: str) -> bool:
    return key.endswith(("running_mean", "running_var"))


def prefix_between(keys: Iterable[str], others: Iterable[str]) -> tuple[str, str] | None:
    """Find what separates the names of two models that have none in common.

    Returns:
        The prefix that the first has before the second's names, and the other way round; None if no prefix does.
    """
    ends: dict[str, list[str]] = {}
    for key in others:
        ends.setdefault(key.rpartition(".")[2], []).append(key)
    found: Counter[tuple[str, str]] = Counter()
    for key in keys:
        for other in ends.get(key.rpartition(".")[2], ())[:1000]:
            if key.endswith(f".{other}"):
                found[key.removesuffix(other), ""] += 1
            elif other.endswith(f".{key}"):
                found["", other.removesuffix(key)] += 1
    return found.most_common(1)[0][0] if found else None


def check_fit(model: nn.Module, weights: Mapping[str, Tensor], where: object = "The checkpoint") -> None:
    """Check that some of a checkpoint is for this model, and numbers that it can take.

    Raises:
        CheckpointError: If no key fits, or learned values come as integers, truth values or complex numbers.
    """
    own = model.state_dict()
    if not own:
        return
    common = own.keys() & weights.keys()
    if not common:
        raise CheckpointError(
            f"None of the {len(weights)} weights of {where} is one of the model's {len(own)}: the file has "
            f"{_some(weights)}, the model {_some(own)}. {_guess(weights, own)}"
        )
    for key in common:
        value, mine = weights[key], own[key]
        if isinstance(mine, Tensor) and mine.is_floating_point() and not value.is_floating_point():
            raise CheckpointError(
                f"{where} has {key!r} as {value.dtype}, and the model learns it as {mine.dtype}: the values would be "
                f"cast, and most of them lost. {_EXPECTED}"
            )


def _some(weights: Iterable[str]) -> str:
    names = list(weights)
    return ", ".join(map(repr, names[:2])) + (", ..." if len(names) > 2 else "")


def _guess(weights: Iterable[str], own: Iterable[str]) -> str:
    prefixes = prefix_between(weights, own)
    if prefixes is None:
        return "It is a checkpoint of another architecture; give the one of this config."
    theirs, ours = prefixes
    if theirs:
        return (
            f"The names agree behind the file's {theirs!r}. To initialize a part of a model by a whole one's "
            f"checkpoint: init_cfg=dict(type='Pretrained', checkpoint=..., prefix={theirs!r}). Else take the prefix "
            "off the keys."
        )
    return (
        f"The names agree behind the model's {ours!r}: the file is for that part of it. Load it there: "
        f"{ours.rstrip('.').replace('.', '=dict(')}=dict(init_cfg=dict(type='Pretrained', checkpoint=...)"
        f"{')' * ours.count('.')}."
    )


# ---- where mmengine loads weights


def expect_whole_model(why: str) -> None:
    """Have the next weights that mmengine loads refused if the model has others, or of other shapes, besides.

    Args:
        why: What goes wrong with a part, for the message.
    """
    _whole.set(why)


def _checking(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_checked(module: nn.Module, state_dict: dict, *args: Any, **kwargs: Any) -> Any:
        why, where = _whole.get(), source.get()
        _whole.set("")
        model = module
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        for remark in check_weights(state_dict, where, [name for name, _ in model.named_parameters()]):
            print_log(f"normplug: {remark}", "current", logging.WARNING)
        check_fit(model, state_dict, where)
        missing: list[str] = []
        hooks = model._load_state_dict_post_hooks  # mmengine calls what is in it, and some put a plain dict there
        hooks[load_checked] = lambda _, keys: missing.extend(keys.missing_keys)
        try:
            result = load(module, state_dict, *args, **kwargs)
        finally:
            del hooks[load_checked]
        reshaped = _reshaped(model, state_dict)
        if why and (left := "; ".join(filter(None, [_absent(model, missing), reshaped]))):
            raise CheckpointError(f"{where} is not of this model: {left}. {why}")
        if reshaped:  # mmengine has said what is missing, and this in a long list
            print_log(f"normplug: of {where}: {reshaped}: they keep their initial values", "current", logging.WARNING)
        return result

    load_checked.checks = True
    return load_checked


def _absent(model: nn.Module, missing: list[str]) -> str:
    """Say which weights a state dict did not have."""
    parameters = dict(model.named_parameters())
    absent = [key for key in missing if key in parameters or _is_statistic(key)]
    return f"it lacks {len(absent)} of the model's {len(parameters)} weights ({_some(absent)})" if absent else ""


def _reshaped(model: nn.Module, state_dict: Mapping[str, Tensor]) -> str:
    """Say which weights have another shape in a state dict."""
    own = model.state_dict()
    reshaped = [key for key in own if key in state_dict and own[key].shape != state_dict[key].shape]
    told = [
        f"{key!r} is {tuple(own[key].shape)} in the model and {tuple(state_dict[key].shape)} in the file"
        for key in reshaped[:2]
    ]
    if len(reshaped) > 2:
        told.append(f"{len(reshaped) - 2} more differ")
    heads = any(word in key for key in reshaped for word in ("cls", "fc", "logits", "seg"))
    return ", ".join(told) + (" (another num_classes?)" if heads else "")


def install() -> None:
    """Have every state dict that mmengine loads checked: of load_from, --resume, init_cfg, inferencers."""
    if not hasattr(mmengine_checkpoint.load_state_dict, "checks"):
        checking = _checking(mmengine_checkpoint.load_state_dict)
        mmengine_checkpoint.load_state_dict = mmengine.runner.load_state_dict = checking
