"""Attention modules; and what `ops.attention_block` takes of one, where it may compute it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memkernels import ops
from memkernels._library import has_kernel
from memkernels.integrations.family import Family
from memkernels.integrations.plain import has_hooks, is_plain_linear
from memkernels.integrations.replacement import Replacement, bind

# What transformers calls a cache, and what it called it before.
CACHES = ("cache", "past_key_values")


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
    caches = {name: kwargs.pop(name) for name in CACHES if kwargs.get(name) is not None}
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
    if _is_causal_sdpa(attention, attention_mask, kwargs) and has_kernel("attention_fwd", query):
        out: Any = ops.attention(query, key, value, causal=True, scale=attention.scaling, dropout_p=dropout)
        weights = None
    else:
        if family.sliding_window is not None:
            kwargs["sliding_window"] = family.sliding_window(attention)
        attend = ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation, family.eager_attention)
        states = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        out, weights = attend(attention, *states, attention_mask, dropout=dropout, scaling=attention.scaling, **kwargs)
    return attention.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


def _is_causal_sdpa(attention: Any, attention_mask: Tensor | None, kwargs: dict) -> bool:
    """Whether "sdpa" would compute causal attention and nothing more: transformers then gives it no mask."""
    return (
        attention_mask is None
        and attention.config._attn_implementation == "sdpa"
        and attention.is_causal
        and kwargs.get("is_causal") is not False
    )


def fits_block(attention: Any, family: Family) -> bool:
    """Whether an op may take the tensors of the projections, and of the norms of q and k."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return (
        type(attention) is family.attention
        and not has_hooks(attention)
        and all(is_plain_linear(projection) for projection in projections)
        and all(type(norm) is family.norm and not has_hooks(norm) for norm in _head_norms(attention))
    )


def takes_block(attention: Any, x: Tensor, kwargs: dict) -> bool:
    """Whether this call is one that `ops.attention_block` computes: causal, with neither padding nor a cache."""
    return (
        not has_cache(kwargs)
        and _is_causal_sdpa(attention, kwargs.get("attention_mask"), kwargs)
        and has_kernel("attention_fwd", x)
    )


def has_cache(kwargs: dict) -> bool:
    return any(kwargs.get(name) is not None for name in CACHES)


def block_arguments(attention: Any, cos: Tensor, sin: Tensor) -> dict[str, Any]:
    """What `ops.attention_block` takes of attention that fits."""
    arguments = {
        "num_heads": attention.q_proj.out_features // attention.head_dim,
        "cos": cos, "sin": sin, "causal": True, "scale": attention.scaling,
        "dropout_p": attention.attention_dropout if attention.training else 0.0,
    }  # fmt: skip
    for name in "qkvo":
        projection = getattr(attention, f"{name}_proj")
        arguments |= {f"w_{name}": projection.weight, f"b_{name}": projection.bias}
    for name, norm in zip("qk", _head_norms(attention), strict=False):
        arguments[f"{name}_norm_weight"] = norm.weight
    return arguments


def _head_norms(attention: Any) -> tuple[Any, ...]:
    return (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()
