"""Several ranks on one machine: they start once for all tests of a file, and leave what they found in files."""

import multiprocessing

import torch
import torch.multiprocessing as mp


def run_ranks(work, path, world, weights_only=True):
    """Run work(rank, path), which saves path/rank.pt, in a process for each rank; return what they saved."""
    # The server imports once what its children, the ranks, then have; they are forks of it, not of this process.
    multiprocessing.set_forkserver_preload([work.__module__])
    mp.start_processes(work, (path,), nprocs=world, start_method="forkserver")
    return [torch.load(f"{path}/{rank}.pt", weights_only=weights_only) for rank in range(world)]
