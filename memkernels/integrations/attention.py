"""Attention modules: rotary embedding, and causal attention where nothing else is asked of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memkernels import ops
from memkernels._library import has_kernel
from memkernels.integrations.family import Family
from memkernels.integrations.replacement import Replacement, bind


def plan_attention(attention: nn.Module, family: Family) -> Replacement:
    return Replacement("attention", bind(attention_forward, attention, family=family))


def attention_forward(
    attention: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    *,
    family: Family,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """The module's own projections and attention implementation around `ops.apply_rotary`.

    `ops.attention` computes where the implementation is "sdpa" and transformers gives no mask, which says that the mask
    is causal and nothing more. Generation from a cache, without gradient, is left to transformers.
    """
    # transformers called the cache past_key_values before it called it cache.
    caches = {name: kwargs.pop(name) for name in ("cache", "past_key_values") if kwargs.get(name) is not None}
    if caches and not torch.is_grad_enabled():
        return type(attention).forward(
            attention, hidden_states, position_embeddings, attention_mask, **caches, **kwargs
        )
    heads = (*hidden_states.shape[:-1], -1, attention.head_dim)
    query = attention.q_proj(hidden_states).view(heads)
    key = attention.k_proj(hidden_states).view(heads)
    value = attention.v_proj(hidden_states).view(heads)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = ops.apply_rotary(query, key, *position_embeddings)
    for cache in caches.values():
        key, value = (
            states.transpose(1, 2)
            for states in cache.update(key.transpose(1, 2), value.transpose(1, 2), attention.layer_idx)
        )
    dropout = attention.attention_dropout if attention.training else 0.0
    if attention_mask is None and _is_causal_sdpa(attention, query, value, kwargs):
        out: Any = ops.attention(query, key, value, causal=True, scale=attention.scaling, dropout_p=dropout)
        weights = None
    else:
        if family.sliding_window is not None:
            kwargs["sliding_window"] = family.sliding_window(attention)
        attend = ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation, family.eager_attention)
        states = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        out, weights = attend(attention, *states, attention_mask, dropout=dropout, scaling=attention.scaling, **kwargs)
    return attention.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


def _is_causal_sdpa(attention: Any, query: Tensor, value: Tensor, kwargs: dict) -> bool:
    """Whether "sdpa" without a mask would compute causal attention, and ops.attention has a kernel for it."""
    return (
        attention.config._attn_implementation == "sdpa"
        and attention.is_causal
        and kwargs.get("is_causal") is not False
        and query.dtype == value.dtype
        and has_kernel("attention_fwd", query)
    )
