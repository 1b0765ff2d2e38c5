"""Products with a quantised matrix by torch, on any device and dtype; on GPUs where Triton is not taken.

In front of each product a tile of the matrix is dequantised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memkernels.ops.matmul import addmm, mm
from memkernels.ops.quantized.encoding import Encoding


def encoding_of(parts: Sequence[Tensor], kind: str, sizes: Sequence[int], dtype: torch.dtype) -> Encoding:
    """The encoding of a matrix as operators take it, of values in dtype."""
    return Encoding.kinds[kind].from_sizes(sizes, dtype, len(parts))


def quantized_linear(
    x: Tensor, bias: Tensor | None, parts: Sequence[Tensor], kind: str, sizes: Sequence[int]
) -> Tensor:
    encoding = encoding_of(parts, kind, sizes, x.dtype)
    y = x.new_empty(x.shape[0], encoding.rows)
    for rows, weight in encoding.row_tiles(parts, x.dtype):
        if bias is None:
            mm(x, weight.t(), out=y[:, rows])
        else:
            addmm(bias[rows], x, weight.t(), out=y[:, rows])
    return y


def quantized_input_grad(dy: Tensor, parts: Sequence[Tensor], kind: str, sizes: Sequence[int]) -> Tensor:
    encoding = encoding_of(parts, kind, sizes, dy.dtype)
    dx = dy.new_empty(dy.shape[0], encoding.row_size)
    for columns, weight in encoding.column_tiles(parts, dy.dtype):
        mm(dy, weight, out=dx[:, columns])
    return dx


def quantized_input_grad_add_(dx: Tensor, dy: Tensor, parts: Sequence[Tensor], kind: str, sizes: Sequence[int]) -> None:
    for columns, weight in encoding_of(parts, kind, sizes, dy.dtype).column_tiles(parts, dy.dtype):
        addmm(dx[:, columns], dy, weight, out=dx[:, columns])
