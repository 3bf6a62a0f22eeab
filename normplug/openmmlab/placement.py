"""Where the toolkits' classes apply activations, and layers that contain theirs (EvoNorm, FRN) put into these places.

Where an activation follows such a layer, it goes; where none does (last norm of a residual branch, shortcut, FPN), the
layer gives up its own. What follows is known of Sequential and ConvModule, and watched in the forward of any other
class, there also across the border of a module. A block that uses one ``nn.ReLU`` both behind norms and behind its sum
keeps that behind the sum only.
"""

import contextlib
import copy
import dis
import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

from torch import fx, nn

from normplug.openmmlab.classes import (
    derive,
    is_list,
    is_ours,
    is_sequence,
    is_toolkits,
    keeps_forward,
    owner_of,
    stock_class,
)
from normplug.openmmlab.watching import watch

__all__ = ["REPLACED", "ActivationInNorm", "contains_activation", "is_watched", "place_activations", "places_itself"]

# What a layer with an activation replaces. Gates (Sigmoid, Tanh, ...) mean something else, and stay.
REPLACED = {"ReLU", "ReLU6", "LeakyReLU", "PReLU", "RReLU", "ELU", "SiLU", "Swish", "GELU", "Hardswish", "Mish"}
FUNCTIONS = {"relu", "relu_", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "silu", "gelu", "hardswish", "mish"}
# What may stand between a norm and its activation: it does not matter which of the two comes first.
TRANSPARENT = {"Identity", "DropPath", "Dropout", "Dropout2d", "Dropout3d"}
HANDED_ON = {"timm", "torchvision"}


class ActivationInNorm(nn.Identity):
    """Stands where a toolkit had an activation that the norm before it contains."""


class ActivatesAtTheEnd:
    """A block whose one activation is left behind its sum only, which is the last thing that it does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._activate_last(super().forward(*args, **kwargs))

    def _activate_last(self, sums: Any) -> Any:
        """Activate a tensor, or each of a list: a block of TridentNet has one for each of its branches."""
        return [self.last_activation(x) for x in sums] if isinstance(sums, list) else self.last_activation(sums)


class ActivatesAtTheEndOfRFP(ActivatesAtTheEnd):
    """The same for DetectoRS, whose backbone calls the layers of its blocks in another method once more."""

    def rfp_forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._activate_last(super().rfp_forward(*args, **kwargs))


@dataclass
class _Use:
    """One call of an activation in a module."""

    name: str  # of the module's part, or of a function
    of: nn.Module | None  # None if it is no part of the module
    behind: nn.Module | None = None  # the norm
    method: str = "forward"
    is_last: bool = False  # what it gives, and nothing else, is what the method returns


@dataclass
class _Seen:
    """What a module was seen to do with norms that contain their activation."""

    module: nn.Module
    path: str
    uses: list[_Use] = field(default_factory=list)
    bare: list[nn.Module] = field(default_factory=list)  # norms behind which there is no activation
    end: nn.Module | None = None  # a norm whose output is the module's: what is around it may activate
    bare_parts_of_parts: list[nn.Module] = field(default_factory=list)
    error: Exception | None = None


def contains_activation(layer: nn.Module) -> bool:
    return is_ours(layer) and getattr(layer, "contains_activation", False)


def places_itself(owner: nn.Module) -> bool:
    return getattr(owner, "places_activations", False)


def place_activations(model: nn.Module) -> None:
    """Let every norm that contains an activation do the one that follows it, or drop its own, in place.

    Norms in classes that are no toolkit's, or that place activations by themselves, stay as they are.

    Raises:
        ValueError: If it cannot be seen what follows a norm, or what follows cannot be taken out.
    """
    owners = dict(_norms_to_place(model))
    if not owners:
        return
    seen = _look(model, owners)
    followed = {use.behind for one in seen for use in one.uses if use.behind is not None}
    bare = {norm for one in seen for norm in one.bare}
    bare |= {norm for one in seen for norm in one.bare_parts_of_parts} - followed  # of which their owner makes no use
    for norm, (path, owner) in owners.items():
        if norm in followed & bare:
            raise _refusal(norm, path, owner, "an activation follows it in one place and none in another")
        if norm not in followed | bare:
            errors = [one.error for one in seen if one.module is owner and one.error is not None]
            why = f"its forward cannot be watched ({errors[0]})" if errors else "its forward was not seen to call it"
            raise _refusal(norm, path, owner, why)
    changes = [(one, *change) for one in seen for change in _changes(one, owners)]
    for norm in bare:
        norm.drop_activation()
    for one, name, mixin in changes:
        _take_out(one.module, name, mixin)
    if changes:
        _check(_look(model, owners), {one.module for one, *_ in changes}, owners)


def _norms_to_place(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, nn.Module]]]:
    for path, layer in model.named_modules():
        if path and contains_activation(layer):
            around = path.rpartition(".")[0]
            owner = owner_of(around, model)
            if is_watched(owner):
                yield layer, (around, owner)


def is_watched(owner: nn.Module) -> bool:
    """Whether a class is a toolkit's, or of a package whose backbones the toolkits hand on."""
    known = is_toolkits(owner) or any(cls.__module__.partition(".")[0] in HANDED_ON for cls in type(owner).__mro__)
    return known and not places_itself(owner)


def _refusal(norm: nn.Module, path: str, owner: nn.Module, why: str) -> ValueError:
    kind, cls = type(norm).__name__, stock_class(owner)
    return ValueError(
        f"{kind} contains its activation, but sits directly in {path or 'the model'}, a "
        f"{cls.__module__}.{cls.__qualname__}, and {why}: two activations in a row, or none, would be a different "
        f"network. Use a norm without activation (GN, SyncBN, CBN) here, or, if the class applies none behind {kind}, "
        f"set {cls.__name__}.places_activations = True."
    )


# --- what follows a norm


def _look(model: nn.Module, norms: Collection[nn.Module]) -> list[_Seen]:
    """Return what the modules around these norms do with what they put out, the innermost first."""
    seen, ends = [], {norm: norm for norm in norms}
    for path, module in reversed(list(model.named_modules())):
        if not any(part in ends for part in _parts(module)) or not is_watched(owner_of(path, model)):
            continue
        if is_list(module):
            continue
        if is_sequence(module):
            one = _look_at_sequence(module, path, ends)
        elif keeps_forward(module, "mmcv.cnn.bricks.conv_module", "ConvModule"):
            one = _look_at_conv_module(module, path, ends)
        else:
            one = _look_at_forward(module, path, ends)
        seen.append(one)
        if one.end is not None:
            ends[module] = one.end
    known = {norm for one in seen for norm in (*one.bare, *(use.behind for use in one.uses))}
    at_the_end = [norm for part, norm in ends.items() if part is not norm and norm not in known]
    return [*seen, _Seen(model, "", bare=at_the_end)]


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what a module may call: its children, and those of its lists."""
    for child in module.children():
        yield child
        if is_list(child) or is_sequence(child):
            yield from _parts(child)


def _activates(layer: nn.Module) -> bool:
    return type(layer).__name__ in REPLACED or isinstance(layer, ActivationInNorm)


def _look_at_sequence(sequence: nn.Sequential, path: str, ends: dict[nn.Module, nn.Module]) -> _Seen:
    one = _Seen(sequence, path)
    for name, layer in sequence._modules.items():  # not named_children: one ReLU may stand in several places
        if _activates(layer):
            one.uses.append(_Use(name, layer, one.end))
            one.end = None
        elif type(layer).__name__ not in TRANSPARENT:
            one.bare += [one.end] if one.end is not None else []
            one.end = ends.get(layer)
    return one


def _look_at_conv_module(module: nn.Module, path: str, ends: dict[nn.Module, nn.Module]) -> _Seen:
    one, norm, activation = _Seen(module, path), ends.get(module.norm), getattr(module, "activate", None)
    order = tuple(module.order)
    if norm is None:
        return one
    if activation is None or not _activates(activation):
        one.bare.append(norm)  # act_cfg=None says that none belongs to it, whatever the code around does
    elif order.index("act") == order.index("norm") + 1:
        one.uses.append(_Use("activate", activation, norm))
    else:
        raise ValueError(
            f"{type(norm).__name__} contains its activation, but {path or 'this ConvModule'} has order={order}, where "
            f"the activation does not follow the norm. Use the order ('conv', 'norm', 'act') or a norm without "
            f"activation (GN, SyncBN, CBN) here."
        )
    return one


def _look_at_forward(module: nn.Module, path: str, ends: dict[nn.Module, nn.Module]) -> _Seen:
    one = _Seen(module, path)
    with _told_apart(module):
        try:
            ways = [(method, mode) for method in ("forward", *_other_methods(module)) for mode in _modes(module)]
            graphs = [(method, watch(module, method, mode)) for method, mode in ways]
        except Exception as error:  # the toolkit's code, on stand-ins for tensors: it may raise anything
            one.error = error
            return one
        for method, graph in graphs:
            _read(graph, method, one, ends)
    return one


@contextlib.contextmanager
def _told_apart(module: nn.Module) -> Iterator[None]:
    """Have another object under each name of an activation, for a while: a graph has one name for each object."""
    known, put_back = set(), []
    for holder in (module, *(part for part in _parts(module) if is_list(part) or is_sequence(part))):
        for name, part in holder._modules.items():
            if part in known and _activates(part):
                put_back.append((holder, name, part))
                holder._modules[name] = copy.copy(part)
            known.add(part)
    try:
        yield
    finally:
        for holder, name, part in put_back:
            holder._modules[name] = part


def _read(graph: fx.Graph, method: str, one: _Seen, ends: dict[nn.Module, nn.Module]) -> None:
    module = one.module
    own = set(_parts(module))  # what its parts consist of is seen where these are looked at
    origin: dict[fx.Node, fx.Node] = {}
    (output,) = (node for node in graph.nodes if node.op == "output")
    returned = _returned(output.args[0])
    for node in graph.nodes:
        called, sources = _called(node, module), [origin[n] for n in node.all_input_nodes]
        parts = [part for part in (_called(n, module) for n in sources) if part in ends]
        norms = [ends[part] for part in parts if part in own]
        origin[node] = node
        if called is not None and type(called).__name__ in TRANSPARENT and sources:
            origin[node] = sources[0]
        elif _is_activation(node, called) and (norms or called in own):
            of, behind = called if called in own else None, norms[0] if norms else None
            is_last = len(node.users) == 1 and node in returned and {n.target for n in returned} == {node.target}
            one.uses.append(_Use(_name(node), of, behind, method, is_last))
        elif node is output and len(sources) == 1 and output.args[0] is node.all_input_nodes[0] and norms:
            one.end = norms[0]
        else:
            one.bare += norms
            one.bare_parts_of_parts += [ends[part] for part in parts if part not in own]


def _returned(value: Any) -> list[fx.Node]:
    """Return where that comes from what a method returns: one value, those of a list, or those of a concatenation."""
    if isinstance(value, fx.Node) and _name(value) in ("cat", "concat") and len(value.users) == 1:
        value = value.args[0]
    values = value if isinstance(value, list) else [value]
    return list(values) if all(isinstance(one, fx.Node) for one in values) else []


def _called(node: fx.Node, module: nn.Module) -> nn.Module | None:
    return module.get_submodule(node.target) if node.op == "call_module" else None


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _is_activation(node: fx.Node, called: nn.Module | None) -> bool:
    if called is not None:
        return _activates(called)
    return node.op in ("call_function", "call_method") and _name(node) in FUNCTIONS


# --- what else calls an activation


def _other_methods(module: nn.Module) -> tuple[str, ...]:
    """Return the methods that use an activation of the module and that its forward does not come by."""
    names = {name for name, part in module.named_children() if any(map(_activates, part.modules()))}
    return _methods_beside_forward(stock_class(module), frozenset(names))


def _modes(module: nn.Module) -> tuple[bool, ...]:
    """Return the modes that the forward of a module tells apart, or one of them."""
    codes, reached = _reached_from_forward(stock_class(module))
    apart = any("training" in code.co_names for name in reached - {"__init__"} for code in codes[name])
    return (True, False) if apart else (True,)


@functools.cache
def _methods_beside_forward(cls: type, names: frozenset[str]) -> tuple[str, ...]:
    codes, reached = _reached_from_forward(cls)
    return tuple(
        name for name in sorted(codes.keys() - reached) if any(names & set(_attributes(code)) for code in codes[name])
    )


@functools.cache
def _reached_from_forward(cls: type) -> tuple[dict[str, list[CodeType]], set[str]]:
    """Return the code of every method, and the names of those that forward mentions, or that such a one mentions."""
    codes = {name: list(_codes(cls, name)) for name in dir(cls)}
    reached, new = set(), {"forward", "__init__"}
    while new:
        reached |= new
        mentioned = {name for one in new for code in codes[one] for name in code.co_names}
        new = (mentioned & codes.keys()) - reached
    return codes, reached


def _codes(cls: type, name: str) -> Iterator[CodeType]:
    """Yield the code of a method or property in all classes that a toolkit has written, and of functions in it."""
    for base in cls.__mro__:
        value = vars(base).get(name)
        value = value.fget if isinstance(value, property) else value
        if isinstance(value, FunctionType) and base.__module__.partition(".")[0] not in ("torch", "mmengine"):
            yield from _nested(value.__code__)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _attributes(code: CodeType) -> Iterator[str]:
    """Yield the names of attributes that code reads."""
    return (i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_ATTR", "LOAD_METHOD"))


# --- what is taken out


def _changes(one: _Seen, owners: dict) -> Iterator[tuple[str, type | None]]:
    """Yield the names of activations that go, and the class that then applies the one behind the sum.

    Raises:
        ValueError: If an activation is used elsewhere too, and not last.
    """
    names = dict.fromkeys(use.name for use in one.uses if use.behind in owners)
    for name in names:
        uses = [use for use in one.uses if use.name == name]
        if all(isinstance(use.of, ActivationInNorm) for use in uses):
            continue
        norm = next(use.behind for use in uses if use.behind is not None)
        others = [use for use in uses if use.behind is None]
        if uses[0].of is None:
            raise _refusal(norm, one.path, one.module, f"calls {name} behind it, which is none of its parts")
        mixin = _AT_THE_END.get(tuple(dict.fromkeys(use.method for use in others))) if others else None
        if others and (mixin is None or not all(use.is_last for use in others) or list(uses[0].of.parameters())):
            why = f"uses {name} behind the norm and in the midst of its forward"
            raise _refusal(norm, one.path, one.module, why)
        yield name, mixin


_AT_THE_END = {("forward",): ActivatesAtTheEnd, ("forward", "rfp_forward"): ActivatesAtTheEndOfRFP}


def _take_out(module: nn.Module, name: str, mixin: type | None) -> None:
    around, _, own = name.rpartition(".")
    holder = module.get_submodule(around)
    if mixin is not None:
        module.last_activation = holder._modules[own]
        derive(module, mixin)
    holder._modules[own] = ActivationInNorm()  # in a Sequential an index more or less would rename all that follows


def _check(seen: list[_Seen], changed: set[nn.Module], owners: dict) -> None:
    """Look again at what was changed: every norm that activates is followed by nothing, and every sum by what was."""
    for one in seen:
        for use in one.uses if one.module in changed else ():
            left_out = isinstance(use.of, ActivationInNorm)
            done = use.behind is not None and contains_activation(use.behind)
            done = done or (use.is_last and isinstance(one.module, ActivatesAtTheEnd))
            if left_out != done:
                norm = next(iter(owners))
                raise _refusal(norm, one.path, one.module, f"{use.name} in {use.method} could not be taken out alone")
