"""What NumPy, SciPy and Python have changed since the toolkits' last releases, for the modules that rely on it.

Each of them gets a namespace of its own in the place of ``np``, or one function that is another: numpy and scipy stay
as they are, and so does every other module. It happens when the module is imported; so does what ``finders`` mends.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

from normplug.openmmlab import finders
from normplug.openmmlab.replacing import replace_everywhere
from normplug.openmmlab.sync_batch_norms import take_over_mmcvs

__all__ = ["install"]


class _Namespace:
    """A module as one other module sees it: the same, with names of its own."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        vars(self).update(names)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


# ---- numpy


def _in1d(values: Any, among: Any) -> np.ndarray:
    return np.isin(np.ravel(values), among)


def _trapz(y: Any, x: Any = None, dx: float = 1.0, axis: int = -1) -> Any:
    return np.trapezoid(y, x, dx, axis) if hasattr(np, "trapezoid") else np.trapz(y, x, dx, axis)


# Gone since 1.24 (complex, float), 2.0 (Inf, NAN) and 2.4 (in1d, trapz)
_OLD_NAMES = {"Inf": np.inf, "NAN": np.nan, "complex": complex, "float": float, "in1d": _in1d, "trapz": _trapz}
# Gone since 2.0
_SCTYPES = {
    "float": [np.float16, np.float32, np.float64, np.longdouble],
    "int": [np.int8, np.int16, np.int32, np.int64],
    "uint": [np.uint8, np.uint16, np.uint32, np.uint64],
}


def _old_numpy(module: ModuleType) -> None:
    module.np = _Namespace(np, **_OLD_NAMES)


class _WrappingUint8:
    """``np.uint8`` that takes numbers outside of 0 to 255 modulo 256, which NumPy 2 refuses for Python's own."""

    dtype = np.dtype("uint8")

    def __call__(self, value: float) -> np.uint8:
        return np.uint8(int(value) % 256)


def _wrapping_uint8(module: ModuleType) -> None:
    module.np = _Namespace(np, uint8=_WrappingUint8())


def _signed_hue(module: ModuleType) -> None:
    """A negative number added to uint8 made int16 of both, and is refused since NumPy 2."""
    original = module.ColorJitter.adjust_hue

    @functools.wraps(original)
    def adjust_hue(img: np.ndarray, factor: float) -> np.ndarray:
        import cv2

        offset = int(factor * 255)
        if offset >= 0:
            return original(img, factor)
        hsv = cv2.cvtColor(np.clip(img, 0, 255).astype(np.uint8), cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + offset) % 180
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.float32)

    module.ColorJitter.adjust_hue = staticmethod(adjust_hue)


def _int_of_arrays(module: ModuleType) -> None:
    """``int`` of an array of one value, which NumPy 2.4 takes from none but those without axes."""
    module.int = lambda value: int(value.item() if isinstance(value, np.ndarray) else value)


# ---- python


def _frozen_modules(module: ModuleType) -> None:
    """``os`` and its like, which pure Python configs may use, have had no file that tells whose they are since 3.11."""
    original = module._is_builtin_module

    @functools.wraps(original)
    def is_builtin_module(name: str) -> bool:
        return name.partition(".")[0] in sys.stdlib_module_names or original(name)

    replace_everywhere(original, is_builtin_module)


def _old_pkgutil(module: ModuleType) -> None:
    """``find_loader``, by which mmengine and mmcv look for the compiled ops, is gone since 3.14."""
    module.pkgutil = _Namespace(pkgutil, find_loader=_find_loader)


def _find_loader(name: str) -> Any:
    spec = importlib.util.find_spec(name)
    return None if spec is None else spec.loader


def _without_distutils(module: ModuleType) -> None:
    """Every run reports its environment by a function that imports distutils, gone since 3.12, for one exception."""
    original = module.collect_env

    @functools.wraps(original)
    def collect_env() -> dict:
        if importlib.util.find_spec("distutils") is not None:
            return original()
        names = {name: ModuleType(name) for name in ("distutils", "distutils.errors")}
        names["distutils"].errors = names["distutils.errors"]
        names["distutils.errors"].CompileError = type("CompileError", (Exception,), {})
        with mock.patch.dict(sys.modules, names):
            return original()

    replace_everywhere(original, collect_env)


def _without_pkg_resources(module: ModuleType) -> None:
    """setuptools 82 has no ``pkg_resources``; Python itself knows what is installed."""
    if importlib.util.find_spec("pkg_resources") is None:
        for function in (_is_installed, _get_installed_path, _package2module):
            replace_everywhere(getattr(module, function.__name__[1:]), function)


def _is_installed(package: str) -> bool:
    """Check package whether installed: as a distribution, or else as a module."""
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        spec = importlib.util.find_spec(package)
        return spec is not None and spec.origin is not None
    return True


def _get_installed_path(package: str) -> str:
    """Get installed path of package.

    Raises:
        PackageNotFoundError: If it is neither a distribution nor a module.
        RuntimeError: If it is a namespace package.
    """
    try:
        found = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise
        if spec.origin is None:
            raise RuntimeError(f"{package} is a namespace package, which has no installed path.") from None
        return str(Path(spec.origin).parent)
    path = Path(found.locate_file(package))
    return str(path if path.exists() else found.locate_file(_package2module(package)))


def _package2module(package: str) -> str:
    """Infer module name from package.

    Raises:
        ValueError: If the distribution does not tell.
    """
    names = (metadata.distribution(package).read_text("top_level.txt") or "").split()
    if not names:
        raise ValueError(f"can not infer the module name of {package}")
    return names[0]


# ---- scipy


def _interp2d(x: Any, y: Any, z: np.ndarray, kind: str = "linear") -> Callable[[Any, Any], np.ndarray]:
    """``scipy.interpolate.interp2d`` on a grid: gone since 1.14, and its notes name this way to the same numbers."""
    from scipy.interpolate import RectBivariateSpline

    degree = {"linear": 1, "cubic": 3, "quintic": 5}[kind]
    spline = RectBivariateSpline(x, y, np.transpose(z), kx=degree, ky=degree)
    return lambda at_x, at_y: spline(at_x, at_y).T


def _old_interpolate(module: ModuleType) -> None:
    module.interpolate = _Namespace(module.interpolate, interp2d=_interp2d)


def _old_interpolate_within(module: ModuleType) -> None:
    """This function imports scipy when it runs."""
    original = module.resize_relative_position_bias_table

    @functools.wraps(original)
    def resize(*args: Any, **kwargs: Any) -> Any:
        from scipy import interpolate

        present, interpolate.interp2d = interpolate.interp2d, _interp2d
        try:
            return original(*args, **kwargs)
        finally:
            interpolate.interp2d = present

    replace_everywhere(original, resize)


# ---- when a module is imported

_REPAIRS: dict[str, Callable[[ModuleType], None]] = {
    "fvcore.nn.precise_bn": finders.find_in_update,
    "imgaug.imgaug": _old_numpy,  # of mmaction2's ImgAug
    "imgaug.parameters": _old_numpy,
    "lvis.eval": _old_numpy,  # of mmdet's LVIS metric
    "mmaction.datasets.transforms.pose_transforms": _old_numpy,
    "mmaction.datasets.transforms.processing": _signed_hue,
    "mmaction.datasets.transforms.wrappers": _old_numpy,  # it says np.bool = bool, which is for its own numpy then
    "mmaction.evaluation.functional.accuracy": _old_numpy,
    "mmaction.evaluation.functional.ava_evaluation.metrics": _old_numpy,
    "mmaction.evaluation.functional.multisports_utils": _int_of_arrays,
    "mmaction.evaluation.metrics.multimodal_metric": _old_numpy,
    "mmaction.models.multimodal.vindlu.utils": _old_interpolate,
    "mmaction.utils.misc": _old_numpy,
    "mmcv.cnn.bricks.conv_module": finders.keep_activation,
    "mmcv.cnn.utils.flops_counter": finders.count_flops,
    "mmengine.config.utils": _frozen_modules,
    "mmengine.model.efficient_conv_bn_eval": finders.keep_activation,
    "mmengine.utils.dl_utils.collect_env": _without_distutils,
    "mmengine.utils.dl_utils.misc": _old_pkgutil,
    "mmengine.utils.package_utils": _without_pkg_resources,
    "mmcv.image.photometric": _wrapping_uint8,
    "mmcv.ops.sync_bn": take_over_mmcvs,
    "mmcv.utils.ext_loader": _old_pkgutil,
    "mmdet.engine.hooks.mean_teacher_hook": finders.teach_by_name,
    "mmdet.engine.hooks.sync_norm_hook": finders.synchronize_by_name,
    "mmdet.evaluation.functional.ytviseval": _old_numpy,
    "mmdet.models.layers.brick_wrappers": finders.find_in_conversion,
    "mmpretrain.engine.hooks.precise_bn_hook": finders.find_in_update,
    "mmpretrain.evaluation.metrics.retrieval": _old_numpy,
    "mmpretrain.models.utils.embed": _old_interpolate_within,
    "mmseg.models.backbones.beit": _old_interpolate,
}


# What is asked for while a module is imported, of numpy itself
_MEANWHILE: dict[str, dict[str, Any]] = {"imgaug.imgaug": {"sctypes": _SCTYPES}}


class _Repairing(importlib.abc.Loader):
    """Loads a module as another loader does, and repairs it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader  # who asks for the source asks it
        with _in_numpy(_MEANWHILE.get(module.__name__, {})):
            self._loader.exec_module(module)
        _REPAIRS[module.__name__](module)


@contextlib.contextmanager
def _in_numpy(names: dict[str, Any]) -> Iterator[None]:
    """Have names in numpy that it lacks."""
    absent = {name: value for name, value in names.items() if not hasattr(np, name)}
    for name, value in absent.items():
        setattr(np, name, value)
    try:
        yield
    finally:
        for name in absent:
            delattr(np, name)


class _RepairFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _REPAIRS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None:
            spec.loader = _Repairing(spec.loader)
        return spec


def install() -> None:
    """Repair the modules that are there, and the others when they are imported."""
    if any(isinstance(finder, _RepairFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _RepairFinder())
    for name, repair in _REPAIRS.items():
        if name in sys.modules:
            repair(sys.modules[name])
