"""Decoder layers: where a sublayer's norm meets its computation, and where a layer may be recomputed whole."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memkernels.integrations.family import Family
from memkernels.integrations.mlp import activation_of, is_plain_mlp, recomputed_mlp
from memkernels.integrations.plain import has_hooks
from memkernels.integrations.replacement import Replacement, bind

_CACHE_ARGUMENTS = ("cache", "past_key_values", "use_cache")
_checkpoint = partial(checkpoint, use_reentrant=False)


def plan_layer(layer: Any, family: Family, recompute: str) -> Replacement:
    activation = activation_of(layer.mlp)
    forward = bind(layer_forward, layer, family=family, activation=activation, whole=recompute == "layer")
    left = None
    if activation is None or not spans_norm(layer, family):
        left = "its MLP has an adapter, a hook, another kind of weight or activation, and is called as it is"
    if recompute == "layer":
        return Replacement("decoder layer that keeps its input only", forward, left)
    what = "decoder layer whose MLP and norm are one and keep their input only"
    return Replacement(what, forward if left is None else None, left)


def layer_forward(
    layer: Any, hidden_states: Tensor, *, family: Family, activation: str | None, whole: bool, **kwargs
) -> Tensor:
    """A decoder layer whose MLP, norm included, keeps its input only; with `whole`, which keeps its own input only.

    Gradient checkpointing that the user enabled takes the place of `whole`. As in transformers, a layer that is
    recomputed gets no cache: it would be written twice.
    """
    body = partial(_layer, layer, family=family, activation=activation)
    recompute = layer._gradient_checkpointing_func if layer.gradient_checkpointing else _checkpoint if whole else None
    if recompute is None or not layer.training or not torch.is_grad_enabled():
        return body(hidden_states, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in _CACHE_ARGUMENTS}
    return recompute(partial(body, **kwargs), hidden_states)


def _layer(layer: Any, hidden_states: Tensor, *, family: Family, activation: str | None, **kwargs) -> Tensor:
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    hidden_states = hidden_states + attended
    if activation is not None and spans_norm(layer, family):
        return hidden_states + recomputed_mlp(layer.mlp, hidden_states, activation, layer.post_attention_layernorm)
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


def spans_norm(layer: Any, family: Family) -> bool:
    """Whether one op may compute the MLP and the norm in front of it: asked at each call, since both may change."""
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    return (
        type(norm) is family.norm
        and type(mlp) is family.mlp
        and not has_hooks(norm)
        and not has_hooks(mlp)
        and is_plain_mlp(mlp)
    )
