"""RMS norm and layer norm over wide rows in CUDA C++ as operators, on CPU tensors."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from memkernels import _library, ops
from memkernels.ops.layer_norm import reference as layer_norm_reference
from memkernels.ops.rms_norm import reference as rms_norm_reference
from memkernels.testing import assert_within_factor_two, check_op, implementations, poisoned_memory, random_tensor

FLOAT, BFLOAT16, HALF = torch.float32, torch.bfloat16, torch.float16
OPERATORS = ["wide_norm_fwd", "wide_norm_bwd"]
ROWS = 4

pytestmark = pytest.mark.xdist_group("simt_operators")  # one library, compiled once


@pytest.fixture
def gpu_path(calls, monkeypatch):
    """The norms' GPU functions on CPU tensors: Triton's interpreter, and CUDA C++ where it has an operator."""
    interpreter = implementations("rms_norm_fwd")[-1]
    assert interpreter.name == "triton-interpreter"
    for name in OPERATORS:
        monkeypatch.setitem(_library._native_devices, name, ["cpu"])
    with interpreter.active():
        yield calls


def make_inputs(size, dtype, *names, parameter_dtype=None):
    """x, weight and the tensors of these names."""
    parameters, rows = {"weight", "bias"}, ("x", "weight", *names)
    return {
        name: random_tensor(size, dtype=parameter_dtype or dtype, seed=seed)
        if name in parameters
        else random_tensor(ROWS, size, dtype=dtype, seed=seed)
        for seed, name in enumerate(rows)
    }


# Between them every dtype with whole packs and with single elements, one and the most of them a thread; and teams of
# two blocks and of three.
RMS_NORM = [
    (5000, FLOAT, ("residual",), None),
    (9999, BFLOAT16, (), FLOAT),
    (16384, HALF, ("residual",), None),
    (16383, FLOAT, (), None),
    (16385, BFLOAT16, ("residual",), None),
    (40000, FLOAT, (), None),
]
LAYER_NORM = [
    (5000, BFLOAT16, ("bias", "residual"), None),
    (8200, HALF, ("bias",), FLOAT),
    (9999, FLOAT, ("residual",), None),
    (16383, HALF, ("bias", "residual"), None),
    (16384, FLOAT, ("bias", "residual"), None),
    (16384, BFLOAT16, ("bias",), None),
    (20000, BFLOAT16, ("bias", "residual"), FLOAT),
]


def and_all_others(cases, names):
    """The cases, and every combination beside them for `make test-slow`."""
    optional = [chosen for count in range(len(names) + 1) for chosen in itertools.combinations(names, count)]
    parameters = {FLOAT: (None,), HALF: (None, FLOAT), BFLOAT16: (None, FLOAT)}
    everything = [
        (size, dtype, chosen, of)
        for size in (5000, 8200, 9999, 16383, 16384, 16385, 20000, 32767)
        for dtype in parameters
        for chosen in optional
        for of in parameters[dtype]
    ]
    return [*cases, *(pytest.param(*case, marks=pytest.mark.slow) for case in everything if case not in cases)]


@pytest.mark.parametrize(("size", "dtype", "names", "parameter_dtype"), and_all_others(RMS_NORM, ("residual",)))
def test_rms_norm_matches_the_reference(gpu_path, size, dtype, names, parameter_dtype):
    inputs = make_inputs(size, dtype, *names, parameter_dtype=parameter_dtype)
    check_op(ops.rms_norm, rms_norm_reference.rms_norm, inputs, weight_offset=1.0, strided_grads=True)
    assert gpu_path == OPERATORS


@pytest.mark.parametrize(
    ("size", "dtype", "names", "parameter_dtype"), and_all_others(LAYER_NORM, ("bias", "residual"))
)
def test_layer_norm_matches_the_reference(gpu_path, size, dtype, names, parameter_dtype):
    inputs = make_inputs(size, dtype, *names, parameter_dtype=parameter_dtype)
    check_op(ops.layer_norm, layer_norm_reference.layer_norm, inputs, strided_grads=True)
    assert gpu_path == OPERATORS


def test_a_large_mean_costs_no_precision(gpu_path):
    for size in (4099, 16400):
        inputs = make_inputs(size, FLOAT, "bias")
        inputs["x"] = (inputs["x"].detach() + 1e4).requires_grad_()
        check_op(
            ops.layer_norm,
            lambda x, weight, bias, size=size: torch.nn.functional.layer_norm(x, (size,), weight, bias),
            inputs,
        )
    assert gpu_path == 2 * OPERATORS


@pytest.mark.parametrize("size", [4096, 16385])
def test_rows_that_no_team_holds_or_a_program_does_are_triton_s(gpu_path, monkeypatch, size):
    monkeypatch.setattr("memkernels.ops.launch.multiprocessors", lambda rows: 1)
    inputs = make_inputs(size, BFLOAT16)
    check_op(ops.rms_norm, rms_norm_reference.rms_norm, inputs)
    assert gpu_path == []


def test_no_rows_give_gradients_of_zero(gpu_path):
    with poisoned_memory():
        inputs = {name: tensor.detach() for name, tensor in make_inputs(5000, BFLOAT16, "bias").items()}
        inputs["x"] = inputs["x"][:0]
        for tensor in inputs.values():
            tensor.requires_grad_()
        y = ops.layer_norm(**inputs)
        y.sum().backward()
    assert y.shape == (0, 5000) and gpu_path == OPERATORS
    for name in ("weight", "bias"):
        assert torch.equal(inputs[name].grad, torch.zeros_like(inputs[name]))


@pytest.mark.parametrize("centred", [False, True])
def test_gradients_of_parameters_are_left_out_or_given_by_team(simt, centred):
    inputs = [tensor.detach() for tensor in make_inputs(264, FLOAT, "dy").values()]
    x, weight, dy = inputs
    _, _, mean, rstd = simt.wide_norm_fwd(x, None, weight, None, 1e-5, 0.5, centred, 3)
    mean = mean if centred else None
    with poisoned_memory():
        dx, *none = simt.wide_norm_bwd(dy, None, x, weight, mean, rstd, 0.5, False, False, 3)
        also_dx, dweight, dbias = simt.wide_norm_bwd(dy, None, x, weight, mean, rstd, 0.5, True, centred, 3)
    assert [tuple(sums.shape) for sums in none] == [(0, 264)] * 2 and torch.equal(dx, also_dx)
    normed = (x.double() - (mean.double()[:, None] if centred else 0)) * rstd.double()[:, None]
    for sums, rows in ((dweight, dy * normed), *([(dbias, dy.double())] if centred else [])):
        # Team b has rows b and b + 3.
        expected = torch.stack([rows[0] + rows[3], rows[1], rows[2]])
        assert_within_factor_two("sums", sums, expected, expected.float())


@pytest.mark.parametrize("centred", [False, True])
def test_operators_give_what_their_fakes_say(simt, centred):
    x, weight, residual = (tensor.detach() for tensor in make_inputs(24, BFLOAT16, "residual").values())
    residual, bias = (residual, weight) if centred else (None, None)
    forward = x, residual, weight, bias, 1e-5, 0.0, centred, 2
    _, _, mean, rstd = simt.wide_norm_fwd(*forward)
    mean = mean if centred else None
    for name, arguments in (
        ("wide_norm_fwd", forward),
        ("wide_norm_bwd", (x, residual, x, weight, mean, rstd, 0.0, True, centred, 2)),
    ):
        made = getattr(simt, name)(*arguments)
        on_meta = [of.to("meta") if isinstance(of, torch.Tensor) else of for of in arguments]
        fake = getattr(torch.ops.memkernels, name)(*on_meta)
        assert [(of.shape, of.dtype) for of in made] == [(of.shape, of.dtype) for of in fake]
