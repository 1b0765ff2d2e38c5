"""The adapter's operators on GPUs: each reads x or dy once, and makes the dropout mask anew where it reads x.

Sums over tokens come in parts that are added in a fixed order: without atomics, so the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from memkernels.ops.dropout_triton import kept, make_dropout
from memkernels.ops.launch import num_programs
from memkernels.ops.lora_linear import products
from memkernels.ops.lora_linear.tiles import DOWN, DOWN_GRAD, UP_GRAD, NarrowTile, select_narrow
from memkernels.ops.matrix_triton import is_aligned, load_tile, row_major, store_tile
from memkernels.ops.product_tiles import ProductTile, select_tile
from memkernels.ops.product_triton import launch_product
from memkernels.ops.quantized.triton import KINDS, launch_quantized


@triton.jit
def _lora_down_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    dropout,
    rows,
    size,
    rank,
    x_row_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """s = (m * x) A^T; x: (rows, size); A: (rank, size); s: (rows, rank).

    Programs: tiles of rows, and of BLOCK_R of the rank. Each moves its rows of x once, and A.
    """
    first_row, first_rank = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_R
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for first in range(0, size, BLOCK_N):
        x_tile = load_tile(x_ptr, first_row, first, rows, size, x_row_stride, BLOCK_M, BLOCK_N, False)
        if dropout is not None:
            x_tile = tl.where(kept(dropout, first_row, first, BLOCK_M, BLOCK_N), x_tile, 0.0)
        a_tile = load_tile(a_ptr, first_rank, first, rank, size, size, BLOCK_R, BLOCK_N, False)
        total = tl.dot(x_tile.to(a_tile.dtype), a_tile.T, total, input_precision=PRECISION)
    if dropout is not None:
        total *= dropout.keep_scale
    store_tile(s_ptr, total, first_row, first_rank, rows, rank, rank, BLOCK_M, BLOCK_R, False)


@triton.jit
def _lora_up_grad_kernel(
    dy_ptr,
    s_ptr,
    b_ptr,
    p_ptr,
    db_ptr,
    rows,
    columns,
    rank,
    dy_row_stride,
    part_columns,
    scaling,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """p = scaling dy B and dB = scaling dy^T s; dy: (rows, columns); s: (rows, rank); B: (columns, rank).

    Programs: tiles of rows, parts of `part_columns` columns, tiles of the rank. Each moves its part of dy once and
    writes its term of p, p_ptr: (parts, rows, rank), and of dB, db_ptr: (tiles of rows, columns, rank).
    """
    first_row, part, first_rank = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2) * BLOCK_R
    if db_ptr is not None:
        s_tile = load_tile(s_ptr, first_row, first_rank, rows, rank, rank, BLOCK_M, BLOCK_R, False)
        db_ptr += tl.program_id(0).to(tl.int64) * columns * rank
    p_tile = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for first in range(part * part_columns, min((part + 1) * part_columns, columns), BLOCK_N):
        dy_tile = load_tile(dy_ptr, first_row, first, rows, columns, dy_row_stride, BLOCK_M, BLOCK_N, False)
        dy_tile = dy_tile.to(b_ptr.dtype.element_ty)
        if p_ptr is not None:
            b_tile = load_tile(b_ptr, first, first_rank, columns, rank, rank, BLOCK_N, BLOCK_R, False)
            p_tile = tl.dot(dy_tile, b_tile, p_tile, input_precision=PRECISION)
        if db_ptr is not None:
            db_tile = tl.dot(dy_tile.T, s_tile, input_precision=PRECISION) * scaling
            store_tile(db_ptr, db_tile, first, first_rank, columns, rank, rank, BLOCK_N, BLOCK_R, False)
    if p_ptr is not None:
        p_ptr += part.to(tl.int64) * rows * rank
        store_tile(p_ptr, p_tile * scaling, first_row, first_rank, rows, rank, rank, BLOCK_M, BLOCK_R, False)


@triton.jit
def _lora_down_grad_kernel(
    p_ptr,
    x_ptr,
    da_ptr,
    dropout,
    rows,
    size,
    rank,
    x_row_stride,
    part_rows,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dA = p^T (m * x); p: (rows, rank); x: (rows, size).

    Programs: tiles of columns, parts of `part_rows` rows, tiles of the rank. Each moves its part of x once and writes
    its term, da_ptr: (parts, rank, size).
    """
    first_column, part, first_rank = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2) * BLOCK_R
    total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for first in range(part * part_rows, min((part + 1) * part_rows, rows), BLOCK_M):
        x_tile = load_tile(x_ptr, first, first_column, rows, size, x_row_stride, BLOCK_M, BLOCK_N, False)
        if dropout is not None:
            x_tile = tl.where(kept(dropout, first, first_column, BLOCK_M, BLOCK_N), x_tile, 0.0)
        p_tile = load_tile(p_ptr, first, first_rank, rows, rank, rank, BLOCK_M, BLOCK_R, False)
        total = tl.dot(x_tile.to(p_tile.dtype).T, p_tile, total, input_precision=PRECISION)
    if dropout is not None:
        total *= dropout.keep_scale
    da_ptr += part.to(tl.int64) * rank * size
    store_tile(da_ptr, total.T, first_rank, first_column, rank, size, size, BLOCK_R, BLOCK_N, False)


def _rank_block(rank: int) -> int:
    return max(16, min(64, triton.next_power_of_2(rank)))


def _tile(low_rank: Tensor, y: Tensor, x: Tensor, weight: Tensor) -> ProductTile:
    return select_tile(y.dtype, low_rank.dtype, y.device, aligned=all(map(is_aligned, (y, x, weight))))


def _small_tile(low_rank: Tensor, y: Tensor) -> ProductTile:
    """Where no product with a weight is to be fed."""
    return select_tile(y.dtype, low_rank.dtype, y.device, aligned=False)


def cut(x: Tensor, programs: int, size: int, block: int) -> tuple[int, int]:
    """Into how many parts a walk over `size` is cut so that they fill the GPU, and how long each is."""
    parts = max(1, num_programs(x, size, block) // max(1, programs))
    length = triton.cdiv(triton.cdiv(size, parts), block) * block
    return triton.cdiv(size, length), length


def lora_down(
    x: Tensor,
    lora_a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    first_row: int,
    tile: NarrowTile | None = None,
) -> Tensor:
    """The operator of that name; without a tile, that of x's device. So are those below."""
    x, lora_a = row_major(x), lora_a.contiguous()
    (rows, size), rank = x.shape, lora_a.shape[0]
    s = lora_a.new_empty(rows, rank)
    if s.numel():
        tile = tile or select_narrow(DOWN, lora_a.dtype, x.device)
        block_r = _rank_block(rank)
        _lora_down_kernel[(triton.cdiv(rows, tile.BLOCK_M), triton.cdiv(rank, block_r))](
            x, lora_a, s, make_dropout(seed, dropout_p, first_row), rows, size, rank, x.stride(0),
            BLOCK_R=block_r, **tile.options(),
        )  # fmt: skip
    return s


def lora_up(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    lora_b: Tensor,
    scaling: float,
    out_scale: Tensor | None,
    tile: ProductTile | None = None,
) -> Tensor:
    x, weight = row_major(x), row_major(weight)
    y = x.new_empty(x.shape[0], weight.shape[0])
    launch_product(
        y, x, weight, tile or _tile(s, y, x, weight),
        by_rows=True, low_rank=(s, lora_b, scaling),
        out_scale=out_scale, bias=bias,
    )  # fmt: skip
    return y


def lora_quantized_up(
    x: Tensor,
    parts: Sequence[Tensor],
    kind: str,
    sizes: Sequence[int],
    bias: Tensor | None,
    s: Tensor,
    lora_b: Tensor,
    scaling: float,
    out_scale: Tensor | None,
    tile: ProductTile | None = None,
) -> Tensor:
    if kind not in KINDS:
        return products.lora_quantized_up(x, parts, kind, sizes, bias, s, lora_b, scaling, out_scale)
    y = x.new_empty(x.shape[0], sizes[0])
    launch_quantized(
        y, x, parts, kind, sizes, tile,
        by_rows=True, low_rank=(s, lora_b, scaling), out_scale=out_scale, bias=bias,
    )  # fmt: skip
    return y


def lora_up_add_(
    y: Tensor,
    s: Tensor,
    lora_b: Tensor,
    scaling: float,
    out_scale: Tensor | None,
    bias: Tensor | None,
    tile: ProductTile | None = None,
) -> None:
    rows = row_major(y)
    launch_product(
        rows, None, None, tile or _small_tile(s, rows),
        by_rows=True, add=True, low_rank=(s, lora_b, scaling),
        out_scale=out_scale, bias=bias,
    )  # fmt: skip
    if rows is not y:
        y.copy_(rows)


def lora_up_grad(
    dy: Tensor, s: Tensor | None, lora_b: Tensor, scaling: float, p_needed: bool, tile: NarrowTile | None = None
) -> tuple[Tensor, Tensor]:
    dy, lora_b = row_major(dy), lora_b.contiguous()
    (rows, columns), rank = dy.shape, lora_b.shape[1]
    if not dy.numel():
        empty = lora_b.new_empty(0)
        return lora_b.new_zeros(rows, rank) if p_needed else empty, empty if s is None else torch.zeros_like(lora_b)
    tile = tile or select_narrow(UP_GRAD, lora_b.dtype, dy.device)
    block_r, tiles = _rank_block(rank), triton.cdiv(rows, tile.BLOCK_M)
    parts, length = cut(dy, tiles, columns, tile.BLOCK_N)
    p = dy.new_empty(parts, rows, rank, dtype=lora_b.dtype if parts == 1 else torch.float32) if p_needed else None
    db = None if s is None else dy.new_empty(tiles, columns, rank, dtype=torch.float32)
    if p is not None or db is not None:
        _lora_up_grad_kernel[(tiles, parts, triton.cdiv(rank, block_r))](
            dy, s if s is None else s.contiguous(), lora_b, p, db, rows, columns, rank, dy.stride(0), length,
            scaling, BLOCK_R=block_r, **tile.options(),
        )  # fmt: skip
    return _sum(p, lora_b), _sum(db, lora_b)


def _sum(terms: Tensor | None, like: Tensor) -> Tensor:
    """The sum of the terms of each part, in their order and the dtype of `like`; empty where there are none."""
    if terms is None:
        return like.new_empty(0)
    return (terms[0] if len(terms) == 1 else terms.sum(0)).to(like.dtype)


def lora_input_grad(
    dy: Tensor,
    weight: Tensor,
    p: Tensor,
    lora_a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    first_row: int,
    tile: ProductTile | None = None,
) -> Tensor:
    dy, weight = row_major(dy), row_major(weight)
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    launch_product(
        dx, dy, weight, tile or _tile(p, dx, dy, weight),
        by_rows=False, low_rank=(p, lora_a, 1.0),
        dropout=make_dropout(seed, dropout_p, first_row),
    )  # fmt: skip
    return dx


def lora_quantized_input_grad(
    dy: Tensor,
    parts: Sequence[Tensor],
    kind: str,
    sizes: Sequence[int],
    p: Tensor,
    lora_a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    first_row: int,
    tile: ProductTile | None = None,
) -> Tensor:
    if kind not in KINDS:
        return products.lora_quantized_input_grad(dy, parts, kind, sizes, p, lora_a, seed, dropout_p, first_row)
    dx = dy.new_empty(dy.shape[0], sizes[1])
    launch_quantized(
        dx, dy, parts, kind, sizes, tile,
        by_rows=False, low_rank=(p, lora_a, 1.0), dropout=make_dropout(seed, dropout_p, first_row),
    )  # fmt: skip
    return dx


def lora_input_add_(
    dx: Tensor,
    p: Tensor,
    lora_a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    first_row: int,
    tile: ProductTile | None = None,
) -> None:
    rows = row_major(dx)
    launch_product(
        rows, None, None, tile or _small_tile(p, rows),
        by_rows=False, add=True, low_rank=(p, lora_a, 1.0),
        dropout=make_dropout(seed, dropout_p, first_row),
    )  # fmt: skip
    if rows is not dx:
        dx.copy_(rows)


def lora_down_grad(
    p: Tensor, x: Tensor, seed: Tensor | None, dropout_p: float, first_row: int, tile: NarrowTile | None = None
) -> Tensor:
    p, x = p.contiguous(), row_major(x)
    (rows, size), rank = x.shape, p.shape[1]
    if not x.numel():
        return p.new_zeros(rank, size)
    tile = tile or select_narrow(DOWN_GRAD, p.dtype, x.device)
    block_r, tiles = _rank_block(rank), triton.cdiv(size, tile.BLOCK_N)
    parts, length = cut(x, tiles, rows, tile.BLOCK_M)
    da = x.new_empty(parts, rank, size, dtype=p.dtype if parts == 1 else torch.float32)
    _lora_down_grad_kernel[(tiles, parts, triton.cdiv(rank, block_r))](
        p, x, da, make_dropout(seed, dropout_p, first_row), rows, size, rank, x.stride(0), length,
        BLOCK_R=block_r, **tile.options(),
    )  # fmt: skip
    return _sum(da, p)
