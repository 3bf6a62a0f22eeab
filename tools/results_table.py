"""Write docs/results.md, published and reproduced results side by side, from the metafiles of the configs.

Exit code: 0 the file is (now) fresh; 1 with --check: it is stale.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results.md"
HEAD = """# Results

Written by `python tools/results_table.py` from `configs/**/metafile.yml`; edit those. Box/mask AP on COCO val2017, or
top-1/top-5 accuracy on Kinetics-400, in percent. "Published" are the numbers of others, with their source; where it
says "unverified", the number has not been compared with its source. "Reproduced" are our own runs of the config. Two
runs of the same config differ by about 0.2 AP or 0.3 top-1.
"""


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
        header = "| config | GPUs x batch, epochs | published | reproduced |\n| --- | --- | --- | --- |"
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
    return f"| {link} | {size} | {published} | {numbers(own) or 'not run yet'} |"


def numbers(metrics: dict) -> str:
    return " / ".join(str(value) for value in metrics.values())


if __name__ == "__main__":
    raise SystemExit(main())
