"""Where pre-trained weights come from and where they lie, and one sentence where there is no network."""

import contextlib
import difflib
import http.client
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from mmengine.config import Config
from mmengine.runner import checkpoint as mmengine_checkpoint

__all__ = [
    "MissingWeightsError",
    "Weights",
    "checkpoints_in",
    "download",
    "fetch_weights",
    "find_weights",
]

PATIENCE = 30.0  # seconds without a byte, after which a download is given up
# Seconds for the first answer. No timeout reaches into the look-up of a server's name, which without a network may take
# half a minute.
FIRST_ANSWER = 10.0


class MissingWeightsError(OSError):
    """Weights are not on this machine and cannot be brought here."""


class Weights(NamedTuple):
    """The address of weights, None if they have none, and the file that holds them on this machine."""

    address: str | None
    file: Path


def find_weights(checkpoint: str) -> Weights | None:
    """Say what ``checkpoint`` of an init_cfg, ``pretrained`` or ``load_from`` stands for; None for a store like s3.

    Args:
        checkpoint: A path, an http(s) address, or a name behind torchvision://, open-mmlab://, mmcls:// and their kin.

    Raises:
        ValueError: If there is no model of that name.
    """
    scheme, _, name = checkpoint.partition("://")
    if not name:
        return Weights(None, Path(checkpoint).expanduser())
    if scheme in ("http", "https"):
        return Weights(checkpoint, Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(checkpoint).path).name))
    if scheme == "detectron-as-rgb":
        return find_weights(name)
    if scheme not in _MODELS:
        return None
    names = _MODELS[scheme]()
    if scheme in ("open-mmlab", "openmmlab"):
        name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
    if name not in names:
        near = difflib.get_close_matches(name, names, 3)
        raise ValueError(
            f"{checkpoint} names no known weights. {f'Near: {scheme}://' + ', '.join(near) if near else ''}".strip()
        )
    if "://" not in names[name]:
        return Weights(None, Path(mmengine_checkpoint._get_mmengine_home(), names[name]))
    return find_weights(names[name])


_MODELS: dict[str, Callable[[], dict[str, str]]] = {
    "torchvision": mmengine_checkpoint.get_torchvision_models,
    "modelzoo": mmengine_checkpoint.get_torchvision_models,
    "open-mmlab": mmengine_checkpoint.get_external_models,
    "openmmlab": mmengine_checkpoint.get_external_models,
    "mmcls": mmengine_checkpoint.get_mmcls_models,
}


def checkpoints_in(cfg: Any) -> Iterator[str]:
    """Yield every checkpoint that a model's config is initialized from, in the order of the config."""
    for key, value in cfg.items() if isinstance(cfg, dict) else enumerate(cfg):
        if isinstance(value, str) and (
            key in ("pretrained", "teacher_ckpt") or (key == "checkpoint" and cfg.get("type") == "Pretrained")
        ):
            yield value
        elif isinstance(value, dict | list | tuple):
            yield from checkpoints_in(value)


def fetch_weights(cfg: Config) -> None:
    """Bring the weights that a run starts from into torch's cache, before data are read and a model is built.

    Raises:
        MissingWeightsError: If a file is not there and cannot be downloaded.
        ValueError: If a name is not known.
    """
    starts = list(checkpoints_in(cfg.get("model") or {}))
    if cfg.get("load_from"):
        starts.append(cfg.load_from)
    for checkpoint in dict.fromkeys(starts):
        weights = find_weights(checkpoint)
        if weights is None or weights.file.is_file():
            continue
        if weights.address is None:
            raise MissingWeightsError(
                f"The weights {checkpoint} are not there (seen from {os.getcwd()}). Give an absolute path, or make the "
                f"file: the config's header, docs/weights.md and docs/checkpoints.md say how."
            )
        download(weights.address, weights.file)


def download(address: str, file: Path, progress: bool = True) -> None:
    """Bring a file to its place, if it is not there.

    Raises:
        MissingWeightsError: If it cannot be downloaded.
    """
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with _told_if_missing(address, file):
        torch.hub.download_url_to_file(address, str(file), progress=progress)


@contextlib.contextmanager
def _told_if_missing(address: str, file: Path) -> Iterator[None]:
    """Make one sentence of what happens to a download without a network, and end it if nothing comes.

    Args:
        address: What is downloaded.
        file: Where to.

    Raises:
        MissingWeightsError: If the download fails.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE if before is None else before)
    try:
        _knock(address)
        yield
    except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and timeouts are OSErrors
        if getattr(error, "errno", None) is not None and getattr(error, "filename", None) is not None:
            raise  # the disk, not the network
        raise MissingWeightsError(
            f"The weights {address} are not on this machine and cannot be downloaded ({_reason(error)}). Get the file "
            f"where there is a network, and put it here: {file}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _knock(address: str) -> None:
    """Raise what happens if a server is asked for nothing but whether it is there; one that answers at all is.

    In a thread of its own, which is left behind where it has no answer in time.
    """
    failures: list[OSError | http.client.HTTPException] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD")).close()
        except urllib.error.HTTPError:
            pass  # an answer: what it means is found out when the file itself is asked for
        except (OSError, http.client.HTTPException) as error:
            failures.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(FIRST_ANSWER)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {FIRST_ANSWER:.0f} s")
    if failures:
        raise failures[0]


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
