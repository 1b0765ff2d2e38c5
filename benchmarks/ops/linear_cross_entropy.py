"""The head and its loss: eager torch with whole logits, torch.compile of it, torch's own chunks, memkernels.

Liger-Kernel and cut-cross-entropy are missing on CPU: their kernels are Triton's, and find no driver there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from memkernels.bench import Benchmark, Case, Step, Work

GEMMS = {"forward": 1, "full": 3}


def eager(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, weight), target)


def chunked_torch(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def setup(case: Case, provider: str) -> Step:
    tokens, width, vocab = (case.sizes[name] for name in ("tokens", "width", "vocab"))
    x = torch.randn(tokens, width, dtype=case.dtype, device=case.device, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=case.dtype, device=case.device).mul_(width**-0.5).requires_grad_()
    target = torch.randint(vocab, (tokens,), device=case.device)
    if provider == "memkernels":
        from memkernels.ops import linear_cross_entropy as function
    elif provider == "torch":
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise ImportError("torch 2.13 and newer have linear_cross_entropy")
        function = chunked_torch
    else:
        function = torch.compile(eager) if provider == "compile" else eager
    return Step(lambda: function(x, weight, target), (x,), (weight,))


def work(case: Case, mode: str) -> Work:
    """The products that keep the logits; what is recomputed is not counted as work."""
    sizes = case.sizes
    return Work(flops=GEMMS[mode] * 2 * sizes["tokens"] * sizes["width"] * sizes["vocab"])


def cases() -> Iterator[Case]:
    for tokens, vocab, dtype in (
        (4096, 128256, torch.bfloat16),
        (2048, 32000, torch.bfloat16),
        (2048, 32000, torch.float32),
    ):
        name = f"T{tokens}-d1024-V{vocab}"
        yield Case(name, dtype, {"tokens": tokens, "width": 1024, "vocab": vocab})


benchmark = Benchmark(
    op="linear_cross_entropy",
    cases=tuple(cases()),
    providers=("eager", "compile", "torch", "memkernels"),
    setup=setup,
    work=work,
    modes=("forward", "full"),
)
