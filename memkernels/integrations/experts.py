"""The experts of a mixture: modules of 3-D weights, called with tokens, the experts of each and their weights.

Importing this puts "memkernels" among transformers' experts implementations: any model whose experts go by that table
takes `experts_implementation="memkernels"`, in from_pretrained or in set_experts_implementation, without `patch`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from memkernels import ops
from memkernels.integrations.mlp import activation_name
from memkernels.integrations.plain import has_hooks
from memkernels.integrations.replacement import Replacement, bind
from memkernels.nn.adapted_experts import AdaptedExperts
from memkernels.ops.checks import PLAIN_TENSORS
from memkernels.ops.moe.weights import ExpertsWeight
from memkernels.ops.quantized.tensor import QuantizedTensor


def plan_experts(experts: Any, recompute: bool) -> Replacement:
    if type(experts) is AdaptedExperts:
        return Replacement("experts", bind(adapted_forward, experts, recompute=recompute))
    left = why_not(experts)
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
    """`ops.moe_mlp`; where it cannot, what the class has: by `experts_implementation` an error."""
    if why_not(experts) is not None:
        return type(experts).forward(experts, hidden_states, top_k_index, top_k_weights)
    return _moe_mlp(experts, hidden_states, top_k_index, top_k_weights, activation, recompute)


def adapted_forward(experts: AdaptedExperts, *args, recompute: bool, **kwargs) -> Tensor:
    """That of `nn.AdaptedExperts`, with the recomputation that `patch` was given."""
    return AdaptedExperts.forward(experts, *args, recompute=recompute, **kwargs)


def experts_implementation(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the table has under "memkernels": `ops.moe_mlp`, which keeps its input and the routing.

    Raises:
        ValueError: experts that it cannot compute.
    """
    left = why_not(experts)
    if left is not None:
        raise ValueError(f"experts_implementation: memkernels does not compute {type(experts).__name__}: {left}.")
    activation = activation_name(experts.act_fn)
    assert activation is not None
    return _moe_mlp(experts, hidden_states, top_k_index, top_k_weights, activation, recompute=True)


ALL_EXPERTS_FUNCTIONS.register("memkernels", experts_implementation)


def _moe_mlp(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, activation: str, recompute: bool
) -> Tensor:
    y = ops.moe_mlp(
        hidden_states, top_k_index, top_k_weights, *_weights(experts), activation=activation, recompute=recompute
    )
    return y.to(hidden_states.dtype)


def why_not(experts: Any) -> str | None:
    """Why `ops.moe_mlp` cannot compute the experts; None where it can."""
    if experts.has_bias or experts.is_transposed or not experts.is_concatenated or experts.has_post_expert_norm:
        return "experts with biases, norms or weights of another layout"
    if experts.has_gate and type(experts)._apply_gate is not _default_apply_gate:
        return "experts with a gate of their own"
    if activation_name(experts.act_fn) is None or has_hooks(experts.act_fn):
        return f"memkernels has no activation {type(experts.act_fn).__name__}, or it has a hook"
    for given in _weights(experts):
        weight = given.weight if isinstance(given, ops.ExpertsLoRAWeight) else given
        if type(weight) not in PLAIN_TENSORS and not isinstance(weight, QuantizedTensor):
            return "a weight of another kind"
    return None


def _weights(experts: Any) -> list[ExpertsWeight]:
    return [_weight(experts, name) for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")]


def _weight(experts: Any, name: str) -> ExpertsWeight:
    """A weight of the experts; with the adapter that PEFT's target_parameters puts on it for this call, factored."""
    parametrizations = getattr(experts, "parametrizations", {})
    if name in parametrizations and len(parametrizations[name]) == 1:
        (proxy,), weight = parametrizations[name], parametrizations[name].original
        kind = type(proxy)
        if kind.__name__ == "_LoraFactorsProxy" and kind.__module__ == "peft.tuners.lora.layer":
            return ops.ExpertsLoRAWeight(weight, proxy.rhs, proxy.lhs, proxy.scaling)
    return getattr(experts, name)
