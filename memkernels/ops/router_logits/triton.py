"""Noise over the rows of a matrix on GPUs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memkernels.ops.dropout_triton import by_columns, row_words
from memkernels.ops.matrix_triton import load_tile, row_major, store_tile

_BLOCK_M, _BLOCK_N, _NUM_WARPS = 32, 64, 4


@triton.jit
def _row_noise_kernel(
    y_ptr,
    x_ptr,
    seed_ptr,
    numbered_from,
    step,
    least,
    rows,
    size,
    x_row_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = x * (least + step w), w the upper 24 bits of an element's word; both (rows, size), y contiguous.

    Programs: tiles of rows and columns. Each moves its tile of x and of y once.
    """
    first_row, first_column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    x_tile = load_tile(x_ptr, first_row, first_column, rows, size, x_row_stride, BLOCK_M, BLOCK_N, False)
    a, b, c, d = row_words(seed_ptr, numbered_from + first_row, first_column, BLOCK_M, BLOCK_N)
    word = by_columns(a, b, c, d, BLOCK_M, BLOCK_N)
    y_tile = x_tile.to(tl.float32) * ((word >> 8).to(tl.float32) * step + least)
    store_tile(y_ptr, y_tile, first_row, first_column, rows, size, size, BLOCK_M, BLOCK_N, False)


def row_noise(x: Tensor, seed: Tensor, width: float, first_row: int) -> Tensor:
    """The operator of that name."""
    x = row_major(x)
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    rows, size = x.shape
    if x.numel():
        _row_noise_kernel[(triton.cdiv(rows, _BLOCK_M), triton.cdiv(size, _BLOCK_N))](
            y, x, seed, first_row, width * 2.0**-23, 1.0 - width, rows, size, x.stride(0),
            BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return y
