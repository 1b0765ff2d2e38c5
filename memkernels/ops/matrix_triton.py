"""What GPU kernels of matrix products share: moving tiles of matrices, by descriptor or by pointer."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memkernels.ops.gated_mlp.tiles import GemmTile


@triton.jit
def grouped_tile(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of this program's tile; GROUP_M tiles of rows share the weight's tiles in L2."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    height = min(tiles_m - group * GROUP_M, GROUP_M)
    return (group * GROUP_M + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def load_tile(
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
def store_tile(
    matrix,
    tile,
    first_row,
    first_column,
    rows,
    columns,
    row_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """Stores a float32 tile, rounded, into a row-major (rows, columns) matrix, given as a descriptor or a pointer."""
    if TMA:
        matrix.store([first_row, first_column], tile.to(matrix.dtype))
    else:
        row = first_row + tl.arange(0, BLOCK_M)
        column = first_column + tl.arange(0, BLOCK_N)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        offsets = row.to(tl.int64)[:, None] * row_stride + column[None, :]
        tl.store(matrix + offsets, tile.to(matrix.dtype.element_ty), mask=mask)


def row_major(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def is_aligned(matrix: Tensor | None) -> bool:
    """Whether rows start and end at multiples of 16 elements and do not overlap.

    Triton then knows that 16 bytes at a time can be loaded, and a TMA descriptor can be made.
    """
    if matrix is None:
        return True
    row_stride, column_stride = matrix.stride()
    aligned = matrix.data_ptr() % 16 == 0 and row_stride % 16 == 0 and matrix.shape[1] % 16 == 0
    return aligned and matrix.numel() > 0 and column_stride == 1 and row_stride >= matrix.shape[1]


def operands(tile: GemmTile, *matrices: tuple[Tensor | None, str]) -> list[Tensor | TensorDescriptor | None]:
    """Matrices as the kernel takes them: descriptors where the tile goes by TMA, else themselves.

    Each comes with the letters of the block it is moved in: "mk" is BLOCK_M by BLOCK_K.
    """
    if not tile.TMA:
        return [matrix for matrix, _ in matrices]
    sizes = {"m": tile.BLOCK_M, "n": tile.BLOCK_N, "k": tile.BLOCK_K}
    return [
        matrix if matrix is None else TensorDescriptor.from_tensor(matrix, [sizes[letter] for letter in letters])
        for matrix, letters in matrices
    ]
