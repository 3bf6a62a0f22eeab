"""What mmaction2's backbones do for layers called ``bn`` only, done for every norm."""

import contextlib
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from mmengine.logging import MMLogger
from mmengine.model import constant_init
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normplug.openmmlab.successors import exchange

__all__ = ["CallsEveryNormBn", "InflatesEveryNorm", "load_from_detectron_as_rgb"]

# ImageNet's standard deviation in RGB: the `std` of every data_preprocessor that divides by one.
STD = (58.395, 57.12, 57.375)
# Parts that no 2-D network has keep their initial values, as in mmaction2.
ONLY_3D = ("lateral", "non_local")


class CallsEveryNormBn:
    """Methods of mmaction2's other backbones that look for the norm of a ConvModule under the name ``bn``."""

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        with _norms_called_bn(self):
            super().init_weights(*args, **kwargs)

    def _freeze_stages(self) -> None:
        with _norms_called_bn(self):
            super()._freeze_stages()

    @staticmethod
    def _load_bn_params(norm: nn.Module, source: dict[str, Tensor], name: str, loaded: list[str]) -> None:
        """Load what the checkpoint has in the place of a norm: the stock version wants all that the norm has."""
        for key, tensor in chain(norm.named_parameters(), norm.named_buffers()):
            value = source.get(f"{name}.{key}")
            if value is not None and value.shape == tensor.shape:
                tensor.data.copy_(value)
                loaded.append(f"{name}.{key}")


@contextlib.contextmanager
def _norms_called_bn(backbone: nn.Module) -> Iterator[None]:
    from mmcv.cnn import ConvModule

    modules = [module for module in backbone.modules() if isinstance(module, ConvModule) and module.with_norm]
    others = {module: module.norm_name for module in modules if module.norm_name != "bn"}
    for module, name in others.items():
        exchange(module, name, "bn", module.norm)
    try:
        yield
    finally:
        for module, name in others.items():
            exchange(module, "bn", name, module.norm)


class InflatesEveryNorm:
    """``init_weights`` of mmaction2's ResNet3d and ResNet3dLayer, whatever their norms are called.

    The stock version reads ``conv3.bn`` for ``zero_init_residual`` (an error for GN), initializes only BatchNorm, and
    finds only norms called ``bnN`` in a 2-D checkpoint: a GN stays at its initial values, with a warning.
    """

    def init_weights(self, pretrained: str | None = None) -> None:
        wanted, self.zero_init_residual = self.zero_init_residual, False
        try:
            super().init_weights(pretrained)
        finally:
            self.zero_init_residual = wanted
        if self.pretrained is not None:
            return
        for _, module in _conv_modules(self):
            if module.norm is not None and not isinstance(module.norm, _BatchNorm):
                constant_init(module.norm, 1)
        if wanted:
            for norm in _last_norms(self):
                constant_init(norm, 0)

    def inflate_weights(self, logger: MMLogger) -> dict[str, str]:
        """Load the 2-D checkpoint ``self.pretrained``, and say which of its tensors went where.

        A kernel is repeated over its T time steps and divided by T, so a still clip gives what the image gave.
        Standardized weights (ConvWS) do not feel the division and give T times as much; the norm behind them takes
        that out again, to within its eps.

        A norm takes what the checkpoint has in its place, whichever kind that is: the weight and bias of a GN are a
        better start for EvoNorm than ones and zeros. What that kind does not have, EvoNorm's v or the running
        statistics of a BN, stays at its initial value.

        Returns:
            For each tensor loaded, its name and the name it had in the checkpoint.

        Raises:
            ValueError: If a weight or bias of the backbone is not in the checkpoint, or has another shape there.
        """
        loaded = CheckpointLoader.load_checkpoint(self.pretrained, map_location="cpu", logger=logger)
        source = loaded.get("state_dict", loaded)
        norms = _norms_by_place(source)
        came_from, tensors, kept, wrong = {}, [], [], []
        for name, module in _conv_modules(self):
            if name.endswith("downsample"):  # .0 and .1 in the Sequential of 2-D networks
                pairs = [("conv", f"{name}.0"), (module.norm_name, f"{name}.1")]
            else:
                pairs = [("conv", name), (module.norm_name, norms.get(_place(name), f"the norm behind {name}"))]
            for layer, old in pairs[: 1 if module.norm is None else 2]:
                part = getattr(module, layer)
                for key, tensor in chain(part.named_parameters(), part.named_buffers()):
                    new_name, old_name = f"{name}.{layer}.{key}", f"{old}.{key}"
                    value = _over_time(source[old_name], tensor) if old_name in source else None
                    if value is not None and value.shape == tensor.shape:
                        came_from[new_name] = old_name
                        tensors.append((tensor, value))
                    elif key in ("weight", "bias"):
                        found = "is missing" if value is None else f"has shape {tuple(source[old_name].shape)}"
                        wrong.append(f"{new_name} {tuple(tensor.shape)}: {old_name} {found}")
                    else:
                        kept.append(new_name)
        if wrong:
            raise ValueError(
                f"The 2-D checkpoint {self.pretrained} does not fill this {type(self).__name__}; {len(wrong)} of its "
                f"parameters would keep their initial values:\n  "
                + "\n  ".join(wrong[:8])
                + "\nExpected is the state dict "
                f"of a 2-D ResNet of depth {self.depth} with torchvision's names (conv1, layer1.0.conv1, a norm bn1 or "
                f"gn1, downsample.0 and .1). Give the depth and width it was trained with, or pretrained2d=False for "
                f"a checkpoint that is 3-D already."
            )
        for tensor, value in tensors:
            tensor.data.copy_(value)
        logger.info(
            f"inflated {len(came_from)} tensors of {self.pretrained}:\n"
            + "\n".join(f"  {new} <- {old}" for new, old in came_from.items())
            + f"\nnot used: {sorted(source.keys() - came_from.values()) or 'none'}"
            + f"\nat their initial values: {kept or 'none'}"
        )
        return came_from


def load_from_detectron_as_rgb(filename: str, map_location: Any = None) -> dict:
    """Load ``detectron-as-rgb://CHECKPOINT``: a network for BGR images with std 1, made one for RGB with ImageNet's.

    Detectron's networks see x - mean in the order BGR, the usual data_preprocessor gives z = (x - mean) / std in the
    order RGB. The first convolution is linear and zero padding is zero in both, so turning its input channels
    round and multiplying them by std gives the same network exactly, up to float rounding. (Not for a standardized
    first convolution: factors per input channel do not survive standardization.)

    Raises:
        ValueError: If the checkpoint has not exactly one convolution of three input channels.
    """
    loaded = CheckpointLoader.load_checkpoint(filename.removeprefix("detectron-as-rgb://"), map_location)
    state = dict(loaded.get("state_dict", loaded))
    first = [key for key, value in state.items() if value.ndim == 4 and value.shape[1] == len(STD)]
    if len(first) != 1:
        raise ValueError(
            f"{filename} turns the one convolution that sees the image from BGR to RGB, but there are {len(first)} "
            f"convolutions with 3 input channels in the checkpoint ({first}). Give it a Detectron ResNet such as "
            f"open-mmlab://detectron/resnet50_gn, or load the checkpoint without detectron-as-rgb://."
        )
    weight = state[first[0]]
    state[first[0]] = weight.flip(1) * weight.new_tensor(STD).view(1, -1, 1, 1)
    return {"state_dict": state}


def _conv_modules(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from mmcv.cnn import ConvModule

    for name, module in backbone.named_modules():
        if isinstance(module, ConvModule) and not any(part in name for part in ONLY_3D):
            yield name, module


def _last_norms(backbone: nn.Module) -> Iterator[nn.Module]:
    from mmaction.models.backbones.resnet3d import BasicBlock3d, Bottleneck3d

    for module in backbone.modules():
        if isinstance(module, Bottleneck3d):
            yield module.conv3.norm
        elif isinstance(module, BasicBlock3d):
            yield module.conv2.norm


def _norms_by_place(source: dict[str, Tensor]) -> dict[str, str]:
    """Map a place like 'layer1.0.2' to the norm there in a 2-D state dict: 'layer1.0.bn2' or 'layer1.0.gn2'."""
    found = {}
    for key, value in source.items():
        match = re.fullmatch(r"(.*\.)?[a-z_]+(\d+)\.weight", key, re.IGNORECASE)
        if match and value.ndim == 1:
            found[f"{match[1] or ''}{match[2]}"] = key.removesuffix(".weight")
    return found


def _place(name: str) -> str:
    return re.sub(r"conv(\d+)$", r"\1", name)


def _over_time(value: Tensor, target: Tensor) -> Tensor:
    """Repeat a 2-D kernel over the time steps of ``target``; anything else is returned as it is."""
    if value.ndim != 4 or target.ndim != 5:
        return value
    extra = target.shape[1] - value.shape[1]  # channels of a lateral connection: they add nothing at first
    if extra > 0:
        value = nn.functional.pad(value, (0, 0, 0, 0, 0, extra))
    time = target.shape[2]
    return (value / time).unsqueeze(2).repeat(1, 1, time, 1, 1)
