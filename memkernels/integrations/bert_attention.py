"""BERT's attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.bert.modeling_bert import BertSelfAttention

from memkernels import ops
from memkernels._library import has_kernel
from memkernels.integrations.linears import is_linear
from memkernels.integrations.masks import IMPLEMENTATIONS
from memkernels.integrations.plain import has_hooks
from memkernels.integrations.projections import weights


def attention_forward(
    attention: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    *,
    packed: Any = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """The module's own projections around `ops.attention`, where that computes; else transformers'."""
    if packed is None and not takes_attention(attention, hidden_states, attention_mask, cache, kwargs):
        return type(attention).forward(attention, hidden_states, attention_mask, cache, **kwargs)
    heads = (*hidden_states.shape[:-1], attention.num_attention_heads, attention.attention_head_size)
    states = [of(hidden_states).view(heads) for of in (attention.query, attention.key, attention.value)]
    options: dict[str, Any] = {
        "scale": attention.scaling, "dropout_p": attention.dropout.p if attention.training else 0.0
    }  # fmt: skip
    if packed is not None:
        states = [of[0] for of in states]
        for name in "qk":
            options |= {f"cu_seqlens_{name}": packed.cu_seqlens, f"max_seqlen_{name}": packed.max_seqlen}
    out: Any = ops.attention(*states, **options)
    return out.reshape(*hidden_states.shape[:-1], -1), None


def takes_attention(attention: Any, x: Tensor, mask: Tensor | None, cache: Any, kwargs: dict) -> bool:
    """Whether this call is self-attention in both directions and nothing more, without a mask or a cache."""
    return (
        mask is None
        and cache is None
        and gives_no_weights(attention.config, kwargs)
        and (attention.config._attn_implementation == "sdpa" or not has_hooks(attention))
        and not attention.is_causal
        and not kwargs.get("is_causal")
        and has_kernel("attention_fwd", x)
    )


def gives_no_weights(config: Any, kwargs: dict) -> bool:
    """Whether attention is transformers' own, and this call does not ask for its weights."""
    wanted = kwargs.get("output_attentions")
    wanted = getattr(config, "output_attentions", False) if wanted is None else wanted
    return config._attn_implementation in IMPLEMENTATIONS and not wanted


def fits_block(attention: Any, x: Tensor | None = None) -> bool:
    """Whether an op may take the tensors of a BertAttention but the norm, in a call with x."""
    of, output = attention.self, attention.output
    return (
        type(of) is BertSelfAttention
        and not any(has_hooks(module) for module in (attention, of, output))
        and all(is_linear(projection, x) for projection in (of.query, of.key, of.value, output.dense))
    )


def block_arguments(attention: Any, x: Tensor, packed: Any) -> dict[str, Any]:
    """What `ops.attention_block` takes of attention that fits."""
    of = attention.self
    arguments = {
        "num_heads": of.num_attention_heads, "scale": of.scaling,
        "dropout_p": of.dropout.p if of.training else 0.0,
    }  # fmt: skip
    arguments |= weights(of, x, ("query", "key", "value"), "qkv", ())
    arguments |= weights(attention.output, x, ("dense",), "o", ())
    if packed is not None:
        arguments |= {"cu_seqlens": packed.cu_seqlens, "max_seqlen": packed.max_seqlen}
    return arguments
