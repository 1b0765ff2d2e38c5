"""Dropout over the rows of a matrix on GPUs, by the mask that the products' kernels make inline."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memkernels.ops.dropout_triton import kept, make_dropout
from memkernels.ops.matrix_triton import load_tile, row_major, store_tile

_BLOCK_M, _BLOCK_N, _NUM_WARPS = 32, 64, 4


@triton.jit
def _row_dropout_kernel(
    y_ptr,
    x_ptr,
    dropout,
    rows,
    size,
    y_row_stride,
    x_row_stride,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = m * x / (1 - p), on top of y where ADD; both (rows, size).

    Programs: tiles of rows and columns. Each moves its tile of x and of y once.
    """
    first_row, first_column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    x_tile = load_tile(x_ptr, first_row, first_column, rows, size, x_row_stride, BLOCK_M, BLOCK_N, False)
    keep = kept(dropout, first_row, first_column, BLOCK_M, BLOCK_N)
    total = tl.where(keep, x_tile.to(tl.float32) * dropout.keep_scale, 0.0)
    if ADD:
        total += load_tile(y_ptr, first_row, first_column, rows, size, y_row_stride, BLOCK_M, BLOCK_N, False)
    store_tile(y_ptr, total, first_row, first_column, rows, size, y_row_stride, BLOCK_M, BLOCK_N, False)


def _launch(y: Tensor, x: Tensor, seed: Tensor, dropout_p: float, first_row: int, *, add: bool) -> None:
    rows, size = x.shape
    if x.numel():
        _row_dropout_kernel[(triton.cdiv(rows, _BLOCK_M), triton.cdiv(size, _BLOCK_N))](
            y, x, make_dropout(seed, dropout_p, first_row), rows, size, y.stride(0), x.stride(0),
            ADD=add, BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, num_warps=_NUM_WARPS,
        )  # fmt: skip


def row_dropout(x: Tensor, seed: Tensor, dropout_p: float, first_row: int, dtype: torch.dtype) -> Tensor:
    """The operator of that name. So is the one below."""
    x = row_major(x)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(out, x, seed, dropout_p, first_row, add=False)
    return out


def row_dropout_add_(y: Tensor, term: Tensor, seed: Tensor, dropout_p: float, first_row: int) -> None:
    rows = row_major(y)
    _launch(rows, row_major(term), seed, dropout_p, first_row, add=True)
    if rows is not y:
        y.copy_(rows)
