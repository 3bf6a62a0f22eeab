"""How an op is made known to torch: its schema, what runs on which device, and its gradient.

``torch.library.custom_op`` would do, but for the time its layers of Python take around every call: twice that of the
whole of torch's own group norm.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd
from torch._library import autograd
from torch.autograd import forward_ad

__all__ = [
    "KERNELS",
    "UNCAPTURABLE",
    "below_autograd",
    "define",
    "differentiable",
    "has_triton",
    "in_torch",
    "is_exporting",
    "is_recorded",
    "pull_back",
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

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


def is_recorded() -> bool:
    """Tell whether torch.jit traces or torch.export exports what is called."""
    return is_exporting() if torch.compiler.is_compiling() else torch.jit.is_tracing()


def in_torch() -> bool:
    """Tell whether a call shall go to an op's formula, in torch's operations, and not to the op.

    That is so for whoever has rules for the former only: ``torch.func`` (jvp, vmap, gradients of gradients), forward
    mode, and what is recorded for others to run, who have no op of ours.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or is_recorded()


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
    """Give an op its gradient, as ``torch.library.register_autograd`` does: save(ctx, inputs, output), backward.

    Forward mode raises an error, where torch would lose the tangents without a word.
    """
    run = autograd.make_autograd_impl(op, autograd.Info(_backward_fn=backward, _setup_context_fn=save))

    def run_unless_dual(keyset, *args, **kwargs):
        if forward_ad._current_level >= 0 and has_tangent(args):
            raise RuntimeError(
                f"{op._schema.name} has no forward-mode gradient. Call it through its function in normplug.ops, which "
                f"uses torch's own operations there."
            )
        return run(keyset, *args, **kwargs)

    _LIBRARY.impl(op._schema.name.partition("::")[2], run_unless_dual, "Autograd", with_keyset=True)


def has_tangent(args: Iterable[Any]) -> bool:
    """Tell whether a tensor among the arguments of an op, or in a list of them, is a dual number of forward mode."""
    for arg in args:
        if isinstance(arg, Tensor):
            if forward_ad.unpack_dual(arg).tangent is not None:
                return True
        elif isinstance(arg, (list, tuple)) and has_tangent(arg):
            return True
    return False


def without_gradient(op: Op) -> Callable[..., Any]:
    """Let an op, the gradient of another for example, raise an error where its own is asked for; return how to call it.

    Calls pass by autograd where nobody asks.
    """

    def refuse(ctx, *_):
        raise RuntimeError(
            f"{op._schema.name} has no gradient: no autograd formula was registered for it. Second derivatives of a "
            f"layer of normplug are to be had from its formula in torch's own operations."
        )

    register_gradient(op, lambda ctx, inputs, output: None, refuse)
    run = _runner(op)

    def call(*args: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or forward_ad._current_level >= 0
            or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args))
        ):
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
    op: Op,
    formula: Callable[..., Any],
    save: Callable[..., None],
    recall: Callable[[Any], tuple[Any, ...]],
    backward: Callable[..., Any],
    wanted: int = 1,
) -> Callable[..., Any]:
    """Give an op its gradient, and return how to call it.

    Args:
        op: What ``define`` returned.
        formula: The op's first result, or a tuple that begins with it, from its arguments, in torch's operations:
            where gradients have gradients.
        save: (ctx, inputs, output) -> None, which keeps for backward what it needs.
        recall: ctx -> arguments of the formula, from what was kept: their gradients are those of the op.
        backward: (ctx, *gradients of the results) -> gradients of the inputs.
        wanted: How many results the caller gets; only the first has a gradient.

    Returns:
        A function with the op's arguments and its first result, or so many in a tuple. In eager mode it goes to one
        ``torch.autograd.Function`` directly. Compilers see the op and the gradient that is registered for it: the same
        functions. ``in_torch`` tells where to call the formula in its place.
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
            if torch.is_grad_enabled() or in_torch():
                return pull_back(formula, recall(ctx), ctx.needs_input_grad, dy)
            return backward(ctx, dy, *others_gradients)

    Eager.__name__ = Eager.__qualname__ = op._schema.name.partition("::")[2]  # as it stands in the grad_fn of results

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
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


def pull_back(
    formula: Callable[..., Any], args: Sequence[Any], needed: Sequence[bool], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of arguments from that of a formula's first result: such as have gradients themselves.

    Args:
        formula: Returns a tensor, or a tuple that begins with it.
        args: What it is called with.
        needed: Of which of them, tensors, the gradient is wanted; it is None for the others.
        dy: Gradient of the result.
    """
    with torch.enable_grad():
        # Views: what else arguments have to do with each other is not the formula's.
        views = [arg.view_as(arg) if need else arg for arg, need in zip(args, needed, strict=True)]
        result = formula(*views)
    y = result[0] if isinstance(result, tuple) else result
    wanted = [view for view, need in zip(views, needed, strict=True) if need]
    gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return tuple(next(gradients) if need else None for need in needed)
