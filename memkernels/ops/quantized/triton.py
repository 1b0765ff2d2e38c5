"""Products with a quantised weight on GPUs: a tile of it is dequantised where it is multiplied, and nowhere written."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memkernels.ops.matrix_triton import is_aligned, row_major
from memkernels.ops.product_tiles import QUANTIZED_TILES, ProductTile, select_tile
from memkernels.ops.product_triton import launch_product
from memkernels.ops.quantized import products
from memkernels.ops.quantized.triton_tiles import Stored
from memkernels.quant.reference import NF4_VALUES

KINDS = ("nf4", "int8")


@functools.cache
def _nf4_values(device: torch.device) -> Tensor:
    return torch.tensor(NF4_VALUES, device=device)


def _stored(parts: Sequence[Tensor], kind: str, sizes: Sequence[int]) -> Stored:
    parts = [part.contiguous() for part in parts]
    if kind == "int8":
        codes, absmax = parts
        return Stored(codes, absmax / 127, sizes[1])
    packed, absmax = parts[:2]
    nested_absmax, nested_code, offset = parts[2:] or (None, None, None)
    return Stored(
        packed, absmax, sizes[1], nested_absmax, nested_code, offset, _nf4_values(packed.device),
        log2_block_size=sizes[2].bit_length() - 1,
    )  # fmt: skip


def in_parts(kind: str, sizes: Sequence[int]) -> bool:
    """Whether 64 columns cut a matrix's rows into whole parts, of one block each."""
    return kind != "nf4" or (sizes[1] % 64 == 0 and sizes[2] % 64 == 0)


def stored_matrix(parts: Sequence[Tensor], kind: str, sizes: Sequence[int], columns: int) -> tuple[Stored, bool]:
    """A matrix as kernels take it, and whether `columns` of it, which a program holds at a time, are SEGMENTS.

    Kernels over nested absolute maxima are compiled without fused multiply-adds, as `triton_tiles` says.
    """
    segments = kind == "nf4" and sizes[1] % columns == 0 and sizes[2] % columns == 0
    return _stored(parts, kind, sizes), segments


def launch_quantized(
    y: Tensor,
    x: Tensor,
    parts: Sequence[Tensor],
    kind: str,
    sizes: Sequence[int],
    tile: ProductTile | None,
    *,
    by_rows: bool,
    low_rank: tuple[Tensor, Tensor, float] | None = None,
    **options: Any,
) -> None:
    """`launch_product` over a quantised weight, whose other arguments are the options."""
    x = row_major(x)
    if tile is None:
        low_rank_dtype = x.dtype if low_rank is None else low_rank[0].dtype
        aligned = in_parts(kind, sizes) and is_aligned(x) and is_aligned(y)
        tile = select_tile(x.dtype, low_rank_dtype, x.device, aligned=aligned, tiles=QUANTIZED_TILES)
    stored, segments = stored_matrix(parts, kind, sizes, tile.BLOCK_K if by_rows else tile.BLOCK_N)
    launch_product(
        y, x, None, tile, by_rows=by_rows, low_rank=low_rank, stored=stored, segments=segments,
        enable_fp_fusion=stored.nested_absmax is None, **options,
    )  # fmt: skip


def quantized_linear(
    x: Tensor,
    bias: Tensor | None,
    parts: Sequence[Tensor],
    kind: str,
    sizes: Sequence[int],
    tile: ProductTile | None = None,
) -> Tensor:
    """The operator of that name; without a tile, that of x's device. So are those below."""
    if kind not in KINDS:
        return products.quantized_linear(x, bias, parts, kind, sizes)
    y = x.new_empty(x.shape[0], sizes[0])
    launch_quantized(y, x, parts, kind, sizes, tile, by_rows=True, bias=bias)
    return y


def quantized_input_grad(
    dy: Tensor, parts: Sequence[Tensor], kind: str, sizes: Sequence[int], tile: ProductTile | None = None
) -> Tensor:
    if kind not in KINDS:
        return products.quantized_input_grad(dy, parts, kind, sizes)
    dx = dy.new_empty(dy.shape[0], sizes[1])
    launch_quantized(dx, dy, parts, kind, sizes, tile, by_rows=False)
    return dx


def quantized_input_grad_add_(
    dx: Tensor, dy: Tensor, parts: Sequence[Tensor], kind: str, sizes: Sequence[int], tile: ProductTile | None = None
) -> None:
    if kind not in KINDS:
        return products.quantized_input_grad_add_(dx, dy, parts, kind, sizes)
    rows = row_major(dx)
    launch_quantized(rows, dy, parts, kind, sizes, tile, by_rows=False, add=True)
    if rows is not dx:
        dx.copy_(rows)
