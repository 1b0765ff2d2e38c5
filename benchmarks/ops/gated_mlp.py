"""The gated MLP, mostly with the norm in front: Hugging Face's layers in eager torch, torch.compile, memkernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from memkernels.bench import Benchmark, Case, Step, Work

EPS = 1e-6
GEMMS = {"forward": 3, "backward": 6, "full": 9}


def eager(x, w_gate, w_up, w_down, norm_weight=None):
    normed = x
    if norm_weight is not None:
        hidden = x.float()
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)
        normed = norm_weight * hidden.to(x.dtype)
    linear = torch.nn.functional.linear
    return linear(torch.nn.functional.silu(linear(normed, w_gate)) * linear(normed, w_up), w_down)


def setup(case: Case, provider: str) -> Step:
    tokens, d, f = (case.sizes[name] for name in ("tokens", "hidden", "intermediate"))
    shapes = ((tokens, d), (f, d), (f, d), (d, f), *([(d,)] if case.sizes["norm"] else []))
    tensors = [
        (torch.randn(shape, dtype=case.dtype, device=case.device) * shape[-1] ** -0.5).requires_grad_()
        for shape in shapes
    ]
    x, *weights = tensors
    if provider == "memkernels":
        from memkernels.ops import gated_mlp

        tile, norm_weight = case.sizes["tile"] or None, weights[3] if case.sizes["norm"] else None
        return Step(
            lambda: gated_mlp(x, *weights[:3], norm_weight=norm_weight, norm_eps=EPS, tile_tokens=tile),
            (x,),
            tuple(weights),
        )
    function = {"eager": eager, "compile": torch.compile(eager)}[provider]
    return Step(lambda: function(x, *weights), (x,), tuple(weights))


def work(case: Case, mode: str) -> Work:
    """The products that keep gate and up; what memkernels recomputes is not counted as work."""
    tokens, d, f = (case.sizes[name] for name in ("tokens", "hidden", "intermediate"))
    return Work(flops=GEMMS[mode] * 2 * tokens * d * f)


def cases() -> Iterator[Case]:
    """Sizes by the default tile, then sizes by other tiles, what tiling costs and saves, and one without the norm."""
    for tokens, tile, norm, dtype in (
        (512, 0, 1, torch.bfloat16),
        (2048, 0, 1, torch.bfloat16),
        (8192, 0, 1, torch.bfloat16),
        (2048, 0, 1, torch.float32),
        (2048, 512, 1, torch.bfloat16),
        (8192, 1024, 1, torch.bfloat16),
        (8192, 8192, 1, torch.bfloat16),
        (2048, 0, 0, torch.bfloat16),
    ):
        name = f"T{tokens}-d1024-f2816{f'-tile{tile}' if tile else ''}{'' if norm else '-no norm'}"
        sizes = {"tokens": tokens, "hidden": 1024, "intermediate": 2816, "tile": tile, "norm": norm}
        yield Case(name, dtype, sizes)


benchmark = Benchmark(
    op="gated_mlp",
    cases=tuple(cases()),
    providers=("eager", "compile", "memkernels"),
    setup=setup,
    work=work,
)
