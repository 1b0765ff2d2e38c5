"""The product with a frozen or adapted weight on GPUs: one kernel for y = x W^T and dx = dy W, whatever W is stored in.

What comes beside the product - a low-rank term with its dropout mask, a scale, a bias, what the output holds already -
is computed where the output's tile is, so that the output is written once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from memkernels.ops.dropout_triton import Dropout, kept
from memkernels.ops.matrix_triton import grouped_tile, load_tile, operands, store_tile
from memkernels.ops.product_tiles import ProductTile
from memkernels.ops.quantized.triton_tiles import Stored, quantized_tile


@triton.jit
def _weight_tile(
    weight,
    stored,
    first_row,
    first_column,
    rows,
    columns,
    row_stride,
    dtype: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TMA: tl.constexpr,
):
    if weight is not None:
        tile = load_tile(weight, first_row, first_column, rows, columns, row_stride, BLOCK_ROWS, BLOCK_COLUMNS, TMA)
    else:
        tile = quantized_tile(stored, first_row, first_column, rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, SEGMENTS).to(
            dtype
        )
    return tile


@triton.jit
def _product_kernel(
    y,
    x,
    weight,
    stored,
    u_ptr,
    v_ptr,
    dropout,
    out_scale_ptr,
    bias_ptr,
    rows,
    columns,
    inner,
    rank,
    y_row_stride,
    x_row_stride,
    weight_row_stride,
    scaling,
    ADD: tl.constexpr,
    BY_ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW_RANK_PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = (x W + m * scaling u V) * out_scale + bias, on top of y where ADD. y: (rows, columns); x: (rows, inner).

    BY_ROWS: W is the transpose of a stored (columns, inner), V of (columns, rank); else they are (inner, columns) and
    (rank, columns). W is dense (`weight`), quantised (`stored`), or missing. The low-rank term comes first, into the
    accumulator that the product is then added to: it takes no registers of its own.
    """
    first_row, first_column = grouped_tile(rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if u_ptr is not None:
        for r in range(0, rank, BLOCK_R):
            u_tile = load_tile(u_ptr, first_row, r, rows, rank, rank, BLOCK_M, BLOCK_R, False)
            if BY_ROWS:
                v_tile = load_tile(v_ptr, first_column, r, columns, rank, rank, BLOCK_N, BLOCK_R, False).T
            else:
                v_tile = load_tile(v_ptr, r, first_column, rank, columns, columns, BLOCK_R, BLOCK_N, False)
            total = tl.dot(u_tile, v_tile, total, input_precision=LOW_RANK_PRECISION)
        total *= scaling
        if dropout is not None:
            keep = kept(dropout, first_row, first_column, BLOCK_M, BLOCK_N)
            total = tl.where(keep, total * dropout.keep_scale, 0.0)
    if x is not None:
        for k in range(0, inner, BLOCK_K):
            x_tile = load_tile(x, first_row, k, rows, inner, x_row_stride, BLOCK_M, BLOCK_K, TMA)
            if BY_ROWS:
                w_tile = _weight_tile(
                    weight, stored, first_column, k, columns, inner, weight_row_stride, x_tile.dtype,
                    BLOCK_N, BLOCK_K, SEGMENTS, TMA,
                ).T  # fmt: skip
            else:
                w_tile = _weight_tile(
                    weight, stored, k, first_column, inner, columns, weight_row_stride, x_tile.dtype,
                    BLOCK_K, BLOCK_N, SEGMENTS, TMA,
                )  # fmt: skip
            total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
    column = first_column + tl.arange(0, BLOCK_N)
    if ADD:
        total += load_tile(y, first_row, first_column, rows, columns, y_row_stride, BLOCK_M, BLOCK_N, TMA)
    if out_scale_ptr is not None:
        total *= tl.load(out_scale_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    store_tile(y, total, first_row, first_column, rows, columns, y_row_stride, BLOCK_M, BLOCK_N, TMA)


def launch_product(
    y: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    tile: ProductTile,
    *,
    by_rows: bool,
    add: bool = False,
    stored: Stored | None = None,
    low_rank: tuple[Tensor, Tensor, float] | None = None,
    segments: bool = False,
    dropout: Dropout | None = None,
    out_scale: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> None:
    """Fills y as the kernel says. y, x and weight: row-major; low_rank: u, V and scaling; options: of the compiler."""
    rows, columns = y.shape
    if y.numel() == 0:
        return
    u, v, scaling = (None, None, 1.0) if low_rank is None else low_rank
    u, v = (None if factor is None else factor.contiguous() for factor in (u, v))
    rank = 0 if u is None else u.shape[1]
    matrices = operands(tile, (y, "mn"), (x, "mk"), (weight, "nk" if by_rows else "kn"))
    _product_kernel[(tile.programs(rows, columns),)](
        *matrices, stored, u, v, dropout,
        *(None if vector is None else vector.contiguous() for vector in (out_scale, bias)),
        rows, columns, 0 if x is None else x.shape[1], rank,
        *(0 if matrix is None else matrix.stride(0) for matrix in (y, x, weight)), scaling,
        ADD=add, BY_ROWS=by_rows, SEGMENTS=segments,
        BLOCK_R=max(16, min(64, triton.next_power_of_2(max(rank, 1)))), **tile.options(), **options,
    )  # fmt: skip
