"""What a config asks for and a model does not get, said at once, with the line to write instead.

mmengine and the toolkits pass over these in silence: settings at the top level that nothing below reads, norms that
know no ``norm_cfg``, and norms that keep their initial values because the checkpoint has another kind in their place.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import mmengine.runner.checkpoint as mmengine_checkpoint
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS, Registry
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normplug.layers.group_norm import GroupsError, record_groups
from normplug.openmmlab.adapt import registries
from normplug.openmmlab.checkpoints import norm_differences
from normplug.openmmlab.replacement import as_loaded, as_text, fitting_group_size

__all__ = ["install", "unread_settings"]

# What the toolkits' configs hand down by name, and what changes it in a config that inherits.
HANDED_DOWN = {
    "norm_cfg": "model = dict(replace_norm={value})",
    "conv_cfg": "model = dict(backbone=dict(conv_cfg={value}))",
    "act_cfg": "model = dict(backbone=dict(act_cfg={value}))",
}
# Of the models being built, the outermost first: whether one was told which norm to have.
_building: ContextVar[tuple[bool, ...]] = ContextVar("normplug_building", default=())


def install() -> None:
    """Have runners, registries and mmengine's loader say what they would pass over. Calling it again does nothing."""
    for runner in (Runner, FlexibleRunner):
        if not hasattr(runner.from_cfg.__func__, "tells"):
            runner.from_cfg = classmethod(_telling_what_nothing_reads(runner.from_cfg.__func__))
    for registry in registries(MODELS):
        if not hasattr(registry.build_func, "advises"):
            registry.build_func = _advising(registry.build_func)
    if not hasattr(mmengine_checkpoint.load_state_dict, "tells"):
        import mmengine.runner

        telling = _telling_what_starts_anew(mmengine_checkpoint.load_state_dict)
        mmengine_checkpoint.load_state_dict = mmengine.runner.load_state_dict = telling


# --- settings that nothing reads


def unread_settings(cfg: Config) -> list[str]:
    """Return a sentence for each norm_cfg, conv_cfg and act_cfg at the top level that no part of the model has.

    A config that inherits its model from another file gets those values that the other file had, not these.
    """
    found = []
    for name, line in HANDED_DOWN.items():
        value = cfg.get(name)
        if not isinstance(value, dict) or "model" not in cfg or (name == "norm_cfg" and "replace_norm" in cfg.model):
            continue
        if _plain(value) not in list(_values(cfg.model, name)):
            found.append(
                f"{name} = {as_text(value)} stands at the top level of this config, and nothing in its model reads it: "
                f"the model is what it was without. Write instead: {line.format(value=as_text(value))}"
            )
    return found


def _values(cfg: Any, name: str) -> Iterator[dict]:
    """Yield what the parts of a config have under a name, or one that ends in it (``head_norm_cfg``)."""
    for key, value in cfg.items() if isinstance(cfg, dict) else enumerate(cfg):
        if isinstance(key, str) and isinstance(value, dict) and (key.endswith(name) or key == "replace_norm"):
            yield _plain(value)
        if isinstance(value, dict | list | tuple):
            yield from _values(value, name)


def _plain(value: dict) -> dict:
    return {key: item for key, item in value.items() if key != "_scope_"}  # mmengine's, in all that is inherited


def _telling_what_nothing_reads(from_cfg: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(from_cfg)
    def from_cfg_and_tell(cls: type, cfg: Config) -> Any:
        runner = from_cfg(cls, cfg)
        for sentence in unread_settings(cfg):  # behind the config and the environment, which fill the screen
            print_log(f"normplug: {sentence}", "current", logging.WARNING)
        return runner

    from_cfg_and_tell.tells = True
    return from_cfg_and_tell


# --- norms that a norm_cfg does not reach, and groups that do not fit


def _advising(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_and_advise(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        above = _building.get()
        kind = _asked_for(cfg, kwargs["registry"])
        token = _building.set((*above, kind is not None))
        try:
            built = build(cfg, *args, **kwargs)
        except GroupsError as error:
            if above:
                raise
            with record_groups() as channels:  # builds the model once more, with whatever groups
                build(cfg, *args, **kwargs)
            raise GroupsError(
                f"{error} For the whole model: num_groups='auto'{fitting_group_size(channels)}."
            ) from error
        finally:
            _building.reset(token)
        if kind is not None and not any(above) and isinstance(built, nn.Module):
            _tell_strays(built, cfg, kind)
        return built

    build_and_advise.advises = True
    return build_and_advise


def _asked_for(cfg: Any, registry: Registry) -> type | None:
    """Return the class of norm that a part's ``norm_cfg`` names, if it is no BN and its parts name no other."""
    norm_cfg = cfg.get("norm_cfg") if isinstance(cfg, dict) else None
    kinds = {value.get("type") for value in _values(cfg, "norm_cfg")} if isinstance(norm_cfg, dict) else set()
    if len(kinds) != 1 or "replace_norm" in cfg:
        return None
    kind = next(iter(kinds))
    kind = registry.get(kind) if isinstance(kind, str) else kind
    return kind if isinstance(kind, type) and kind not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) else None


def _tell_strays(model: nn.Module, cfg: dict, kind: type) -> None:
    norms = [name for name, module in model.named_modules() if isinstance(module, kind)]
    strays = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and not isinstance(m, kind)}
    if not strays:
        return
    first = next(iter(strays))
    print_log(
        f"normplug: {len(strays)} of the {len(strays) + len(norms)} norms of {type(model).__name__} know nothing of "
        f"its norm_cfg = {as_text(_plain(cfg['norm_cfg']))} and are {type(strays[first]).__name__} all the same "
        f"({first}{', ...' if len(strays) > 1 else ''}). To change them too, write in its place: "
        f"replace_norm={as_text(_plain(cfg['norm_cfg']))}",
        "current",
        logging.WARNING,
    )


# --- norms that keep their initial values


def _telling_what_starts_anew(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_and_tell(module: nn.Module, state_dict: dict, *args: Any, **kwargs: Any) -> Any:
        result = load(module, state_dict, *args, **kwargs)
        anew = [pair for pair in norm_differences(module, as_loaded(module, state_dict)) if pair[0] != pair[1]]
        if anew:
            ours, theirs = anew[0]
            kind = type(module.get_submodule(ours)).__name__
            print_log(
                f"normplug: {len(anew)} norms keep their initial values: the model has {kind} {ours!r} where the "
                f"checkpoint has {theirs!r}. To start from the checkpoint's norms, leave norm_cfg as it is there, and "
                f"write model = dict(replace_norm=...) with the norm that you want.",
                "current",
                logging.WARNING,
            )
        return result

    load_and_tell.tells = True
    return load_and_tell
