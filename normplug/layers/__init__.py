"""The layers: every public name of the files in this folder."""

import importlib
import pkgutil

__all__: list[str] = []

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        _file = importlib.import_module(f"{__name__}.{_module.name}")
        globals().update({_name: getattr(_file, _name) for _name in _file.__all__})
        __all__ += _file.__all__
