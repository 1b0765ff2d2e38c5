"""Several processes of one machine as the ranks of a gloo group, for a bounded time."""

import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from one process that has imported these, which takes each of them seconds otherwise.
mp.get_context("forkserver").set_forkserver_preload(
    ["torch.distributed.checkpoint", "torch.distributed.fsdp", "memkernels.optim.sharded"]
)


def run_ranks(function, world, folder, *arguments, seconds=600, start="forkserver"):
    """function(*arguments) on each of `world` new processes; raises what the first to fail raises, and leaves none.

    By start="spawn" they have the environment of now.
    """
    arguments = (function, world, f"{tempfile.mkdtemp(dir=folder)}/store", arguments)
    context = mp.start_processes(_run, arguments, nprocs=world, join=False, start_method=start)
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{function.__name__}: ranks still run after {seconds} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _run(rank, function, world, store, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    function(*arguments)
    dist.barrier()
    dist.destroy_process_group()
