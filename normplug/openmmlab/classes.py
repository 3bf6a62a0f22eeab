"""Whose class a module has, and other methods for one module: what ``adapt`` and what it consists of share."""

import functools
import sys

from mmengine.config.utils import MODULE2PACKAGE
from torch import nn

__all__ = [
    "derive",
    "imported",
    "is_list",
    "is_ours",
    "is_sequence",
    "is_toolkits",
    "keeps_forward",
    "owner_of",
    "stock_class",
]

# Not mmengine: the classes that users write derive from its BaseModule too.
TOOLKITS = frozenset(MODULE2PACKAGE) | {"mmcv"}


def is_ours(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("normplug.layers.") for cls in type(module).__mro__)


def is_toolkits(module: nn.Module) -> bool:
    """Whether a class of OpenMMLab is among the module's."""
    return any(cls.__module__.partition(".")[0] in TOOLKITS for cls in type(module).__mro__)


def is_list(module: nn.Module) -> bool:
    """Whether a module holds others and does nothing itself: without a forward, as a ModuleList."""
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and stock_class(module).forward is nn.ModuleList.forward


def is_sequence(module: nn.Module) -> bool:
    """Whether a module calls one of its children behind the other, and has no forward of its own."""
    return isinstance(module, nn.Sequential) and stock_class(module).forward is nn.Sequential.forward


def owner_of(path: str, root: nn.Module) -> nn.Module:
    """Return the module at ``path``, or for a container the nearest module around it that is none."""
    module = root.get_submodule(path)
    while path and (is_list(module) or is_sequence(module)):
        path = path.rpartition(".")[0]
        module = root.get_submodule(path)
    return module


def imported(where: str, *names: str) -> tuple[type, ...]:
    """Return the named classes of a module if somebody has imported it: before that, no object can have them."""
    return tuple(getattr(sys.modules[where], name) for name in names) if where in sys.modules else ()


def keeps_forward(module: nn.Module, where: str, *names: str) -> bool:
    """Whether the module derives from one of the named classes and has not replaced its forward."""
    return any(
        isinstance(module, cls) and stock_class(module).forward is cls.forward for cls in imported(where, *names)
    )


def stock_class(module: nn.Module) -> type:
    """Return the class that a module had before ``derive``."""
    return getattr(module, "_stock_class", type(module))


def derive(module: nn.Module, mixin: type, outermost: bool = False) -> None:
    """Give one module the methods of ``mixin``: the same object, parameters and names, a class derived from its.

    Methods of mixins that it has already call those of ``mixin`` by ``super()``, or, ``outermost``, are called by them.
    """
    if not isinstance(module, mixin):
        mixins = getattr(module, "_mixins", ())
        module.__class__ = _derived((mixin, *mixins) if outermost else (*mixins, mixin), stock_class(module))


class _Derived:
    """Copies and pickles a module of a class that exists only at run time."""

    def __reduce_ex__(self, protocol):
        return _empty, (self._mixins, self._stock_class), self.__dict__


@functools.cache
def _derived(mixins: tuple[type, ...], stock: type) -> type:
    names = "".join(mixin.__name__ for mixin in mixins)
    members = {"_mixins": mixins, "_stock_class": stock, "__doc__": stock.__doc__, "__module__": __name__}
    return type(f"{stock.__name__}{names}", (_Derived, *mixins, stock), members)


def _empty(mixins: tuple[type, ...], stock: type) -> nn.Module:
    cls = _derived(mixins, stock)
    return cls.__new__(cls)
