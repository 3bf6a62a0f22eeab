"""What the keys of published checkpoints mean, said in one set of names.

Those names are mmdet's, with every norm called after the convolution it belongs to: ``backbone.layer1.0.conv2.weight``
and ``backbone.layer1.0.conv2.norm.bias``, whatever the file has (``res2_0_branch2b_gn_b``, ``layer1.0.bn2.bias``,
``backbone.layer1.0.conv2.gn.bias``). `canonical` says it for torch's own state dicts, each `Format` for one project's.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from normplug.openmmlab.checkpoints import _kinds_in_names
from normplug.openmmlab.formats.files import Checkpoint
from normplug.openmmlab.resnet3d import STD

__all__ = ["FORMATS", "IMAGES", "Format", "Images", "Source", "Standardization", "Weight", "canonical", "understand"]


class Images(NamedTuple):
    """Images as a network was trained on them, in grey levels 0 to 255; mean and std in the order R, G, B."""

    order: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def data_preprocessor(self) -> str:
        """Say it as a config does, where mean and std follow the order of the channels."""
        turn = -1 if self.order == "BGR" else 1
        mean, std = ([round(value, 4) for value in values[::turn]] for values in (self.mean, self.std))
        return f"mean={mean}, std={std}, bgr_to_rgb={self.order == 'RGB'}"


_IMAGENET_MEAN, _ONES = (123.675, 116.28, 103.53), (1.0, 1.0, 1.0)
IMAGES = {
    "imagenet": Images("RGB", _IMAGENET_MEAN, STD),
    "detectron": Images("BGR", (122.7717, 115.9465, 102.9801), _ONES),
    "detectron2": Images("BGR", _IMAGENET_MEAN, _ONES),
    "detectron2-std": Images("BGR", _IMAGENET_MEAN, STD),
    "bit": Images("RGB", (127.5,) * 3, (127.5,) * 3),
}


class Standardization(NamedTuple):
    """How a convolution standardizes its filters: the arguments of ConvWS."""

    eps: float
    correction: int
    eps_inside: bool

    def conv_cfg(self) -> str:
        """Say it as a config does."""
        return f"dict(type='ConvWS', eps={self.eps:g}, correction={self.correction}, eps_inside={self.eps_inside})"


WS = Standardization(1e-5, 1, False)  # of its authors and of mmcv


@dataclass
class Weight:
    """A tensor on its way: the keys it comes from, and what was done to it."""

    keys: tuple[str, ...]
    tensor: Tensor
    done: tuple[str, ...] = ()

    def become(self, tensor: Tensor, done: str) -> None:
        """Replace the tensor and note why."""
        self.tensor, self.done = tensor, (*self.done, done)


@dataclass
class Source:
    """A checkpoint whose keys are understood.

    Attributes:
        format: Its format.
        weights: Weights by canonical name.
        dropped: Why a key of the file is not among them.
        affine: Canonical names of norms that are a weight and a bias only: BN with its statistics in them.
    """

    format: "Format"
    weights: dict[str, Weight]
    dropped: dict[str, str]
    affine: frozenset[str] = frozenset()

    @property
    def avg_down(self) -> bool | None:
        """Whether its shortcuts pool by averages before they convolve; None if no shortcut convolves."""
        keys = [w.keys[0] for name, w in self.weights.items() if name.endswith(".downsample.weight")]
        if not keys:
            return None
        # in a sequence the convolution is behind the pooling
        return self.format.avg_down or any(key.endswith(".downsample.1.weight") for key in keys)

    @property
    def detector(self) -> bool:
        """Whether it is more than a backbone."""
        return any(not name.startswith("backbone.") for name in self.weights)

    def kind(self, norm: str) -> str:
        """Tell which norm this is: 'BN', 'affine', or 'GN' for any without running statistics."""
        if norm in self.affine:
            return "affine"
        return "BN" if f"{norm}.running_mean" in self.weights else "GN"

    def standardization(self, conv: str) -> Standardization | None:
        """Tell how this convolution standardizes its filters; the standardized ones are those with a norm."""
        return self.format.ws if f"{conv}.norm.weight" in self.weights or self.format.preactivation else None


@dataclass(frozen=True)
class Format:
    """One project's way to write a checkpoint.

    Attributes:
        name: What ``--format`` calls it.
        what: Whose files these are.
        needs: Patterns; each is that of a key in every such file.
        rename: From the file's weights to the canonical name of each key it knows.
        images: What its networks see, unless the file says otherwise.
        drops: Patterns of keys that no model needs, and why.
        ws: How its convolutions standardize.
        like_config: Its convolutions are those of the config: same toolkit, same layers.
        preactivation: Norms stand in front of their convolutions.
        avg_down: Shortcuts pool by averages, which its keys do not tell.
        statistics: A file with running statistics may be of this format.
        background_first: The background is class 0; in mmdet it is the last.
        notes: What no converter can carry over.
    """

    name: str
    what: str
    needs: tuple[str, ...]
    rename: Callable[[Mapping[str, Tensor]], dict[str, str]]
    images: Images = IMAGES["imagenet"]
    drops: tuple[tuple[str, str], ...] = ()
    ws: Standardization | None = None
    like_config: bool = False
    preactivation: bool = False
    avg_down: bool = False
    statistics: bool = True
    background_first: bool = False
    notes: tuple[str, ...] = ()

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return those of its needs that no key meets; all of them if the keys rule it out."""
        keys = list(keys)
        if not self.statistics and any(key.endswith("running_mean") for key in keys):
            return list(self.needs)
        return [pattern for pattern in self.needs if not any(re.fullmatch(pattern, key) for key in keys)]

    def is_it(self, keys: Iterable[str]) -> bool:
        """Tell it by the keys."""
        return not self.missing(keys)


# ---- torch's own state dicts: torchvision's, timm's, mmdet's and mmaction2's names


def canonical(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the canonical name of each key of a model's state dict, 2-D or 3-D, backbone or detector."""
    filters = {key.removesuffix(".weight") for key, v in state.items() if key.endswith(".weight") and v.ndim > 1}
    names = {}
    for key in state:
        layer, _, leaf = key.rpartition(".")
        # conv5 of a C4 detector is the backbone's last stage
        names[key] = f"{_layer(layer, filters)}.{leaf}".replace("roi_head.shared_head.", "backbone.")
    return names


def _layer(layer: str, filters: set[str]) -> str:
    if layer in filters:
        return re.sub(r"\.conv$|(?<=downsample)\.\d+$", "", layer)
    parent, _, own = layer.rpartition(".")
    if own.isdigit() and f"{parent}.{int(own) - 1}" in filters:  # in a Sequential, behind its convolution
        return _layer(f"{parent}.{int(own) - 1}", filters) + ".norm"
    kind, number = re.fullmatch(r"(.*?)(\d*)", own).groups()
    if kind not in _kinds_in_names() | {"norm"}:
        return layer
    conv = f"conv{number}" if number else ""
    return ".".join(filter(None, (parent, conv, "norm")))


def _by_torch_names(prefix: str, *changes: tuple[str, str]) -> Callable[[Mapping[str, Tensor]], dict[str, str]]:
    """Rename keys by substitutions, then as `canonical` does; the prefix is what the file's keys lack."""

    def rename(weights: Mapping[str, Tensor]) -> dict[str, str]:
        keys = {}
        for key in weights:
            new = key.removeprefix("module.")
            for pattern, replacement in changes:
                new = re.sub(pattern, replacement, new)
            keys[key] = prefix + new
        names = canonical({keys[key]: value for key, value in weights.items()})
        return {key: names[new] for key, new in keys.items()}

    return rename


_CLASSIFIER = "the classifier of ImageNet"
_HEADLESS = ((r"(module\.)?(fc|head\.fc)\.(weight|bias)", _CLASSIFIER),)


def _torchvision(weights: Mapping[str, Tensor]) -> dict[str, str]:
    # timm's ResNet-D has a conv1 of three; mmdet's ResNetV1d calls it stem, and the norm behind is its last but one
    deep = any(re.fullmatch(r"(module\.)?conv1\.0\.weight", key) for key in weights)
    changes = ((r"^conv1\.(\d+)\.", r"stem.\1."), (r"^bn1\.", "stem.7.")) if deep else ()
    return _by_torch_names("backbone.", *changes)(weights)


# ---- Detectron and Detectron2

_BLOCK = {"branch1": "downsample", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
_LEAF = {"w": "weight", "s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
_CAFFE2 = (
    (r"(?:res_)?conv1", lambda m: "backbone.conv1"),
    (r"res(\d)_(\d+)_(branch1|branch2[abc])", lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.{_BLOCK[m[3]]}"),
    (r"fpn_inner_res(\d)_\d+_sum(?:_lateral)?", lambda m: f"neck.lateral_convs.{int(m[1]) - 2}"),
    (r"fpn_res(\d)_\d+_sum", lambda m: f"neck.fpn_convs.{int(m[1]) - 2}"),
    (r"conv_rpn(?:_fpn2)?", lambda m: "rpn_head.rpn_conv"),
    (r"rpn_cls_logits(?:_fpn2)?", lambda m: "rpn_head.rpn_cls"),
    (r"rpn_bbox_pred(?:_fpn2)?", lambda m: "rpn_head.rpn_reg"),
    (r"head_conv(\d)", lambda m: f"roi_head.bbox_head.shared_convs.{int(m[1]) - 1}"),
    (r"fc([67])", lambda m: f"roi_head.bbox_head.shared_fcs.{int(m[1]) - 6}"),
    (r"cls_score", lambda m: "roi_head.bbox_head.fc_cls"),
    (r"bbox_pred", lambda m: "roi_head.bbox_head.fc_reg"),
    (r"_(?:\[mask\]|mask)_fcn(\d)", lambda m: f"roi_head.mask_head.convs.{int(m[1]) - 1}"),
    (r"conv5_mask", lambda m: "roi_head.mask_head.upsample"),
    (r"mask_fcn_logits", lambda m: "roi_head.mask_head.conv_logits"),
)
_DETECTRON2 = (
    (r"(?:backbone\.)?(?:bottom_up\.)?stem\.conv1", lambda m: "backbone.conv1"),
    (
        r"(?:backbone\.|roi_heads\.)?(?:bottom_up\.)?res(\d)\.(\d+)\.(shortcut|conv\d)",
        lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.{m[3].replace('shortcut', 'downsample')}",
    ),
    (r"backbone\.fpn_lateral(\d)", lambda m: f"neck.lateral_convs.{int(m[1]) - 2}"),
    (r"backbone\.fpn_output(\d)", lambda m: f"neck.fpn_convs.{int(m[1]) - 2}"),
    (r"proposal_generator\.rpn_head\.conv", lambda m: "rpn_head.rpn_conv"),
    (r"proposal_generator\.rpn_head\.objectness_logits", lambda m: "rpn_head.rpn_cls"),
    (r"proposal_generator\.rpn_head\.anchor_deltas", lambda m: "rpn_head.rpn_reg"),
    (r"roi_heads\.box_head\.conv(\d)", lambda m: f"roi_head.bbox_head.shared_convs.{int(m[1]) - 1}"),
    (r"roi_heads\.box_head\.fc(\d)", lambda m: f"roi_head.bbox_head.shared_fcs.{int(m[1]) - 1}"),
    (r"roi_heads\.box_predictor\.cls_score", lambda m: "roi_head.bbox_head.fc_cls"),
    (r"roi_heads\.box_predictor\.bbox_pred", lambda m: "roi_head.bbox_head.fc_reg"),
    (r"roi_heads\.mask_head\.mask_fcn(\d)", lambda m: f"roi_head.mask_head.convs.{int(m[1]) - 1}"),
    (r"roi_heads\.mask_head\.deconv", lambda m: "roi_head.mask_head.upsample"),
    (r"roi_heads\.mask_head\.predictor", lambda m: "roi_head.mask_head.conv_logits"),
)


def _by_table(table, split: str, leaf: Callable[[str], str]) -> Callable[[Mapping[str, Tensor]], dict[str, str]]:
    """Rename keys that ``split`` takes apart into layer, norm or nothing, and leaf; the table knows the layers."""

    def rename(weights: Mapping[str, Tensor]) -> dict[str, str]:
        names = {}
        for key in weights:
            if not (parts := re.fullmatch(split, key)):
                continue
            for pattern, name in table:
                if match := re.fullmatch(pattern, parts[1]):
                    names[key] = f"{name(match)}{'.norm' if parts[2] else ''}.{leaf(parts[3])}"
                    break
        return names

    return rename


# ---- BiT

_BIT_UNIT = {"a/group_norm": "norm1", "b/group_norm": "norm2", "c/group_norm": "norm3", "a/proj": "downsample"}
_BIT_UNIT |= {"a/standardized_conv2d": "conv1", "b/standardized_conv2d": "conv2", "c/standardized_conv2d": "conv3"}
_BIT_LEAF = {"kernel": "weight", "gamma": "weight", "beta": "bias"}


def _bit_npz(weights: Mapping[str, Tensor]) -> dict[str, str]:
    keys = {}
    for key in weights:
        path = key.removeprefix("resnet/")
        if unit := re.fullmatch(r"block(\d)/unit(\d+)/(\w+/\w+)(?:/standardized_conv2d)?/(kernel|gamma|beta)", path):
            part = _BIT_UNIT.get(unit[3], unit[3])
            keys[key] = f"layer{unit[1]}.{int(unit[2]) - 1}.{part}.{_BIT_LEAF[unit[4]]}"
        elif path == "root_block/standardized_conv2d/kernel":
            keys[key] = "conv1.weight"
        elif end := re.fullmatch(r"group_norm/(gamma|beta)", path):
            keys[key] = f"norm.{_BIT_LEAF[end[1]]}"
    names = _by_torch_names("backbone.")({new: weights[key] for key, new in keys.items()})
    return {key: names[new] for key, new in keys.items()}


_BIT_TIMM = ((r"^stem\.", ""), (r"^conv\.", "conv1."), (r"^stages\.(\d)\.blocks", lambda m: f"layer{int(m[1]) + 1}"))
_RESNET_V2_TIMM = (  # conv1, norm1, conv2, ... of the stem are a sequence with activations between them
    (r"^stem\.(conv|norm)(\d)", lambda m: f"stem.{3 * int(m[2]) - (3 if m[1] == 'conv' else 2)}"),
    *_BIT_TIMM[2:],
)


# ---- the formats


_BOXES = (
    "boxes were one pixel larger in that code: for its exact boxes give the config LegacyAnchorGenerator, "
    "LegacyDeltaXYWHBBoxCoder and RoIAlign with aligned=False (mmdet's configs/legacy_1.x)"
)
FORMATS = {
    format.name: format
    for format in (
        Format(
            "caffe2",
            "Detectron (Caffe2 names), also where Detectron2 keeps them",
            (r"conv1_w", r"res2_0_branch2a_w"),
            _by_table(_CAFFE2, r"(.+?)(?:_(gn|bn))?_([a-z]+)", lambda leaf: _LEAF.get(leaf, leaf)),
            IMAGES["detectron"],
            (
                (r".*_momentum|lr|.*_lr", "state of the optimizer"),
                (r"(pred|fc1000|linear)_[wb]", _CLASSIFIER),
                (
                    r"(res\d_\d+_branch(1|2[abc])|conv1)_b",
                    "Detectron's backbones have no such bias and leave it unread",
                ),
            ),
            background_first=True,
            notes=(_BOXES,),
        ),
        Format(
            "detectron2",
            "Detectron2",
            (r"(.*\.)?stem\.conv1\.weight", r"(.*\.)?res2\.0\.conv1\.weight"),
            _by_table(_DETECTRON2, r"(.+?)(\.norm)?\.(\w+)", str),
            IMAGES["detectron2"],
            (
                (r"(stem\.)?(fc|linear)\.(weight|bias)", _CLASSIFIER),
                (r"pixel_(mean|std)", "images are prepared by the data_preprocessor"),
                (r".*cell_anchors\.\d+", "anchors are made by the config"),
            ),
        ),
        Format(
            "bit-npz",
            "google-research/big_transfer (.npz)",
            (r"(resnet/)?root_block/standardized_conv2d/kernel",),
            _bit_npz,
            IMAGES["bit"],
            ((r"(resnet/)?head/.*", _CLASSIFIER),),
            ws=Standardization(1e-10, 0, True),
            preactivation=True,
        ),
        Format(
            "bit-timm",
            "timm's resnetv2_*_bit",
            (r"stem\.conv\.weight", r"stages\.0\.blocks\.0\.norm1\.weight"),
            _by_torch_names("backbone.", *_BIT_TIMM),
            IMAGES["bit"],
            ((r"head\..*", _CLASSIFIER),),
            statistics=False,
            ws=Standardization(1e-8, 0, True),
            preactivation=True,
        ),
        Format(
            "resnetv2-timm",
            "timm's resnetv2_*d, with the deep stem",
            (r"stem\.conv1\.weight", r"stages\.0\.blocks\.0\.norm1\.weight"),
            _by_torch_names("backbone.", *_RESNET_V2_TIMM),
            IMAGES["bit"],
            ((r"head\..*", _CLASSIFIER),),
            preactivation=True,
            avg_down=True,
        ),
        Format(
            "mmdet1",
            "mmdet 1.x detectors, Howal/Cross-iterationBatchNorm among them",
            (r"(module\.)?backbone\.conv1\.weight", r"(module\.)?bbox_head\.fc_cls\.weight"),
            _by_torch_names("", (r"^(bbox_head|mask_head|shared_head)\.", r"roi_head.\1.")),
            like_config=True,
            background_first=True,
            notes=(_BOXES,),
        ),
        Format(
            "mmdet",
            "mmdet 2 and 3, mmaction2: whole models",
            (r"(module\.)?backbone\..*conv1\..*weight",),
            _by_torch_names(""),
            like_config=True,
        ),
        Format(
            "mmdet-backbone",
            "open-mmlab:// backbones with a norm called gn, such as detectron/resnet50_gn",
            (r"conv1\.weight", r"gn1\.weight", r"layer1\.0\.conv1\.weight"),
            _by_torch_names("backbone."),
            drops=_HEADLESS,
            like_config=True,
        ),
        Format(
            "jhu",
            "joe-siyuan-qiao/pytorch-classification, GN and standardized weights",
            (r"module\.conv1\.weight", r"module\.layer1\.0\.conv1\.weight"),
            _by_torch_names("backbone."),
            drops=_HEADLESS,
            statistics=False,
            ws=WS,
        ),
        Format(
            "torchvision",
            "torchvision's and timm's ResNets",
            (r"(module\.)?conv1\.(0\.)?weight", r"(module\.)?layer1\.0\.conv1\.weight"),
            _torchvision,
            drops=_HEADLESS,
        ),
    )
}


def understand(
    checkpoint: Checkpoint,
    format: str = "auto",
    *,
    standardized: bool | None = None,
    images: str | None = None,
    drop: Iterable[str] = (),
) -> Source:
    """Say what each key of a checkpoint means.

    Args:
        checkpoint: What the file holds.
        format: A name in `FORMATS`, or 'auto': the first whose keys these are.
        standardized: Whether the convolutions that have a norm standardize their filters, by the formula of mmcv and
            of its authors. The keys do not tell. Default: what the format says.
        images: A name in `IMAGES`, in the place of what the format says.
        drop: Patterns of keys to leave out.

    Raises:
        ValueError: If no format has these keys, or a key means nothing in this format, or two the same.
    """
    keys = list(checkpoint.weights)
    chosen = _detected(keys) if format == "auto" else FORMATS[format]
    if not chosen.is_it(keys):
        raise ValueError(
            f"These are not the keys of {chosen.what}: {', '.join(keys[:5])}, ... Leave --format out to have the "
            f"format recognized, or name another: {', '.join(FORMATS)}."
        )
    if standardized is not None and not chosen.preactivation:
        chosen = replace(chosen, ws=WS if standardized else None, like_config=False)
    if images is not None:
        chosen = replace(chosen, images=IMAGES[images])
    elif {"pixel_mean", "pixel_std"} <= set(keys):  # detectron2 once saved what it subtracts, in the order of BGR
        mean, std = (tuple(checkpoint.weights[f"pixel_{name}"].flatten().tolist()[::-1]) for name in ("mean", "std"))
        chosen = replace(chosen, images=Images("BGR", mean, std))
    dropped = {key: f"no tensor but {type(value).__name__}" for key, value in checkpoint.others.items()}
    left = {}
    for key, tensor in checkpoint.weights.items():
        asked = any(fnmatchcase(key, pattern) for pattern in drop)
        reason = (
            "as asked" if asked else next((why for pattern, why in chosen.drops if re.fullmatch(pattern, key)), None)
        )
        if reason:
            dropped[key] = reason
        else:
            left[key] = tensor
    names = chosen.rename(left)
    if unknown := [key for key in left if key not in names]:
        raise ValueError(
            f"{len(unknown)} of {len(keys)} keys mean nothing in the format {chosen.name}: {', '.join(unknown[:8])}"
            f"{', ...' if len(unknown) > 8 else ''}. If the model can do without them, leave them out with --drop "
            f"KEY; patterns such as 'head.*' are fine."
        )
    source = Source(chosen, {}, dropped)
    for key, name in names.items():
        if name in source.weights:
            raise ValueError(
                f"Both {source.weights[name].keys[0]} and {key} are {name}. Leave one out with --drop KEY."
            )
        source.weights[name] = Weight((key,), left[key])
    if chosen.name == "caffe2":
        affine = (names[key].rpartition(".")[0] for key in names if key.endswith("_bn_s"))
        source.affine = frozenset(norm for norm in affine if f"{norm}.running_mean" not in source.weights)
    if chosen.name == "bit-npz":
        for weight in source.weights.values():
            if weight.tensor.ndim == 4:
                weight.become(weight.tensor.permute(3, 2, 0, 1), "HWIO to OIHW")
    if chosen.background_first:
        _background_last(source)
    return source


def _detected(keys: list[str]) -> Format:
    for format in FORMATS.values():
        if format.is_it(keys):
            return format
    partly = [f for f in FORMATS.values() if 0 < len(f.missing(keys)) < len(f.needs)]
    nearly = "".join(f" It would be {f.name} with a key {' and '.join(f.missing(keys))}." for f in partly)
    raise ValueError(
        f"The keys of this checkpoint are those of no known format: {', '.join(keys[:8])}, ...{nearly} Known are "
        + "; ".join(f"{format.name} ({format.what})" for format in FORMATS.values())
        + "."
    )


def _background_last(source: Source) -> None:
    """Bring classes into mmdet's order: background at the end for scores, and nowhere for boxes and masks."""
    for part, rows in (("bbox_head.fc_cls", None), ("bbox_head.fc_reg", 4), ("mask_head.conv_logits", 1)):
        for leaf in ("weight", "bias"):
            weight = source.weights.get(f"roi_head.{part}.{leaf}")
            if weight is None:
                continue
            if rows is None:
                weight.become(torch.cat([weight.tensor[1:], weight.tensor[:1]]), "background from first to last class")
            elif weight.tensor.shape[0] > rows:  # else one box or mask for all classes
                weight.become(weight.tensor[rows:], "without the background")
