"""Products with a quantised matrix W, which exists a tile at a time: the operators, and how they compute.

x: (T, K); dy: (T, N); W: (N, K), the values of `parts` by the encoding of `kind` and `sizes`, in x's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memkernels._library import define, implement_with_python
from memkernels.ops.quantized.encoding import Encoding

_STORED = "Tensor[] parts, str kind, int[] sizes"


def _encoding(parts: Sequence[Tensor], kind: str, sizes: Sequence[int], dtype: torch.dtype) -> Encoding:
    return Encoding.kinds[kind].from_sizes(sizes, dtype, len(parts))


def _linear_fake(x, bias, parts, kind, sizes):
    return x.new_empty(x.shape[0], sizes[0])


def _input_grad_fake(dy, parts, kind, sizes):
    return dy.new_empty(dy.shape[0], sizes[1])


def _input_grad_add_fake(dx, dy, parts, kind, sizes):
    return None


def _linear(x: Tensor, bias: Tensor | None, parts: Sequence[Tensor], kind: str, sizes: Sequence[int]) -> Tensor:
    encoding = _encoding(parts, kind, sizes, x.dtype)
    y = x.new_empty(x.shape[0], encoding.rows)
    for rows, weight in encoding.row_tiles(parts, x.dtype):
        if bias is None:
            torch.mm(x, weight.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, weight.t(), out=y[:, rows])
    return y


def _input_grad(dy: Tensor, parts: Sequence[Tensor], kind: str, sizes: Sequence[int]) -> Tensor:
    encoding = _encoding(parts, kind, sizes, dy.dtype)
    dx = dy.new_empty(dy.shape[0], encoding.row_size)
    for columns, weight in encoding.column_tiles(parts, dy.dtype):
        torch.mm(dy, weight, out=dx[:, columns])
    return dx


def _input_grad_add_(dx: Tensor, dy: Tensor, parts: Sequence[Tensor], kind: str, sizes: Sequence[int]) -> None:
    for columns, weight in _encoding(parts, kind, sizes, dy.dtype).column_tiles(parts, dy.dtype):
        torch.addmm(dx[:, columns], dy, weight, out=dx[:, columns])


# y = x W^T + bias
define(f"quantized_linear(Tensor x, Tensor? bias, {_STORED}) -> Tensor", _linear_fake)
# dx = dy W
define(f"quantized_input_grad(Tensor dy, {_STORED}) -> Tensor", _input_grad_fake)
# dx += dy W
define(f"quantized_input_grad_add_(Tensor(a!) dx, Tensor dy, {_STORED}) -> ()", _input_grad_add_fake)
implement_with_python("quantized_linear", _linear)
implement_with_python("quantized_input_grad", _input_grad)
implement_with_python("quantized_input_grad_add_", _input_grad_add_)
