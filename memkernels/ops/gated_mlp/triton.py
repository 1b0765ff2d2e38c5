"""The gated MLP's hidden layer on GPUs: matrix products with the gated activation, or its backward, as epilogue.

gate and up, and in backward dh, live in float32 accumulators only: never rounded, never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memkernels.ops.activations_triton import act, act_and_grad
from memkernels.ops.gated_mlp.tiles import GemmTile, select_tile


@triton.jit
def _grouped_tile(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of this program's tile; GROUP_M tiles of rows share the weight's tiles in L2."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    height = min(tiles_m - group * GROUP_M, GROUP_M)
    return (group * GROUP_M + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def _load_tile(
    matrix,
    first_row,
    first_column,
    rows,
    columns,
    row_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """A tile of a row-major matrix, given as a descriptor (TMA) or a pointer; zero outside of the matrix."""
    if TMA:
        tile = matrix.load([first_row, first_column])
    else:
        row = first_row + tl.arange(0, BLOCK_ROWS)
        column = first_column + tl.arange(0, BLOCK_COLUMNS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        tile = tl.load(matrix + row.to(tl.int64)[:, None] * row_stride + column[None, :], mask=mask, other=0.0)
    return tile


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
    """A tile of gate = x w_gate^T + b_gate and of up = x w_up^T + b_up; gate is zero without w_gate."""
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, size, BLOCK_K):
        x_tile = _load_tile(x, first_row, k, rows, size, x_row_stride, BLOCK_M, BLOCK_K, TMA)
        if w_gate is not None:
            gate_tile = _load_tile(w_gate, first_column, k, hidden, size, gate_row_stride, BLOCK_N, BLOCK_K, TMA)
            gate = tl.dot(x_tile, gate_tile.T, gate, input_precision=PRECISION)
        up_tile = _load_tile(w_up, first_column, k, hidden, size, up_row_stride, BLOCK_N, BLOCK_K, TMA)
        up = tl.dot(x_tile, up_tile.T, up, input_precision=PRECISION)
    column = first_column + tl.arange(0, BLOCK_N)
    if b_gate_ptr is not None:
        gate += tl.load(b_gate_ptr + column, mask=column < hidden, other=0.0).to(tl.float32)[None, :]
    if b_up_ptr is not None:
        up += tl.load(b_up_ptr + column, mask=column < hidden, other=0.0).to(tl.float32)[None, :]
    return gate, up


@triton.jit
def _store_tile(
    matrix,
    tile,
    first_row,
    first_column,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """Stores a float32 tile, rounded, into a contiguous (rows, columns) matrix, given as a descriptor or a pointer."""
    if TMA:
        matrix.store([first_row, first_column], tile.to(matrix.dtype))
    else:
        row = first_row + tl.arange(0, BLOCK_M)
        column = first_column + tl.arange(0, BLOCK_N)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        offsets = row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(matrix + offsets, tile.to(matrix.dtype.element_ty), mask=mask)


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
    """h = act(gate) * up, or act(up) without w_gate. x: (rows, size); weights: (hidden, size); h: (rows, hidden)."""
    first_row, first_column = _grouped_tile(rows, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    gate, up = _products(
        x, w_gate, w_up, b_gate_ptr, b_up_ptr, rows, size, hidden, x_row_stride, gate_row_stride, up_row_stride,
        first_row, first_column, PRECISION, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    h_tile = act(up, ACTIVATION) if w_gate is None else act(gate, ACTIVATION) * up
    _store_tile(h, h_tile, first_row, first_column, rows, hidden, BLOCK_M, BLOCK_N, TMA)


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
    not one, so that shared memory holds the tiles of one at a time.
    """
    first_row, first_column = _grouped_tile(rows, hidden, BLOCK_M, BLOCK_N, GROUP_M)
    gate, up = _products(
        x, w_gate, w_up, b_gate_ptr, b_up_ptr, rows, size, hidden, x_row_stride, gate_row_stride, up_row_stride,
        first_row, first_column, PRECISION, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    dh = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, size, BLOCK_K):
        dy_tile = _load_tile(dy, first_row, k, rows, size, dy_row_stride, BLOCK_M, BLOCK_K, TMA)
        down_tile = _load_tile(w_down, k, first_column, size, hidden, down_row_stride, BLOCK_K, BLOCK_N, TMA)
        dh = tl.dot(dy_tile, down_tile, dh, input_precision=PRECISION)
    if w_gate is None:
        h_tile, slope = act_and_grad(up, ACTIVATION)
        dup_tile = dh * slope
    else:
        activated, slope = act_and_grad(gate, ACTIVATION)
        h_tile = activated * up
        dup_tile = dh * activated
        _store_tile(dgate, dh * up * slope, first_row, first_column, rows, hidden, BLOCK_M, BLOCK_N, TMA)
    _store_tile(h, h_tile, first_row, first_column, rows, hidden, BLOCK_M, BLOCK_N, TMA)
    _store_tile(dup, dup_tile, first_row, first_column, rows, hidden, BLOCK_M, BLOCK_N, TMA)


def _row_major(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _biases(*biases: Tensor | None) -> list[Tensor | None]:
    return [bias if bias is None else bias.contiguous() for bias in biases]


def _is_aligned(matrix: Tensor | None) -> bool:
    """Whether rows start and end at multiples of 16 elements and do not overlap.

    Triton then knows that 16 bytes at a time can be loaded, and a TMA descriptor can be made.
    """
    if matrix is None:
        return True
    row_stride, column_stride = matrix.stride()
    aligned = matrix.data_ptr() % 16 == 0 and row_stride % 16 == 0 and matrix.shape[1] % 16 == 0
    return aligned and matrix.numel() > 0 and column_stride == 1 and row_stride >= matrix.shape[1]


def _operands(tile: GemmTile, *operands: tuple[Tensor | None, str]) -> list[Tensor | TensorDescriptor | None]:
    """Matrices as the kernel takes them: descriptors where the tile goes by TMA, else themselves.

    Each comes with the letters of the block it is moved in: "mk" is BLOCK_M by BLOCK_K.
    """
    if not tile.TMA:
        return [matrix for matrix, _ in operands]
    sizes = {"m": tile.BLOCK_M, "n": tile.BLOCK_N, "k": tile.BLOCK_K}
    return [
        matrix if matrix is None else TensorDescriptor.from_tensor(matrix, [sizes[letter] for letter in letters])
        for matrix, letters in operands
    ]


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
    x, w_up, w_gate = _row_major(x), _row_major(w_up), None if w_gate is None else _row_major(w_gate)
    (rows, size), hidden = x.shape, w_up.shape[0]
    h = x.new_empty(rows, hidden)
    if h.numel():
        tile = tile or select_tile(False, x.dtype, x.device, aligned=all(map(_is_aligned, (x, w_gate, w_up, h))))
        _gated_hidden_fwd_kernel[(tile.programs(rows, hidden),)](
            *_operands(tile, (x, "mk"), (w_gate, "nk"), (w_up, "nk"), (h, "mn")),
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
    dy, w_down, x, w_up = map(_row_major, (dy, w_down, x, w_up))
    w_gate = None if w_gate is None else _row_major(w_gate)
    (rows, size), hidden = x.shape, w_up.shape[0]
    h, dup = (x.new_empty(rows, hidden) for _ in range(2))
    dgate = None if w_gate is None else torch.empty_like(h)
    if h.numel():
        # The outputs have each other's layout.
        tile = tile or select_tile(
            True, x.dtype, x.device, aligned=all(map(_is_aligned, (dy, w_down, x, w_gate, w_up, h)))
        )
        operands = _operands(
            tile, (dy, "mk"), (w_down, "kn"), (x, "mk"), (w_gate, "nk"), (w_up, "nk"),
            (h, "mn"), (dgate, "mn"), (dup, "mn"),
        )  # fmt: skip
        _gated_hidden_bwd_kernel[(tile.programs(rows, hidden),)](
            *operands, *_biases(b_gate, b_up), rows, size, hidden, *_row_strides(dy, w_down, x, w_gate, w_up),
            ACTIVATION=activation, **tile.options(),
        )  # fmt: skip
    return h, x.new_empty(0) if dgate is None else dgate, dup
