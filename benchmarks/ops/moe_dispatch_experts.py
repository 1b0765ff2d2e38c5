"""What the number of experts costs a dispatch and combine: 8 experts against 256 at the same T k, in one run.

A token's weights sum to one, so that y is x whatever its experts are, and the two can be compared.
"""

from __future__ import annotations

import torch

from memkernels import ops
from memkernels.bench import Benchmark, Case, Step
from memkernels.bench.timer import Plan

D, K = 512, 2
EXPERTS = {"8 experts": 8, "256 experts": 256}


def setup(case: Case, provider: str) -> Step:
    tokens, experts = case.sizes["tokens"], EXPERTS[provider]
    x = torch.randn(tokens, D, dtype=case.dtype, device=case.device).requires_grad_()
    logits, ids = torch.randn(tokens, experts, device=case.device).topk(K, dim=1)
    weights = logits.softmax(1).to(case.dtype).requires_grad_()

    def step():
        grouped, plan = ops.moe_dispatch(x, ids, experts)
        return ops.moe_combine(grouped, plan, weights)

    return Step(step, (x, weights))


benchmark = Benchmark(
    op="moe_dispatch_experts",
    cases=tuple(Case(f"T8192-d{D}-k{K}", dtype, {"tokens": 8192}) for dtype in (torch.bfloat16, torch.float32)),
    providers=tuple(EXPERTS),
    setup=setup,
    baseline="8 experts",
    plan=Plan(budget=20, most=2000),
)
