"""Bytes that a rank of optim.ShardedOptimizer holds, against the formulas of ZeRO, with 50 million parameters."""

import ctypes
import json

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from memkernels import optim
from memkernels.optim.buckets import BUCKETS
from memkernels.testing.peak_memory import _RETURN_FREED_MEMORY, _status_bytes

MATRIX = 2048 * 2048
CASES = [
    # stage, dtype, options, bytes a parameter that every rank holds, and those that all share
    (1, torch.float32, {}, 4 + 4, 8),
    (2, torch.float32, {}, 4, 4 + 8),
    (2, torch.float32, {"state_bits": 8}, 4, 4 + 2 + 8 / 256),
    (2, torch.bfloat16, {"rounding": "remainder"}, 2, 2 + 2 + 8),
]


def resident():
    ctypes.CDLL(None).malloc_trim(0)
    return _status_bytes("VmRSS")


def held_bytes(folder, case):
    """Between backward and step, after a first step; above what the process had without the model."""
    stage, dtype, options, *_ = CASES[case]
    warm = torch.nn.Linear(256, 256)
    warm_optimizer = optim.ShardedOptimizer(warm, optim.AdamW, stage=stage, bucket_bytes=1 << 16, **options)
    for _ in range(2):
        warm(torch.ones(1, 256)).sum().backward()
        warm_optimizer.step()
    warm_optimizer.wait()
    dist.barrier()
    before = resident()
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False, dtype=dtype) for _ in range(12)))
    optimizer = optim.ShardedOptimizer(model, optim.AdamW, stage=stage, bucket_bytes=MATRIX * dtype.itemsize, **options)
    x = torch.ones(1, 2048, dtype=dtype)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
        optimizer.wait()
    model(x).sum().backward()
    held = resident() - before
    if dist.get_rank() == dist.get_world_size() - 1:
        (folder / f"{dist.get_world_size()}-{case}").write_text(json.dumps(held))


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_holds_what_the_formula_says(ranks, case, tmp_path, monkeypatch):
    for name, value in _RETURN_FREED_MEMORY.items():
        monkeypatch.setenv(name, value)
    run_ranks(held_bytes, ranks, tmp_path, tmp_path, case, seconds=300, start="spawn")
    stage, dtype, _, whole, shared = CASES[case]
    size = 12 * MATRIX
    # A bucket has one matrix. What is sent and received of two is kept while a third is filled; one rank receives none.
    matrix = MATRIX * dtype.itemsize
    buckets = (stage - 1 if ranks == 1 else BUCKETS[stage]) * matrix
    expected = size * (whole + shared / ranks)
    held = json.loads((tmp_path / f"{ranks}-{case}").read_text()) - buckets
    assert abs(held / expected - 1) < 0.03, (held, expected)
