"""What torch.fx puts in its graph for a call of a layer of ours."""

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

__all__ = ["Proxy", "chosen", "node_of"]


def node_of(layer: nn.Module, x: Tensor | Proxy, *others: Any) -> Proxy | None:
    """Return the node of a call that torch.fx traces: the layer as a whole, as torch's own norms are.

    So it stays what it is in the graph, in training too, and whoever looks for norms there finds it. A layer that is
    traced by itself cannot be named in its graph: None then, and what the layer calls becomes nodes. A tensor has no
    graph.

    Args:
        layer: What is called.
        x: Its input.
        others: Further arguments, in their order; those that are None at the end are left out.
    """
    if not isinstance(x, Proxy):
        return None
    args = [x, *others]
    while args[-1] is None:
        del args[-1]
    path = x.tracer.path_of_module(layer)
    return x.tracer.create_proxy("call_module", path, tuple(args), {}) if path else None


def chosen(act: Any, own: str | None) -> Any:
    """Return the activation that a call names, the layer's own if it names none.

    Of a layer that is traced by itself the argument is an input of the graph.
    """
    if isinstance(act, Proxy):
        return act.tracer.create_proxy("call_function", chosen, (act, own), {})
    return act or own
