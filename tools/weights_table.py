"""Write docs/weights.md, the pre-trained weights that each config starts from, from the configs themselves.

Exit code: 0 the file is (now) fresh; 1 with --check: it is stale.
"""

import argparse
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmengine.config import Config

import normplug  # noqa: F401  lets the toolkits import
from normplug.openmmlab.pretrained import checkpoints_in, find_weights
from normplug.reporting import markdown_table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "weights.md"
HEAD = """# Weights

Written by `tools/weights_table.py` from the configs. Every config starts its backbone from weights of ImageNet-1k, or
from scratch. What is downloaded, from where, is kept as which file, and expects which images: this page.

## Where the files lie

Downloads are kept in `$TORCH_HOME/hub/checkpoints`, and without `TORCH_HOME` in `~/.cache/torch/hub/checkpoints`, under
the name that the address ends with. `tools/train.py` brings them there before it reads data or builds a model. Without
a network it ends with a sentence that names the address and the file: download the one elsewhere, and put it where the
sentence says. Nothing else has to change.

| a config writes | and means |
| --- | --- |
| `torchvision://resnet50` | a name in torchvision's list of addresses |
| `open-mmlab://jhu/resnet50_gn_ws` | a name in mmengine's list, `mmengine/hub/openmmlab.json` |
| `mmcls://resnet50_v1d` | a name in its list of mmcls, `mmengine/hub/mmcls.json`; the backbone of a whole classifier |
| `https://...` | the address itself |
| `detectron-as-rgb://NAME` | NAME, trained on BGR images with std 1; its first convolution is rewritten for RGB |
| `checkpoints/timm_....pth` | a file, seen from the folder that you start in; the table says how to make it |

Weights of your own are a path: `--cfg-options model.backbone.init_cfg.checkpoint=/path/resnet50.pth` for a detector,
`model.backbone.pretrained=/path/resnet50.pth` for I3D. Another project's files: [checkpoints.md](checkpoints.md).

## Which images

A network knows one order of the colours and one mean and standard deviation. They are `data_preprocessor` in the
config: `bgr_to_rgb=True` is RGB, since mmdet reads BGR; mmaction2's decoders read RGB and nothing is turned round.
Weights in a config with other images train all the same, and start worse.
"""
# What the weights were trained with: the toolkits' lists have names and addresses only.
ORIGINS = {
    "torchvision://": "torchvision, BN",
    "open-mmlab://detectron/": "Detectron, GN",
    "open-mmlab://detectron2/": "Detectron's MSRA ResNet in Detectron2's copy, BN (frozen affine)",
    "open-mmlab://contrib/": "OpenMMLab, contributed, GN",
    "open-mmlab://jhu/*_gn_ws": "joe-siyuan-qiao/pytorch-classification, GN+WS",
    "open-mmlab://jhu/*_gn": "joe-siyuan-qiao/pytorch-classification, GN",
    "checkpoints/timm_resnet50_gn": "timm, `resnet50_gn.a1h_in1k`, GN",
    "checkpoints/timm_resnetv2_50d_evos": "timm, `resnetv2_50d_evos.ah_in1k`, EvoNorm-S0",
}


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--check", action="store_true", help="change nothing, tell whether the file is fresh")
    args = p.parse_args(argv)
    files = sorted(file for file in (ROOT / "configs").rglob("*.py") if "_base_" not in file.parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmengine imports pkg_resources
        fresh = page((file, Config.fromfile(file)) for file in files)
    if args.check:
        return int(is_stale(fresh))
    PAGE.write_text(fresh)
    return 0


def is_stale(fresh: str) -> bool:
    """Say whether the page differs from a fresh one, and on stderr what to do."""
    stale = not PAGE.exists() or PAGE.read_text() != fresh
    if stale:
        print("docs/weights.md is stale; run python tools/weights_table.py", file=sys.stderr)
    return stale


def page(configs: Iterable[tuple[Path, Config]]) -> str:
    """Return the page for these files and the configs in them."""
    groups: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for file, cfg in configs:
        for name in dict.fromkeys(checkpoints_in(cfg.model)) or ["none"]:
            groups[name, images(cfg)].append(file)
    rows = [
        ["weights", "file", "trained with", "images", "configs"],
        *(
            [f"`{name}`", kept_as(name), origin(name), seen, str(len(files))]
            for (name, seen), files in sorted(groups.items())
            if name != "none"
        ),
    ]
    parts = [HEAD, "## The weights\n\nAll were trained on ImageNet-1k.\n", markdown_table(rows), "\n## Addresses\n"]
    addresses = {found.address for name, _ in groups if (found := find_weights(name)) and found.address}
    parts += [f"- <{address}>" for address in sorted(addresses)]
    parts.append("\n## Configs\n")
    for (name, seen), files in sorted(groups.items()):
        listed = ", ".join(f"[{file.stem}](../{file.relative_to(ROOT)})" for file in files)
        title = "From scratch" if name == "none" else f"`{name}`"
        parts.append(f"**{title}**, {seen}: {listed}\n")
    return "\n".join(parts).rstrip() + "\n"


def images(cfg: Config) -> str:
    """Return order of colours, mean and standard deviation of the images that a config's model gets."""
    data = cfg.model.data_preprocessor
    order = "RGB" if data.get("bgr_to_rgb") or cfg.default_scope == "mmaction" else "BGR"
    mean, std = (", ".join(f"{value:g}" for value in data[key]) for key in ("mean", "std"))
    return f"{order}, mean {mean}, std {std}"


def kept_as(name: str) -> str:
    """Return the file that weights lie in, and where it stands how to make it if it is not downloaded."""
    found = find_weights(name)
    return f"`{found.file.name}`" if found.address else "made by a command of [checkpoints.md](checkpoints.md#commands)"


def origin(name: str) -> str:
    """Return who trained weights, and with which norm.

    Raises:
        ValueError: If ORIGINS does not say.
    """
    bare = name.removeprefix("detectron-as-rgb://")
    for pattern, text in ORIGINS.items():
        start, _, end = pattern.partition("*")
        if bare.startswith(start) and bare.endswith(end):
            return text
    raise ValueError(f"tools/weights_table.py does not know what {name} was trained with: add it to ORIGINS.")


if __name__ == "__main__":
    raise SystemExit(main())
