"""How a stand-in is registered, and what several of them need."""

import functools
import struct
from collections.abc import Callable, Sequence

import torch
import torchvision.ops  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor

from normplug.openmmlab._stand_ins import tell

OPS: dict[str, Callable] = {}


def op(function: Callable) -> Callable:
    """Register a stand-in under its own name."""
    # The compiled functions record no gradients: mmcv's autograd Functions call forward and backward.
    OPS[function.__name__] = torch.no_grad()(function)
    return OPS[function.__name__]


def slow_op(function: Callable) -> Callable:
    """Register a stand-in that is many times slower than the compiled function: its first call says so."""

    @functools.wraps(function)
    def told(*args, **kwargs):
        _tell_slow(function.__name__.removesuffix("_forward").removesuffix("_backward"))
        return function(*args, **kwargs)

    return op(told)


@functools.cache
def _tell_slow(name: str) -> None:
    tell(f"normplug: mmcv's op {name!r} runs as plain PyTorch: the same numbers, slower than the full mmcv's")


def missing_op(name: str) -> Callable:
    """Return what ``mmcv._ext.<name>`` is where there is no stand-in: a function that says so when called.

    Raises:
        AttributeError: If ``name`` begins with an underscore; no op does, but Python's own protocols do.
    """
    if name.startswith("_"):
        raise AttributeError(f"module 'mmcv._ext' has no attribute {name!r}")

    def unavailable(*args, **kwargs):
        raise NotImplementedError(
            f"mmcv's compiled op {name!r} was called, but this is mmcv-lite, and normplug's stand-in for "
            f"mmcv._ext has only: {', '.join(sorted(OPS))}. Install the full mmcv, which compiles it: "
            "'pip uninstall mmcv-lite', then 'pip install --no-binary mmcv --no-build-isolation mmcv==2.1.0' "
            "(it needs a C++ compiler, for the GPU also nvcc, and 10 minutes or more). normplug then uses it."
        )

    unavailable.__name__ = unavailable.__qualname__ = name
    return unavailable


def wide(x: Tensor) -> Tensor:
    """``x``, in float32 if it is in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def as_float32(value: float) -> float:
    """``value`` as mmcv's C++ signatures take it: 3/10 is not above float32(0.3), but above double 0.3."""
    return struct.unpack("f", struct.pack("f", value))[0]


def gradients(formula: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients of ``formula(*inputs)`` to all of ``inputs``, by autograd."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        return torch.autograd.grad(formula(*leaves), leaves, grad)


# ---- about the extension itself; the toolkits print these in their environment report


@op
def get_compiler_version() -> str:
    return "none (normplug's stand-in for mmcv._ext)"


@op
def get_compiling_cuda_version() -> str:
    return "none (normplug's stand-in for mmcv._ext)"
