"""Evaluate a checkpoint with the test data and metrics of its config."""

import argparse
from copy import deepcopy
from pathlib import Path

from mmengine.config import Config

import normplug  # noqa: F401  registers the layers, and lets the toolkits import
from normplug.openmmlab.cli import build_runner, check_run, config_parser, load_config, require_checkpoint
from normplug.openmmlab.mistakes import answered


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = config_parser(__doc__)
    p.add_argument("checkpoint", help="checkpoint file")
    p.add_argument("--out", "--dump", dest="out", type=Path, metavar="FILE.pkl", help="write the predictions there")
    p.add_argument("--show", action="store_true", help="show predictions in a window")
    p.add_argument("--show-dir", type=Path, help="write pictures of the predictions there")
    p.add_argument("--wait-time", type=float, default=2, help="seconds that a window stays")
    p.add_argument("--interval", type=int, default=1, help="show every so many samples")
    p.add_argument("--tta", action="store_true", help="test-time augmentation: the config's tta_model and tta_pipeline")
    return p.parse_args(argv)


def show_predictions(cfg: Config, args: argparse.Namespace) -> None:
    hook = cfg.get("default_hooks", {}).get("visualization")
    if hook is None:
        raise ValueError(
            "--show and --show-dir need default_hooks.visualization in the config, such as "
            "dict(type='DetVisualizationHook') for mmdet or dict(type='VisualizationHook') for mmaction2."
        )
    # mmdet's hook draws if `draw` is set, mmaction2's if `enable` is
    hook["draw" if hook["type"].startswith("Det") else "enable"] = True
    hook.update(show=args.show, wait_time=args.wait_time, interval=args.interval)
    # mmdet's hook puts a relative folder into the work dir
    folder = args.show_dir and str(args.show_dir.resolve())
    hook["test_out_dir" if hook["type"].startswith("Det") else "out_dir"] = folder


def augment_tests(cfg: Config) -> None:
    missing = [key for key in ("tta_model", "tta_pipeline") if key not in cfg]
    if missing:
        raise ValueError(f"--tta needs tta_model and tta_pipeline in the config; missing here: {', '.join(missing)}.")
    cfg.model = dict(deepcopy(cfg.tta_model), module=cfg.model)
    dataset = cfg.test_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with answered("test.py", args.debug) as answer:
        if args.out is not None and args.out.suffix not in (".pkl", ".pickle"):
            raise ValueError(f"--out writes a pickle file: name it *.pkl, not {args.out.name}.")
        cfg = load_config(args)
        if args.show or args.show_dir:
            show_predictions(cfg, args)
        if args.tta:
            augment_tests(cfg)
        require_checkpoint(args.checkpoint)
        check_run(cfg, ("test_dataloader",), weights=False)
        cfg.load_from = args.checkpoint
        if args.out is not None:
            metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, list | tuple) else [cfg.test_evaluator]
            cfg.test_evaluator = [*metrics, dict(type="DumpResults", out_file_path=str(args.out))]
        answer.watch(build_runner(cfg)).test()
    return answer.code


if __name__ == "__main__":
    raise SystemExit(main())
