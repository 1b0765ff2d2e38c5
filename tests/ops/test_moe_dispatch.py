"""ops.moe_dispatch and ops.moe_combine: against the reference, for plans of both kinds."""

from __future__ import annotations

import pytest
import torch
from experts import chosen_by_experts, random_ids

from memkernels import ops
from memkernels.ops.moe import reference
from memkernels.ops.moe.dispatch import dispatch_rows
from memkernels.testing import (
    assert_within_factor_two,
    check_op,
    implementations,
    poisoned_memory,
    random_tensor,
    saved_bytes,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
on_every_implementation = pytest.mark.parametrize("implementation", implementations("moe_dispatch"), ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ROUTINGS = {
    "dropless": ((23, 2, 5), {}),
    "nowhere": ((23, 2, 5), {"nowhere": True}),
    "one choice": ((17, 1, 4), {}),
    "more choices than registers": ((9, 11, 12), {"nowhere": True}),
    "one token": ((1, 2, 5), {}),
    "no token": ((0, 2, 5), {}),
}


@on_every_implementation
@dtypes
@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_dispatch_and_combine_match_the_reference(implementation, routing, capacity, dtype):
    shape, options = ROUTINGS[routing]
    with implementation.active() as device:
        ids = random_ids(*shape, **options).to(device)
        plan = ops.moe_plan(ids, shape[2], capacity=capacity)
        check_op(
            lambda x: ops.moe_dispatch(x, ids, shape[2], capacity=capacity)[0],
            lambda x: reference.dispatch(x, None, plan.row_of_pair, plan.pair_of_row),
            {"x": random_tensor(shape[0], 37, dtype=dtype, device=device)}, strided_grads=True,
        )  # fmt: skip
        y_grouped = random_tensor(plan.pair_of_row.shape[0], 37, dtype=dtype, device=device)
        weights = random_tensor(*shape[:2], dtype=torch.float32, device=device, seed=1)
        for inputs in ({"y_grouped": y_grouped}, {"y_grouped": y_grouped, "weights": weights}):
            check_op(
                lambda y_grouped, weights=None: ops.moe_combine(y_grouped, plan, weights),
                lambda y_grouped, weights=None: reference.combine(y_grouped, weights, plan.row_of_pair),
                inputs, strided_grads=True,
            )  # fmt: skip


@on_every_implementation
@dtypes
def test_16_mib_of_grouped_rows(implementation, dtype):
    """So many rows, each of whole lines, are written past a CPU's caches."""
    with implementation.active() as device:
        plan = ops.moe_plan(random_ids(8200, 2, 5, nowhere=True).to(device), 5)
        x = random_tensor(8200, 1024 // dtype.itemsize, dtype=dtype, device=device).detach()
        y_grouped = random_tensor(16400, x.shape[1], dtype=dtype, device=device, seed=1).detach()
        weights = torch.rand(8200, 2, device=device)
        with poisoned_memory():
            grouped = torch.ops.memkernels.moe_dispatch(x, None, plan.row_of_pair, plan.offsets, 16400)
            scaled = torch.ops.memkernels.moe_dispatch(x, weights, plan.row_of_pair, plan.offsets, 16400)
            dy_grouped, dweights = torch.ops.memkernels.moe_combine_bwd(
                x, y_grouped, weights, plan.row_of_pair, plan.offsets
            )
        assert torch.equal(grouped, reference.dispatch(x, None, plan.row_of_pair, plan.pair_of_row))
        assert torch.equal(scaled, reference.dispatch(x, weights, plan.row_of_pair, plan.pair_of_row))
        assert torch.equal(dy_grouped, scaled)
        rows = y_grouped[plan.row_of_pair.long()].masked_fill((plan.row_of_pair < 0)[..., None], 0.0)
        exact, plain = ((rows.to(wide) * x.to(wide)[:, None]).sum(-1) for wide in (torch.float64, torch.float32))
        assert_within_factor_two("dweights", dweights, exact, plain)


@on_every_implementation
@dtypes
@pytest.mark.parametrize("shape", [(5, 23, 7), (40, 9, 8), (3, 1, 1)], ids=str)
def test_dispatch_and_combine_of_tokens_with_different_numbers_of_choices(implementation, shape, dtype):
    """Of the second shape a token has more choices than registers hold; of the last none."""
    with implementation.active() as device:
        plan = chosen_by_experts(*shape, device)
        rows, tokens = plan.pair_of_row.shape[0], shape[1]
        check_op(
            lambda x: dispatch_rows(x, plan),
            lambda x: reference.dispatch(x, None, plan.row_of_pair, plan.pair_of_row, plan.token_offsets),
            {"x": random_tensor(tokens, 37, dtype=dtype, device=device)}, strided_grads=True,
        )  # fmt: skip
        y_grouped = random_tensor(rows, 37, dtype=dtype, device=device)
        weights = random_tensor(rows, dtype=torch.float32, device=device, seed=1)
        for inputs in ({"y_grouped": y_grouped}, {"y_grouped": y_grouped, "weights": weights}):
            check_op(
                lambda y_grouped, weights=None: ops.moe_combine(y_grouped, plan, weights),
                lambda y_grouped, weights=None: reference.combine(
                    y_grouped, weights, plan.row_of_pair, plan.token_offsets
                ),
                inputs, strided_grads=True,
            )  # fmt: skip


@on_every_implementation
def test_combine_gives_each_its_gradient_alone(implementation):
    with implementation.active() as device:
        plan = ops.moe_plan(random_ids(9, 2, 4, nowhere=True).to(device), 4)
        y_grouped = random_tensor(18, 5, dtype=torch.float32, device=device)
        weights = random_tensor(9, 2, dtype=torch.float32, device=device, seed=1)
        both = torch.autograd.grad(ops.moe_combine(y_grouped, plan, weights).sum(), (y_grouped, weights))
        (alone,) = torch.autograd.grad(ops.moe_combine(y_grouped, plan, weights.detach()).sum(), (y_grouped,))
        assert torch.equal(alone, both[0])
        (alone,) = torch.autograd.grad(ops.moe_combine(y_grouped.detach(), plan, weights).sum(), (weights,))
        assert torch.equal(alone, both[1])


def test_a_combine_that_keeps_no_weights_keeps_no_rows():
    plan = ops.moe_plan(random_ids(9, 2, 4), 4)
    y_grouped = random_tensor(18, 5, dtype=torch.float32)
    weights = torch.rand(9, 2)
    kept = saved_bytes(lambda: ops.moe_combine(y_grouped, plan, weights), exclude=(y_grouped, weights, *plan[:4]))
    assert kept == 0


@on_every_implementation
def test_a_plan_that_does_not_fit_is_never_followed(implementation):
    """Indices are checked before they are addresses, whoever made them."""
    with implementation.active() as device:
        plan = ops.moe_plan(random_ids(9, 2, 4).to(device), 4)
        x = torch.zeros(9, 5, device=device)
        for rows in (plan.row_of_pair + 1, plan.row_of_pair - 2):
            with pytest.raises(RuntimeError, match="plan: expected rows from -1 to 17"):
                torch.ops.memkernels.moe_dispatch(x, None, rows, plan.offsets, 18)
            with pytest.raises(RuntimeError, match="plan: expected rows from -1 to 17"):
                torch.ops.memkernels.moe_combine(torch.zeros(18, 5, device=device), None, rows)
        with pytest.raises(RuntimeError, match="plan: expected offsets up to 18"):
            torch.ops.memkernels.moe_dispatch(x, None, plan.row_of_pair, plan.offsets + 1, 18)
        y_grouped, rows = torch.zeros(18, 5, device=device), plan.row_of_pair.flatten()
        for token_offsets in ([1, 2], [0, 19], [0, 5, 4], [0, -1, 5]):
            wrong = torch.tensor(token_offsets, dtype=torch.int32, device=device)
            with pytest.raises(RuntimeError, match="plan: expected token_offsets that rise from 0 to at most 18"):
                torch.ops.memkernels.moe_combine(y_grouped, None, rows, wrong)


def test_dispatch_and_combine_of_bad_input_name_the_argument():
    ids = random_ids(9, 2, 4)
    plan = ops.moe_plan(ids, 4)
    with pytest.raises(ValueError, match=r"x: expected shape \(9, d\), T of the plan, got \(8, 5\)"):
        ops.moe_dispatch(torch.zeros(8, 5), ids, 4)
    with pytest.raises(ValueError, match=r"y_grouped: expected shape \(18, d\), R of the plan, got \(17, 5\)"):
        ops.moe_combine(torch.zeros(17, 5), plan)
    with pytest.raises(ValueError, match=r"weights: expected shape \(9, 2\)"):
        ops.moe_combine(torch.zeros(18, 5), plan, torch.zeros(9, 3))
    with pytest.raises(TypeError, match="weights: expected float32"):
        ops.moe_combine(torch.zeros(18, 5), plan, torch.zeros(9, 2, dtype=torch.int64))


def test_dispatch_and_combine_compile_whole():
    def step(x, ids, weights):
        x_grouped, plan = ops.moe_dispatch(x, ids, 5)
        return ops.moe_combine(x_grouped.sin(), plan, weights).square().sum()

    found = []
    for function in (step, torch.compile(step, fullgraph=True)):
        x, weights = random_tensor(9, 6, dtype=torch.float32), random_tensor(9, 2, dtype=torch.float32, seed=1)
        function(x, random_ids(9, 2, 5), weights).backward()
        found.append((x.grad, weights.grad))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)
