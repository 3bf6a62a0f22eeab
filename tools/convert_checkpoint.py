"""Convert a published checkpoint into one that the model of a config loads with no missing and no unexpected key.

Reads Detectron and Detectron2 .pkl, torchvision and timm ResNets, BiT (.npz and timm), the GN+WS networks of
joe-siyuan-qiao, mmdet 1, 2 and 3 (Howal's CBN among them); docs/checkpoints.md has a command for each. Prints which key
went where and what was done to it.

Exit code: 0 converted; 2 refused, and nothing is written: wrong arguments, or a checkpoint that does not fit.
"""

import argparse
from pathlib import Path

import torch

import normplug
from normplug.openmmlab.atomic import atomic_write
from normplug.openmmlab.cli import add_cfg_options, override, tell_unknown
from normplug.openmmlab.config_files import read_config
from normplug.openmmlab.formats.conversion import convert
from normplug.openmmlab.formats.files import read_checkpoint
from normplug.openmmlab.formats.names import FORMATS, IMAGES, understand
from normplug.openmmlab.mistakes import add_debug, answered


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("source", type=Path, help="the published checkpoint")
    p.add_argument("out", type=Path, metavar="OUT.pth", help="where to write the converted one")
    p.add_argument("--config", type=Path, required=True, help="config whose model is to load it")
    add_cfg_options(p)
    add_debug(p)
    p.add_argument("--format", choices=["auto", *FORMATS], default="auto", help="default: recognized by the keys")
    p.add_argument(
        "--part",
        choices=["auto", "backbone", "model"],
        default="auto",
        help="backbone: for the backbone's init_cfg; model: for load_from; default: model if the source is a detector",
    )
    p.add_argument("--standardized", choices=["yes", "no"], help="whether the source was trained with ConvWS")
    p.add_argument("--images", choices=list(IMAGES), help="what the source was trained on; default: by format")
    p.add_argument("--keep-images", action="store_true", help="do not rewrite conv1 for the config's BGR/RGB and std")
    bn = p.add_mutually_exclusive_group()
    bn.add_argument("--freeze-bn", action="store_true", help="merge BN's statistics into its weight and bias")
    bn.add_argument("--fold-bn", action="store_true", help="merge BN into the convolution in front of it")
    p.add_argument("--drop", nargs="+", default=[], metavar="KEY", help="keys of the source to leave out; patterns")
    p.add_argument(
        "--allow-unset", nargs="+", default=[], metavar="KEY", help="keys of the model that may stay unset; patterns"
    )
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with answered("convert_checkpoint.py", args.debug) as answer:
        cfg = read_config(args.config)
        tell_unknown(cfg, args.cfg_options)
        override(cfg, args.cfg_options)
        source = understand(
            read_checkpoint(args.source),
            args.format,
            standardized={None: None, "yes": True, "no": False}[args.standardized],
            images=args.images,
            drop=args.drop,
        )
        converted = convert(
            source,
            cfg,
            part=args.part,
            bn="fold" if args.fold_bn else "freeze" if args.freeze_bn else "keep",
            allow_unset=args.allow_unset,
            adapt_images=not args.keep_images,
        )
        meta = dict(source=args.source.name, format=source.format.name, images=converted.images._asdict())
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.out) as file:
            torch.save(dict(state_dict=converted.state_dict, meta=dict(meta, normplug=normplug.__version__)), file)
        print(converted.report())
        print(f"\nWritten: {args.out}, {len(converted.state_dict)} tensors.")
    return answer.code


if __name__ == "__main__":
    raise SystemExit(main())
