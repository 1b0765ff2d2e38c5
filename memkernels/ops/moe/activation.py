"""The activation between an expert's two products, with the router's weight in it: operators."""

from __future__ import annotations

from memkernels._library import define, implement_with_triton


def _fwd_fake(gate_up, row_weight, gated, activation):
    width = gate_up.shape[1]
    return gate_up.new_empty(gate_up.shape[0], width // 2 if gated else width)


def _bwd_fake(dh, gate_up, row_weight, gated, activation):
    return dh.new_empty(dh.shape), gate_up.new_empty(gate_up.shape), row_weight.new_empty(row_weight.shape)


def _bwd_in_place_fake(dh, gate_up, row_weight, gated, activation):
    return row_weight.new_empty(row_weight.shape)


# h = row_weight act(gate) up, gate beside up in a row of gate_up; ungated, row_weight act(gate_up).
define("expert_activation_fwd(Tensor gate_up, Tensor row_weight, bool gated, str activation) -> Tensor", _fwd_fake)
define(
    "expert_activation_bwd(Tensor dh, Tensor gate_up, Tensor row_weight, bool gated, str activation)"
    " -> (Tensor h, Tensor dgate_up, Tensor drow_weight)",
    _bwd_fake,
)
# In place, for a backward pass that recomputes gate_up: it becomes its gradient, and dh becomes h.
define(
    "expert_activation_bwd_(Tensor(a!) dh, Tensor(b!) gate_up, Tensor row_weight, bool gated, str activation)"
    " -> Tensor drow_weight",
    _bwd_in_place_fake,
)
implement_with_triton(
    "memkernels.ops.moe.triton", "expert_activation_fwd", "expert_activation_bwd", "expert_activation_bwd_"
)
