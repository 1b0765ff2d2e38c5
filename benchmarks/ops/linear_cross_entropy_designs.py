"""Two designs of linear cross-entropy that never hold all logits; docs/design/linear_cross_entropy.md weighs them.

token_chunks: the gradients are made in forward, chunk of tokens by chunk, three products in all; the weight's is summed
over the chunks in float32 and kept until backward. vocabulary_tiles: what memkernels ships.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from memkernels.bench import Benchmark, Case, Step
from memkernels.ops import linear_cross_entropy

CHUNK_TOKENS = 512
PRODUCT_ROWS = 4096


class TokenChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, target):
        vocab = len(weight)
        losses = x.new_empty(len(x), dtype=torch.float32)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        product = weight.new_empty(PRODUCT_ROWS, weight.shape[1])
        for start in range(0, len(x), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            labels, logits = target[rows], x[rows] @ weight.t()
            row_max = torch.full_like(losses[rows], -torch.inf)
            row_sum, at_target, logit_sum = torch.zeros_like(row_max).repeat(3, 1).unbind()
            stats = (row_max, row_sum, at_target, logit_sum)
            torch.ops.memkernels.cross_entropy_stats(logits, labels, 0, vocab, -100, 0.0, *stats)
            losses[rows] = row_max + row_sum.log() - at_target
            row_stats = (row_max, row_sum, torch.full_like(row_max, 1 / len(x)))
            torch.ops.memkernels.cross_entropy_grad_(logits, labels, 0, vocab, *row_stats, -100, 0.0, 0.0, 0.0)
            torch.mm(logits, weight, out=dx[rows])
            for sums, columns in zip(dweight.split(PRODUCT_ROWS), logits.split(PRODUCT_ROWS, 1), strict=True):
                sums.add_(torch.mm(columns.t(), x[rows], out=product[: len(sums)]))
        ctx.save_for_backward(dx, dweight.to(weight.dtype))
        return losses.mean()

    @staticmethod
    def backward(ctx, grad_loss):
        dx, dweight = ctx.saved_tensors
        return dx * grad_loss, dweight * grad_loss, None


def setup(case: Case, provider: str) -> Step:
    tokens, width, vocab = (case.sizes[name] for name in ("tokens", "width", "vocab"))
    x = torch.randn(tokens, width, dtype=case.dtype, device=case.device, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=case.dtype, device=case.device).mul_(width**-0.5).requires_grad_()
    target = torch.randint(vocab, (tokens,), device=case.device)
    function = {"token_chunks": TokenChunks.apply, "vocabulary_tiles": linear_cross_entropy}[provider]
    return Step(lambda: function(x, weight, target), (x,), (weight,))


def cases() -> Iterator[Case]:
    for tokens, vocab, dtype in (
        (4096, 128256, torch.bfloat16),
        (2048, 32000, torch.bfloat16),
        (2048, 32000, torch.float32),
    ):
        name = f"T{tokens}-d1024-V{vocab}"
        yield Case(name, dtype, {"tokens": tokens, "width": 1024, "vocab": vocab})


benchmark = Benchmark(
    op="linear_cross_entropy_designs",
    cases=tuple(cases()),
    providers=("token_chunks", "vocabulary_tiles"),
    setup=setup,
    baseline="token_chunks",
    modes=("full",),
)
