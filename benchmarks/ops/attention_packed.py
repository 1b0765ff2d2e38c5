"""Packed sequences of uneven length in one call, against one call for each of them."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch

from memkernels.bench import Benchmark, Case, Step
from memkernels.ops import attention

LENGTHS = (1531, 64, 905, 17, 377, 1201)


def setup(case: Case, provider: str) -> Step:
    starts = [0, *accumulate(LENGTHS)]
    q, k, v = (
        torch.randn(starts[-1], 8, 64, dtype=case.dtype, device=case.device, requires_grad=True) for _ in range(3)
    )
    if provider == "packed":
        cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=case.device)
        options = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        options |= {"max_seqlen_q": max(LENGTHS), "max_seqlen_k": max(LENGTHS)}
        return Step(lambda: attention(q, k, v, causal=True, **options), (q, k, v))

    def parts() -> torch.Tensor:
        outs = [attention(*(x[None, a:b] for x in (q, k, v)), causal=True)[0] for a, b in pairwise(starts)]
        return torch.cat(outs)

    return Step(parts, (q, k, v))


benchmark = Benchmark(
    op="attention_packed",
    cases=tuple(Case("6 sequences-H8-D64", dtype) for dtype in (torch.float32, torch.bfloat16)),
    providers=("parts", "packed"),
    setup=setup,
    baseline="parts",
    modes=("full",),
)
