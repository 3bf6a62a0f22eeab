"""Write docs/results.md, published and reproduced results side by side, from the metafiles of the configs.

Exit code: 0 the file is (now) fresh; 1 with --check: it is stale.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import recipes
import yaml

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results.md"
HEAD = """# Results

Written by `python tools/results_table.py` from `configs/**/metafile.yml`, `configs/published.yml` and
`configs/sources.yml`; edit those. Box/mask AP on COCO val2017, or top-1/top-5 accuracy on Kinetics-400, in percent.
"Published" are the numbers of others, with their source and status:

- **checked**: read in the file or paper that is named, for this table;
- **second-hand**: seen only where the table says;
- **unverified**: recalled or copied, not compared with the source.

"Control" is BN\\* (BN with frozen ImageNet statistics; in the video rows BN) of the same source. Compare a norm with
it, and not with the control of another toolkit: mmdet's own BN\\* rose from 37.3/34.2 in 2019 to 38.2/34.7 with the
same network and schedule, more than many differences between norms. "Differs" names what our config does not have from
the recipe behind that number; its header has the values. "Coordinates" differ from every toolkit that is older than
mmdet 2 and Detectron2: here boxes are continuous; there they were counted in whole pixels, and RoIAlign was half a
pixel off.

"Reproduced" are our own runs of the config. Two runs of the same config differ by about 0.2 AP or 0.3 top-1. "Hours"
are estimates for 8 V100: [scaling.md](scaling.md#hours) says from what, and – stands where nobody has published the
time of such a model.
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
        columns = ["config", "GPUs x batch, length", "hours", "published", "control", "differs", "reproduced"]
        parts.append("\n".join([f"## configs/{path.parent.name}", "", *table(columns, rows), ""]))
    others = [[entry["Model"].replace("*", "\\*"), number(entry), control(entry)] for entry in published()["Others"]]
    parts.append("\n".join(["## No config here", "", *table(["model", "published", "control"], others), ""]))
    return "\n".join(parts)


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


@cache
def published() -> dict:
    return yaml.safe_load((ROOT / "configs" / "published.yml").read_text())


def metafiles() -> Iterator[tuple[Path, dict]]:
    """Every metafile that model-index.yml names, and what is in it."""
    for name in yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]:
        yield ROOT / name, yaml.safe_load((ROOT / name).read_text())


def row(model: dict, folder: Path) -> list[str]:
    data = model["Metadata"]
    length = f"{data['Epochs']}" if "Epochs" in data else f"{data['Iterations'] / 1000:g}k iterations"
    size = f"{data['Training Resources'].split()[0]} x {data['Batch Size']}, {length}"
    entries = model["Published"]
    cfg = recipes.load(ROOT / model["Config"])
    followed = [entry.get("Recipe", model["Recipe"]) for entry in entries]
    batches = [recipes.batch_elsewhere(cfg, recipe) for recipe in followed]
    cells = {
        "published": [number(*pair) for pair in zip(entries, batches, strict=True)] or ["none"],
        "control": [control(entry) for entry in entries],
        "differs": [", ".join(recipes.differences(cfg, recipe)) or "–" for recipe in followed],
    }
    link = f"[{model['Name']}](../configs/{folder.name}/{model['Name']}.py)"
    own = recipes.numbers(
        {name: value for result in model["Results"] for name, value in result["Metrics"].items()}, " / "
    )
    return [link, size, hours(model), *("<br>".join(cell) for cell in cells.values()), own or "not run yet"]


def number(entry: dict, batch: str = "") -> str:
    """Return the number of an entry, where it stands and how it is known."""
    name = "mask " if list(entry["Metrics"]) == ["mask AP"] else ""
    value = recipes.numbers(entry["Metrics"], " / ")
    return f"{name}{value} ({entry['Source']}; {recipes.status(entry)}{batch})"


def control(entry: dict) -> str:
    """Return BN* of the same source: its numbers, and its status where that is not 'checked'."""
    if "Control" not in entry:
        return "–"
    found = published()["Controls"][entry["Control"]]
    model = found["Model"].split(", ", 1)[1].replace("*", "\\*")
    known = "" if found["Status"] == "checked" else f"; {found['Status']}"
    return f"{recipes.numbers(found['Metrics'], ' / ')} ({model}, {found['Source']}{known})"


def hours(model: dict) -> str:
    """Estimate how long 8 V100 train a model of a metafile, by PACE."""
    pattern = next((p for p in PACE if fnmatch(model["Name"], p.removeprefix("<= "))), None)
    seconds = PACE.get(pattern)
    if seconds is None:
        return "–"
    data, video = model["Metadata"], "kinetics" in model["Name"]
    if "Iterations" in data:
        images = int(data["Training Resources"].split()[0]) * data["Batch Size"]
        batches = data["Iterations"] * images / 16
    else:
        batches = data["Epochs"] * (KINETICS if video else COCO)
    value = batches * seconds / 3600
    return ("≤ " if pattern.startswith("<=") else "") + (f"{value:.0f}" if value >= 10 else f"{value:.1f}")


if __name__ == "__main__":
    raise SystemExit(main())
