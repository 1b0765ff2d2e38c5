"""The norms of an adapted weight's rows, which DoRA divides by, without the adapted weight."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels._library import define, implement_with_python
from memkernels.ops.autocast import without_autocast
from memkernels.ops.quantized.tensor import QuantizedTensor

_TILE_ELEMENTS = 1 << 20


def row_squares(weight: Tensor) -> Tensor:
    """The squared norm of each row of a weight (N, K), (N,) in float32 or wider: what a frozen weight needs once."""
    if isinstance(weight, QuantizedTensor):
        return torch.cat([row_squares(tile) for _, tile in weight.encoding.row_tiles(weight.parts, weight.dtype)])
    return torch.ops.memkernels.row_squares(weight.detach())


def adapted_row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, squares: Tensor | None) -> Tensor:
    """|w + s b A| for each row w of weight (N, K) and b of lora_b (N, r), (N,) in float32 or wider, without gradient.

    |w|^2 + 2 s (w A^T) . b + s^2 (b A A^T) . b; `squares` is |w|^2 where it is known. The norm is that of DoRA: Liu
    et al. 2024, arXiv 2402.09353, section 4.3, where it counts as a constant.
    """
    if isinstance(weight, QuantizedTensor):
        norms = [
            adapted_row_norms(tile, lora_a, lora_b[rows], scaling, None if squares is None else squares[rows])
            for rows, tile in weight.encoding.row_tiles(weight.parts, weight.dtype)
        ]
        return torch.cat(norms)
    return torch.ops.memkernels.adapted_row_norms(
        weight.detach(), lora_a.detach(), lora_b.detach(), scaling, None if squares is None else squares.detach()
    )


def row_tiles(weight: Tensor):
    """(slice, those rows in float32 or wider, which may be written) of a weight, a tile at a time."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(weight, QuantizedTensor):
        yield from weight.encoding.row_tiles(weight.parts, dtype)
        return
    rows = max(1, _TILE_ELEMENTS // max(1, weight.shape[1]))
    for first in range(0, weight.shape[0], rows):
        tile = slice(first, first + rows)
        yield tile, weight[tile].to(dtype, copy=True)


def _row_squares(weight: Tensor) -> Tensor:
    squares = _fake(weight)
    for tile, w in row_tiles(weight):
        squares[tile] = torch.linalg.vecdot(w, w)
    return squares


def _adapted_row_norms(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, squares: Tensor | None
) -> Tensor:
    with without_autocast(weight):
        total = _row_squares(weight) if squares is None else squares.clone()
        a, b = lora_a.to(total.dtype), lora_b.to(total.dtype)
        total.add_(torch.linalg.vecdot(b @ (a @ a.t()), b), alpha=scaling**2)
        for tile, w in row_tiles(weight):
            total[tile].add_(torch.linalg.vecdot(w @ a.t(), b[tile]), alpha=2 * scaling)
    return total.clamp_(min=0.0).sqrt_()


def _fake(weight, *arguments):
    return weight.new_empty(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))


define("row_squares(Tensor weight) -> Tensor", _fake)
define(
    "adapted_row_norms(Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, Tensor? squares) -> Tensor", _fake
)
implement_with_python("row_squares", _row_squares)
implement_with_python("adapted_row_norms", _adapted_row_norms)
