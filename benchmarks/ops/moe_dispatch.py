"""Tokens to their experts and back, without the experts: `index_select` and `index_add_` against the ops.

The plan is made within what is measured: by a sort there, by a counting sort here. What the
number of experts costs, `moe_dispatch_experts` shows.
"""

from __future__ import annotations

import torch

from memkernels.bench import Benchmark, Case, Step, Work

D, K = 512, 2


def eager(x, ids, weights):
    order = ids.flatten().argsort(stable=True)
    tokens = order // K
    grouped = x.index_select(0, tokens)
    weighted = grouped * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add_(0, tokens, weighted)


def setup(case: Case, provider: str) -> Step:
    tokens, experts = case.sizes["tokens"], case.sizes["experts"]
    x = torch.randn(tokens, D, dtype=case.dtype, device=case.device).requires_grad_()
    weights, ids = torch.randn(tokens, experts, device=case.device).softmax(1).topk(K, dim=1)
    weights = weights.to(case.dtype).requires_grad_()
    if provider == "eager":
        return Step(lambda: eager(x, ids, weights), (x, weights))
    from memkernels import ops

    def step():
        grouped, plan = ops.moe_dispatch(x, ids, experts)
        return ops.moe_combine(grouped, plan, weights)

    return Step(step, (x, weights))


def work(case: Case, mode: str) -> Work:
    """Forward reads x, writes and reads the grouped rows, writes y; backward the same, and reads the rows again."""
    row = case.sizes["tokens"] * D * case.dtype.itemsize
    moved = {"forward": (2 + 2 * K) * row, "backward": (2 + 3 * K) * row}
    moved["full"] = moved["forward"] + moved["backward"]
    return Work(bytes=moved[mode])


benchmark = Benchmark(
    op="moe_dispatch",
    cases=tuple(
        Case(f"T8192-d{D}-E{experts}-k{K}", dtype, {"tokens": 8192, "experts": experts})
        for dtype in (torch.bfloat16, torch.float32)
        for experts in (8, 256)
    ),
    providers=("eager", "memkernels"),
    setup=setup,
    work=work,
)
