"""The adapter's operators on GPUs: each product reads x or dy once for every 64 of the rank, and makes the dropout mask
anew where it reads x.

Where a result has too few tiles to fill the GPU, what is summed is cut in parts. Tiles times parts are then at most
`num_programs`, two a multiprocessor, and each leaves at most 64 r float32 whatever the sizes: 4.3 MB at r = 64 on 132
multiprocessors, and half of that again in their sum before it is rounded. p and dB come from one read of dy where that
moves less (`triton_up_grad`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from memkernels.ops.dropout_triton import Dropout, kept, make_dropout
from memkernels.ops.lora_linear import products
from memkernels.ops.lora_linear.parts import cut_in_parts, rank_block, sum_of
from memkernels.ops.lora_linear.tiles import UP_GRAD_TILES, NarrowTile, select_narrow
from memkernels.ops.lora_linear.triton_up_grad import reads_once, up_grad_of_one_read
from memkernels.ops.matrix_triton import is_aligned, load_tile, row_major, store_tile
from memkernels.ops.product_tiles import ProductTile, select_tile
from memkernels.ops.product_triton import launch_product
from memkernels.ops.quantized.triton import KINDS, launch_quantized


@triton.jit
def _lora_narrow_kernel(
    x_ptr,
    factor_ptr,
    z_ptr,
    dropout,
    rows,
    size,
    rank,
    x_row_stride,
    part_columns,
    scaling,
    BY_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """z = scaling (m * x) F; x: (rows, size); F: (size, rank), stored so or, BY_ROWS, as its transpose.

    Programs: tiles of rows, parts of `part_columns` columns, tiles of the rank. Each moves its part of x once, and F's,
    and writes its term, z_ptr: (parts, rows, rank).
    """
    first_row, part, first_rank = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2) * BLOCK_R
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for first in range(part * part_columns, min((part + 1) * part_columns, size), BLOCK_N):
        x_tile = load_tile(x_ptr, first_row, first, rows, size, x_row_stride, BLOCK_M, BLOCK_N, False)
        if dropout is not None:
            x_tile = tl.where(kept(dropout, first_row, first, BLOCK_M, BLOCK_N), x_tile, 0.0)
        if BY_ROWS:
            factor_tile = load_tile(factor_ptr, first_rank, first, rank, size, size, BLOCK_R, BLOCK_N, False).T
        else:
            factor_tile = load_tile(factor_ptr, first, first_rank, size, rank, rank, BLOCK_N, BLOCK_R, False)
        total = tl.dot(x_tile.to(factor_tile.dtype), factor_tile, total, input_precision=PRECISION)
    if dropout is not None:
        total *= dropout.keep_scale
    z_ptr += part.to(tl.int64) * rows * rank
    store_tile(z_ptr, total * scaling, first_row, first_rank, rows, rank, rank, BLOCK_M, BLOCK_R, False)


@triton.jit
def _lora_factor_grad_kernel(
    z_ptr,
    x_ptr,
    grad_ptr,
    dropout,
    rows,
    size,
    rank,
    x_row_stride,
    part_rows,
    scaling,
    BY_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """scaling (m * x)^T z, (size, rank), stored so or, BY_ROWS, as its transpose; x: (rows, size); z: (rows, rank).

    Programs: tiles of columns, parts of `part_rows` rows, tiles of the rank. Each moves its part of x once, and z's,
    and writes its term, the sum over its rows in their order, at grad_ptr: (parts, size, rank) or its transposes.
    """
    first_column, part, first_rank = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2) * BLOCK_R
    total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for first in range(part * part_rows, min((part + 1) * part_rows, rows), BLOCK_M):
        x_tile = load_tile(x_ptr, first, first_column, rows, size, x_row_stride, BLOCK_M, BLOCK_N, False)
        if dropout is not None:
            x_tile = tl.where(kept(dropout, first, first_column, BLOCK_M, BLOCK_N), x_tile, 0.0)
        z_tile = load_tile(z_ptr, first, first_rank, rows, rank, rank, BLOCK_M, BLOCK_R, False)
        total = tl.dot(x_tile.to(z_tile.dtype).T, z_tile, total, input_precision=PRECISION)
    if dropout is not None:
        total *= dropout.keep_scale
    total *= scaling
    grad_ptr += part.to(tl.int64) * size * rank
    if BY_ROWS:
        store_tile(grad_ptr, total.T, first_rank, first_column, rank, size, size, BLOCK_R, BLOCK_N, False)
    else:
        store_tile(grad_ptr, total, first_column, first_rank, size, rank, rank, BLOCK_N, BLOCK_R, False)


def _tile(low_rank: Tensor, y: Tensor, x: Tensor, weight: Tensor) -> ProductTile:
    return select_tile(y.dtype, low_rank.dtype, y.device, aligned=all(map(is_aligned, (y, x, weight))))


def _small_tile(low_rank: Tensor, y: Tensor) -> ProductTile:
    """Where no product with a weight is to be fed."""
    return select_tile(y.dtype, low_rank.dtype, y.device, aligned=False)


def _narrow(
    x: Tensor, factor: Tensor, dropout: Dropout | None, scaling: float, tile: NarrowTile | None, *, by_rows: bool
) -> Tensor:
    """scaling (m * x) factor, or by its transpose where that has the rank's rows; in the factor's dtype."""
    (rows, size), rank = x.shape, factor.shape[0 if by_rows else 1]
    if not x.numel():
        return factor.new_zeros(rows, rank)
    tile = tile or select_narrow(factor.dtype, x.device)
    block_r, tiles = rank_block(rank), triton.cdiv(rows, tile.BLOCK_M)
    parts, length = cut_in_parts(x, tiles, size, tile.BLOCK_N)
    z = x.new_empty(parts, rows, rank, dtype=factor.dtype if parts == 1 else torch.float32)
    _lora_narrow_kernel[(tiles, parts, triton.cdiv(rank, block_r))](
        x, factor.contiguous(), z, dropout, rows, size, rank, x.stride(0), length, scaling,
        BY_ROWS=by_rows, BLOCK_R=block_r, **tile.options(),
    )  # fmt: skip
    return sum_of(z, factor.dtype)


def _factor_grad(
    z: Tensor, x: Tensor, dropout: Dropout | None, scaling: float, tile: NarrowTile | None, *, by_rows: bool
) -> Tensor:
    """scaling (m * x)^T z, or its transpose by the rank's rows; in z's dtype."""
    (rows, size), rank = x.shape, z.shape[1]
    shape = (rank, size) if by_rows else (size, rank)
    if not x.numel():
        return z.new_zeros(shape)
    tile = tile or select_narrow(z.dtype, x.device)
    block_r, tiles = rank_block(rank), triton.cdiv(size, tile.BLOCK_N)
    parts, length = cut_in_parts(x, tiles, rows, tile.BLOCK_M)
    grad = x.new_empty(parts, *shape, dtype=z.dtype if parts == 1 else torch.float32)
    _lora_factor_grad_kernel[(tiles, parts, triton.cdiv(rank, block_r))](
        z.contiguous(), x, grad, dropout, rows, size, rank, x.stride(0), length, scaling,
        BY_ROWS=by_rows, BLOCK_R=block_r, **tile.options(),
    )  # fmt: skip
    return sum_of(grad, z.dtype)


def lora_down(
    x: Tensor,
    lora_a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    first_row: int,
    tile: NarrowTile | None = None,
) -> Tensor:
    """The operator of that name; without a tile, that of x's device. So are those below."""
    dropout = make_dropout(seed, dropout_p, first_row)
    return _narrow(row_major(x), lora_a, dropout, 1.0, tile, by_rows=True)


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
    dy = row_major(dy)
    if p_needed and s is not None:
        wide = tile or select_narrow(lora_b.dtype, dy.device, UP_GRAD_TILES)
        if reads_once(dy, lora_b, wide):
            return up_grad_of_one_read(dy, s, lora_b, scaling, wide)
    p = _narrow(dy, lora_b, None, scaling, tile, by_rows=False) if p_needed else lora_b.new_empty(0)
    db = lora_b.new_empty(0) if s is None else _factor_grad(s, dy, None, scaling, tile, by_rows=False)
    return p, db


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
    dropout = make_dropout(seed, dropout_p, first_row)
    return _factor_grad(p, row_major(x), dropout, 1.0, tile, by_rows=True)
