"""Grouped products by torch, on any device: one an expert, or all by `torch.nn.functional.grouped_mm`.

Of an expert's quantised weight a tile is dequantised in front of each product with it. Where adapters and activations
differ in dtype, their products are those of `lora_linear`, expert by expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from memkernels.ops.huge_pages import on_huge_pages
from memkernels.ops.lora_linear.products import lora_down, lora_down_grad, lora_up_add_
from memkernels.ops.matmul import mm
from memkernels.ops.quantized.products import encoding_of


def grouped_product(
    x: Tensor, rows: Tensor | None, weights: Tensor, offsets: Tensor, num_rows: int, backend: str
) -> Tensor:
    if backend == "grouped_mm":
        y = F.grouped_mm(_all_rows(x, rows), weights, offs=offsets[1:])
        beyond = torch.arange(num_rows, device=x.device) >= offsets[-1]
        return y.masked_fill_(beyond[:, None], 0.0)
    return loop_product(x, rows, weights, offsets, num_rows)


def loop_product(
    x: Tensor, rows: Tensor | None, weights: Tensor | Sequence[Tensor], offsets: Tensor, num_rows: int
) -> Tensor:
    """By one product an expert; weights (in, out) of each, together or apart."""
    y = on_huge_pages(weights[0].new_empty(num_rows, weights[0].shape[1]))
    end = 0
    for weight, group in zip(weights, groups_of(offsets), strict=True):
        if group.stop > group.start:
            x_rows = rows_of(x, rows, group)
            if x.dtype == weight.dtype:
                mm(x_rows, weight, out=y[group])
            else:
                y[group] = lora_down(x_rows, weight.t(), None, 0.0, 0)
        end = group.stop
    y[end:].zero_()
    return y


def grouped_product_add_(y: Tensor, x: Tensor, weights: Tensor, offsets: Tensor, backend: str) -> None:
    for weight, group in zip(weights, groups_of(offsets), strict=True):
        if group.stop > group.start:
            lora_up_add_(y[group], x[group], weight.t(), 1.0, None, None)


def grouped_weight_grad(
    dy: Tensor, dy_rows: Tensor | None, x: Tensor, x_rows: Tensor | None, offsets: Tensor, backend: str
) -> Tensor:
    if backend == "grouped_mm":
        dweights = F.grouped_mm(_all_rows(dy, dy_rows).t(), _all_rows(x, x_rows), offs=offsets[1:])
        return dweights.masked_fill_((offsets.diff() == 0)[:, None, None], 0.0)
    dtype = torch.promote_types(dy.dtype, x.dtype)
    dweights = on_huge_pages(x.new_empty(offsets.shape[0] - 1, dy.shape[1], x.shape[1], dtype=dtype))
    for dweight, group in zip(dweights, groups_of(offsets), strict=True):
        if group.stop == group.start:
            dweight.zero_()
            continue
        dy_group, x_group = rows_of(dy, dy_rows, group), rows_of(x, x_rows, group)
        if dy.dtype == x.dtype:
            mm(dy_group.t(), x_group, out=dweight)
        elif dy.dtype == dtype:
            dweight.copy_(lora_down_grad(dy_group, x_group, None, 0.0, 0))
        else:
            dweight.copy_(lora_down_grad(x_group, dy_group, None, 0.0, 0).t())
    return dweights


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
) -> Tensor:
    encoding = encoding_of(parts, kind, sizes, x.dtype)
    size = encoding.rows // (offsets.shape[0] - 1)
    y = on_huge_pages(x.new_empty(num_rows, size if by_rows else encoding.row_size))
    end = 0
    for expert, group in enumerate(groups_of(offsets)):
        if group.stop > group.start:
            x_rows, within = rows_of(x, rows, group), range(expert * size, (expert + 1) * size)
            tiles = (encoding.row_tiles if by_rows else encoding.column_tiles)(parts, x.dtype, within)
            for columns, weight in tiles:
                mm(x_rows, weight.t() if by_rows else weight, out=y[group, columns])
        end = group.stop
    y[end:].zero_()
    return y


def groups_of(offsets: Tensor) -> Iterator[slice]:
    """The rows of each group, which the device is asked for."""
    return (slice(begin, end) for begin, end in pairwise(offsets.tolist()))


def rows_of(x: Tensor, rows: Tensor | None, group: slice) -> Tensor:
    """Those of x that a group multiplies."""
    return x[group] if rows is None else x.index_select(0, rows[group])


def _all_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Contiguous, as `grouped_mm` wants them; rows that belong to no group are any of x's."""
    return x.contiguous() if rows is None or not x.shape[0] else x.index_select(0, rows.clamp(min=0))
