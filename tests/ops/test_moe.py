"""Mixture of experts: plan, dispatch and combine, grouped products, the experts' layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memkernels import ops
from memkernels.ops.gated_activation.reference import gated_activation
from memkernels.ops.moe import reference
from memkernels.testing import check_op, implementations, poisoned_memory, random_tensor, saved_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
on_every_implementation = pytest.mark.parametrize("implementation", implementations("moe_dispatch"), ids=str)
# Of the layer: the Triton kernels of its activation too, under the interpreter.
on_every_layer = pytest.mark.parametrize("implementation", implementations("expert_activation_fwd"), ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random_ids(tokens: int, choices: int, experts: int, *, nowhere: bool = False, seed: int = 0) -> torch.Tensor:
    """(T, k), distinct in a row; with `nowhere` some are num_experts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :choices]
    if nowhere:
        ids[torch.rand(ids.shape, generator=generator) < 0.2] = experts
    return ids


def loop_over_tokens(x, expert_ids, expert_weights, w_gate_up, w_down, *, activation="silu", capacity=None):
    """The layer by its definition, one token and one choice at a time."""
    taken = [0] * w_down.shape[0]
    rows = []
    for token, ids in enumerate(expert_ids.tolist()):
        row = torch.zeros_like(x[token], dtype=torch.promote_types(x.dtype, torch.float32))
        for choice, expert in enumerate(ids):
            if expert == len(taken) or (capacity is not None and taken[expert] >= capacity):
                continue
            taken[expert] += 1
            hidden = w_gate_up[expert] @ x[token]
            n = w_down.shape[2]
            gate, up = (hidden, None) if hidden.shape[0] == n else (hidden[:n], hidden[n:])
            y = w_down[expert] @ gated_activation(gate, up, activation)
            row = row + expert_weights[token, choice] * y
        rows.append(row.to(x.dtype))
    return torch.stack(rows)


def layer_inputs(tokens, choices, experts, d, n, dtype, *, gated=True, weights_dtype=torch.float32, **ids):
    return {
        "x": random_tensor(tokens, d, dtype=dtype, seed=1),
        "expert_ids": random_ids(tokens, choices, experts, **ids),
        "expert_weights": random_tensor(tokens, choices, dtype=weights_dtype, seed=2, scale=0.5),
        "w_gate_up": random_tensor(experts, (2 if gated else 1) * n, d, dtype=dtype, seed=3, scale=d**-0.5),
        "w_down": random_tensor(experts, d, n, dtype=dtype, seed=4, scale=n**-0.5),
    }


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
    for ours, theirs in zip(plan, reference.plan(ids, experts, capacity or max(ids.numel(), 1)), strict=True):
        if rows == theirs.shape[0] or theirs.dim() == 2:
            assert torch.equal(ours, theirs)


@on_every_implementation
def test_a_plan_of_many_tokens_is_that_of_the_reference(implementation):
    """More pairs than one task sorts, and an expert without any."""
    with implementation.active() as device:
        ids = random_ids(20_000, 2, 63).to(device)
        ids[ids == 17] = 64
        for ours, theirs in zip(ops.moe_plan(ids, 64, capacity=500), reference.plan(ids, 64, 500), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"expert_ids": torch.zeros(4, 2)}, TypeError, "expert_ids: expected int64 or int32, got torch.float32"),
        ({"expert_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"expert_ids: expected shape \(T, k\)"),
        ({"expert_ids": torch.zeros(4, 6, dtype=torch.int64)}, ValueError, "expert_ids: expected k of at most"),
        ({"expert_ids": torch.full((4, 2), 6)}, RuntimeError, "expert_ids: expected 0 to 5"),
        ({"expert_ids": torch.full((4, 2), -1)}, RuntimeError, "expert_ids: expected 0 to 5"),
        ({"num_experts": 0}, ValueError, "num_experts: expected at least 1, got 0"),
        ({"capacity": 0}, ValueError, "capacity: expected at least 1 or None, got 0"),
    ],
)  # fmt: skip
def test_a_plan_of_bad_input_names_the_argument(change, error, message):
    arguments = {"expert_ids": torch.zeros(4, 2, dtype=torch.int64), "num_experts": 5, "capacity": None} | change
    with pytest.raises(error, match=message):
        ops.moe_plan(arguments["expert_ids"], arguments["num_experts"], capacity=arguments["capacity"])


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
    kept = saved_bytes(lambda: ops.moe_combine(y_grouped, plan, weights), exclude=(y_grouped, weights, *plan))
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


@dtypes
@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_grouped_matmul_matches_the_reference(dtype, capacity, backend):
    ids = random_ids(23, 2, 5, nowhere=True)
    plan = ops.moe_plan(torch.where(ids == 5, 7, ids), 7, capacity=capacity)  # experts 5 and 6 get nothing
    inputs = {
        "x_grouped": random_tensor(plan.pair_of_row.shape[0], 24, dtype=dtype),
        "weights": random_tensor(7, 16, 24, dtype=dtype, seed=1),  # rows of 16 bytes' multiples, as grouped_mm wants
    }
    check_op(
        lambda x_grouped, weights: ops.grouped_matmul(x_grouped, weights, plan, backend=backend),
        lambda x_grouped, weights: reference.grouped_matmul(x_grouped, weights, plan.offsets),
        inputs, strided_grads=True,
    )  # fmt: skip


def test_grouped_matmul_of_bad_input_names_the_argument():
    plan = ops.moe_plan(random_ids(9, 2, 4), 4)
    with pytest.raises(ValueError, match=r"weights: expected shape \(4, out, 5\).*got \(3, 7, 5\)"):
        ops.grouped_matmul(torch.zeros(18, 5), torch.zeros(3, 7, 5), plan)
    with pytest.raises(TypeError, match=r"weights: expected torch.float32, as x_grouped, got torch\.bfloat16"):
        ops.grouped_matmul(torch.zeros(18, 5), torch.zeros(4, 7, 5, dtype=torch.bfloat16), plan)


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
        check_op(ops.moe_mlp, loop_over_tokens, inputs)


@pytest.mark.parametrize("shape", [(1, 1, 4), (40, 2, 64), (64, 4, 4)], ids=str)
def test_few_tokens_many_experts_and_all_to_each(shape):
    check_op(ops.moe_mlp, loop_over_tokens, layer_inputs(*shape, 8, 6, torch.float32))


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
        for operator, args in (
            (memkernels.moe_plan, (ids, 4, 3)),
            (memkernels.moe_dispatch, (x, None, plan.row_of_pair, offsets, rows)),
            (memkernels.moe_dispatch, (x, weights, plan.row_of_pair, offsets, rows)),
            (memkernels.moe_combine, (grouped, None, plan.row_of_pair)),
            (memkernels.moe_combine, (grouped, weights, plan.row_of_pair)),
            (memkernels.moe_combine_bwd, (x, grouped, weights, plan.row_of_pair, offsets)),
            (memkernels.grouped_product, (x, tokens, matrices, offsets, rows, False)),
            (memkernels.grouped_weight_grad, (grouped, None, x, tokens, offsets, False)),
            (memkernels.expert_activation_fwd, (wide, row_weight, True, "silu")),
            (memkernels.expert_activation_fwd, (wide, row_weight, False, "gelu")),
            (memkernels.expert_activation_bwd, (grouped, wide, row_weight, True, "silu")),
            (memkernels.expert_activation_bwd_, (grouped, wide, row_weight, True, "silu")),
        ):
            torch.library.opcheck(operator.default, args)


@pytest.mark.parametrize("recompute", [True, False])
def test_compiles_whole_and_equals_eager(recompute):
    def step(x, expert_ids, expert_weights, w_gate_up, w_down):
        plan = ops.moe_plan(expert_ids, 5, capacity=9)
        return ops.moe_mlp(x * 2, plan, expert_weights, w_gate_up, w_down, recompute=recompute).square().sum()

    found = []
    for function in (step, torch.compile(step, fullgraph=True)):
        inputs = layer_inputs(23, 2, 5, 8, 12, torch.float32)
        loss = function(**inputs)
        loss.backward()
        found.append([loss, *(v.grad for v in inputs.values() if v.requires_grad)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


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
        ({"expert_weights": torch.zeros(9, 3)}, ValueError, r"expert_weights: expected shape \(9, 2\)"),
        ({"w_gate_up": torch.zeros(4, 13, 8)}, ValueError, r"w_gate_up: expected shape \(4, 12, 8\), or 6"),
        ({"w_gate_up": torch.zeros(4, 12, 8).half()}, TypeError, "w_gate_up: expected torch.float32"),
        ({"w_down": torch.zeros(4, 7, 6)}, ValueError, r"w_down: expected shape \(4, 8, 6\)"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of"),
        ({"capacity": 0}, ValueError, "capacity: expected at least 1 or None"),
        ({"backend": "triton"}, ValueError, "backend: expected one of auto, loop, grouped_mm"),
        ({"expert_ids": PLAN, "capacity": 3}, ValueError, "capacity: expected None beside a plan"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(change, error, message):
    inputs = {k: v.detach() for k, v in layer_inputs(9, 2, 4, 8, 6, torch.float32).items()}
    with pytest.raises(error, match=message):
        ops.moe_mlp(**(inputs | change))
