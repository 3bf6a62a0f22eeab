"""Time whole training steps of Mask R-CNN R50-FPN and I3D R50 on random data, one process per variant.

The models are those of our configs, built by the toolkits from random weights: forward, losses, backward, optimizer.
A variant is a norm, its implementation (stock: that of torch and mmcv; normplug; recompute: normplug, norms computed
again in backward), a precision and a memory format. Loading of data is not part of a step. Tables go to stdout,
progress to stderr.

Exit code: 0 every variant ran or did not fit into --seconds; 1 some failed; 2 wrong arguments.
"""

import argparse
import itertools
import json
import math
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import normplug  # noqa: F401  registers the layers, and lets the toolkits import
from normplug.bench import choose_device, write_json
from normplug.bench.facts import describe, facts
from normplug.bench.measure import quantile
from normplug.openmmlab.mistakes import add_debug, answered
from normplug.openmmlab.recompute import recompute_norms
from normplug.reporting import markdown_table

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RCNN, I3D = "mask_rcnn", "i3d"
BASELINE = "frozen BN"
CBN = dict(type="CBN", buffer_num=3, burnin=0, requires_grad=True)  # no burn-in: the window is what costs
SYNCBN = "../small_batch/mask-rcnn_r50_fpn_syncbn-all_8xb2-1x_coco.py"
# norm -> config, and what to put in the place of its norms. In the order in which variants are run.
NORMS: dict[str, dict[str, tuple[str, dict | None]]] = {
    RCNN: {
        BASELINE: ("../small_batch/mask-rcnn_r50_fpn_frozen-bn-4conv1fc_8xb2-1x_coco.py", None),
        "GN": ("mask-rcnn_r50_fpn_gn-all_2x_coco.py", None),
        "GN+WS": ("mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py", None),
        "EvoNormS0": (SYNCBN, dict(type="EvoNormS0", requires_grad=True)),
        "CBN": (SYNCBN, CBN),
        "SyncBN": (SYNCBN, None),
        "BN": (SYNCBN, dict(type="BN", requires_grad=True)),
        "EvoNormS0 heads": ("../small_batch/mask-rcnn_r50_fpn_evonorm-s0-head_8xb2-1x_coco.py", None),
        "CBN heads": ("mask-rcnn_r50_fpn_cbn-head_4xb4-1x_coco.py", CBN),
    },
    I3D: {
        BASELINE: ("i3d_r50_bn_8xb8-32x2x1-100e_kinetics400-rgb.py", None),
        "GN": ("i3d_r50_gn_8xb8-32x2x1-100e_kinetics400-rgb.py", None),
        "GN+WS": ("i3d_r50_gn-ws_8xb8-32x2x1-100e_kinetics400-rgb.py", None),
        "EvoNormS0": ("i3d_r50_evonorm-s0_8xb8-32x2x1-100e_kinetics400-rgb.py", None),
        "CBN": ("i3d_r50_syncbn_8xb8-32x2x1-100e_kinetics400-rgb.py", CBN),
        "SyncBN": ("i3d_r50_syncbn_8xb8-32x2x1-100e_kinetics400-rgb.py", None),
        "BN": ("i3d_r50_bn_8xb8-32x2x1-100e_kinetics400-rgb.py", None),
    },
}
ALL_NORMS = list(dict.fromkeys(itertools.chain(*NORMS.values())))
IMPLEMENTATIONS = ("normplug", "stock", "recompute")
PRECISIONS = ("bf16", "fp32")  # bf16: autocast, float32 parameters
LAYOUTS = ("contiguous", "channels_last")
# What we aim at on an NVIDIA H200: times the step of the frozen BN with the same head. (norm, time, memory)
GOALS = [("GN", 1.05, 1.10), ("GN+WS", 1.10, None), ("EvoNormS0", 1.10, None), ("CBN", 1.45, None)]


@dataclass(frozen=True)
class Variant:
    """What is trained."""

    model: str
    norm: str
    implementation: str
    precision: str
    layout: str

    def __str__(self) -> str:
        return f"{self.model} {self.norm} ({self.implementation}), {self.precision}, {self.layout}"


@dataclass
class Result:
    """What came out; without times where status is not 'ok'."""

    model: str
    norm: str
    implementation: str
    precision: str
    layout: str
    status: str = "ok"  # or failed, not run
    message: str = ""
    seconds: float | None = None  # per iteration, median
    seconds_low: float | None = None  # 20th percentile
    seconds_high: float | None = None  # 80th
    iterations: int = 0
    peak_bytes: int | None = None  # GPU: of tensors; CPU: of the process, libraries included
    parameters: int = 0
    box_rois: float | None = None  # per step
    mask_rois: float | None = None  # of these the positive ones, which the sampler draws
    first_loss: float | None = None
    last_loss: float | None = None


def plan(args: argparse.Namespace) -> list[Variant]:
    """Return the variants: layouts and precisions as they were given, the goals' norms first, both models in turns."""
    formats = [(p, x) for x in args.layouts for p in args.precisions]
    variants = []
    for precision, layout in formats:
        for norm, model in itertools.product(ALL_NORMS, (RCNN, I3D)):
            if model in args.models and norm in args.norms and norm in NORMS[model]:
                served = [i for i in IMPLEMENTATIONS if i in args.implementations and exists(model, norm, i)]
                variants += [Variant(model, norm, i, precision, layout) for i in served]
    return variants


def exists(model: str, norm: str, implementation: str) -> bool:
    """Tell whether there is such a thing: BN is torch's; mmcv has no CBN, no EvoNorm and no 3-D ConvWS."""
    if norm in (BASELINE, "BN"):
        return implementation == "stock"
    if implementation == "recompute":
        return norm in ("GN", "GN+WS", "EvoNormS0")
    if implementation == "stock":
        return norm in ("GN", "SyncBN") or (norm == "GN+WS" and model == RCNN)
    return True


# --- one variant, in a process of its own


def use_stock_layers() -> None:
    """Give the names that normplug has taken over back to torch and mmcv."""
    from mmcv.cnn.bricks.conv_ws import ConvWS2d

    for name, layer in (("GN", nn.GroupNorm), ("SyncBN", nn.SyncBatchNorm), ("ConvWS", ConvWS2d)):
        MODELS.register_module(name=name, module=layer, force=True)


def make_config(variant: Variant, tiny: bool) -> Config:
    """Return the config of a variant, without checkpoints."""
    file, norm_cfg = NORMS[variant.model][variant.norm]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmengine imports pkg_resources
        cfg = Config.fromfile(CONFIGS / variant.model / file)
    if norm_cfg is not None:
        replace_norms(cfg.model, norm_cfg)
    if variant.model == I3D:
        cfg.model.backbone.update(pretrained=None, pretrained2d=False)
        if variant.norm == BASELINE:
            cfg.model.backbone.norm_eval = True
    else:
        cfg.model.backbone.init_cfg = None
        if tiny:  # 1024 RoIs take minutes on a CPU
            cfg.model.train_cfg.rcnn.sampler.num = 16
            cfg.model.train_cfg.rpn_proposal.max_per_img = 64
    # Small enough that random data does not drive the weights anywhere; the work is the same.
    cfg.optim_wrapper.optimizer.lr *= 1e-4
    return cfg


def replace_norms(cfg: dict, norm_cfg: dict) -> None:
    for key, value in cfg.items():
        if key == "norm_cfg" and value is not None:
            cfg[key] = dict(norm_cfg)
        elif isinstance(value, dict):
            replace_norms(value, norm_cfg)


def make_batch(model: str, tiny: bool) -> dict:
    """Return random images with eight objects each, or random clips, as a pipeline delivers them."""
    if model == I3D:
        from mmaction.structures import ActionDataSample

        clips, frames, size = (2, 8, 32) if tiny else (8, 32, 224)
        inputs = [torch.randint(0, 256, (1, 3, frames, size, size), dtype=torch.uint8) for _ in range(clips)]
        meta = dict(img_shape=(size, size))
        return dict(
            inputs=inputs,
            data_samples=[ActionDataSample(metainfo=meta).set_gt_label(i % 400) for i in range(clips)],
        )
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    height, width = (64, 96) if tiny else (800, 1333)  # padded to 1344
    random, samples = np.random.RandomState(0), []
    for _ in range(2):
        sizes = random.uniform(0.1, 0.5, (8, 2)) * (width, height)
        corners = random.uniform(0, 1, (8, 2)) * ((width, height) - sizes)
        boxes = np.concatenate([corners, corners + sizes], axis=1)
        masks = np.zeros((8, height, width), dtype=np.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int), strict=True):
            mask[y0 : y1 + 1, x0 : x1 + 1] = 1
        truth = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32),
            labels=torch.arange(8),
            masks=BitmapMasks(masks, height, width),
        )
        shape = (height, width)
        meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, scale_factor=(1.0, 1.0))
        samples.append(DetDataSample(metainfo=meta, gt_instances=truth))
    return dict(
        inputs=[torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for _ in range(2)], data_samples=samples
    )


def train(variant: Variant, device: torch.device, tiny: bool, warmup: int, iterations: int) -> Result:
    """Build, warm up, time."""
    torch.manual_seed(0)
    result = Result(**asdict(variant))
    if variant.implementation == "stock":
        use_stock_layers()
    cfg = make_config(variant, tiny)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
        if variant.implementation == "recompute":
            recompute_norms(model)
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
        model.to(device).train()
        data = model.data_preprocessor(make_batch(variant.model, tiny), training=True)
        if variant.layout == "channels_last":
            memory_format = torch.channels_last if variant.model == RCNN else torch.channels_last_3d
            rank = 4 if variant.model == RCNN else 5
            for p in model.parameters():  # not model.to(): a 4-D buffer of a video model has no 3-D format
                if p.ndim == rank:
                    p.data = p.data.contiguous(memory_format=memory_format)
            inputs = data["inputs"]
            flat = inputs.flatten(0, 1) if inputs.ndim == 6 else inputs
            data["inputs"] = flat.contiguous(memory_format=memory_format).view_as(inputs)
        settle_frozen_statistics(model, data["inputs"])
        rois: dict[str, list[int]] = {"bbox": [], "mask": []}
        if hasattr(model, "roi_head"):
            for name, sizes in rois.items():
                head = getattr(model.roi_head, f"{name}_head")
                head.register_forward_pre_hook(lambda _module, args, sizes=sizes: sizes.append(args[0].shape[0]))
        elif variant.precision == "bf16":  # mmaction2 counts the accuracy with numpy, which has no bfloat16
            model.cls_head.register_forward_hook(lambda _module, _args, scores: scores.float())

        def step() -> torch.Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=variant.precision == "bf16"):
                loss, _ = model.parse_losses(model(**data, mode="loss"))
            optimizer.update_params(loss)
            return loss.detach()

        result.first_loss = float(step())
        for _ in range(warmup - 1):
            step()
        for sizes in rois.values():
            sizes.clear()
        times = []
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(iterations):
            began = time.perf_counter()
            loss = step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    result.last_loss = float(loss)
    result.seconds, result.seconds_low, result.seconds_high = (quantile(times, q) for q in (0.5, 0.2, 0.8))
    result.iterations, result.parameters = iterations, sum(p.numel() for p in model.parameters())
    result.box_rois, result.mask_rois = (sum(n) / iterations if n else None for n in rois.values())
    on_gpu = device.type == "cuda"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result.peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else resident
    if not (math.isfinite(result.first_loss) and math.isfinite(result.last_loss)):
        result.status, result.message = "failed", f"the loss went from {result.first_loss} to {result.last_loss}"
    return result


def settle_frozen_statistics(model: nn.Module, inputs: torch.Tensor) -> None:
    """Give batch norms in evaluation mode the statistics of the data, in the place of a checkpoint.

    With mean 0 and variance 1 the activations of a random network grow from block to block, and what grows out of
    proportion takes other ways through proposals and samplers than a model in training does.
    """
    frozen = [m for m in model.modules() if isinstance(m, _BatchNorm) and not m.training]
    if not frozen:
        return
    momenta = [m.momentum for m in frozen]
    for m in frozen:
        m.train()
        m.momentum = 1.0
    with torch.no_grad():
        model.backbone(inputs.flatten(0, 1) if inputs.ndim == 6 else inputs)
    for m, momentum in zip(frozen, momenta, strict=True):
        m.eval()
        m.momentum = momentum


# --- all of them


def execute(variant: Variant, args: argparse.Namespace, timeout: float) -> Result:
    """Run one variant in a process of its own, so that its memory is its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--variant", json.dumps(asdict(variant))]
    command += ["--device", args.device, "--size", args.size]
    command += ["--warmup", str(args.warmup), "--iterations", str(args.iterations)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Result(**asdict(variant), status="not run", message="it was stopped when the time was up")
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return Result(**json.loads(line[len(MARK) :]))
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    return Result(**asdict(variant), status="failed", message=lines[-1][:300])


MARK = "benchmark_train result: "


def measure(args: argparse.Namespace, save) -> list[Result]:
    """Run the variants until the time is up."""
    end = time.monotonic() + args.seconds
    results: list[Result] = []
    variants = plan(args)
    for i, variant in enumerate(variants, 1):
        left = end - time.monotonic()
        if left <= 0:
            results.append(Result(**asdict(variant), status="not run", message="the time was up"))
            continue
        print(f"[{i}/{len(variants)}] {variant}", file=sys.stderr, flush=True)
        results.append(execute(variant, args, left))
        last = results[-1]
        said = f"{last.seconds:.4f} s" if last.status == "ok" else f"{last.status}: {last.message}"
        print(f"    {said}", file=sys.stderr, flush=True)
        save(results)
    save(results)
    return results


def markdown(result: dict) -> str:
    """Return the report of a run."""
    rows = result["rows"]
    base = {(r["model"], r["precision"], r["layout"]): r for r in rows if r["norm"] == BASELINE and r["status"] == "ok"}
    lines, late = [], []
    for r in rows:
        name = [r["model"], r["norm"], r["implementation"], r["precision"], r["layout"]]
        if r["status"] != "ok":
            late.append([*name, r["status"], r["message"].replace("|", "/")])
            continue
        frozen = base.get((r["model"], r["precision"], r["layout"]))
        against = [f"{r[k] / frozen[k]:.3f}" if frozen else "-" for k in ("seconds", "peak_bytes")]
        spread = f"{r['seconds']:.4f} ({r['seconds_low']:.4f} to {r['seconds_high']:.4f})"
        rois = "-" if r["mask_rois"] is None else f"{r['box_rois']:.0f}, {r['mask_rois']:.0f}"
        lines.append([*name, spread, str(r["iterations"]), f"{r['peak_bytes'] / 2**30:.2f}", *against, rois])
    found = result["facts"]
    memory = "tensors on the GPU" if found["device_type"] == "cuda" else "the resident process, libraries included"
    name = ["model", "norm", "layers", "precision", "layout"]
    header = [*name, "s/iteration (20% to 80%)", "n", "peak GiB", f"time / {BASELINE}", f"memory / {BASELINE}"]
    parts = [
        f"# Training steps on {found['device']}",
        "\n".join(describe(found)),
        f"Random data, size {result['size']}. Peak memory: {memory}. RoIs: per step, in the box head and (positive "
        "ones) in the mask head; the sampler draws them, and they may differ from variant to variant.",
        markdown_table([[*header, "RoIs"], *lines]),
    ]
    if found["device_type"] == "cuda" and result["size"] == "full":
        parts += ["## Goals, Mask R-CNN", goals(rows, base)]
    if late:
        parts += ["## Not measured", markdown_table([[*name, "status", "why"], *late])]
    return "\n\n".join(parts) + "\n"


def goals(rows: Sequence[dict], base: dict[tuple, dict]) -> str:
    """Return the goals per precision and layout."""
    lines = []
    for norm, *limits in GOALS:
        for r in rows:
            frozen = base.get((r["model"], r["precision"], r["layout"]))
            wanted = r["model"] == RCNN and r["norm"] == norm and r["implementation"] == "normplug"
            if not wanted or r["status"] != "ok" or frozen is None:
                continue
            for limit, key, what in zip(limits, ("seconds", "peak_bytes"), ("time", "memory"), strict=True):
                if limit is not None:
                    got = r[key] / frozen[key]
                    outcome = "reached" if got <= limit else "not reached"
                    lines.append([norm, r["precision"], r["layout"], what, f"at most {limit:g}", f"{got:.3f}", outcome])
    return markdown_table([["norm", "precision", "layout", f"against {BASELINE}", "goal", "measured", ""], *lines])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", choices=list(NORMS), default=list(NORMS))
    p.add_argument(
        "--norms", nargs="+", choices=ALL_NORMS, default=ALL_NORMS, metavar="NORM", help=", ".join(ALL_NORMS)
    )
    p.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    p.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    p.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto: the first GPU if there is one")
    p.add_argument("--size", choices=["full", "tiny"], default="full", help="tiny: to see that it works, on a CPU")
    p.add_argument("--warmup", type=int, default=5, help="iterations before those that are timed")
    p.add_argument("--iterations", type=int, default=30)
    p.add_argument("--seconds", type=float, default=1e6, help="budget: what does not fit is reported as not run")
    p.add_argument("--out", type=Path, help="write all results there, as JSON")
    p.add_argument("--table", type=Path, metavar="JSON", help="run nothing: print the tables of what --out wrote")
    p.add_argument("--commit", help="of normplug, where its folder is no git repository")
    add_debug(p)
    p.add_argument("--variant", help=argparse.SUPPRESS)  # what a process of its own is to run
    args = p.parse_args(argv)
    for name in ("warmup", "iterations"):
        if getattr(args, name) < 1:
            p.error(f"--{name} must be 1 or more, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    with answered("benchmark_train.py", args.debug) as answer:
        answer.code = run(args, sys.argv[1:] if argv is None else argv)
    return answer.code


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Do what the arguments, which are also ``argv`` as it was typed, ask for. Returns the exit code."""
    if args.table:
        print(markdown(json.loads(args.table.read_text())))
        return 0
    device = choose_device(args.device)
    if device is None:
        print(f"--device {args.device} is not to be had: torch {torch.__version__} sees no such GPU", file=sys.stderr)
        return 2
    if args.variant:
        result = train(Variant(**json.loads(args.variant)), device, args.size == "tiny", args.warmup, args.iterations)
        print(MARK + json.dumps(asdict(result)))
        return 0
    command = ["python", "tools/benchmark_train.py", *argv]
    result = {"kind": "training steps", "facts": facts(device, command, args.commit), "size": args.size}

    def save(results: Sequence[Result]) -> None:
        result["rows"] = [asdict(r) for r in results]
        write_json(args.out, result)

    results = measure(args, save)
    print(markdown(result))
    return int(any(r.status == "failed" for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
