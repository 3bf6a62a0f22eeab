"""Another norm in the whole of a model, or in parts of it, by one line of any config.

    custom_imports = dict(imports=['normplug'])
    model = dict(replace_norm=dict(type='GN', num_groups=32))

The key is taken out by whichever ``MODELS`` registry builds the model: the stock model is built, its norms are
exchanged, and ``adapt`` puts the activations right. While the toolkit initializes the weights, the old norms are back
in their places: whatever loads a BN checkpoint there, in whatever way, meets the network that it was written for. What
the old norms then hold goes over to the new ones. The same happens to a checkpoint of the old network that is loaded.
"""

import copy
import difflib
import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import gcd
from typing import Any, TypeVar

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS, Registry
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from normplug.layers.frozen_batch_norm import FrozenBatchNorm
from normplug.layers.group_norm import DEFAULT_GROUPS, GroupNorm
from normplug.openmmlab.adapt import adapt, registries
from normplug.openmmlab.classes import derive
from normplug.openmmlab.successors import (
    LineFit,
    activation_behind,
    channels_of,
    check_place,
    exchange,
    is_same_function,
    put,
    successor,
    take_state,
)

__all__ = ["as_loaded", "as_text", "fitting_group_size", "install", "replace_norm"]

KEY = "replace_norm"
# Whose norms are plain ones. A class of another package with a forward of its own may mean something else.
PLAIN = ("torch", "torchvision", "mmcv", "mmengine", "normplug")
# What became of the weights of a norm.
KEPT, FITTED, COPIED, NEW = "kept", "fitted to the running statistics", "copied", "at their initial values"
ModelOrConfig = TypeVar("ModelOrConfig", nn.Module, Config, dict)


def replace_norm(
    model_or_config: ModelOrConfig, norm_cfg: dict, where: str | Sequence[str] | None = None
) -> ModelOrConfig:
    """Give a model, or the model of a config, another norm, in place.

    Batch, group and instance norms become the named one, also those that no ``norm_cfg`` reaches. LayerNorms stay: they
    normalize tokens. So do norms that contain an activation, and classes of other packages with a forward of their own;
    the log counts them. A layer that contains its activation (EvoNorm, FRN) takes over the one behind it, and a
    backbone's ``norm_eval`` is switched off where all norms in it have become ones that train statistics.

    The weights of the old norms go over: at once in a trained model, else when the toolkit initializes the weights or
    loads a checkpoint of the old network. They are *kept* where the new norm computes the same in evaluation (SyncBN,
    CBN, FrozenBatchNorm for BN), *fitted* where the old norm has trained running statistics, and copied otherwise.
    Fitted means: for channels that are normally distributed with the running mean and variance, the new norm puts out
    what the old one did, by least squares over weight and bias. With data ``convert_norm`` does it better still. One
    line of the log says how many.

        replace_norm(model, dict(type='GN', num_groups=32))
        replace_norm(cfg, dict(type='GN', num_groups='auto'), where='backbone')

    Args:
        model_or_config: A model, or a config (all of it, or the model's part). In a config the line is written that
            does the same when the model is built.
        norm_cfg: Config of the norm, as the toolkits' ``norm_cfg``. eps, momentum and affine are those of the norm
            that goes, unless named. BN and IN take the number of dimensions of what they replace.
        where: Which norms: those at or below these names. A name is a path ('backbone.layer4'), a pattern of paths
            ('backbone.layer[34]*') or 'head', which stands for every head. Default: all.

    Returns:
        ``model_or_config`` itself.

    Raises:
        ValueError: If no norm is there, the new one does not take some number of channels or normalizes other axes, it
            contains an activation in a class of which nobody knows where it applies one, or it would train statistics
            beside others that ``norm_eval`` freezes.
    """
    if not isinstance(norm_cfg, dict) or not isinstance(norm_cfg.get("type"), str):
        raise ValueError(f"replace_norm takes a norm_cfg such as dict(type='GN', num_groups=32), but got {norm_cfg!r}.")
    if isinstance(model_or_config, nn.Module):
        return _replace(model_or_config, norm_cfg, where, MODELS)
    config = model_or_config.get("model", model_or_config)
    if "type" not in config:
        raise ValueError("replace_norm takes a model, or a config with model=dict(type=...), but got one without.")
    rule = dict(norm_cfg) if where is None else dict(norm_cfg, where=where)
    config[KEY] = [*_rules(config[KEY]), rule] if KEY in config else rule
    return model_or_config


def install() -> None:
    """Have every ``MODELS`` registry take ``replace_norm`` out of the configs that it builds, and do it."""
    for registry in registries(MODELS):
        if not hasattr(registry.build_func, "replaces"):
            registry.build_func = _replacing(registry.build_func)


def _replacing(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_and_replace(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(cfg, dict | Config) or KEY not in cfg:
            return build(cfg, *args, **kwargs)
        cfg = cfg.copy()
        rules = _rules(cfg.pop(KEY))
        model = build(cfg, *args, **kwargs)
        for rule in rules:
            where = rule.pop("where", None)
            _replace(model, rule, where, kwargs["registry"])
        return model

    build_and_replace.replaces = True
    return build_and_replace


def _rules(value: Any) -> list[dict]:
    """Return the rules of a config as copies: it has one, or a list of them for different places."""
    rules = value if isinstance(value, list | tuple) else [value]
    for rule in rules:
        if not isinstance(rule, dict) or not isinstance(rule.get("type"), str):
            raise ValueError(
                f"replace_norm={value!r} in a config must be like dict(type='GN', num_groups=32), or a list of such "
                f"with different where."
            )
    return [{key: item for key, item in rule.items() if key != "_scope_"} for rule in rules]


# --- the exchange


@dataclass
class _Exchange:
    """One norm that gave way to another, and all that it takes to undo that for a while."""

    path: str  # of the module around both
    own: str
    renamed: str
    old: nn.Module
    new: nn.Module
    activation: nn.Module

    def undo(self, model: nn.Module) -> None:
        exchange(model.get_submodule(self.path), self.renamed, self.own, self.old)

    def redo(self, model: nn.Module) -> None:
        exchange(model.get_submodule(self.path), self.own, self.renamed, self.new)


def _replace(model: nn.Module, norm_cfg: dict, where: str | Sequence[str] | None, registry: Registry) -> nn.Module:
    arguments = {key: value for key, value in norm_cfg.items() if key not in ("type", "requires_grad")}
    chosen, left = _choose(model, where)
    kinds = {old: _kind(norm_cfg["type"], old, model, registry) for old in chosen.values()}
    for kind in set(kinds.values()):
        _check_arguments(norm_cfg["type"], kind, arguments)
    _check_groups(kinds, arguments, chosen)
    news: dict[nn.Module, nn.Module] = {}
    for path, old in chosen.items():
        new = news[old] if old in news else successor(old, path, kinds[old], arguments)
        if "requires_grad" in norm_cfg:  # mmcv's, of every norm_cfg
            new.requires_grad_(norm_cfg["requires_grad"])
        check_place(model, path, new)
        if type(new) is not type(old) or repr(new) != repr(old):
            news[old] = new
    backbones = _with_norm_eval(model, news)

    done = []
    for path, old in chosen.items():
        if old in news:
            around, _, own = path.rpartition(".")
            activation = activation_behind(model, path)
            done.append(_Exchange(around, own, put(model, path, news[old]), old, news[old], activation))
    for module in backbones.values():
        module.norm_eval = False
    adapt(model)
    _remember(model, done)
    fates = _hand_over_all(done)
    waits = hasattr(model, "init_weights") and not getattr(model, "is_init", False) and set(fates) <= {NEW}
    _tell_what_became(model, done, norm_cfg, left, backbones, "" if waits else _in_words(fates, done))
    return model


def _remember(model: nn.Module, done: list[_Exchange]) -> None:
    if done:
        vars(model).setdefault("_exchanged", []).extend(done)
        derive(model, LoadsOldNorms)
        if hasattr(model, "init_weights"):
            derive(model, InitializesOldNorms, outermost=True)  # others look at the norms that are there


def _choose(model: nn.Module, where: str | Sequence[str] | None) -> tuple[dict[str, nn.Module], Counter]:
    """Return the norms to replace by path, shared ones by all their paths, and how many of which class stay."""
    names = [where] if isinstance(where, str) else where
    chosen, left = {}, Counter()
    for path, module in model.named_modules(remove_duplicate=False):
        if names is not None and not any(_is_at(path, name) for name in names):
            continue
        if _is_replaceable(module):
            chosen[path] = module
        elif re.search(r"[nN]orm\d*([dD]|$)", type(module).__name__) and not list(module.children()):
            left[type(module).__name__] += 1
    if "" in chosen:
        raise ValueError(f"replace_norm takes a model that holds norms, but got the norm {model} itself.")
    if not chosen:
        every = [path for path, module in model.named_modules() if _is_replaceable(module)]
        parts = sorted({path.partition(".")[0] for path in every})
        stay = f"; {', '.join(left)} {'stay' if len(left) > 1 else 'stays'}" if left else ""
        raise ValueError(
            f"There is no batch, group or instance norm to replace in {where or 'the model'}{stay}. "
            + (
                f"The model has {len(every)}, in {', '.join(parts)}. Name a part or a pattern of paths, such as "
                f"where='{parts[0]}'."
                if every
                else f"{type(model).__name__} has none anywhere."
            )
        )
    return chosen, left


def _is_at(path: str, name: str) -> bool:
    parts = path.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    if name == "head":
        return any(part == "head" or part.endswith("_head") for part in parts)
    return any(fnmatchcase(place, name) for place in above)


def _is_replaceable(module: nn.Module) -> bool:
    cls = type(module)
    if cls.__name__ == "FrozenBatchNorm2d":  # torchvision's and mmdet's
        return True
    if not isinstance(module, (_NormBase, nn.GroupNorm)) or hasattr(module, "drop_activation"):
        return False
    return cls.forward.__module__.partition(".")[0] in PLAIN


def _dimensions(norm: nn.Module) -> int | None:
    found = re.search(r"(\d)d$", type(norm).__name__)
    return int(found[1]) if found else None


def _kind(name: str, old: nn.Module, model: nn.Module, registry: Registry) -> type[nn.Module]:
    """Return the class of the new norm."""
    if name in ("BN", "IN"):
        video = any(isinstance(module, nn.Conv3d) for module in model.modules())
        name += f"{_dimensions(old) or (3 if video else 2)}d"
    kind = registry.get(name)
    if kind is None:
        raise ValueError(f"replace_norm: no norm is registered as {name!r}. See python -m normplug list.")
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise ValueError(f"replace_norm: {name!r} is {kind}, which is no layer.")
    if kind.forward is nn.LayerNorm.forward:
        raise ValueError(
            f"replace_norm: {name!r} normalizes the last axis of tokens, and these norms see maps of channels. Use "
            f"dict(type='GN', num_groups=1), which normalizes all channels and positions together."
        )
    return kind


def _check_arguments(name: str, kind: type[nn.Module], arguments: dict) -> None:
    accepted = list(inspect.signature(kind).parameters)[1:]
    for key in arguments:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, 1)
            raise ValueError(
                f"replace_norm: {name} has no argument {key!r}. "
                + (f"Did you mean {near[0]!r}? " if near else "")
                + f"It takes {', '.join(accepted)}."
            )


def _check_groups(kinds: dict[nn.Module, type], arguments: dict, chosen: dict[str, nn.Module]) -> None:
    """Raise one error for all norms whose channels GN's groups do not divide, with what fits them all."""
    size = arguments.get("channels_per_group")
    groups = size if size is not None else arguments.get("num_groups", DEFAULT_GROUPS)
    if not isinstance(groups, int) or groups < 1:
        return  # 'auto', or what GN itself has an error for
    concerned = {path: channels_of(old) for path, old in chosen.items() if issubclass(kinds[old], GroupNorm)}
    wrong = {path: channels for path, channels in concerned.items() if channels % groups}
    if wrong:
        shown = ", ".join(f"{path}: {channels}" for path, channels in list(wrong.items())[:3])
        raise ValueError(
            f"{'num_groups' if size is None else 'channels_per_group'}={groups} does not divide the channels of "
            f"{len(wrong)} of {len(concerned)} norms ({shown}{', ...' if len(wrong) > 3 else ''}). Write "
            f"num_groups='auto', for each norm its largest divisor up to 32{fitting_group_size(concerned.values())}."
        )


def fitting_group_size(channels: Iterable[int]) -> str:
    """Say which channels_per_group divides all of these numbers, as the end of a sentence; empty if only 1 does."""
    common = gcd(*channels)
    size = max(d for d in range(1, min(common, 16) + 1) if common % d == 0)
    return f", or channels_per_group={size}, which divides all of them" if size > 1 else ""


def _with_norm_eval(model: nn.Module, news: dict[nn.Module, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules whose ``norm_eval`` would keep the new norms from training their statistics."""
    found = {}
    for path, module in model.named_modules():
        norms = set(module.modules()) if getattr(module, "norm_eval", False) is True else set()
        if not any(_trains_statistics(news[norm]) for norm in norms & news.keys()):
            continue
        others = [norm for norm in norms - news.keys() if isinstance(norm, _BatchNorm) and _trains_statistics(norm)]
        if others:
            raise ValueError(
                f"{path or 'The model'} has norm_eval=True, which freezes the statistics of all its norms, and "
                f"{len(others)} of them would stay as they are. Replace all norms in it (where={path!r}), or set "
                f"{path}.norm_eval=False."
            )
        found[path] = module
    return found


def _trains_statistics(norm: nn.Module) -> bool:
    return norm._buffers.get("running_var") is not None and not isinstance(norm, FrozenBatchNorm)


# --- the weights


def _hand_over_all(done: Iterable[_Exchange]) -> Counter:
    pairs = {id(one.new): one for one in done}.values()  # a shared norm once
    return Counter(_hand_over(one.old, one.new, one.activation) for one in pairs)


@torch.no_grad()
def _hand_over(old: nn.Module, new: nn.Module, activation: nn.Module) -> str:
    """Give a new norm what the old one holds, and say what that was."""
    if _is_initial(old):
        take_state(new, old)  # a weight of 0, with which some residual branches start, is worth having
        return NEW
    if is_same_function(new, old):
        take_state(new, old)
        return KEPT
    # On a CPU, since a GPU would compile its kernels for each number of channels.
    draft, old, activation = (copy.deepcopy(module).cpu() for module in (new, old, activation))
    take_state(draft, old)
    affine = getattr(draft, "weight", None) is not None and getattr(draft, "bias", None) is not None
    fits = affine and getattr(old, "running_mean", None) is not None
    if fits:
        x = _typical_input(old, _dimensions(draft) or _dimensions(old) or 2)
        draft.eval()
        fit = LineFit(draft, old, activation)
        fit.add(x, draft(x))
        fit.finish()
    new.load_state_dict(draft.state_dict())
    return FITTED if fits else COPIED


def _is_initial(norm: nn.Module) -> bool:
    """Whether the norm holds what it was made with, or what an initializer writes."""
    expected = {"running_mean": (0,), "running_var": (1,), "bias": (0,), "weight": (0, 1)}
    return all(
        any((value == number).all() for number in expected[key])
        for key, value in norm.state_dict().items()
        if key in expected
    )


def _typical_input(norm: nn.Module, dimensions: int) -> Tensor:
    """Two equal samples, (2, C, *) of 1024 positions: quantiles of each channel's normal distribution."""
    quantiles = torch.special.ndtri((torch.arange(1024, dtype=torch.float64) + 0.5) / 1024)
    quantiles /= quantiles.square().mean().sqrt()
    mean, deviation = norm.running_mean.double(), norm.running_var.double().sqrt()
    x = (mean[:, None] + deviation[:, None] * quantiles).to(norm.running_mean.dtype)
    return x.expand(2, -1, -1).reshape(2, len(mean), *{1: (1024,), 2: (32, 32), 3: (4, 16, 16)}[dimensions])


class InitializesOldNorms:
    """``init_weights`` of a model whose norms were replaced: of the old network, whose weights then go over."""

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        if getattr(self, "is_init", False):
            return super().init_weights(*args, **kwargs)  # it only warns
        for one in reversed(self._exchanged):
            one.undo(self)
        self._old_norms_are_back = True
        known = getattr(self, "_params_init_info", None)  # of a model around this one, which is initializing itself
        if known is not None:
            for one in self._exchanged:
                for p in one.old.parameters():
                    known[p].update(init_info="", tmp_mean_value=p.data.mean().cpu())
        try:
            super().init_weights(*args, **kwargs)
        finally:
            del self._old_norms_are_back
            for one in self._exchanged:
                one.redo(self)
        print_log(f"normplug: {_in_words(_hand_over_all(self._exchanged), self._exchanged)}", "current")
        return None


class LoadsOldNorms:
    """Loading of a model whose norms were replaced: it takes checkpoints of the old network too."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not hasattr(self, "_old_norms_are_back"):
            fates = _translate(self._exchanged, state_dict, prefix)
            if fates:
                print_log(
                    f"normplug: from a checkpoint with the norms of before: {_in_words(fates, self._exchanged)}",
                    "current",
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


def as_loaded(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict that ``model`` makes of this one when it loads it."""
    state_dict = dict(state_dict)
    for path, module in model.named_modules():
        if isinstance(module, LoadsOldNorms) and not hasattr(module, "_old_norms_are_back"):
            _translate(module._exchanged, state_dict, f"{path}." if path else "")
    return state_dict


def _translate(exchanged: list[_Exchange], state_dict: dict[str, Any], prefix: str) -> Counter:
    """Put the tensors of new norms in the place of those of old ones, in a state dict."""
    fates = Counter()
    for one in exchanged:
        around = f"{prefix}{one.path}." if one.path else prefix
        old_key, new_key = f"{around}{one.own}.", f"{around}{one.renamed}."
        own, theirs = one.new.state_dict(), one.old.state_dict()
        given = {key: state_dict[old_key + key] for key in theirs if old_key + key in state_dict}
        if old_key == new_key:
            is_old = "running_mean" in given and "running_mean" not in own
        else:
            is_old = bool(given) and not any(new_key + key in state_dict for key in own)
        if not is_old or any(given[key].shape != theirs[key].shape for key in given):
            continue
        old, new = copy.deepcopy(one.old).cpu(), copy.deepcopy(one.new).cpu()
        old.load_state_dict(given, strict=False)
        fates[_hand_over(old, new, one.activation)] += 1
        for key in given:
            del state_dict[old_key + key]
        state_dict.update({new_key + key: value for key, value in new.state_dict().items()})
    return fates


# --- the log


def _in_words(fates: Counter, exchanged: Iterable[_Exchange]) -> str:
    kinds = " and ".join(sorted({f"{type(one.new).__name__} for {type(one.old).__name__}" for one in exchanged}))
    return (
        f"weights of {fates.total()} {kinds}: {', '.join(f'{number} {fate}' for fate, number in fates.most_common())}"
    )


def _tell_what_became(
    model: nn.Module, done: list[_Exchange], norm_cfg: dict, left: Counter, backbones: dict, weights: str
) -> None:
    if not done:
        print_log(
            f"normplug: every norm of {type(model).__name__} is already {as_text(norm_cfg)}; nothing was replaced",
            "current",
        )
        return
    olds = Counter(type(old).__name__ for old in {one.old for one in done})
    places = Counter(one.path.partition(".")[0] or one.own for one in done)
    parts = [
        f"{' and '.join(f'{number} {name}' for name, number in olds.most_common())} became {as_text(norm_cfg)}",
        "in " + ", ".join(f"{place} {number}" for place, number in places.items()),
    ]
    if backbones:
        parts.append(f"norm_eval is off in {', '.join(path or 'the model' for path in backbones)}")
    if left:
        parts.append("left alone: " + ", ".join(f"{number} {name}" for name, number in left.most_common()))
    print_log("normplug: " + "; ".join([*parts, weights] if weights else parts), "current")


def as_text(norm_cfg: dict) -> str:
    """Return a norm_cfg as it stands in a config file."""
    keys = sorted(norm_cfg, key=lambda key: key != "type")  # the type first, as everybody writes it
    return f"dict({', '.join(f'{key}={norm_cfg[key]!r}' for key in keys if key != '_scope_')})"
