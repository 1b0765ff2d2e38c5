"""The experts' feed-forward layer: autograd Function and public function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memkernels._library import has_kernel
from memkernels.ops.autocast import product_dtype, without_autocast
from memkernels.ops.checks import check_dropout_p, check_flag, check_shape
from memkernels.ops.distinct import distinct
from memkernels.ops.gated_activation.op import check_activation
from memkernels.ops.gradient_sum import gradient_sums, results
from memkernels.ops.moe import activation as _activation  # noqa: F401  defines the operators
from memkernels.ops.moe import reference
from memkernels.ops.moe.dispatch import check_tokens, check_weights
from memkernels.ops.moe.dropout import DroppedExpertsProjection
from memkernels.ops.moe.plan import DispatchPlan, moe_plan, num_experts_of, token_of_row
from memkernels.ops.moe.projection import GroupedDescription, GroupedProjection, Groups
from memkernels.ops.moe.weights import (
    ExpertsWeight,
    as_product_weights,
    check_expert_weights,
    dense_of,
    projection_of,
    select_backend,
    stand_in,
)
from memkernels.ops.once_differentiable import once_differentiable
from memkernels.ops.philox import seed_tensor
from memkernels.ops.projection import split_by
from memkernels.ops.saved import compressible, exact, let_go


@dataclass(frozen=True)
class Layer:
    """What is static of one call."""

    gate_up: GroupedDescription
    down: GroupedDescription
    gated: bool
    activation: str
    recompute: bool
    on_input_grads: Callable[[Tensor | None, Tensor | None], None] | None

    def bind(self, tensors: Sequence[Tensor]) -> tuple[GroupedProjection, GroupedProjection]:
        gate_up, down = split_by((self.gate_up, self.down), tensors)
        return self.gate_up.bind(gate_up), self.down.bind(down)


def _row_weight(expert_weights: Tensor, plan: DispatchPlan) -> Tensor:
    """(R,): the router's weight of each row; zero where it belongs to no expert."""
    pair = plan.pair_of_row
    return torch.where(pair >= 0, expert_weights.reshape(-1)[pair.clamp(min=0)], 0.0)


class _MoEMLP(torch.autograd.Function):
    """Saves x, the routing and the parameters; the pre-activation too unless it is recomputed."""

    @staticmethod
    def forward(ctx, layer, *arguments):
        ctx.layer = layer
        x, expert_weights, row_of_pair, pair_of_row, offsets, counts, token_offsets, *tensors = arguments
        plan = DispatchPlan(row_of_pair, pair_of_row, offsets, counts, token_offsets)
        groups = Groups(offsets, pair_of_row.shape[0])
        with without_autocast(x):
            gate_up_projection, down = layer.bind(tensors)
            gate_up = gate_up_projection.forward(x, token_of_row(plan), groups)
            kept = None if layer.recompute else compressible(gate_up)
            ctx.save_for_backward(x, exact(expert_weights), *plan, kept, *tensors)
            h = torch.ops.memkernels.expert_activation_fwd(
                gate_up, _row_weight(expert_weights, plan), layer.gated, layer.activation
            )
            del gate_up, kept
            y_grouped = down.forward(h, None, groups)
            return torch.ops.memkernels.moe_combine(y_grouped, None, row_of_pair, token_offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        layer = ctx.layer
        x, expert_weights, row_of_pair, pair_of_row, offsets, counts, token_offsets, gate_up, *tensors = (
            ctx.saved_tensors
        )
        let_go(ctx)
        plan = DispatchPlan(row_of_pair, pair_of_row, offsets, counts, token_offsets)
        groups = Groups(offsets, pair_of_row.shape[0])
        tokens = token_of_row(plan)
        x_needed, weights_needed = ctx.needs_input_grad[1:3]
        sums = gradient_sums(tensors, ctx.needs_input_grad[8:])
        gate_up_sums, down_sums = split_by((layer.gate_up, layer.down), sums)
        with without_autocast(x):
            gate_up_projection, down = layer.bind(tensors)
            dy = dy.contiguous()
            activated = _row_weight(expert_weights, plan), layer.gated, layer.activation
            p = down.low_rank_grad(dy, tokens, groups)
            dh = down.input_grad(dy, tokens, groups, p)
            if gate_up is None:
                dgate_up = gate_up_projection.forward(x, tokens, groups)
                drow_weight = torch.ops.memkernels.expert_activation_bwd_(dh, dgate_up, *activated)
            else:
                dgate_up, drow_weight = torch.ops.memkernels.expert_activation_bwd(dh, gate_up, *activated)
            h = dh
            del dh, gate_up
            down.add_gradients(dy, tokens, h, None, groups, down_sums, p)
            del h
            p = gate_up_projection.low_rank_grad(dgate_up, None, groups)
            dx = dexpert_weights = None
            if x_needed:
                dx_grouped = gate_up_projection.input_grad(dgate_up, None, groups, p)
                dx = torch.ops.memkernels.moe_combine(dx_grouped, None, row_of_pair, token_offsets)
                del dx_grouped
            if weights_needed and drow_weight.shape[0] == 0:
                dexpert_weights = torch.zeros_like(expert_weights)
            elif weights_needed:
                dexpert_weights = torch.where(row_of_pair >= 0, drow_weight[row_of_pair.clamp(min=0)], 0.0)
            if layer.on_input_grads is not None:
                layer.on_input_grads(dx, dexpert_weights)
            gate_up_projection.add_gradients(dgate_up, None, x, tokens, groups, gate_up_sums, p)
        return None, dx, dexpert_weights, None, None, None, None, None, *results(sums)


def moe_mlp(
    x: Tensor,
    expert_ids: Tensor | DispatchPlan,
    expert_weights: Tensor,
    w_gate_up: ExpertsWeight,
    w_down: ExpertsWeight,
    *,
    activation: str = "silu",
    capacity: int | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    recompute: bool = True,
    backend: str = "auto",
    on_input_grads: Callable[[Tensor | None, Tensor | None], None] | None = None,
) -> Tensor:
    """The experts of a mixture-of-experts layer, dispatch and combine included, that keeps its input and the routing.

    y[t] = sum over j of expert_weights[t, j] f_e(x[t]) with e = expert_ids[t, j] and
    f_e(x) = (act(x W_gate^T) * (x W_up^T)) w_down[e]^T, W_gate and W_up the halves of w_gate_up[e]. With w_gate_up of n
    rows an expert instead of 2 n, f_e(x) = act(x w_gate_up[e]^T) w_down[e]^T. Shazeer et al. 2017, arXiv 1701.06538.

    The router's weight is applied to the activation, in front of the down product, and its gradient is the inner
    product of the activation with its gradient: neither the experts' inputs nor their outputs are kept. (Guo et al.
    2025, SonicMoE, arXiv 2512.14080.) Under autocast x and the experts' weights are cast as
    `torch.nn.functional.linear` casts them.

    With dropout_p, elements of what w_down multiplies are dropped and the others scaled by 1 / (1 - dropout_p): the
    expert dropout of Switch Transformers (Fedus et al. 2021, arXiv 2101.03961, section 2.4). The mask is that of
    Philox at an element's grouped row and column, made anew in backward.

    Args:
        x: (T, d); float32, bfloat16 or float16 (float64 is computed by the reference).
        expert_ids: (T, k), int64 or int32, 0 to E; E itself means nowhere. Or the `DispatchPlan` of `moe_plan`.
        expert_weights: (T, k), or (P,) beside a plan of P choices, any of those dtypes, computed with in float32.
        w_gate_up: (E, 2 n, d), or (E, n, d); x's dtype. Dense, or quantised (`memkernels.quant`) and frozen; either in
            an `ExpertsLoRAWeight` with an adapter; or a sequence of E dense tensors without the first dimension.
        w_down: (E, d, n), likewise.
        activation: silu, gelu (by erf), gelu_tanh, relu or relu_squared.
        capacity: the most rows an expert takes, as `moe_plan` has it; None: dropless.
        dropout_p: in [0, 1).
        seed: of the dropout, 64 bits; a tensor of one stays on its device. None: drawn from torch's generator.
        recompute: compute the pre-activation again in backward instead of keeping it.
        backend: as `grouped_matmul` has it.
        on_input_grads: called in backward, in front of the product that makes w_gate_up's gradient, with those of x and
            expert_weights, None where one is not wanted: what waits for them, `nn.MoE`'s exchange for one, starts
            beside it. The reference does not call it.

    Returns:
        y, like x (under autocast, of autocast's dtype). A token that goes nowhere is zero.

    Raises:
        TypeError: a dtype other than those above; recompute is no bool.
        ValueError: a shape, device, activation, capacity, dropout_p, seed or backend that does not fit; a capacity
            beside a plan; quantised weights that require a gradient.
        RuntimeError: an expert id out of range, or more of a token's choices than experts, as `moe_plan` has it.

    Saved for backward: x (d elements a token), expert_weights and the plan (12 bytes a choice), and the parameters.
    Without `recompute` also the pre-activation, 2 n elements a choice; with it backward has two products' worth more
    than the nine that keep it (a product: T k n d multiplications). Either way backward has for a moment 3 n elements a
    choice beside what is kept, and then the gradients beside 2 n: the pre-activation is let go as its gradient is made,
    unless the graph is retained. An adapter keeps nothing more: its r elements a choice are recomputed.
    """
    check_activation(activation)
    gate_up_like, down_like = stand_in("w_gate_up", w_gate_up), stand_in("w_down", w_down)
    if down_like.dim() != 3 or down_like.shape[0] == 0:
        raise ValueError(f"w_down: expected shape (E, d, n) of at least one expert, got {tuple(down_like.shape)}.")
    if isinstance(expert_ids, DispatchPlan):
        if capacity is not None:
            raise ValueError(f"capacity: expected None beside a plan, which has its own, got {capacity}.")
        plan = expert_ids
    else:
        plan = moe_plan(expert_ids, down_like.shape[0], capacity=capacity)
    check_dropout_p(dropout_p)
    check_flag("recompute", recompute)
    check_tokens("x", x, plan)
    check_weights("expert_weights", expert_weights, plan)
    check_expert_weights("w_gate_up", gate_up_like, "x", x, plan)
    width, size = gate_up_like.shape[1], down_like.shape[-1]
    check_shape("w_down", down_like, (num_experts_of(plan), x.shape[1], size), "experts, the last dimension of x, n")
    if width not in (size, 2 * size):
        raise ValueError(
            f"w_gate_up: expected shape ({down_like.shape[0]}, {2 * size}, {x.shape[1]}), or {size} in the middle where"
            f" there is no gate, got {tuple(gate_up_like.shape)}."
        )
    dtype = product_dtype(x)
    weights = as_product_weights(x, dtype, w_gate_up=w_gate_up, w_down=w_down)
    x = x.to(dtype)
    backend = select_backend(backend, x, w_gate_up, w_down)
    mask_seed = seed_tensor(seed, x.device) if dropout_p > 0.0 else None
    if not (has_kernel("moe_dispatch", x) and has_kernel("expert_activation_fwd", x)):
        dense = {name: dense_of(weight) for name, weight in weights.items()}
        with without_autocast(x):
            return reference.moe_mlp(
                x, *plan[:3], expert_weights, **dense, activation=activation, dropout_p=dropout_p, seed=mask_seed,
                token_offsets=plan.token_offsets,
            )  # fmt: skip
    gate_up, down = (projection_of(weight, backend) for weight in weights.values())
    if mask_seed is not None:
        down = DroppedExpertsProjection(down, mask_seed, dropout_p)
    layer = Layer(gate_up.description, down.description, width != size, activation, recompute, on_input_grads)
    return _MoEMLP.apply(layer, *distinct(x, expert_weights.float(), *plan, *gate_up.tensors, *down.tensors))
