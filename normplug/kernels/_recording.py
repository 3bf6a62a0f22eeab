"""What kernels would be started, without starting any: for the compiler, and for counting what it has to do."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from normplug.kernels import _launch

__all__ = ["Launch", "record", "resolve"]

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
NAMES |= {torch.int64: "i64", torch.int32: "i32"}


@dataclass(frozen=True)
class Launch:
    """A start of a kernel, as far as the compiler sees it: equal ones are one kernel to compile.

    Attributes:
        kernel: The function, as "module:name".
        signature: Name and type of each argument, "constexpr" for a constant.
        constants: Name and value of each constant; a function as "module:name".
        aligned: Positions of the arguments that are known to be multiples of 16.
        warps: Warps of a program.
    """

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    warps: int


def seen_by_compiler(kernel: Any, args: Sequence[Any], warps: int, constants: dict[str, Any]) -> Launch:
    """Specialize arguments as Triton does: None is a constant, allocations are aligned, and so on.

    What a kernel asks Triton not to look at is neither; other integers are constants if they are 1 and aligned if they
    are multiples of 16.
    """
    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | constants
    signature, fixed, aligned = [], [], []
    parameters = getattr(kernel, "params", ())  # the interpreter's have none
    left = {p.name for p in parameters if p.do_not_specialize}
    anywhere = {p.name for p in parameters if p.do_not_specialize_on_alignment}
    for i, name in enumerate(names):
        value, specialized = given[name], name not in left
        if name in constants or value is None or (type(value) is int and value == 1 and specialized):
            signature.append((name, "constexpr"))
            if hasattr(value, "fn"):  # a formula
                value = _name_of(value)
            fixed.append((name, value))
            continue
        if isinstance(value, torch.Tensor):
            signature.append((name, "*" + NAMES[value.dtype]))
            aligned += [] if name in anywhere else [i]
        elif isinstance(value, int):
            signature.append((name, "i32" if abs(value) < 2**31 else "i64"))
            aligned += [i] if value % 16 == 0 and specialized else []
        else:
            signature.append((name, "fp32"))
    return Launch(_name_of(kernel), tuple(signature), tuple(fixed), tuple(aligned), warps)


def _name_of(function: Any) -> str:
    return f"{function.fn.__module__}:{function.fn.__name__}"


def resolve(name: str) -> Any:
    """Return the function of a name, "module:name"."""
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


def record(call: Callable[[], Any]) -> list[Launch]:
    """Return what a call on tensors without memory, of the device "meta", would start."""
    caught: list[Launch] = []

    def catch(kernel: Any, _programs: int, *args: Any, warps: int = 4, **constants: Any) -> None:
        caught.append(seen_by_compiler(kernel, args, warps, constants))

    _launch.forget_plans()  # what was started directly would not be seen
    original, _launch.run = _launch.run, catch
    try:
        call()
    finally:
        _launch.run = original
    return caught
