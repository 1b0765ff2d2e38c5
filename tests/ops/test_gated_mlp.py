"""ops.gated_mlp: every implementation against the float64 reference, and what it saves, holds, rejects, compiles to."""

import inspect
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from autocast import check_autocast
from compilers import check_compiled, on_every_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from memkernels import ops
from memkernels.ops.gated_activation.reference import ACTIVATIONS
from memkernels.ops.gated_mlp import reference
from memkernels.ops.gated_mlp.block import default_tile
from memkernels.ops.gated_mlp.op import plan_gated_mlp
from memkernels.ops.matmul import SLOW_DTYPES
from memkernels.testing import check_op, implementations, peak_bytes, random_tensor, run_in_child, saved_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATHS = [
    (implementation, backend)
    for implementation in implementations("gated_activation_fwd")
    for backend in (("matmul",) if implementation.name.startswith("cpu") else ("matmul", "triton"))
]
on_every_path = pytest.mark.parametrize(("implementation", "backend"), PATHS, ids=str)


def make_inputs(tokens, d, f, dtype, device="cpu", *, gated=True, norm=True, bias=True):
    shapes = {"x": tokens if isinstance(tokens, tuple) else (tokens,)}
    shapes["x"] = (*shapes["x"], d)
    shapes |= {"w_gate": (f, d), "w_up": (f, d), "w_down": (d, f)}
    shapes |= {"norm_weight": (d,)} if norm else {}
    shapes |= {"b_gate": (f,), "b_up": (f,), "b_down": (d,)} if bias else {}
    inputs = {
        name: random_tensor(*shape, dtype=dtype, device=device, seed=seed,
                            scale=shape[1] ** -0.5 if name.startswith("w_") else 1.0)
        for seed, (name, shape) in enumerate(shapes.items())
    }  # fmt: skip
    if not gated:
        inputs["w_gate"] = None
        inputs.pop("b_gate", None)
    return inputs


def check(inputs, *, tile_tokens=None, backend="matmul", strided_grads=False, **options):
    constants = {name: tensor for name, tensor in inputs.items() if tensor is None}
    tensors = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    check_op(
        lambda **k: ops.gated_mlp(**k, **constants, tile_tokens=tile_tokens, backend=backend),
        lambda **k: reference.gated_mlp(**k, **constants),
        tensors,
        strided_grads=strided_grads,
        **options,
    )


def gradients(inputs, cotangent=None, **options):
    y = ops.gated_mlp(**inputs, **options)
    wanted = [tensor for tensor in inputs.values() if tensor is not None and tensor.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, torch.ones_like(y) if cotangent is None else cotangent)]


@on_every_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile_tokens", [None, 16])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_matches_reference(implementation, backend, dtype, tile_tokens, gated):
    with implementation.active() as device:
        inputs = make_inputs(63, 60, 130, dtype, device, gated=gated)
        check(inputs, tile_tokens=tile_tokens, backend=backend)


@on_every_path
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_every_activation(implementation, backend, activation, gated):
    with implementation.active() as device:
        inputs = make_inputs(9, 12, 20, torch.float32, device, gated=gated)
        check(inputs, tile_tokens=4, backend=backend, activation=activation)


@pytest.mark.parametrize(("gated", "norm", "bias"), list(itertools.product([True, False], repeat=3)))
def test_every_combination_of_parts(gated, norm, bias):
    inputs = make_inputs((3, 7), 12, 20, torch.bfloat16, gated=gated, norm=norm, bias=bias)
    check(inputs, tile_tokens=8, strided_grads=True)


@on_every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("norm", "bias", "offset"), [("layer", True, 0.0), ("layer", False, 0.0), ("rms", False, 1.0)])
def test_every_norm(implementation, backend, dtype, norm, bias, offset):
    with implementation.active() as device:
        inputs = make_inputs(9, 12, 20, dtype, device)
        if bias:
            inputs["norm_bias"] = random_tensor(12, dtype=dtype, device=device, seed=9)
        check(inputs, tile_tokens=4, backend=backend, norm=norm, norm_offset=offset, norm_eps=1e-5)


@on_every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_a_norm_of_the_output(implementation, backend, dtype, gated):
    with implementation.active() as device:
        inputs = make_inputs(9, 12, 20, dtype, device, gated=gated)
        inputs["post_norm_weight"] = random_tensor(12, dtype=dtype, device=device, seed=9)
        # The down product is computed anew, and its norm's gradient is rounded before the product with h.
        check(inputs, tile_tokens=4, backend=backend, roundings=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tile_tokens", "gated"), [(None, True), (16, True), (16, False)])
def test_dropout_of_the_hidden_layer(dtype, tile_tokens, gated):
    dropout = {"dropout_p": 0.4, "seed": torch.tensor(1234567890123456789)}
    inputs = make_inputs(63, 60, 130, dtype, gated=gated)
    if gated:
        inputs["post_norm_weight"] = random_tensor(60, dtype=dtype, seed=9)
    constants = {name: tensor for name, tensor in inputs.items() if tensor is None}
    check_op(
        lambda **k: ops.gated_mlp(**k, **constants, **dropout, tile_tokens=tile_tokens),
        lambda **k: reference.gated_mlp(**k, **constants, **dropout),
        {name: tensor for name, tensor in inputs.items() if tensor is not None},
    )


def test_dropout_keeps_a_seed_and_draws_one_each_time():
    inputs = make_inputs(63, 60, 130, torch.bfloat16)
    exclude = tuple(inputs.values())
    kept = [saved_bytes(lambda p=p: ops.gated_mlp(**inputs, dropout_p=p), exclude=exclude) for p in (0.0, 0.5)]
    assert kept[1] == kept[0] + 8
    assert not torch.equal(ops.gated_mlp(**inputs, dropout_p=0.5), ops.gated_mlp(**inputs, dropout_p=0.5))


@pytest.mark.parametrize("trained", ["x", "w_down", "post_norm_weight", "norm_weight"])
def test_one_gradient_through_a_norm_of_the_output(trained):
    inputs = make_inputs(9, 12, 20, torch.float32) | {
        "post_norm_weight": random_tensor(12, dtype=torch.float32, seed=9)
    }
    for name, tensor in inputs.items():
        tensor.requires_grad_(name == trained)
    check(inputs, tile_tokens=4, roundings=2.0)


@pytest.mark.parametrize("frozen", ["norm_weight", "norm_bias"])
def test_a_frozen_parameter_of_a_layer_norm(frozen):
    inputs = make_inputs(9, 12, 20, torch.float32) | {"norm_bias": random_tensor(12, dtype=torch.float32, seed=9)}
    inputs[frozen].requires_grad_(False)
    check(inputs, norm="layer")


def test_the_checked_call_has_the_public_signature():
    public, checked = (inspect.signature(function).parameters for function in (ops.gated_mlp, plan_gated_mlp))
    assert public == checked


@pytest.mark.parametrize("frozen", [*itertools.combinations(("x", "w_gate", "w_up", "w_down", "norm_weight"), 1),
                                    *itertools.combinations(("x", "w_gate", "w_up", "w_down", "norm_weight"), 4),
                                    ("w_gate", "w_up", "w_down", "norm_weight", "b_gate", "b_up", "b_down"),
                                    ("x", "w_gate", "w_up", "norm_weight", "b_gate", "b_up"), ("x",)])  # fmt: skip
@pytest.mark.parametrize("tile_tokens", [None, 4])
def test_gradients_only_where_they_are_wanted(frozen, tile_tokens):
    inputs = make_inputs(9, 12, 20, torch.float32)
    for name in frozen:
        inputs[name].requires_grad_(False)
    check(inputs, tile_tokens=tile_tokens)


@pytest.mark.parametrize(
    ("trained", "products"),
    [
        (("x", "w_gate", "w_up", "w_down"), 8),  # recompute 2, dh, dx 2, dW 3
        (("x",), 5),
        (("w_down",), 3),
        (("w_gate",), 4),
    ],
)
def test_a_frozen_weight_costs_no_product(trained, products):
    tokens, d, f = 8, 12, 20
    inputs = make_inputs(tokens, d, f, torch.float32, bias=False)
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in trained)
    y = ops.gated_mlp(**inputs)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == products * 2 * tokens * d * f


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 40), d=st.integers(1, 33), f=st.integers(1, 50), tile=st.integers(1, 50),
       dtype=st.sampled_from(DTYPES))  # fmt: skip
def test_any_shape_and_tile(tokens, d, f, tile, dtype):
    # Of one channel the norm's gradient is one sum of tokens * f terms of order one, off by a walk of their roundings.
    walk = torch.finfo(torch.float32).eps * (tokens * f) ** 0.5
    check(make_inputs(tokens, d, f, dtype), tile_tokens=tile, roundings=2, atol=max(1e-6, walk))


@on_every_path
def test_zero_tokens(implementation, backend):
    with implementation.active() as device:
        inputs = make_inputs((2, 0), 8, 16, torch.bfloat16, device)
        y, *grads = gradients(inputs, backend=backend)
        assert y.shape == (2, 0, 8)
        for tensor, grad in zip(inputs.values(), grads, strict=True):
            assert torch.equal(grad, torch.zeros_like(tensor))


def test_non_contiguous_input_and_weights():
    inputs = make_inputs((12, 5), 10, 14, torch.float32)
    inputs["w_up"] = random_tensor(10, 14, dtype=torch.float32, seed=20)

    def transposed(function):
        return lambda x, w_up, **k: function(x.transpose(0, 1), w_up=w_up.t(), **k)

    check_op(transposed(ops.gated_mlp), transposed(reference.gated_mlp), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_tiles_are_as_accurate_as_one(dtype):
    inputs = make_inputs(512, 16, 24, dtype)
    exact = gradients({name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()})
    narrow = {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
    for first in range(0, 512, 4):
        tile = dict(inputs, x=inputs["x"][first : first + 4].detach())
        _, *grads = gradients(tile)
        for name, grad in zip([n for n in inputs if n != "x"], grads, strict=True):
            narrow[name] += grad
    results = {tiles: gradients(inputs, tile_tokens=512 // tiles) for tiles in (1, 128)}
    for index, name in enumerate(inputs, start=1):
        if name.startswith("w_"):
            errors = {tiles: (grads[index].double() - exact[index]).abs().mean() for tiles, grads in results.items()}
            assert errors[128] <= 2 * errors[1], name
            assert errors[128] < (narrow[name].double() - exact[index]).abs().mean() / 2, name


def test_tile_tokens_by_default():
    assert default_tile(0, 64) == 1
    assert default_tile(4095, 64) == 4095  # below twice 2048: one tile
    assert default_tile(4096, 64) == 2048
    assert default_tile(9000, 2048) == 4500
    assert all(4096 <= default_tile(tokens, 2048) < 8192 for tokens in range(4096, 100_000, 777))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saves_x_only(norm, dtype):
    inputs = make_inputs(64, 32, 96, dtype, norm=norm)
    every = tuple(inputs.values())
    assert saved_bytes(lambda: ops.gated_mlp(**inputs), exclude=every) == 0
    assert saved_bytes(lambda: ops.gated_mlp(**inputs), exclude=every[1:]) == 64 * 32 * dtype.itemsize


def test_autocast_saves_copies_of_weights_in_its_dtype():
    inputs = make_inputs(64, 32, 96, torch.float32, norm=False, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        saved = saved_bytes(lambda: ops.gated_mlp(**inputs), exclude=tuple(inputs.values()))
    assert saved == (64 * 32 + 3 * 96 * 32) * 2


def forward_and_backward_peak(tokens, tile_tokens, d, f):
    torch.set_num_threads(2)
    inputs = make_inputs(tokens, d, f, torch.bfloat16, bias=False)
    y = ops.gated_mlp(**inputs, tile_tokens=tile_tokens)
    y.backward(y.detach())
    forward = peak_bytes(lambda: ops.gated_mlp(**inputs, tile_tokens=tile_tokens))
    grads = [tensor.grad for tensor in inputs.values()]  # kept, so that what is counted is not their place
    for tensor in inputs.values():
        tensor.grad = None
    y = ops.gated_mlp(**inputs, tile_tokens=tile_tokens)
    backward = peak_bytes(lambda: torch.autograd.grad(y, tuple(inputs.values()), y.detach()))
    del grads
    return forward, backward


def test_transient_memory_is_that_of_a_tile():
    tokens, tile, d, f = 8192, 512, 256, 4096
    forward, backward = run_in_child(forward_and_backward_peak, tokens, tile, d, f)
    buffers, output = 3 * tile * f * 2, tokens * d * 2
    sums = 3 * d * f * (4 + 2) + d * f * 2  # float32, the results, one tile's product
    # Blocks of both operands and their float32 product, (tile, 1024) and (1024, 1024), or oneDNN's copies of operands.
    slack = 4 * (2 * tile * 1024 + 1024 * 1024) if torch.bfloat16 in SLOW_DTYPES else 6 << 20
    assert forward <= output + buffers + slack
    assert backward <= output + buffers + sums + slack
    assert tokens * f * 2 > output + buffers + sums + slack  # one full-length buffer alone would break the bound


def test_a_second_backward_gives_the_same_gradients_and_inputs_are_left_alone():
    inputs = make_inputs(20, 8, 16, torch.float32)
    copies = [tensor.detach().clone() for tensor in inputs.values()]
    y = ops.gated_mlp(**inputs, tile_tokens=8)
    first, second = (torch.autograd.grad(y.sum(), tuple(inputs.values()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs.values(), copies, strict=True))


def test_a_scaled_loss_gives_scaled_gradients_and_accumulates():
    inputs = make_inputs(20, 8, 16, torch.float32)
    whole = gradients(inputs, tile_tokens=8)[1:]
    (ops.gated_mlp(**inputs, tile_tokens=8).sum() * 0.25).backward()
    (ops.gated_mlp(**inputs, tile_tokens=8).sum() * 0.5).backward()
    for tensor, grad in zip(inputs.values(), whole, strict=True):
        torch.testing.assert_close(tensor.grad, grad * 0.75)


def test_second_derivatives_are_refused():
    inputs = make_inputs(4, 8, 16, torch.float32)
    (dx,) = torch.autograd.grad(ops.gated_mlp(**inputs).square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative of their own"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("norm", "scale", "to"),
    [(True, 1.0, torch.bfloat16), (False, 1.0, torch.bfloat16), (True, 1e6, torch.float16)],  # which has no 1e6
    ids=str,
)
def test_autocast_follows_the_layers_it_replaces(norm, scale, to):
    inputs = make_inputs(33, 24, 40, torch.float32, norm=norm)
    inputs["x"] = (inputs["x"].detach() * scale).requires_grad_()

    def layers(x, w_gate, w_up, w_down, norm_weight=None, b_gate=None, b_up=None, b_down=None):
        n = x if norm_weight is None else F.rms_norm(x.float(), x.shape[-1:], norm_weight, 1e-6)
        return F.linear(F.silu(F.linear(n, w_gate, b_gate)) * F.linear(n, w_up, b_up), w_down, b_down)

    check_autocast(partial(ops.gated_mlp, tile_tokens=16), layers, reference.gated_mlp, inputs, to)


@pytest.mark.parametrize(("gated", "tile_tokens"), [(True, None), (True, 16), (False, 16)])
@on_every_compiler
def test_compiles_whole_and_equals_eager(gated, tile_tokens, backend):
    def step(**tensors):
        return ops.gated_mlp(**tensors, tile_tokens=tile_tokens, activation="gelu_tanh")

    check_compiled(step, make_inputs((3, 11), 24, 40, torch.float32, gated=gated), backend=backend)


@on_every_compiler
def test_compiles_under_autocast(backend):
    def step(**tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return ops.gated_mlp(**tensors)

    check_compiled(step, make_inputs(33, 24, 40, torch.float32), backend=backend)


def test_works_under_activation_checkpointing():
    inputs = make_inputs(20, 8, 16, torch.float32)
    y = torch.utils.checkpoint.checkpoint(lambda: ops.gated_mlp(**inputs), use_reentrant=False)
    actual = torch.autograd.grad(y.sum(), tuple(inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(actual, gradients(inputs)[1:], strict=True))


@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck_of_the_reference_path(gated):
    inputs = make_inputs(3, 5, 7, torch.float64, gated=gated)
    wanted = {name: tensor for name, tensor in inputs.items() if tensor is not None}

    def function(*tensors):
        return ops.gated_mlp(**inputs | dict(zip(wanted, tensors, strict=True)), activation="gelu")

    assert torch.autograd.gradcheck(function, tuple(wanted.values()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 8, dtype=torch.int32)}, TypeError, "x: expected float32"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least one dimension"),
        ({"w_up": torch.zeros(16, 7)}, ValueError, r"w_up: expected shape \(f, 8\), got \(16, 7\)"),
        ({"w_up": torch.zeros(16)}, ValueError, r"w_up: expected shape \(f, 8\), got \(16,\)"),
        ({"w_gate": torch.zeros(15, 8)}, ValueError, r"w_gate: expected shape \(16, 8\)"),
        ({"w_down": torch.zeros(16, 8)}, ValueError, r"w_down: expected shape \(8, 16\)"),
        ({"w_down": torch.zeros(8, 16, dtype=torch.bfloat16)}, TypeError, "w_down: expected torch.float32"),
        ({"w_gate": torch.zeros(16, 8, device="meta")}, ValueError, "w_gate: expected device cpu"),
        ({"b_up": torch.zeros(8)}, ValueError, r"b_up: expected shape \(16,\)"),
        ({"w_gate": None, "b_gate": torch.zeros(16)}, ValueError, "b_gate: expected None without w_gate"),
        ({"norm_weight": torch.zeros(7)}, ValueError, r"norm_weight: expected shape \(8,\)"),
        ({"norm": "batch"}, ValueError, "norm: expected one of rms, layer, got 'batch'"),
        ({"norm_bias": torch.zeros(8)}, ValueError, "norm_bias: expected None without norm_weight and norm='layer'"),
        ({"norm": "layer", "norm_offset": 1.0}, ValueError, "norm_offset: expected 0 with norm='layer'"),
        ({"post_norm_weight": torch.zeros(7)}, ValueError, r"post_norm_weight: expected shape \(8,\)"),
        ({"activation": "swish"}, ValueError, "activation: expected one of silu, .*got 'swish'"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p: expected a number in \[0, 1\), got -0.1"),
        (
            {"dropout_p": 0.1, "seed": True},
            ValueError,
            "seed: expected an integer of 64 bits, or a tensor of one, got True",
        ),
        ({"dropout_p": 0.1, "seed": torch.tensor(True)}, ValueError, "seed: expected an integer of 64 bits"),
        ({"dropout_p": 0.1, "seed": torch.tensor(1j)}, ValueError, "seed: expected an integer of 64 bits"),
        ({"tile_tokens": 0}, ValueError, "tile_tokens: expected a positive integer or None, got 0"),
        ({"tile_tokens": 2.5}, TypeError, "tile_tokens: expected a positive integer or None, got 2.5"),
        ({"x": None, "dropout_p": 0.1}, TypeError, "x: expected a tensor, got NoneType"),
        ({"dropout_p": "0.1"}, TypeError, r"dropout_p: expected a number in \[0, 1\), got '0.1'"),
        ({"activation": ["silu"]}, ValueError, r"activation: expected one of silu, .*got \['silu'\]"),
        ({"norm_bias": 3}, ValueError, "norm_bias: expected None without .*, got int"),
        ({"norm_eps": None}, TypeError, "norm_eps: expected a finite number from 0 up, got None"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps: expected a finite number from 0 up, got -1.0"),
        ({"norm_offset": "1"}, TypeError, "norm_offset: expected a finite number, got '1'"),
        ({"backend": "cublas"}, ValueError, "backend: expected one of auto, triton, matmul, got 'cublas'"),
        ({"backend": "triton"}, ValueError, "backend: 'triton' cannot run here: .*cpu"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"x": torch.zeros(4, 8), "w_gate": torch.zeros(16, 8), "w_up": torch.zeros(16, 8)}
    arguments |= {"w_down": torch.zeros(8, 16)} | change
    with pytest.raises(error, match=message):
        ops.gated_mlp(**arguments)
