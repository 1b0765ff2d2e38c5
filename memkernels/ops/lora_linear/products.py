"""The operators of a low-rank adapter by torch, on any device and dtype; on GPUs where Triton is not taken.

With dropout, or where adapter and activations differ in dtype, they go tile by tile over tokens: what is dropped out or
cast exists a tile at a time, and on CPU stays in cache between the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from memkernels.ops.lora_linear.dropout import row_dropout, row_dropout_add_
from memkernels.ops.matmul import addmm, linear, mm
from memkernels.ops.quantized.products import quantized_input_grad, quantized_linear

_TILE_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}


def token_tiles(x: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Rows of x in tiles of about the bytes above, in dtype."""
    budget = _TILE_BYTES.get(x.device.type, _TILE_BYTES["cuda"])
    rows = max(64, budget // max(1, x.shape[1] * dtype.itemsize))
    return (slice(first, first + rows) for first in range(0, x.shape[0], rows))


def lora_down(x: Tensor, lora_a: Tensor, seed: Tensor | None, dropout_p: float, first_row: int) -> Tensor:
    if seed is None and x.dtype == lora_a.dtype:
        return mm(x, lora_a.t())
    s = lora_a.new_empty(x.shape[0], lora_a.shape[0])
    for tile in token_tiles(x, lora_a.dtype):
        dropped = row_dropout(x[tile], seed, dropout_p, first_row + tile.start, lora_a.dtype)
        mm(dropped, lora_a.t(), out=s[tile])
    return s


def lora_up(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    lora_b: Tensor,
    scaling: float,
    out_scale: Tensor | None,
) -> Tensor:
    y = linear(x, weight, bias if out_scale is None else None)
    lora_up_add_(y, s, lora_b, scaling, out_scale, None if out_scale is None else bias)
    return y


def lora_quantized_up(
    x: Tensor,
    parts: Sequence[Tensor],
    kind: str,
    sizes: Sequence[int],
    bias: Tensor | None,
    s: Tensor,
    lora_b: Tensor,
    scaling: float,
    out_scale: Tensor | None,
) -> Tensor:
    y = quantized_linear(x, bias if out_scale is None else None, parts, kind, sizes)
    lora_up_add_(y, s, lora_b, scaling, out_scale, None if out_scale is None else bias)
    return y


def lora_up_add_(
    y: Tensor, s: Tensor, lora_b: Tensor, scaling: float, out_scale: Tensor | None, bias: Tensor | None
) -> None:
    add_product_(y, s, lora_b.t(), scaling)
    if out_scale is not None:
        y.mul_(out_scale)
    if bias is not None:
        y.add_(bias)


def lora_up_grad(dy: Tensor, s: Tensor | None, lora_b: Tensor, scaling: float, p_needed: bool) -> tuple[Tensor, Tensor]:
    p = lora_b.new_empty((dy.shape[0], lora_b.shape[1]) if p_needed else 0)
    db = torch.zeros_like(lora_b) if s is not None else lora_b.new_empty(0)
    # In one piece where nothing is cast: a term of several would be rounded to lora_b's dtype.
    for tile in (slice(0, dy.shape[0]),) if dy.dtype == lora_b.dtype else token_tiles(dy, lora_b.dtype):
        dy_tile = dy[tile].to(lora_b.dtype)
        if p_needed:
            addmm(p.new_zeros(()), dy_tile, lora_b, alpha=scaling, out=p[tile])
        if s is not None:
            addmm(db, dy_tile.t(), s[tile], alpha=scaling, out=db)
    return p, db


def lora_input_grad(
    dy: Tensor, weight: Tensor, p: Tensor, lora_a: Tensor, seed: Tensor | None, dropout_p: float, first_row: int
) -> Tensor:
    dx = mm(dy, weight)
    lora_input_add_(dx, p, lora_a, seed, dropout_p, first_row)
    return dx


def lora_quantized_input_grad(
    dy: Tensor,
    parts: Sequence[Tensor],
    kind: str,
    sizes: Sequence[int],
    p: Tensor,
    lora_a: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    first_row: int,
) -> Tensor:
    dx = quantized_input_grad(dy, parts, kind, sizes)
    lora_input_add_(dx, p, lora_a, seed, dropout_p, first_row)
    return dx


def lora_input_add_(
    dx: Tensor, p: Tensor, lora_a: Tensor, seed: Tensor | None, dropout_p: float, first_row: int
) -> None:
    if seed is None:
        add_product_(dx, p, lora_a, 1.0)
        return
    for tile in token_tiles(dx, p.dtype):
        row_dropout_add_(dx[tile], mm(p[tile], lora_a), seed, dropout_p, first_row + tile.start)


def lora_down_grad(p: Tensor, x: Tensor, seed: Tensor | None, dropout_p: float, first_row: int) -> Tensor:
    if seed is None and x.dtype == p.dtype:
        return mm(p.t(), x)
    total = torch.zeros(p.shape[1], x.shape[1], dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
    for tile in token_tiles(x, p.dtype):
        dropped = row_dropout(x[tile], seed, dropout_p, first_row + tile.start, p.dtype)
        if total.dtype == p.dtype:
            addmm(total, p[tile].t(), dropped, out=total)
        else:
            total.add_(mm(p[tile].t(), dropped))
    return total.to(p.dtype)


def add_product_(y: Tensor, u: Tensor, v: Tensor, alpha: float) -> None:
    """y += alpha u v."""
    if u.dtype == y.dtype:
        addmm(y, u, v, alpha=alpha, out=y)
        return
    if u.dtype == torch.float32 and y.dtype == torch.bfloat16:
        (u1, u2), (v1, v2) = _in_bfloat16(u), _in_bfloat16(v)
        addmm(y, torch.cat((u1, u2, u1), 1), torch.cat((v1, v1, v2), 0), alpha=alpha, out=y)
        return
    for tile in token_tiles(y, u.dtype):
        y[tile].add_(mm(u[tile], v), alpha=alpha)


def _in_bfloat16(u: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors whose sum is u, to 2^-16 of it: products of them are summed in float32, straight into a bfloat16 y.

    Adding a float32 tensor to a bfloat16 one takes torch's CPU far longer than the product.
    """
    first = u.to(torch.bfloat16)
    return first, (u - first).to(torch.bfloat16)
