"""Train the model of a config: mmdet's, mmaction2's or any other mmengine toolkit's."""

import argparse

from mmengine.config import Config

import normplug  # noqa: F401  registers the layers, and lets the toolkits import
from normplug.openmmlab.cli import (
    build_runner,
    check_amp,
    check_run,
    config_parser,
    load_config,
    require_checkpoint,
    scale_lr,
    use_amp,
)
from normplug.openmmlab.data_places import LOADERS
from normplug.openmmlab.mistakes import answered


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = config_parser(__doc__)
    p.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from this checkpoint, or without one from the latest in the work dir",
    )
    p.add_argument("--amp", action="store_true", help="automatic mixed precision (needs a GPU)")
    p.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    p.add_argument("--no-validate", action="store_true", help="do not evaluate during training")
    p.add_argument("--seed", type=int, help="random seed; default: the config's, else a random one")
    p.add_argument("--diff-rank-seed", action="store_true", help="another seed on every rank")
    p.add_argument("--deterministic", action="store_true", help="deterministic cuDNN algorithms")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with answered("train.py", args.debug) as answer:
        cfg = load_config(args)
        if args.amp:
            use_amp(cfg)
        check_amp(cfg)
        if args.auto_scale_lr:
            scale_lr(cfg)
        if args.resume:
            cfg.resume = True
            cfg.load_from = None if args.resume == "auto" else args.resume
        if cfg.get("load_from"):
            require_checkpoint(cfg.load_from)
        set_randomness(cfg, args)
        check_run(cfg, LOADERS[:1] if args.no_validate else LOADERS[:2], weights=True)
        if args.no_validate:
            cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        answer.watch(build_runner(cfg)).train()
    return answer.code


def set_randomness(cfg: Config, args: argparse.Namespace) -> None:
    randomness = {"seed": None, **(cfg.get("randomness") or {})}  # mmengine draws a seed for None, and needs the key
    if args.seed is not None:
        randomness["seed"] = args.seed
    for flag in ("diff_rank_seed", "deterministic"):
        if getattr(args, flag):
            randomness[flag] = True
    cfg.randomness = randomness


if __name__ == "__main__":
    raise SystemExit(main())
