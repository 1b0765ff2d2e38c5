"""Dropout of a matrix on GPUs: the mask of `lora_linear.reference.keep_mask`, made anew wherever a tile is at hand."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from memkernels.ops.philox import threshold


class Dropout(NamedTuple):
    """The mask of a call as kernels take it."""

    seed: Tensor  # or several, of which `kept` is told which
    first_row: int  # the number of the matrix's first row in the whole
    dropped_below: int  # the threshold of dropout, less 2^31
    keep_scale: float  # 1 / (1 - dropout_p)


def make_dropout(seed: Tensor | None, dropout_p: float, first_row: int) -> Dropout | None:
    if seed is None:
        return None
    return Dropout(seed, first_row, threshold(dropout_p) - 2**31, 1.0 / (1.0 - dropout_p))


@triton.jit
def kept(dropout, first_row, first_column, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, seed_index=0):
    """Which elements of a tile are kept; it starts and ends at multiples of 64 columns."""
    seed_ptr = dropout.seed + seed_index
    a, b, c, d = row_words(seed_ptr, dropout.first_row + first_row, first_column, BLOCK_ROWS, BLOCK_COLUMNS)
    a, b, c, d = _is_kept(a, dropout), _is_kept(b, dropout), _is_kept(c, dropout), _is_kept(d, dropout)
    return by_columns(a, b, c, d, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def row_words(seed_ptr, first_row, first_column, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The four words of each counter of a tile, whose first row is the whole's row first_row; see `by_columns`.

    The word of (row, column) is word (column % 64) // 16 of Philox at (column // 64 * 16 + column % 16, row, 0, 0).
    """
    row = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    counter = first_column // 4 + tl.arange(0, BLOCK_COLUMNS // 4)[None, :]
    zero = tl.zeros_like(row + counter)
    # Loaded anew for each tile: from a seed that stays, the compiler keeps the 20 keys of the rounds in registers.
    seed = tl.load(seed_ptr, volatile=True)
    return tl.philox(seed, zero + counter, zero + row, zero, zero)


@triton.jit
def by_columns(a, b, c, d, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """(rows, columns) of what was made of each of a counter's words."""
    # From (rows, 64s, counter, which of a pair, which pair) to each 64 columns by pair, which of it, and counter.
    words = tl.join(tl.join(a, b), tl.join(c, d)).reshape(BLOCK_ROWS, BLOCK_COLUMNS // 64, 16, 2, 2)
    return words.permute(0, 1, 4, 3, 2).reshape(BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def _is_kept(word, dropout):
    # Compared as signed numbers, since a Triton argument has no unsigned type.
    return (word ^ 0x80000000).to(tl.int32, bitcast=True) >= dropout.dropped_below
