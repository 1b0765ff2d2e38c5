"""What attention's Triton kernels share: rows of one head of one sequence, and which tiles of them a tile sees."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Rows(NamedTuple):
    """A (B, S, H, D) input as kernels take it, with rows at multiples of 16 bytes, which are moved 16 at a time."""

    pointer: Tensor
    batch_stride: int
    row_stride: int
    head_stride: int
    descriptor: TensorDescriptor | None = None  # of the (B, H, S, D) view, where the architecture has TMA


@triton.jit
def sequence_rows(cu_seqlens_ptr, sequence, rows):
    """The first row of a sequence in its tensor and how many it has: within the tensor, whatever the starts say."""
    if cu_seqlens_ptr is None:
        first, end = 0, rows
    else:
        first = min(max(tl.load(cu_seqlens_ptr + sequence), 0), rows)
        end = min(max(tl.load(cu_seqlens_ptr + sequence + 1), first), rows)
    return first, end - first


@triton.jit
def visible_tiles(first, last, shift, length, before, after, BLOCK: tl.constexpr):
    """What the rows [first, last) of one side see of the other side's `length` rows, in tiles of BLOCK.

    Row i sees the rows from i + shift - before to i + shift + after. Returns begin, full_begin, full_end, end: tiles
    outside of [begin, end) are hidden from all of these rows, those in [full_begin, full_end) from none.
    """
    begin = max(first + shift - before, 0) // BLOCK
    end = max(tl.cdiv(min(max(last + shift + after, 0), length), BLOCK), begin)
    full_begin = min(tl.cdiv(max(last - 1 + shift - before, 0), BLOCK), end)
    full_end = max(min(max(first + 1 + shift + after, 0), length) // BLOCK, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def tile_at(index, begin, full_begin, full_end, EDGE: tl.constexpr):
    """The index-th full tile or, where EDGE, the index-th of those that are seen in part, on both sides."""
    if EDGE:
        tile = tl.where(index < full_begin - begin, begin + index, index - full_begin + begin + full_end)
    else:
        tile = full_begin + index
    return tile


@triton.jit
def load_rows(
    rows,
    batch,
    head,
    first,
    end,
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EDGE: tl.constexpr = True,
):
    """The rows of a head from `first` on, zero from column SIZE on.

    Where EDGE, they may go past `end`, and the last row stands for those: finite numbers, which a probability of zero
    makes nothing of.
    """
    row, column = first + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_SIZE)
    if EDGE:
        row = tl.minimum(row, end - 1)
    pointers = _row_pointers(rows, batch, head, row)[:, None] + column[None, :]
    return tl.load(pointers) if SIZE == BLOCK_SIZE else tl.load(pointers, mask=(column < SIZE)[None, :], other=0.0)


@triton.jit
def stream_rows(
    rows,
    batch,
    head,
    first,
    end,
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EDGE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The same for a loop: through the descriptor where there is one, which gives zeros past the tensor's last row.

    Past the end of a packed sequence it would give the next one's rows, which may not be finite.
    """
    if rows.descriptor is not None and not (EDGE and PACKED):
        tile = rows.descriptor.load([batch, head, first, 0]).reshape(BLOCK_ROWS, BLOCK_SIZE)
    else:
        tile = load_rows(rows, batch, head, first, end, SIZE, BLOCK_ROWS, BLOCK_SIZE, EDGE)
    return tile


@triton.jit
def store_rows(pointer, tile, batch, head, first, end, rows, heads, SIZE: tl.constexpr):
    """Stores a float32 tile, rounded, into the rows of a head from `first` to `end` of a contiguous tensor."""
    row, column = first + tl.arange(0, tile.shape[0]), tl.arange(0, tile.shape[1])
    mask = (row < end)[:, None] & (column < SIZE)[None, :]
    row_offset = ((batch.to(tl.int64) * rows + row) * heads + head) * SIZE
    tl.store(pointer + row_offset[:, None] + column[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _row_pointers(rows, batch, head, row):
    # Strides are multiples of 8, which Triton sees only where they are multiples of 16.
    head_offset = batch.to(tl.int64) * rows.batch_stride + head.to(tl.int64) * rows.head_stride
    return rows.pointer + tl.multiple_of(head_offset, 8) + tl.multiple_of(row.to(tl.int64) * rows.row_stride, 8)
