"""What a run saves, in the types that torch's safe unpickler reads, and back.

``torch.load(weights_only=True)`` takes tensors, numbers, text and plain containers. A checkpoint of mmengine holds
more: histories, arrays and numbers of numpy (a best score, a palette), whatever hooks and schedulers keep, and
functions (``OneCycleLR`` remembers how it anneals). Here the first become plain values that carry what they were under
``KIND``; functions are code, which the run that goes on has itself, and are left out of the schedulers' state.
"""

import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from torch import Tensor

__all__ = ["FACTORIES", "KIND", "as_plain", "from_plain", "without_code"]

KIND = "normplug.kind"  # the key by which a dict says that it stands for something else
_LEAVES = (type(None), bool, int, float, complex, str, bytes, bytearray, Tensor, torch.Size, torch.dtype, torch.device)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)
# What a defaultdict may make
FACTORIES = {kind.__name__: kind for kind in (int, float, bool, str, list, dict, set)}
_told: set[tuple[str, str]] = set()


def as_plain(checkpoint: Any) -> Any:
    """Return a checkpoint as `torch.load` reads it with ``weights_only=True``; the one given stays as it is.

    What has no plain form, an object of a class of the user's, is saved as it is, and a warning names it.
    """
    if isinstance(checkpoint, dict) and "param_schedulers" in checkpoint:
        checkpoint = {**checkpoint, "param_schedulers": without_code(checkpoint["param_schedulers"], is_code)}
    foreign: list[tuple[str, str]] = []
    plain = _Plain(foreign).of(checkpoint, "checkpoint")
    for where, kind in foreign:
        if (where, kind) not in _told:
            _told.add((where, kind))
            module, _, name = kind.partition(":")
            print_log(
                f"{where} holds a {module}.{name}, which is saved as it is, and a checkpoint with it is refused when "
                f"it is loaded. Keep plain values there (numbers, text, lists, dicts, tensors, arrays), or run "
                f"import {module}; torch.serialization.add_safe_globals([{module}.{name}]) before going on from it.",
                "current",
                level=30,
            )
    return plain


def is_code(value: Any) -> bool:
    """Whether a value is a function, a class, or an object that is called: nothing that a file should bring."""
    return isinstance(value, _CODE) or (callable(value) and not isinstance(value, Tensor | torch.dtype))


def without_code(schedulers: Any, is_code: Callable[[Any], bool]) -> Any:
    """Return the states of parameter schedulers without what is code: ``load_state_dict`` leaves their own then.

    Args:
        schedulers: A list of states, or a dict of such lists, one for each optimizer.
        is_code: Tells what is code.
    """
    if isinstance(schedulers, dict) and all(isinstance(states, list) for states in schedulers.values()):
        return {name: without_code(states, is_code) for name, states in schedulers.items()}
    if not isinstance(schedulers, list):
        return schedulers
    return [
        {name: value for name, value in state.items() if not _has_code(value, is_code)}
        if isinstance(state, dict)
        else state
        for state in schedulers
    ]


def _has_code(value: Any, is_code: Callable[[Any], bool]) -> bool:
    stack, seen = [value], set()
    while stack:
        value = stack.pop()
        if isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            stack.extend(value.values() if isinstance(value, dict) else value)
        elif is_code(value):
            return True
    return False


class _Plain:
    """One pass through a checkpoint; notes in ``foreign`` where it met what has no plain form."""

    def __init__(self, foreign: list[tuple[str, str]]) -> None:
        self.foreign = foreign
        self.done: dict[int, tuple[Any, Any]] = {}  # containers by their id; held, so that no id is given twice

    def of(self, value: Any, where: str) -> Any:
        if type(value) in _LEAVES:
            return value
        if isinstance(value, dict | list | tuple | set | frozenset | deque):
            if id(value) not in self.done:
                self.done[id(value)] = value, value  # one that holds itself
                self.done[id(value)] = value, self._container(value, where)
            return self.done[id(value)][1]
        if isinstance(value, Tensor):  # a Parameter, or a class that its owner has to allow
            return value
        if isinstance(value, HistoryBuffer):
            return _history(value)
        if isinstance(value, np.generic):
            return _scalar(value)
        if isinstance(value, np.ndarray) and (value.dtype.kind == "U" or _as_tensor(value) is not None):
            return _array(value)
        if isinstance(value, np.dtype) and not value.hasobject:
            return {KIND: "dtype", "data": value.str}
        if isinstance(value, PurePath):
            return str(value)
        for kind in (int, float, str):  # an IntEnum is its number
            if isinstance(value, kind):
                return kind.__str__(value) if kind is str else kind(value)
        cls = value if isinstance(value, _CODE) else type(value)
        self.foreign.append((where, f"{getattr(cls, '__module__', '?')}:{getattr(cls, '__qualname__', cls)}"))
        return value

    def _container(self, value: Any, where: str) -> Any:
        if isinstance(value, dict):
            items = [(self.of(key, where), self.of(item, f"{where}[{key!r}]")) for key, item in value.items()]
            same = all(a is k and b is v for (a, b), (k, v) in zip(items, value.items(), strict=True))
            if type(value) in (dict, OrderedDict, Counter) and same:
                return value
            if isinstance(value, defaultdict):
                factory = getattr(value.default_factory, "__name__", None)
                known = FACTORIES.get(factory) is value.default_factory
                return {KIND: "defaultdict", "data": dict(items), "factory": factory} if known else dict(items)
            plain = type(value)() if type(value) in (OrderedDict, Counter) else {}
            plain.update(items)
            if type(value) is OrderedDict:
                plain.__dict__.update(vars(value))  # the _metadata of a state dict
            return plain
        items = [self.of(item, f"{where}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, deque):
            return {KIND: "deque", "data": items, "maxlen": value.maxlen}
        kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
        if kind is type(value) is not frozenset and all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return set(items) if kind is frozenset else kind(items)


def _history(buffer: HistoryBuffer) -> dict:
    row = {"log_history": buffer._log_history, "count_history": buffer._count_history}
    # As tensors: a list of a million floats takes the safe unpickler seconds, a tensor none.
    plain = {name: torch.from_numpy(a) if a.dtype.kind in "biuf" else a.tolist() for name, a in row.items()}
    return {**plain, "max_length": buffer.max_length}


def _as_tensor(array: np.ndarray) -> Tensor | None:
    try:  # a copy in native byte order: torch takes no other, and warns of arrays that cannot be written to
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    except (TypeError, ValueError):  # longdouble, dates, records, objects
        return None


def _array(array: np.ndarray) -> dict:
    if array.dtype.kind == "U":
        return {KIND: "array", "data": array.tolist(), "dtype": array.dtype.str}
    return {KIND: "array", "data": _as_tensor(array)}


def _scalar(value: np.generic) -> Any:
    """Python's own numbers compute as float64 and int64 do. A float32 stays one: it rounds, and a schedule with it."""
    if isinstance(value, np.str_) or value.dtype in (np.float64, np.int64, np.bool_, np.complex128):
        return value.item()
    tensor = _as_tensor(np.array(value))
    return value.item() if tensor is None else {KIND: "number", "data": tensor}


def from_plain(stored: dict) -> Any:
    """Return what a dict with ``KIND`` stands for.

    Raises:
        ValueError: If it is none of those that `as_plain` makes: a file may hold anything.
    """
    data = stored.get("data")
    match stored[KIND]:
        case "array" if isinstance(data, Tensor):
            return data.cpu().numpy()  # map_location may have sent it to the GPU with everything else
        case "array" if str(stored.get("dtype"))[1:2] == "U":
            return np.array(data, dtype=str(stored["dtype"]))
        case "number" if isinstance(data, Tensor) and data.ndim == 0:
            return data.cpu().numpy()[()]
        case "dtype" if isinstance(data, str):
            return np.dtype(data)
        case "deque" if isinstance(data, list) and isinstance(stored.get("maxlen"), int | None):
            return deque(data, stored["maxlen"])
        case "defaultdict" if isinstance(data, dict) and stored.get("factory") in FACTORIES:
            return defaultdict(FACTORIES[stored["factory"]], data)
    raise ValueError(f"a part of unknown kind {stored[KIND]!r}")
