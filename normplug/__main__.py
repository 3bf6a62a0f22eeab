"""``python -m normplug list`` shows every layer, ``env`` what a bug report needs, and ``bench`` measures the ops."""

import argparse
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import sys
from collections.abc import Sequence

import torch
from torch import nn

import normplug
from normplug import bench
from normplug.openmmlab.mistakes import add_debug, answered
from normplug.registry import config_names
from normplug.reporting import markdown_table

COLUMNS = ["config name", "class", "family", "batch statistics", "fuses activation", "dims", "GPU kernel", "paper"]
PACKAGES = ["torch", "torchvision", "triton", "mmengine", "mmcv", "mmcv-lite", "mmdet", "mmaction2", "numpy"]
PACKAGES += ["opencv-python", "opencv-contrib-python", "opencv-python-headless", "setuptools", "decord", "pycocotools"]


def layer_rows() -> list[list[str]]:
    """Return a row of ``COLUMNS`` per layer, read off the classes and their docstrings."""
    rows = []
    for name in normplug.layers.__all__:
        layer = getattr(normplug.layers, name)
        if not isinstance(layer, type):
            continue  # a helper function beside the layers, such as fold_ws
        fuses = getattr(layer, "contains_activation", False) or "act" in inspect.signature(layer).parameters
        kernel = importlib.util.find_spec("normplug.kernels") is not None and (
            importlib.util.find_spec(f"normplug.kernels.{layer.op}") is not None
        )
        rows.append(
            [
                ", ".join(config_names(layer)),
                name,
                layer.family,
                "yes" if layer.batch_statistics else "no",
                "yes" if fuses else "no",
                dimensions(layer),
                "yes" if kernel else "not yet",
                paper(layer),
            ]
        )
    return rows


def dimensions(layer: type[nn.Module]) -> str:
    for dims, conv in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
        if issubclass(layer, conv):
            return f"{dims}-D"
    return "2-D, 3-D"  # every norm takes (N, C, *)


def paper(layer: type[nn.Module]) -> str:
    """Return title and arXiv number from the Reference section of a docstring."""
    text = " ".join(inspect.getdoc(layer).partition("Reference:")[2].split())
    title = re.search(r'"([^"]+)"', text)
    number = re.search(r"arXiv (\d{4}\.\d{5})", text)
    return f"{title.group(1) if title else text}" + (f", arXiv {number.group(1)}" if number else "")


def print_list(as_markdown: bool) -> None:
    rows = layer_rows()
    if as_markdown:
        print(markdown_table([COLUMNS, *rows]))
        return
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in [COLUMNS, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_env() -> None:
    print(f"normplug: {normplug.__version__} ({os.path.dirname(normplug.__file__)})")
    print(f"python: {platform.python_version()} ({sys.executable})")
    print(f"platform: {platform.platform()}, {os.cpu_count()} cores")
    for package in PACKAGES:
        try:
            print(f"{package}: {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package}: not installed")
    print(f"compiled mmcv ops: {compiled_ops()}")
    print(f"CUDA of torch: {torch.version.cuda}, cuDNN: {torch.backends.cudnn.version()}")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        print(f"GPU {i}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    if not torch.cuda.is_available():
        print("GPU: none")
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_INTERPRET"):
        if name in os.environ:
            print(f"{name}={os.environ[name]}")
    warn_of_two_mmcvs()
    print(
        "note: a config's sync_bn='torch' turns every BatchNorm subclass, CBN included, into SyncBN; "
        "use norm_cfg=dict(type='SyncBN') instead"
    )


def compiled_ops() -> str:
    if importlib.util.find_spec("mmcv") is None:
        return "no mmcv"
    spec = importlib.util.find_spec("mmcv._ext")
    if spec is None:
        return "none"
    return spec.origin if spec.has_location else "none; torchvision's ops stand in for them"


def warn_of_two_mmcvs() -> None:
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    if {"mmcv", "mmcv-lite"} <= installed:
        print(
            "warning: mmcv and mmcv-lite are both installed and share the folder mmcv/: uninstall both, then "
            "install the one you want"
        )


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m normplug", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="every layer and what it needs")
    listing.add_argument("--markdown", action="store_true", help="as the table of the README")
    commands.add_parser("env", help="versions and devices, for a bug report")
    bench.add_arguments(
        commands.add_parser(
            "bench",
            help="time the ops against their peers and the memory they must move",
            description=bench.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    for command in commands.choices.values():
        add_debug(command)
    args = p.parse_args(argv)
    with answered("normplug", args.debug) as answer:
        if args.command == "bench":
            answer.code = bench.main(args)
        elif args.command == "list":
            print_list(args.markdown)
        else:
            print_env()
    return answer.code


if __name__ == "__main__":
    raise SystemExit(main())
