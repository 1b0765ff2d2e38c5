"""ops.moe_mlp, the experts' layer: against a loop over tokens, and what it saves; opcheck of every operator of it."""

from __future__ import annotations

import functools
import weakref

import pytest
import torch
from compilers import on_every_compiler
from experts import chosen_by_experts, layer_inputs, loop_over_tokens, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from memkernels import ops
from memkernels.ops.lora_linear.reference import keep_mask
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
# Of the layer: the Triton kernels of its activation too, under the interpreter.
on_every_layer = pytest.mark.parametrize("implementation", implementations("expert_activation_fwd"), ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


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


@pytest.mark.parametrize("retained", [True, False])
def test_backward_lets_go_of_the_pre_activation_unless_the_graph_is_retained(retained):
    inputs = layer_inputs(64, 2, 4, 16, 24, torch.bfloat16)
    kept, alive = [], []

    def pack(tensor):
        if tensor.shape == (128, 48):
            kept.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ops.moe_mlp(
            **inputs, recompute=False, on_input_grads=lambda *_: alive.extend(of() is not None for of in kept)
        )
    y.sum().backward(retain_graph=retained)
    assert alive == [retained]


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
