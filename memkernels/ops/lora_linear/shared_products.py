"""The operators of adapters that share an input by `torch.mm`, as `products` has those of one adapter.

Without dropout the adapters are one of n r columns. With it the masks differ: a tile of tokens at a time goes through
each adapter in turn, and comes from cache for all but the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels.ops.lora_linear.dropout import row_dropout, row_dropout_add_
from memkernels.ops.lora_linear.products import add_product_, lora_down, lora_down_grad, token_tiles
from memkernels.ops.matmul import addmm, mm


def _as_columns(of_adapters: Tensor) -> Tensor:
    """(T, n r) of (n, T, r)."""
    return of_adapters.transpose(0, 1).flatten(1)


def lora_down_shared(x: Tensor, lora_a: Tensor, seeds: Tensor | None, dropout_p: float, first_row: int) -> Tensor:
    adapters, rank, _ = lora_a.shape
    if seeds is None:
        s = lora_down(x, lora_a.flatten(0, 1), None, 0.0, 0)
        return s.view(-1, adapters, rank).transpose(0, 1).contiguous()
    s = lora_a.new_empty(adapters, x.shape[0], rank)
    for tile in token_tiles(x, lora_a.dtype):
        for a, of, seed in zip(lora_a, s, seeds, strict=True):
            dropped = row_dropout(x[tile], seed, dropout_p, first_row + tile.start, a.dtype)
            mm(dropped, a.t(), out=of[tile])
    return s


def lora_input_add_shared_(
    dx: Tensor, p: Tensor, lora_a: Tensor, seeds: Tensor | None, dropout_p: float, first_row: int
) -> None:
    if seeds is None:
        add_product_(dx, _as_columns(p), lora_a.flatten(0, 1), 1.0)
        return
    for tile in token_tiles(dx, p.dtype):
        for of, a, seed in zip(p, lora_a, seeds, strict=True):
            row_dropout_add_(dx[tile], mm(of[tile], a), seed, dropout_p, first_row + tile.start)


def lora_down_grad_shared(p: Tensor, x: Tensor, seeds: Tensor | None, dropout_p: float, first_row: int) -> Tensor:
    if seeds is None:
        return lora_down_grad(_as_columns(p), x, None, 0.0, 0).view(p.shape[0], p.shape[2], x.shape[1])
    wide = torch.promote_types(p.dtype, torch.float32)
    total = torch.zeros(p.shape[0], p.shape[2], x.shape[1], dtype=wide, device=p.device)
    for tile in token_tiles(x, p.dtype):
        for of, da, seed in zip(p, total, seeds, strict=True):
            dropped = row_dropout(x[tile], seed, dropout_p, first_row + tile.start, p.dtype)
            if wide == p.dtype:
                addmm(da, of[tile].t(), dropped, out=da)
            else:
                da.add_(mm(of[tile].t(), dropped))
    return total.to(p.dtype)
