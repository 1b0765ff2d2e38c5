"""Forward and backward of a long sequence through transformers' Llama, as it is and with what autograd
saves on disk.

"disk" leaves what the last layer and the loss save in memory, as `offload_activations` does by default; "disk-all" does
not.
"""

from __future__ import annotations

from pathlib import Path

import torch

from memkernels.bench import Benchmark, Case, Step
from memkernels.bench.offload import offloaded
from memkernels.bench.registry import load
from memkernels.bench.timer import Plan

LLAMA = load(Path(__file__).with_name("llama.py"))
SIZES = dict(LLAMA.cases[0].sizes) | {"tokens": 8192}


def setup(case: Case, provider: str) -> Step:
    step = LLAMA.setup(case, "eager")
    return step if provider == "eager" else offloaded(step, keep_last_layers=0 if provider == "disk-all" else 1)


benchmark = Benchmark(
    op="offload",
    cases=(
        Case("d1024-f2816-L6-V32000-T8192", torch.bfloat16, SIZES | {"head": 1}),
        Case("d1024-f2816-L6-T8192-layers", torch.bfloat16, SIZES | {"head": 0}),
    ),
    providers=("eager", "disk", "disk-all"),
    setup=setup,
    work=LLAMA.work,
    modes=("full",),
    plan=Plan(budget=0, least=2, warmup=1),
)
