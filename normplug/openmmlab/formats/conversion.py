"""From weights whose meaning is known to a checkpoint for the model of a config, with nothing lost silently."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normplug.layers import (
    CrossIterationBatchNorm,
    EvoNormB0,
    FilterResponseNorm,
    FrozenBatchNorm,
    WSConv1d,
    WSConv2d,
    WSConv3d,
)
from normplug.openmmlab.checkpoints import check_norms
from normplug.openmmlab.classes import stock_class
from normplug.openmmlab.formats.names import Images, Source, Standardization, Weight, canonical
from normplug.openmmlab.placement import REPLACED
from normplug.openmmlab.resnet3d import _over_time
from normplug.openmmlab.resnet_v2 import ResNetV2
from normplug.ops.weight_standardize import weight_standardize
from normplug.reporting import markdown_table

__all__ = ["Conversion", "build_model", "convert", "images_of"]

_STATE_OF_TRAINING = ("num_batches_tracked", "cbn_calls")  # where a source has none, they start at 0
_BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_GREY = 1.0  # detectron2 and mmdet run Detectron's weights with another mean, which differs by less


@dataclass
class Conversion:
    """A converted checkpoint and what is to be told of it.

    Attributes:
        state_dict: Weights by the keys that the model loads.
        rows: For each of them: source keys, key, shape, what was done.
        dropped: Keys of the source that are not in it, and why.
        unset: Keys of the model that nothing sets, as the user allowed.
        images: What the converted weights expect to see.
        facts: Lines for the report.
        warnings: What the user should look at.
    """

    state_dict: dict[str, Tensor]
    rows: list[tuple[str, str, str, str]]
    dropped: dict[str, str]
    unset: list[str]
    images: Images
    facts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def report(self) -> str:
        """Return all of it in Markdown."""
        reasons = defaultdict(list)
        for key, reason in self.dropped.items():
            reasons[reason].append(key)
        parts = ["\n".join(self.facts), markdown_table([("source", "target", "shape", "done"), *self.rows])]
        parts += [f"Not used, {reason}: {', '.join(keys)}" for reason, keys in reasons.items()]
        parts += [f"At their initial values, as allowed: {', '.join(self.unset)}"] if self.unset else []
        parts += [f"Warning: {warning}" for warning in self.warnings]
        return "\n\n".join(parts)


# ---- the model


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config, in the scope of its toolkit, without loading anything into it.

    Raises:
        ValueError: If a layer of the config does not exist, or does not take its arguments.
    """
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
        try:
            return MODELS.build(cfg.model)
        except (TypeError, KeyError) as error:  # what mmengine makes of wrong arguments, and of names it does not know
            raise ValueError(f"The config's model cannot be built: {error}") from error


def images_of(cfg: Config) -> Images | None:
    """Return how the config's data_preprocessor prepares images; None if it does not say.

    mmdet's and mmengine's loaders give BGR, mmaction2's give RGB.
    """
    settings = cfg.model.get("data_preprocessor") or cfg.get("data_preprocessor")
    if not settings:
        return None
    order = "RGB" if settings.get("bgr_to_rgb") or "Action" in settings.get("type", "") else "BGR"
    turn = -1 if order == "BGR" else 1
    mean, std = (
        tuple(map(float, settings.get(name) or [default] * 3))[::turn] for name, default in (("mean", 0), ("std", 1))
    )
    return Images(order, mean, std)


@dataclass
class _Target:
    """What is to be filled: the model's tensors by canonical name, and the layers they belong to."""

    model: nn.Module
    state: Mapping[str, Tensor]
    names: dict[str, str]  # canonical name -> key in the state
    part: str

    @classmethod
    def of(cls, model: nn.Module, part: str) -> "_Target":
        # conv5 of a C4 detector is in the checkpoint of its backbone
        parts = ("backbone.", "roi_head.shared_head.") if part == "backbone" else ("",)
        state = model.state_dict()
        names = {new: old for old, new in canonical(state).items() if old.startswith(parts)}
        if not names:
            raise ValueError(f"The config's {type(model).__name__} has no backbone to fill. Give --part model.")
        return cls(model, state, names, part)

    def key(self, name: str) -> str:
        """The key in the file: a backbone loads its weights without a prefix."""
        old = self.names[name]
        return old.removeprefix("backbone.").removeprefix("roi_head.shared_head.") if self.part == "backbone" else old

    def tensor(self, name: str) -> Tensor:
        return self.state[self.names[name]]

    def layer(self, name: str) -> nn.Module | None:
        """The layer of this canonical name, by any tensor of it."""
        for leaf in ("weight", "running_var", "bias"):
            if f"{name}.{leaf}" in self.names:
                return self.model.get_submodule(self.names[f"{name}.{leaf}"].rpartition(".")[0])
        return None


# ---- the conversion


def convert(
    source: Source,
    cfg: Config,
    *,
    part: str = "auto",
    bn: str = "keep",
    allow_unset: Iterable[str] = (),
    adapt_images: bool = True,
) -> Conversion:
    """Make a checkpoint for the model of a config.

    The converted model computes what the source's does, up to rounding; what cannot be carried over so is refused or,
    where it is no matter of weights (the mean of the images), told as a warning. Exceptions, told in the report: the
    image's borders where the means differ, and the eps of a norm behind a standardized kernel repeated over time.

    Args:
        source: A checkpoint that `normplug.openmmlab.formats.names.understand` has read.
        cfg: A config of mmdet or mmaction2, or of mmengine with a model that has a ``backbone``.
        part: 'backbone' makes a file for the backbone's ``init_cfg``, 'model' one for ``load_from``; 'auto': 'model' if
            the source is a whole detector and the config's model is one.
        bn: 'keep' copies BN as it is; 'freeze' merges statistics into weight and bias, as Detectron's AffineChannel,
            which leaves mean 0 and variance 1 - eps; 'fold' merges all into the convolution and leaves an identity,
            or nothing where the model has a bias and no norm.
        allow_unset: Patterns of the model's keys that may stay at their initial values where the source has none for
            them, or some of another shape; they are not in the file.
        adapt_images: Rewrite the first convolution for the order of channels and the std of the config's
            data_preprocessor, which is exact.

    Raises:
        ValueError: If a key of the model is not set, a key of the source is not used, shapes differ, norms are of
            another kind, or the model's convolutions cannot compute what the source's do.
    """
    model = build_model(cfg)
    heads = any(not name.startswith("backbone.") for name in model.state_dict())
    if part == "auto":
        part = "model" if source.detector and heads and hasattr(model, "neck") else "backbone"
    target = _Target.of(model, part)
    result = Conversion({}, [], dict(source.dropped), [], source.format.images)
    result.facts += [
        f"Source: {source.format.name}, {source.format.what}.",
        f"Target: {'the backbone' if part == 'backbone' else 'the whole'} of the config's {type(model).__name__}.",
    ]
    if part == "backbone":
        _leave_heads(source, result)
    _drop_biases(source, target, result)
    _standardize(source, target, result)
    _see_images(source, target, result, images_of(cfg), adapt_images)
    _merge_bn(source, target, result, bn)
    _inflate(source, target)
    _fill(source, target, result, tuple(allow_unset))
    _look_around(source, target, result)
    return result


def _leave_heads(source: Source, result: Conversion) -> None:
    for name in [name for name in source.weights if not name.startswith("backbone.")]:
        for key in source.weights.pop(name).keys:
            result.dropped[key] = "no part of the backbone"


def _convolutions(source: Source) -> Iterator[tuple[str, Weight]]:
    for name, weight in list(source.weights.items()):
        if name.endswith(".weight") and weight.tensor.ndim >= 4:
            yield name.removesuffix(".weight"), weight


def _drop_biases(source: Source, target: _Target, result: Conversion) -> None:
    """Let a norm take a convolution's bias over where the model's convolution has none."""
    for conv, _ in _convolutions(source):
        bias, mean = source.weights.get(f"{conv}.bias"), source.weights.get(f"{conv}.norm.running_mean")
        if bias is None or f"{conv}.bias" in target.names or f"{conv}.weight" not in target.names:
            continue
        if bias.tensor.any() and mean is None:
            continue  # reported as unused
        if mean is not None and bias.tensor.any():
            mean.become(mean.tensor - bias.tensor, "minus the bias of the convolution")
            mean.keys += bias.keys
        else:
            result.dropped[bias.keys[0]] = "a bias of zeros that the model does not have"
        del source.weights[f"{conv}.bias"]


def _formula(layer: nn.Module | None) -> Standardization | None:
    if isinstance(layer, WSConv1d | WSConv2d | WSConv3d):
        return Standardization(layer.eps, layer.correction, layer.eps_inside)
    return None


def _standardize(source: Source, target: _Target, result: Conversion) -> None:
    """Keep standardized filters for layers of the same formula, and write them out for plain convolutions."""
    impossible, kept, written = [], 0, 0
    for conv, weight in _convolutions(source):
        if f"{conv}.weight" not in target.names or source.format.like_config:
            continue
        theirs, ours = source.standardization(conv), _formula(target.layer(conv))
        if theirs is not None and ours is None:
            weight.become(weight_standardize(weight.tensor.double(), *theirs).float(), "standardized")
            written += 1
        elif theirs != ours:
            impossible.append(conv)
        kept += ours is not None
    if impossible:
        theirs, ours = source.standardization(impossible[0]), _formula(target.layer(impossible[0]))
        what = f"{theirs.conv_cfg()}, and the config has {ours.conv_cfg()}" if theirs else "plain, as far as is known"
        fix = (
            f"Set conv_cfg={theirs.conv_cfg()}, or conv_cfg=None: plain convolutions take the standardized filters."
            if theirs
            else "If they were trained with weight standardization (the keys do not tell), say --standardized yes; "
            "else set conv_cfg=None. (As a start for training only, load the unconverted file.)"
        )
        raise ValueError(
            f"{len(impossible)} convolutions of the model standardize their filters and would not compute what the "
            f"source's do, the first {impossible[0]!r}: the source's are {what}. {fix}"
        )
    convs = "as in the config" if source.format.like_config else "plain"
    if kept or written:
        convs = f"standardized, {kept} of them by the model's layers, {written} written out for plain ones"
    result.facts.append(f"Convolutions of the source: {convs}.")


def _see_images(source: Source, target: _Target, result: Conversion, ours: Images | None, adapt_images: bool) -> None:
    """Rewrite the first convolution for the config's images as far as that is exact, and compare the rest."""
    theirs = source.format.images
    first = next((c for c in ("backbone.conv1", "backbone.stem.0") if f"{c}.weight" in source.weights), None)
    if first is not None and ours is not None and adapt_images:
        weight = source.weights[f"{first}.weight"]
        if theirs.order != ours.order:
            weight.become(weight.tensor.flip(1), f"{theirs.order} to {ours.order}")
            theirs = theirs._replace(order=ours.order)
        if theirs.std != ours.std and _formula(target.layer(first)) is None:
            factors = torch.tensor(ours.std, dtype=torch.float64) / torch.tensor(theirs.std, dtype=torch.float64)
            if ours.order == "BGR":
                factors = factors.flip(0)
            scaled = weight.tensor.double() * factors.view(1, -1, 1, 1)
            weight.become(scaled.float(), f"times std: {_numbers(ours.std)} for {_numbers(theirs.std)}")
            theirs = theirs._replace(std=ours.std)
    result.images = theirs
    result.facts.append(
        f"Images that the converted weights expect: data_preprocessor = dict({theirs.data_preprocessor()})"
    )
    if ours is None:
        result.facts.append("The config has no data_preprocessor to compare that with.")
        return
    distance = max(abs(a - b) for a, b in zip(theirs.mean, ours.mean, strict=True))
    if theirs.order != ours.order or theirs.std != ours.std or distance > _GREY:
        result.warnings.append(
            f"the config prepares images otherwise: dict({ours.data_preprocessor()}). Change it to what the weights "
            f"expect."
        )
    else:
        same = f"the same but for the mean, by {distance:.2g} grey levels" if distance else "the same"
        result.facts.append(f"The config's is {same}.")


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _merge_bn(source: Source, target: _Target, result: Conversion, bn: str) -> None:
    """Freeze or fold norms with running statistics, and give statistics to those that are affine already."""
    norms = [name.removesuffix(".weight") for name in source.weights if name.endswith(".norm.weight")]
    backbone = getattr(target.model, "backbone", None)
    if bn == "fold" and (source.format.preactivation or isinstance(backbone, ResNetV2)):
        raise ValueError(
            "The norms of a pre-activation network stand in front of activation and convolution, and fold into "
            "neither. Leave --fold-bn out; --freeze-bn works."
        )
    merged = [norm for norm in norms if source.kind(norm) == "affine" or (source.kind(norm) == "BN" and bn != "keep")]
    for norm in merged:
        layer, conv = target.layer(norm), norm.removesuffix(".norm")
        eps = getattr(layer, "eps", 1e-5)
        needed = _BN[:4] if source.kind(norm) == "BN" else _BN[:2]
        old = {leaf: source.weights.pop(f"{norm}.{leaf}", None) for leaf in _BN}
        if lost := [leaf for leaf in needed if old[leaf] is None]:
            raise ValueError(
                f"The source's norm {old['weight'].keys[0].rpartition('.')[0] or norm} has no {' and no '.join(lost)}, "
                f"without which it cannot be merged into anything. Is the file whole?"
            )
        if old["num_batches_tracked"] is not None:
            result.dropped |= dict.fromkeys(old["num_batches_tracked"].keys, "a counter of training")
        scale, shift = (old[leaf].tensor.double() for leaf in ("weight", "bias"))
        scale_keys, shift_keys = old["weight"].keys, old["bias"].keys
        if old["running_var"] is not None:
            scale = scale / (old["running_var"].tensor.double() + eps).sqrt()
            shift = shift - old["running_mean"].tensor.double() * scale
            scale_keys += old["running_var"].keys
            shift_keys += scale_keys + old["running_mean"].keys
        if bn == "fold":
            _scale_filters(source, target, conv, scale, scale_keys)
            scale, scale_keys = torch.ones_like(scale), ()
        if bn == "fold" and layer is None:
            bias = source.weights.get(f"{conv}.bias", Weight((), torch.zeros_like(shift)))
            source.weights[f"{conv}.bias"] = Weight(bias.keys + shift_keys, (bias.tensor + shift).float(), ("folded",))
            continue
        zero, done = torch.zeros_like(scale), {"keep": (), "freeze": ("frozen",), "fold": ("folded",)}[bn]
        source.weights |= {
            f"{norm}.weight": Weight(scale_keys, scale.float(), done),
            f"{norm}.bias": Weight(shift_keys, shift.float(), done),
            f"{norm}.running_mean": Weight((), zero.float(), ("constant 0",)),
            f"{norm}.running_var": Weight((), (zero + 1 - eps).float(), ("constant 1 - eps",)),
        }
        trains = isinstance(layer, _BatchNorm) and not isinstance(layer, FrozenBatchNorm)
        if trains and not _evaluates(target, norm):
            _warn_once(
                result,
                "norms of the config train by batch statistics, which undoes merged ones in training: set "
                "norm_cfg=dict(type='FrozenBatchNorm') or norm_eval=True",
            )
    if merged:
        result.facts.append(f"{len(merged)} norms have their statistics in weight and bias, or in the convolution.")


def _scale_filters(source: Source, target: _Target, conv: str, scale: Tensor, keys: tuple[str, ...]) -> None:
    if _formula(target.layer(conv)) is not None:
        raise ValueError(
            f"{conv} of the model standardizes its filters, which takes a folded scale out again. Set conv_cfg=None, "
            f"or leave --fold-bn out."
        )
    for leaf in ("weight", "bias"):
        if (old := source.weights.get(f"{conv}.{leaf}")) is not None:
            old.become((old.tensor.double() * scale.view(-1, *[1] * (old.tensor.ndim - 1))).float(), "norm folded in")
            old.keys += keys


def _evaluates(target: _Target, norm: str) -> bool:
    return norm.startswith("backbone.") and bool(getattr(getattr(target.model, "backbone", None), "norm_eval", False))


def _warn_once(result: Conversion, warning: str) -> None:
    if warning not in result.warnings:
        result.warnings.append(warning)


def _inflate(source: Source, target: _Target) -> None:
    """Give 2-D kernels the time axis of the model's 3-D ones, so that a still clip gives what the image gave."""
    for conv, weight in _convolutions(source):
        name = f"{conv}.weight"
        if name not in target.names or weight.tensor.ndim != 4 or target.tensor(name).ndim != 5:
            continue
        like = target.tensor(name)
        time = like.shape[2]
        inflated = _over_time(weight.tensor, like)
        if _formula(target.layer(conv)) is None or time == 1:
            weight.become(inflated, f"inflated over T={time}" + (f", divided by {time}" if time > 1 else ""))
            continue
        if source.kind(f"{conv}.norm") != "GN":
            raise ValueError(
                f"{conv} standardizes its filters, and inflated over T={time} gives about {time} times as much, which "
                f"the running statistics of the norm behind do not expect. Set conv_cfg=None."
            )
        # undivided, so that eps weighs as it did; the norm behind does not feel a factor
        weight.become(
            inflated * time, f"inflated over T={time}; the norm takes the factor {time} out, to within its eps"
        )


def _fill(source: Source, target: _Target, result: Conversion, allow_unset: tuple[str, ...]) -> None:
    """Bring source and target together, and refuse whatever does not match."""
    _check_kinds(source, target)
    unset, shapes = [], []
    for name in target.names:
        key, like = target.key(name), target.tensor(name)
        allowed = any(fnmatchcase(key, pattern) for pattern in allow_unset)
        if (weight := source.weights.get(name)) is None:
            if name.endswith(_STATE_OF_TRAINING):
                result.state_dict[key] = torch.zeros_like(like)
                result.rows.append(("", key, _shape(like), "starts at 0"))
            elif allowed:
                result.unset.append(key)
            else:
                unset.append(f"{key} {_shape(like)}")
            continue
        origin = ", ".join(weight.keys)
        if weight.tensor.shape == like.shape:
            result.state_dict[key] = weight.tensor.to(like.dtype).contiguous().clone()
            result.rows.append((origin, key, _shape(weight.tensor), "; ".join(weight.done)))
        elif allowed:
            result.unset.append(key)
            result.dropped |= dict.fromkeys(weight.keys, "of another shape than the model's, which may stay unset")
        else:
            shapes.append(f"{key}: {_shape(like)} in the model, {_shape(weight.tensor)} from {origin}")
    left = {key: name for name, weight in source.weights.items() if name not in target.names for key in weight.keys}
    result.dropped |= {key: "a counter of training" for key, name in left.items() if name.endswith(_STATE_OF_TRAINING)}
    unused = [key for key in left if key not in result.dropped]
    problems = (
        ("of the model would not be set by any of the source", unset, "leave them so with --allow-unset KEY"),
        ("of the source have no place in the model", unused, "leave them out with --drop KEY"),
        ("differ in shape", shapes, "give the config the source's width, depth and number of classes"),
    )
    if any(keys for _, keys, _ in problems):
        raise ValueError(
            f"The source ({source.format.name}) and the config's {type(target.model).__name__} do not match. Expected: "
            "the same architecture, depth and kind of norm."
            + "".join(f"\n{len(keys)} {what} ({fix}):{_listed(keys)}" for what, keys, fix in problems if keys)
        )
    if not any(origin for origin, *_ in result.rows):
        raise ValueError("Nothing of the source would be in the file: --allow-unset and --drop leave all of it out.")


def _check_kinds(source: Source, target: _Target) -> None:
    layers = {name.rpartition(".")[0]: old.rpartition(".")[0] for name, old in target.names.items()}
    renamed = {}
    for name, weight in source.weights.items():
        layer, _, leaf = name.rpartition(".")
        if layer in layers:
            renamed[f"{layers[layer]}.{leaf}"] = weight.tensor
    check_norms(target.model, renamed)


def _listed(keys: list[str], most: int = 12) -> str:
    more = [f"... and {len(keys) - most} more"] if len(keys) > most else []
    return "".join(f"\n  {key}" for key in [*keys[:most], *more])


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _look_around(source: Source, target: _Target, result: Conversion) -> None:
    """Refuse or warn of what is not in any weight and changes what the model computes."""
    backbone = getattr(target.model, "backbone", None)
    if source.avg_down is not None and source.avg_down != bool(getattr(backbone, "avg_down", False)):
        how = "pool by averages and then convolve", "convolve with a stride"
        raise ValueError(
            f"The shortcuts of the source's network {how[not source.avg_down]}, those of the config's "
            f"{stock_class(backbone).__name__} {how[source.avg_down]}. Set avg_down={source.avg_down} in the backbone."
        )
    part = target.model if target.part == "model" else backbone
    others = sorted({type(m).__name__ for m in part.modules()} & (REPLACED - {"ReLU"}))
    if others and not source.format.like_config:
        result.warnings.append(f"the model has {', '.join(others)}, and the source's networks have ReLU")
    style = getattr(backbone, "style", None)
    norms = [name.removesuffix(".weight") for name in source.weights if name.endswith(".norm.weight")]
    wanted = {"caffe2": "caffe" if source.affine else "pytorch", "torchvision": "pytorch", "jhu": "pytorch"}
    if style and style != wanted.get(source.format.name, style):
        result.warnings.append(
            f"the backbone has style={style!r}, and the source's networks are {wanted[source.format.name]!r} as a rule "
            f"(stride in the first 1x1 or in the 3x3 convolution of a bottleneck; ResNeXt: always 'pytorch')"
        )
    for norm in norms:
        layer = target.layer(norm)
        if getattr(layer, "eps", 1e-5) != 1e-5:
            _warn_once(result, f"{norm} of the model has eps={layer.eps}; the published networks have 1e-5")
        grouped = isinstance(layer, nn.GroupNorm) and not isinstance(layer, (FilterResponseNorm, EvoNormB0))
        if grouped and source.kind(norm) == "GN" and layer.num_groups != 32:
            _warn_once(
                result,
                f"{norm} of the model has {layer.num_groups} groups; the weights do not say how many they were trained "
                f"with, and the published networks have 32",
            )
        inside = isinstance(layer, CrossIterationBatchNorm) and layer.eps_mode != "outside"
        if inside and source.format.name == "mmdet1":
            _warn_once(result, "the authors' CBN divides by std + eps: give the config's CBN eps_mode='outside'")
    if target.part == "model":
        result.warnings += source.format.notes
