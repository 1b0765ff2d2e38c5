"""Memory of causal attention beyond what any implementation needs, as sequences grow.

"results" computes nothing: it allocates out, lse and the three gradients, all there at once. What another provider
takes above it is its transient memory.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch

from memkernels.bench import Benchmark, Case, Step


class _Results(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.ones_like(q)
        ctx.save_for_backward(q, k, v, out, torch.ones(q.shape[:-1], device=q.device))
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, _out, _lse = ctx.saved_tensors
        return tuple(torch.ones_like(tensor) for tensor in (q, k, v))  # ones are written, zeros might not be


def setup(case: Case, provider: str) -> Step:
    shape = 1, case.sizes["length"], 8, 64
    q, k, v = (torch.randn(shape, dtype=case.dtype, device=case.device, requires_grad=True) for _ in range(3))
    if provider == "results":
        return Step(lambda: _Results.apply(q, k, v), (q, k, v))
    if provider == "memkernels":
        from memkernels.ops import attention

        return Step(partial(attention, q, k, v, causal=True), (q, k, v))

    def sdpa() -> torch.Tensor:
        heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    return Step(sdpa, (q, k, v))


benchmark = Benchmark(
    op="attention_memory",
    cases=tuple(
        Case(f"S{length}-H8-D64", dtype, {"length": length})
        for length, dtype in product((4096, 8192, 16384), (torch.float32, torch.bfloat16))
    ),
    providers=("results", "sdpa", "memkernels"),
    setup=setup,
    baseline="results",
    modes=(),
)
