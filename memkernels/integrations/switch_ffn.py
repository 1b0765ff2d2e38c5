"""The norms and the dense feed-forward layers of SwitchTransformers: y = x + dropout(mlp(norm(x)))."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from memkernels import ops
from memkernels.integrations.linears import is_linear
from memkernels.integrations.mlp import activation_name
from memkernels.integrations.norm import norm_weight
from memkernels.integrations.plain import has_hooks, is_own
from memkernels.integrations.projections import weights


def norm_forward(norm: Any, hidden_states: Tensor) -> Tensor:
    """`ops.rms_norm`, which computes in float32 and rounds once; to the weight's dtype where that is narrower."""
    y = ops.rms_norm(hidden_states, norm_weight(norm, hidden_states), norm.variance_epsilon)
    assert isinstance(y, Tensor)
    return y if norm.weight.dtype == torch.float32 else y.to(norm.weight.dtype)


def mlp_forward(mlp: Any, hidden_states: Tensor, *, recompute: bool) -> Tensor:
    """`ops.gated_mlp`, whose dropout is of a seed drawn at each call; without `recompute` its steps."""
    if not _fits(mlp, hidden_states):
        return type(mlp).forward(mlp, hidden_states)
    if recompute:
        return ops.gated_mlp(hidden_states, **_arguments(mlp, hidden_states))
    return mlp.wo(mlp.dropout(ops.gated_activation(mlp.wi(hidden_states), None, activation_name(mlp.act) or "")))


def feed_forward(layer: Any, hidden_states: Tensor, **kwargs) -> Tensor:
    """The norm and the MLP as one op, which keeps its input."""
    norm, mlp = layer.layer_norm, layer.mlp
    plain = type(norm) is switch.SwitchTransformersLayerNorm and type(mlp) is switch.SwitchTransformersDenseActDense
    if not plain or not is_own(norm) or not is_own(mlp) or not _fits(mlp, hidden_states):
        return type(layer).forward(layer, hidden_states, **kwargs)
    in_front = {"norm_weight": norm_weight(norm, hidden_states), "norm_eps": norm.variance_epsilon}
    return hidden_states + layer.dropout(ops.gated_mlp(hidden_states, **_arguments(mlp, hidden_states), **in_front))


def _fits(mlp: Any, x: Tensor) -> bool:
    """Whether an op may compute the MLP in this call with x."""
    return (
        activation_name(mlp.act) is not None
        and is_droppable(mlp.dropout)
        and not has_hooks(mlp.act)
        and is_linear(mlp.wi, x)
        and is_linear(mlp.wo, x)
        and len({getattr(linear, "base_layer", linear).weight.dtype for linear in (mlp.wi, mlp.wo)}) == 1
    )


def is_droppable(dropout: nn.Module) -> bool:
    """Whether an op may drop elements in a dropout's place."""
    return type(dropout) is nn.Dropout and not has_hooks(dropout) and dropout.p < 1


def _arguments(mlp: Any, x: Tensor) -> dict[str, Any]:
    arguments = weights(mlp, x, (None, "wi"), ("gate", "up"), ()) | weights(mlp, x, ("wo",), ("down",), ())
    return arguments | {"activation": activation_name(mlp.act), "dropout_p": dropout_p(mlp.dropout)}


def dropout_p(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0
