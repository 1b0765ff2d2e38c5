"""The experts of SwitchTransformers: each an MLP of its own, called with tokens, a one-hot choice and its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from memkernels import ops
from memkernels.integrations.mlp import activation_name
from memkernels.integrations.plain import has_hooks, is_own, is_plain_linear
from memkernels.integrations.replacement import Replacement, bind
from memkernels.integrations.switch_ffn import dropout_p, is_droppable


def plan_experts(experts: Any, recompute: bool) -> Replacement:
    left = why_not(experts)
    if left is not None:
        return Replacement("experts", left=left)
    return Replacement("experts", bind(experts_forward, experts, recompute=recompute))


def experts_forward(
    experts: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor, *, recompute: bool
) -> Tensor:
    """`ops.moe_mlp` of the experts that some token chose: as in transformers the others get no gradient.

    Dropout within the experts is the op's, of a seed drawn at each call. Where an expert is not a plain one,
    transformers' own.
    """
    chosen = selected_experts.sum((0, 1)).nonzero().flatten().tolist()
    if not chosen or why_not(experts) is not None:
        return type(experts).forward(experts, hidden_states, selected_experts, routing_weights)
    modules = [experts[f"expert_{expert}"] for expert in chosen]
    ids = torch.where(selected_experts.any(-1), selected_experts[..., chosen].argmax(-1), len(chosen))
    y = ops.moe_mlp(
        hidden_states, ids, routing_weights, [module.wi.weight for module in modules],
        [module.wo.weight for module in modules], activation=activation_name(modules[0].act) or "",
        dropout_p=dropout_p(modules[0].dropout), recompute=recompute,
    )  # fmt: skip
    return y.to(hidden_states.dtype)


def why_not(experts: Any) -> str | None:
    """Why `ops.moe_mlp` cannot compute the experts; None where it can."""
    modules = list(experts.values())
    if activation_name(modules[0].act) is None:
        return f"memkernels has no activation {type(modules[0].act).__name__}"
    if not all(_is_plain(module) for module in modules):
        return "an expert with a hook, an adapter or a weight of another kind"
    if len({(type(m.act), m.dropout.p, m.dropout.training, m.wi.weight.dtype, m.wo.weight.dtype) for m in modules}) > 1:
        return "experts that differ"
    return None


def _is_plain(module: Any) -> bool:
    return (
        type(module) is switch.SwitchTransformersDenseActDense
        and is_droppable(module.dropout)
        and not has_hooks(module.act)
        and is_own(module)
        and module.wi.weight.dtype == module.wo.weight.dtype
        and all(is_plain_linear(linear) and linear.bias is None for linear in (module.wi, module.wo))
    )
