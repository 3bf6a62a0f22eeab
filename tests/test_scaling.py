"""What docs/scaling.md says: sharding, gradient accumulation, and the commands that the scripts build."""

import copy
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import DATASETS, MODELS
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector

import normplug  # noqa: F401  registers the layers
from normplug.layers.weight_standardization import standardize_together
from normplug.openmmlab import sharding
from normplug.openmmlab.adapt import fuse_activations
from normplug.openmmlab.cli import build_runner

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import _launch  # noqa: E402

WORLD, C = 2, 8

# --- sharding, on two processes

NORMS = {
    "BN": dict(norm_cfg=dict(type="BN")),
    "SyncBN": dict(norm_cfg=dict(type="SyncBN")),
    "CBN": dict(norm_cfg=dict(type="CBN", buffer_num=2, burnin=1)),
    "CBN+WS": dict(norm_cfg=dict(type="CBN", buffer_num=2, burnin=1), conv_cfg=dict(type="ConvWS")),
    "GN": dict(norm_cfg=dict(type="GN", num_groups=4)),
    "GN+WS": dict(norm_cfg=dict(type="GN", num_groups=4), conv_cfg=dict(type="ConvWS")),
    "EvoNormB0": dict(norm_cfg=dict(type="EvoNormB0")),
    "EvoNormS0": dict(norm_cfg=dict(type="EvoNormS0")),
    "FRN": dict(norm_cfg=dict(type="FRN", eps=1e-6)),
}


@MODELS.register_module()
class ScalingNet(BaseModel):
    """Three convolutions with norms, the last two of them a shared head that runs twice, and a bias somewhere."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.stem = ConvModule(3, C, 3, padding=1, **NORMS[norm])
        self.head = nn.Sequential(*(ConvModule(C, C, 3, padding=1, bias=True, **NORMS[norm]) for _ in range(2)))
        self.out = nn.Conv2d(C, 1, 1)

    def forward(self, x, mode="tensor"):
        x = self.stem(torch.stack(x) if isinstance(x, list) else x)
        loss = sum(self.out(self.head(level)).square().mean() for level in (x, F.max_pool2d(x, 2)))
        return loss if mode == "tensor" else dict(loss=loss)


@DATASETS.register_module()
class ScalingPictures(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return dict(x=picture(i))


def picture(i):
    """Pictures differ in brightness and contrast, so that batches differ in their statistics."""
    return (0.5 + i % 3) * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)) + i % 5


def built(norm):
    torch.manual_seed(0)
    model = MODELS.build(dict(type="ScalingNet", norm=norm))
    for p in model.parameters():
        nn.init.normal_(p, 0.3, 0.3)  # left at one or zero, a forgotten weight goes unnoticed
    return model


def trained(model, rank):
    """Losses of some steps, and the state dict after them."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for step in range(4):
        loss = model(torch.stack([picture(100 * step + 10 * rank + i) for i in range(2)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), {name.removeprefix("module."): value for name, value in model.state_dict().items()}


SHARDED = {  # how FSDP wraps, and what a GPU would do by itself
    "one-unit": dict(use_orig_params=True),
    "units": dict(use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({ConvModule})),
    "flat-units": dict(use_orig_params=False, auto_wrap_policy=ModuleWrapPolicy({ConvModule})),
    "units-fused": dict(use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({ConvModule})),
}


FULLY_SHARDED = {"blocks": ConvModule, "layers": (nn.Conv2d, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)}


def alone(rank):
    """What CBN says of a convolution that is a unit of its own, whose weight has gone when it was done."""
    by_itself = ModuleWrapPolicy({nn.Conv2d})
    model = FullyShardedDataParallel(built("CBN"), device_id=torch.device("cpu"), auto_wrap_policy=by_itself)
    try:
        trained(model, rank)
    except ValueError as error:
        return str(error)


def fully_sharded(rank, norm, what):
    """Shard by torch's second FSDP, each block or each layer by itself."""
    model, mesh = built(norm), init_device_mesh("cpu", (WORLD,))
    for module in [m for m in model.modules() if isinstance(m, FULLY_SHARDED[what])]:
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh)
    losses, state = trained(fully_shard(model, mesh=mesh), rank)
    return losses, {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}


def sharded(rank, norm, how):
    if how in FULLY_SHARDED:
        return fully_sharded(rank, norm, how)
    model = built(norm)
    if how.endswith("fused"):
        fuse_activations(standardize_together(model, ("cpu",)), ("cpu",))
    return trained(FullyShardedDataParallel(model, device_id=torch.device("cpu"), **SHARDED[how]), rank)


def replicated(rank, norm):
    return trained(nn.parallel.DistributedDataParallel(built(norm), broadcast_buffers=False), rank)


def config(path, epochs=2, **more):
    return Config(
        dict(
            model=dict(type="ScalingNet", norm="GN"),
            train_dataloader=dict(
                dataset=dict(type="ScalingPictures"),
                sampler=dict(type="DefaultSampler", shuffle=True),
                batch_size=2,
                num_workers=0,
            ),
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=dict(
                accumulative_counts=2,
                optimizer=dict(type="SGD", lr=0.5, momentum=0.9, weight_decay=0.1),
                clip_grad=dict(max_norm=1e-3),  # always in force
                paramwise_cfg=dict(norm_decay_mult=0.0),
            ),
            auto_scale_lr=dict(enable=True, base_batch_size=2),
            randomness=dict(seed=0),
            default_hooks=dict(logger=dict(type="LoggerHook", interval=1)),
            env_cfg=dict(dist_cfg=dict(backend="gloo")),
            launcher="pytorch",
            work_dir=str(path),
            experiment_name=Path(path).name,
            log_level="ERROR",
            **more,
        )
    )


BY_SIZE = dict(type="torch.distributed.fsdp.wrap.size_based_auto_wrap_policy", min_num_params=500)
FSDP = dict(strategy=dict(type="FSDPStrategy", model_wrapper=dict(auto_wrap_policy=BY_SIZE)))


def run(cfg):
    """Train with the runner that the tools build, and return it."""
    runner = build_runner(cfg)
    runner.train()
    return runner


def runners(path):
    run(config(f"{path}/replicated"))
    whole = run(config(f"{path}/sharded", **copy.deepcopy(FSDP)))
    run(config(f"{path}/resumed", epochs=1, **copy.deepcopy(FSDP)))
    run(config(f"{path}/resumed", resume=True, **copy.deepcopy(FSDP)))
    return {
        "kind": type(whole).__name__,
        "lr": whole.optim_wrapper.get_lr()["lr"][0],
        "shards": sum(p.numel() for p in whole.model.parameters()),
    }


def work(rank, path):
    """The whole life of one process: every case in turn, results to a file."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=WORLD)
    results = {(norm, how): sharded(rank, norm, how) for norm in NORMS for how in (*SHARDED, *FULLY_SHARDED)}
    results |= {norm: replicated(rank, norm) for norm in NORMS}
    results["alone"] = alone(rank)
    results["runners"] = runners(path)
    torch.save(results, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder with what the runners wrote, and the results of each rank."""
    path = tmp_path_factory.mktemp("ranks")
    return path, run_ranks(work, path, WORLD)


@pytest.mark.slow
@pytest.mark.parametrize("how", [*SHARDED, *FULLY_SHARDED])
@pytest.mark.parametrize("norm", NORMS)
def test_sharding_changes_nothing(norm, how, ranks):
    for rank, results in enumerate(ranks[1]):
        losses, state = results[norm, how]
        want_losses, want = results[norm]
        torch.testing.assert_close(losses, want_losses, rtol=1e-5, atol=1e-7)
        assert state.keys() == want.keys()
        if rank == 0:  # buffers are each rank's own: those of rank 0 go into checkpoints
            torch.testing.assert_close(state, want, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_cbn_needs_the_convolution_in_its_unit(ranks):
    for results in ranks[1]:
        assert "make one unit of the convolution and the norm behind it" in results["alone"]


@pytest.mark.slow
def test_mmengines_strategy(ranks):
    """Weights are those of unsharded training, with clipping and accumulation; a resumed run goes on."""
    path, results = ranks
    assert {result["runners"]["kind"] for result in results} == {"FlexibleRunner"}
    assert sum(result["runners"]["shards"] for result in results) == sum(p.numel() for p in built("GN").parameters())
    want = torch.load(f"{path}/replicated/epoch_2.pth")
    for name in ("sharded", "resumed"):
        got = torch.load(f"{path}/{name}/epoch_2.pth")
        torch.testing.assert_close(dict(got["state_dict"]), dict(want["state_dict"]), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_the_learning_rate_follows_ranks_and_batch_but_not_accumulation(ranks):
    assert ranks[1][0]["runners"]["lr"] == 0.5 * (WORLD * 2) / 2


def test_shards_are_no_checkpoints():
    with pytest.raises(ValueError, match=r"state_dict_cfg='local'.*could not be resumed"):
        sharding.FSDPStrategy(state_dict_cfg="local")


def test_ranks_share_the_images_that_one_process_has(monkeypatch):
    def batches(rank, ranks, batch_size):
        monkeypatch.setattr("mmengine.dataset.sampler.get_dist_info", lambda: (rank, ranks))
        order = list(DefaultSampler(range(200), shuffle=True, seed=3))
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    dealt = zip(*(batches(rank, 4, 2) for rank in range(4)), strict=True)
    assert [sorted(chain(*parts)) for parts in dealt] == [sorted(batch) for batch in batches(0, 1, 8)]


# --- gradient accumulation


def micro_batches():
    return [torch.stack([picture(2 * n + i) for i in range(2)]).double() for n in range(4)]


def updated(norm, batches):
    """A model after one update by the gradients of all batches."""
    model = built(norm).double()
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), 0.1), accumulative_counts=len(batches))
    for x in batches:
        with wrapper.optim_context(model):
            loss = model(x)
        wrapper.update_params(loss)
    return model


@pytest.mark.parametrize("norm", NORMS)
def test_accumulation_is_a_larger_batch_for_norms_without_batch_statistics_alone(norm):
    models = built(norm).double(), updated(norm, micro_batches()), updated(norm, [torch.cat(micro_batches())])
    start, accumulated, joined = (parameters_to_vector(model.parameters()).detach() for model in models)
    wrong = (accumulated - joined).norm() / (joined - start).norm()
    if norm in ("GN", "GN+WS", "EvoNormS0", "FRN"):
        assert wrong < 1e-9
    else:
        assert wrong > 1e-3


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "CBN"])
def test_accumulation_updates_running_statistics_by_each_micro_batch(norm):
    got, mean, var = updated(norm, micro_batches()).stem.bn, torch.zeros(C).double(), torch.ones(C).double()
    for x in micro_batches():
        y = built(norm).double().stem.conv(x).transpose(0, 1).flatten(1)
        mean, var = 0.9 * mean + 0.1 * y.mean(1), 0.9 * var + 0.1 * y.var(1, correction=1)
    torch.testing.assert_close(got.running_mean, mean)
    torch.testing.assert_close(got.running_var, var)
    assert got.num_batches_tracked == 4


def test_the_window_of_cbn_counts_micro_batches():
    """With buffer_num=2 it joins three, and those exactly: within an update the weights stand still."""
    model, xs = built("CBN").double(), micro_batches()
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), 0.1), accumulative_counts=len(xs))
    seen = []
    model.stem.register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    before = copy.deepcopy(model.stem)
    for x in xs:
        wrapper.update_params(model(x))
    y = before.conv(torch.cat(xs[1:]))
    want = F.batch_norm(y, None, None, before.bn.weight, before.bn.bias, training=True).relu()
    torch.testing.assert_close(seen[-1], want[-2:])
    assert model.stem.bn.cbn_calls == 4  # so burnin counts them too


# --- the commands that the scripts build


def command(tmp_path, script, *args, **env):
    """What a script calls, with stand-ins for srun and python that write down their arguments."""
    for name in ("srun", "python"):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "tools" / script, *args], env=dict(PATH=path, **env), capture_output=True, text=True, check=True
    )
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize(("gpus", "per_node"), [("16", "8"), ("4", "4")])
def test_slurm(gpus, per_node, tmp_path):
    options = ["--amp", "--cfg-options", "a=1 2"]
    config = str(ROOT / "configs/digits/i3d_r18_gn_digits.py")
    got = command(tmp_path, "slurm_train.sh", "gpu", "job", config, "out", *options, GPUS=gpus, SRUN_ARGS="-x n1 -t 9")
    assert got == [
        *("srun", "--partition=gpu", "--job-name=job", f"--gres=gpu:{per_node}", f"--ntasks={gpus}"),
        *(f"--ntasks-per-node={per_node}", "--cpus-per-task=5", "--kill-on-bad-exit=1", "-x", "n1", "-t", "9"),
        *("python", "-u", f"{ROOT}/tools/train.py", config, "--work-dir=out", "--launcher=slurm", *options),
    ]


def test_several_nodes(tmp_path, monkeypatch):
    got = command(tmp_path, "dist_train.sh", "c.py", "8", "--amp")
    assert got == ["python", f"{ROOT}/tools/_launch.py", "train", "c.py", "8", "--amp"]
    met, flags = [], []
    monkeypatch.setattr(_launch, "meet", lambda *node: met.append(node))
    monkeypatch.setattr(_launch.run, "main", flags.extend)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    for name, value in dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="10.1.1.1", PORT="29501").items():
        monkeypatch.setenv(name, value)
    assert _launch.main(got[2:]) == 0
    assert met == [(2, 1, "10.1.1.1", 29501, 600)]
    assert flags == [
        *("--nnodes=2", "--node_rank=1", "--master_addr=10.1.1.1", "--master_port=29501", "--nproc_per_node=8"),
        *(f"{ROOT}/tools/train.py", "c.py", "--amp", "--launcher", "pytorch"),
    ]


# --- estimates

COCO_1X, KINETICS_EPOCH = 12 * 7330, 240_000 // 64  # 7330 iterations of 16 images are an epoch in the logs of mmdet


@pytest.mark.parametrize(
    ("name", "bound", "iterations", "seconds"),
    [
        ("mask-rcnn_r50_fpn_gn-all_2x_coco", "", 2 * COCO_1X, 0.309),
        ("mask-rcnn_r50_fpn_gn-head_8xb1-1x_coco", "≤ ", COCO_1X, 0.309),
        ("mask-rcnn_r101_fpn_gn-ws-all_2x_coco", "", 2 * COCO_1X, 0.309 * 1.3027 * 1.05),
        ("mask-rcnn_r50-scratch_fpn_gn-all_6x_coco", "", 73 * 7330, 0.338),
        ("i3d_r50_bn_8xb4-64x1x1-100e_kinetics400-rgb", "", 100 * KINETICS_EPOCH, 0.86),
        ("mask-rcnn_r50-scratch_fpn_syncbn-all_2x_coco", "–", 0, 0),
        ("mask-rcnn_r50_fpn_cbn-head_4xb4-1x_coco", "–", 0, 0),
    ],
)
def test_estimated_hours(name, bound, iterations, seconds):
    row = next(line for line in (ROOT / "docs/results.md").read_text().splitlines() if f"[{name}]" in line)
    cell = row.split(" | ")[2]
    assert cell.startswith(bound)
    if iterations:
        assert float(cell.removeprefix("≤ ")) == pytest.approx(iterations * seconds / 3600, rel=0.03)  # two digits
