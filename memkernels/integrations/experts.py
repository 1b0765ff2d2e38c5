"""The experts of a mixture: modules of 3-D weights, called with tokens, the experts of each and their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from memkernels import ops
from memkernels.integrations.mlp import activation_name
from memkernels.integrations.plain import has_hooks
from memkernels.integrations.replacement import Replacement, bind


def plan_experts(experts: Any, recompute: bool) -> Replacement:
    left = _why_not(experts)
    if left is not None:
        return Replacement("experts", left=left)
    forward = bind(experts_forward, experts, activation=activation_name(experts.act_fn), recompute=recompute)
    return Replacement("experts", forward)


def experts_forward(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    activation: str,
    recompute: bool,
) -> Tensor:
    """`ops.moe_mlp`; transformers' own where a weight is not a plain one."""
    if _why_not(experts) is not None:
        return type(experts).forward(experts, hidden_states, top_k_index, top_k_weights)
    y = ops.moe_mlp(
        hidden_states, top_k_index, top_k_weights, experts.gate_up_proj, experts.down_proj, activation=activation,
        recompute=recompute,
    )  # fmt: skip
    return y.to(hidden_states.dtype)


def _why_not(experts: Any) -> str | None:
    """Why `ops.moe_mlp` cannot compute the experts; None where it can."""
    if activation_name(experts.act_fn) is None or has_hooks(experts.act_fn):
        return f"memkernels has no activation {type(experts.act_fn).__name__}, or it has a hook"
    if experts.has_bias or experts.is_transposed or not experts.is_concatenated or experts.has_post_expert_norm:
        return "experts with biases, norms or weights of another layout"
    if type(experts)._apply_gate is not _default_apply_gate:
        return "experts with a gate of their own"
    weights = (experts.gate_up_proj, experts.down_proj)
    if any(type(weight) not in (nn.Parameter, torch.Tensor) for weight in weights):
        return "a weight of another kind"
    return None
