"""Build the first config of each of the toolkits' config folders, and train it for one step on random data.

Nothing is downloaded: paths to pre-trained weights are dropped, and a model that must fetch something fails with that
reason. Every config runs in a process of its own, forked from one that has imported the toolkits, with a limit of time
and memory. One line of JSON per config goes to --out as it ends; a second run goes on where the first stopped.

Prints a table. Exit code: 0, whatever the models do; 2 wrong arguments.
"""

import argparse
import copy
import importlib
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from mmengine.registry import FUNCTIONS, MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from stock_configs import without_weights

import normplug  # noqa: F401
from normplug.reporting import markdown_table

TOOLKITS = ["mmdet", "mmaction", "mmseg", "mmpretrain"]
FRAMES, JOINTS = 8, {"coco": 17, "nturgb+d": 25, "openpose": 18}


class Left(Exception):
    """A config is left out on purpose; the text says why."""


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("toolkits", nargs="*", default=TOOLKITS, help=f"of {', '.join(TOOLKITS)}; default: all")
    p.add_argument("--out", type=Path, required=True, help="file of results, one JSON object per line")
    p.add_argument("--only", default="", help="a regular expression: folders that it is found in")
    p.add_argument("--timeout", type=float, default=150, help="seconds per config")
    p.add_argument("--memory", type=float, default=6, help="GB per config, beyond what importing takes")
    p.add_argument("--parameters", type=float, default=300, help="millions; larger models build, but do not train")
    args = p.parse_args(argv)
    if unknown := set(args.toolkits) - set(TOOLKITS):
        p.error(f"not a toolkit: {', '.join(sorted(unknown))}; take of {', '.join(TOOLKITS)}")
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # a download must fail at once
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {(row["toolkit"], row["folder"]) for row in done}
    for toolkit in args.toolkits:
        importlib.import_module(f"{toolkit}.utils").register_all_modules(init_default_scope=False)
        for file in first_configs(toolkit):
            folder = str(file.parent.relative_to(configs_of(toolkit)))
            if (toolkit, folder) in known or not re.search(args.only, folder):
                continue
            row = dict(toolkit=toolkit, folder=folder, config=file.name, **in_process(toolkit, file, args))
            print(json.dumps(row), file=sys.stderr)
            with args.out.open("a") as f:
                f.write(json.dumps(row) + "\n")
            done.append(row)
    print(table([row for row in done if row["toolkit"] in args.toolkits]))
    return 0


def table(rows: list[dict]) -> str:
    head = ["toolkit", "folders", "build", "train a step", "left out"]
    lines = [head]
    for toolkit in dict.fromkeys(row["toolkit"] for row in rows):
        count = Counter()
        for row in rows:
            if row["toolkit"] == toolkit:
                left_out = row["reason"].startswith("left out")
                count.update(folders=1, build=int(row["built"]), step=int(row["ran"]), left=int(left_out))
        lines.append([toolkit, *(str(count[key]) for key in ("folders", "build", "step", "left"))])
    failed = [
        [f"{r['toolkit']} {r['folder']}", "build" if not r["built"] else "step", r["reason"]]
        for r in rows
        if not r["ran"]
    ]
    return markdown_table(lines) + "\n\n" + markdown_table([["folder", "fails at", "reason"], *failed])


# ---- one config


def configs_of(toolkit: str) -> Path:
    return Path(importlib.import_module(toolkit).__file__).parent / ".mim" / "configs"


def first_configs(toolkit: str) -> list[Path]:
    files = sorted(f for f in configs_of(toolkit).rglob("*.py") if not {"_base_", "__pycache__"} & set(f.parts))
    return list({f.parent: f for f in reversed(files)}.values())[::-1]


def in_process(toolkit: str, file: Path, args: argparse.Namespace) -> dict:
    """What ``attempt`` finds out, in a child that may crash, hang or eat memory."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=attempt, args=(toolkit, file, args, theirs))
    start = time.monotonic()
    child.start()
    theirs.close()
    row = dict(built=False, ran=False, reason="", parameters=None, ops=[])
    try:
        while ours.poll(max(0.0, args.timeout - (time.monotonic() - start))):
            row.update(ours.recv())
        row["reason"] = row["reason"] or f"not done after {args.timeout:.0f} s"
    except EOFError:
        child.join()
        if not row["ran"] and not row["reason"]:
            row["reason"] = f"the process ended with exit code {child.exitcode}"
    child.kill()
    child.join()
    return dict(row, seconds=round(time.monotonic() - start, 1))


def attempt(toolkit: str, file: Path, args: argparse.Namespace, pipe: Any) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = now + int(args.memory * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    try:
        cfg = Config.fromfile(file)
        if "model" not in cfg:
            raise Left("no model in this config")
        without_weights(cfg.model)
        os.chdir(configs_of(toolkit).parent)  # some name another config by its path
        scope = cfg.get("default_scope") or toolkit  # mmdet has configs of mmpretrain's models
        with DefaultScope.overwrite_default_scope(scope):
            if "data_preprocessor" in cfg:  # as mmengine's runner does
                cfg.model.setdefault("data_preprocessor", cfg.data_preprocessor)
            shrink(cfg.model)
            model = MODELS.build(cfg.model)
            parameters = sum(p.numel() for p in model.parameters())
            pipe.send(dict(built=True, parameters=parameters))
            if parameters > args.parameters * 1e6:
                raise Left(f"{parameters / 1e6:.0f} million parameters")
            model.init_weights()
            called = record_ops()
            try:
                train(model, SAMPLES[scope](cfg))
            finally:
                pipe.send(dict(ops=sorted(called)))
        pipe.send(dict(ran=True))
    except Left as e:
        pipe.send(dict(reason=f"left out: {e}"))
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        text = " ".join(str(e).split())
        pipe.send(dict(reason=f"{type(e).__name__}: {text[:160]} ({Path(where.filename).name}:{where.lineno})"))
    finally:
        pipe.close()
        os._exit(0)


def record_ops() -> set[str]:
    """The names of mmcv's compiled functions, or of their stand-ins, that are called from now on."""
    called = set()
    extension = vars(importlib.import_module("mmcv._ext"))

    def recording(name: str, function: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            called.add(name)
            return function(*args, **kwargs)

        return wrapped

    extension.update({k: recording(k, f) for k, f in extension.items() if callable(f) and not k.startswith("_")})
    return called


def train(model: torch.nn.Module, batches: Iterator[dict]) -> None:
    """One step on the first batch that the model takes: they are tried from small to large."""
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-4))
    hub = MessageHub.get_current_instance()  # a runner's; some losses ask how far the training is
    for key, value in dict(iter=0, epoch=0, max_iters=100, max_epochs=10).items():
        hub.update_info(key, value)
    model.train()
    for data in batches:
        try:
            losses = model.train_step(data, optimizer)
        except NotImplementedError:
            raise
        except Exception as e:
            error = e
            continue
        bad = [name for name, value in losses.items() if not math.isfinite(float(value))]
        if bad:
            raise ArithmeticError(f"not finite: {', '.join(bad)}")
        return
    raise error


FROM_2D = ["MobileNetV2TSM", "MobileOneTSM", "ResNetTIN", "ResNetTSM", "SwinTransformer3D"]


def shrink(model: dict) -> None:
    """Take away large images, thousands of RoIs, and the need of weights of images; the networks stay as they are."""
    for part in walk(model):
        if "batch_augments" in part:
            part["batch_augments"] = None
        if part.get("type") == "SegDataPreProcessor" and part.get("size"):
            part["size"] = None
            part["size_divisor"] = 32
        if "num" in part and "pos_fraction" in part:
            part["num"] = min(part["num"], 32)
        if "max_per_img" in part and "nms_pre" in part:
            part["max_per_img"] = min(part["max_per_img"], 64)
        if part.get("type") in FROM_2D:
            part["pretrained2d"] = False


def walk(cfg: Any) -> Iterator[dict]:
    if isinstance(cfg, dict):
        yield cfg
        cfg = list(cfg.values())
    if isinstance(cfg, (list, tuple)):
        for value in cfg:
            yield from walk(value)


def values(cfg: Any, key: str) -> list:
    return [part[key] for part in walk(cfg) if key in part]


def pipeline_of(cfg: Config) -> list[dict]:
    """The transforms of the first data set, most of them nested in wrappers."""
    for part in ("train", "val", "test"):  # some configs only test
        found = [p for p in values(cfg.get(f"{part}_dataloader") or {}, "pipeline") if p]
        found = found or [p for p in (cfg.get(f"{part}_pipeline"),) if p]
        if found:
            return max(found, key=len)
    return []


def classes_of(cfg: Config, default: int) -> int:
    known = [n for n in values(cfg.model, "num_classes") if isinstance(n, int) and n > 0]
    return min(known, default=default)


def image(size: int, *front: int) -> torch.Tensor:
    return torch.randint(256, (*front, size, size), dtype=torch.uint8)


# ---- mmdet


def detection(cfg: Config) -> Iterator[dict]:
    kind = cfg.model.type
    preprocessor = str((cfg.model.get("data_preprocessor") or {}).get("type", ""))
    classes = classes_of(cfg, 1)
    for size in (64, 128, 256, 512):
        if "ReID" in preprocessor:
            yield reid(size, classes)
        elif preprocessor.endswith("ImgDataPreprocessor") or kind.startswith("mmpretrain."):
            yield from pretraining(cfg)
        elif "Track" in preprocessor and not values(cfg.model, "use_det_processor"):
            yield tracking(size, classes)
        elif "MultiBranch" in preprocessor:
            batch = pseudo_collate([det_sample(cfg, size, classes, i) for i in range(2)])
            yield {
                part: {branch: copy.deepcopy(value) for branch in ("sup", "unsup_teacher", "unsup_student")}
                for part, value in batch.items()
            }
        else:
            yield pseudo_collate([det_sample(cfg, size, classes, i) for i in range(2)])


def boxes(size: int, n: int = 3) -> torch.Tensor:
    start = torch.rand(n, 2) * size * 0.5
    return torch.cat((start, start + size * (0.15 + 0.3 * torch.rand(n, 2))), 1)


def instances(size: int, classes: int) -> InstanceData:
    from mmdet.structures.mask import BitmapMasks

    box = boxes(size)
    masks = np.zeros((len(box), size, size), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, box.round().int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return InstanceData(
        bboxes=box,
        labels=torch.randint(classes, (len(box),)),
        masks=BitmapMasks(masks, size, size),
        instances_ids=torch.arange(len(box)),
    )


def det_sample(cfg: Config, size: int, classes: int, index: int) -> dict:
    from mmdet.structures import DetDataSample

    sample = DetDataSample(metainfo=meta(size, index), gt_instances=instances(size, classes))
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    sample.proposals = InstanceData(bboxes=boxes(size, 20), scores=torch.rand(20))
    scale = next(iter(p["scale_factor"] for p in walk(pipeline_of(cfg)) if p.get("type") == "SegRescale"), 1)
    stuff = classes + sum(n for n in values(cfg.model, "num_stuff_classes")[:1])
    sample.gt_sem_seg = PixelData(sem_seg=torch.randint(stuff, (1, int(size * scale), int(size * scale))))
    return dict(inputs=image(size, 3), data_samples=sample)


def meta(size: int, index: int) -> dict:
    return dict(
        img_id=index,
        img_path=f"{index}.png",
        img_shape=(size, size),
        ori_shape=(size, size),
        pad_shape=(size, size),
        batch_input_shape=(size, size),
        scale_factor=(1.0, 1.0),
        flip=False,
        flip_direction=None,
        border=np.array([1, 1, 1, 1]),
        homography_matrix=np.eye(3, dtype=np.float32),
        frame_id=index,
        text="a cat. a dog.",
        caption="a cat. a dog.",
        tokens_positive=[[[0, 5]], [[7, 12]], [[0, 5]]],
        custom_entities=False,
    )


def tracking(size: int, classes: int) -> dict:
    from mmdet.structures import DetDataSample, TrackDataSample

    target = instances(size, classes)
    frames = [DetDataSample(metainfo=meta(size, i), gt_instances=copy.deepcopy(target)) for i in range(2)]
    for frame in frames:
        frame.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
    sample = TrackDataSample(metainfo=dict(key_frames_inds=[0], ref_frames_inds=[1]), video_data_samples=frames)
    return pseudo_collate([dict(inputs=image(size, 2, 3), data_samples=sample)])


def reid(size: int, classes: int) -> dict:
    from mmdet.structures import ReIDDataSample

    sample = ReIDDataSample()
    sample.set_gt_label([index // 2 % classes for index in range(4)])
    inputs = image(size, 4, 3)[..., : size // 2]  # people: as high as two of their breadths
    return pseudo_collate([dict(inputs=inputs, data_samples=sample)])


# ---- mmaction2


def action(cfg: Config) -> Iterator[dict]:
    kind, pipeline = cfg.model.type, pipeline_of(cfg)
    names = [step["type"].rsplit(".", 1)[-1] for step in pipeline if "type" in step]
    if kind in LOCALIZERS:
        yield pseudo_collate([localization(cfg, i) for i in range(2)])
        return
    if "FormatGCNInput" in names:
        yield pseudo_collate([action_sample(cfg, skeleton(cfg)) for _ in range(2)])
        return
    if "FormatAudioShape" in names:
        yield pseudo_collate([action_sample(cfg, torch.randn(1, 1, 64, 80)) for _ in range(2)])
        return
    if values(pipeline, "input_format") == ["NCTHW_Heatmap"]:
        heatmap = torch.rand(1, cfg.model.backbone.get("in_channels", 17), FRAMES, 56, 56)
        yield pseudo_collate([action_sample(cfg, heatmap) for _ in range(2)])
        return
    clip = next(iter(values(pipeline, "clip_len")), FRAMES)
    frames = clip * next(iter(values(pipeline, "num_clips")), 1)
    for size, length in product((64, 112, 224), sorted({FRAMES, clip, frames})):
        batch = []
        for _ in range(2):
            if values(pipeline, "input_format") == ["NCHW"]:
                inputs = image(size, frames, 3)
            elif values(pipeline, "collapse"):
                inputs = image(size, 3, length)
            else:
                inputs = image(size, 1, 3, length)
            batch.append(action_sample(cfg, inputs, size))
        yield pseudo_collate(batch)


def action_sample(cfg: Config, inputs: torch.Tensor, size: int = 64) -> dict:
    from mmaction.structures import ActionDataSample

    sample = ActionDataSample(metainfo=dict(img_shape=(size, size), text="a man"))
    classes = classes_of(cfg, 10)
    if "roi_head" in cfg.model:
        labels = torch.zeros(3, classes)
        labels[:, 1] = 1
        box = boxes(size)
        sample.gt_instances = InstanceData(bboxes=box, labels=labels)
        sample.proposals = InstanceData(bboxes=box.clone(), scores=torch.rand(3))
        sample.set_metainfo(dict(scores=torch.rand(3)))
    else:
        sample.set_gt_label(int(torch.randint(classes, ())))
    return dict(inputs=inputs, data_samples=sample)


def skeleton(cfg: Config) -> torch.Tensor:
    graph = cfg.model.backbone.graph_cfg
    channels = cfg.model.backbone.get("in_channels", 3)
    return torch.randn(1, 2, 2 * FRAMES, JOINTS[graph.layout], channels)  # clips, persons, frames, joints, channels


LOCALIZERS = ["BMN", "PEM", "TEM", "TCANet", "DRN"]


def localization(cfg: Config, index: int) -> dict:
    from mmaction.structures import ActionDataSample

    model = cfg.model
    if model.type == "PEM":  # learns from features of proposals
        n = 8
        feature = torch.randn(n, model.pem_feat_dim)
        inst = InstanceData(bsp_feature=feature, reference_temporal_iou=torch.rand(n))
        sample = ActionDataSample(gt_instances=inst)
        inputs = torch.zeros(1)
    else:
        length = model.get("temporal_dim") or model.get("tem_temporal_dim") or 100
        inputs = torch.randn(model.get("feat_dim") or model.get("tem_feat_dim"), length)
        inst = InstanceData(gt_bbox=torch.tensor([[0.1, 0.3], [0.375, 0.625]]))
        if model.type == "TCANet":
            begin = torch.rand(8) * 0.5
            proposals = torch.stack((begin, begin + 0.1 + torch.rand(8) * 0.3, torch.rand(8)), 1)  # and their scores
            sample = ActionDataSample(gt_instances=inst, proposals=InstanceData(proposals=proposals))
        else:
            sample = ActionDataSample(gt_instances=inst)
    info = dict(video_name="v", duration_second=100, duration_frame=960, feature_frame=960)
    sample.set_metainfo(info)
    return dict(inputs=inputs, data_samples=sample)


# ---- mmsegmentation


def segmentation(cfg: Config) -> Iterator[dict]:
    from mmseg.structures import SegDataSample

    classes = classes_of(cfg, 2)
    crop = next(iter(values(cfg.model, "img_size")), 512)
    for size in (64, 128, 256, crop if isinstance(crop, int) else max(crop)):
        batch = []
        for index in range(2):
            sample = SegDataSample(metainfo=meta(size, index))
            sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, size, size)))
            sample.gt_edge_map = PixelData(data=torch.randint(2, (1, size, size)))
            sample.gt_depth_map = PixelData(data=torch.rand(1, size, size) * 10)
            batch.append(dict(inputs=image(size, 3), data_samples=sample))
        yield pseudo_collate(batch)


# ---- mmpretrain


def pretraining(cfg: Config) -> Iterator[dict]:
    """Through the config's own transforms: what a self-supervised model takes is made there."""
    from mmengine.registry import TRANSFORMS

    classes = classes_of(cfg, 1000)
    steps = [step for step in pipeline_of(cfg) if not str(step.get("type", "")).startswith("Load")]
    built = [TRANSFORMS.build(step) for step in steps]
    batch = []
    for index in range(2):
        data: Any = dict(
            img=np.random.randint(256, size=(256, 256, 3), dtype=np.uint8),
            img_shape=(256, 256),
            ori_shape=(256, 256),
            img_path=f"{index}.png",
            sample_idx=index,
            gt_label=[index % classes] if values(cfg.model, "type")[-1:] == ["CSRAClsHead"] else index % classes,
            text="a cat",
            gt_caption="a cat",
            question="what?",
            gt_answer=["a cat"],
            gt_answer_weight=[1.0],
        )
        for step in built:
            data = step(data)
        batch.append(data)
    collate = values(cfg.train_dataloader, "collate_fn") or [dict(type="pseudo_collate")]
    yield FUNCTIONS.get(collate[0]["type"])(batch)


SAMPLES: dict[str, Callable[[Config], Iterator[dict]]] = dict(
    mmdet=detection, mmaction=action, mmseg=segmentation, mmpretrain=pretraining
)

if __name__ == "__main__":
    raise SystemExit(main())
