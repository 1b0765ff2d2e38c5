"""The operators of adapters that share an input, on GPUs: x is read once for all of them, and dx read and written once.

Each program holds a tile of x and makes one adapter's mask after the other of it, in a loop that is not unrolled, since
several masks at once spill. It sums for up to three adapters, q's, k's and v's, and 32 of their rank: more of either
reads x again for each. Sums are cut in parts as those of one adapter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memkernels.ops.dropout_triton import kept, make_dropout
from memkernels.ops.lora_linear.parts import cut_in_parts, rank_block
from memkernels.ops.lora_linear.tiles import SHARED_TILES, NarrowTile, select_narrow
from memkernels.ops.matrix_triton import load_tile, row_major, store_tile

_MOST = 3


@triton.jit
def _lora_down_shared_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    dropout,
    adapters,
    rows,
    size,
    rank,
    x_row_stride,
    part_columns,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """s = (m * x) A^T of each adapter; x: (rows, size); A: (adapters, rank, size).

    Programs: tiles of rows, parts of `part_columns` columns, tiles of the rank. Each moves its part of x once, and each
    A's, and writes its terms, s_ptr: (parts, adapters, rows, rank).
    """
    first_row, part, first_rank = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2) * BLOCK_R
    a_size, s_size = tl.cast(rank, tl.int64) * size, tl.cast(rows, tl.int64) * rank
    total_0 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    total_1, total_2 = total_0, total_0
    for first in range(part * part_columns, min((part + 1) * part_columns, size), BLOCK_N):
        x_tile = load_tile(x_ptr, first_row, first, rows, size, x_row_stride, BLOCK_M, BLOCK_N, False)
        of_adapter_ptr = a_ptr
        for adapter in range(adapters):
            a_tile = load_tile(of_adapter_ptr, first_rank, first, rank, size, size, BLOCK_R, BLOCK_N, False).T
            of_adapter_ptr += a_size
            dropped = _dropped(x_tile, dropout, adapter, first_row, first, BLOCK_M, BLOCK_N).to(a_tile.dtype)
            term = tl.dot(dropped, a_tile, input_precision=PRECISION)
            total_0, total_1, total_2 = _added(term, adapter, total_0, total_1, total_2)
    s_ptr += part * adapters * s_size
    for adapter in tl.static_range(3):
        if adapter < adapters:
            total = _total_of(adapter, total_0, total_1, total_2, dropout)
            s_tile = s_ptr + adapter * s_size
            store_tile(s_tile, total, first_row, first_rank, rows, rank, rank, BLOCK_M, BLOCK_R, False)


@triton.jit
def _lora_down_grad_shared_kernel(
    p_ptr,
    x_ptr,
    grad_ptr,
    dropout,
    adapters,
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
    """dA = p^T (m * x) of each adapter; p: (adapters, rows, rank); x: (rows, size).

    Programs: tiles of columns, parts of `part_rows` rows, tiles of the rank. Each moves its part of x once, and each
    p's, and writes its terms, sums over its rows in their order, at grad_ptr: (parts, adapters, rank, size).
    """
    first_column, part, first_rank = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2) * BLOCK_R
    p_size, grad_size = tl.cast(rows, tl.int64) * rank, tl.cast(rank, tl.int64) * size
    total_0 = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    total_1, total_2 = total_0, total_0
    for first in range(part * part_rows, min((part + 1) * part_rows, rows), BLOCK_M):
        x_tile = load_tile(x_ptr, first, first_column, rows, size, x_row_stride, BLOCK_M, BLOCK_N, False)
        of_adapter_ptr = p_ptr
        for adapter in range(adapters):
            p_tile = load_tile(of_adapter_ptr, first, first_rank, rows, rank, rank, BLOCK_M, BLOCK_R, False)
            of_adapter_ptr += p_size
            dropped = _dropped(x_tile, dropout, adapter, first, first_column, BLOCK_M, BLOCK_N).to(p_tile.dtype).T
            term = tl.dot(dropped, p_tile, input_precision=PRECISION)
            total_0, total_1, total_2 = _added(term, adapter, total_0, total_1, total_2)
    grad_ptr += part * adapters * grad_size
    for adapter in tl.static_range(3):
        if adapter < adapters:
            total = _total_of(adapter, total_0, total_1, total_2, dropout)
            grad_tile = grad_ptr + adapter * grad_size
            store_tile(grad_tile, total.T, first_rank, first_column, rank, size, size, BLOCK_R, BLOCK_N, False)


@triton.jit
def _lora_input_add_shared_kernel(
    dx_ptr,
    p_ptr,
    a_ptr,
    dropout,
    adapters,
    rows,
    size,
    rank,
    dx_row_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dx += the sum over adapters of m * (p A); dx: (rows, size); p: (adapters, rows, rank); A: (adapters, rank, size).

    Programs: tiles of rows and columns. Each moves its tile of dx once, and what that needs of each p and A.
    """
    first_row, first_column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    p_size, a_size = tl.cast(rows, tl.int64) * rank, tl.cast(rank, tl.int64) * size
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for adapter in range(adapters):
        term = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first in range(0, rank, BLOCK_R):
            p_tile = load_tile(p_ptr, first_row, first, rows, rank, rank, BLOCK_M, BLOCK_R, False)
            a_tile = load_tile(a_ptr, first, first_column, rank, size, size, BLOCK_R, BLOCK_N, False)
            term = tl.dot(p_tile, a_tile, term, input_precision=PRECISION)
        total += _dropped(term, dropout, adapter, first_row, first_column, BLOCK_M, BLOCK_N)
        p_ptr += p_size
        a_ptr += a_size
    if dropout is not None:
        total *= dropout.keep_scale
    total += load_tile(dx_ptr, first_row, first_column, rows, size, dx_row_stride, BLOCK_M, BLOCK_N, False)
    store_tile(dx_ptr, total, first_row, first_column, rows, size, dx_row_stride, BLOCK_M, BLOCK_N, False)


@triton.jit
def _added(term, adapter, total_0, total_1, total_2):
    """The sums of three adapters, with a term added to that of one."""
    return (
        tl.where(adapter == 0, total_0 + term, total_0),
        tl.where(adapter == 1, total_1 + term, total_1),
        tl.where(adapter == 2, total_2 + term, total_2),
    )


@triton.jit
def _total_of(adapter: tl.constexpr, total_0, total_1, total_2, dropout):
    """One of the sums of three adapters, over the keep probability."""
    total = total_0 if adapter == 0 else (total_1 if adapter == 1 else total_2)
    if dropout is not None:
        total *= dropout.keep_scale
    return total


@triton.jit
def _dropped(tile, dropout, adapter, first_row, first_column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile with what an adapter's mask drops of it as zeros, not yet over the keep probability."""
    if dropout is not None:
        tile = tl.where(kept(dropout, first_row, first_column, BLOCK_M, BLOCK_N, adapter), tile, 0.0)
    return tile


def lora_down_shared(
    x: Tensor,
    lora_a: Tensor,
    seeds: Tensor | None,
    dropout_p: float,
    first_row: int,
    tile: NarrowTile | None = None,
) -> Tensor:
    """The operator of that name; without a tile, that of x's device. So are those below."""
    x, lora_a = row_major(x), lora_a.contiguous()
    (rows, size), (adapters, rank, _) = x.shape, lora_a.shape
    if not x.numel():
        return lora_a.new_zeros(adapters, rows, rank)
    s = lora_a.new_empty(adapters, rows, rank)
    tile = tile or select_narrow(lora_a.dtype, x.device, SHARED_TILES)
    block_r, tiles = _sum_block(rank), triton.cdiv(rows, tile.BLOCK_M)
    parts, length = cut_in_parts(x, tiles, size, tile.BLOCK_N)
    for group in _groups(adapters):
        count = group.stop - group.start
        terms = s[group] if parts == 1 else x.new_empty(parts, count, rows, rank, dtype=torch.float32)
        _lora_down_shared_kernel[(tiles, parts, triton.cdiv(rank, block_r))](
            x, lora_a[group], terms, make_dropout(_of_group(seeds, group), dropout_p, first_row), count, rows, size,
            rank, x.stride(0), length, BLOCK_R=block_r, **tile.options(),
        )  # fmt: skip
        if parts > 1:
            s[group].copy_(terms.sum(0))
    return s


def lora_down_grad_shared(
    p: Tensor, x: Tensor, seeds: Tensor | None, dropout_p: float, first_row: int, tile: NarrowTile | None = None
) -> Tensor:
    x, p = row_major(x), p.contiguous()
    (rows, size), (adapters, _, rank) = x.shape, p.shape
    if not x.numel():
        return p.new_zeros(adapters, rank, size)
    grad = p.new_empty(adapters, rank, size)
    tile = tile or select_narrow(p.dtype, x.device)
    block_r, tiles = _sum_block(rank), triton.cdiv(size, tile.BLOCK_N)
    parts, length = cut_in_parts(x, tiles, rows, tile.BLOCK_M)
    for group in _groups(adapters):
        count = group.stop - group.start
        terms = grad[group] if parts == 1 else x.new_empty(parts, count, rank, size, dtype=torch.float32)
        _lora_down_grad_shared_kernel[(tiles, parts, triton.cdiv(rank, block_r))](
            p[group], x, terms, make_dropout(_of_group(seeds, group), dropout_p, first_row), count, rows, size, rank,
            x.stride(0), length, BLOCK_R=block_r, **tile.options(),
        )  # fmt: skip
        if parts > 1:
            grad[group].copy_(terms.sum(0))
    return grad


def lora_input_add_shared_(
    dx: Tensor,
    p: Tensor,
    lora_a: Tensor,
    seeds: Tensor | None,
    dropout_p: float,
    first_row: int,
    tile: NarrowTile | None = None,
) -> None:
    (rows, size), (adapters, _, rank) = dx.shape, p.shape
    if not dx.numel():
        return
    out, tile = row_major(dx), tile or select_narrow(p.dtype, dx.device)
    _lora_input_add_shared_kernel[(triton.cdiv(rows, tile.BLOCK_M), triton.cdiv(size, tile.BLOCK_N))](
        out, p.contiguous(), lora_a.contiguous(), make_dropout(seeds, dropout_p, first_row), adapters, rows, size, rank,
        out.stride(0), BLOCK_R=rank_block(rank), **tile.options(),
    )  # fmt: skip
    if out is not dx:
        dx.copy_(out)


def _sum_block(rank: int) -> int:
    return min(32, rank_block(rank))


def _groups(adapters: int) -> list[slice]:
    """The adapters of which one program sums at a time."""
    return [slice(first, min(first + _MOST, adapters)) for first in range(0, adapters, _MOST)]


def _of_group(seeds: Tensor | None, group: slice) -> Tensor | None:
    return None if seeds is None else seeds[group]
