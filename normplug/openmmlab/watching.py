"""What the forward of a module calls, in which order and on whose results: a graph, without running a layer.

``torch.fx`` runs the code of the module alone, on stand-ins for tensors. Its children are not entered, so a graph has a
handful of nodes, needs no input of a known shape and takes milliseconds.
"""

import dis
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn

from normplug.openmmlab.classes import stock_class

__all__ = ["watch"]

# What a list of unknown length has: more than any list of modules that is gone through beside it.
MANY = 64


def watch(module: nn.Module, method: str = "forward", training: bool = True) -> fx.Graph:
    """Return the graph of what a method of a module's class does to the tensors, or lists of tensors, that it is given.

    Arguments with a default keep it. Where the code would checkpoint itself, it does not. What it sets on ``module``
    is taken back.

    Args:
        module: The module. A class that ``derive`` made counts as the one that it was made from.
        method: Name of the method.
        training: The mode in which it runs.

    Raises:
        Exception: Whatever the code raises on stand-ins: torch.fx.proxy.TraceError where what it does depends on values
            or sizes, and anything else.
    """
    derived, stock = type(module), stock_class(module)
    parameters = inspect.signature(getattr(stock, method)).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    attributes, buffers = dict(vars(module)), dict(module._buffers)
    module.__class__, module.training = stock, training
    try:
        try:
            return _OfOneModule(module, method).trace(module, defaults)
        except Exception as error:  # the code may raise anything where it expects a list
            try:
                return _OfOneModule(module, method, gives_lists=True).trace(module, defaults)
            except Exception:
                raise error from None
    finally:
        module.__class__ = derived
        vars(module).clear()
        vars(module).update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)


class _Value(fx.Proxy):
    requires_grad = False  # where it is True, blocks checkpoint themselves

    @property
    def shape(self) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr, (self, "shape"), {})

    @property
    def ndim(self) -> int:
        return self.dim()

    def dim(self) -> int:
        """Return the number of axes of an input: those that the convolutions take."""
        if self.tracer.axes is None or self.node.op != "placeholder":
            raise TypeError("how many axes there are depends on the input")
        return self.tracer.axes

    def __len__(self) -> int:
        count = MANY if self.node.op == "call_module" else self.tracer.count(self.node)
        if count is None:
            raise TypeError("how many values there are depends on the input")
        return count


class _OfOneModule(fx.Tracer):
    """Makes one node of each call of a submodule, and knows how many axes an input has that is a tensor."""

    def __init__(self, module: nn.Module, method: str, gives_lists: bool = False) -> None:
        super().__init__()
        self.traced_func_name, self.gives_lists = method, gives_lists
        convolution = next((m for m in module.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
        self.axes = None if convolution is None else 2 + len(convolution.kernel_size)
        channels = getattr(module, "in_channels", None)
        self.length = len(channels) if isinstance(channels, list | tuple) else 2

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args: Any = None) -> tuple[Any, list]:
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, arg in enumerate(args):
            if isinstance(arg, _Value) and arg.node.target.startswith("*"):  # of *args and **kwargs nothing is given
                args[i] = {} if arg.node.target.startswith("**") else ()
        if self.gives_lists:
            args = [[arg[i] for i in range(self.length)] if isinstance(arg, _Value) else arg for arg in args]
        return function, args

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Take what is asserted for true."""
        frame = inspect.currentframe().f_back.f_back  # behind Proxy.__bool__
        after = (i for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti)
        following = next(i for i in after if i.opname not in ("CACHE", "NOT_TAKEN", "POP_JUMP_IF_TRUE"))
        if following.opname == "LOAD_ASSERTION_ERROR" or following.argval is AssertionError:
            return True
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        """Give what a loop takes: of the sizes of an x as many as the convolutions have axes, of anything else many."""
        count = self.count(obj.node)
        return (obj[i] for i in range(MANY if count is None else count))

    def count(self, node: fx.Node) -> int | None:
        """Return how many sizes a node stands for, None if it stands for something else."""
        part = slice(None)
        if _name(node) == "getitem" and isinstance(node.args[1], slice):
            node, part = node.args
        is_shape = _name(node) == "getattr" and node.args[1] == "shape"
        is_shape = is_shape or (_name(node) == "size" and len(node.args) == 1)
        return len(range(self.axes)[part]) if is_shape and self.axes is not None else None


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
