"""Write docs/results.md, published and reproduced results side by side, from the metafiles of the configs.

Exit code: 0 the file is (now) fresh; 1 with --check: it is stale.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results.md"
HEAD = """# Results

Written by `python tools/results_table.py` from `configs/**/metafile.yml`; edit those. Box/mask AP on COCO val2017, or
top-1/top-5 accuracy on Kinetics-400, in percent. "Published" are the numbers of others, with their source; where it
says "unverified", the number has not been compared with its source. "Reproduced" are our own runs of the config. Two
runs of the same config differ by about 0.2 AP or 0.3 top-1. "Hours" are estimates for 8 V100:
[scaling.md](scaling.md#hours) says from what, and – stands where nobody has published the time of such a model.
"""

# Seconds that others' 8 V100 took for 16 images or 64 clips, and the configs that have such a model. Behind "<=" the
# published model has all that the configs' have, and more. The sources are in docs/scaling.md.
R101, WS = 0.340 / 0.261, 1.05  # ResNet-101 against 50, GN+WS against GN
PACE = {
    "faster-rcnn_r50-c4_frozen-bn_*": 0.551,
    "mask-rcnn_r50-c4_frozen-bn_*": 0.584,
    "retinanet_r50_fpn_frozen-bn_*": 0.205,
    "faster-rcnn_r50_fpn_frozen-bn_*": 0.210,
    "mask-rcnn_r50_fpn_frozen-bn_*": 0.261,
    "mask-rcnn_r101_fpn_frozen-bn_*": 0.261 * R101,
    "mask-rcnn_r50-scratch_fpn_gn-all_*": 0.338,
    "mask-rcnn_r50-scratch_fpn_gn-ws-all_*": 0.338 * WS,
    "mask-rcnn_r101-scratch_fpn_gn-all_*": 0.338 * R101,
    "mask-rcnn_r50*_fpn_gn-all_*": 0.309,
    "mask-rcnn_r50_fpn_gn-ws-all_*": 0.309 * WS,
    "mask-rcnn_r101_fpn_gn-all_*": 0.309 * R101,
    "mask-rcnn_r101_fpn_gn-ws-all_*": 0.309 * R101 * WS,
    "mask-rcnn_r50-scratch_fpn_syncbn-*": None,
    "mask-rcnn_r50*_fpn_syncbn-all_*": 0.345,
    "<= *_r50_fpn_gn-ws-*": 0.309 * WS,
    "<= *_r101_fpn_gn-ws-*": 0.309 * R101 * WS,
    "<= *-rcnn_r50_fpn_gn-*": 0.309,
    "<= *-rcnn_r50_fpn_frozen-bn-4conv1fc_*": 0.309,
    "<= *-rcnn_r50_fpn_none-4conv1fc_*": 0.309,
    "<= *_r50_fpn_syncbn-ws-*": 0.345 * WS,
    "<= *_r50_fpn_bn-ws-*": 0.345 * WS,
    "<= *_r50_fpn_syncbn-*": 0.345,
    "<= *_r50_fpn_bn-*": 0.345,
    "<= *_r101_fpn_syncbn-*": 0.345 * R101,
    "i3d_r50_bn_*-32x2x1-*": 0.43,
    "i3d_r50_bn_*-64x1x1-*": 0.43 * 2,
    "<= i3d_r50_frozen-bn_*-32x2x1-*": 0.43,
}
COCO, KINETICS = 117_266 / 16, 240_000 / 64  # batches of that size in an epoch; images without objects are left out


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--check", action="store_true", help="change nothing, tell whether the file is fresh")
    args = p.parse_args(argv)
    fresh = page()
    if args.check:
        stale = not RESULTS.exists() or RESULTS.read_text() != fresh
        if stale:
            print("docs/results.md is stale; run python tools/results_table.py", file=sys.stderr)
        return int(stale)
    RESULTS.write_text(fresh)
    return 0


def page() -> str:
    parts = [HEAD]
    for path, meta in metafiles():
        if path.parent.name == "digits":  # nothing is published for them; the README has our runs
            continue
        rows = [row(model, path.parent) for model in meta["Models"]]
        header = "| config | GPUs x batch, epochs | hours | published | reproduced |\n| --- | --- | --- | --- | --- |"
        parts.append("\n".join([f"## configs/{path.parent.name}", "", header, *rows, ""]))
    return "\n".join(parts)


def metafiles() -> Iterator[tuple[Path, dict]]:
    """Every metafile that model-index.yml names, and what is in it."""
    for name in yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]:
        yield ROOT / name, yaml.safe_load((ROOT / name).read_text())


def row(model: dict, folder: Path) -> str:
    data = model["Metadata"]
    size = (
        f"{data['Training Resources'].split()[0]} x {data['Batch Size']}, {data['Epochs']}" if "Epochs" in data else ""
    )
    published = "<br>".join(f"{numbers(p['Metrics'])} ({p['Source']})" for p in model["Published"]) or "none"
    own = {name: value for result in model["Results"] for name, value in result["Metrics"].items()}
    link = f"[{model['Name']}](../configs/{folder.name}/{model['Name']}.py)"
    return f"| {link} | {size} | {hours(model)} | {published} | {numbers(own) or 'not run yet'} |"


def hours(model: dict) -> str:
    """Estimate how long 8 V100 train a model of a metafile, by PACE."""
    pattern = next((p for p in PACE if fnmatch(model["Name"], p.removeprefix("<= "))), None)
    seconds = PACE.get(pattern)
    if seconds is None:
        return "–"
    batches = model["Metadata"]["Epochs"] * (KINETICS if "kinetics" in model["Name"] else COCO)
    value = batches * seconds / 3600
    return ("≤ " if pattern.startswith("<=") else "") + (f"{value:.0f}" if value >= 10 else f"{value:.1f}")


def numbers(metrics: dict) -> str:
    return " / ".join(str(value) for value in metrics.values())


if __name__ == "__main__":
    raise SystemExit(main())
