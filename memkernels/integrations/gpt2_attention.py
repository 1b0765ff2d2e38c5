"""GPT-2's attention: q, k and v are the thirds of one Conv1D, a linear layer whose weight is (in, out)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from memkernels import ops
from memkernels._library import has_kernel
from memkernels.integrations.linears import is_linear
from memkernels.integrations.plain import has_hooks
from memkernels.integrations.projections import weights
from memkernels.integrations.replacement import Replacement, bind


def plan_attention(attention: Any) -> Replacement:
    if attention.is_cross_attention:
        return Replacement("attention", left="cross attention")
    return Replacement("attention", bind(attention_forward, attention))


def attention_forward(attention: Any, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
    """The module's own projections around `ops.attention`, where that computes; else transformers'."""
    if args or not takes_attention(attention, hidden_states, kwargs):
        return type(attention).forward(attention, hidden_states, *args, **kwargs)
    heads = (*hidden_states.shape[:-1], attention.num_heads, attention.head_dim)
    query, key, value = (third.view(heads) for third in attention.c_attn(hidden_states).split(attention.split_size, -1))
    dropout = attention.attn_dropout.p if attention.training else 0.0
    out: Any = ops.attention(query, key, value, causal=True, scale=attention.scaling, dropout_p=dropout)
    return attention.resid_dropout(attention.c_proj(out.flatten(-2))), None


def takes_attention(attention: Any, x: Tensor, kwargs: dict) -> bool:
    """Whether this call is causal self-attention and nothing more: "sdpa" without a mask or a cache."""
    return (
        all(kwargs.get(name) is None for name in ("cache", "attention_mask", "encoder_hidden_states"))
        and attention.config._attn_implementation == "sdpa"
        and attention.is_causal
        and kwargs.get("is_causal") is not False
        and has_kernel("attention_fwd", x)
    )


def fits_block(attention: Any) -> bool:
    """Whether an op may take the tensors of the projections."""
    return (
        type(attention) is GPT2Attention
        and not has_hooks(attention)
        and not has_hooks(attention.attn_dropout)
        and is_linear(attention.c_attn, in_parts=True)
        and is_linear(attention.c_proj)
    )


def block_arguments(attention: Any) -> dict[str, Any]:
    """What `ops.attention_block` takes of attention that fits: the weights are views, which autograd joins again."""
    arguments = {
        "num_heads": attention.num_heads, "causal": True, "scale": attention.scaling,
        "dropout_p": attention.attn_dropout.p if attention.training else 0.0,
    }  # fmt: skip
    arguments |= weights(attention, ("c_attn",), "qkv", (attention.split_size,) * 3)
    return arguments | weights(attention, ("c_proj",), "o", ())
