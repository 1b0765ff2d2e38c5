"""Rotary embedding of q and k: Hugging Face's formula in eager torch, torch.compile of it, memkernels."""

from __future__ import annotations

import torch

from memkernels.bench import Benchmark, Case, Step, Work


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def eager(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def setup(case: Case, provider: str) -> Step:
    batch, length, width = (case.sizes[name] for name in ("batch", "length", "head_dim"))
    options = {"dtype": case.dtype, "device": case.device}
    q, k = (
        torch.randn(batch, length, case.sizes[heads], width, requires_grad=True, **options)
        for heads in ("q_heads", "k_heads")
    )
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=case.device) / width)
    angle = torch.outer(torch.arange(length, device=case.device), frequency).repeat(1, 2).expand(batch, -1, -1)
    cos, sin = angle.cos().to(case.dtype), angle.sin().to(case.dtype)
    if provider == "memkernels":
        from memkernels.ops import apply_rotary

        return Step(lambda: apply_rotary(q, k, cos, sin), (q, k))
    function = {"eager": eager, "compile": torch.compile(eager)}[provider]
    return Step(lambda: function(q, k, cos, sin), (q, k))


def work(case: Case, mode: str) -> Work:
    """Each pass reads q and k, or their gradients, and writes as much; cos and sin are read once."""
    sizes = case.sizes
    per_head = sizes["batch"] * sizes["length"] * sizes["head_dim"]
    elements = 2 * per_head * (sizes["q_heads"] + sizes["k_heads"]) + 2 * per_head
    return Work(bytes=(2 if mode == "full" else 1) * elements * case.dtype.itemsize)


SIZES = {"batch": 2, "length": 2048, "q_heads": 16, "k_heads": 4, "head_dim": 64}

benchmark = Benchmark(
    op="rotary",
    cases=tuple(Case("B2-S2048-H16/4-D64", dtype, SIZES) for dtype in (torch.float32, torch.bfloat16)),
    providers=("eager", "compile", "memkernels"),
    setup=setup,
    work=work,
)
