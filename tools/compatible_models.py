#!/usr/bin/env python
"""Try every norm in every backbone of the four toolkits, and write the table of docs/compatibility.md.

    python tools/compatible_models.py                      # all of them: minutes; writes the page
    python tools/compatible_models.py --only mmseg.ResNet  # prints what becomes of one

A backbone takes a norm if it is built with it, initialized as by a Runner, no batch norm of another kind
is left, and one training step gives every parameter that takes part a finite gradient.
"""

import argparse
import contextlib
import importlib
import re
import sys
import warnings
from collections import Counter
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
from normplug.layers.weight_standardization import WSConv2d, WSConv3d
from normplug.openmmlab.placement import REPLACED, contains_activation
from normplug.openmmlab.settings import accepted_arguments
from normplug.reporting import markdown_table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
KNOWN = [f"{toolkit}.{name}" for toolkit, samples in BACKBONES.items() for name in samples]
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


CONTAINED = ("EvoNormB0", "EvoNormS0", "FRN")


def config(toolkit: str, name: str, norm: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a backbone with a norm: where it takes a norm_cfg there, else with replace_norm."""
    settings = BACKBONES[toolkit][name].settings
    cfg = dict(type=name, **_filled(settings, norm))
    return cfg if takes_norm_cfg(toolkit, name) else cfg | dict(replace_norm=norm)


def takes_norm_cfg(toolkit: str, name: str) -> bool:
    return any(value is NORM for value in _values(BACKBONES[toolkit][name].settings))


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


def register(toolkit: str) -> None:
    """Have the registries of a toolkit know all that it has."""
    importlib.import_module(f"{toolkit}.utils").register_all_modules(init_default_scope=False)


def build(toolkit: str, cfg: dict[str, Any]) -> nn.Module:
    """Build a backbone, and initialize its weights."""
    with DefaultScope.overwrite_default_scope(toolkit):
        model = MODELS.build(cfg)
        if hasattr(model, "init_weights"):
            model.init_weights()
    for module in model.modules():
        if type(module).__name__ == "TridentConv":  # mmdet leaves what happened to be in memory
            nn.init.kaiming_normal_(module.weight)
    return model


def random_inputs(sample: Sample) -> list[Tensor]:
    return [torch.randn(shape) for shape in sample.inputs]


def check_step(model: nn.Module, inputs: list[Tensor]) -> None:
    """Run forward and backward of a training step.

    Raises:
        FloatingPointError: If the loss or a gradient is not finite.
    """
    model.train()
    loss = sum(y.float().mean() + y.float().square().mean() for y in _tensors(model(*inputs)))
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients or not all(torch.isfinite(t).all() for t in [loss, *gradients]):
        raise FloatingPointError("the loss or a gradient is not finite, or there is none")


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, dict | list | tuple):
        for value in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from _tensors(value)


def check_activations(model: nn.Module, stock: nn.Module, inputs: list[Tensor]) -> None:
    """Check that activations are applied as often as in a network of norms without, and never one behind another.

    Raises:
        AssertionError: If not.
    """
    applied, contained = _activations(model, inputs)
    expected, _ = _activations(stock, inputs)
    assert applied + contained == expected, f"{applied} activations and {contained} in norms, in place of {expected}"


@torch.no_grad()
def _activations(model: nn.Module, inputs: list[Tensor]) -> tuple[int, int]:
    """Return how often modules of activations were called, and norms that contain one."""
    counts, outputs = Counter(), []

    def behind(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        if contains_activation(module):
            counts["contained"] += 1
            outputs.append(y)  # kept, or the next tensor may have its address
        elif type(module).__name__ in REPLACED:
            counts["applied"] += 1
            assert not any(args[0] is y for y in outputs), "an activation follows a norm that contains one"

    handles = [module.register_forward_hook(behind) for module in model.modules()]
    training = model.training
    for module in model.modules():
        if type(module).__name__ in REPLACED and hasattr(module, "inplace"):
            module.inplace = False
    model.eval()
    model(*inputs)
    model.train(training)
    for handle in handles:
        handle.remove()
    return counts["applied"], counts["contained"]


def attempt(toolkit: str, name: str, norm: str) -> str:
    """Return "yes", or why a backbone does not take a norm."""
    torch.manual_seed(0)
    sample = BACKBONES[toolkit][name]
    try:
        model = build(toolkit, config(toolkit, name, NORMS[norm]))
        kind = MODELS.get(NORMS[norm]["type"])
        left = {path for path, m in model.named_modules() if isinstance(m, _BatchNorm) and not isinstance(m, kind)}
        if left:
            return f"batch norms are left: {', '.join(sorted(left)[:3])}"
        if not any(isinstance(m, kind) for m in model.modules()):
            return "no norm of this kind is in it"
        inputs = random_inputs(sample)
        if norm in CONTAINED:
            check_activations(model, build(toolkit, config(toolkit, name, NORMS["GN"])), inputs)
        check_step(model, inputs)
    except Exception as error:  # whatever it is, it is the result
        return f"{type(error).__name__}: {error}"
    return "yes"


def attempt_conv_ws(toolkit: str, name: str) -> str:
    """Return "yes", or why a backbone does not take ConvWS."""
    torch.manual_seed(0)
    cls = MODELS.children[toolkit].get(name)
    if "conv_cfg" not in accepted_arguments(cls)[0]:
        return "takes no conv_cfg"
    sample = BACKBONES[toolkit][name]
    video = toolkit == "mmaction" and len(sample.inputs[0]) == 5 and name != "C2D"
    try:
        cfg = config(toolkit, name, NORMS["GN"]) | dict(conv_cfg=dict(type="ConvWS3d" if video else "ConvWS"))
        model = build(toolkit, cfg)
        if not any(isinstance(m, (WSConv2d, WSConv3d)) for m in model.modules()):
            return "no ConvWS is in it"
        check_step(model, random_inputs(sample))
    except Exception as error:  # whatever it is, it is the result
        return f"{type(error).__name__}: {error}"
    return "yes"


# Why a backbone does not take a norm, in short, by what the attempt says.
REASONS = {
    "normalizes tokens": "Its norms are LayerNorms of tokens (N, L, C). A norm of channels would normalize another "
    "axis, and is refused when the model is built.",
    "There is no batch, group or instance norm": "It has none of the norms that can be replaced.",
    "must normalize the output of a convolution|cannot follow a transposed": "CBN corrects old statistics by the "
    "weight of the convolution right before it, and some norms have none there.",
    "calls relu_ behind it": "Its blocks call the ReLU as a method of tensors: it cannot be left out.",
    "has order=": "An activation stands before its norm, where none can contain it.",
    "To use VPD model": "It wants the packages of Stable Diffusion, and was not tried.",
    "'NoneType' object has no attribute 'shape'": "Its norms are of the patches that SparK's mask leaves visible, and "
    "nothing runs without that mask.",
    "takes no conv_cfg": "It takes no `conv_cfg`.",
    "no ConvWS is in it": "It takes a `conv_cfg` and makes no use of it.",
    "gives each filter deviation 1": "Some filters have a single value, which has no deviation.",
    "AssertionError: $": "Its convolutions must be `Conv2plus1d`.",
}
HEADING = "## Models"


def reason(result: str) -> str:
    """Return the short form of what an attempt says; the whole where there is none."""
    return next((short for pattern, short in REASONS.items() if re.search(pattern, result)), result)


def section(results: dict[tuple[str, str], dict[str, str]]) -> str:
    """Return the part of the page that is made of the results of every backbone."""
    columns = [*NORMS, "ConvWS"]
    reasons: dict[str, int] = {}
    rows = [["Toolkit", "Backbone", "Told by", *columns]]
    for (toolkit, name), result in results.items():
        route = "norm_cfg" if takes_norm_cfg(toolkit, name) else "replace_norm"
        cells = []
        for column in columns:
            if result[column] == "yes":
                cells.append("yes")
            else:
                cells.append(f"({reasons.setdefault(reason(result[column]), len(reasons) + 1)})")
        rows.append([toolkit, name, f"`{route}`", *cells])
    every = sum(all(result[norm] == "yes" for norm in NORMS) for result in results.values())
    text = f"""{HEADING}

Every backbone that mmdet, mmaction2, mmsegmentation and mmpretrain register, with every norm; {every} of
{len(results)} take all {len(NORMS)}. "yes" says that

- the backbone was built in its toolkit's scope, by the `norm_cfg` that it takes, or by `replace_norm` where it takes
  none or hands it to a part of its norms only, and its `init_weights` ran;
- no batch norm of another kind is left;
- a training step on random data gave finite gradients;
- for the norms that contain their activation: activations are applied as often as in the same network with GN, and none
  behind such a norm.

The last column is `conv_cfg=dict(type='ConvWS')`, or `ConvWS3d`, with GN. The backbones are small ones
(`tools/toolkit_backbones.py`). The table was made on a CPU, by

    python tools/compatible_models.py

"""
    text += markdown_table(rows) + "\n\n"
    return text + "\n".join(f"{number}. {why}" for why, number in reasons.items()) + "\n"


def write_page(text: str) -> None:
    """Put the section into the page, in place of the one that is there."""
    page = PAGE.read_text() if PAGE.exists() else "# What works with what\n"
    before, found, after = page.partition(HEADING)
    rest = re.search(r"^## ", after, re.MULTILINE) if found else None
    PAGE.write_text(f"{before.rstrip()}\n\n{text}" + (f"\n{after[rest.start() :]}" if rest else ""))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TOOLKIT.NAME", nargs="+", help="print the results of these, write no page")
    parser.add_argument("--norms", nargs="+", choices=[*NORMS, "ConvWS"], help="print the results of these")
    args = parser.parse_args(argv)
    if unknown := set(args.only or ()) - set(KNOWN):
        parser.error(f"--only takes backbones such as mmseg.ResNet, but got {', '.join(sorted(unknown))}.")
    return args


def main() -> None:
    args = parse_args()
    MMLogger.get_instance("mmengine", log_level="ERROR")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[tuple[str, str], dict[str, str]] = {}
    for where in args.only or KNOWN:
        toolkit, name = where.split(".")
        register(toolkit)
        results[toolkit, name] = {}
        for norm in args.norms or [*NORMS, "ConvWS"]:
            with contextlib.redirect_stdout(sys.stderr):  # some print
                result = attempt_conv_ws(toolkit, name) if norm == "ConvWS" else attempt(toolkit, name, norm)
            results[toolkit, name][norm] = result
            line = "\t".join([where, norm, result.replace("\n", " ")])
            print(line, file=sys.stdout if args.only or args.norms else sys.stderr, flush=True)
    if not args.only and not args.norms:
        write_page(section(results))
        print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
