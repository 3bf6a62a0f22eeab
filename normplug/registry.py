"""The layers' way into mmengine's registry, under the names that configs use."""

import importlib.util
import inspect

from mmengine.registry import MODELS
from torch import nn

import normplug.layers as layers
from normplug.openmmlab import adapt, advice, close_gaps, register_hooks, replacement

__all__ = ["TAKEN_OVER", "config_names", "register_all"]

# mmcv's own entries that give way to ours: same numbers, same state dict. Any other clash is an error.
TAKEN_OVER = frozenset({"GN", "SyncBN", "ConvWS"})


def config_names(layer: type[nn.Module]) -> tuple[str, ...]:
    """Return the config names of a layer class: its ``_name_`` (one or several), else the class name."""
    names = vars(layer).get("_name_", layer.__name__)
    return (names,) if isinstance(names, str) else tuple(names)


def register_all(override: bool = True) -> None:
    """Register every layer in mmengine's root ``MODELS``, where mmdet, mmaction2 and the others find it.

    And have every model that a registry builds adapted to the layers in it (``normplug.openmmlab.adapt``), its norms
    replaced where its config says so (``normplug.replace_norm``), and our hooks known by name.

    Called when ``normplug`` is imported; calling it again does nothing more. Names are looked up in the scope
    of a toolkit first and then in the root, so one registration serves all toolkits.

    Args:
        override: Take over mmcv's names GN, SyncBN and ConvWS. Without it these three stay mmcv's.

    Raises:
        KeyError: If another package owns one of our other names.
    """
    close_gaps()
    if importlib.util.find_spec("mmcv") is not None:
        import mmcv.cnn  # noqa: F401  registers its own GN, SyncBN and ConvWS: must come first
    for layer in (getattr(layers, name) for name in layers.__all__):
        for name in config_names(layer):
            _register(name, layer, override)
    adapt.install()
    replacement.install()
    advice.install()
    register_hooks()


def _register(name: str, layer: type[nn.Module], override: bool) -> None:
    known = MODELS.module_dict.get(name)
    if known is layer:
        return
    if known is not None:
        if name not in TAKEN_OVER:
            raise KeyError(
                f"normplug cannot register {layer.__name__} as {name!r}: {known.__module__}.{known.__qualname__} "
                f"({inspect.getsourcefile(known)}) owns that name. Import normplug first, or rename the other."
            )
        if not override:
            return
    MODELS.register_module(name=name, module=layer, force=name in TAKEN_OVER)
