"""Checkpoints that are safe to load, and a check that a checkpoint has the model's kind of norm.

torch 2.6 and newer unpickle with ``weights_only=True``: tensors, plain Python values, nothing else. What mmengine
0.10.7 saves does not load that way, because its message hub pickles ``HistoryBuffer`` objects, numpy arrays and,
for the buffers' methods, the builtin ``getattr``. The check stays on, always, and two things change:

* What is saved: plain values in the place of all that mmengine pickles (see plain.py), so plain ``torch.load`` reads a
  new checkpoint.
* What is read: while mmengine loads, the names that stock mmengine writes resolve to stand-ins defined here.
  The stand-ins take numbers and nothing else; neither ``getattr`` nor numpy's own unpickling code is reachable.
  A function or class that is only named, as a scheduler's is, becomes a name and is left out of the scheduler's state.
"""

import contextlib
import functools
import math
import pickle
import pickletools
import re
import sys
import threading
import zipfile
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mmengine.runner.checkpoint as mmengine_checkpoint
import numpy as np
import safetensors.torch
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop
from torch import Tensor, nn

import normplug.layers as layers
from normplug.openmmlab._stand_ins import tell
from normplug.openmmlab.file_kinds import CheckpointError, check_kind, is_safetensors
from normplug.openmmlab.inert import make_inert
from normplug.openmmlab.plain import FACTORIES, KIND, as_plain, from_plain, without_code
from normplug.openmmlab.pretrained import download
from normplug.openmmlab.replacement import as_loaded
from normplug.openmmlab.weight_checks import expect_whole_model, source, weights_of

__all__ = [
    "CheckpointNormHook",
    "UnsafeCheckpointError",
    "check_norms",
    "install",
    "load",
    "load_pickle",
    "norm_differences",
    "place",
]


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint names classes or functions that are not loaded. Nothing in it was executed."""


# ---- stand-ins for what stock mmengine pickles
# An object of a stand-in is what its name in a checkpoint becomes. Its state comes from the file: believe nothing.

_NUMBER_OR_TEXT = re.compile(r"[biuf][1-8]|f16|c8|c16|U\d{1,6}")


class _Refused(pickle.UnpicklingError):
    """What a file contains is not allowed, in contrast to: the file is broken."""


def _refuse(what: str):
    raise _Refused(what)


class _StoredDtype:
    """Takes the place of ``numpy.dtype``: one of numbers or text, whatever its pickled flags and fields say."""

    def __init__(self, name="?", align=False, copy=True):
        if not isinstance(name, str) or not _NUMBER_OR_TEXT.fullmatch(name):
            _refuse(f"numpy.dtype({name!r}), expected a dtype of numbers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _StoredArray:
    """Takes the place of ``numpy.ndarray``; holds the array, which `_with_arrays` puts back in the end."""

    array = None

    def __setstate__(self, state):
        match state:
            case (_, tuple(shape), _StoredDtype(dtype=dtype), fortran, bytes(data)):
                pass
            case (_, tuple(shape), _StoredDtype(dtype=dtype), fortran, str(text)):  # bytes of Python 2
                data = _stored_text(text, "latin1")
            case _:
                _refuse("a numpy array of anything but numbers")
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            _refuse(f"a numpy array of shape {shape!r}")
        if math.prod(shape) * dtype.itemsize != len(data):
            _refuse(f"a numpy array of shape {shape} and dtype {dtype} in {len(data)} bytes")
        # A copy, in native byte order: frombuffer gives a read-only view.
        order = "F" if fortran else "C"
        self.array = np.frombuffer(data, dtype).reshape(shape, order=order).astype(dtype.newbyteorder("="))


def _stored_array(kind, shape, typecode):
    """Takes the place of numpy's ``_reconstruct``: an array before its state."""
    return _StoredArray() if kind is _StoredArray else _refuse(f"numpy's _reconstruct of {kind!r}")


def _stored_scalar(dtype, data):
    """Takes the place of numpy's ``scalar``."""
    if not isinstance(dtype, _StoredDtype) or not isinstance(data, bytes) or len(data) != dtype.dtype.itemsize:
        _refuse("a numpy scalar of anything but a number")
    return np.frombuffer(data, dtype.dtype)[0]


class _StoredHistory:
    """Takes the place of ``HistoryBuffer``, and becomes one when its state proves to be two rows of numbers."""

    min = max = current = mean = None  # what `_stored_attribute` may name

    def __setstate__(self, state):
        state = state if isinstance(state, dict) else {}
        logs, counts = (state.get(name) for name in ("_log_history", "_count_history"))
        length = state.get("max_length")
        if not (isinstance(logs, _StoredArray) and isinstance(counts, _StoredArray) and type(length) is int):
            _refuse("a HistoryBuffer without its two arrays and its length")
        # Not the stored methods: those of the class, which is where mmengine looks them up.
        self.__class__ = HistoryBuffer
        vars(self).update(vars(_history(logs.array, counts.array, length)))


def _history(logs: np.ndarray, counts: np.ndarray, max_length: int) -> HistoryBuffer:
    if logs is None or counts is None or logs.ndim != 1 or logs.shape != counts.shape:
        _refuse("a HistoryBuffer whose log and count differ in length")
    buffer = HistoryBuffer(max_length=max_length)
    buffer._log_history, buffer._count_history = logs, counts
    return buffer


class _Husk:
    """What a call of code gives while we only look at which names a refused file has."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


class _Code:
    """Takes the place of a function or class that a file names and that nobody allowed: a name, which does nothing.

    It may be named. Whoever would call it, or make an object of it, is refused.
    """

    call = staticmethod(_refuse)

    def __new__(cls, *args):
        return super().__new__(cls) if isinstance(cls, type) else cls(*args)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args):
        return self.call(self.name)

    def __repr__(self) -> str:
        return self.name  # torch names it so in its errors


class _LookedAt(_Code):
    call = _Husk


def _stored_attribute(owner, name):
    """Takes the place of the builtin ``getattr``, with which pickles spell what belongs to a class.

    That is a name here: a method of a stock history, a scheduler's function (``OneCycleLR``), a class within a class,
    which is itself if the user allowed it.
    """
    if owner is _StoredHistory and name in ("min", "max", "current", "mean"):
        return name
    if not (isinstance(owner, _Code | type) and owner not in _NAMES.values() and isinstance(name, str)):
        _refuse(f"getattr(…, {name!r}), which gives access to code")
    full = f"{owner.name if isinstance(owner, _Code) else _allowed_name(owner)}.{name}"
    allowed = (entry for entry in torch.serialization.get_safe_globals() if _allowed_name(entry) == full)
    entry = next(allowed, None)
    return _Code(full) if entry is None else entry[0] if isinstance(entry, tuple) else entry


def _stored_bytes():
    """Takes the place of ``bytes``, which a pickle calls for the data of an empty array."""
    return b""


def _stored_text(text, encoding):
    """Takes the place of ``_codecs.encode``, with which pickles of protocol 2 spell bytes."""
    try:
        return text.encode({"latin1": "latin1"}[encoding])
    except (AttributeError, KeyError, TypeError, UnicodeEncodeError):
        _refuse(f"bytes in the encoding {encoding!r}")


class _StoredDeque(list):
    """Takes the place of ``collections.deque``."""

    def __init__(self, items=(), maxlen=None):
        super().__init__(items)
        self.maxlen = maxlen if type(maxlen) is int else None


_FACTORY = object()  # the key in a dict that a file calls a defaultdict


def _stored_defaultdict(factory=None):
    """Takes the place of ``collections.defaultdict`` with a plain type as factory: a dict until `_with_arrays`."""
    name = factory.name if isinstance(factory, _Code) else getattr(factory, "__name__", "")
    return {_FACTORY: FACTORIES.get(name.removeprefix("builtins."))}


def _stored_config(items=()):
    """Takes the place of mmengine's ``ConfigDict``."""
    return dict(items) if isinstance(items, dict) else _refuse("a ConfigDict of anything but a dict")


def _stored_path(*parts):
    """Takes the place of ``pathlib``'s classes."""
    return "/".join(parts).replace("//", "/") if all(isinstance(part, str) for part in parts) else _refuse("a path")


_NAMES = {
    "builtins.bytes": _stored_bytes,
    "builtins.getattr": _stored_attribute,
    "builtins.frozenset": set,
    "collections.deque": _StoredDeque,
    "collections.defaultdict": _stored_defaultdict,
    "mmengine.config.config.ConfigDict": _stored_config,
    "pathlib.PosixPath": _stored_path,
    "pathlib._local.PosixPath": _stored_path,  # python 3.13
    "mmengine.logging.history_buffer.HistoryBuffer": _StoredHistory,
    "numpy.dtype": _StoredDtype,
    "numpy.ndarray": _StoredArray,
    # numpy 2 moved its internals; both names are in the checkpoints that people have
    "numpy.core.multiarray._reconstruct": _stored_array,
    "numpy._core.multiarray._reconstruct": _stored_array,
    "numpy.core.multiarray.scalar": _stored_scalar,
    "numpy._core.multiarray.scalar": _stored_scalar,
}


def _with_arrays(value, seen: set[int]):
    """Return ``value`` with the stand-ins in its dicts, lists and tuples replaced by the real thing."""
    if isinstance(value, _StoredArray):
        return value.array
    if isinstance(value, _StoredDtype):
        return value.dtype
    for code in value if isinstance(value, set) else (value,):
        if isinstance(code, _Code):
            _refuse(code.name)
    if isinstance(value, dict | list | tuple) and id(value) not in seen:
        seen.add(id(value))  # a file may hold a list that holds itself
        if isinstance(value, dict):
            _with_arrays(set(value), seen)  # its keys
        if isinstance(value, tuple):
            items = [_with_arrays(item, seen) for item in value]
            return tuple(items) if any(new is not old for new, old in zip(items, value, strict=True)) else value
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            new = _with_arrays(item, seen)
            if new is not item:
                value[key] = new
    if isinstance(value, dict) and KIND in value:
        return from_plain(value)
    if isinstance(value, dict) and _FACTORY in value:
        return defaultdict(value.pop(_FACTORY), value)
    return deque(value, value.maxlen) if isinstance(value, _StoredDeque) else value


# ---- loading

_ALLOW_LIST = threading.RLock()  # torch's list of allowed names is one per process


@contextlib.contextmanager
def _stock_names(code: Iterable[_Code]) -> Iterator[None]:
    """Let torch's safe unpickler resolve `_NAMES`, what the user allowed, and names of code, but no name twice."""
    with _ALLOW_LIST:
        allowed = torch.serialization.get_safe_globals()
        try:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(
                [entry for entry in allowed if _allowed_name(entry) not in _NAMES]
                + [(stand_in, name) for name, stand_in in _NAMES.items()]
                + [(stand_in, stand_in.name) for stand_in in code]
                + [(_Husk, "")]
            )
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(allowed)


def _allowed_name(entry) -> str:
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def load(file, map_location=None, **kwargs):
    """``torch.load`` for checkpoints of mmengine: safe, and without complaints about mmengine's own classes.

    It reads ``.safetensors`` too, whatever they are called.

    Args:
        file: Path or file object.
        map_location: As in ``torch.load``.
        **kwargs: As in ``torch.load``; ``weights_only`` may be given and is not obeyed.

    Raises:
        UnsafeCheckpointError: If the file names classes or functions other than those mmengine writes.
        CheckpointError: If it is no whole checkpoint.
    """
    if isinstance(file, str | Path):
        check_kind(file)
        if is_safetensors(file):
            return _guarded(_load_safetensors, file, map_location=map_location)
    return _guarded(torch.load, file, map_location=map_location, **kwargs)


def load_checkpoint(file, map_location=None):
    """`load` for files that must hold weights.

    Raises:
        CheckpointError: If it is no whole checkpoint, or holds no weights.
    """
    checkpoint = load(file, map_location)
    weights_of(checkpoint, _where(file))
    return checkpoint


def _load_safetensors(file, map_location=None, weights_only=True) -> dict[str, Tensor]:
    device = map_location if isinstance(map_location, str | torch.device) else "cpu"
    return safetensors.torch.load_file(file, device=str(device))


def load_url(url: str, model_dir: str | None = None, map_location=None, progress: bool = True):
    """``torch.hub.load_state_dict_from_url`` in the same way; torch's own default there is the unsafe one.

    Raises:
        MissingWeightsError: If the file is not in the cache and cannot be downloaded.
        CheckpointError: If what is there is no whole checkpoint.
    """
    file = Path(model_dir or Path(torch.hub.get_dir(), "checkpoints"), Path(urlparse(url).path).name)
    download(url, file, progress)
    try:
        return load_checkpoint(file, map_location)
    except CheckpointError as error:
        raise type(error)(f"{error} It is what came from {url}: delete the file before you try again.") from error


def _guarded(loader, file, **kwargs):
    where = str(_where(file))
    source.set(where)
    start = file.tell() if hasattr(file, "seek") else None

    def read():
        return loader(_rewound(file, start), **{**kwargs, "weights_only": True})

    try:
        checkpoint = _loaded(read, {}, _Code)
        if isinstance(checkpoint, dict) and "param_schedulers" in checkpoint:
            stored = checkpoint["param_schedulers"]
            checkpoint["param_schedulers"] = without_code(stored, lambda value: isinstance(value, _Code))
        checkpoint = _with_arrays(checkpoint, set())
    except pickle.UnpicklingError as error:
        named: dict[str, _Code] = {}
        with contextlib.suppress(Exception):
            _loaded(read, named, _LookedAt)
        raise UnsafeCheckpointError(_refusal(where, _foreign_names(file, start, named, error), error)) from error
    except OSError:
        raise
    except Exception as error:  # what is wrong with a file ends in whatever the broken part runs into
        if isinstance(error, RuntimeError) and "deserialize object on" in str(error):
            raise  # a file that is whole, and no device for its tensors
        raise CheckpointError(
            f"{where} is not a whole checkpoint ({_first_line(error)}). Is it another kind of file, or cut short?"
        ) from error
    make_inert(checkpoint)
    return checkpoint


# As torch says which name it does not know, which function it does not call, of which class it makes no object.
_UNKNOWN = re.compile(
    r"(?:GLOBAL (\S+) was not an allowed|unrecognized function (\w\S*)|allowlisted .* but got (\w\S*))"
)


def _loaded(read: Callable[[], Any], code: dict[str, _Code], kind: type[_Code]):
    """Load a file; each name in it that is not allowed goes to ``code``, and becomes what only says its name."""
    while True:
        try:
            with _stock_names(code.values()):
                return read()
        except pickle.UnpicklingError as error:
            unknown = _UNKNOWN.search(str(error))
            name = unknown and next(filter(None, unknown.groups()))
            name = name if not name or "." in name else f"builtins.{name}"  # torch drops that
            if name is None or name in code or len(code) > 100:
                raise
            code[name] = kind(name)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _foreign_names(file, start: int | None, code: Iterable[str], error: Exception) -> list[str]:
    """What the file names that is not allowed; for the error's text only, and nothing is unpickled for it."""
    found = [*code, *re.findall(r"GLOBAL (\S+)", str(error))]
    found += [str(error)] if isinstance(error, _Refused) and re.fullmatch(r"[\w.]+", str(error)) else []
    with contextlib.suppress(Exception), _stock_names(()):  # it reads zip files in pickle protocol 2 only
        found += torch.serialization.get_unsafe_globals_in_checkpoint(_rewound(file, start))
    if "Unsupported operand" in str(error):  # a protocol that the safe unpickler does not read at all
        with contextlib.suppress(Exception):
            found += [name for name in _names_in(_rewound(file, start)) if name not in _NAMES]
    # torch's message drops "builtins.", its list does not
    return sorted({name.removeprefix("builtins.") for name in found})


def _rewound(file, start: int | None):
    if start is not None:
        file.seek(start)
    return file


def _names_in(file) -> Iterator[str]:
    """The globals that a checkpoint in any pickle protocol names, but for torch's own and OrderedDict."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    else:
        data = file.read() if hasattr(file, "read") else Path(file).read_bytes()
    strings = []
    for opcode, argument, _ in pickletools.genops(data):
        if isinstance(argument, str) and opcode.name != "GLOBAL":
            strings.append(argument)
        if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
            name = argument.replace(" ", ".") if argument else ".".join(strings[-2:])
            if not name.startswith(("torch.", "collections.")):
                yield name


def _where(source):
    return getattr(source, "name", type(source).__name__) if hasattr(source, "read") else source


_NEVER_ADVISED = frozenset({"builtins", "os", "sys", "posix", "nt", "subprocess", "functools", "importlib", "shutil"})


def _refusal(where: str, foreign: list[str], error: Exception) -> str:
    reason = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0]
    return (
        f"The checkpoint {where} was refused, and nothing in it was executed: it contains "
        f"{', '.join(foreign) or reason}. Expected: tensors, plain Python values, and mmengine's HistoryBuffer and "
        "numpy arrays of numbers. Other files can run any program when they are unpickled. Ask its author for one that "
        f"holds only weights, torch.save(dict(state_dict=model.state_dict()), path){_to_allow(foreign)}."
    )


def _to_allow(names: list[str]) -> str:
    """What to type so that a file with these names loads, where they are classes that its user may trust."""
    modules = {name: _module_of(name) for name in names}
    if not names or any(module.partition(".")[0] in _NEVER_ADVISED for module in modules.values()):
        return ""
    return (
        "; or, if these are classes of your own and the file is from somebody you trust, allow them before it is "
        f"loaded (in a config: in a module that custom_imports names): "
        f"import {', '.join(sorted(set(modules.values())))}; torch.serialization.add_safe_globals([{', '.join(names)}])"
    )


def _module_of(name: str) -> str:
    """Where a name that a file holds would come from; nothing is imported to find out."""
    parts = name.split(".")
    around = [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
    return next((module for module in around if module in sys.modules), around[0] if around else "builtins")


_ARRAY_NAMES = {name: stand_in for name, stand_in in _NAMES.items() if name.startswith("numpy.")}
_ARRAY_NAMES |= {"_codecs.encode": _stored_text, "collections.OrderedDict": OrderedDict}


class _ArrayUnpickler(pickle.Unpickler):
    """Finds numpy's arrays and nothing else, and they are stand-ins."""

    def find_class(self, module, name):
        full = f"{module}.{name}"
        return _ARRAY_NAMES[full] if full in _ARRAY_NAMES else _refuse(full)


def load_pickle(file: str | Path):
    """Unpickle dicts, lists, numbers, text and numpy arrays of numbers, Python 2's included, and execute nothing.

    For files that are no checkpoints of torch, such as Detectron's and Detectron2's ``.pkl``.

    Raises:
        UnsafeCheckpointError: If the file names any other class or function.
        ValueError: If it is no whole pickle.
    """
    try:
        with Path(file).open("rb") as stream:
            loaded = _ArrayUnpickler(stream, encoding="latin1").load()
    except _Refused as error:
        raise UnsafeCheckpointError(
            f"The pickle {file} was refused, and nothing in it was executed: it contains {error}. Expected: a dict of "
            f"numpy arrays of numbers. Get the file from its authors' model zoo."
        ) from error
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, MemoryError) as error:
        raise ValueError(
            f"{file} is not a whole pickle ({error}). Is it another kind of file, or cut short?"
        ) from error
    return _with_arrays(loaded, set())


class _SafeTorch:
    """The module ``torch`` as mmengine's checkpoint module sees it: the same, but for ``load`` and ``save``."""

    load = staticmethod(load_checkpoint)

    @staticmethod
    def save(checkpoint, file) -> None:
        torch.save(as_plain(checkpoint), file)

    def __getattr__(self, name):
        return getattr(torch, name)


# ---- the norms of a checkpoint and of a model


_STATISTICS = frozenset({"running_mean", "running_var"})
_KINDS = {  # by the running statistics in the state dict: what they are called here, and a norm_cfg that has them
    _STATISTICS: ("running mean and variance (BN, SyncBN, CBN)", "dict(type='BN')"),
    frozenset({"running_var"}): ("a running variance without mean (EvoNormB0)", "dict(type='EvoNormB0')"),
    frozenset(): ("no running statistics (GN, LN, IN, EvoNormS0, FRN)", "dict(type='GN', num_groups=32)"),
}


def check_norms(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Refuse weights whose norm layers are of another kind than the model's.

    Loading them would only warn, in a long list of keys, and leave norms at their initial values: a model that
    trains, or scores badly, for no visible reason. Kinds are told apart by their running statistics, and by
    their names where both sides have a norm after the same convolution (``gn1`` here, ``bn1`` there). What
    the state dict lacks altogether (a head), ``num_batches_tracked``, and a layer's extra state are no difference.

    Args:
        model: The model the weights are for.
        state_dict: The weights, with the model's own key names.

    Raises:
        CheckpointError: If any norm layer is of another kind, or lacks the variance to its mean.
    """
    ours, theirs = _norms(model.state_dict()), _norms(state_dict)
    for name, (statistics, _) in theirs.items():
        if statistics not in _KINDS:
            raise CheckpointError(
                f"The checkpoint has {name}.running_mean and no {name}.running_var. Is the file whole?"
            )
    differences = norm_differences(model, state_dict)
    if not differences:
        return
    name, other = differences[0]
    expected, given = (_KINDS[kind] for kind in (ours[name][0], theirs[other][0]))
    raise CheckpointError(
        f"The checkpoint's norms are not the model's: {len(differences)} of the model's {len(ours)} norm layers "
        f"differ. The first: the model has {type(model.get_submodule(name)).__name__} {name!r} with {expected[0]}; "
        f"the checkpoint has {other!r} with {given[0]}. Expected: a checkpoint trained with this norm_cfg. "
        f"Load such a one, or set norm_cfg to the checkpoint's (probably {given[1]}) and give the model its norm by "
        "model=dict(replace_norm=...), which fits the new norms to the old, or, to keep the convolutions and start "
        "the norms afresh, delete the norms' keys from the file's state_dict."
    )


def norm_differences(model: nn.Module, state_dict: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Return the norms of a model where weights have another kind: its name in the model and that in the weights."""
    ours, theirs = _norms(model.state_dict()), _norms(state_dict)
    present = {key.rpartition(".")[0] for key in state_dict}
    strangers = {place(name): name for name in theirs if name not in ours}
    differences = []
    for name, (statistics, channels) in ours.items():
        other = name if name in present else strangers.get(place(name))
        if other not in theirs or theirs[other][1] != channels:
            continue  # another layer altogether: its shape is load_state_dict's to judge
        if other != name or theirs[other][0] != statistics:
            differences.append((name, other))
    return differences


def _norms(state_dict: dict[str, Tensor]) -> dict[str, tuple[frozenset, int]]:
    """Which running statistics each norm has, and its number of channels, by the norm's name."""
    states: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in state_dict.items():
        if isinstance(value, Tensor):
            layer, _, leaf = key.rpartition(".")
            states[layer][leaf] = value
    norms = {}
    for layer, state in states.items():
        vectors = [state[leaf] for leaf in ("weight", "bias", *sorted(_STATISTICS)) if leaf in state]
        # A norm's tensors hold one number per channel, (C,) or (1, C, 1, 1); a convolution's weight does not.
        channels = {v.numel() if v.ndim == 1 or (v.ndim > 2 and v.shape[1] == v.numel()) else -1 for v in vectors}
        if len(vectors) > 1 and len(channels) == 1 and -1 not in channels:
            norms[layer] = frozenset(state) & _STATISTICS, channels.pop()
    return norms


def place(name: str) -> tuple[str, str]:
    """Where a norm sits, whatever its kind: ``backbone.layer1.0.bn2`` and ``...gn2`` are one place."""
    parent, _, own = name.rpartition(".")
    kind = own.rstrip("0123456789")
    return (parent, own.removeprefix(kind)) if kind in _kinds_in_names() else (parent, own)


@functools.cache
def _kinds_in_names() -> frozenset[str]:
    """What norms are called in backbones and heads: mmcv's abbreviations, and those of our layers."""
    ours = {getattr(getattr(layers, name), "_abbr_", "norm_layer") for name in layers.__all__}
    return frozenset({"bn", "gn", "ln", "in", "norm_layer"} | ours)


def _check_state(checkpoint: dict, with_schedulers: bool) -> None:
    """Check that a checkpoint has what a run needs to go on.

    Raises:
        CheckpointError: If anything is missing or of another kind: mmengine would pass over it, or end in its depths.
    """
    wrong = []
    meta = checkpoint.get("meta")
    for name in ("epoch", "iter"):
        value = meta.get(name) if isinstance(meta, dict) else None
        if type(value) is not int or value < 0:
            wrong.append(f"meta[{name!r}] is {value!r}" if value is not None else f"it has no meta[{name!r}]")
    seed = meta.get("seed") if isinstance(meta, dict) else None
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**32):
        wrong.append(f"meta['seed'] is {seed!r}")
    hub = checkpoint.get("message_hub")
    parts = ("log_scalars", "runtime_info", "resumed_keys")
    if not (isinstance(hub, dict) and all(isinstance(hub.get(part), dict) for part in parts)):
        wrong.append("it has no message_hub of mmengine")
    if not (isinstance(checkpoint.get("optimizer"), dict) and checkpoint["optimizer"]):
        wrong.append("it has no state of the optimizer")
    if with_schedulers and not (isinstance(checkpoint.get("param_schedulers"), list | dict)):
        wrong.append("it has no param_schedulers")
    if wrong:
        raise CheckpointError(
            f"{source.get()} is nothing to go on from: {', '.join(wrong)}. Expected: a checkpoint that the same run "
            "saved (not best_*.pth, which has weights only). To start anew from its weights, leave out --resume and "
            "write --cfg-options load_from=FILE."
        )


@HOOKS.register_module()
class CheckpointNormHook(Hook):
    """Checks every checkpoint that the Runner loads or resumes from, before it is used.

    Its norms must be the model's (`check_norms`); to resume and to evaluate, it must have all weights of the model.

    Switch on with ``custom_hooks = [dict(type="CheckpointNormHook")]``.
    """

    priority = "VERY_HIGH"  # before hooks that move weights about in the checkpoint

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        weights = weights_of(checkpoint)
        weights = {re.sub(r"^module\.", "", key): value for key, value in weights.items()}
        # Of a run that goes on, the optimizer's state would not fit norms that were replaced since.
        check_norms(model, weights if runner._resume else as_loaded(model, weights))
        if runner._resume:
            _check_state(checkpoint, runner.param_schedulers is not None)
            expect_whole_model("Go on with the config that the run began with, or start from its weights: load_from.")
        elif not isinstance(runner._train_loop, BaseLoop):  # not built: nothing will be learned
            expect_whole_model("It would be evaluated with random numbers there: give the config of this checkpoint.")


# ---- resuming the message hub


def _is_plain_history(value) -> bool:
    return isinstance(value, dict) and set(value) == {"log_history", "count_history", "max_length"}


def _history_from(plain: dict) -> HistoryBuffer:
    rows = (plain[name] for name in ("log_history", "count_history"))
    # .cpu(): map_location may have sent them to the GPU with everything else
    arrays = (row.cpu().numpy() if isinstance(row, Tensor) else np.array(row) for row in rows)
    return _history(*arrays, plain["max_length"])


def _reads_plain(load_state_dict):
    @functools.wraps(load_state_dict)
    def load_plain_state_dict(self, state_dict):
        if isinstance(state_dict, dict) and "log_scalars" in state_dict:
            scalars = {
                name: _history_from(value) if _is_plain_history(value) else value
                for name, value in state_dict["log_scalars"].items()
            }
            state_dict = {**state_dict, "log_scalars": scalars}
        own_config = self._runtime_info.get("cfg")  # the text of this run's, which the checkpoint's would replace
        load_state_dict(self, state_dict)
        if own_config is not None:
            self._runtime_info["cfg"] = own_config

    return load_plain_state_dict


def install() -> None:
    """Replace what mmengine's checkpoint module loads and saves with, and how its message hub resumes."""
    if isinstance(mmengine_checkpoint.torch, _SafeTorch):
        return
    # Every scheme (file, http, s3, open-mmlab://, ...) loads through these two names of that module.
    mmengine_checkpoint.torch = _SafeTorch()
    mmengine_checkpoint.load_url = load_url
    MessageHub.load_state_dict = _reads_plain(MessageHub.load_state_dict)
    tell("normplug: checkpoints are loaded with torch's safe unpickler, and saved so that it can read them")
