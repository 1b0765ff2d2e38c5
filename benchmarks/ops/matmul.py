"""Products of matrices: the ops' own against torch's, in the three layouts of a linear layer's step.

`forward` is x W^T, `input` dy W and `weight` dy^T x. On GPUs, and on CPUs where csrc/cpu/matmul.cpp is not taken, both
are torch's.
"""

from __future__ import annotations

import torch

from memkernels.bench import Benchmark, Case, Step, Work
from memkernels.ops.matmul import mm

# Tokens, in, out: projections of a Llama's layer, an expert's part of the tokens, a tile of a vocabulary's head.
SHAPES = {
    "attention": (2048, 1024, 1024),
    "mlp": (2048, 1024, 2816),
    "expert": (512, 512, 2048),
    "head": (4096, 1024, 4096),
}
PRODUCTS = ("forward", "input", "weight")


def operands(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, size_in, size_out = (case.sizes[name] for name in ("tokens", "in", "out"))
    x, w, dy = (
        torch.randn(*size, dtype=case.dtype, device=case.device)
        for size in ((tokens, size_in), (size_out, size_in), (tokens, size_out))
    )
    return [(x, w.t()), (dy, w), (dy.t(), x)][case.sizes["product"]]


def setup(case: Case, provider: str) -> Step:
    a, b = operands(case)
    product = torch.mm if provider == "torch" else mm
    return Step(lambda: product(a, b))


def work(case: Case, mode: str) -> Work:
    return Work(flops=2 * case.sizes["tokens"] * case.sizes["in"] * case.sizes["out"])


benchmark = Benchmark(
    op="matmul",
    cases=tuple(
        Case(f"{name}-{product}", dtype, {"tokens": tokens, "in": size_in, "out": size_out, "product": i})
        for dtype in (torch.bfloat16, torch.float32)
        for name, (tokens, size_in, size_out) in SHAPES.items()
        for i, product in enumerate(PRODUCTS)
    ),
    providers=("torch", "memkernels"),
    setup=setup,
    work=work,
    baseline="torch",
    modes=("forward",),
)
