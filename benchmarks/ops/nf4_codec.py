"""NF4 quantisation and dequantisation of a weight: a copy that moves as many bytes, bitsandbytes, memkernels.

A provider's GB/s are the bytes of `traffic` over its time; those of the copy are the memory's bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from memkernels.bench import Benchmark, Case, Step, Work

ROWS, COLUMNS, BLOCK_SIZE = 8192, 4096, 64
DECODE, ENCODE = 0, 1


def traffic(dtype: torch.dtype) -> int:
    """Values, codes and a nested absmax a block, each read or written once."""
    size = ROWS * COLUMNS
    return size * dtype.itemsize + size // 2 + size // BLOCK_SIZE


def copy_step(dtype: torch.dtype, result: torch.Tensor) -> Step:
    source = torch.ones(traffic(dtype) // 2, dtype=torch.uint8)
    target = torch.empty_like(source).copy_(source)

    def forward():
        target.copy_(source)
        return result

    return Step(forward)


def setup(case: Case, provider: str) -> Step:
    from memkernels.quant import quantize_nf4

    values = torch.randn(ROWS, COLUMNS, dtype=case.dtype, device=case.device)
    weight = quantize_nf4(values)
    decodes = case.sizes["direction"] == DECODE
    if provider == "copy":
        return copy_step(case.dtype, weight.dequantize() if decodes else weight.packed.to(case.dtype))
    # Into memory that is there, as a product's tiles are; bitsandbytes has no such argument on CPU.
    out = torch.empty_like(values)
    if provider == "memkernels" and decodes:

        def decode():
            weight.encoding.decode_(out, weight.parts, 0, 0)
            return out

        return Step(decode)
    if provider == "memkernels":
        return Step(lambda: quantize_nf4(values).packed)
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    if decodes:
        return Step(lambda: bnb.dequantize_4bit(packed, state))
    return Step(lambda: bnb.quantize_4bit(values, quant_type="nf4", compress_statistics=True)[0].view(-1))


def cases() -> Iterator[Case]:
    for name, direction in (("dequantize", DECODE), ("quantize", ENCODE)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield Case(f"{name}-{ROWS}x{COLUMNS}", dtype, {"direction": direction})


def work(case: Case, mode: str) -> Work:
    return Work(bytes=traffic(case.dtype))


benchmark = Benchmark(
    op="nf4_codec",
    cases=tuple(cases()),
    providers=("copy", "bitsandbytes", "memkernels"),
    setup=setup,
    work=work,
    baseline="copy",
    modes=("forward",),
)
