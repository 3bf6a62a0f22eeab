"""Distributed training where there is no accelerator: mmengine's own launchers, over gloo."""

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from mmengine.device import get_device
from mmengine.dist import init_dist
from mmengine.dist import utils as dist_utils
from mmengine.model import BaseModel, MMDistributedDataParallel, MMSeparateDistributedDataParallel
from torch import nn

import normplug  # noqa: F401
from normplug.openmmlab import distributed

pytestmark = pytest.mark.skipif(get_device() != "cpu", reason="there is no gap: mmengine sees an accelerator here")


@pytest.fixture
def rank_0_of_1(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, mode="loss"):
        return {"loss": self.layer(x).sum()}


def test_the_gap(rank_0_of_1):
    """What happens without the repair: both functions below it, called as mmengine wrote them."""
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA|cuda"):
        dist_utils._init_dist_pytorch.__wrapped__(backend="gloo")
    dist.init_process_group("gloo")
    wrapper = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
    with pytest.raises(ValueError, match="device_ids"):
        MMDistributedDataParallel.__init__.__wrapped__(wrapper, Model(), device_ids=[0])


@pytest.mark.parametrize(("backend", "used"), [("nccl", "gloo"), ("gloo", "gloo")])
def test_the_launcher_and_ddp_run_on_the_cpu(rank_0_of_1, backend, used):
    select = torch.cuda.set_device
    init_dist("pytorch", backend=backend, timeout=60)
    assert dist.get_backend() == used
    assert torch.cuda.set_device is select
    for wrapper in (MMDistributedDataParallel, MMSeparateDistributedDataParallel):
        model = wrapper(module=Model(), device_ids=[0], broadcast_buffers=False)
        ddp = model if wrapper is MMDistributedDataParallel else model.module.layer
        assert ddp.device_ids is None
        ddp(torch.ones(1, 2)) if ddp is not model else model(torch.ones(1, 2))["loss"].backward()


def test_slurm_too(rank_0_of_1, monkeypatch):
    for name, value in dict(SLURM_PROCID=0, SLURM_NTASKS=1, SLURM_NODELIST="here", SLURM_LOCALID=0).items():
        monkeypatch.setenv(name, str(value))
    init_dist("slurm", backend="nccl")
    assert (dist.get_backend(), dist.get_world_size()) == ("gloo", 1)


TRAIN = """
import os
import sys
import torch
from mmengine.config import Config
from mmengine.dist import all_gather
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner

cfg = Config.fromfile(sys.argv[1])  # its custom_imports names normplug; nothing here does

@MODELS.register_module()
class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x, mode):
        return {"loss": (self.layer(torch.stack(x)) - 1).square().mean()}

@DATASETS.register_module()
class Points(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return {"x": torch.tensor([i / 8, 1.0])}

runner = Runner.from_cfg(cfg)
runner.train()
weights = torch.cat([p.flatten() for p in runner.model.parameters()]).detach()
first, second = all_gather(weights)
seen = runner.train_dataloader.sampler.num_samples
line = f"ranks agree: {torch.equal(first, second)} world: {runner.world_size} samples: {seen}\\n"
os.write(1, line.encode())  # one system call: the ranks share stdout, and print writes word by word
"""

CONFIG = """
custom_imports = dict(imports=["normplug"])
model = dict(type="Model")
train_dataloader = dict(
    dataset=dict(type="Points"), sampler=dict(type="DefaultSampler", shuffle=True), batch_size=2, num_workers=0
)
train_cfg = dict(by_epoch=True, max_epochs=2)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1))
env_cfg = dict(dist_cfg=dict(backend="nccl"))
launcher = "pytorch"
work_dir = "work"
"""


@pytest.mark.slow
def test_torchrun_trains_on_two_processes(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "config.py").write_text(CONFIG)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "train.py", "config.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ranks agree: True world: 2 samples: 4") == 2
    assert (tmp_path / "work" / "epoch_2.pth").exists()


@pytest.mark.parametrize("attempt", [0, 1, 2])
def test_processes_of_another_attempt_meet_in_a_store_of_their_own(monkeypatch, attempt):
    """torchrun keeps its store: what processes wrote there before they were started again leads nowhere."""
    told = {}
    store = dist.HashStore()
    store.set("0", "the address of a dead process")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    monkeypatch.setattr(distributed, "rendezvous", lambda address: iter([(store, 1, 2)]))
    distributed._meets_anew(lambda backend, **kwargs: told.update(kwargs))("gloo", init_backend="torch")
    if attempt == 0:
        assert told == {"init_backend": "torch"}
        return
    assert (told["rank"], told["world_size"]) == (1, 2)
    assert not told["store"].check(["0"])
    told["store"].set("0", "mine")
    assert store.get("0") == b"the address of a dead process"


def test_a_store_of_the_users_is_left_alone(monkeypatch):
    told = {}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    distributed._meets_anew(lambda backend, **kwargs: told.update(kwargs))("gloo", init_method="file:///x")
    assert told == {"init_method": "file:///x"}
