"""Distributed training on machines without an accelerator, and after torchrun has restarted it.

mmengine's launchers select a CUDA device and its Runner names one to DistributedDataParallel, both without
asking whether there is any. Where there is none, ``torchrun ... --launcher pytorch`` then trains on the CPU.

``torchrun --max-restarts`` keeps one store for all attempts (torch 2.14), in which processes of the second find the
addresses of those of the first, which are dead, and sometimes end with "Connection refused".
"""

import functools
import os

import torch
from mmengine.device import get_device
from mmengine.dist import utils as dist_utils
from mmengine.model import MMDistributedDataParallel
from torch.distributed import PrefixStore
from torch.distributed.rendezvous import rendezvous

from normplug.openmmlab._stand_ins import tell

__all__ = ["install"]

LAUNCHERS = ("_init_dist_pytorch", "_init_dist_slurm", "_init_dist_mpi")
CPU_BACKENDS = ("gloo", "mpi", "ucc")


def install() -> None:
    """Make the launchers meet anew after a restart, and them and DDP work where mmengine sees nothing but the CPU."""
    if not hasattr(dist_utils._init_dist_pytorch, "__wrapped__"):
        dist_utils._init_dist_pytorch = _meets_anew(dist_utils._init_dist_pytorch)
    if get_device() != "cpu" or hasattr(MMDistributedDataParallel.__init__, "__wrapped__"):
        return
    for name in LAUNCHERS:
        setattr(dist_utils, name, _over_gloo(getattr(dist_utils, name)))
    MMDistributedDataParallel.__init__ = _without_device_ids(MMDistributedDataParallel.__init__)


def _meets_anew(launch):
    @functools.wraps(launch)
    def launch_attempt(backend, **kwargs):
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        is_plain = kwargs.get("init_backend", "torch") == "torch" and not {"store", "init_method"} & kwargs.keys()
        if attempt and is_plain and get_device() in ("cpu", "cuda"):
            store, rank, world_size = next(rendezvous("env://"))
            kwargs |= dict(store=PrefixStore(f"attempt_{attempt}", store), rank=rank, world_size=world_size)
        return launch(backend, **kwargs)

    return launch_attempt


def _over_gloo(launch):
    @functools.wraps(launch)
    def launch_on_cpu(backend, **kwargs):
        cpu_backend = backend if backend in CPU_BACKENDS else "gloo"
        tell(f"normplug: no accelerator here; processes talk over {cpu_backend} (config: {backend})")
        select, torch.cuda.set_device = torch.cuda.set_device, lambda device: None
        try:
            return launch(cpu_backend, **kwargs)
        finally:
            torch.cuda.set_device = select

    return launch_on_cpu


def _without_device_ids(init):
    @functools.wraps(init)
    def init_on_cpu(self, module, *args, **kwargs):
        # The Runner says device_ids=[LOCAL_RANK]; DDP takes none for a module on the CPU.
        if all(parameter.device.type == "cpu" for parameter in module.parameters()):
            kwargs.update(device_ids=None, output_device=None)
        init(self, module, *args, **kwargs)

    return init_on_cpu
