#!/usr/bin/env python
"""Try every norm in every backbone of the four toolkits, and write the table of docs/compatibility.md.

    python tools/compatible_models.py                      # all of them, and writes the page
    python tools/compatible_models.py --only mmseg.ResNet  # prints what becomes of one

A backbone takes a norm if it is built with it, initialized as by a Runner, no batch norm of another kind
is left, and one training step gives every parameter that takes part a finite gradient.
"""

import argparse
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from toolkit_backbones import BACKBONES, NORM, Sample
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normplug  # noqa: F401  registers the norms

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
NORMS = {
    "GN": dict(type="GN", num_groups="auto"),
    "BNAct": dict(type="BNAct"),
    "SyncBN": dict(type="SyncBN"),
    "FrozenBatchNorm": dict(type="FrozenBatchNorm"),
    "CBN": dict(type="CBN", buffer_num=1, burnin=1),
    "EvoNormB0": dict(type="EvoNormB0"),
    "EvoNormS0": dict(type="EvoNormS0"),
    "FRN": dict(type="FRN", eps=1e-4),
}


def config(toolkit: str, name: str, norm: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a backbone with a norm: where it takes a norm_cfg there, else with replace_norm."""
    settings = BACKBONES[toolkit][name].settings
    takes_norm = any(value is NORM for value in _values(settings))
    cfg = dict(type=name, **_filled(settings, norm))
    return cfg if takes_norm else cfg | dict(replace_norm=norm)


def _values(settings: Any) -> Iterator[Any]:
    if isinstance(settings, dict):
        for value in settings.values():
            yield from _values(value)
    else:
        yield settings


def _filled(settings: Any, norm: dict[str, Any]) -> Any:
    if settings is NORM:
        return dict(norm)
    if isinstance(settings, dict):
        return {key: _filled(value, norm) for key, value in settings.items()}
    return settings


def build(toolkit: str, name: str, norm: dict[str, Any]) -> nn.Module:
    importlib.import_module(f"{toolkit}.utils").register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(toolkit):
        model = MODELS.build(config(toolkit, name, norm))
        if hasattr(model, "init_weights"):
            model.init_weights()
    for module in model.modules():
        if type(module).__name__ == "TridentConv":  # mmdet leaves what happened to be in memory
            nn.init.kaiming_normal_(module.weight)
    return model


def step(model: nn.Module, sample: Sample) -> list[str]:
    """Run forward and backward of a training step; return the names of the parameters without a gradient.

    Raises:
        FloatingPointError: If an output or a gradient is not finite.
    """
    model.train()
    outputs = list(_tensors(model(*(torch.randn(shape) for shape in sample.inputs))))
    loss = sum(y.float().mean() + y.float().square().mean() for y in outputs)
    loss.backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    if not all(torch.isfinite(t).all() for t in [loss, *(p.grad for p in trained.values() if p.grad is not None)]):
        raise FloatingPointError("a loss or gradient is not finite")
    return [key for key, p in trained.items() if p.grad is None]


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, dict | list | tuple):
        for value in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from _tensors(value)


def attempt(toolkit: str, name: str, norm: str) -> str:
    """Return "yes", or why a backbone does not take a norm."""
    torch.manual_seed(0)
    try:
        model = build(toolkit, name, NORMS[norm])
        kind = MODELS.get(NORMS[norm]["type"])
        if norm != "BN":
            others = sorted(
                {
                    f"{type(m).__name__} {path}"
                    for path, m in model.named_modules()
                    if isinstance(m, _BatchNorm) and not isinstance(m, kind)
                }
            )
            if others:
                return f"left: {', '.join(others[:3])}"
            if not any(isinstance(m, kind) for m in model.modules()):
                return "no norm of this kind is in it"
        without = step(model, BACKBONES[toolkit][name])
    except Exception as error:  # whatever it is, it is the result
        return f"{type(error).__name__}: {error}"
    return f"yes{f' (no gradient: {len(without)})' if without else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TOOLKIT.NAME", action="append", help="try these, and write no page")
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=list(NORMS))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    MMLogger.get_instance("mmengine", log_level="ERROR")
    torch.set_num_threads(1)
    for toolkit, samples in BACKBONES.items():
        for name in samples:
            if args.only and f"{toolkit}.{name}" not in args.only and toolkit not in args.only:
                continue
            for norm in args.norms:
                print(toolkit, name, norm, attempt(toolkit, name, norm)[:600].replace("\n", " "), sep="\t", flush=True)


if __name__ == "__main__":
    main()
