"""Attention in plain PyTorch: the specification, and the fallback where no kernel runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memkernels.ops.philox import philox, threshold


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    inner_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of `ops.attention`; a packed batch goes sequence by sequence.

    Inside it computes in float32, or wider as q is, or in `inner_dtype`: with q's own, as eager PyTorch does.
    """
    options: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "softcap": softcap, "sinks": sinks}
    options |= {
        "dropout_p": dropout_p,
        "seed": seed,
        "wide": inner_dtype or torch.promote_types(q.dtype, torch.float32),
    }
    if cu_seqlens_q is None or cu_seqlens_k is None:
        parts = [
            _sequence(q[b], k[b], v[b], alibi_slopes=_slopes(alibi_slopes, b), index=b, **options)
            for b in range(q.shape[0])
        ]
        if not parts:
            return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(0, q.shape[2], q.shape[1], dtype=torch.float32)
        return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    parts = []
    for b in range(len(starts_q) - 1):
        of_q, of_k = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        parts.append(_sequence(q[of_q], k[of_k], v[of_k], alibi_slopes=_slopes(alibi_slopes, b), index=b, **options))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)


def _slopes(alibi_slopes: Tensor | None, index: int) -> Tensor | None:
    return alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[index]


def _sequence(
    q, k, v, *, scale, causal, window, softcap, alibi_slopes, sinks, dropout_p, seed, index, wide
) -> tuple[Tensor, Tensor]:
    """One sequence: q (Sq, H, D), k (Sk, Hk, D), v (Sk, Hk, Dv) -> out (Sq, H, Dv), lse (H, Sq)."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    keys, values = (t.to(wide).repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.to(wide), keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(q.shape[0], device=q.device)[:, None]
    j = torch.arange(k.shape[0], device=q.device)[None, :]
    distance = j - (i + k.shape[0] - q.shape[0])
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(wide)[:, None, None] * distance.abs()
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if window[0] >= 0:
        hidden |= distance < -window[0]
    if window[1] >= 0:
        hidden |= distance > window[1]
    if causal:
        hidden |= distance > 0
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide)[:, None, None].expand(-1, q.shape[0], 1)], dim=-1)
    blind = (
        scores.isneginf().all(dim=-1, keepdim=True) if scores.shape[-1] else scores.new_ones(heads, q.shape[0], 1) > 0
    )
    # A row that sees nothing: finite scores for autograd, and probability zero.
    lse = torch.logsumexp(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind[..., 0], float("-inf"))
    probabilities = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)[..., : k.shape[0]]
    if dropout_p > 0:
        probabilities = probabilities * _keep(seed, index, heads, i, j, dropout_p) / (1 - dropout_p)
    out = torch.einsum("hij,jhd->ihd", probabilities, values)
    return out.to(q.dtype), lse if wide == torch.float64 else lse.float()


def _keep(seed: Tensor, index: int, heads: int, i: Tensor, j: Tensor, dropout_p: float) -> Tensor:
    """The dropout mask (H, Sq, Sk): word j % 4 of Philox at the counter (j // 4, i, index * heads + head, 0)."""
    stream = index * heads + torch.arange(heads, device=i.device)[:, None, None]
    words = torch.stack(philox(seed, (j[None] // 4, i[None], stream, torch.zeros_like(stream))))
    word = torch.gather(words, 0, (j % 4).expand(words.shape[1:])[None])[0]
    return word >= threshold(dropout_p)
