"""p and the gradient of B on GPUs from one read of dy.

A program holds a tile of columns of dy: B's rows of it, and their gradient, which it sums over its part of the rows. p
is summed over columns, so that each tile of them leaves a term of p's size, in float32, and at most _TERMS_BYTES of
terms are there at a time: of more rows dy comes in stretches. Of the gradient each part leaves a term, at most one a
multiprocessor and of at least _LEAST_TILES tiles of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memkernels.ops.lora_linear.parts import cut_in_parts, rank_block, sum_of
from memkernels.ops.lora_linear.tiles import NarrowTile
from memkernels.ops.matrix_triton import load_tile, store_tile

_MOST_ROW_BYTES = 64  # of a row of B: a program has registers for B's tile and its gradient up to this
_TERMS_BYTES = 16 << 20
_LEAST_TILES = 4


@triton.jit
def _lora_up_grad_kernel(
    dy_ptr,
    s_ptr,
    b_ptr,
    p_ptr,
    grad_ptr,
    rows,
    size,
    rank,
    dy_row_stride,
    part_rows,
    scaling,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """p = scaling dy B and B's gradient scaling dy^T s; dy: (rows, size); s: (rows, rank); B: (size, rank).

    Programs: tiles of columns, parts of `part_rows` rows. Each moves its part of dy and of s once, and its tile of B,
    and writes its terms: p_ptr: (tiles, rows, rank); grad_ptr: (parts, size, rank), sums over rows in their order.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    first_column = tile * BLOCK_N
    p_ptr += tile.to(tl.int64) * rows * rank
    b_tile = load_tile(b_ptr, first_column, 0, size, rank, rank, BLOCK_N, BLOCK_R, False)
    total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for first in range(part * part_rows, min((part + 1) * part_rows, rows), BLOCK_M):
        dy_tile = load_tile(dy_ptr, first, first_column, rows, size, dy_row_stride, BLOCK_M, BLOCK_N, False)
        dy_tile = dy_tile.to(b_tile.dtype)
        s_tile = load_tile(s_ptr, first, 0, rows, rank, rank, BLOCK_M, BLOCK_R, False)
        term = tl.dot(dy_tile, b_tile, input_precision=PRECISION) * scaling
        store_tile(p_ptr, term, first, 0, rows, rank, rank, BLOCK_M, BLOCK_R, False)
        total = tl.dot(dy_tile.T, s_tile, total, input_precision=PRECISION)
    grad_ptr += part.to(tl.int64) * size * rank
    store_tile(grad_ptr, total * scaling, first_column, 0, size, rank, rank, BLOCK_N, BLOCK_R, False)


def reads_once(dy: Tensor, lora_b: Tensor, tile: NarrowTile) -> bool:
    """Whether terms of p, written and read once for a tile of columns, are less than a second read of dy."""
    size, rank = lora_b.shape
    less = size <= tile.BLOCK_N or 2 * 4 * rank < tile.BLOCK_N * dy.itemsize
    return less and rank * lora_b.itemsize <= _MOST_ROW_BYTES


def up_grad_of_one_read(
    dy: Tensor, s: Tensor, lora_b: Tensor, scaling: float, tile: NarrowTile
) -> tuple[Tensor, Tensor]:
    """The operator `lora_up_grad` of both results, of row-major dy."""
    (rows, size), rank = dy.shape, lora_b.shape[1]
    if not dy.numel():
        return lora_b.new_zeros(rows, rank), torch.zeros_like(lora_b)
    p, s, lora_b = lora_b.new_empty(rows, rank), s.contiguous(), lora_b.contiguous()
    stretch = _stretch(rows, triton.cdiv(size, tile.BLOCK_N), rank, tile)
    grad = _stretch_grad(dy[:stretch], s[:stretch], lora_b, p[:stretch], scaling, tile)
    for first in range(stretch, rows, stretch):
        of = slice(first, first + stretch)
        grad += _stretch_grad(dy[of], s[of], lora_b, p[of], scaling, tile)
    return p, grad.to(lora_b.dtype)


def _stretch(rows: int, tiles: int, rank: int, tile: NarrowTile) -> int:
    """How many rows go at a time."""
    least = _LEAST_TILES * tile.BLOCK_M
    return rows if tiles == 1 else max(1, _TERMS_BYTES // (4 * tiles * rank * least)) * least


def _stretch_grad(dy: Tensor, s: Tensor, lora_b: Tensor, p: Tensor, scaling: float, tile: NarrowTile) -> Tensor:
    """The term of B's gradient of some rows, in float32; fills their p."""
    (rows, size), rank = dy.shape, lora_b.shape[1]
    tiles = triton.cdiv(size, tile.BLOCK_N)
    parts, length = cut_in_parts(dy, tiles, rows, _LEAST_TILES * tile.BLOCK_M, per_multiprocessor=1)
    p_terms = p[None] if tiles == 1 else dy.new_empty(tiles, rows, rank, dtype=torch.float32)
    grad_terms = dy.new_empty(parts, size, rank, dtype=torch.float32)
    _lora_up_grad_kernel[(tiles, parts)](
        dy, s, lora_b, p_terms, grad_terms, rows, size, rank, dy.stride(0), length, scaling,
        BLOCK_R=rank_block(rank), **tile.options(),
    )  # fmt: skip
    if tiles > 1:
        p.copy_(p_terms.sum(0))
    return sum_of(grad_terms, torch.float32)
