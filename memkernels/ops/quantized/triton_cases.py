"""The configurations of the Triton kernels of quantised weights that the checks without a GPU compile and count.

Every tile of every architecture over NF4, nested and not, whose rows are cut into whole blocks; rows that are not, by
the small tile; and int8.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from memkernels.ops.product_tiles import EXACT_QUANTIZED_TILE, QUANTIZED_TILES, SMALL_TILES, TF32_TILE, ProductTile
from memkernels.ops.quantized.triton import quantized_input_grad, quantized_input_grad_add_, quantized_linear
from memkernels.quant.int8 import Int8Encoding
from memkernels.quant.nf4 import NF4Encoding
from memkernels.testing.cases import AMD, NVIDIA, KernelCase, Target, targets_of

ALIGNED, UNALIGNED = (256, 256, 128), (250, 250, 130)


def stored_zeros(kind: str, n: int, k: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[int]]:
    """The parts and sizes of a matrix of zeros."""
    if kind == "int8":
        absmax = torch.zeros(n, device=device)
        return [torch.zeros(n, k, dtype=torch.int8, device=device), absmax], Int8Encoding((n, k), dtype).sizes
    encoding = NF4Encoding((n, k), dtype, 64, kind == "nested nf4")
    parts = [torch.zeros((n * k + 1) // 2, dtype=torch.uint8, device=device)]
    if not encoding.nested:
        return [*parts, torch.zeros(encoding.blocks, device=device)], encoding.sizes
    nested = (torch.zeros(size, device=device) for size in ((-(-encoding.blocks // 256),), (256,), ()))
    return [*parts, torch.zeros(encoding.blocks, dtype=torch.uint8, device=device), *nested], encoding.sizes


def _launch(
    direction: str, kind: str, tile: ProductTile, shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, ...]:
    tokens, k, n = shape
    parts, sizes = stored_zeros(kind, n, k, dtype, device)
    stored = (parts, kind.split()[-1], sizes)
    x, dy = (torch.ones(tokens, size, dtype=dtype, device=device) for size in (k, n))
    if direction == "linear":
        bias = torch.ones(n, dtype=dtype, device=device)
        return x, bias, *parts, quantized_linear(x, bias, *stored, tile)
    if direction == "input grad":
        return dy, *parts, quantized_input_grad(dy, *stored, tile)
    quantized_input_grad_add_(x, dy, *stored, tile)
    return dy, *parts, x, x


def _cases(
    name: str,
    kinds: tuple[str, ...],
    tile: ProductTile,
    targets: tuple[Target, ...],
    *,
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int, int] = ALIGNED,
) -> list[KernelCase]:
    return [
        KernelCase(
            f"{direction} {str(dtype)[6:]} {kind} {name}",
            partial(_launch, direction, kind, tile, shape, dtype),
            None,
            targets,
        )
        for direction in ("linear", "input grad", "input grad add")
        for kind in kinds
    ]


KINDS = ("nested nf4", "nf4", "int8")
KERNEL_CASES = [
    *(case for name, tile in QUANTIZED_TILES.items() for case in _cases(name, KINDS, tile, targets_of(name))),
    *(
        case
        for vendor, targets in (("nvidia", NVIDIA), ("amd", AMD))
        for tile in (SMALL_TILES[vendor],)
        for name, of_name, options in (
            ("unaligned", tile, {"shape": UNALIGNED}),
            ("exact", EXACT_QUANTIZED_TILE if vendor == "nvidia" else tile, {"dtype": torch.float32}),
        )
        for case in _cases(f"{name} {vendor}", ("nested nf4", "int8"), of_name, targets, **options)
    ),
    *_cases("tf32", ("nested nf4", "int8"), TF32_TILE, NVIDIA, dtype=torch.float32),
]
