"""Modules that the toolkits import and that may be missing, provided by the last finder on ``sys.meta_path``.

Being last is the whole rule: a compiled ``mmcv._ext``, or an mmaction2 that has its ``drn``, is found before
this finder is asked, and then nothing is replaced.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from types import ModuleType

__all__ = ["install", "tell"]


def tell(message: str) -> None:
    """Write one line to the run's log: mmengine's logger if there is one already, else logger ``normplug``."""
    from mmengine.logging import MMLogger

    # get_current_instance() would create a logger where no Runner has made one yet.
    running = MMLogger.get_current_instance() if MMLogger._instance_dict else None
    (running or logging.getLogger("normplug")).info(message)


def _fill_mmcv_ext(module: ModuleType) -> None:
    from normplug.openmmlab import mmcv_ops

    vars(module).update(mmcv_ops.OPS)
    module.__getattr__ = mmcv_ops.missing_op
    tell(
        "normplug: mmcv has no compiled mmcv._ext; "
        f"torchvision and ATen stand in for {len(mmcv_ops.OPS)} of its functions"
    )


def _fill_drn(module: ModuleType) -> None:
    from normplug.openmmlab.drn import DRN

    module.DRN = DRN
    tell("normplug: this mmaction2 lacks mmaction.models.localizers.drn; it imports, but DRN cannot be built")


_FILL = {
    "mmcv._ext": _fill_mmcv_ext,
    "mmaction.models.localizers.drn": None,  # a package that holds nothing but the next one
    "mmaction.models.localizers.drn.drn": _fill_drn,
}


class _StandInLoader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None  # an ordinary module

    def exec_module(self, module: ModuleType) -> None:
        fill = _FILL[module.__name__]
        if fill is not None:
            fill(module)


class _StandInFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _FILL:
            return None
        return importlib.util.spec_from_loader(
            fullname, _StandInLoader(), origin="normplug.openmmlab", is_package=_FILL[fullname] is None
        )


def install() -> None:
    """Put the finder at the end of ``sys.meta_path``, once."""
    if not any(isinstance(finder, _StandInFinder) for finder in sys.meta_path):
        sys.meta_path.append(_StandInFinder())
