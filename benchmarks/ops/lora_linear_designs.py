"""Ways to add an adapter's products to those of a frozen layer, forward and backward; docs/design/lora_linear.md.

base: y = x W^T and dx = dy W alone. separate: what memkernels ships, each of the adapter's products over all tokens.
token_tiles: all of them a tile of 1024 tokens at a time, so that y and dx are in cache when the adapter adds to them.
concatenated: [x, s] [W, B]^T and [dy, p] [W; A], one product each. merged: W + B A in the place of W, which leaves s
and p to the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from memkernels.bench import Benchmark, Case, Step, Work

TOKENS, SIZE, RANK, TILE = 4096, 1024, 16, 1024


class Adapted:
    """A layer's tensors, and each design as a method that returns y, dx and the gradients of A and B."""

    def __init__(self, case: Case):
        options = {"dtype": case.dtype, "device": case.device}
        self.x, self.dy = torch.randn(TOKENS, SIZE, **options), torch.randn(TOKENS, SIZE, **options)
        self.w = torch.randn(SIZE, SIZE, **options) * SIZE**-0.5
        # Small, so that the providers, base among them, agree on y and dx.
        self.a = torch.randn(RANK, SIZE, **options) * 1e-3
        self.b = torch.randn(SIZE, RANK, **options) * 1e-3

    def base(self):
        return self.x @ self.w.t(), self.dy @ self.w

    def separate(self):
        s, y = self.x @ self.a.t(), self.x @ self.w.t()
        y.addmm_(s, self.b.t())
        p, _ = self.dy @ self.b, self.dy.t() @ s
        dx = (self.dy @ self.w).addmm_(p, self.a)
        p.t() @ self.x
        return y, dx

    def token_tiles(self):
        y, dx = torch.empty_like(self.dy), torch.empty_like(self.x)
        da, db = torch.zeros_like(self.a), torch.zeros_like(self.b)
        s = self.x.new_empty(TOKENS, RANK)
        for first in range(0, TOKENS, TILE):
            rows = slice(first, first + TILE)
            torch.mm(self.x[rows], self.a.t(), out=s[rows])
            torch.mm(self.x[rows], self.w.t(), out=y[rows])
            y[rows].addmm_(s[rows], self.b.t())
        for first in range(0, TOKENS, TILE):
            rows = slice(first, first + TILE)
            p = self.dy[rows] @ self.b
            db.addmm_(self.dy[rows].t(), s[rows])
            torch.mm(self.dy[rows], self.w, out=dx[rows])
            dx[rows].addmm_(p, self.a)
            da.addmm_(p.t(), self.x[rows])
        return y, dx

    def concatenated(self):
        s = self.x @ self.a.t()
        y = torch.cat([self.x, s], 1) @ torch.cat([self.w, self.b], 1).t()
        p, _ = self.dy @ self.b, self.dy.t() @ s
        dx = torch.cat([self.dy, p], 1) @ torch.cat([self.w, self.a])
        p.t() @ self.x
        return y, dx

    def merged(self):
        w = torch.addmm(self.w, self.b, self.a)
        s, y = self.x @ self.a.t(), self.x @ w.t()
        p, _ = self.dy @ self.b, self.dy.t() @ s
        p.t() @ self.x
        return y, self.dy @ w


def setup(case: Case, provider: str) -> Step:
    return Step(getattr(Adapted(case), provider))


def work(case: Case, mode: str) -> Work:
    """The products of the base layer with the gradient of its input."""
    return Work(flops=2 * 2 * TOKENS * SIZE**2)


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(f"T{TOKENS}-K{SIZE}-N{SIZE}-r{RANK}", dtype)


benchmark = Benchmark(
    op="lora_linear_designs",
    cases=tuple(cases()),
    providers=("base", "separate", "token_tiles", "concatenated", "merged"),
    setup=setup,
    work=work,
    baseline="base",
    modes=("forward",),
)
