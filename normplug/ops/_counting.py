"""For counters of floating-point operations that go by a trace: mmengine's and fvcore's, whose code is one."""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["is_counted"]


def is_counted(op: torch._ops.OpOverload, weight: int) -> bool:
    """Tell whether such a counter is making the trace; it is told what a call of the op costs then.

    It knows nothing of a norm that is spelled out in sums and products. The op as a whole counts as group norm does,
    five operations per value, or four without a weight.

    Args:
        op: A norm whose first argument is its input.
        weight: Which argument is its weight.
    """
    if not torch.jit.is_tracing():
        return False
    frame = sys._getframe(1)
    while frame is not None:
        counter = frame.f_locals.get("self") if frame.f_code.co_name == "_analyze" else None
        if "Flop" in type(counter).__name__ and isinstance(getattr(counter, "_op_handles", None), dict):
            counter._op_handles.setdefault(op._schema.name, _cost(weight))
            return True
        frame = frame.f_back
    return False


def _cost(weight: int) -> Callable[[list[Any], list[Any]], int]:
    def cost(inputs: list[Any], outputs: list[Any]) -> int:
        return (5 if inputs[weight].isCompleteTensor() else 4) * math.prod(inputs[0].type().sizes())

    return cost
