"""How a product with an NF4 weight is cut into tiles: forward and input gradient; docs/design/nf4.md weighs them.

dense: of a weight that is there. whole: dequantised in one piece, as bitsandbytes does. tile_n: n rows, then n columns
at a time. decode_512: the dequantisation of tile_512 alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import torch

from memkernels.bench import Benchmark, Case, Step, Work
from memkernels.ops.quantized import encoding

TOKENS = 4096
TILES = {"tile_128": 128, "tile_256": 256, "tile_512": 512}


def setup(case: Case, provider: str) -> Step:
    from memkernels.quant import quantize_nf4

    width = case.sizes["width"]
    x = torch.randn(TOKENS, width, dtype=case.dtype, device=case.device)
    weight = quantize_nf4(torch.randn(width, width, dtype=case.dtype, device=case.device) * width**-0.5)
    dense = weight.dequantize()
    stored = (list(weight.parts), "nf4", weight.encoding.sizes)
    library = torch.ops.memkernels
    size = TILES.get(provider, 512 if provider == "decode_512" else width)
    answer = torch.mm(x, dense.t()), torch.mm(x, dense)

    def multiply():
        if provider == "dense":
            return torch.mm(x, dense.t()), torch.mm(x, dense)
        with mock.patch.object(encoding, "_tile_size", lambda *arguments: size):
            if provider == "decode_512":
                for _ in weight.encoding.row_tiles(weight.parts, case.dtype):
                    pass
                for _ in weight.encoding.column_tiles(weight.parts, case.dtype):
                    pass
                return answer
            return library.quantized_linear(x, None, *stored), library.quantized_input_grad(x, *stored)

    return Step(multiply)


def work(case: Case, mode: str) -> Work:
    return Work(flops=2 * 2 * TOKENS * case.sizes["width"] ** 2)


def cases() -> Iterator[Case]:
    for width in (1024, 4096):
        yield Case(f"T{TOKENS}-K{width}-N{width}", torch.bfloat16, {"width": width})


benchmark = Benchmark(
    op="nf4_designs",
    cases=tuple(cases()),
    providers=("dense", "whole", *TILES, "decode_512"),
    setup=setup,
    work=work,
    baseline="dense",
    modes=("forward",),
)
