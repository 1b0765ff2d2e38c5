"""Attention modules; and what `ops.attention_block` takes of one, where it may compute it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memkernels import ops
from memkernels._library import has_kernel
from memkernels.integrations.family import Family
from memkernels.integrations.linears import is_linear
from memkernels.integrations.masks import has_cache, is_told, sequences
from memkernels.integrations.plain import has_hooks
from memkernels.integrations.projections import projected, weights
from memkernels.integrations.replacement import Replacement, argument_names, bind, by_name


def plan_attention(attention: nn.Module, family: Family) -> Replacement:
    if getattr(attention, "is_cross_attention", False):
        return Replacement("attention", left="cross attention")
    names = argument_names(attention)[1:]
    return Replacement("attention", bind(attention_forward, attention, family=family, names=names))


def attention_forward(
    attention: Any, hidden_states: Tensor, *args, family: Family, names: tuple[str, ...], **kwargs
) -> tuple[Tensor, Tensor | None]:
    """The module's own projections around `ops.apply_rotary`, and `ops.attention` where the mask is a told one.

    So it is where the implementation is "sdpa" and transformers gives no mask, which says that the mask is causal and
    nothing more. Otherwise the model's attention implementation computes; attention that fills or reads a cache is left
    to transformers, whose releases give their caches different arguments.
    """
    kwargs |= by_name(names, args)
    if has_cache(kwargs):
        return type(attention).forward(attention, hidden_states, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    position_embeddings, mask = (kwargs.pop(name, None) for name in ("position_embeddings", "attention_mask"))
    heads = (*hidden_states.shape[:-1], -1, attention.head_dim)
    states = projected(attention, family.qkv, hidden_states, _sizes(attention))
    query, key, value = (state.view(heads) for state in states)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    if position_embeddings is not None:
        query, key = ops.apply_rotary(query, key, *_tables(position_embeddings, family))
    if is_told(mask) or (_is_causal_sdpa(attention, mask, kwargs) and has_kernel("attention_fwd", query)):
        out, weights_of_keys = _attend(attention, query, key, value, mask, family), None
    else:
        out, weights_of_keys = _attend_as_transformers(attention, query, key, value, mask, family, **kwargs)
    out = getattr(attention, family.o)(out.reshape(*hidden_states.shape[:-1], -1))
    dropout = family.inner_dropouts[0]
    return (out if dropout is None else getattr(attention, dropout)(out)), weights_of_keys


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, family: Family) -> Tensor:
    packed = None if mask is None else sequences(mask)
    options = _score_options(attention, mask, family)
    if packed is not None:
        starts, longest = packed
        query, key, value = (state.flatten(0, 1) for state in (query, key, value))
        options |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
    out = ops.attention(query, key, value, **options)
    assert isinstance(out, Tensor)
    return out


def _attend_as_transformers(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, family: Family, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """The model's attention implementation, given what the family's attention module gives it."""
    if family.sliding_window is not None:
        kwargs["sliding_window"] = family.sliding_window(attention)
    for name, attribute in (("s_aux", "sinks"), ("softcap", "attn_logit_softcapping")):
        if getattr(attention, attribute, None) is not None:
            kwargs[name] = getattr(attention, attribute)
    kwargs |= {"dropout": _dropout(attention, family), "scaling": attention.scaling}
    attend = ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation, family.eager_attention)
    return attend(attention, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, **kwargs)


def _score_options(attention: Any, mask: Tensor | None, family: Family) -> dict[str, Any]:
    """How a causal attention module changes and hides scores, as `ops.attention` takes it.

    Without a mask "sdpa" knows of no window: transformers gives none where the window is longer than the keys.
    """
    window = None if mask is None or family.sliding_window is None else family.sliding_window(attention)
    sinks = getattr(attention, "sinks", None)
    return {
        "causal": True, "scale": attention.scaling, "dropout_p": _dropout(attention, family),
        "window": (-1, -1) if window is None else (window - 1, -1),
        "softcap": getattr(attention, "attn_logit_softcapping", None) or 0.0,
        "sinks": None if sinks is None else sinks.float(),
    }  # fmt: skip


def _is_causal_sdpa(attention: Any, attention_mask: Tensor | None, kwargs: dict) -> bool:
    """Whether "sdpa" would compute causal attention and nothing more: transformers then gives it no mask."""
    return (
        attention_mask is None
        and attention.config._attn_implementation == "sdpa"
        and attention.is_causal
        and kwargs.get("is_causal") is not False
    )


def fits_block(attention: Any, family: Family, x: Tensor | None = None) -> bool:
    """Whether an op may take the tensors of the projections, and of the norms of q and k, in a call with x."""
    in_parts = len(family.qkv) == 1
    return (
        type(attention) is family.attention
        and not has_hooks(attention)
        and all(is_linear(getattr(attention, name), x, in_parts=in_parts) for name in family.qkv)
        and is_linear(getattr(attention, family.o), x)
        and all(type(norm) is family.norm and not has_hooks(norm) for norm in _head_norms(attention))
    )


def takes_block(attention: Any, x: Tensor, kwargs: dict) -> bool:
    """Whether this call is one that `ops.attention_block` computes: causal, with neither a built mask nor a cache."""
    mask = kwargs.get("attention_mask")
    return (
        not has_cache(kwargs)
        and (is_told(mask) or _is_causal_sdpa(attention, mask, kwargs))
        and has_kernel("attention_fwd", x)
    )


def block_arguments(
    attention: Any,
    x: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    family: Family,
) -> dict[str, Any]:
    """What `ops.attention_block` takes of attention that fits."""
    arguments = weights(attention, x, family.qkv, "qkv", _sizes(attention))
    arguments |= weights(attention, x, (family.o,), "o", ())
    for name, norm in zip("qk", _head_norms(attention), strict=False):
        arguments[f"{name}_norm_weight"] = norm.weight
    if position_embeddings is not None:
        arguments |= dict(zip(("cos", "sin"), _tables(position_embeddings, family), strict=True))
    return arguments | {"num_heads": attention.config.num_attention_heads} | _score_options(attention, mask, family)


def _tables(position_embeddings: tuple[Tensor, Tensor], family: Family) -> tuple[Tensor, Tensor]:
    """cos and sin for both halves of a head."""
    cos, sin = position_embeddings
    return (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)) if family.half_tables else (cos, sin)


def _head_norms(attention: Any) -> tuple[Any, ...]:
    return (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()


def _sizes(attention: Any) -> tuple[int, int, int]:
    """Of q, k and v where they are one projection."""
    q = attention.config.num_attention_heads * attention.head_dim
    kv = q // getattr(attention, "num_key_value_groups", 1)
    return q, kv, kv


def _dropout(attention: Any, family: Family) -> float:
    dropout = getattr(attention, family.attention_dropout)
    return getattr(dropout, "p", dropout) if attention.training else 0.0
