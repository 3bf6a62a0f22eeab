"""What came in a file of weights stays data: it is never run as a config, and names no file to delete.

A checkpoint of mmengine carries more than weights: the text of a config (``meta['cfg']``, in older files
``meta['config']``, and ``message_hub['runtime_info']['cfg']``), and paths of checkpoints that a later save removes (see
saving.py). mmengine evaluates the first with ``Config.fromstring``, on resume and in inferencers, and a config is a
program.
"""

import functools
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

from normplug.openmmlab._stand_ins import tell
from normplug.openmmlab.file_kinds import CheckpointError

__all__ = ["TextFromCheckpointError", "install", "make_inert"]

_seen: set[int] = set()  # hashes of every text that a checkpoint brought into this process


class TextFromCheckpointError(CheckpointError):
    """A config was to be read from text that a checkpoint holds. Nothing of it was executed."""


def make_inert(checkpoint: Any) -> None:
    """Take the texts of a checkpoint out of reach of everything that runs text. Its values stay as they are.

    ``meta['config']``, which ``Runner.resume`` evaluates where it finds it, becomes ``meta['cfg']``, under which
    mmengine 0.x saves the same text and does not read it again.
    """
    _seen.update(hash(text) for text in _texts(checkpoint))
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    if isinstance(meta, dict) and "config" in meta:
        meta.setdefault("cfg", meta["config"])
        del meta["config"]
        tell("normplug: the config in the checkpoint is not evaluated, so the number of its GPUs is not compared")


def _texts(checkpoint: Any) -> Iterator[str]:
    """Every string of a nested value but plain names, which are no programs; values only, not the keys of weights."""
    stack, seen = [checkpoint], set()  # a file may hold a list that holds itself
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            if value and not value.isidentifier():
                yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            stack.extend(value.values() if isinstance(value, dict) else value)


def _refuses_checkpoints(fromstring):
    @functools.wraps(fromstring)
    def from_trusted_string(cfg_str, file_format):
        if isinstance(cfg_str, str) and hash(cfg_str) in _seen:
            raise TextFromCheckpointError(
                "The config was to be read from the text inside a checkpoint, and nothing in it was executed: a config "
                "is a program, and whoever made the file would choose it. Expected: a config file of yours. Name it, "
                "as in DetInferencer(model='CONFIG.py', weights='FILE.pth'); to see the text that the file holds, "
                "print torch.load('FILE.pth')['meta']['cfg'] and save what you trust as CONFIG.py."
            )
        return fromstring(cfg_str, file_format)

    return from_trusted_string


def install() -> None:
    """Have ``Config.fromstring`` refuse the texts of checkpoints, whoever asks for it."""
    if not hasattr(Config.fromstring, "__wrapped__"):
        Config.fromstring = staticmethod(_refuses_checkpoints(Config.fromstring))
