"""The memory of a whole step of transformers' Llama over 2,048 tokens, and of one over eight times as many through
memkernels' layers and loss with what autograd saves on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from memkernels.bench import Benchmark, Case, Step
from memkernels.bench.offload import offloaded
from memkernels.bench.registry import load

LLAMA = load(Path(__file__).with_name("llama.py"))
SIZES = dict(LLAMA.cases[0].sizes)


def setup(case: Case, provider: str) -> Step:
    if provider == "eager":
        return LLAMA.setup(case, "eager")
    longer = replace(case, sizes=dict(case.sizes) | {"tokens": 8 * case.sizes["tokens"]})
    return offloaded(LLAMA.setup(longer, "memkernels-layer"))


benchmark = Benchmark(
    op="offload_context",
    cases=(Case("d1024-f2816-L6-V32000-T2048-x8", torch.bfloat16, SIZES | {"head": 1}),),
    providers=("eager", "memkernels-disk-x8"),
    setup=setup,
    modes=(),
)
