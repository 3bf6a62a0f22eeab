"""Weights from a file of any of the kinds that model zoos publish, and nothing in it is executed."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normplug.openmmlab.checkpoints import load, load_pickle
from normplug.openmmlab.file_kinds import check_kind, is_safetensors
from normplug.openmmlab.weight_checks import check_weights

__all__ = ["Checkpoint", "read_checkpoint"]

# Where the weights are if they are not the whole file: torch's usual name, detectron2's, Detectron's, timm's EMA last.
_INSIDE = ("state_dict", "model", "blobs", "model_state", "state_dict_ema")
_TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the number with which torch's files before 1.6 begin


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        weights: Tensors by the file's own keys.
        others: Entries among the weights that are no tensors, by key.
        facts: What stands beside the weights: epoch, optimizer, author.
    """

    weights: dict[str, Tensor]
    others: dict[str, Any]
    facts: dict[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of torch (old and new), a ``.npz``, a ``.safetensors``, or a pickle of numpy arrays.

    The kind is recognized by the content. Momentum and the like stay in: they are for the format to judge.

    Raises:
        FileNotFoundError: If there is no such file.
        UnsafeCheckpointError: If the file names classes or functions beyond tensors and arrays.
        CheckpointError: If it is none of these kinds, or holds weights that are no numbers to compute with.
        ValueError: If it holds no tensors.
    """
    path = Path(path)
    data = _load(path)
    facts: dict[str, Any] = {}
    while isinstance(data, dict) and (name := next((n for n in _INSIDE if isinstance(data.get(n), dict)), None)):
        facts |= {key: value for key, value in data.items() if key != name}
        data = data[name]
    entries = {str(key): _tensor(value) for key, value in data.items()} if isinstance(data, dict) else {}
    weights = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(
            f"{path} holds {type(data).__name__} without tensors. Expected: weights by name, the dict itself or under "
            f"one of {', '.join(_INSIDE)}."
        )
    check_weights(weights, path)
    return Checkpoint(weights, {key: value for key, value in entries.items() if key not in weights}, facts)


def _load(path: Path) -> Any:
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            arrays = any(name.endswith(".npy") for name in archive.namelist())
        if arrays:
            with np.load(path, allow_pickle=False) as archive:
                return dict(archive)
    check_kind(path)
    with path.open("rb") as file:
        is_pickle = file.read(1) != b"P" and _TORCH_MAGIC not in file.read(64)
    return load_pickle(path) if is_pickle and not is_safetensors(path) else load(path, map_location="cpu")


def _tensor(value: Any) -> Any:
    is_array = isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    return torch.from_numpy(np.array(value)) if is_array else value
