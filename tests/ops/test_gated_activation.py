"""ops.gated_activation: every implementation against the float64 reference, and what it saves, rejects, compiles to."""

from functools import partial

import pytest
import torch
from compilers import check_compiled
from hypothesis import given, settings
from hypothesis import strategies as st

from memkernels import ops
from memkernels.ops.gated_activation import reference
from memkernels.testing import check_op, implementations, poisoned_memory, random_tensor, saved_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = tuple(reference.ACTIVATIONS)
on_every_implementation = pytest.mark.parametrize("implementation", implementations("gated_activation_fwd"), ids=str)
with_every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def make_inputs(shape, dtype, device, *, gated=True, scale=2.0):
    inputs = {"gate": random_tensor(*shape, dtype=dtype, device=device, seed=1, scale=scale)}
    if gated:
        inputs["up"] = random_tensor(*shape, dtype=dtype, device=device, seed=2)
    return inputs


@on_every_implementation
@with_every_activation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_matches_reference(implementation, activation, dtype, gated):
    with implementation.active() as device:
        for shape in [(63, 60), (1,), (2, 3, 130), (0, 8)]:
            inputs = make_inputs(shape, dtype, device, gated=gated)
            check_op(ops.gated_activation, reference.gated_activation, inputs, activation=activation)


@on_every_implementation
@with_every_activation
def test_the_whole_range_of_the_gate(implementation, activation):
    with implementation.active() as device:
        gate = torch.cat([torch.linspace(-30, 30, 20001), torch.tensor([-100.0, -0.0, 0.0, 100.0, 1e4])])
        inputs = {"gate": gate.to(device).requires_grad_()}
        check_op(ops.gated_activation, reference.gated_activation, inputs, activation=activation)


@on_every_implementation
@with_every_activation
def test_nan_and_infinity_pass_through(implementation, activation):
    with implementation.active() as device:
        gate = torch.tensor([float("nan"), float("inf")], device=device)
        h = ops.gated_activation(gate, activation=activation)
        assert h[0].isnan() and h[1] == float("inf")


@on_every_implementation
def test_the_tail_of_gelu_keeps_its_relative_accuracy(implementation):
    if implementation.name == "triton-interpreter":
        pytest.skip("the Triton kernel computes gelu by erf, as torch does")
    with implementation.active() as device:
        x = torch.linspace(-8, -3, 500, device=device)
        exact = x.double() * 0.5 * torch.special.erfc(-x.double() / 2**0.5)
        torch.testing.assert_close(ops.gated_activation(x, activation="gelu").double(), exact, rtol=1e-5, atol=0)


@on_every_implementation
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 40), size=st.integers(1, 70), dtype=st.sampled_from(DTYPES))
def test_any_shape_and_strided_gradients(implementation, rows, size, dtype):
    with implementation.active() as device:
        inputs = make_inputs((rows, size), dtype, device)
        check_op(ops.gated_activation, reference.gated_activation, inputs, strided_grads=True)


@on_every_implementation
def test_halves_of_one_projection(implementation):
    with implementation.active() as device:
        both = random_tensor(9, 66, dtype=torch.float32, device=device)
        check_op(lambda both: ops.gated_activation(*both.chunk(2, dim=-1)),
                 lambda both: reference.gated_activation(*both.chunk(2, dim=-1)), {"both": both})  # fmt: skip


@on_every_implementation
@with_every_activation
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_in_place_backward_turns_its_inputs_into_the_gradients_and_h(implementation, activation, gated):
    with implementation.active() as device, poisoned_memory():
        gate, up = (t.detach() for t in make_inputs((31, 17), torch.bfloat16, device).values())
        up = up if gated else None
        dh = random_tensor(31, 17, dtype=torch.bfloat16, device=device, seed=3).detach()
        h = torch.ops.memkernels.gated_activation_fwd(gate, up, activation)
        dgate, dup = torch.ops.memkernels.gated_activation_bwd(dh, gate, up, activation)
        torch.ops.memkernels.gated_activation_bwd_(dh, gate, up, activation)
        assert torch.equal(gate, dgate) and torch.equal(dh, h)
        assert not gated or torch.equal(up, dup)


@on_every_implementation
def test_opcheck(implementation):
    with implementation.active() as device:
        gate, up = (t.detach() for t in make_inputs((6, 10), torch.bfloat16, device).values())
        dh = torch.ones_like(gate)
        for factor in (up, None):
            torch.library.opcheck(torch.ops.memkernels.gated_activation_fwd.default, (gate, factor, "silu"))
            torch.library.opcheck(torch.ops.memkernels.gated_activation_bwd.default, (dh, gate, factor, "gelu"))
            torch.library.opcheck(torch.ops.memkernels.gated_activation_bwd_.default, (dh, gate, factor, "relu"))


def test_compiles_whole_and_equals_eager():
    check_compiled(partial(ops.gated_activation, activation="gelu"), make_inputs((33, 48), torch.float32, "cpu"))


@on_every_implementation
def test_autocast_takes_what_products_leave_in_its_dtype(implementation):
    """gate and up of bfloat16 between products; what is float32 stays float32."""

    def block(activation):
        def run(x, w_gate, w_up, w_down):
            with torch.autocast(x.device.type, torch.bfloat16):
                gate, up = torch.nn.functional.linear(x, w_gate), torch.nn.functional.linear(x, w_up)
                h = activation(gate, up)
                assert h.dtype == gate.dtype
                return torch.nn.functional.linear(h, w_down)

        return run

    with implementation.active() as device:
        inputs = {"x": random_tensor(9, 24, dtype=torch.float32, device=device)}
        for seed, (name, shape) in enumerate((("w_gate", (33, 24)), ("w_up", (33, 24)), ("w_down", (24, 33))), 1):
            inputs[name] = random_tensor(*shape, dtype=torch.float32, device=device, seed=seed, scale=shape[1] ** -0.5)
        check_op(block(ops.gated_activation), block(reference.gated_activation), inputs)
        inputs = make_inputs((9, 33), torch.float32, device)
        with torch.autocast(device, torch.bfloat16):
            inside = ops.gated_activation(**inputs)
        assert torch.equal(inside, ops.gated_activation(**inputs))


def test_gradcheck_of_the_reference_path():
    inputs = make_inputs((3, 5), torch.float64, "cpu")
    for activation in ACTIVATIONS:
        assert torch.autograd.gradcheck(
            lambda g, u, a=activation: ops.gated_activation(g, u, a), tuple(inputs.values())
        )


def test_saves_nothing_of_its_own_and_a_second_backward_is_the_same():
    gate, up = make_inputs((64, 32), torch.bfloat16, "cpu").values()
    assert saved_bytes(lambda: ops.gated_activation(gate, up), exclude=(gate, up)) == 0
    h = ops.gated_activation(gate, up)
    first, second = (torch.autograd.grad(h.sum(), (gate, up), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "swish"}, ValueError, "activation: expected one of silu, .*got 'swish'"),
        ({"gate": torch.zeros(4, 8, dtype=torch.int32)}, TypeError, "gate: expected float32"),
        ({"up": torch.zeros(4, 7)}, ValueError, r"up: expected shape \(4, 8\)"),
        ({"up": torch.zeros(4, 8, dtype=torch.bfloat16)}, TypeError, "up: expected torch.float32"),
        ({"up": torch.zeros(4, 8, device="meta")}, ValueError, "up: expected device cpu"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"gate": torch.zeros(4, 8), "up": torch.zeros(4, 8)} | change
    with pytest.raises(error, match=message):
        ops.gated_activation(**arguments)
