"""Decoder layers: where a sublayer and the norm in front of it become one op, or the whole layer does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memkernels import ops
from memkernels.integrations.attention import CACHES, block_arguments, fits_block, has_cache, takes_block
from memkernels.integrations.family import Family
from memkernels.integrations.mlp import activation_of, is_plain_mlp, mlp_arguments
from memkernels.integrations.norm import norm_arguments
from memkernels.integrations.plain import has_hooks
from memkernels.integrations.replacement import Replacement, bind


def plan_layer(layer: Any, family: Family, recompute: str) -> Replacement:
    activation = activation_of(layer.mlp)
    fits = {"attention": _attention_fits(layer, family), "MLP": _mlp_fits(layer, family, activation)}
    others = " and ".join(name for name, fit in fits.items() if not fit)
    left = f"{others} with an adapter, a hook, another kind of weight or activation" if others else None
    forward = bind(layer_forward, layer, family=family, activation=activation, whole=recompute == "layer")
    return Replacement("decoder layer", forward, left)


def layer_forward(
    layer: Any, hidden_states: Tensor, *, family: Family, activation: str | None, whole: bool, **kwargs
) -> Tensor:
    """The layer by `ops.attention_block` and `ops.gated_mlp`, with `whole` by `ops.decoder_layer`.

    A sublayer that its op cannot compute is called as a module, and with `whole` recomputed by torch.utils.checkpoint.
    That is asked anew at each call, since adapters, hooks, masks and caches come and go. Gradient checkpointing that
    the user enabled takes the place of `whole`; as in transformers, a layer that is checkpointed gets no cache.
    """
    if not layer.training or not torch.is_grad_enabled():
        return _layer(layer, hidden_states, family, activation, whole=False, **kwargs)
    if layer.gradient_checkpointing:
        kwargs = {name: value for name, value in kwargs.items() if name not in (*CACHES, "use_cache")}
        body = partial(_layer, layer, family=family, activation=activation, whole=False, **kwargs)
        return layer._gradient_checkpointing_func(body, hidden_states)
    return _layer(layer, hidden_states, family, activation, whole=whole and not has_cache(kwargs), **kwargs)


def _layer(
    layer: Any, hidden_states: Tensor, family: Family, activation: str | None, *, whole: bool, **kwargs
) -> Tensor:
    """h = x + attention(norm(x)), y = h + mlp(norm(h))."""
    attention, mlp = None, None
    if _attention_fits(layer, family) and takes_block(layer.self_attn, hidden_states, kwargs):
        attention = block_arguments(layer.self_attn, *kwargs["position_embeddings"])
        attention |= norm_arguments(layer.input_layernorm, hidden_states, family)
    if activation is not None and _mlp_fits(layer, family, activation):
        mlp = mlp_arguments(layer.mlp, activation)
        mlp |= norm_arguments(layer.post_attention_layernorm, hidden_states, family)
    if whole and attention is not None and mlp is not None:
        return ops.decoder_layer(hidden_states, attention, mlp)
    run = partial(checkpoint, use_reentrant=False) if whole else _call
    if attention is not None:
        hidden_states = hidden_states + ops.attention_block(hidden_states, **attention)
    else:
        hidden_states = hidden_states + run(partial(_attention_sublayer, layer, **kwargs), hidden_states)
    if mlp is not None:
        return hidden_states + ops.gated_mlp(hidden_states, **mlp)
    return hidden_states + run(partial(_mlp_sublayer, layer), hidden_states)


def _call(sublayer: Callable[[Tensor], Tensor], hidden_states: Tensor) -> Tensor:
    return sublayer(hidden_states)


def _attention_sublayer(layer: Any, hidden_states: Tensor, **kwargs) -> Tensor:
    return layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]


def _mlp_sublayer(layer: Any, hidden_states: Tensor) -> Tensor:
    return layer.mlp(layer.post_attention_layernorm(hidden_states))


def _attention_fits(layer: Any, family: Family) -> bool:
    """Whether one op may compute the attention and the norm in front of it."""
    return _norm_fits(layer.input_layernorm, family) and fits_block(layer.self_attn, family)


def _mlp_fits(layer: Any, family: Family, activation: str | None) -> bool:
    """Whether one op may compute the MLP and the norm in front of it."""
    return (
        activation is not None
        and _norm_fits(layer.post_attention_layernorm, family)
        and type(layer.mlp) is family.mlp
        and not has_hooks(layer.mlp)
        and is_plain_mlp(layer.mlp)
    )


def _norm_fits(norm: Any, family: Family) -> bool:
    return type(norm) is family.norm and not has_hooks(norm)
