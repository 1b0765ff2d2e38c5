"""ops.layer_norm: every implementation against the float64 reference, and what it saves, rejects and compiles to."""

import pytest
import torch
from compilers import check_compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from norms import check_under_autocast

from memkernels import nn, ops
from memkernels.ops.layer_norm import reference
from memkernels.testing import check_op, implementations, poisoned_memory, random_tensor, saved_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = implementations("layer_norm_fwd")
on_every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)


def make_inputs(shape, dtype, device, *, bias=True, residual=False, weight_dtype=None):
    inputs = {
        "x": random_tensor(*shape, dtype=dtype, device=device, seed=1),
        "weight": random_tensor(shape[-1], dtype=weight_dtype or dtype, device=device, seed=2),
    }
    if bias:
        inputs["bias"] = random_tensor(shape[-1], dtype=weight_dtype or dtype, device=device, seed=3)
    if residual:
        inputs["residual"] = random_tensor(*shape, dtype=dtype, device=device, seed=4)
    return inputs


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(63, 60), (3, 2), (5, 7), (2, 3, 130), (4, 1024), (257, 16)], ids=str)
@pytest.mark.parametrize(("bias", "residual"), [(True, False), (False, True)], ids=["bias", "residual"])
def test_matches_reference(implementation, shape, dtype, bias, residual):
    with implementation.active() as device:
        inputs = make_inputs(shape, dtype, device, bias=bias, residual=residual)
        check_op(ops.layer_norm, reference.layer_norm, inputs, eps=1e-5)


@on_every_implementation
@pytest.mark.parametrize(("bias", "residual"), [(True, False), (False, True)], ids=["bias", "residual"])
@pytest.mark.parametrize(
    ("rows", "size", "dtype"),
    [(21, 8208, torch.bfloat16), (21, 4099, torch.float32), (5, 16400, torch.bfloat16)],
    ids=str,
)
def test_wide_rows(implementation, rows, size, dtype, bias, residual):
    """Rows that no Triton program holds in backward: in blocks of columns, or in CUDA C++ where GPUs have it."""
    with implementation.active() as device:
        inputs = make_inputs((rows, size), dtype, device, bias=bias, residual=residual)
        check_op(ops.layer_norm, reference.layer_norm, inputs, eps=1e-5)


@on_every_implementation
def test_strided_input_and_gradient(implementation):
    with implementation.active() as device:
        inputs = make_inputs((9, 33), torch.bfloat16, device, residual=True)
        inputs["x"] = inputs["x"].detach().t().contiguous().t().requires_grad_()
        check_op(ops.layer_norm, reference.layer_norm, inputs, strided_grads=True)


@on_every_implementation
def test_float32_parameters_under_bfloat16_activations(implementation):
    with implementation.active() as device:
        inputs = make_inputs((9, 33), torch.bfloat16, device, weight_dtype=torch.float32)
        check_op(ops.layer_norm, reference.layer_norm, inputs)


@on_every_implementation
@pytest.mark.parametrize("size", [60, 100, 1024, 4099])
def test_a_large_mean_costs_no_precision(implementation, size):
    with implementation.active() as device:
        inputs = make_inputs((32, size), torch.float32, device)
        inputs["x"] = (inputs["x"].detach() + 1e4).requires_grad_()
        check_op(
            ops.layer_norm, lambda x, weight, bias: torch.nn.functional.layer_norm(x, (size,), weight, bias), inputs
        )


@on_every_implementation
def test_zero_rows_and_zero_columns(implementation):
    with implementation.active() as device, poisoned_memory():
        x, weight, bias = make_inputs((0, 8), torch.float32, device).values()
        y = ops.layer_norm(x, weight, bias)
        y.sum().backward()
        assert y.shape == (0, 8)
        assert torch.equal(weight.grad, torch.zeros_like(weight)) and torch.equal(bias.grad, torch.zeros_like(bias))
        empty, no_weight, no_bias = make_inputs((3, 0), torch.float32, device).values()
        ops.layer_norm(empty, no_weight, no_bias).sum().backward()
        assert empty.grad.shape == (3, 0)


@on_every_implementation
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), size=st.integers(2, 70), dtype=st.sampled_from(DTYPES), bias=st.booleans())
def test_any_shape(implementation, rows, size, dtype, bias):
    with implementation.active() as device:
        inputs = make_inputs((rows, size), dtype, device, bias=bias, residual=True)
        check_op(ops.layer_norm, reference.layer_norm, inputs, roundings=2)


@on_every_implementation
def test_a_constant_row_is_the_bias(implementation):
    with implementation.active() as device:
        x = torch.tensor([[3.5] * 37, [0.0] * 37, [-2.0e10] * 37], device=device)
        _, weight, bias = make_inputs((1, 37), torch.float32, device).values()
        torch.testing.assert_close(ops.layer_norm(x, weight, bias), bias.expand(3, 37), rtol=1e-5, atol=1e-5)


@on_every_implementation
def test_parameter_gradients_do_not_depend_on_threads(implementation):
    with implementation.active() as device:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x, weight, bias = make_inputs((501, 64), torch.float32, device).values()
            ops.layer_norm(x, weight, bias).square().sum().backward()
            results.append((weight.grad, bias.grad))
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@on_every_implementation
def test_autocast_norms_what_products_leave_in_its_dtype(implementation):
    with implementation.active() as device:
        residual = make_inputs((9, 33), torch.float32, device, residual=True)
        check_under_autocast(ops.layer_norm, reference.layer_norm, residual, device, ("weight", "bias"))


def test_gradcheck_of_the_reference_path():
    inputs = make_inputs((3, 5), torch.float64, "cpu", residual=True)
    function = lambda x, weight, bias, residual: ops.layer_norm(x, weight, bias, residual=residual)  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@on_every_implementation
def test_operators_pass_opcheck(implementation):
    with implementation.active() as device:
        inputs = {name: t.detach() for name, t in make_inputs((6, 20), torch.float32, device, residual=True).items()}
        x, weight, bias, residual = (inputs[name] for name in ("x", "weight", "bias", "residual"))
        forward, backward = torch.ops.memkernels.layer_norm_fwd.default, torch.ops.memkernels.layer_norm_bwd.default
        for added, shift in ((None, None), (residual, bias)):
            torch.library.opcheck(forward, (x, added, weight, shift, 1e-5))
            _, _, mean, rstd = forward(x, added, weight, shift, 1e-5)
            for wanted in ((True, True), (True, False), (False, False)):
                torch.library.opcheck(backward, (x, added, x, weight, mean, rstd, *wanted))


def test_compiles_whole_and_equals_eager():
    def step(x, weight, bias, residual):
        y, h = ops.layer_norm(x, weight, bias, residual=residual)
        return (y * 2 + h).sum()

    check_compiled(step, make_inputs((33, 48), torch.float32, "cpu", residual=True))


def test_saves_the_input_itself_mean_and_rstd():
    x, weight, bias = make_inputs((64, 32), torch.bfloat16, "cpu").values()
    assert saved_bytes(lambda: ops.layer_norm(x, weight, bias), exclude=(x, weight)) == 64 * 8
    residual = random_tensor(64, 32, dtype=torch.bfloat16)
    h_bytes = 64 * 32 * 2
    forward = lambda: ops.layer_norm(x, weight, bias, residual=residual)  # noqa: E731
    assert saved_bytes(forward, exclude=(x, residual, weight)) == 64 * 8 + h_bytes


def test_a_second_backward_gives_the_same_gradient():
    x, weight, bias = make_inputs((8, 16), torch.float32, "cpu").values()
    y = ops.layer_norm(x, weight, bias)
    first, second = (torch.autograd.grad(y.sum(), (x, weight, bias), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_every_implementation
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
def test_gradients_only_where_they_are_wanted(implementation, wanted):
    with implementation.active() as device:
        inputs = make_inputs((8, 16), torch.float32, device, residual=wanted in ("x", "residual"))
        for name, tensor in inputs.items():
            tensor.requires_grad_(name == wanted)
        check_op(ops.layer_norm, reference.layer_norm, inputs)


@pytest.mark.parametrize("wanted", ["x", "residual"])
def test_a_gradient_of_h_alone_passes_through(wanted):
    inputs = make_inputs((8, 16), torch.float32, "cpu", residual=True)
    _, h = ops.layer_norm(**inputs)
    (gradient,) = torch.autograd.grad(h.sum(), (inputs[wanted],))
    assert torch.equal(gradient, torch.ones_like(gradient))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 8, dtype=torch.int32)}, TypeError, "x: expected float32"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least one dimension"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight: expected shape \(8,\).*got \(7,\)"),
        ({"weight": torch.zeros(8, dtype=torch.float16)}, TypeError, "weight: expected torch.float32"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias: expected shape \(8,\).*got \(7,\)"),
        ({"bias": torch.zeros(8, dtype=torch.bfloat16)}, TypeError, "bias: expected torch.float32, as weight"),
        ({"residual": torch.zeros(3, 8)}, ValueError, r"residual: expected shape \(4, 8\)"),
        ({"residual": torch.zeros(4, 8, device="meta")}, ValueError, "residual: expected device cpu"),
        ({"eps": None}, TypeError, "eps: expected a finite number from 0 up, got None"),
        ({"eps": -1.0}, ValueError, "eps: expected a finite number from 0 up, got -1.0"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"x": torch.zeros(4, 8), "weight": torch.zeros(8)} | change
    with pytest.raises(error, match=message):
        ops.layer_norm(**arguments)


@pytest.mark.parametrize("bias", [True, False])
def test_module_has_torchs_state_dict_and_result(bias):
    ours, theirs = nn.LayerNorm(32, bias=bias), torch.nn.LayerNorm(32, bias=bias)
    for parameter in theirs.parameters():
        parameter.data.normal_()
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = random_tensor(5, 32, dtype=torch.float32)
    torch.testing.assert_close(ours(x), theirs(x))
