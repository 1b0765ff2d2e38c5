"""The gated MLP's hidden layer on GPUs: matrix products with the gated activation, or its backward, as epilogue.

gate and up, and in backward dh, live in float32 accumulators only: never rounded, never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memkernels.ops.activations_triton import act, act_and_grad
from memkernels.ops.gated_mlp.tiles import GemmTile, select_tile
from memkernels.ops.matrix_triton import grouped_tile, is_aligned, load_tile, operands, row_major, store_tile


@triton.jit
def _products(
    x,
    w_gate,
    w_up,
    b_gate_ptr,
    b_up_ptr,
    rows,
    size,
    hidden,
    x_row_stride,
    gate_row_stride,
    up_row_stride,
    first_row,
    first_column,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile (BLOCK_M, BLOCK_N) of gate = x w_gate^T + b_gate and of up = x w_up^T + b_up; without w_gate gate is 0."""
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, size, BLOCK_K):
        x_tile = load_tile(x, first_row, k, rows, size, x_row_stride, BLOCK_M, BLOCK_K, TMA)
        if w_gate is not None:
            gate_tile = load_tile(w_gate, first_column, k, hidden, size, gate_row_stride, BLOCK_N, BLOCK_K, TMA)
            gate = tl.dot(x_tile, gate_tile.T, gate, input_precision=PRECISION)
        up_tile = load_tile(w_up, first_column, k, hidden, size, up_row_stride, BLOCK_N, BLOCK_K, TMA)
        up = tl.dot(x_tile, up_tile.T, up, input_precision=PRECISION)
    column = first_column + tl.arange(0, BLOCK_N)
    if b_gate_ptr is not None:
        gate += tl.load(b_gate_ptr + column, mask=column < hidden, other=0.0).to(tl.float32)[None, :]
    if b_up_ptr is not None:
        up += tl.load(b_up_ptr + column, mask=column < hidden, other=0.0).to(tl.float32)[None, :]
    return gate, up


@triton.jit
def _gated_hidden_fwd_kernel(
    x,
    w_gate,
    w_up,
    h,
    b_gate_ptr,
    b_up_ptr,
    rows,
    size,
    hidden,
    x_row_stride,
    gate_row_stride,
    up_row_stride,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """h = act(gate) * up, or act(up) without w_gate. x: (rows, size); weights: (hidden, size); h: (rows, hidden).

    Reads x once for each BLOCK_N columns of h and the weights once for each BLOCK_M rows, mostly out of L2, as tiles
    are grouped; writes h once. Without the fusion gate and up, 2 rows * hidden elements, are written and read beside.
    """
    first_row, first_column = grouped_tile(rows, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    gate, up = _products(
        x, w_gate, w_up, b_gate_ptr, b_up_ptr, rows, size, hidden, x_row_stride, gate_row_stride, up_row_stride,
        first_row, first_column, PRECISION, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    h_tile = act(up, ACTIVATION) if w_gate is None else act(gate, ACTIVATION) * up
    store_tile(h, h_tile, first_row, first_column, rows, hidden, hidden, BLOCK_M, BLOCK_N, TMA)


@triton.jit
def _gated_hidden_bwd_kernel(
    dy,
    w_down,
    x,
    w_gate,
    w_up,
    h,
    dgate,
    dup,
    b_gate_ptr,
    b_up_ptr,
    rows,
    size,
    hidden,
    dy_row_stride,
    down_row_stride,
    x_row_stride,
    gate_row_stride,
    up_row_stride,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """h, dgate = dh * up * act'(gate), dup = dh * act(gate) with dh = dy w_down; without w_gate dup = dh * act'(up).

    dy: (rows, size); w_down: (size, hidden); the outputs: (rows, hidden). The products by x and by dy are two loops,
    not one, so that shared memory holds the tiles of one at a time. Reads x and dy once for each BLOCK_N columns, the
    three weights once for each BLOCK_M rows, mostly out of L2; writes h, dgate and dup once. Without the fusion gate,
    up and dh, 3 rows * hidden elements, are written and read beside.
    """
    first_row, first_column = grouped_tile(rows, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    gate, up = _products(
        x, w_gate, w_up, b_gate_ptr, b_up_ptr, rows, size, hidden, x_row_stride, gate_row_stride, up_row_stride,
        first_row, first_column, PRECISION, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    dh = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, size, BLOCK_K):
        dy_tile = load_tile(dy, first_row, k, rows, size, dy_row_stride, BLOCK_M, BLOCK_K, TMA)
        down_tile = load_tile(w_down, k, first_column, size, hidden, down_row_stride, BLOCK_K, BLOCK_N, TMA)
        dh = tl.dot(dy_tile, down_tile, dh, input_precision=PRECISION)
    if w_gate is None:
        h_tile, slope = act_and_grad(up, ACTIVATION)
        dup_tile = dh * slope
    else:
        activated, slope = act_and_grad(gate, ACTIVATION)
        h_tile = activated * up
        dup_tile = dh * activated
        store_tile(dgate, dh * up * slope, first_row, first_column, rows, hidden, hidden, BLOCK_M, BLOCK_N, TMA)
    store_tile(h, h_tile, first_row, first_column, rows, hidden, hidden, BLOCK_M, BLOCK_N, TMA)
    store_tile(dup, dup_tile, first_row, first_column, rows, hidden, hidden, BLOCK_M, BLOCK_N, TMA)


def _biases(*biases: Tensor | None) -> list[Tensor | None]:
    return [bias if bias is None else bias.contiguous() for bias in biases]


def _row_strides(*matrices: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if matrix is None else matrix.stride(0) for matrix in matrices)


def gated_hidden_fwd(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    tile: GemmTile | None = None,
) -> Tensor:
    """The operator of that name; without a tile, that of x's device."""
    x, w_up, w_gate = row_major(x), row_major(w_up), None if w_gate is None else row_major(w_gate)
    (rows, size), hidden = x.shape, w_up.shape[0]
    h = x.new_empty(rows, hidden)
    if h.numel():
        tile = tile or select_tile(False, x.dtype, x.device, aligned=all(map(is_aligned, (x, w_gate, w_up, h))))
        _gated_hidden_fwd_kernel[(tile.programs(rows, hidden),)](
            *operands(tile, (x, "mk"), (w_gate, "nk"), (w_up, "nk"), (h, "mn")),
            *_biases(b_gate, b_up), rows, size, hidden, *_row_strides(x, w_gate, w_up),
            ACTIVATION=activation, **tile.options(),
        )  # fmt: skip
    return h


def gated_hidden_bwd(
    dy: Tensor,
    w_down: Tensor,
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    tile: GemmTile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of that name; without a tile, that of x's device."""
    dy, w_down, x, w_up = map(row_major, (dy, w_down, x, w_up))
    w_gate = None if w_gate is None else row_major(w_gate)
    (rows, size), hidden = x.shape, w_up.shape[0]
    h, dup = (x.new_empty(rows, hidden) for _ in range(2))
    dgate = None if w_gate is None else torch.empty_like(h)
    if h.numel():
        # The outputs have each other's layout.
        tile = tile or select_tile(
            True, x.dtype, x.device, aligned=all(map(is_aligned, (dy, w_down, x, w_gate, w_up, h)))
        )
        matrices = operands(
            tile, (dy, "mk"), (w_down, "kn"), (x, "mk"), (w_gate, "nk"), (w_up, "nk"),
            (h, "mn"), (dgate, "mn"), (dup, "mn"),
        )  # fmt: skip
        _gated_hidden_bwd_kernel[(tile.programs(rows, hidden),)](
            *matrices, *_biases(b_gate, b_up), rows, size, hidden, *_row_strides(dy, w_down, x, w_gate, w_up),
            ACTIVATION=activation, **tile.options(),
        )  # fmt: skip
    return h, x.new_empty(0) if dgate is None else dgate, dup
