"""What two configs differ in, setting by setting."""

from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

__all__ = ["config_difference"]

ABSENT = "–"
# What says where a run writes and reads, and how it logs: no part of an experiment.
ASIDE = ("work_dir", "load_from", "resume", "launcher", "visualizer", "vis_backends", "log_", "custom_imports")


def config_difference(a: Config, b: Config) -> list[tuple[str, str, str]]:
    """Return path, A's value and B's value of every setting that differs, in A's order; "–" where one has none.

    A part that only one of them has is one row. What configs name at the top level and hand down from there
    (``norm_cfg``, ``dataset_type``) has its rows where the model and the data have it.
    """
    keys = ("model", "optim_wrapper", "param_scheduler", "auto_scale_lr", "custom_hooks", "randomness")
    keys += ("train_cfg", "val_cfg", "test_cfg", "train_dataloader", "val_dataloader", "test_dataloader")
    keys += ("val_evaluator", "test_evaluator", "default_hooks", "env_cfg")
    return [row for key in keys for row in _rows(a.get(key, _NONE), b.get(key, _NONE), key)]


_NONE = object()


def _rows(a: Any, b: Any, path: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            if key != "_scope_" and not key.startswith(ASIDE):
                yield from _rows(a.get(key, _NONE), b.get(key, _NONE), f"{path}.{key}")
    elif _is_list(a) and _is_list(b) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _rows(x, y, f"{path}.{i}")
    elif _plain(a) != _plain(b):
        yield path, _text(a), _text(b)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key != "_scope_"}
    return [_plain(item) for item in value] if _is_list(value) else value


def _text(value: Any) -> str:
    return ABSENT if value is _NONE else f"`{_plain(value)!r}`"
