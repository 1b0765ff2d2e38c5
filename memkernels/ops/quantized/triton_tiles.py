"""Tiles of a quantised matrix for GPU kernels: dequantised where they are multiplied, bit for bit as the reference."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from memkernels.quant.reference import NESTED_BLOCK

_LOG2_NESTED_BLOCK = tl.constexpr(NESTED_BLOCK.bit_length() - 1)


class Stored(NamedTuple):
    """A quantised matrix as kernels take it.

    NF4: packed codes, absmax by blocks of `block_size`, which are float32 or, nested, 8-bit codes of `nested_code`
    times `nested_absmax` plus `offset`; `code_values` are those of the 16 codes. int8: codes, and a scale a row.
    """

    codes: Tensor
    scales: Tensor
    row_size: int
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None
    code_values: Tensor | None = None
    log2_block_size: int = 0


@triton.jit
def quantized_tile(
    stored,
    first_row,
    first_column,
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """A tile of the values, float32, zero outside of the matrix.

    SEGMENTS: NF4's blocks and the matrix's rows are cut by the tile's columns into whole parts, each of one block.
    """
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    in_rows = (row < rows)[:, None]
    mask = in_rows & (column < columns)[None, :]
    start = row.to(tl.int64)[:, None] * stored.row_size
    if stored.code_values is None:
        codes = tl.load(stored.codes + start + column[None, :], mask=mask, other=0)
        tile = codes.to(tl.float32) * tl.load(stored.scales + row, mask=row < rows, other=0.0)[:, None]
    elif SEGMENTS:
        start += first_column
        pair = tl.arange(0, BLOCK_COLUMNS // 2)[None, :]
        packed = tl.load(stored.codes + (start >> 1) + pair, mask=in_rows, other=0)
        # Of a pair in a byte the first is in the high half.
        codes = tl.join(packed >> 4, packed & 15).reshape(BLOCK_ROWS, BLOCK_COLUMNS)
        scale = _absmax(stored, start >> stored.log2_block_size, in_rows)
        tile = tl.load(stored.code_values + codes.to(tl.int32)) * scale
    else:
        index = start + column[None, :]
        packed = tl.load(stored.codes + (index >> 1), mask=mask, other=0)
        codes = tl.where((index & 1) == 0, packed >> 4, packed & 15)
        scale = _absmax(stored, index >> stored.log2_block_size, mask)
        tile = tl.load(stored.code_values + codes.to(tl.int32)) * scale
    return tile


@triton.jit
def _absmax(stored, block, mask):
    """The absolute maxima of blocks, zero where masked. Rounded twice: to be compiled without fused multiply-adds."""
    scale = tl.load(stored.scales + block, mask=mask, other=0)
    if stored.nested_absmax is not None:
        nested_scale = tl.load(stored.nested_absmax + (block >> _LOG2_NESTED_BLOCK), mask=mask, other=0.0)
        code = tl.load(stored.nested_code + scale.to(tl.int32))
        scale = tl.where(mask, code * nested_scale + tl.load(stored.offset), 0.0)
    return scale
