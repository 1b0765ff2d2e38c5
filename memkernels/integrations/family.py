"""What `patch` needs to know of a family of models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Family:
    """A family's classes in transformers, and how they differ.

    Their attributes have the names that transformers gives them throughout: q_proj, gate_proj, lm_head and so on.

    Args:
        norm: an RMS norm of `weight` and `variance_epsilon`.
        attention: projections, with `q_norm` and `k_norm` over the heads if it has them, rotary embedding, attention.
        mlp: down_proj(act_fn(gate_proj(x)) * up_proj(x)).
        decoder_layer: h = x + self_attn(input_layernorm(x)), y = h + mlp(post_attention_layernorm(h)).
        model: embeddings, decoder layers and a norm.
        causal_lm: `model`, then `lm_head` and ForCausalLMLoss.
        eager_attention: what computes attention where the configuration says "eager".
        norm_offset: what the norm adds to its weight.
        sliding_window: the window that an attention module passes on; None: it passes none.
    """

    norm: type[nn.Module]
    attention: type[nn.Module]
    mlp: type[nn.Module]
    decoder_layer: type[nn.Module]
    model: type[nn.Module]
    causal_lm: type[nn.Module]
    eager_attention: Callable
    norm_offset: float = 0.0
    sliding_window: Callable[[nn.Module], int | None] | None = None


def family_of(module: nn.Module) -> Family | None:
    """The family whose file in transformers defines the module's class. No other family's code is imported."""
    place = type(module).__module__.split(".")
    if place[:2] != ["transformers", "models"] or place[2] not in FAMILIES:
        return None
    return importlib.import_module(f"memkernels.integrations.{place[2]}").FAMILY
