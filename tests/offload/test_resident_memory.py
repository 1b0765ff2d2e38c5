"""offload_activations: the memory of a step, and of many."""

import contextlib
import ctypes
import functools
import gc
from pathlib import Path

import pytest
import torch
from offloaded_model import batch, build, disk, step
from torch import nn

from memkernels.offload import offload_activations
from memkernels.testing import peak_bytes, run_in_child

pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")

MB = 1 << 20
PR_SET_THP_DISABLE = 41  # of Linux's prctl


def peaks(path):
    """Of steps of 20 products whose results of 16 MB are kept for backward, in memory and on disk; of 10 on disk.

    Each has staging blocks of its own, which its peak counts.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(20)))
    x = torch.randn(16384, 256)
    on_disk = functools.partial(offload_activations, "disk", path=path, max_host_bytes=48 * MB, keep_last_layers=0)

    def run(model, context):
        with context():
            loss = model(x).square().mean()
        loss.backward()

    found = []
    for layers, context in ((10, on_disk), (20, on_disk), (20, contextlib.nullcontext)):
        run(model[:layers], context)
        found.append(peak_bytes(functools.partial(run, model[:layers], context)))
    return found


def test_the_disk_tier_frees_memory(tmp_path):
    few, many, plain = run_in_child(peaks, str(tmp_path))
    assert plain > 20 * 16 * MB
    assert many < 0.4 * plain and many < few + 16 * MB


def grow_over_steps(path, steps):
    """How resident memory, but for that of files, grows relatively after the first tenth of the steps.

    Without what was freed but kept by malloc, which a busy machine's slower writes raise once, and without huge pages,
    which the kernel may put where a few small ones were.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    model, x, offload = build(layers=2), batch(tokens=32), disk(path)

    def resident():
        gc.collect()
        libc.malloc_trim(0)
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0])

    first = 0
    for i in range(steps):
        step(model, x, offload)
        if i == steps // 10:
            first = resident()
    return resident() / first - 1


@pytest.mark.parametrize("steps", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_resident_memory_stays_flat(steps, tmp_path):
    assert run_in_child(grow_over_steps, str(tmp_path), steps) < 0.01
