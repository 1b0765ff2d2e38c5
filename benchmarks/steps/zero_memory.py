"""Bytes that a rank of `ShardedOptimizer` with AdamW holds between backward and step, on 1, 2 and 4 ranks, against the
formulas of ZeRO: 50 million parameters in 12 layers, each of which is a bucket.

"measured" is the resident set above that of the same process without the model, less "buckets", the memory that is
kept for gradients on their way. "peak" is the highest moment of the next backward, buffers included. All are those of
the rank that has most.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from memkernels.bench import Benchmark, Case
from memkernels.optim import AdamW, ShardedOptimizer
from memkernels.testing import peak_bytes, run_in_child
from memkernels.testing.peak_memory import resident_bytes

LAYERS, WIDTH = 12, 2048
# States by state_bits, bytes a parameter; in 8 bits with 4 bytes for each 256.
STATES = {32: 8, 8: 2 + 8 / 256}
REMAINDER = 2  # of a bfloat16 parameter's float32 master


def formula(case: Case) -> int:
    """Rajbhandari et al. 2019, arXiv 1910.02054, with what AdamW keeps of a parameter here."""
    stage, ranks, of_one = case.sizes["stage"], case.sizes["ranks"], case.dtype.itemsize
    states = STATES[case.sizes["state_bits"]] + (REMAINDER if case.dtype == torch.bfloat16 else 0)
    whole, shared = {1: (2 * of_one, states), 2: (of_one, of_one + states), 3: (0, 2 * of_one + states)}[stage]
    return int(LAYERS * WIDTH**2 * (whole + shared / ranks))


def trained(case: Case, width: int, layers: int) -> tuple[torch.nn.Module, ShardedOptimizer, Callable[[], None]]:
    """A model after two steps, its optimizer, and its backward."""
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False, dtype=case.dtype) for _ in range(layers)))
    optimizer = ShardedOptimizer(
        model,
        AdamW,
        stage=case.sizes["stage"],
        bucket_bytes=width**2 * case.dtype.itemsize,
        reduce_dtype=torch.float32 if case.sizes["sent"] == 4 else torch.bfloat16,
        state_bits=case.sizes["state_bits"],
        rounding="remainder",
    )
    x = torch.ones(1, width, dtype=case.dtype)

    def backward() -> None:
        model(x).sum().backward()

    for _ in range(2):
        backward()
        optimizer.step()
    optimizer.wait()
    return model, optimizer, backward


def settled_bytes() -> int:
    """Memory in use once gloo's threads have let go of what they sent: a while after all ranks are there."""
    dist.barrier()
    time.sleep(1)
    return resident_bytes()


def hold(rank: int, store: str, label: str) -> dict[str, int]:
    """What a rank holds, in a process of its own."""
    case = benchmark.case(label)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=case.sizes["ranks"], timeout=timedelta(seconds=300)
    )
    small = trained(case, 256, 2)
    small[2]()
    before = settled_bytes()
    _, optimizer, backward = trained(case, WIDTH, LAYERS)
    backward()
    held, buckets = settled_bytes() - before, 0
    if case.sizes["stage"] < 3:
        buckets = sum(kept.nbytes for free in optimizer._reducer._buffers._free.values() for kept in free)
    peak = held + peak_bytes(backward)
    dist.barrier()
    return {"measured": held - buckets, "buckets": buckets, "peak": peak}


@functools.cache
def measure(label: str) -> dict[str, int]:
    """What the rank that has most holds."""
    ranks = benchmark.case(label).sizes["ranks"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(ranks) as pool:
        store = str(Path(folder) / "store")
        found = list(pool.map(lambda rank: run_in_child(hold, rank, store, label, timeout=600), range(ranks)))
    return {name: max(of_rank[name] for of_rank in found) for name in found[0]}


def held(case: Case, provider: str) -> int:
    return formula(case) if provider == "formula" else measure(case.label)[provider]


KINDS = (
    # name, dtype, stages, state_bits, bytes of an element on its way
    ("", torch.float32, (1, 2, 3), 32, 4),
    ("-8bit", torch.float32, (2,), 8, 4),
    ("", torch.bfloat16, (1, 2), 32, 2),
    ("-sent as float32", torch.bfloat16, (1, 2, 3), 32, 4),
)

benchmark = Benchmark(
    op="zero_memory",
    cases=tuple(
        Case(
            f"50M-stage{stage}{name}-{ranks} ranks",
            dtype,
            {"stage": stage, "ranks": ranks, "state_bits": bits, "sent": sent},
        )
        for name, dtype, stages, bits, sent in KINDS
        for stage in stages
        for ranks in (1, 2, 4)
    ),
    providers=("formula", "measured", "buckets", "peak"),
    held=held,
    baseline="formula",
    modes=(),
)
