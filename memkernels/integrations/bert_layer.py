"""BERT's layers, whose norms come after the residual: s = x + attention(x), h = norm(s), y = norm(h + mlp(h)).

`ops.gated_mlp` takes the first norm in front of it, so that s is kept and h is not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memkernels import ops
from memkernels.integrations.bert_attention import block_arguments, fits_block, takes_attention
from memkernels.integrations.checkpointing import run_layer
from memkernels.integrations.layer_norm import is_plain_layer_norm, layer_norm_arguments
from memkernels.integrations.linears import is_linear
from memkernels.integrations.mlp import activation_name
from memkernels.integrations.plain import has_hooks
from memkernels.integrations.projections import weights
from memkernels.integrations.replacement import Replacement, bind, why_left
from memkernels.integrations.sublayers import call


def plan_layer(layer: Any, recompute: str) -> Replacement:
    activation = activation_name(layer.intermediate.intermediate_act_fn)
    fits = {"attention": fits_block(layer.attention), "MLP": _mlp_fits(layer, activation)}
    forward = bind(layer_forward, layer, activation=activation, whole=recompute == "layer")
    return Replacement("encoder layer", forward, why_left(fits))


def layer_forward(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    *args,
    activation: str | None,
    whole: bool,
    **kwargs,
) -> Tensor:
    """The layer by `ops.attention_block`, `ops.gated_mlp` and `ops.layer_norm`, dropout between them.

    Kept, in elements a token: x, attention's output, s and h + mlp(h), 4 d; with `whole` not the last, 3 d. A sublayer
    that its op cannot compute is called as a module, and with `whole` recomputed by torch.utils.checkpoint.
    """
    kwargs |= {"attention_mask": attention_mask}
    return run_layer(partial(_layer, activation=activation), layer, hidden_states, whole=whole, **kwargs)


def _layer(layer: Any, x: Tensor, *, activation: str | None, whole: bool, **kwargs) -> Tensor:
    run = partial(checkpoint, use_reentrant=False) if whole else call
    attention, norm = layer.attention, layer.attention.output.LayerNorm
    mlp = _mlp_arguments(layer, x, activation) if activation is not None and _mlp_fits(layer, activation, x) else None
    if fits_block(attention, x) and _takes(attention.self, x, **kwargs):
        y = ops.attention_block(x, **block_arguments(attention, x, kwargs.get("packed")))
        s = x + attention.output.dropout(y)
        if mlp is not None and is_plain_layer_norm(norm):
            return run(partial(_feed_forward, layer, mlp, norm), s)
        h = norm(s)
    else:
        h = run(partial(_attention_sublayer, attention, **kwargs), x)
    return run(layer.feed_forward_chunk if mlp is None else partial(_feed_forward, layer, mlp, None), h)


def _takes(attention: Any, x: Tensor, *, packed=None, attention_mask=None, cache=None, **kwargs) -> bool:
    return packed is not None or takes_attention(attention, x, attention_mask, cache, kwargs)


def _attention_sublayer(attention: Any, hidden_states: Tensor, **kwargs) -> Tensor:
    return attention(hidden_states, **kwargs)[0]


def _feed_forward(layer: Any, mlp: dict[str, Any], norm: Any, x: Tensor) -> Tensor:
    """norm(h + dropout(mlp(h))) with h = norm(x), or x itself without a norm in front."""
    in_front = {} if norm is None else layer_norm_arguments(norm)
    h = x if norm is None else norm(x)
    y = layer.output.dropout(ops.gated_mlp(x, **mlp, **in_front))
    after = layer.output.LayerNorm
    # Under autocast the residual is wider than the product, and a layer norm is of float32.
    if not is_plain_layer_norm(after) or y.dtype != h.dtype or torch.is_autocast_enabled(h.device.type):
        return after(y + h)
    return ops.layer_norm(y, after.weight, after.bias, after.eps, residual=h)[0]


def _mlp_fits(layer: Any, activation: str | None, x: Tensor | None = None) -> bool:
    """Whether an op may compute the MLP but its dropout and the norm after it, in a call with x."""
    into, output = layer.intermediate, layer.output
    return (
        activation is not None
        and not any(has_hooks(module) for module in (into, into.intermediate_act_fn, output))
        and is_linear(into.dense, x)
        and is_linear(output.dense, x)
    )


def _mlp_arguments(layer: Any, x: Tensor, activation: str) -> dict[str, Any]:
    arguments = weights(layer.intermediate, x, ("dense",), ("up",), ())
    arguments |= weights(layer.output, x, ("dense",), ("down",), ())
    return arguments | {"w_gate": None, "activation": activation}
