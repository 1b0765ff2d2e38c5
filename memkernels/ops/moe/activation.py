"""The activation between an expert's two products, with the router's weight in it: operators.

The weight is here and not in the epilogue of a product, since here it moves the fewest bytes. In forward it is read
once a row, 4 bytes beside the 3 n elements that the activation moves; the epilogue of the down product would read it
for each tile of columns, 4 d / 128 bytes a row. In backward its gradient <dh, act(gate) up> is of what the activation's
gradient has in registers, 4 bytes written a row; the epilogue of the product that makes dh would read gate_up for it
once more, 2 n elements a row, and write and read a partial sum for each tile of columns.
"""

from __future__ import annotations

from memkernels._library import define, implement_with_triton


def _fwd_fake(gate_up, row_weight, gated, activation):
    width = gate_up.shape[1]
    return gate_up.new_empty(gate_up.shape[0], width // 2 if gated else width)


def _bwd_fake(dh, gate_up, row_weight, gated, activation):
    return gate_up.new_empty(gate_up.shape), row_weight.new_empty(row_weight.shape)


def _bwd_in_place_fake(dh, gate_up, row_weight, gated, activation):
    return row_weight.new_empty(row_weight.shape)


# h = row_weight act(gate) up, gate beside up in a row of gate_up; ungated, row_weight act(gate_up).
define("expert_activation_fwd(Tensor gate_up, Tensor row_weight, bool gated, str activation) -> Tensor", _fwd_fake)
# dh becomes h.
define(
    "expert_activation_bwd(Tensor(a!) dh, Tensor gate_up, Tensor row_weight, bool gated, str activation)"
    " -> (Tensor dgate_up, Tensor drow_weight)",
    _bwd_fake,
)
# The same for a backward pass that recomputes gate_up, which becomes its gradient.
define(
    "expert_activation_bwd_(Tensor(a!) dh, Tensor(b!) gate_up, Tensor row_weight, bool gated, str activation)"
    " -> Tensor drow_weight",
    _bwd_in_place_fake,
)
implement_with_triton(
    "memkernels.ops.moe.triton", "expert_activation_fwd", "expert_activation_bwd", "expert_activation_bwd_"
)
