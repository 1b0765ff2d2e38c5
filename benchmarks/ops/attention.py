"""Causal attention, also with a window: torch's scaled_dot_product_attention and memkernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from memkernels.bench import Benchmark, Case, Step, Work


def setup(case: Case, provider: str) -> Step:
    length, heads, size, window = (case.sizes[name] for name in ("length", "heads", "head_dim", "window"))
    q, k, v = (
        torch.randn(1, length, heads, size, dtype=case.dtype, device=case.device, requires_grad=True) for _ in range(3)
    )
    if provider == "memkernels":
        from memkernels.ops import attention

        return Step(lambda: attention(q, k, v, causal=True, window=(window, 0)), (q, k, v))
    mask = None
    if window >= 0:  # torch has no window: its users give a mask
        position = torch.arange(length, device=case.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance <= window)

    def sdpa() -> torch.Tensor:
        heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, is_causal=mask is None)
        return out.transpose(1, 2)

    return Step(sdpa, (q, k, v))


def work(case: Case, mode: str) -> Work:
    """Two products forward and five backward over the visible half, or band, of the score matrix."""
    length, window = case.sizes["length"], case.sizes["window"]
    seen = length * length // 2 if window < 0 else length * (window + 1)
    products = {"forward": 2, "backward": 5, "full": 7}[mode]
    return Work(flops=2 * products * seen * case.sizes["head_dim"] * case.sizes["heads"])


def cases() -> Iterator[Case]:
    for length, size, dtype in itertools.product((2048, 8192), (64, 128), (torch.float32, torch.bfloat16)):
        yield Case(f"S{length}-H8-D{size}", dtype, {"length": length, "heads": 8, "head_dim": size, "window": -1})
    for dtype in (torch.float32, torch.bfloat16):
        sizes = {"length": 8192, "heads": 8, "head_dim": 64, "window": 512}
        yield Case("S8192-H8-D64-window512", dtype, sizes)


benchmark = Benchmark(
    op="attention",
    cases=tuple(cases()),
    providers=("sdpa", "memkernels"),
    setup=setup,
    work=work,
    baseline="sdpa",
    modes=("forward", "full"),
)
