"""Dropout over the rows of a matrix by a mask that is never stored: operators, and the reference as fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels._library import define, has_kernel, implement_with_triton
from memkernels.ops.lora_linear import reference


def _dropout_fake(x, seed, dropout_p, first_row, dtype):
    return x.new_empty(x.shape, dtype=dtype)


# m * x / (1 - p) in dtype, and y += m * term / (1 - p). The mask m is that of `reference.keep_mask`: a function of the
# seed (0-dim, int64) and of an element's row, counted from first_row, and column. x, y, term: (rows, columns).
define("row_dropout(Tensor x, Tensor seed, float dropout_p, int first_row, ScalarType dtype) -> Tensor", _dropout_fake)
define("row_dropout_add_(Tensor(a!) y, Tensor term, Tensor seed, float dropout_p, int first_row) -> ()")
implement_with_triton("memkernels.ops.lora_linear.triton_dropout", "row_dropout", "row_dropout_add_")


def row_dropout(x: Tensor, seed: Tensor | None, dropout_p: float, first_row: int, dtype: torch.dtype) -> Tensor:
    """m * x / (1 - p) in dtype; without a seed x itself, in dtype."""
    if seed is None:
        return x.to(dtype)
    if has_kernel("row_dropout", x) and dtype in (x.dtype, torch.float32):
        return torch.ops.memkernels.row_dropout(x, seed, dropout_p, first_row, dtype)
    return reference.row_dropout(x, seed, dropout_p, first_row, dtype)


def row_dropout_add_(y: Tensor, term: Tensor, seed: Tensor, dropout_p: float, first_row: int) -> None:
    """y += m * term / (1 - p)."""
    if has_kernel("row_dropout_add_", y) and term.dtype in (y.dtype, torch.float32):
        torch.ops.memkernels.row_dropout_add_(y, term, seed, dropout_p, first_row)
    else:
        y.add_(reference.row_dropout(term, seed, dropout_p, first_row, term.dtype))
