"""The operators of NF4 storage, with the reference where no kernel runs.

A tensor of n values in blocks of `block_size`: packed, (ceil(n / 2),) uint8; absmax, one a block, float32, or uint8
codes of `nested_code` (256,), in blocks of 256 with `nested_absmax` (float32) and one `offset`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memkernels._library import define, has_kernel
from memkernels.quant import reference


def _quantize_fake(values, block_size):
    n = values.numel()
    absmax = values.new_empty(-(-n // block_size), dtype=torch.float32)
    return values.new_empty((n + 1) // 2, dtype=torch.uint8), absmax


def _quantize_absmax_fake(absmax, offset, code):
    n = absmax.numel()
    return absmax.new_empty(n, dtype=torch.uint8), absmax.new_empty(-(-n // reference.NESTED_BLOCK))


define("nf4_quantize(Tensor values, int block_size) -> (Tensor packed, Tensor absmax)", _quantize_fake)
# absmax - offset in 8 bits.
define(
    "nf4_quantize_absmax(Tensor absmax, Tensor offset, Tensor code) -> (Tensor codes, Tensor nested_absmax)",
    _quantize_absmax_fake,
)
# Fills out (rows, columns) with the rectangle at (first_row, first_column) of the tensor seen as rows of row_size.
define(
    "nf4_dequantize_(Tensor(a!) out, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code,"
    " Tensor? offset, int block_size, int row_size, int first_row, int first_column) -> ()"
)


def nf4_quantize(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """packed and absmax."""
    if has_kernel("nf4_quantize", values):
        return torch.ops.memkernels.nf4_quantize(values, block_size)
    return reference.nf4_quantize(values, block_size)


def nf4_quantize_absmax(absmax: Tensor, offset: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of absmax - offset, one a block, and their absolute maxima, one for 256."""
    if has_kernel("nf4_quantize_absmax", absmax):
        return torch.ops.memkernels.nf4_quantize_absmax(absmax, offset, code)
    return reference.quantize_blocks(absmax - offset, code, reference.NESTED_BLOCK)


def nf4_dequantize_(
    out: Tensor, parts: Sequence[Tensor], block_size: int, row_size: int, first_row: int, first_column: int
) -> None:
    """The operator; `parts` are packed, absmax and, nested, the three others."""
    stored: Any = (*parts, *[None] * (5 - len(parts)), block_size, row_size, first_row, first_column)
    if has_kernel("nf4_dequantize_", out):
        torch.ops.memkernels.nf4_dequantize_(out, *stored)
    else:
        reference.nf4_dequantize_(out, *stored)
