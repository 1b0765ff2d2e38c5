"""Rows to their experts and back: operators, autograd Functions and public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels._library import define, has_kernel
from memkernels.ops.checks import check_floating, check_same_device, check_shape
from memkernels.ops.moe import reference
from memkernels.ops.moe.plan import DispatchPlan, moe_plan, num_tokens_of
from memkernels.ops.once_differentiable import once_differentiable
from memkernels.ops.saved import exact


def _dispatch_fake(x, weights, row_of_pair, offsets, rows, token_offsets=None):
    return x.new_empty(rows, x.shape[1])


def _combine_fake(y_grouped, weights, row_of_pair, token_offsets=None):
    tokens = row_of_pair.shape[0] if token_offsets is None else token_offsets.shape[0] - 1
    return y_grouped.new_empty(tokens, y_grouped.shape[1])


def _combine_bwd_fake(dy, y_grouped, weights, row_of_pair, offsets, token_offsets=None):
    return y_grouped.new_empty(y_grouped.shape), weights.new_empty(weights.shape)


# x_grouped[r] = weights[p] x[t] for the row r of token t's choice p; zero where a row belongs to no expert. Choices and
# weights are (T, k), or (P,) beside token_offsets.
define(
    "moe_dispatch(Tensor x, Tensor? weights, Tensor row_of_pair, Tensor offsets, SymInt rows,"
    " Tensor? token_offsets=None) -> Tensor",
    _dispatch_fake,
)
# y[t] = sum over t's choices p of weights[p] y_grouped[r]
define(
    "moe_combine(Tensor y_grouped, Tensor? weights, Tensor row_of_pair, Tensor? token_offsets=None) -> Tensor",
    _combine_fake,
)
# dy_grouped[r] = weights[p] dy[t], dweights[p] = <dy[t], y_grouped[r]>
define(
    "moe_combine_bwd(Tensor dy, Tensor y_grouped, Tensor weights, Tensor row_of_pair, Tensor offsets,"
    " Tensor? token_offsets=None) -> (Tensor dy_grouped, Tensor dweights)",
    _combine_bwd_fake,
)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, row_of_pair, offsets, rows, token_offsets):
        ctx.save_for_backward(row_of_pair, token_offsets)
        return torch.ops.memkernels.moe_dispatch(x, None, row_of_pair, offsets, rows, token_offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_grouped):
        choices = ctx.saved_tensors
        return torch.ops.memkernels.moe_combine(dx_grouped, None, *choices), None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_grouped, weights, row_of_pair, offsets, token_offsets):
        ctx.rows = y_grouped.shape[0]
        kept = y_grouped if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, None if weights is None else exact(weights), row_of_pair, offsets, token_offsets)
        return torch.ops.memkernels.moe_combine(y_grouped, weights, row_of_pair, token_offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        y_grouped, weights, row_of_pair, offsets, token_offsets = ctx.saved_tensors
        dweights = None
        if ctx.needs_input_grad[1]:
            dy_grouped, dweights = torch.ops.memkernels.moe_combine_bwd(
                dy, y_grouped, weights, row_of_pair, offsets, token_offsets
            )
        else:
            dy_grouped = torch.ops.memkernels.moe_dispatch(dy, weights, row_of_pair, offsets, ctx.rows, token_offsets)
        return dy_grouped if ctx.needs_input_grad[0] else None, dweights, None, None, None


def check_tokens(name: str, tensor: Tensor, plan: DispatchPlan) -> None:
    """(T, d) of a plan's T tokens, on its device."""
    _check_plan(plan)
    _check_rows(name, tensor, num_tokens_of(plan), "T", plan)


def check_grouped(name: str, tensor: Tensor, plan: DispatchPlan) -> None:
    """(R, d) of a plan's R rows, on its device."""
    _check_plan(plan)
    _check_rows(name, tensor, plan.pair_of_row.shape[0], "R", plan)


def _check_plan(plan: DispatchPlan) -> None:
    if not isinstance(plan, DispatchPlan):
        raise TypeError(f"plan: expected a DispatchPlan, got {type(plan).__name__}.")


def _check_rows(name: str, tensor: Tensor, rows: int, symbol: str, plan: DispatchPlan) -> None:
    check_floating(name, tensor)
    if tensor.dim() != 2 or tensor.shape[0] != rows:
        raise ValueError(f"{name}: expected shape ({rows}, d), {symbol} of the plan, got {tuple(tensor.shape)}.")
    check_same_device(name, tensor, plan=plan.row_of_pair)


def check_weights(name: str, weights: Tensor, plan: DispatchPlan) -> None:
    """(T, k) or (P,), one a choice."""
    check_floating(name, weights)
    check_shape(name, weights, tuple(plan.row_of_pair.shape), "that of expert_ids")
    check_same_device("expert_ids", plan.row_of_pair, **{name: weights})


def moe_dispatch(
    x: Tensor, expert_ids: Tensor, num_experts: int, *, capacity: int | None = None
) -> tuple[Tensor, DispatchPlan]:
    """Copies each token's row to the experts it chose: rows of one expert are neighbours, in the order of the tokens.

    x_grouped[r] = x[t] for the row r = plan.row_of_pair[t, j] of token t's choice j.

    Args:
        x: (T, d); float32, bfloat16 or float16 (float64 is computed by the reference).
        expert_ids: (T, k), int64 or int32, 0 to num_experts; num_experts itself means nowhere.
        num_experts: E.
        capacity: the most rows an expert takes; None: dropless. The rest is dropped: it has no row, gets no gradient
            and is counted in `plan.dropped`.

    Returns:
        x_grouped, (R, d) like x with R = T k, or E capacity where that is less, zero where a row belongs to no expert;
        and the `DispatchPlan`.

    Raises:
        TypeError, ValueError, RuntimeError: as `moe_plan`; a shape or device of x that does not fit expert_ids.

    Saved for backward: row_of_pair, 4 bytes a choice.
    """
    check_floating("x", x)
    plan = moe_plan(expert_ids, num_experts, capacity=capacity)
    check_tokens("x", x, plan)
    return dispatch_rows(x, plan), plan


def dispatch_rows(x: Tensor, plan: DispatchPlan) -> Tensor:
    """x_grouped of x (T, d), as `moe_dispatch` has it, by a plan that there is."""
    if not has_kernel("moe_dispatch", x):
        return reference.dispatch(x, None, plan.row_of_pair, plan.pair_of_row, plan.token_offsets)
    return _Dispatch.apply(x, plan.row_of_pair, plan.offsets, plan.pair_of_row.shape[0], plan.token_offsets)


def moe_combine(y_grouped: Tensor, plan: DispatchPlan, weights: Tensor | None = None) -> Tensor:
    """Sums what a token's experts made of it.

    y[t] = sum over j of weights[t, j] y_grouped[plan.row_of_pair[t, j]], in float32, in the order of j, rounded once.

    Args:
        y_grouped: (R, d); float32, bfloat16 or float16 (float64 is computed by the reference).
        plan: that of the dispatch.
        weights: (T, k), or (P,) where the plan is so, any of those dtypes, computed with in float32; None: 1.

    Returns:
        y, (T, d), of y_grouped's dtype. A token all of whose choices were dropped is zero.

    Raises:
        TypeError: a dtype other than those above; plan is no `DispatchPlan`.
        ValueError: a shape or device that does not fit the plan.

    Saved for backward: the plan's choices and weights; y_grouped where weights need a gradient.
    """
    check_grouped("y_grouped", y_grouped, plan)
    if weights is not None:
        check_weights("weights", weights, plan)
    if not has_kernel("moe_combine", y_grouped):
        return reference.combine(y_grouped, weights, plan.row_of_pair, plan.token_offsets)
    weights = None if weights is None else weights.float()
    return _Combine.apply(y_grouped, weights, plan.row_of_pair, plan.offsets, plan.token_offsets)
