"""A pre-activation ResNet: the toolkits have none, and the weights of BiT and of timm's ResNetV2 fit nothing else."""

from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from normplug.openmmlab.adapt import Fuses, FusesInSequence

__all__ = ["ResNetV2"]

_BIT_CONV = dict(type="ConvWS", eps=1e-8, correction=0, eps_inside=True)
_BIT_NORM = dict(type="GN", num_groups=32)
_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def _norm(cfg: dict[str, Any], channels: int, postfix: int | str = "") -> tuple[str, nn.Module]:
    from mmcv.cnn import build_norm_layer

    return build_norm_layer(cfg, channels, postfix=postfix)


def _conv(cfg: dict[str, Any] | None, *args: int, **kwargs: int) -> nn.Module:
    from mmcv.cnn import build_conv_layer

    return build_conv_layer(cfg, *args, bias=False, **kwargs)


def _with_activation(norm: nn.Module) -> list[nn.Module]:
    return [norm, _activation_behind(norm)]


def _activation_behind(norm: nn.Module) -> nn.Module:
    contained = getattr(norm, "contains_activation", False) or getattr(norm, "act", None) is not None
    return nn.Identity() if contained else nn.ReLU()


class _Sequence(FusesInSequence, nn.Sequential):
    """Layers one behind the other, norms with the activation behind them in one pass."""


class _Block(Fuses, nn.Module):
    """norm, ReLU, 1x1; norm, ReLU, 3x3 with the stride; norm, ReLU, 1x1; plus the input."""

    places_activations = True

    def __init__(self, channels: int, width: int, out: int, stride: int, avg_down: bool, conv_cfg, norm_cfg) -> None:
        super().__init__()
        self.norm_names, self.activations = [], nn.ModuleList()
        shapes = [(channels, width, 1, {}), (width, width, 3, dict(stride=stride, padding=1)), (width, out, 1, {})]
        for i, (before, after, kernel, options) in enumerate(shapes, 1):
            name, norm = _norm(norm_cfg, before, i)
            self.add_module(name, norm)
            self.add_module(f"conv{i}", _conv(conv_cfg, before, after, kernel, **options))
            self.norm_names.append(name)
            self.activations.append(_activation_behind(norm))
        self.downsample = None
        if avg_down and (stride != 1 or channels != out):
            pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
            self.downsample = nn.Sequential(pool, _conv(conv_cfg, channels, out, 1))
        elif stride != 1 or channels != out:
            self.downsample = _conv(conv_cfg, channels, out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y, shortcut = x, x
        for i, (name, activation) in enumerate(zip(self.norm_names, self.activations, strict=True), 1):
            y = self._activated(getattr(self, name), activation, y)
            if i == 1 and self.downsample is not None:
                shortcut = self.downsample(y)
            y = getattr(self, f"conv{i}")(y)
        return y + shortcut


@MODELS.register_module()
class ResNetV2(Fuses, BaseModule):
    """ResNet with norm and ReLU in front of each convolution, as BiT trained it; its defaults are BiT's R50x1.

        backbone = dict(type='ResNetV2', depth=50, init_cfg=dict(type='Pretrained', checkpoint='bit_r50x1.pth'))

    ``tools/convert_checkpoint.py`` makes that file from BiT's ``.npz`` and from timm's ``resnetv2_*_bit``, and with
    ``deep_stem=True, avg_down=True, conv_cfg=None`` from timm's ``resnetv2_50d_gn`` and, the norm being EvoNormS0,
    ``resnetv2_50d_evos``. All of them see RGB images with mean and std 127.5.

    Args:
        depth: 50, 101 or 152.
        base_channels: Channels of the stem: 64 times BiT's width factor.
        deep_stem: Three 3x3 convolutions instead of one of 7x7, and a max pooling that ignores its border; BiT's pads
            with zeros.
        avg_down: In shortcuts pool by averages and convolve then, instead of a convolution with stride.
        conv_cfg: Convolutions; default: those of BiT in timm, standardized with population variance and eps 1e-8.
        norm_cfg: Norms. Layers that contain their activation are taken for norm and ReLU.
        out_indices: Stages whose maps are returned.
        frozen_stages: Stem and that many stages are not trained; -1: everything is.
        init_cfg: As in every model of mmengine.

    Shape:
        - Input: (N, 3, H, W).
        - Output: for stage i of ``out_indices`` (N, 4 * 2**i * base_channels, H / 2**(i + 2), W / 2**(i + 2)), the sum
          as it leaves the stage; the last stage's behind the network's last norm and ReLU.

    Raises:
        ValueError: If there is no such depth or stage.

    Reference:
        A. Kolesnikov et al., "Big Transfer (BiT): General Visual Representation Learning", ECCV 2020, arXiv 1912.11370;
        K. He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016, arXiv 1603.05027; T. He et al.,
        "Bag of Tricks for Image Classification with Convolutional Neural Networks", CVPR 2019, arXiv 1812.01187 (the
        deep stem and the shortcuts of ResNet-D). As in BiT's code the stride is in the 3x3 convolution.
    """

    places_activations = True

    def __init__(
        self,
        depth: int,
        base_channels: int = 64,
        deep_stem: bool = False,
        avg_down: bool = False,
        conv_cfg: dict[str, Any] | None = _BIT_CONV,
        norm_cfg: dict[str, Any] = _BIT_NORM,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if depth not in _BLOCKS or not set(out_indices) <= set(range(4)):
            raise ValueError(
                f"ResNetV2 has the depths {list(_BLOCKS)} and the stages 0 to 3, but got depth={depth} and "
                f"out_indices={tuple(out_indices)}."
            )
        self.out_indices, self.frozen_stages = tuple(out_indices), frozen_stages
        self.deep_stem, self.avg_down = deep_stem, avg_down
        if deep_stem:
            half = base_channels // 2
            self.stem = _Sequence(
                _conv(conv_cfg, 3, half, 3, stride=2, padding=1),
                *_with_activation(_norm(norm_cfg, half)[1]),
                _conv(conv_cfg, half, half, 3, padding=1),
                *_with_activation(_norm(norm_cfg, half)[1]),
                _conv(conv_cfg, half, base_channels, 3, padding=1),
            )
            self.pool = nn.MaxPool2d(3, 2, padding=1)
        else:
            self.conv1 = _conv(conv_cfg, 3, base_channels, 7, stride=2, padding=3)
            self.pool = nn.Sequential(nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(3, 2))
        channels = base_channels
        for stage, blocks in enumerate(_BLOCKS[depth]):
            width = base_channels * 2**stage
            layer = nn.Sequential()
            for i in range(blocks):
                stride = 2 if i == 0 and stage > 0 else 1
                layer.append(_Block(channels, width, 4 * width, stride, avg_down, conv_cfg, norm_cfg))
                channels = 4 * width
            self.add_module(f"layer{stage + 1}", layer)
        self.norm_name, norm = _norm(norm_cfg, channels)
        self.add_module(self.norm_name, norm)
        self.activation = _activation_behind(norm)
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, outputs = self.pool(self.stem(x) if self.deep_stem else self.conv1(x)), []
        for stage in range(4):
            x = getattr(self, f"layer{stage + 1}")(x)
            if stage == 3:
                x = self._activated(getattr(self, self.norm_name), self.activation, x)
            if stage in self.out_indices:
                outputs.append(x)
        return tuple(outputs)

    def train(self, mode: bool = True) -> "ResNetV2":
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages >= 0:
            stem = self.stem if self.deep_stem else self.conv1
            for module in (stem, *(getattr(self, f"layer{i + 1}") for i in range(self.frozen_stages))):
                module.eval().requires_grad_(False)
