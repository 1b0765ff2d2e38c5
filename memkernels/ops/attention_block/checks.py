"""Checks of the attention half-block's arguments, before anything is computed."""

from __future__ import annotations

from torch import Tensor

from memkernels.ops.attention.checks import check_starts
from memkernels.ops.checks import check_floating, check_integer, check_same_device, check_shape


def check_layout(x: Tensor, num_heads: int, weights: dict[str, Tensor], biases: dict[str, Tensor | None]) -> int:
    """Shapes and devices of x, of w_q, w_k, w_v and w_o, and of their biases; returns D."""
    check_integer("num_heads", num_heads)
    for name, weight in weights.items():
        check_floating(name, weight)
    check_same_device("x", x, **weights, **biases)
    w_q, w_k, w_v, w_o = weights.values()
    if x.dim() == 0:
        raise ValueError("x: expected (B, S, d), or packed (T, d) or (1, T, d), got a scalar.")
    d = x.shape[-1]
    for name, weight in list(weights.items())[:3]:
        if weight.dim() != 2 or weight.shape[1] != d:
            raise ValueError(f"{name}: expected shape (out, {d}), got {tuple(weight.shape)}.")
    if w_q.shape[0] % num_heads or w_q.shape[0] == 0:
        raise ValueError(f"num_heads: expected a divisor of w_q's {w_q.shape[0]} rows, got {num_heads}.")
    size = w_q.shape[0] // num_heads
    num_kv_heads = w_k.shape[0] // size
    if w_k.shape[0] % size or num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"w_k: expected heads of {size} rows, as many as divide q's {num_heads}, got {w_k.shape[0]} rows."
        )
    if w_v.shape[0] == 0 or w_v.shape[0] % num_kv_heads:
        raise ValueError(f"w_v: expected rows for k's {num_kv_heads} heads, got {w_v.shape[0]}.")
    check_shape("w_o", w_o, (d, num_heads * (w_v.shape[0] // num_kv_heads)), "d and the heads of v's size")
    for (name, bias), weight in zip(biases.items(), weights.values(), strict=True):
        if bias is not None:
            check_floating(name, bias)
            check_shape(name, bias, (weight.shape[0],), f"w_{name[2:]}'s rows")
    return size


def check_sequences(x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> tuple[int, int, int]:
    """Sequences, tokens a row of x as the block sees it, (B, S, d) or (1, T, d), and the longest sequence."""
    if cu_seqlens is None:
        if x.dim() != 3:
            raise ValueError(f"x: expected (B, S, d), or cu_seqlens for a packed batch, got shape {tuple(x.shape)}.")
        if max_seqlen is not None:
            raise ValueError("max_seqlen: expected None without cu_seqlens, got a number.")
        return x.shape[0], x.shape[1], x.shape[1]
    if x.dim() != 2 and (x.dim() != 3 or x.shape[0] != 1):
        raise ValueError(f"x: expected (T, d) or (1, T, d) with cu_seqlens, got shape {tuple(x.shape)}.")
    check_same_device("x", x, cu_seqlens=cu_seqlens)
    longest = check_starts("cu_seqlens", cu_seqlens, x.shape[-2], "max_seqlen", max_seqlen)
    return cu_seqlens.shape[0] - 1, x.shape[-2], longest
