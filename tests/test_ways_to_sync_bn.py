"""Over gloo every way to a synchronized batch norm trains, and computes what one process does with the joint batch."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmengine.device import get_device
from mmengine.model import BaseModel
from mmengine.model import convert_sync_batchnorm as mmengines_conversion
from mmengine.registry import MODELS
from mmengine.runner import Runner
from ranks import run_ranks
from tiny_data import make_coco
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from normplug.layers import BatchNormAct, CrossIterationBatchNorm, FrozenBatchNorm, SyncBatchNorm

mmcv_ops = pytest.importorskip("mmcv.ops")
pytest.importorskip("mmdet.models")
pytestmark = pytest.mark.skipif(get_device() != "cpu", reason="there is no gap: mmengine sees an accelerator here")

ROOT = Path(__file__).resolve().parent.parent
WORLD, C, SIZES = 2, 4, (3, 2)  # ranks have unequal batches


class OwnSubclass(nn.SyncBatchNorm):
    def forward(self, x):
        return super().forward(x).relu()


def net(norm=nn.BatchNorm2d, seed=0):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Conv2d(2, C, 3), norm(C), nn.ReLU(), nn.Conv2d(C, C, 1), norm(C))
    for layer in made:
        if hasattr(layer, "running_var"):
            nn.init.normal_(layer.weight, 1, 0.3)
            nn.init.normal_(layer.bias)
    return made.double()


def built(kind, **more):
    return lambda channels: MODELS.build(dict(type=kind, num_features=channels, **more))


WAYS = {
    "torch's conversion": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(net()),
    "torch's conversion of ours": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(net(BatchNormAct)),
    "mmengine's conversion": lambda: mmengines_conversion(net(), "torch"),
    "mmengine's conversion to mmcv's": lambda: mmengines_conversion(net(), "mmcv"),
    "torch's layer": lambda: net(nn.SyncBatchNorm),
    "a subclass of it": lambda: net(OwnSubclass),
    "SyncBN": lambda: net(built("SyncBN")),
    "MMSyncBN": lambda: net(built("MMSyncBN", stats_mode="N")),
    "mmcv's class": lambda: net(mmcv_ops.SyncBatchNorm),
}


def inputs():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(sum(SIZES), 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(sum(SIZES), C, 4, 4, generator=generator, dtype=torch.float64)


def step(model, x, dy, module):
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    gradients = {f"grad {name}": p.grad.clone() for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **{name: b.clone() for name, b in module.named_buffers()}}


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.net = net().float()

    def forward(self, x, mode):
        return {"loss": self.net(torch.stack(x)).square().mean()}


def by_runner(path, rank, sync_bn):
    data = [{"x": x.float()} for x in inputs()[0][:4]]
    runner = Runner(
        Toy(),
        str(path / f"run-{sync_bn}"),
        experiment_name=f"ways-{sync_bn}",
        launcher="pytorch",
        log_level="ERROR",
        train_dataloader=dict(dataset=data, batch_size=2, sampler=dict(type="DefaultSampler"), num_workers=0),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        cfg=dict(sync_bn=sync_bn),
    )
    runner.train()
    kinds = [type(layer).__name__ for layer in runner.model.module.net]
    return kinds, torch.cat([p.detach().flatten() for p in runner.model.parameters()])


def refusals():
    """What is said where a layer would lose something, and what stays as it is."""
    told = {}
    for name, convert in (
        ("torch", nn.SyncBatchNorm.convert_sync_batchnorm),
        ("mmengine", mmengines_conversion),
        ("RTMDet", lambda model: RTMDetLike(model)),
    ):
        try:
            convert(net(CrossIterationBatchNorm))
        except ValueError as error:
            told[name] = str(error)
    kept = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(FrozenBatchNorm(C), BatchNormAct(C, act="relu")))
    return told, [repr(layer) for layer in kept]


class RTMDetLike(nn.Module):
    """What mmdet's RTMDet does when it is built."""

    def __init__(self, model, use_syncbn=True):
        super().__init__()
        self.model = model
        if use_syncbn:
            nn.SyncBatchNorm.convert_sync_batchnorm(self)


def work(rank, path):
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=WORLD)
    seen = {}
    own = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    x, dy = (t[own] for t in inputs())
    for name, make in WAYS.items():
        for wrapper in (DistributedDataParallel, None):
            model = make().train()
            wrapped = model if wrapper is None else wrapper(model, broadcast_buffers=False)
            seen[name, wrapper is not None] = (
                step(wrapped, x, dy, model),
                [type(layer).__name__ for layer in model if hasattr(layer, "running_var")],
            )
    seen["runner"] = {sync_bn: by_runner(path, rank, sync_bn) for sync_bn in ("torch", "mmcv")}
    seen["refusals"] = refusals()
    torch.save(seen, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    return run_ranks(work, path, WORLD, weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("in_ddp", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_joint_batch(ranks, way, in_ddp):
    reference = net()
    if way == "a subclass of it":
        reference.insert(5, nn.ReLU())
        reference.insert(2, nn.ReLU())
    x, dy = inputs()
    want = step(reference, x, dy, reference)
    parts = [rank[way, in_ddp][0] for rank in ranks]
    for name in ("y", "dx"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), want[name], rtol=1e-10, atol=1e-12)
    mine = [value for name, value in parts[0].items() if name.startswith("grad")]
    theirs = [value for name, value in parts[1].items() if name.startswith("grad")]
    sums = [value for name, value in want.items() if name.startswith("grad")]
    for a, b, c in zip(mine, theirs, sums, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-10, atol=1e-12)  # DDP has the mean on each
    buffers = [[v for k, v in each.items() if k not in ("y", "dx") and "grad" not in k] for each in (*parts, want)]
    for a, b, c in zip(*buffers, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-12)
        assert torch.equal(a, b)


@pytest.mark.slow
def test_ours_is_what_they_lead_to(ranks):
    for way in set(WAYS) - {"a subclass of it"}:
        assert set(ranks[0][way, True][1]) <= {"SyncBatchNorm", "MMSyncBatchNorm"}
    for kinds, weights in ranks[0]["runner"].values():
        assert kinds.count("SyncBatchNorm") == 2
        assert any(torch.equal(weights, other) for _, other in ranks[1]["runner"].values())


@pytest.mark.slow
def test_refusals_name_what_converts(ranks):
    told, kept = ranks[0]["refusals"]
    assert "use_syncbn=False" in told["RTMDet"]
    assert "sync_bn='torch' in the config" in told["mmengine"]
    assert all("the statistics of earlier iterations" in text for text in told.values())
    assert kept == [repr(FrozenBatchNorm(C)), repr(SyncBatchNorm(C, act="relu"))]


def test_mmsyncbn_is_built_without_a_process_group():
    layer = MODELS.build(dict(type="MMSyncBN", num_features=C))
    assert isinstance(layer, SyncBatchNorm)
    assert layer.state_dict().keys() == nn.BatchNorm2d(C).state_dict().keys()
    assert type(layer) is mmcv_ops.SyncBatchNorm is MODELS.get("MMSyncBN")
    with pytest.raises(ValueError, match="stats_mode 'default' and 'N'"):
        MODELS.build(dict(type="MMSyncBN", num_features=C, stats_mode="X"))
    name, built_by_mmcv = mmcv_norm(dict(type="MMSyncBN", requires_grad=True))
    assert (name, type(built_by_mmcv)) == ("bn", type(layer))


def mmcv_norm(cfg):
    from mmcv.cnn import build_norm_layer

    return build_norm_layer(cfg, C)


def test_outside_of_a_process_group_torchs_conversion_is_torchs():
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net())
    assert type(converted[1]) is nn.SyncBatchNorm
    assert type(mmengines_conversion(net())[1]) is nn.SyncBatchNorm
    with pytest.raises(ValueError, match="use_syncbn=False"):
        RTMDetLike(net(CrossIterationBatchNorm))


CONFIG = """
_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
custom_imports = dict(imports=['normplug'])
model = dict(backbone=dict(init_cfg=None))
sync_bn = 'torch'
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(96, 96)),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(data_root={root!r}, pipeline=pipeline, filter_cfg=dict(filter_empty_gt=False, min_size=0)),
)
train_cfg = dict(max_epochs=1, dynamic_intervals=None)
val_dataloader = val_evaluator = val_cfg = None
test_dataloader = test_evaluator = test_cfg = None
custom_hooks = []
"""


@pytest.mark.slow
def test_rtmdet_trains_over_gloo(tmp_path):
    make_coco(tmp_path / "coco", train=4, val=2)
    (tmp_path / "c.py").write_text(CONFIG.format(root=f"{tmp_path}/coco/"))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [str(ROOT / "tools" / "dist_train.sh"), "c.py", "2", "--work-dir", "w"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "w" / "epoch_1.pth").exists()
