"""Mixture of experts: plan, dispatch and combine, grouped products, the experts' layer."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from compilers import on_every_compiler
from experts import layer_inputs, loop_over_tokens, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from memkernels import _library, ops
from memkernels.ops.lora_linear.reference import keep_mask
from memkernels.ops.moe import reference
from memkernels.ops.moe.dispatch import dispatch_rows
from memkernels.ops.moe.weights import select_backend
from memkernels.testing import (
    check_op,
    implementations,
    peak_bytes,
    poisoned_memory,
    random_tensor,
    run_in_child,
    saved_bytes,
)

MASK_SEED = 1234567890123456789
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
on_every_implementation = pytest.mark.parametrize("implementation", implementations("moe_dispatch"), ids=str)
# Of the layer: the Triton kernels of its activation too, under the interpreter.
on_every_layer = pytest.mark.parametrize("implementation", implementations("expert_activation_fwd"), ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# --- plan ---


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40), choices=st.integers(1, 4), experts=st.integers(4, 9),
    capacity=st.integers(1, 30) | st.none(), nowhere=st.booleans(), dtype=st.sampled_from([torch.int64, torch.int32]),
)  # fmt: skip
def test_a_plan_gives_each_choice_a_row_of_its_expert_in_the_order_of_tokens(
    tokens, choices, experts, capacity, nowhere, dtype
):
    ids = random_ids(tokens, choices, experts, nowhere=nowhere, seed=tokens).to(dtype)
    with poisoned_memory():
        plan = ops.moe_plan(ids, experts, capacity=capacity)
    expected = [[] for _ in range(experts)]
    counts = [0] * (experts + 1)
    for pair, expert in enumerate(ids.flatten().tolist()):
        counts[expert] += 1
        if expert < experts and (capacity is None or len(expected[expert]) < capacity):
            expected[expert].append(pair)
    pairs = [pair for group in expected for pair in group]
    rows = plan.pair_of_row.shape[0]
    assert rows == min(ids.numel(), experts * (capacity or ids.numel()))
    assert plan.pair_of_row.tolist() == pairs + [-1] * (rows - len(pairs))
    assert plan.offsets.diff().tolist() == [len(group) for group in expected]
    assert plan.counts.tolist() == counts
    assert plan.dropped.tolist() == [count - len(group) for count, group in zip(counts, expected, strict=False)]
    row_of_pair = plan.row_of_pair.flatten().tolist()
    assert row_of_pair == [pairs.index(pair) if pair in pairs else -1 for pair in range(ids.numel())]
    assert plan.token_offsets is None
    for ours, theirs in zip(plan[:4], reference.plan(ids, experts, capacity or max(ids.numel(), 1)), strict=True):
        if rows == theirs.shape[0] or theirs.dim() == 2:
            assert torch.equal(ours, theirs)


@on_every_implementation
def test_a_plan_of_many_tokens_is_that_of_the_reference(implementation):
    """More pairs than one task sorts, and an expert without any."""
    with implementation.active() as device:
        ids = random_ids(20_000, 2, 63).to(device)
        ids[ids == 17] = 64
        for ours, theirs in zip(ops.moe_plan(ids, 64, capacity=500)[:4], reference.plan(ids, 64, 500), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"expert_ids": torch.zeros(4, 2)}, TypeError, "expert_ids: expected int64 or int32, got torch.float32"),
        ({"expert_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"expert_ids: expected shape \(T, k\)"),
        ({"expert_ids": torch.zeros(4, 0, dtype=torch.int64)}, ValueError, r"expert_ids: expected shape \(T, k\)"),
        ({"expert_ids": torch.full((4, 2), 6)}, RuntimeError, "expert_ids: expected 0 to 5"),
        ({"expert_ids": torch.full((4, 2), -1)}, RuntimeError, "expert_ids: expected 0 to 5"),
        ({"expert_ids": torch.ones(4, 6).long()}, RuntimeError, "expert_ids: .* at most num_experts = 5 choices"),
        ({"num_experts": 1}, RuntimeError, "expert_ids: .* at most num_experts = 1 choices of a token .* of k = 2"),
        ({"num_experts": 0}, ValueError, "num_experts: expected at least 1, got 0"),
        ({"capacity": 0}, ValueError, "capacity: expected at least 1 or None, got 0"),
    ],
)  # fmt: skip
def test_a_plan_of_bad_input_names_the_argument(change, error, message):
    arguments = {"expert_ids": torch.zeros(4, 2, dtype=torch.int64), "num_experts": 5, "capacity": None} | change
    with pytest.raises(error, match=message):
        ops.moe_plan(arguments["expert_ids"], arguments["num_experts"], capacity=arguments["capacity"])


CHOSEN = torch.tensor([[5, 1, 3, 6], [6, 3, 0, 6], [3, 6, 6, 6], [6, 6, 6, 6], [0, 1, 2, 3]])  # of 6 tokens, 6: nobody


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("chosen", [CHOSEN, CHOSEN[:, :0], CHOSEN[3:4]], ids=["some", "no place", "nobody"])
def test_experts_that_choose_have_the_rows_of_their_tokens(chosen, dtype):
    with poisoned_memory():
        plan, choice_of_pair = ops.expert_choice_plan(chosen.to(dtype), 6)
    chosen = chosen.tolist()
    rows = [(token, expert) for expert, of_expert in enumerate(chosen) for token in of_expert if token < 6]
    pairs = sorted(rows)  # by token, then by expert
    nobody = [-1] * (sum(map(len, chosen)) - len(rows))
    assert plan.row_of_pair.tolist() == [rows.index(pair) for pair in pairs] + nobody
    assert plan.pair_of_row.tolist() == [pairs.index(row) for row in rows] + nobody
    assert plan.token_of_row.tolist() == [token for token, _ in rows] + nobody
    assert plan.token_offsets.tolist() == [sum(token < t for token, _ in rows) for t in range(7)]
    counts = [sum(expert == e for _, expert in rows) for e in range(len(chosen))]
    assert plan.counts.tolist() == [*counts, len(nobody)] and plan.offsets.diff().tolist() == counts
    assert not plan.dropped.any() and (plan.num_tokens, plan.num_experts) == (6, len(chosen))
    assert all(tensor.dtype == torch.int32 for tensor in plan) and choice_of_pair.dtype == torch.int64
    flat = [(token, expert) for expert, of_expert in enumerate(chosen) for token in of_expert]
    assert [flat[choice] for choice in choice_of_pair.tolist()] == sorted(flat)


@pytest.mark.parametrize(
    ("token_ids", "error", "message"),
    [
        (CHOSEN.float(), TypeError, "token_ids: expected int64 or int32, got torch.float32"),
        (CHOSEN[0], ValueError, r"token_ids: expected shape \(E, C\)"),
        (CHOSEN[:0], ValueError, r"token_ids: expected shape \(E, C\)"),
        (CHOSEN + 1, RuntimeError, "token_ids: expected 0 to num_tokens = 6"),
        (CHOSEN - 1, RuntimeError, "token_ids: expected 0 to num_tokens = 6"),
    ],
)
def test_a_plan_of_experts_of_bad_input_names_the_argument(token_ids, error, message):
    with pytest.raises(error, match=message):
        ops.expert_choice_plan(token_ids, 6)


# --- dispatch and combine ---

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


def chosen_by_experts(experts, tokens, capacity, device="cpu", seed=0):
    """The plan of random choices, of which the first of each expert is nobody."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(experts, tokens, generator=generator).argsort(1)[:, :capacity]
    chosen[:, 0] = tokens
    return ops.expert_choice_plan(chosen.to(device), tokens)[0]


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


# --- grouped products ---


@contextmanager
def device_of(backend: str):
    """Where a backend runs: Triton's kernels on a GPU, else under the interpreter."""
    if backend != "triton":
        yield "cpu"
        return
    with implementations("grouped_product")[0].active() as device:
        yield device


def check_grouped_matmul(backend, plan, size, columns, dtype, device, *, transposed=False):
    def weights_of(stored):
        return stored.mT if transposed else stored

    shape = (plan.num_experts, size, columns) if transposed else (plan.num_experts, columns, size)
    check_op(
        lambda x_grouped, stored: ops.grouped_matmul(x_grouped, weights_of(stored), plan, backend=backend),
        lambda x_grouped, stored: reference.grouped_matmul(x_grouped, weights_of(stored), plan.offsets),
        {
            "x_grouped": random_tensor(plan.pair_of_row.shape[0], size, dtype=dtype, device=device),
            "stored": random_tensor(*shape, dtype=dtype, device=device, seed=1),
        },
        strided_grads=True,
    )


@dtypes
@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize("backend", ["loop", "grouped_mm", "triton"])
def test_grouped_matmul_matches_the_reference(dtype, capacity, backend):
    with device_of(backend) as device:
        ids = random_ids(23, 2, 5, nowhere=True).to(device)
        plan = ops.moe_plan(torch.where(ids == 5, 7, ids), 7, capacity=capacity)  # experts 5 and 6 get nothing
        # Rows of 16 bytes' multiples, as grouped_mm wants.
        check_grouped_matmul(backend, plan, 24, 16, dtype, device)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns", [48, 37], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("routing", ["spread", "to one", "one token", "no token", "nowhere", "one expert"])
def test_triton_products_of_any_groups(routing, columns, transposed):
    """Several tiles a group, none full, and a walk over the rows' size of several steps."""
    tokens = {"one token": 1, "no token": 0}.get(routing, 45)
    experts = 1 if routing == "one expert" else 5
    ids = random_ids(tokens, 1, experts, nowhere=routing == "spread")
    if routing in ("to one", "nowhere"):
        ids.fill_({"to one": 3, "nowhere": experts}[routing])
    with device_of("triton") as device:
        plan = ops.moe_plan(ids.to(device), experts)
        size = 80 if columns == 48 else 70
        check_grouped_matmul("triton", plan, size, columns, torch.float32, device, transposed=transposed)


def grouped_operators(x, tokens, dy, weights, offsets, backend="triton"):
    """A product by rows, one by columns and the weights' gradient, x and dy gathered."""
    memkernels, rows = torch.ops.memkernels, tokens.shape[0]
    return (
        memkernels.grouped_product(x, tokens, weights.mT, offsets, rows, backend),
        memkernels.grouped_product(dy, tokens, weights, offsets, rows, backend),
        memkernels.grouped_weight_grad(dy, tokens, x, tokens, offsets, backend),
    )


def grouped_inputs(tokens, experts, size, columns, dtype, device):
    """x, the token of each row, dy, weights, offsets; rows beyond the last group have token -1."""
    plan = ops.moe_plan(random_ids(tokens, 2, experts, nowhere=True).to(device), experts)
    shapes = ((tokens, size), (tokens, columns), (experts, columns, size))
    x, dy, weights = (random_tensor(*s, dtype=dtype, device=device, seed=i).detach() for i, s in enumerate(shapes))
    return x, plan.token_of_row, dy, weights, plan.offsets


@pytest.mark.parametrize("size", [48, 37], ids=["descriptors", "pointers"])
def test_triton_keeps_what_is_not_finite_with_its_rows_and_expert(size):
    with device_of("triton") as device:
        x, tokens, dy, weights, offsets = grouped_inputs(45, 5, size, 16, torch.float32, device)
        expected = grouped_operators(x, tokens, dy, weights, offsets)
        bounds = offsets.tolist()
        ill = tokens[bounds[2]]  # a token of expert 2, and the rows of it, one of them another expert's
        x[ill], weights[1] = torch.inf, torch.nan
        found = grouped_operators(x, tokens, dy, weights, offsets)
    well = tokens != ill
    well[bounds[1] : bounds[2]] = False
    assert torch.equal(found[0][well], expected[0][well]) and not found[0][~well][:, 0].isfinite().any()
    others = [expert for expert in range(5) if ill not in tokens[bounds[expert] : bounds[expert + 1]]]
    assert len(others) < 5 and torch.equal(found[2][others], expected[2][others])


def test_triton_never_follows_rows_or_offsets_out_of_bounds():
    with device_of("triton") as device:
        x, tokens, dy, weights, offsets = grouped_inputs(9, 4, 16, 32, torch.float32, device)
        for shift in (10**9, -(10**9)):
            y, dx, dweights = grouped_operators(x, tokens + shift, dy, weights, offsets)
            assert not y.any() and not dx.any() and not dweights.any()
            grouped_operators(x, tokens, dy, weights, offsets + shift)


@pytest.mark.parametrize("backend", ["loop", "triton"])
def test_a_product_adds_nothing_to_rows_of_no_expert(backend):
    """Not even zero, which would read and write them, and make -0 to 0."""
    with device_of(backend) as device:
        y, x = torch.full((40, 16), -0.0, device=device), torch.ones(40, 4, device=device)
        offsets = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
        torch.ops.memkernels.grouped_product_add_(y, x, torch.ones(2, 4, 16, device=device), offsets, backend)
    assert (y[:5] == 4).all() and y[5:].signbit().all()


@pytest.mark.parametrize("size", [64, 15], ids=["descriptors", "pointers"])
def test_triton_products_have_addresses_beyond_32_bits(size):
    with device_of("triton") as device:
        x, tokens, dy, weights, offsets = grouped_inputs(3, 4, size, 16, torch.float16, device)
        expected = grouped_operators(x, tokens, dy, weights, offsets)
        # Gigabytes of addresses, of which a few rows are ever touched.
        far = [
            torch.empty_strided(near.shape, strides, dtype=near.dtype, device=device).copy_(near)
            for near, strides in ((x, (2**30, 1)), (dy, (2**30, 1)), (weights, (2**30, size, 1)))
        ]
        found = grouped_operators(far[0], tokens, *far[1:], offsets)
        assert all(map(torch.equal, found, expected))


def test_auto_takes_triton_where_it_runs():
    assert select_backend("auto", torch.zeros(1), 8) == "loop"
    with pytest.raises(ValueError, match=r"backend: grouped_mm takes weights \(E, out, in\), got one for each expert"):
        select_backend("grouped_mm", torch.zeros(1), [torch.zeros(2, 2)])
    with implementations("grouped_product")[0].active() as device:
        x = torch.zeros(1, device=device)
        assert select_backend("auto", x, 7) == "triton"
        with mock.patch.object(_library, "_products", "matmul"):
            assert select_backend("auto", x, 7) == "loop"


def test_grouped_matmul_of_bad_input_names_the_argument():
    plan = ops.moe_plan(random_ids(9, 2, 4), 4)
    with pytest.raises(ValueError, match=r"weights: expected shape \(4, out, 5\).*got \(3, 7, 5\)"):
        ops.grouped_matmul(torch.zeros(18, 5), torch.zeros(3, 7, 5), plan)
    with pytest.raises(TypeError, match=r"weights: expected torch.float32, as x, got torch\.bfloat16"):
        ops.grouped_matmul(torch.zeros(18, 5), torch.zeros(4, 7, 5, dtype=torch.bfloat16), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_matmul_follows_autocast_as_linear_does(dtype):
    plan = ops.moe_plan(random_ids(23, 2, 5), 5)
    x_grouped = random_tensor(46, 8, dtype=dtype)
    weights = random_tensor(5, 12, 8, dtype=torch.float32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.grouped_matmul(x_grouped, weights, plan)
    y.sum().backward()
    assert torch.equal(y, ops.grouped_matmul(x_grouped.bfloat16(), weights.bfloat16(), plan))
    assert y.dtype == torch.bfloat16 and x_grouped.grad.dtype == dtype and weights.grad.dtype == torch.float32


# --- the experts' layer ---


@on_every_layer
@dtypes
@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
@pytest.mark.parametrize("capacity", [None, 3])
def test_moe_mlp_is_the_loop_over_tokens(implementation, capacity, recompute, dtype):
    with implementation.active() as device:
        inputs = {k: v.to(device) for k, v in layer_inputs(23, 2, 5, 19, 12, dtype, nowhere=True).items()}
        check_op(
            lambda **tensors: ops.moe_mlp(**tensors, capacity=capacity, recompute=recompute),
            lambda **tensors: loop_over_tokens(**tensors, capacity=capacity),
            inputs, strided_grads=True,
        )  # fmt: skip


@on_every_layer
@pytest.mark.parametrize(("recompute", "dtype"), [(True, torch.float32), (False, torch.bfloat16)], ids=str)
def test_experts_that_choose_their_tokens(implementation, recompute, dtype):
    """The same as where each token has a choice for each expert, most of them nowhere."""
    with implementation.active() as device:
        plan = chosen_by_experts(5, 23, 7, device)
        expert = torch.repeat_interleave(plan.offsets.diff().long())
        ids = torch.full((23, 5), 5, device=device)
        ids[plan.token_of_row[: len(expert)].long(), expert] = expert
        inputs = {k: v.to(device) for k, v in layer_inputs(23, 5, 5, 19, 12, dtype).items()} | {"expert_ids": ids}

        def of_choices(expert_ids, expert_weights, **tensors):
            weights = expert_weights[expert_ids < 5]
            weights = torch.cat([weights, weights.new_ones(plan.row_of_pair.shape[0] - weights.shape[0])])
            return ops.moe_mlp(expert_ids=plan, expert_weights=weights, **tensors, recompute=recompute)

        check_op(of_choices, loop_over_tokens, inputs, strided_grads=True)


@dtypes
@pytest.mark.parametrize("recompute", [True, False])
def test_weights_that_are_tensors_of_their_own(recompute, dtype):
    def separate(w_gate_up, w_down, **tensors):
        weights = {"w_gate_up": w_gate_up.unbind(), "w_down": list(w_down.unbind())}
        return ops.moe_mlp(**tensors, **weights, capacity=4, recompute=recompute)

    inputs = layer_inputs(23, 2, 30, 19, 12, dtype, nowhere=True)
    check_op(separate, lambda **tensors: loop_over_tokens(**tensors, capacity=4), inputs, strided_grads=True)


@on_every_layer
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu_squared"])
def test_every_activation(implementation, activation, gated):
    with implementation.active() as device:
        inputs = {k: v.to(device) for k, v in layer_inputs(11, 2, 3, 8, 21, torch.float32, gated=gated).items()}
        check_op(ops.moe_mlp, loop_over_tokens, inputs, activation=activation)


@on_every_layer
@pytest.mark.parametrize("gated", [True, False])
def test_rows_wider_than_a_block(implementation, gated):
    with implementation.active() as device:
        inputs = {k: v.to(device) for k, v in layer_inputs(5, 2, 3, 8, 1030, torch.bfloat16, gated=gated).items()}
        check_op(functools.partial(ops.moe_mlp, backend="loop"), loop_over_tokens, inputs)  # the activation's blocks


@on_every_layer
@dtypes
@pytest.mark.parametrize(("recompute", "gated"), [(True, True), (False, False)])
def test_dropout_is_a_mask_of_rows_and_columns(implementation, recompute, gated, dtype):
    with implementation.active() as device:
        inputs = layer_inputs(23, 2, 5, 19, 70, dtype, gated=gated, nowhere=True)
        rows = ops.moe_plan(inputs["expert_ids"], 5).row_of_pair
        kept = keep_mask(torch.tensor(MASK_SEED), 46, 70, 0.4, 0)[rows.clamp(min=0)].to(device) / 0.6
        check_op(
            lambda **tensors: ops.moe_mlp(**tensors, dropout_p=0.4, seed=MASK_SEED, recompute=recompute),
            lambda **tensors: loop_over_tokens(**tensors, kept=kept),
            {name: tensor.to(device) for name, tensor in inputs.items()},
            # A choice's weight has one sum of 19 * 70 terms for gradient, off by a walk of their roundings.
            atol=torch.finfo(torch.float32).eps * (19 * 70) ** 0.5,
        )  # fmt: skip


def test_dropout_keeps_no_mask_and_draws_a_seed_each_time():
    inputs = layer_inputs(64, 2, 4, 16, 24, torch.bfloat16)
    exclude = tuple(inputs.values())
    kept = [saved_bytes(lambda p=p: ops.moe_mlp(**inputs, dropout_p=p), exclude=exclude) for p in (0.0, 0.5)]
    assert kept[1] == kept[0] + 8
    first, second = (ops.moe_mlp(**inputs, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    state = torch.random.get_rng_state()
    assert torch.equal(ops.moe_mlp(**inputs, dropout_p=0.0), ops.moe_mlp(**inputs))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(1, 1, 4), (40, 2, 64), (64, 4, 4)], ids=str)
def test_few_tokens_many_experts_and_all_to_each(shape):
    check_op(ops.moe_mlp, loop_over_tokens, layer_inputs(*shape, 8, 6, torch.float32))


def test_more_choices_than_experts_are_here():
    """Where these are 4 of 12 experts: choices of the others go nowhere."""
    inputs = layer_inputs(9, 8, 12, 8, 6, torch.float32)
    inputs["expert_ids"].clamp_(max=4)
    for name in ("w_gate_up", "w_down"):
        inputs[name] = inputs[name].detach()[:4].requires_grad_()
    check_op(ops.moe_mlp, loop_over_tokens, inputs)


@pytest.mark.parametrize("recompute", [True, False])
def test_no_token_gives_zero_gradients(recompute):
    inputs = layer_inputs(0, 2, 4, 8, 6, torch.float32)
    with poisoned_memory():
        y = ops.moe_mlp(**inputs, recompute=recompute)
        y.sum().backward()
    assert y.shape == (0, 8) and inputs["expert_weights"].grad.shape == (0, 2)
    assert not inputs["w_gate_up"].grad.any() and not inputs["w_down"].grad.any()


def test_all_tokens_to_one_expert():
    inputs = layer_inputs(33, 1, 4, 8, 6, torch.bfloat16)
    inputs["expert_ids"] = torch.full((33, 1), 2)
    check_op(ops.moe_mlp, loop_over_tokens, inputs)


def test_all_tokens_to_nowhere_give_zero():
    inputs = layer_inputs(9, 2, 4, 8, 6, torch.float32)
    inputs["expert_ids"] = torch.full((9, 2), 4)
    with poisoned_memory():
        y = ops.moe_mlp(**inputs)
        y.sum().backward()
    assert not y.any() and not any(v.grad.any() for v in inputs.values() if v.is_floating_point())


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 30), choices=st.integers(1, 4), experts=st.integers(4, 9), d=st.integers(1, 20),
       n=st.integers(1, 20), dtype=st.sampled_from(DTYPES))  # fmt: skip
def test_any_shape(tokens, choices, experts, d, n, dtype):
    # The weights' gradient is of 16-bit factors: at their dtype, its rounding is in the bound.
    inputs = layer_inputs(tokens, choices, experts, d, n, dtype, weights_dtype=dtype)
    check_op(ops.moe_mlp, loop_over_tokens, inputs, roundings=2)


@dtypes
@pytest.mark.parametrize("recompute", [True, False])
def test_by_grouped_mm(dtype, recompute):
    inputs = layer_inputs(23, 2, 5, 16, 24, dtype, nowhere=True)
    check_op(
        lambda **tensors: ops.moe_mlp(**tensors, capacity=3, recompute=recompute, backend="grouped_mm"),
        lambda **tensors: loop_over_tokens(**tensors, capacity=3),
        inputs, strided_grads=True,
    )  # fmt: skip


def test_router_weights_in_the_dtype_of_x():
    inputs = layer_inputs(23, 2, 5, 8, 12, torch.bfloat16, weights_dtype=torch.bfloat16)
    check_op(ops.moe_mlp, loop_over_tokens, inputs)


def test_gradients_only_where_they_are_wanted():
    every = layer_inputs(23, 2, 5, 8, 12, torch.float32)
    whole = torch.autograd.grad(ops.moe_mlp(**every).sum(), [v for k, v in every.items() if k != "expert_ids"])
    for name, expected in zip([k for k in every if k != "expert_ids"], whole, strict=True):
        inputs = {k: v.detach() for k, v in every.items()}
        inputs[name].requires_grad_()
        ops.moe_mlp(**inputs).sum().backward()
        assert torch.equal(inputs[name].grad, expected), name


def test_gradcheck_of_the_reference_path():
    inputs = layer_inputs(5, 2, 3, 4, 3, torch.float64, weights_dtype=torch.float64)
    ids = inputs.pop("expert_ids")
    assert torch.autograd.gradcheck(
        lambda x, w, gate_up, down: ops.moe_mlp(x, ids, w, gate_up, down), tuple(inputs.values())
    )


@pytest.mark.parametrize("recompute", [True, False])
def test_saves_the_input_the_routing_and_the_pre_activation_if_kept(recompute):
    tokens, choices, experts, d, n = 64, 2, 4, 16, 24
    inputs = layer_inputs(tokens, choices, experts, d, n, torch.bfloat16)
    kept = saved_bytes(lambda: ops.moe_mlp(**inputs, recompute=recompute), exclude=tuple(inputs.values()))
    plan = 2 * tokens * choices * 4 + 2 * (experts + 1) * 4
    assert kept == plan + (0 if recompute else 2 * tokens * choices * 2 * n)


def backward_peak(recompute: bool) -> float:
    """In n elements a choice."""
    torch.set_num_threads(1)
    tokens, choices, d, n = 2048, 2, 16, 2048
    inputs = layer_inputs(tokens, choices, 2, d, n, torch.float32)
    wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
    y = ops.moe_mlp(**inputs, recompute=recompute)

    def step():
        torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True)

    step()
    return peak_bytes(step) / (tokens * choices * n * 4)


@pytest.mark.slow
def test_backward_writes_over_the_gradient_of_the_activation():
    assert all(run_in_child(backward_peak, recompute) <= 3.3 for recompute in (True, False))


def test_a_second_backward_gives_the_same_gradient_and_does_not_depend_on_threads():
    gradients = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for recompute in (True, False):
            inputs = layer_inputs(301, 2, 5, 16, 24, torch.float32)
            wanted = [v for v in inputs.values() if v.requires_grad]
            loss = ops.moe_mlp(**inputs, recompute=recompute).square().sum()
            gradients += [torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2)]
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


def test_autocast_casts_as_linear_does():
    inputs = layer_inputs(23, 2, 5, 8, 12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.moe_mlp(**inputs)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    narrow = {k: v.detach().to(torch.bfloat16) if k[0] in "xw" else v.detach() for k, v in inputs.items()}
    assert torch.equal(y, ops.moe_mlp(**narrow)) and inputs["x"].grad.dtype == torch.float32


@on_every_layer
def test_opcheck(implementation):
    with implementation.active() as device:
        memkernels = torch.ops.memkernels
        ids = random_ids(9, 2, 4, nowhere=True).to(device)
        plan = ops.moe_plan(ids, 4, capacity=3)
        rows = plan.pair_of_row.shape[0]
        x, grouped, weights = (torch.randn(shape, device=device) for shape in ((9, 6), (rows, 6), (9, 2)))
        matrices, offsets, tokens = torch.randn(4, 6, 8, device=device), plan.offsets, plan.token_of_row
        wide, row_weight = torch.randn(rows, 12, device=device), torch.rand(rows, device=device)
        chosen = chosen_by_experts(4, 9, 3, device)
        ys, ones = torch.randn(12, 6, device=device), torch.ones(12, device=device)
        backends = {"loop", select_backend("auto", x)}
        for operator, args in (
            (memkernels.moe_plan, (ids, 4, 3)),
            (memkernels.moe_dispatch, (x, None, plan.row_of_pair, offsets, rows)),
            (memkernels.moe_dispatch, (x, weights, plan.row_of_pair, offsets, rows)),
            (memkernels.moe_combine, (grouped, None, plan.row_of_pair)),
            (memkernels.moe_combine, (grouped, weights, plan.row_of_pair)),
            (memkernels.moe_combine_bwd, (x, grouped, weights, plan.row_of_pair, offsets)),
            (memkernels.moe_dispatch, (x, None, chosen.row_of_pair, chosen.offsets, len(ys), chosen.token_offsets)),
            (memkernels.moe_combine, (ys, ones, chosen.row_of_pair, chosen.token_offsets)),
            (memkernels.moe_combine_bwd, (x, ys, ones, chosen.row_of_pair, chosen.offsets, chosen.token_offsets)),
            *((memkernels.grouped_product, (x, tokens, matrices, offsets, rows, backend)) for backend in backends),
            *((memkernels.grouped_weight_grad, (grouped, None, x, tokens, offsets, backend)) for backend in backends),
            (memkernels.separate_product, (x, tokens, list(matrices), offsets, rows)),
            (
                memkernels.separate_weight_grad,
                (grouped, None, x, tokens, offsets, [True, False, True, False]),
            ),
            (memkernels.expert_activation_fwd, (wide, row_weight, True, "silu")),
            (memkernels.expert_activation_fwd, (wide, row_weight, False, "gelu")),
            (memkernels.expert_activation_bwd, (grouped, wide, row_weight, True, "silu")),
            (memkernels.expert_activation_bwd_, (grouped, wide, row_weight, True, "silu")),
        ):
            torch.library.opcheck(operator.default, args)


@pytest.mark.parametrize("recompute", [True, False])
@on_every_compiler
def test_compiles_whole_and_equals_eager(recompute, backend):
    def step(x, expert_ids, expert_weights, w_gate_up, w_down):
        plan = ops.moe_plan(expert_ids, 5, capacity=9)
        dropout = {} if recompute else {"dropout_p": 0.3, "seed": MASK_SEED}
        y = ops.moe_mlp(x * 2, plan, expert_weights, w_gate_up, w_down, recompute=recompute, **dropout)
        return y.square().sum()

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        inputs = layer_inputs(23, 2, 5, 8, 12, torch.float32)
        loss = function(**inputs)
        loss.backward()
        found.append([loss, *(v.grad for v in inputs.values() if v.requires_grad)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def of_both_products(x, routing, matrices):
    return ops.moe_mlp(x, *routing, matrices, matrices, activation="relu")


def of_both_experts(x, routing, matrices):
    return ops.moe_mlp(x, *routing, [matrices[0]] * 2, [matrices[1]] * 2, activation="relu")


@pytest.mark.parametrize("layer", [of_both_products, of_both_experts])
def test_experts_that_share_a_weight_compile_whole(layer):
    x, matrices = random_tensor(9, 8, dtype=torch.float32), random_tensor(2, 8, 8, dtype=torch.float32, seed=1)
    routing = random_ids(9, 2, 2), torch.ones(9, 2)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    eager, ours = (
        torch.autograd.grad(call(x, routing, matrices).square().sum(), (x, matrices)) for call in (layer, compiled)
    )
    torch.testing.assert_close(ours, eager)


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


PLAN = ops.moe_plan(torch.zeros(9, 2, dtype=torch.int64), 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(9, 7)}, ValueError, r"w_gate_up: expected shape \(4, out, 7\)"),
        ({"x": torch.zeros(8, 8)}, ValueError, r"x: expected shape \(9, d\)"),
        ({"expert_ids": torch.zeros(9, 2)}, TypeError, "expert_ids: expected int64 or int32"),
        ({"expert_ids": torch.full((9, 2), 5)}, RuntimeError, "expert_ids: expected 0 to 4"),
        ({"expert_ids": torch.arange(45).view(9, 5) % 4}, RuntimeError, "expert_ids: .* at most num_experts = 4"),
        ({"expert_weights": torch.zeros(9, 3)}, ValueError, r"expert_weights: expected shape \(9, 2\)"),
        ({"w_gate_up": torch.zeros(4, 13, 8)}, ValueError, r"w_gate_up: expected shape \(4, 12, 8\), or 6"),
        ({"w_gate_up": torch.zeros(4, 12, 8).half()}, TypeError, "w_gate_up: expected torch.float32"),
        ({"w_down": torch.zeros(4, 7, 6)}, ValueError, r"w_down: expected shape \(4, 8, 6\)"),
        ({"w_down": []}, TypeError, "w_down: expected a tensor, or a sequence of one for each expert, got list"),
        ({"w_down": [torch.zeros(8, 6), torch.zeros(8, 7)]}, ValueError, r"w_down\[1\]: expected shape \(8, 6\)"),
        ({"w_down": [torch.zeros(8, 6)] * 5}, ValueError, r"w_gate_up: expected shape \(5, out, 8\)"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of"),
        ({"capacity": 0}, ValueError, "capacity: expected at least 1 or None"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a number in \[0, 1\)"),
        ({"dropout_p": 0.5, "seed": 0.5}, ValueError, "seed: expected an integer of 64 bits"),
        ({"backend": "cublas"}, ValueError, "backend: expected one of auto, loop, grouped_mm, triton"),
        ({"backend": "triton"}, ValueError, "backend: triton does not run on cpu: "),
        ({"expert_ids": PLAN, "capacity": 3}, ValueError, "capacity: expected None beside a plan"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(change, error, message):
    inputs = {k: v.detach() for k, v in layer_inputs(9, 2, 4, 8, 6, torch.float32).items()}
    with pytest.raises(error, match=message):
        ops.moe_mlp(**(inputs | change))


def test_a_frozen_expert_costs_no_gradient():
    """Of weights of their own, as experts of SwitchTransformers have them."""
    x, offsets = torch.randn(6, 4), torch.tensor([0, 2, 6])
    none, whole = torch.ops.memkernels.separate_weight_grad(x, None, x, None, offsets, [False, True])
    assert none.numel() == 0 and torch.equal(whole, x[2:].t() @ x[2:])
