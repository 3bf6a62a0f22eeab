"""The one place that makes the toolkits' stock models right for our layers, without a change to their code.

Every model that a ``MODELS`` registry builds passes through ``adapt`` once ``install`` has run. A model without a
layer of ours is left alone. In the others, five assumptions of the toolkits are corrected:

- *An activation follows the norm.* EvoNorm and FRN contain theirs. Where the toolkit applies one right behind such
  a layer, it goes; where it applies none (last norm of a residual branch, shortcut, FPN), the layer gives up its own:
  EvoNorm is affine only then, as in its authors' code, FRN normalizes still. The ReLU behind a residual sum stays. See
  ``normplug.openmmlab.placement``.
- *The class decides which activation it is.* A norm with ``act='silu'`` does: what stands behind it becomes a SiLU, and
  so does a backbone's ReLU between such norms and behind their sums. Where nothing stands, nothing is added.
- *Norm, sum and activation are three operations.* GN, BNAct, SyncBN and CBN take the ReLU or SiLU behind them, and the
  residual sum before it, into their own pass over memory, wherever the input is on CUDA; see ``fuse_activations``.
- *A norm with running statistics is a BatchNorm2d.* ``norm_eval``, ``partial_bn`` and their like freeze ours too.
- *Every norm of a video backbone is called bn.* See ``normplug.openmmlab.resnet3d``.

On CUDA the weights of a model's ConvWS layers are standardized in one launch: see ``standardize_together``.

Parameters keep their names, so state dicts stay those of the stock models. An activation that is no longer needed
is replaced by ``ActivationInNorm``, and a module whose methods change gets a class derived from its own. The
toolkits' classes are looked up where somebody has imported them and are never imported from here.
"""

import functools
import importlib.util
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import MODELS, Registry
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd
from torch.utils.checkpoint import checkpoint

from normplug.layers.evonorm import EvoNormS0
from normplug.layers.weight_standardization import WSConv1d, WSConv2d, WSConv3d, fold_ws, standardize_together
from normplug.openmmlab.classes import derive, imported, is_ours, is_toolkits, keeps_forward, owner_of, stock_class
from normplug.openmmlab.config_files import nearest
from normplug.openmmlab.cross_iteration import check_cross_iteration
from normplug.openmmlab.finders import as_batch_norms, is_batch_norm
from normplug.openmmlab.placement import REPLACED, contains_activation, place_activations, places_itself
from normplug.openmmlab.resnet3d import CallsEveryNormBn, InflatesEveryNorm, load_from_detectron_as_rgb

__all__ = ["adapt", "fuse_activations", "install", "registries"]

# What the norms' ``act`` stands for, and those that a norm can take over: they have no arguments.
ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU, "gelu": nn.GELU}
FUSED = {nn.ReLU: "relu", nn.SiLU: "silu"}
WS_CONVS = (WSConv1d, WSConv2d, WSConv3d)


def adapt(model: nn.Module) -> nn.Module:
    """Make a stock model right for the normplug layers in it, in place.

    Adapting a model again, or a model made of adapted ones, changes nothing more. Your own classes are left as they
    are. If one derives from a toolkit's and places activations by itself, it says so with a class attribute
    ``places_activations = True``.

    Args:
        model: Any module; one without our layers is returned untouched.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: If a layer that contains its activation, or has an ``act``, sits in a toolkit's class of which we do
            not know where it applies activations; or if a CBN sits behind something that it cannot follow.
    """
    if not any(map(is_ours, model.modules())):
        return model
    _check_tokens(model)
    _choose_activations(model)
    place_activations(model)
    _widen_groups(model)
    for path, module in model.named_modules():
        if any(map(_can_activate, module.children())) or isinstance(module, _residual_blocks_3d()):
            _let_norms_activate(module, path, model)
        if _has_statistics_to_freeze(module):
            derive(module, FreezesEveryStatistic)
        if hasattr(module, "switch_to_deploy") and is_toolkits(module) and _standardizes_weights(module):
            derive(module, FoldsForDeployment)
        if isinstance(module, imported("mmaction.models.backbones.resnet3d", "ResNet3d", "ResNet3dLayer")):
            derive(module, InflatesEveryNorm)
        elif isinstance(module, _other_backbones_of_bn()):
            derive(module, CallsEveryNormBn)
        if isinstance(module, _blocks_of_two_layouts()) and is_ours(module.norm):
            derive(module.norm, TakesLayout)
    if sum(isinstance(module, WS_CONVS) for module in model.modules()) > 1:
        standardize_together(model)
    check_cross_iteration(model)
    return model


def install() -> None:
    """Pass all that the ``MODELS`` registries build through ``adapt``, and explain a type that none of them knows.

    Registries created later inherit this from their parent. Calling it again does nothing more.
    """
    for registry in registries(MODELS):
        if not hasattr(registry.build_func, "adapts"):
            registry.build_func = _adapting(registry.build_func)
    CheckpointLoader.register_scheme("detectron-as-rgb://", load_from_detectron_as_rgb, force=True)


# --- norms that choose the activation behind them


def _choose_activations(model: nn.Module) -> None:
    """Move the ``act`` of norms in toolkits' classes to where these have activations, and away from the norms."""
    for module in model.modules():  # with all norms still as they were
        act = _act_of_norms(module) if _is_backbones(module) else None
        for name, relu in list(module.named_children()) if act else ():
            if type(relu) is nn.ReLU:
                setattr(module, name, _activation(act, relu))
    for path, module in model.named_modules():
        owner = owner_of(path, model)
        norms = [norm for norm in module.children() if _chooses(norm)]
        if not norms or not is_toolkits(owner) or places_itself(owner):
            continue
        if isinstance(module, nn.Sequential):
            layers = [*module, None]
            for i, norm in enumerate(layers):
                if norm in norms and type(layers[i + 1]).__name__ in REPLACED:
                    module[i + 1] = _activation(norm.act, layers[i + 1])
        elif keeps_forward(module, "mmcv.cnn.bricks.conv_module", "ConvModule"):
            if type(getattr(module, "activate", None)).__name__ in REPLACED:
                module.activate = _activation(module.norm.act, module.activate)
        elif not (_is_backbones(owner) and any(type(m) is ACTIVATIONS[norms[0].act] for m in owner.children())):
            raise ValueError(
                f"{type(norms[0]).__name__} has act={norms[0].act!r}, but sits directly in {path or 'the model'}, a "
                f"{type(owner).__module__}.{type(owner).__qualname__}: normplug does not know where the forward of "
                f"that class applies activations. Known are ConvModule, Sequential, and backbones that have an nn.ReLU "
                f"beside their norms. Leave act out, or, if nothing stands behind the norms of {type(owner).__name__}, "
                f"set {type(owner).__name__}.places_activations = True: they activate by themselves then."
            )
        for norm in norms:
            norm.act = None


def _act_of_norms(module: nn.Module) -> str | None:
    """Return the ``act`` of a module's own norms, or, without any, of those in its sequences and ConvModules."""
    norms = [layer for layer in module.children() if hasattr(layer, "act") and is_ours(layer)]
    if norms:
        return norms[0].act
    parts = (nn.Sequential, nn.ModuleList, *imported("mmcv.cnn.bricks.conv_module", "ConvModule"))
    acts = (_act_of_norms(child) for child in module.children() if isinstance(child, parts))
    return next(filter(None, acts), None)


def _activation(act: str, like: nn.Module) -> nn.Module:
    cls = ACTIVATIONS[act]
    return like if type(like) is cls else cls()  # not in place: their gradients need what they met


def _chooses(layer: nn.Module) -> bool:
    """Whether a layer of ours was given an activation, like GN with act='silu'."""
    return is_ours(layer) and not contains_activation(layer) and getattr(layer, "act", None) is not None


def _is_backbones(module: nn.Module) -> bool:
    """Whether this is a toolkit's backbone, or a block of one."""
    return (
        any(".models.backbones." in cls.__module__ for cls in type(module).__mro__)
        and is_toolkits(module)
        and not places_itself(module)
    )


# --- norms that take an activation over


def fuse_activations(model: nn.Module, devices: Collection[str] = ("cuda",)) -> nn.Module:
    """Say on which devices the norms of an adapted model do the sum and the activation behind them in their own pass.

    Results and state dicts are the same; what changes is how often memory is read and written. An adapted model
    does it on CUDA. An empty collection turns it off, ("cuda", "cpu") also does it on a CPU.

    Args:
        model: A model that ``adapt`` has seen: every one that a registry built.
        devices: Device types, as in ``tensor.device.type``.

    Returns:
        ``model`` itself.
    """
    for module in model.modules():
        if isinstance(module, Fuses):
            module.fuses_on = frozenset(devices)
    return model


def _let_norms_activate(module: nn.Module, path: str, root: nn.Module) -> None:
    if not is_toolkits(owner_of(path, root)):
        return
    if type(module) is nn.Sequential and any(map(_can_be_fused, module)):
        derive(module, FusesInSequence)
    elif keeps_forward(module, "mmcv.cnn.bricks.conv_module", "ConvModule"):
        if _can_be_fused(getattr(module, "activate", None)) and tuple(module.order) == ("conv", "norm", "act"):
            derive(module, FusesInConvModule)
    elif keeps_forward(module, "mmdet.models.backbones.resnet", "BasicBlock", "Bottleneck"):
        derive(module, FusesInBlock)
    elif keeps_forward(module, "mmdet.models.backbones.resnet", "ResNet"):
        derive(module, FusesInStem)
    elif keeps_forward(module, "mmaction.models.backbones.resnet3d", "BasicBlock3d", "Bottleneck3d"):
        last = module.conv3 if hasattr(module, "conv3") else module.conv2
        if _can_activate(getattr(last, "norm", None)) and not last.with_activation:
            derive(module, FusesInBlock3d)


def _residual_blocks_3d() -> tuple[type, ...]:
    """Their norms sit in ConvModules of theirs."""
    return imported("mmaction.models.backbones.resnet3d", "BasicBlock3d", "Bottleneck3d")


def _can_activate(layer: nn.Module | None) -> bool:
    """Whether a layer of ours takes an activation and a residual with its input."""
    return layer is not None and is_ours(layer) and getattr(layer, "act", "none") is None


def _can_be_fused(activation: nn.Module | None) -> bool:
    return type(activation) in FUSED


class Fuses:
    """What the modules share whose norms do the activation behind them.

    Everything is looked at when it runs: fused convolutions leave an Identity where the norm was.
    """

    fuses_on: frozenset[str] = frozenset({"cuda"})

    def _activated(self, norm: nn.Module, act: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return act(norm(x) + residual), in one pass where that is possible."""
        if x.device.type in self.fuses_on and _can_activate(norm) and _can_be_fused(act):
            return norm(x, residual=residual, act=FUSED[type(act)])
        y = norm(x)
        return act(y if residual is None else y + residual)


class FusesInSequence(Fuses):
    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if layers and _can_activate(layer) and _can_be_fused(layers[0]):
                x = self._activated(layer, layers.pop(0), x)
            else:
                x = layer(x)
        return x


class FusesInConvModule(Fuses):
    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        both = activate and norm and self.with_norm and self.efficient_conv_bn_eval_forward is None
        if not both or not _can_activate(self.norm):
            return super().forward(x, activate, norm)
        return self._activated(self.norm, self.activate, super().forward(x, activate=False, norm=False))


class FusesInStem(Fuses):
    """Forward of mmdet's ResNet."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x) if self.deep_stem else self._activated(self.norm1, self.relu, self.conv1(x))
        x = self.maxpool(x)
        outs = []
        for i, name in enumerate(self.res_layers):
            x = getattr(self, name)(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)


class FusesInBlock(Fuses):
    """Forward of mmdet's residual blocks."""

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and x.requires_grad:
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        y = x
        last = 3 if hasattr(self, "conv3") else 2
        for i in range(1, last + 1):
            if i == last:  # before the last convolution: CBN looks for the one right before it
                shortcut = x if self.downsample is None else self.downsample(x)
            norm, y = getattr(self, f"norm{i}"), getattr(self, f"conv{i}")(y)
            plugins = getattr(self, f"after_conv{i}_plugin_names") if getattr(self, "with_plugins", False) else []
            if i == last and not plugins:
                return self._activated(norm, self.relu, y, shortcut)
            y = norm(y) if i == last else self._activated(norm, self.relu, y)
            y = self.forward_plugin(y, plugins) if plugins else y
        return self.relu(y + shortcut)


class FusesInBlock3d(Fuses):
    """Forward of mmaction2's residual blocks."""

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self._forward, x, use_reentrant=False) if self.with_cp and x.requires_grad else self._forward(x)
        return self.non_local_block(y) if self.non_local else y

    def _forward(self, x: Tensor) -> Tensor:
        last = self.conv2
        y = self.conv1(x)
        if hasattr(self, "conv3"):
            y, last = self.conv2(y), self.conv3
        shortcut = x if self.downsample is None else self.downsample(x)
        return self._activated(last.norm, self.relu, last(y, activate=False, norm=False), shortcut)


# --- running statistics


class FreezesEveryStatistic:
    """``train`` of the toolkits' classes, which freeze batch norms in it: norm_eval, partial_bn, bn_eval, bn_frozen.

    With the weight go the other parameters of a norm, those of an activation in it.
    """

    def train(self, mode: bool = True):
        with as_batch_norms(self) as norms:
            result = super().train(mode)
        for norm in norms:
            if isinstance(norm.weight, nn.Parameter) and not norm.weight.requires_grad:
                norm.requires_grad_(False)
        return result


def _has_statistics_to_freeze(module: nn.Module) -> bool:
    own_train = stock_class(module).train is not nn.Module.train
    return own_train and is_toolkits(module) and not is_ours(module) and any(map(is_batch_norm, module.modules()))


# --- what else the toolkits take for granted


class FoldsForDeployment:
    """RepVGG and its like make one convolution of several, out of their weights as they are stored."""

    def switch_to_deploy(self) -> None:
        fold_ws(self)
        for module in self.modules():
            if getattr(module, "conv_cfg", None) is not None:
                module.conv_cfg = None  # the new one has a weight that is standardized already
        super().switch_to_deploy()


def _standardizes_weights(module: nn.Module) -> bool:
    return any(isinstance(layer, WS_CONVS) for layer in module.modules())


def _other_backbones_of_bn() -> tuple[type, ...]:
    return (
        *imported("mmaction.models.backbones.resnet", "ResNet"),
        *imported("mmaction.models.backbones.x3d", "X3D"),
        *imported("mmaction.models.backbones.resnet_audio", "ResNetAudio"),
        *imported("mmaction.models.common.conv_audio", "ConvAudio"),
    )


def _blocks_of_two_layouts() -> tuple[type, ...]:
    return (
        *imported("mmpretrain.models.backbones.convnext", "ConvNeXtBlock"),
        *imported("mmpretrain.models.backbones.sparse_convnext", "SparseConvNeXtBlock"),
    )


class TakesLayout:
    """Forward of mmpretrain's LN2d, which ConvNeXt tells where the channels are."""

    def forward(self, x: Tensor, data_format: str = "channel_first") -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1) if data_format == "channel_last" else super().forward(x)


def _check_tokens(model: nn.Module) -> None:
    """Refuse a norm of channels in classes that normalize tokens, whose axis 1 is their number."""
    for path, module in model.named_modules():
        norm = next(filter(is_ours, module.children()), None) if is_toolkits(module) else None
        if norm is not None and (_has_layer_norm(stock_class(module)) or _embeds_patches(module)):
            raise ValueError(
                f"{type(norm).__name__} normalizes the channels of maps (N, C, *), but {path or 'the model'}, a "
                f"{type(module).__module__}.{type(module).__qualname__}, normalizes tokens (N, L, C), each by itself: "
                f"its norms are LayerNorms. Leave norm_cfg out there. Batch norms that the model has elsewhere become "
                f"{type(norm).__name__} with model = dict(replace_norm=...), which leaves LayerNorms alone."
            )


@functools.cache
def _has_layer_norm(cls: type) -> bool:
    default = inspect.signature(cls.__init__).parameters.get("norm_cfg")
    return default is not None and isinstance(default.default, dict) and default.default.get("type") == "LN"


def _embeds_patches(module: nn.Module) -> bool:
    places = ("mmcv.cnn.bricks.transformer", "mmdet.models.layers.transformer.utils", "mmseg.models.utils.embed")
    return any(keeps_forward(module, place, "PatchEmbed") for place in places)


def _widen_groups(model: nn.Module) -> None:
    """Give groups of two channels or more to EvoNormS0 where it sees a vector: behind a global pooling, or a Linear.

    A group of one channel holds a single value there, which has no deviation.
    """
    for module in model.modules():
        norms = [module.norm1] if isinstance(module, _split_attentions()) else []
        if isinstance(module, nn.Sequential):
            norms += [getattr(layer, "norm", layer) for before, layer in itertools.pairwise(module) if _is_flat(before)]
        for norm in norms:
            if isinstance(norm, EvoNormS0) and norm.num_groups == norm.num_channels > 1:
                norm.num_groups = next(g for g in range(norm.num_channels - 1, 0, -1) if norm.num_channels % g == 0)


def _is_flat(layer: nn.Module) -> bool:
    """Whether a layer puts out one position of each channel."""
    sizes = getattr(layer, "output_size", None) if isinstance(layer, _AdaptiveAvgPoolNd) else None
    return isinstance(layer, nn.Linear) or sizes == 1 or (isinstance(sizes, tuple) and set(sizes) == {1})


def _split_attentions() -> tuple[type, ...]:
    places = ("mmdet.models.backbones", "mmseg.models.backbones", "mmpretrain.models.backbones")
    return tuple(cls for place in places for cls in imported(f"{place}.resnest", "SplitAttentionConv2d"))


# --- the registries


def registries(registry: Registry) -> Iterator[Registry]:
    """Yield a registry and all below it."""
    yield registry
    for child in registry.children.values():
        yield from registries(child)


def _adapting(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_and_adapt(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            built = build(cfg, *args, **kwargs)
        except KeyError as error:
            explanation = _explain(error, cfg, kwargs["registry"])
            if explanation is None:
                raise
            raise KeyError(explanation) from error
        return adapt(built) if isinstance(built, nn.Module) else built

    build_and_adapt.adapts = True
    return build_and_adapt


def _explain(error: KeyError, cfg: Any, registry: Registry) -> str | None:
    """Return a better message for a type that no registry knows; mmcv's own calls every such layer "None"."""
    message = str(error)
    if "Cannot find None in registry" not in message and " registry. Please check whether" not in message:
        return None
    with registry.switch_scope_and_registry(cfg.get("_scope_") if isinstance(cfg, dict) else None) as registry:
        for key, name in _types(cfg):
            package = MODULE2PACKAGE.get(name.partition(".")[0]) if "." in name else None
            if package and importlib.util.find_spec(name.partition(".")[0]) is None:
                return (
                    f"{key}=dict(type={name!r}) names a class of {package}, which is not installed. Install it: "
                    f"pip install {package}; mmdet and mmaction2 come with pip install 'normplug[openmmlab]'."
                )
            if "Cannot find None" in message and key.endswith("_cfg") and registry.get(name) is None:
                like = nearest(name, MODELS.module_dict)
                known = sorted(key for key, cls in MODELS.module_dict.items() if cls.__module__.startswith("normplug."))
                hint = f"Did you mean {like[0]}?" if like else "Check the spelling."
                return (
                    f"{key}=dict(type={name!r}) names a layer that nobody has registered (searched from scope "
                    f"{registry.scope!r} upwards). {hint} The package that has it has to be in "
                    f"custom_imports. normplug has {', '.join(known)}; mmcv has BN, LN, IN and their kin."
                )
    return None


def _types(cfg: Any, key: str = "model") -> Iterator[tuple[str, str]]:
    """Yield the key and the value of every ``type`` given by name in a config."""
    if isinstance(cfg, dict):
        if isinstance(cfg.get("type"), str):
            yield key, cfg["type"]
        for name, value in cfg.items():
            if name not in ("init_cfg", "train_cfg", "test_cfg"):  # their types live in other registries
                yield from _types(value, name)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            yield from _types(value, key)
