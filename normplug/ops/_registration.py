"""How an op is made known to torch: its schema, what runs on which device, and its gradient.

``torch.library.custom_op`` would do, but for the time its layers of Python take around every call: twice that of the
whole of torch's own group norm.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch._C import _AutoDispatchBelowAutograd

__all__ = [
    "KERNELS",
    "UNCAPTURABLE",
    "below_autograd",
    "define",
    "differentiable",
    "has_triton",
    "register_gradient",
    "use_kernel",
    "without_gradient",
]

_LIBRARY = torch.library.Library("normplug", "FRAGMENT")
# Name of each op that has a kernel -> what runs on CUDA: the benchmark of host time lets it run elsewhere.
KERNELS: dict[str, Callable[..., Any]] = {}

# Tags of an op that a replayed CUDA graph would repeat wrongly, so that compilers leave it out: one since torch 2.8.
UNCAPTURABLE = tuple(tag for name, tag in torch.Tag.__members__.items() if name == "cudagraph_unsafe")

# Tensors of an index from here on are on a GPU; the benchmark of host time has none.
FIRST_DEVICE = 0
_PLAIN = (torch.Tensor, torch.nn.Parameter)

# From here on torch calls what an op does and not its gradient: for code that looks after the gradient itself.
below_autograd = _AutoDispatchBelowAutograd

Op = torch._ops.OpOverload


def define(
    name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    schema: str | None = None,
    capturable: bool = True,
) -> Op:
    """Make an op of a function and return it as ``torch.ops.normplug.name``.

    Args:
        name: What it is called.
        reference: What it does, on every device; it returns new tensors that share no memory.
        fake: Returns tensors as the reference does, uninitialized: shapes, dtypes and strides for compilers.
        schema: Arguments and results in torch's notation; read off the annotations of the reference unless given.
        capturable: False if it takes from the host what a replayed CUDA graph would miss: compilers leave it out then.
    """
    tags = (torch.Tag.pt2_compliant_tag, *(() if capturable else UNCAPTURABLE))
    _LIBRARY.define(name + (schema or torch.library.infer_schema(reference, mutates_args=())), tags=tags)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"normplug::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.normplug, name).default


def use_kernel(op: Op, reference: Callable[..., Any], kernel: str) -> None:
    """Let an op run a Triton kernel on CUDA, for half and single precision; double precision stays with ATen.

    Args:
        op: What ``define`` returned.
        reference: Its implementation for every device.
        kernel: File and function in ``normplug.kernels`` with the arguments and results of the reference,
            "group_norm.forward". Imported on first use: CPU-only machines need no Triton.
    """
    file, function = kernel.split(".")
    start: Callable[..., Any] | None = None

    def launch(*args: Any) -> Any:
        nonlocal start
        x = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if x.dtype == torch.float64 or not has_triton():
            return reference(*args)
        if start is None:
            start = getattr(importlib.import_module(f"normplug.kernels.{file}"), function)
        device = x.get_device()
        if device < 0 or device == torch._C._cuda_getDevice():
            return start(*args)
        with torch.cuda.device(device):  # Triton launches on the current device, wherever the tensors are
            return start(*args)

    name = op._schema.name.partition("::")[2]
    KERNELS[name] = launch
    _LIBRARY.impl(name, launch, "CUDA")


@functools.cache
def has_triton() -> bool:
    """Tell whether Triton is installed: it comes with torch on Linux, elsewhere ATen does its work."""
    return importlib.util.find_spec("triton") is not None


def register_gradient(op: Op, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give an op its gradient, as ``torch.library.register_autograd`` does: save(ctx, inputs, output), backward."""
    torch.library.register_autograd(op._schema.name, backward, setup_context=save, lib=_LIBRARY)


def without_gradient(op: Op) -> Callable[..., Any]:
    """Let an op, the gradient of another for example, raise an error where its own is asked for; return how to call it.

    Calls pass by autograd where nobody asks.
    """
    name = op._schema.name

    def refuse(ctx, *_):
        raise RuntimeError(
            f"{name} has no gradient: no autograd formula was registered for it. Second derivatives of a layer of "
            f"normplug are to be had from its formula in torch's own operations."
        )

    torch.library.register_autograd(name, refuse, lib=_LIBRARY)
    run = _runner(op)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return op(*args)
        return run(*args)

    return call


def _runner(op: Op) -> Callable[..., Any]:
    """Return how to run an op where its gradient is looked after: below autograd, or its kernel without torch's help.

    The dispatcher leads from a tensor to the kernel of its device and past whoever listens: where nobody does, that is
    time for nothing.
    """
    name = op._schema.name.partition("::")[2]

    def run(*args: Any) -> Any:
        x = args[0]
        if torch._C._are_functorch_transforms_active():  # then tensors may stand for others
            return op(*args)
        if (
            type(x) in _PLAIN
            and x.get_device() >= FIRST_DEVICE
            and not torch._C._len_torch_dispatch_stack()
            and not torch.autograd._profiler_enabled()
            and (kernel := KERNELS.get(name)) is not None
        ):
            return kernel(*args)
        with below_autograd():
            return op(*args)

    return run


def differentiable(
    op: Op, save: Callable[..., None], backward: Callable[..., Any], wanted: int = 1
) -> Callable[..., Any]:
    """Give an op its gradient, and return how to call it.

    Args:
        op: What ``define`` returned.
        save: (ctx, inputs, output) -> None, which keeps for backward what it needs.
        backward: (ctx, *gradients of the results) -> gradients of the inputs.
        wanted: How many results the caller gets; only the first has a gradient.

    Returns:
        A function with the op's arguments and its first result, or so many in a tuple. In eager mode it goes to one
        ``torch.autograd.Function`` directly. Compilers and ``torch.func`` see the op and the gradient that is
        registered for it: the same functions.
    """
    register_gradient(op, save, backward)
    run = _runner(op)
    results = len(op._schema.returns)
    many, others_gradients = results > 1, (None,) * (results - 1)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = run(*inputs)
            save(ctx, inputs, output)
            ctx.set_materialize_grads(False)
            # In a tuple results pass by autograd, which would make tensors with a gradient of them.
            return (output[0], output[1:]) if many else output

        @staticmethod
        def backward(ctx, dy, *_):
            if dy is None:
                return (None,) * len(ctx.needs_input_grad)
            return backward(ctx, dy, *others_gradients)

    Eager.__name__ = Eager.__qualname__ = op._schema.name.partition("::")[2]  # as it stands in the grad_fn of results

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
            output = op(*args)
            return (output[0] if wanted == 1 else output[:wanted]) if many else output
        if not torch.is_grad_enabled():
            output = run(*args)
            return (output[0] if wanted == 1 else output[:wanted]) if many else output
        output = Eager.apply(*args)
        if not many:
            return output
        y, others = output
        return y if wanted == 1 else (y, *others[: wanted - 1])

    return call
