"""Write the configs that are products of norm, place and batch, and what follows from data in the headers of all.

Products: the bases of configs/_base_/mask_rcnn/ and configs/_base_/coco/, configs/small_batch/, and the batch sizes and
clips of configs/i3d/. Headers: the numbers that others published (from metafile.yml) and what differs from the recipe
that a config follows (from sources.yml, by tools/recipes.py). Description, Recipe and Cost are written by hand.

Exit code: 0 all files are (now) fresh; 1 with --check: some are stale.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import recipes
import yaml
from mmengine.config import Config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
TRAIN2017, KINETICS = 117_266, 240_436  # images with objects, videos
BURN_IN_EPOCHS = 8  # CBN's


@dataclass(frozen=True)
class Norm:
    """A norm of Mask R-CNN's bases and of the small-batch series."""

    words: str  # what it is, in sentences
    norm_cfg: str  # as it stands in the file
    batch_statistics: bool = False  # in training mode it needs norm_eval=False
    conv_cfg: str | None = None


WS, AFFINE = 'dict(type="ConvWS")', "requires_grad=True"
NORMS = {
    "bn": Norm("trained BN", f'dict(type="BN", {AFFINE})', True),
    "syncbn": Norm("SyncBN", f'dict(type="SyncBN", {AFFINE})', True),
    "gn": Norm("GN", f'dict(type="GN", num_groups=32, {AFFINE})'),
    "cbn": Norm("CBN, a window of four iterations", f'dict(type="CBN", buffer_num=3, burnin=58640, {AFFINE})', True),
    "evonorm-b0": Norm("EvoNorm-B0", f'dict(type="EvoNormB0", {AFFINE})', True),
    "evonorm-s0": Norm("EvoNorm-S0", f'dict(type="EvoNormS0", {AFFINE})'),
    "frn": Norm("FRN with its threshold (TLU)", f'dict(type="FRN", eps=1e-6, {AFFINE})'),
    "bn-ws": Norm("trained BN with standardized convolutions", f'dict(type="BN", {AFFINE})', True, WS),
    "syncbn-ws": Norm("SyncBN with standardized convolutions", f'dict(type="SyncBN", {AFFINE})', True, WS),
    "gn-ws": Norm("GN with standardized convolutions", f'dict(type="GN", num_groups=32, {AFFINE})', False, WS),
}
FASTER = ("syncbn", "gn", "cbn", "gn-ws")
SCRATCH = ("bn", "syncbn", "gn", "gn-ws", "evonorm-b0", "evonorm-s0", "frn")
APPROXIMATE = (
    "torchvision's weights were trained without standardization. The norm behind a convolution takes the change of "
    "scale back but not the shift of the filter's mean, so the start is an approximation."
)
# Place and norm of the small-batch series, in configs/_base_/mask_rcnn/; what the header says.
SERIES = {
    "frozen-bn-4conv1fc": ("4conv1fc", "BN* in the backbone, no norm in the heads", ""),
    "bn-all": ("bn-everywhere", "Trained BN everywhere", ""),
    "syncbn-all": ("syncbn-everywhere", "SyncBN everywhere", ""),
    "gn-all": ("gn-all", "GN everywhere", ""),
    "gn-ws-all": ("gn-ws-all", "GN and standardized convolutions everywhere", ""),
    "bn-ws-all": ("bn-ws-everywhere", "Trained BN and standardized convolutions everywhere", APPROXIMATE),
    "bn-head": ("bn-head", "BN* in the backbone, trained BN in FPN and heads", ""),
    "syncbn-head": ("syncbn-head", "BN* in the backbone, SyncBN in FPN and heads", ""),
    "gn-head": ("gn-head", "BN* in the backbone, GN in FPN and heads", ""),
    "gn-ws-head": ("gn-ws-head", "BN* in the backbone, GN with standardized convolutions in FPN and heads", ""),
    "cbn-head": ("cbn-head", "BN* in the backbone, CBN, a window of four iterations in FPN and heads", ""),
    "evonorm-b0-head": (
        "evonorm-b0-head",
        "BN* in the backbone, EvoNorm-B0 in FPN and heads",
        "FPN's convolutions have no activation, so there the layer has none.",
    ),
    "evonorm-s0-head": (
        "evonorm-s0-head",
        "BN* in the backbone, EvoNorm-S0 in FPN and heads",
        "FPN's convolutions have no activation; there the layer is only a weight and bias per channel.",
    ),
    "frn-head": (
        "frn-head",
        "BN* in the backbone, FRN with its threshold (TLU) in FPN and heads",
        "One epoch of warm-up, which FRN needs at any batch. FPN's convolutions have no activation, so there the layer "
        "has none.",
    ),
}
# Norm of I3D: words, (clips per GPU, clip) beyond the file written by hand.
VIDEO = {
    "bn": ("BN", [(1, 32), (2, 32), (4, 32), (4, 64)]),
    "syncbn": ("SyncBN", [(1, 32), (2, 32), (4, 32), (4, 64)]),
    "gn": ("GN", [(1, 32), (2, 32), (4, 32), (4, 64), (2, 64)]),
    "gn-ws": ("GN and standardized 3-D convolutions", [(1, 32), (2, 32), (4, 32)]),
    "cbn": ("CBN", [(1, 32), (2, 32), (4, 32)]),
    "evonorm-s0": ("EvoNorm-S0", [(1, 32), (2, 32), (4, 32)]),
}


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--check", action="store_true", help="change nothing, tell which files are stale")
    args = p.parse_args(argv)
    stale = [path for path, text in products() if _differs(path, text, args.check)]
    stale += [path for path, text in headers() if _differs(path, text, args.check)]
    if args.check and stale:
        for path in sorted(set(stale)):
            print(f"{path.relative_to(ROOT)} is stale", file=sys.stderr)
        print("run python tools/make_configs.py", file=sys.stderr)
    return int(args.check and bool(stale))


def _differs(path: Path, text: str, keep: bool) -> bool:
    """Tell whether a file differs from its text (of a product without the header: from the part behind it)."""
    now = path.read_text() if path.exists() else ""
    if now == text:
        return False
    if not keep:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return True


# --- products


def products() -> Iterator[tuple[Path, str]]:
    """Return path and text of every file that the matrix gives; of an experiment, with the header lines it has now."""
    base = CONFIGS / "_base_"
    for name, norm in NORMS.items():
        for model in ["mask_rcnn", "faster_rcnn"] if name in FASTER else ["mask_rcnn"]:
            yield base / model / f"{name}-head.py", _head_base(norm, model == "mask_rcnn")
            yield base / model / f"{name}-everywhere.py", _everywhere_base(name, norm)
    for name in SCRATCH:
        yield base / "mask_rcnn" / f"{name}-scratch.py", _scratch_base(name)
    for gpus, images in [(8, 1), (8, 2), (8, 4), (8, 8), (4, 1), (4, 2)]:
        yield base / "coco" / f"instance_{gpus}xb{images}.py", _batch_base("instance", gpus, images)
    yield base / "coco" / "detection_8xb2.py", _batch_base("detection", 8, 2)
    yield base / "coco" / "detection_8xb1.py", _batch_base("detection", 8, 1)
    for name in SERIES:
        for images in (1, 2, 4, 8):
            path = CONFIGS / "small_batch" / f"mask-rcnn_r50_fpn_{name}_8xb{images}-1x_coco.py"
            yield path, _keep_header_data(path, *_series(name, images))
    for norm, (_, variants) in VIDEO.items():
        for clips, frames in variants:
            path = _video_path(norm, clips, frames)
            yield path, _keep_header_data(path, *_video(norm, clips, frames))


def _head_base(norm: Norm, masks: bool) -> str:
    conv = f"conv_cfg = {norm.conv_cfg}\n" if norm.conv_cfg else ""
    cfg = "norm_cfg=norm_cfg, conv_cfg=conv_cfg" if norm.conv_cfg else "norm_cfg=norm_cfg"
    heads = f"bbox_head=dict({cfg}), mask_head=dict({cfg})" if masks else f"bbox_head=dict({cfg})"
    heads = f"\n        {heads}\n    " if norm.conv_cfg and masks else heads
    places = "FPN, box head and mask head" if masks else "FPN and box head"
    return f"""# {norm.words} in {places}; backbone BN*.
_base_ = "./4conv1fc.py"
{conv}norm_cfg = {norm.norm_cfg}
model = dict(
    neck=dict({cfg}),
    roi_head=dict({heads}),
)
"""


def _everywhere_base(name: str, norm: Norm) -> str:
    conv = ", conv_cfg={{_base_.conv_cfg}}" if norm.conv_cfg else ""
    trained = ", norm_eval=False" if norm.batch_statistics else ""
    return f"""# {norm.words} in the backbone too. The checkpoint is still that of a BN network.
_base_ = "./{name}-head.py"
model = dict(backbone=dict(norm_cfg={{{{_base_.norm_cfg}}}}{conv}{trained}))
"""


def _scratch_base(name: str) -> str:
    return f"""# From scratch: nothing is loaded, nothing is frozen.
_base_ = "./{name}-everywhere.py"
model = dict(backbone=dict(frozen_stages=-1, zero_init_residual=False, init_cfg=None))
"""


def _batch_base(kind: str, gpus: int, images: int) -> str:
    total = gpus * images
    return f"""# {gpus} GPUs x {images} images.
_base_ = "mmdet::_base_/datasets/coco_{kind}.py"
train_dataloader = dict(batch_size={images})
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr={total * 0.02 / 16:g}, momentum=0.9, weight_decay=0.0001),
)
auto_scale_lr = dict(enable=False, base_batch_size={total})
"""


def _series(name: str, images: int) -> tuple[str, str, str, str]:
    base, words, note = SERIES[name]
    schedule = "1x_warmup-epoch" if name == "frn-head" else "1x"
    body = f"""_base_ = [
    "../_base_/mask_rcnn/{base}.py",
    "../_base_/coco/instance_8xb{images}.py",
    "../_base_/schedules/{schedule}.py",
    "../_base_/coco_runtime.py",
]
"""
    if name == "cbn-head":
        iterations = -(-TRAIN2017 // (8 * images))
        note = f"The burn-in is {BURN_IN_EPOCHS} epochs: {BURN_IN_EPOCHS} x {iterations} iterations."
        body += f"""norm_cfg = dict(burnin={BURN_IN_EPOCHS * iterations})
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
"""
    description = f"{words}, {images} image{'s' if images > 1 else ''} per GPU."
    return description, note, f"8 GPUs x {images} images, 12 epochs.", body


def _video_path(norm: str, clips: int, frames: int) -> Path:
    folder = "small_batch" if clips < 4 and frames == 32 else "i3d"
    stride = 64 // frames
    return CONFIGS / folder / f"i3d_r50_{norm}_8xb{clips}-{frames}x{stride}x1-100e_kinetics400-rgb.py"


def _video(norm: str, clips: int, frames: int) -> tuple[str, str, str, str]:
    words = VIDEO[norm][0]
    long = frames == 64
    root = f"i3d_r50_{norm}_8xb8-32x2x1-100e_kinetics400-rgb.py"
    folder = "../i3d/" if _video_path(norm, clips, frames).parent.name == "small_batch" else "./"
    body = f'_base_ = ["{folder}{root}", "../_base_/kinetics/64x1.py"]\n' if long else f'_base_ = "{folder}{root}"\n'
    train = ", dataset=dict(pipeline={{_base_.clips64_train}})" if long else ""
    body += f"train_dataloader = dict(batch_size={clips}{train})\n"
    if long:
        body += "val_dataloader = dict(dataset=dict(pipeline={{_base_.clips64_val}}))\n"
        body += "test_dataloader = dict(dataset=dict(pipeline={{_base_.clips64_test}}))\n"
    body += f"optim_wrapper = dict(optimizer=dict(lr={clips * 0.00125:g}))\n"
    body += f"auto_scale_lr = dict(base_batch_size={clips * 8})\n"
    note = ""
    if norm == "cbn":
        iterations = -(-KINETICS // (8 * clips))
        note = (
            f"The burn-in of {BURN_IN_EPOCHS} epochs is that of the detection recipe, counted in iterations of "
            f"{KINETICS:,} videos: our own choice."
        )
        body += f"model = dict(backbone=dict(norm_cfg=dict(burnin={BURN_IN_EPOCHS * iterations})))\n"
    description = f"I3D ResNet-50 with {words}, {clips} clip{'s' if clips > 1 else ''} per GPU"
    description += ", 64 consecutive frames." if long else "."
    return description, note, f"8 GPUs x {clips} clips, 100 epochs.", body


def _keep_header_data(path: Path, description: str, note: str, cost: str, body: str) -> str:
    """Return the text of an experiment; the header lines that follow from data are written later, by ``headers``."""
    old = Header.of(path.read_text()) if path.exists() else Header()
    old.description, old.body = description, body
    old.parts = {key: value for key, value in old.parts.items() if key in ("Published", "Source") or "Differs" in key}
    old.parts |= ({"Recipe": note} if note else {}) | {"Cost": cost}
    return old.text()


# --- headers

KEY = re.compile(r"# (Published|Source|Differs[^:]*|Recipe|Cost): (.*)")


class Header:
    """The comment on top of a config: a description, then parts that begin with a word and a colon."""

    def __init__(self) -> None:
        self.description, self.parts, self.body = "", dict[str, str](), ""

    @classmethod
    def of(cls, text: str) -> "Header":
        """Take a config's text apart."""
        lines = text.splitlines(keepends=True)
        end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
        header, key = cls(), None
        header.body = "".join(lines[end:])
        for line in lines[:end]:
            if found := KEY.match(line):
                key = found.group(1)
                header.parts[key] = found.group(2)
            elif key is None:
                header.description = f"{header.description} {line[1:].strip()}".strip()
            else:
                header.parts[key] += f" {line[1:].strip()}"
        return header

    def text(self) -> str:
        """Return the config with this header: lines of at most 120 characters."""
        order = ["Published", "Source", *(key for key in self.parts if key.startswith("Differs")), "Recipe", "Cost"]
        parts = [f"{key}: {self.parts[key]}" for key in order if key in self.parts]
        lines = [_wrapped(part) for part in [self.description, *parts]]
        return "\n".join(lines) + "\n" + self.body


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 120, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False))


def headers() -> Iterator[tuple[Path, str]]:
    """Return path and text of every experiment of COCO or Kinetics, with the header that its data give."""
    for model in models():
        path = ROOT / model["Config"]
        header = Header.of(path.read_text())
        cost, note = header.parts.get("Cost", ""), header.parts.get("Recipe")
        cfg = recipes.load(path)
        header.parts = {"Published": published(cfg, model), **compared(cfg, model)}
        header.parts |= ({"Recipe": note} if note else {}) | {"Cost": cost}
        yield path, header.text()


def models() -> list[dict]:
    """Return the entries of all metafiles but that of the digits, which nobody else has numbers for."""
    names = yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]
    files = [yaml.safe_load((ROOT / name).read_text()) for name in names if "digits" not in name]
    return [model for file in files for model in file["Models"]]


def published(cfg: Config, model: dict) -> str:
    """Return the sentence about the numbers of others."""
    if not model["Published"]:
        return model.get("Nothing Published", "nothing in this recipe.")
    kinds = {"box AP": "box AP", "mask AP": "mask AP", "box AP, mask AP": "box/mask AP"}
    found = []
    for entry in model["Published"]:
        kind = kinds.get(", ".join(entry["Metrics"]), "top-1/top-5")
        batch = recipes.batch_elsewhere(cfg, entry.get("Recipe", model["Recipe"]))
        about = f"{entry['Source']}; {recipes.status(entry)}{batch}"
        found.append(f"{kind} {recipes.numbers(entry['Metrics'])} ({about})")
    return "; ".join(found) + "."


def compared(cfg: Config, model: dict) -> dict[str, str]:
    """Return the header's parts about the recipe, and about those of numbers that come from other recipes."""
    parts = {"Source": f"{recipes.sources()[model['Recipe']]['Source']}."}
    if different := recipes.differences(cfg, model["Recipe"]):
        parts["Differs"] = _sentence(different)
    for entry in model["Published"]:
        other = entry.get("Recipe", model["Recipe"])
        key = f"Differs from {entry['Source'].replace(':', '')}"
        if other != model["Recipe"] and (different := recipes.differences(cfg, other)):
            parts[key] = _sentence(different)
    return parts


def _sentence(different: dict[str, tuple[str, str]]) -> str:
    return "; ".join(f"{field} {ours} (there {theirs})" for field, (ours, theirs) in different.items()) + "."


if __name__ == "__main__":
    raise SystemExit(main())
