"""Grouped products on GPUs: rows are gathered where they are multiplied, and no group is padded to a capacity.

Which expert and rows a program has, it finds from the groups' offsets: the host knows but how many tiles there can be.
Offsets are clamped and row numbers masked before they become addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memkernels.ops.gated_mlp.tiles import GemmTile
from memkernels.ops.matrix_triton import grouped_tile, is_aligned, load_tile, row_major, store_tile
from memkernels.ops.moe import products
from memkernels.ops.moe.tiles import PRODUCT, QUANTIZED, WEIGHT_GRAD, select_tile
from memkernels.ops.quantized.triton import KINDS, in_parts, stored_matrix
from memkernels.ops.quantized.triton_tiles import Stored, quantized_tile


@triton.jit
def _group_of_tile(offsets_ptr, tile, experts, num_rows, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """The group of a tile of at most BLOCK_M rows, its first row, and the end of the group's rows.

    Tiles are numbered group by group. Rows beyond the last group are group `experts`. Beyond the last tile: no row.
    """
    group = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets_ptr + group, mask=group <= experts, other=num_rows)
    end = tl.load(offsets_ptr + group + 1, mask=group < experts, other=num_rows)
    begin = tl.minimum(tl.maximum(begin, 0), num_rows)
    end = tl.minimum(tl.maximum(end, 0), num_rows)
    tiles = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M)
    within = tile - (tl.cumsum(tiles, 0) - tiles)
    here = (within >= 0) & (within < tiles)
    first_row = tl.sum(tl.where(here, begin + within * BLOCK_M, 0), 0)
    return tl.sum(tl.where(here, group, 0), 0), first_row, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def _source_rows(rows_ptr, row, end, num_sources):
    """Which rows of a matrix are gathered, in int64, and which of them there are."""
    mask = row < end
    source = row
    if rows_ptr is not None:
        source = tl.load(rows_ptr + row, mask=mask, other=-1)
    return source.to(tl.int64), mask & (source >= 0) & (source < num_sources)


@triton.jit
def _weight_tile(
    weights,
    stored,
    expert,
    first_row,
    first_column,
    rows,
    columns,
    stride,
    row_stride,
    dtype: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TMA: tl.constexpr,
):
    """A tile of an expert's matrix, stored (rows, columns); zero outside of it."""
    if weights is None:
        first, end = expert * rows + first_row, (expert + 1) * rows
        tile = quantized_tile(stored, first, first_column, end, columns, BLOCK_ROWS, BLOCK_COLUMNS, SEGMENTS).to(dtype)
    elif TMA:
        tile = weights.load([expert, first_row, first_column]).reshape(BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        matrix_ptr = weights + expert.to(tl.int64) * stride
        tile = load_tile(
            matrix_ptr, first_row, first_column, rows, columns, row_stride, BLOCK_ROWS, BLOCK_COLUMNS, False
        )
    return tile


@triton.jit
def _grouped_product_kernel(
    y_ptr,
    x_ptr,
    rows_ptr,
    weights,
    stored,
    offsets_ptr,
    num_rows,
    num_sources,
    tiles_m,
    columns,
    inner,
    experts,
    x_row_stride,
    weight_stride,
    weight_row_stride,
    ADD: tl.constexpr,
    BY_ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y[r] = x[rows[r]] W_e for the rows r of group e, zero beyond the last group; ADD: on top of y, and no row beyond.

    y: (num_rows, columns); x: (num_sources, inner). BY_ROWS: W_e is the transpose of a stored (columns, inner), else
    it is stored (inner, columns); dense (`weights`), or quantised (`stored`), one expert's rows under another's.
    Programs: tiles of at most BLOCK_M rows of one group, of which there are at most tiles_m, by tiles of columns. Each
    moves its rows of x and its columns of W_e once.
    """
    first, first_column = grouped_tile(tiles_m * BLOCK_M, columns, BLOCK_M, BLOCK_N, GROUP_M)
    expert, first_row, end = _group_of_tile(offsets_ptr, first // BLOCK_M, experts, num_rows, BLOCK_M, BLOCK_E)
    source, mask = _source_rows(rows_ptr, first_row + tl.arange(0, BLOCK_M), end, num_sources)
    x_rows_ptr = x_ptr + source[:, None] * x_row_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, tl.where((first_row < end) & (expert < experts), inner, 0), BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x_rows_ptr + column[None, :], mask=mask[:, None] & (column < inner)[None, :], other=0.0)
        if BY_ROWS:
            w_tile = _weight_tile(
                weights, stored, expert, first_column, k, columns, inner, weight_stride, weight_row_stride,
                x_tile.dtype, BLOCK_N, BLOCK_K, SEGMENTS, TMA,
            ).T  # fmt: skip
        else:
            w_tile = _weight_tile(
                weights, stored, expert, k, first_column, inner, columns, weight_stride, weight_row_stride,
                x_tile.dtype, BLOCK_K, BLOCK_N, SEGMENTS, TMA,
            )  # fmt: skip
        total = tl.dot(x_tile.to(w_tile.dtype), w_tile, total, input_precision=PRECISION)
    if ADD:
        end = tl.where(expert < experts, end, first_row)
        total += load_tile(y_ptr, first_row, first_column, end, columns, columns, BLOCK_M, BLOCK_N, False)
    store_tile(y_ptr, total, first_row, first_column, end, columns, columns, BLOCK_M, BLOCK_N, False)


@triton.jit
def _grouped_weight_grad_kernel(
    dweights_ptr,
    dy_ptr,
    dy_rows_ptr,
    x_ptr,
    x_rows_ptr,
    offsets_ptr,
    num_rows,
    dy_sources,
    x_sources,
    columns,
    inner,
    dy_row_stride,
    x_row_stride,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """dweights[e] = sum over the rows r of group e, in their order, of dy[dy_rows[r]]^T x[x_rows[r]].

    dy: (dy_sources, columns); x: (x_sources, inner); dweights: (experts, columns, inner). Programs: tiles of one
    expert's matrix, by experts. Each moves its columns of dy and of x once. Nothing goes by TMA.
    """
    expert = tl.program_id(1)
    first_row, first_column = grouped_tile(columns, inner, BLOCK_M, BLOCK_N, GROUP_M)
    begin = max(tl.load(offsets_ptr + expert), 0)
    end = min(tl.load(offsets_ptr + expert + 1), num_rows)
    dy_column, x_column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = dweights_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(begin, end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        source, mask = _source_rows(dy_rows_ptr, row, end, dy_sources)
        dy_mask = mask[:, None] & (dy_column < columns)[None, :]
        dy_tile = tl.load(dy_ptr + source[:, None] * dy_row_stride + dy_column[None, :], mask=dy_mask, other=0.0)
        source, mask = _source_rows(x_rows_ptr, row, end, x_sources)
        x_mask = mask[:, None] & (x_column < inner)[None, :]
        x_tile = tl.load(x_ptr + source[:, None] * x_row_stride + x_column[None, :], mask=x_mask, other=0.0)
        total = tl.dot(dy_tile.to(dtype).T, x_tile.to(dtype), total, input_precision=PRECISION)
    dweights_ptr += expert.to(tl.int64) * columns * inner
    store_tile(dweights_ptr, total, first_row, first_column, columns, inner, inner, BLOCK_M, BLOCK_N, False)


def _contiguous(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows.contiguous()


def _stored(weights: Tensor) -> tuple[Tensor, bool]:
    """Weights (E, in, out) with neighbours in memory in the last dimension, and whether they are so (E, out, in)."""
    if weights.stride(2) == 1:
        return weights, False
    return (weights.transpose(1, 2), True) if weights.stride(1) == 1 else (weights.contiguous(), False)


def _launch_product(
    y: Tensor,
    x: Tensor,
    rows: Tensor | None,
    weights: Tensor | None,
    stored: Stored | None,
    offsets: Tensor,
    tile: GemmTile,
    *,
    by_rows: bool,
    add: bool = False,
    segments: bool = False,
    **options: Any,
) -> Tensor:
    """Fills y as the kernel says; options: of the compiler."""
    (num_rows, columns), experts = y.shape, offsets.shape[0] - 1
    blocks = [1, tile.BLOCK_N, tile.BLOCK_K] if by_rows else [1, tile.BLOCK_K, tile.BLOCK_N]
    # Each group, that of rows beyond the last included, has at most one tile that is not full.
    tiles_m = (num_rows + (experts + 1) * (tile.BLOCK_M - 1)) // tile.BLOCK_M
    strides = (0, 0) if weights is None else weights.stride()[:2]
    if weights is not None and tile.TMA:
        weights = TensorDescriptor.from_tensor(weights, blocks)
    _grouped_product_kernel[(tile.programs(tiles_m * tile.BLOCK_M, columns),)](
        y, x, _contiguous(rows), weights, stored, offsets.contiguous(), num_rows, x.shape[0], tiles_m, columns,
        x.shape[1], experts, x.stride(0), *strides, ADD=add, BY_ROWS=by_rows, SEGMENTS=segments,
        BLOCK_E=triton.next_power_of_2(experts + 1), **tile.options(), **options,
    )  # fmt: skip
    return y


def grouped_product(
    x: Tensor,
    rows: Tensor | None,
    weights: Tensor,
    offsets: Tensor,
    num_rows: int,
    backend: str,
    tile: GemmTile | None = None,
) -> Tensor:
    """The operator of that name; without a tile, that of x's device. So are those below."""
    if backend != "triton":
        return products.grouped_product(x, rows, weights, offsets, num_rows, backend)
    y = weights.new_empty(num_rows, weights.shape[2])
    return _dense_product(y, x, rows, weights, offsets, tile)


def grouped_product_add_(
    y: Tensor, x: Tensor, weights: Tensor, offsets: Tensor, backend: str, tile: GemmTile | None = None
) -> None:
    if backend != "triton":
        return products.grouped_product_add_(y, x, weights, offsets, backend)
    rows = y.contiguous()
    _dense_product(rows, x, None, weights, offsets, tile, add=True)
    if rows is not y:
        y.copy_(rows)


def _dense_product(
    y: Tensor,
    x: Tensor,
    rows: Tensor | None,
    weights: Tensor,
    offsets: Tensor,
    tile: GemmTile | None,
    *,
    add: bool = False,
) -> Tensor:
    if not y.numel():
        return y
    x, (stored, by_rows) = row_major(x), _stored(weights)
    if tile is None:
        tma = stored.numel() > 0 and is_aligned(stored[0]) and stored.stride(0) % 16 == 0
        aligned = tma and is_aligned(x) and y.shape[1] % 16 == 0
        tile = select_tile(PRODUCT, weights.dtype, x.device, min(weights.shape[1:]), aligned=aligned, tma=tma)
    return _launch_product(y, x, rows, stored, None, offsets, tile, by_rows=by_rows, add=add)


def grouped_quantized_product(
    x: Tensor,
    rows: Tensor | None,
    parts: Sequence[Tensor],
    kind: str,
    sizes: Sequence[int],
    offsets: Tensor,
    num_rows: int,
    by_rows: bool,
    backend: str,
    tile: GemmTile | None = None,
) -> Tensor:
    experts = offsets.shape[0] - 1
    whole = kind != "nf4" or (in_parts(kind, sizes) and sizes[0] // experts % 64 == 0)
    if backend != "triton" or kind not in KINDS or not whole:
        return products.grouped_quantized_product(x, rows, parts, kind, sizes, offsets, num_rows, by_rows, backend)
    x = row_major(x)
    y = x.new_empty(num_rows, sizes[0] // experts if by_rows else sizes[1])
    if not y.numel():
        return y
    if tile is None:
        aligned = is_aligned(x) and y.shape[1] % 16 == 0
        tile = select_tile(QUANTIZED, x.dtype, x.device, min(y.shape[1], x.shape[1]), aligned=aligned, tma=False)
    stored, segments = stored_matrix(parts, kind, sizes, tile.BLOCK_K if by_rows else tile.BLOCK_N)
    return _launch_product(
        y, x, rows, None, stored, offsets, tile, by_rows=by_rows, segments=segments,
        enable_fp_fusion=stored.nested_absmax is None,
    )  # fmt: skip


def grouped_weight_grad(
    dy: Tensor,
    dy_rows: Tensor | None,
    x: Tensor,
    x_rows: Tensor | None,
    offsets: Tensor,
    backend: str,
    tile: GemmTile | None = None,
) -> Tensor:
    if backend != "triton":
        return products.grouped_weight_grad(dy, dy_rows, x, x_rows, offsets, backend)
    dy, x = row_major(dy), row_major(x)
    experts, columns, inner = offsets.shape[0] - 1, dy.shape[1], x.shape[1]
    dweights = x.new_empty(experts, columns, inner, dtype=torch.promote_types(dy.dtype, x.dtype))
    if not dweights.numel():
        return dweights
    if tile is None:
        aligned = is_aligned(dy) and is_aligned(x)
        tile = select_tile(WEIGHT_GRAD, dweights.dtype, x.device, min(columns, inner), aligned=aligned, tma=False)
    num_rows = min(matrix.shape[0] if rows is None else rows.shape[0] for matrix, rows in ((dy, dy_rows), (x, x_rows)))
    _grouped_weight_grad_kernel[(tile.programs(columns, inner), experts)](
        dweights, dy, _contiguous(dy_rows), x, _contiguous(x_rows), offsets.contiguous(), num_rows,
        dy.shape[0], x.shape[0], columns, inner, dy.stride(0), x.stride(0), **tile.options(),
    )  # fmt: skip
    return dweights
