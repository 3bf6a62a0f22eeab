"""Checks of settings and input that several layers share."""

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from types import NoneType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from normplug.ops._common import DTYPES, check_act, check_tensor

__all__ = ["check_channels", "check_has_statistics", "checked", "has_single_values"]

# Settings that are no number of 1 or more (integers), or of 0 or more (other numbers).
LEAST = {"buffer_num": 0, "burnin": 0, "correction": 0, "padding": 0}
MOST = {"momentum": 1, "rho": 1}


def checked(init: Callable[..., None]) -> Callable[..., None]:
    """Decorate a layer's ``__init__`` so that it takes settings of the kind that their annotations name, in range.

    Integers must not be True or 8.0, numbers must be finite, flags must not be 'False'; ``LEAST`` and ``MOST`` have the
    ranges. Numbers of other packages (numpy) arrive as Python's. What has no such annotation is handed on.

    Raises:
        ValueError: By the decorated function, if a setting is of another kind or out of its range.
    """
    parameters = inspect.signature(init).parameters
    names = list(parameters)[1:]

    @functools.wraps(init)
    def init_checked(self, *args, **kwargs) -> None:
        def plain(name: str, value: Any) -> Any:
            return _setting(type(self).__name__, parameters[name], value) if name in parameters else value

        args = tuple(plain(name, value) for name, value in zip(names, args, strict=False)) + args[len(names) :]
        init(self, *args, **{name: plain(name, value) for name, value in kwargs.items()})

    return init_checked


def _setting(layer: str, parameter: inspect.Parameter, value: Any) -> Any:
    """Return a setting as the constructor's own code may use it."""
    name, kinds = parameter.name, get_args(parameter.annotation) or (parameter.annotation,)
    expected = None
    if name == "act":
        check_act(value)
    elif name == "dtype" and value is not None and not any(value is known for known in DTYPES):
        expected = "torch.float16, bfloat16, float32 or float64"
    elif (value is None and NoneType in kinds) or (isinstance(value, str) and str in kinds):
        pass  # words have their own checks
    elif bool in kinds:
        # numpy's bool, of one name or the other, is no number
        if isinstance(value, numbers.Integral) or type(value).__name__ in ("bool", "bool_"):
            value = bool(value) if value in (0, 1) else value
        expected = None if isinstance(value, bool) else "True or False"
    elif int in kinds:
        least = LEAST.get(name, 1)
        several = any(kind not in (int, str, NoneType) for kind in kinds) and isinstance(value, (tuple, list))
        if all(_is_number(part, numbers.Integral) and part >= least for part in (value if several else [value])):
            value = type(value)(map(_plain_int, value)) if several else _plain_int(value)
        else:
            expected = f"{'integers' if several else 'an integer'} of {least} or more"
    elif float in kinds:
        most = MOST.get(name, math.inf)
        if _is_number(value, numbers.Real) and 0 <= value <= most and math.isfinite(value):
            value = value if type(value) in (int, float) else float(value)
        else:
            expected = "a finite number of 0 or more" if most == math.inf else f"a number from 0 to {most}"
    elif kinds == (str,):
        expected = "a word"
    if expected is not None:
        choices = [*(["None"] if NoneType in kinds else []), *(["'auto'"] if "groups" in name and str in kinds else [])]
        raise ValueError(
            f"{layer} takes {' or '.join([expected, *choices])} as {name}, but got {name}={value!r}. "
            f"{_remedy(parameter, value)}"
        )
    return value


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # True is one to Python


def _plain_int(value: Any) -> int:
    return value if isinstance(value, int) else int(value)


def _remedy(parameter: inspect.Parameter, value: Any) -> str:
    name, default = parameter.name, parameter.default
    if isinstance(value, float) and value.is_integer() and value >= 1 and parameter.annotation is not bool:
        return f"Write {name}={int(value)}."
    if default is None or default is inspect.Parameter.empty:
        return f"Correct {name} where the layer is built."
    return f"Correct it, or leave it out for {name}={default!r}."


def check_channels(layer: nn.Module, x: Tensor, num_features: int, name: str = "num_features") -> None:
    """Raise TypeError if x is no dense floating-point tensor, ValueError if axis 1 of it is not num_features long."""
    if isinstance(x, Proxy):
        return  # it stands for tensors of any size
    kind = type(layer).__name__
    check_tensor(kind, x)
    if x.ndim < 2:
        raise ValueError(
            f"{kind} expects an input of 2 axes or more, (N, C) and any spatial ones behind them, but got "
            f"{x.ndim}: {tuple(x.shape)}. Add the missing axes with unsqueeze."
        )
    if (x.shape[1] != num_features) is True:  # a traced length is a tensor, which is not asked
        rest = ", *" if x.ndim > 2 else ""
        raise ValueError(
            f"{kind} was built with {name}={num_features}, so it expects input of shape (N, {num_features}{rest}), "
            f"but got {tuple(x.shape)}. Channels sit on axis 1: permute a channels-last tensor, or build the "
            f"layer with {name}={x.shape[1]}."
        )


def has_single_values(x: Tensor) -> bool:
    """Tell whether every channel of a sample is a single value; False while a graph is made for inputs of any size."""
    if isinstance(x, Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return x.numel() == x.shape[0] * x.shape[1] > 0


def check_has_statistics(layer: nn.Module, x: Tensor, count: int) -> None:
    """Raise ValueError if a batch offers one value per channel to statistics over it: its variance would be 0."""
    if count == 1:
        running = "call .eval() to use the running statistics" if layer.training else "build it with running statistics"
        raise ValueError(
            f"{type(layer).__name__} takes its statistics over the batch and cannot do so on a single value per "
            f"channel: got an input of shape {tuple(x.shape)}. Use more samples or larger maps, {running}, or "
            f"choose a layer without batch statistics such as GN."
        )
