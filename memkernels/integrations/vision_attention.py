"""Attention of vision towers: one projection for q, k and v, packed images or windows, both directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memkernels import ops
from memkernels._library import has_kernel
from memkernels.integrations.family import VisionTower
from memkernels.integrations.linears import is_linear
from memkernels.integrations.masks import IMPLEMENTATIONS
from memkernels.integrations.plain import has_hooks
from memkernels.integrations.projections import weights


def attention_forward(
    attention: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    max_seqlen: int | None = None,
    **kwargs,
) -> Tensor:
    """The module's own projections around `ops.apply_rotary` and `ops.attention`, for "sdpa" and "eager"."""
    if position_embeddings is None or not takes_attention(attention, hidden_states):
        kwargs |= {"position_embeddings": position_embeddings, "max_seqlen": max_seqlen}
        return type(attention).forward(attention, hidden_states, cu_seqlens, **kwargs)
    q, k, v = attention.qkv(hidden_states).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    q, k = ops.apply_rotary(q[None], k[None], *position_embeddings)
    longest = _longest(hidden_states, max_seqlen)
    out: Any = ops.attention(
        q[0], k[0], v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest,
        **_options(attention),
    )  # fmt: skip
    return attention.proj(out.flatten(1))


def takes_attention(attention: Any, x: Tensor) -> bool:
    return attention.config._attn_implementation in IMPLEMENTATIONS and has_kernel("attention_fwd", x)


def fits_block(attention: Any, tower: VisionTower, x: Tensor | None = None) -> bool:
    """Whether an op may take the tensors of the projections in a call with x."""
    return (
        type(attention) is tower.attention
        and not has_hooks(attention)
        and is_linear(attention.qkv, x, in_parts=True)
        and is_linear(attention.proj, x)
    )


def block_arguments(
    attention: Any,
    x: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    max_seqlen: int | None = None,
    **_,
) -> dict[str, Any]:
    """What `ops.attention_block` takes of attention that fits."""
    cos, sin = position_embeddings
    arguments = weights(attention, x, ("qkv",), "qkv", (attention.dim,) * 3) | weights(attention, x, ("proj",), "o", ())
    arguments |= {"num_heads": attention.num_heads, "cos": cos, "sin": sin}
    return arguments | {"cu_seqlens": cu_seqlens, "max_seqlen": _longest(x, max_seqlen)} | _options(attention)


def _options(attention: Any) -> dict[str, Any]:
    return {"scale": attention.scaling, "dropout_p": attention.attention_dropout if attention.training else 0.0}


def _longest(x: Tensor, max_seqlen: int | None) -> int | None:
    """Where it is not given: read from cu_seqlens by the op, but at most all tokens where a trace cannot read."""
    return x.shape[0] if max_seqlen is None and torch.compiler.is_compiling() else max_seqlen
