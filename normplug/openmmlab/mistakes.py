"""One sentence and exit code 2 for what comes out of reading a config, building a model and its first iteration.

The toolkits end a mistyped setting in dozens of lines of traceback whose last one seldom names the setting. Every tool
runs inside of `answered`, which says what was given, where in the config it stands, and what was expected. Nothing is
hidden: an exception of an unknown cause is named with its class, message and place, and ``--debug`` shows its whole
traceback. After the first iteration an exception is a failure of the run and keeps its traceback.
"""

import argparse
import dis
import errno
import functools
import linecache
import os
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.registry import OPTIMIZERS, Registry
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop
from torch import nn

from normplug.openmmlab.classes import stock_class
from normplug.openmmlab.config_files import nearest
from normplug.openmmlab.data_files import some
from normplug.openmmlab.data_places import class_counts
from normplug.openmmlab.saving import CheckpointNotSavedError
from normplug.openmmlab.settings import TAKEN_OUT, TOP_LEVEL, accepted_arguments

__all__ = ["SampleError", "add_debug", "answered", "explain"]

PACKAGE = Path(__file__).resolve().parent.parent
UNKNOWN = "; --debug shows the whole traceback."  # how every sentence ends that names an exception and no cause
LONGEST = 400  # characters of somebody else's message


def add_debug(p: argparse.ArgumentParser) -> None:
    """Add the flag that shows what `answered` keeps to itself."""
    p.add_argument("--debug", action="store_true", help="show the whole traceback of an error, before its sentence")


class answered:
    """Turns an exception in its block into a sentence on stderr and an exit code.

    Args:
        tool: Name of the program, which the sentence begins with.
        debug: Whether to print the traceback too.

    Attributes:
        code: What the program is to exit with: 0; 2 after a mistake; 1 where a run could not go on.
    """

    def __init__(self, tool: str, debug: bool) -> None:
        self.tool, self.debug, self.code = tool, debug, 0
        self.first = FirstIteration()

    def watch(self, runner: Runner) -> Runner:
        """Look at a runner's first iteration, which is the last that belongs to the building of a run."""
        runner.register_hook(self.first, priority="VERY_LOW")
        return runner

    def __enter__(self) -> "answered":
        _name_samples()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(error, Exception):  # none, or the user's Ctrl-C, or argparse's exit
            return False
        sentence = explain(error)
        is_told = isinstance(error, CheckpointNotSavedError) or _is_full(error)
        if self.first.is_done and not is_told:
            if UNKNOWN not in sentence:
                print(f"{self.tool}: {sentence}", file=sys.stderr)
            return False
        self.code = 1 if is_told else 2
        if self.debug:
            traceback.print_exception(kind, error, error.__traceback__)
        if self.debug or _speaks_first():
            print(f"{self.tool}: {sentence}", file=sys.stderr, flush=True)
        return True


def _speaks_first() -> bool:
    """Whether no other process of this run has ended with an error on this machine: all tend to meet the same."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../<attempt>/<rank>/error.json, with one folder per attempt
    if not place:
        return True
    try:
        (Path(place).parent.parent / "normplug.said").open("x").close()
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


class FirstIteration(Hook):
    """Remembers that it has happened, and says which losses of it are no numbers.

    Raises:
        ValueError: Before training, if there is nothing to train on or to evaluate.
    """

    def __init__(self) -> None:
        self.is_done = False

    def before_train(self, runner: Runner) -> None:
        _tell_needless_classes(runner)
        loaders = [("train_dataloader", runner.train_dataloader)]
        if runner.val_loop is not None:
            loaders.append(("val_dataloader", runner.val_dataloader))
        for name, loader in loaders:
            if len(loader) == 0:
                samples = len(loader.dataset)
                raise ValueError(
                    f"{name} has no batch: its data set ({type(loader.dataset).__name__}) holds {samples} samples"
                    + (
                        ", fewer than a batch, and drop_last=True leaves them out: set a smaller batch_size."
                        if samples
                        else ". Check its ann_file, data_root and classes: what fits none of them is left out."
                    )
                )

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if self.is_done:
            return
        self.is_done = True
        values = {name: value for name, value in (outputs or {}).items() if isinstance(value, torch.Tensor)}
        if wrong := [name for name, value in values.items() if not value.detach().isfinite().all()]:
            print(
                f"normplug: {some(wrong)} of the first iteration is NaN or infinite: look at the weights it starts "
                f"from, the data's values and boxes, and optim_wrapper.optimizer.lr",
                file=sys.stderr,
            )

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.is_done = True


def _tell_needless_classes(runner: Runner) -> None:
    """Say on stderr where heads of mmseg and mmpretrain have outputs for which the data has no class."""
    dataset = runner.train_dataloader.dataset
    classes = (getattr(dataset, "metainfo", None) or {}).get("classes")
    if classes and runner.cfg.get("default_scope") in ("mmseg", "mmpretrain"):
        for path, _, key, value in class_counts(runner.cfg):
            if value > len(classes):
                print(
                    f"normplug: {path}.{key}={value}, and {type(dataset).__name__} has {len(classes)} classes "
                    f"({some(classes)}): the others are never seen",
                    file=sys.stderr,
                )


# --- samples


class SampleError(ValueError):
    """A sample of the data could not be read or transformed; the message names its file."""


def _name_samples() -> None:
    """Have the pipelines of mmengine's data sets name the file of a sample that they fail at. Again does nothing."""
    if not hasattr(Compose.__call__, "names_samples"):
        Compose.__call__ = _naming_samples(Compose.__call__)


def _naming_samples(call):
    @functools.wraps(call)
    def call_and_name(self: Compose, data: dict) -> dict | None:
        try:
            return call(self, data)
        except SampleError:
            raise
        except Exception as error:
            raise SampleError(_about_sample(error, data)) from error

    call_and_name.names_samples = True
    return call_and_name


def _about_sample(error: Exception, sample: dict) -> str:
    steps = [frame.f_locals.get("t") for frame, _ in traceback.walk_tb(error.__traceback__)]
    step = next((type(step).__name__ for step in steps if callable(step)), "the pipeline")
    files = [sample.get(key) for key in ("img_path", "filename", "frame_dir", "seg_map_path", "audio_path")]
    files = [str(file) for file in files if file]
    told = f"{step} failed with {type(error).__name__}" + (f": {_message(error)}" if _message(error) else "")
    if isinstance(error, KeyError):
        told = f"{step} needs {error.args[0]!r}, which its annotation does not have"
    for file in files:
        if "://" not in file and not os.path.exists(file):
            return f"{file} is in the annotations and not on the disk ({step})."
        if os.path.isfile(file) and os.path.getsize(file) == 0:
            return f"{file} is empty (0 bytes): put the whole file there, or take it out of the annotations."
    whose = files[0] if files else "A sample"
    return f"{whose} cannot be used: {told}. Mend the file or its annotation, or take it out of the annotations."


# --- exceptions


def explain(error: Exception) -> str:
    """Return one or two sentences about an exception: what was given, where, and what was expected."""
    try:
        trace = _Trace(error)
        return _known_cause(trace) or _unknown_cause(trace)
    except Exception:  # frames hold whatever users put there; what cannot be looked at must not hide the error
        return f"{type(error).__name__}: {_message(error)}{UNKNOWN}"


@dataclass
class _Building:
    """A frame of the traceback in which something of a config was built."""

    cfg: dict
    registry: Registry | None


class _Trace:
    """An exception with its frames, the innermost last."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.message = _message(error)
        self.frames = list(traceback.walk_tb(error.__traceback__))
        self.last = _last(error.__traceback__)

    def config(self) -> Config | None:
        """Return the config that the tool was at work with."""
        values = (value for frame, _ in self.frames for value in frame.f_locals.values())
        return next((value for value in values if isinstance(value, Config)), None)

    def building(self) -> list[_Building]:
        """Return what was being built, the outermost first."""
        found = []
        for frame, _ in self.frames:
            file, name, names = frame.f_code.co_filename, frame.f_code.co_name, frame.f_locals
            is_registry = file.endswith(("registry/build_functions.py", "registry\\build_functions.py"))
            is_layer = f"{os.sep}mmcv{os.sep}cnn{os.sep}" in file and name.startswith("build_")
            if (is_registry or is_layer) and isinstance(names.get("cfg"), dict):
                found.append(_Building(dict(names["cfg"]), names.get("registry")))
        return found

    def place(self) -> str:
        """Return where in the config the innermost thing stands that was being built: ``model.neck (FPN)``."""
        config, path, kind = self.config(), "", ""
        for built in self.building():
            kind = built.cfg.get("type")
            if config is not None:
                path = _find(config, built.cfg, path) or path
        kind = kind if isinstance(kind, str) else getattr(kind, "__name__", None)
        return f"{path} ({kind})" if path and kind else path or kind or ""

    def method(self) -> str:
        """Return the innermost method that ran: ``ResNet.init_weights``, or ``model.neck.convs.0 (Conv2d)``."""
        found = [(f.f_locals.get("self"), f.f_code.co_name) for f, _ in self.frames]
        kinds = nn.Module | Runner | BaseLoop
        owners = [(owner, name) for owner, name in found if isinstance(owner, kinds) and name != "__getattr__"]
        if not owners:
            return ""
        owner, name = owners[-1]
        model = next((owner for owner, _ in owners if isinstance(owner, nn.Module)), None)
        if model is not None and name.endswith("forward"):
            path = next((path for path, part in model.named_modules() if part is owner), "")
            return f"model{'.' if path else ''}{path} ({type(owner).__name__})"
        return f"{stock_class(owner).__name__}.{name}"  # adapt's classes are made at run time


def _last(tb: TracebackType | None) -> TracebackType | None:
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    return tb


def _message(error: BaseException) -> str:
    """Return the message of an exception on one line."""
    text = str(error.args[0]) if isinstance(error, KeyError) and len(error.args) == 1 else str(error)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _known_cause(trace: _Trace) -> str | None:
    for cause in (
        _ours,
        _sample,
        _machine,
        _file,
        _no_samples,
        _unknown_name,
        _no_type,
        _wrong_argument,
        _class_number,
    ):
        if sentence := cause(trace):
            return sentence
    return None


def _ours(trace: _Trace) -> str | None:
    """What our own code says with a raise is a sentence; what merely happens in it is not."""
    if trace.last is None or not _is_raise(trace.last.tb_frame.f_code, trace.last.tb_lasti):
        return None
    file = Path(trace.last.tb_frame.f_code.co_filename).resolve()
    if PACKAGE not in file.parents and PACKAGE.parent / "tools" not in file.parents:
        return None
    error = trace.error
    return (str(error.args[0]) if isinstance(error, KeyError) else str(error)) or None


def _is_raise(code: CodeType, offset: int) -> bool:
    return dis.opname[code.co_code[offset]] == "RAISE_VARARGS"


def _sample(trace: _Trace) -> str | None:
    """A sample of a data loader's own process, which sends its traceback as text."""
    if not isinstance(trace.error, SampleError):
        return None
    return str(trace.error).rpartition(f"{SampleError.__name__}: ")[2].strip()


def _file(trace: _Trace) -> str | None:
    error = trace.error
    if not isinstance(error, OSError) or not error.filename:
        return None
    if isinstance(error, FileNotFoundError):
        return f"There is no file {error.filename}" + _of(trace) + "."
    return f"{error.filename}: {error.strerror}" + _of(trace) + "."


def _no_samples(trace: _Trace) -> str | None:
    """mmengine packs the samples of a data set into one array, and numpy will not make one of none."""
    if "need at least one array to concatenate" in trace.message:
        return (
            f"{trace.place() or 'The data set'} has found no sample: check its data_root, data_prefix, ann_file and "
            f"the endings of the files."
        )
    return None


def _of(trace: _Trace) -> str:
    place = trace.place()
    return f", which {place} needs" if place else ""


def _unknown_name(trace: _Trace) -> str | None:
    match = re.match(r"(\S+) is not in the (?:\w+::)?([\w ]+) registry", trace.message)
    config = trace.config()
    if match:
        name, what = match.groups()
        registry = next((built.registry for built in reversed(trace.building()) if built.registry), None)
        registry = registry or next(
            (f.f_locals["registry"] for f, _ in trace.frames[::-1] if "registry" in f.f_locals), None
        )
    elif trace.message == "None is not a callable object":  # mmengine's constructor of optimizers
        what, registry = "optimizer", OPTIMIZERS
        name = ((config or {}).get("optim_wrapper") or {}).get("optimizer", {}).get("type")
        if not isinstance(name, str) or name in _names(registry):
            return None
    else:
        return None
    path = next((path for path, part in _dicts(config or {}) if part.get("type") == name), "")
    like = nearest(name.rpartition(".")[2], _names(registry), 3) if isinstance(registry, Registry) else []
    hint = f"did you mean {' or '.join(like)}?" if like else "check its spelling."
    return (
        f"{f'{path}.type' if path else 'type'}={name!r} names no {what} that is known here: {hint} A class of your own "
        f"needs custom_imports=dict(imports=[its module])."
    )


def _no_type(trace: _Trace) -> str | None:
    if '`cfg` or `default_args` must contain the key "type"' not in trace.message:
        return None
    place = trace.place()
    given = dict(trace.building()[-1].cfg) if trace.building() else {}
    return f"{place or 'A part of the config'} has no type: expected dict(type=...), got {given!r}."


def _names(registry: Registry) -> set[str]:
    """Return what can be built by name from a registry: its own, its parents', and those of other toolkits."""
    while registry.parent is not None:
        registry = registry.parent
    found, todo = set(), [registry]
    while todo:
        here = todo.pop()
        found |= here.module_dict.keys()
        todo += here.children.values()
    return found


def _wrong_argument(trace: _Trace) -> str | None:
    if not isinstance(trace.error, TypeError):
        return None
    match = re.fullmatch(r"([\w.]+)\(\) got an unexpected keyword argument '(\w+)'.*", trace.message)
    if match:
        called, key = match.groups()
        config = trace.config()
        building = [built for built in trace.building() if key in built.cfg]
        kind = _called(trace, called)
        if kind is None:
            return None
        names, _ = accepted_arguments(kind)
        path = ""
        if config is not None:
            at = [path for path, part in _dicts(config) if key in part and _type_name(part) in ("", kind.__name__)]
            at = at or [path for path, part in _dicts(config) if key in part]
            if not at:
                return None  # nobody typed it: a fault of the code
            inside = _find(config, building[-1].cfg, "") if building else None
            path = f"{inside if inside in at else at[0]}.{key}"
        like = nearest(key, names | TAKEN_OUT)
        return (
            f"{path or key} is not known to {kind.__name__}"
            + (f": did you mean {like[0]}?" if like else ".")
            + f" It takes {some(sorted(names), 30)}."
        )
    match = re.fullmatch(
        r"([\w.]+)\(\) missing \d+ required (?:positional|keyword-only) arguments?: (.+)", trace.message
    )
    if match and (place := trace.place()):
        return f"{place} lacks {match.group(2)}: {match.group(1).removesuffix('.__init__')} cannot be built without."
    return None


def _type_name(part: dict) -> str:
    """Return the name of the class that a config's dict is to become; none for mmcv's short names."""
    kind = part.get("type", "")
    return kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", "")


def _called(trace: _Trace, called: str) -> Any:
    """Return the class whose ``__init__`` did not know an argument (not the base that said so), or the function."""
    functions = []
    for frame, _ in reversed(trace.frames):
        values = list(frame.f_locals.values())
        own = [type(frame.f_locals["self"])] if "self" in frame.f_locals else []
        for value in [*own, *values]:
            if isinstance(value, type):
                if any(called in (f"{cls.__qualname__}.__init__", cls.__qualname__) for cls in value.__mro__):
                    return value
            elif callable(value) and getattr(value, "__qualname__", None) == called:
                functions.append(value)  # perhaps the __init__ itself, in what wraps it
    return functions[0] if functions else None


def _class_number(trace: _Trace) -> str | None:
    """A label that a head has no output for."""
    label = re.search(r"Target (-?\d+) is out of bounds|Class values must be (?:smaller|non-negative)", trace.message)
    if not label and "device-side assert" not in trace.message:
        return None
    config = trace.config()
    counts = [f"{path}.{key}={value}" for path, _, key, value in class_counts(config)] if config is not None else []
    given = f"the label {label.group(1)}" if label and label.group(1) else "a label"
    metas = (getattr(frame.f_locals.get("self"), "dataloader", None) for frame, _ in trace.frames)
    metas = (getattr(getattr(loader, "dataset", None), "metainfo", None) or {} for loader in metas)
    classes = next((meta["classes"] for meta in metas if meta.get("classes")), None)
    told = f"The data has {given} that the model has no output for ({some(counts, 10) or 'num_classes of its head'})"
    if classes:
        return f"{told}: its data set has {len(classes)} classes ({some(classes)}), set num_classes to {len(classes)}."
    return f"{told}: set num_classes to the number of classes; labels go from 0 to one less than it."


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _machine(trace: _Trace) -> str | None:
    """What the machine, and not the config, is too small for."""
    if _is_full(trace.error):
        return (
            f"The disk is full ({trace.message}): nothing more can be written, logs included. Make room and go on with "
            "--resume; checkpoints that were there are whole."
        )
    if isinstance(trace.error, torch.OutOfMemoryError):
        return f"The GPU's memory is not enough: set a smaller train_dataloader.batch_size, or --amp ({trace.message})."
    if re.search(r"DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)", trace.message):
        return (
            f"A process that loads data has died ({trace.message}): memory, or shared memory (/dev/shm), was not "
            f"enough; set train_dataloader.num_workers=0 to see, or a smaller number of them."
        )
    return None


def _unknown_cause(trace: _Trace) -> str:
    """Name the exception and the user's place; nothing is claimed of whose fault it is."""
    place = trace.place()
    told = f"{type(trace.error).__name__}" + (f": {trace.message}" if trace.message else "")
    if trace.last is not None:
        code = trace.last.tb_frame.f_code
        line = linecache.getline(code.co_filename, trace.last.tb_lineno).strip()
        file = "/".join(Path(code.co_filename).parts[-3:])
        told += f" (in {file}, line {trace.last.tb_lineno}" + (f": {line})" if line and not trace.message else ")")
    if not place and (method := trace.method()):
        told = f"{method} ended in {told}"
    whose = "This run has ended before its first iteration" if trace.config() else "This cannot be done"
    whose = f"{place} cannot be built or run" if place else whose
    return f"{whose}: {told}{UNKNOWN}"


# --- places in a config


def _dicts(part: Any, path: str = "") -> Iterator[tuple[str, dict]]:
    """Yield path and dict for every dict in a config."""
    if isinstance(part, dict | Config):
        if path:
            yield path, part
        # What a run reads comes before the file's own variables, which are often the same dicts.
        for key in part if path else sorted(part, key=lambda key: key not in TOP_LEVEL or key.endswith("_cfg")):
            yield from _dicts(part[key], f"{path}.{key}" if path else str(key))
    elif isinstance(part, list | tuple):
        for i, value in enumerate(part):
            yield from _dicts(value, f"{path}.{i}")


def _find(config: Config, built: dict, inside: str) -> str | None:
    """Return the path of a dict that something was built from; builders add to it, so it is the most alike."""
    found = [
        (path.startswith(inside), sum(built.get(key) == value for key, value in part.items()) - len(part), path)
        for path, part in _dicts(config)
        if _type_name(part) == _type_name(built) and (part.get("type") or part == built)
    ]
    return max(found, key=lambda item: item[:2])[2] if found else None
