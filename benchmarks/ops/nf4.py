"""A linear layer over a frozen NF4 weight: a dense weight of the same values, bitsandbytes, memkernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from memkernels.bench import Benchmark, Case, Step, Work

GEMMS = {"forward": 1, "backward": 1, "full": 2}


def setup(case: Case, provider: str) -> Step:
    from memkernels.quant import quantize_nf4

    tokens, width = case.sizes["tokens"], case.sizes["width"]
    x = torch.randn(tokens, width, dtype=case.dtype, device=case.device, requires_grad=True)
    values = torch.randn(width, width, dtype=case.dtype, device=case.device) * width**-0.5
    linear = torch.nn.functional.linear
    weight = quantize_nf4(values)
    if provider == "memkernels":
        return Step(lambda: linear(x, weight), (x,), weight.parts)
    if provider == "dense":
        dense = weight.dequantize()
        return Step(lambda: linear(x, dense), (x,), (dense,))
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    return Step(lambda: bitsandbytes.matmul_4bit(x, packed, state), (x,), (packed,))


def work(case: Case, mode: str) -> Work:
    return Work(flops=GEMMS[mode] * 2 * case.sizes["tokens"] * case.sizes["width"] ** 2)


def cases() -> Iterator[Case]:
    for width in (1024, 4096):
        yield Case(f"T4096-K{width}-N{width}", torch.bfloat16, {"tokens": 4096, "width": width})


benchmark = Benchmark(
    op="nf4",
    cases=tuple(cases()),
    providers=("dense", "bitsandbytes", "memkernels"),
    setup=setup,
    work=work,
    baseline="dense",
    modes=("full",),
)
