"""ops.lora_linear: against the float64 reference and PEFT, and what it saves, rejects, compiles to."""

import itertools
import math
from functools import partial

import peft
import pytest
import torch
import torch.nn.functional as F
from autocast import check_autocast
from calls import Calls
from compilers import check_compiled
from hypothesis import given, settings
from hypothesis import strategies as st

from memkernels import ops
from memkernels.ops.lora_linear import reference
from memkernels.ops.lora_linear.dropout import row_dropout, row_dropout_add_
from memkernels.ops.matmul import SLOW_DTYPES
from memkernels.testing import (
    assert_within_factor_two,
    check_op,
    implementations,
    peak_bytes,
    random_tensor,
    run_in_child,
    saved_bytes,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = torch.tensor(1234567890123456789)
# On CPU the products are torch's around native dropout; on GPUs all of it is Triton's.
on_every_implementation = pytest.mark.parametrize("implementation", implementations("row_dropout"), ids=str)


def make_inputs(tokens, k, n, rank, dtype, device="cpu", *, adapter=None, bias=True, magnitude=False):
    adapter = adapter or dtype
    tokens = tokens if isinstance(tokens, tuple) else (tokens,)
    shapes = {"x": (*tokens, k), "weight": (n, k), "lora_a": (rank, k), "lora_b": (n, rank)}
    shapes |= {"bias": (n,)} if bias else {}
    shapes |= {"magnitude": (n,)} if magnitude else {}
    return {
        name: random_tensor(*shape, dtype=adapter if name.startswith("lora") else dtype, device=device, seed=seed,
                            scale=shape[1] ** -0.5 if len(shape) == 2 and name != "x" else 1.0)
        for seed, (name, shape) in enumerate(shapes.items())
    }  # fmt: skip


def check(inputs, **options):
    check_op(ops.lora_linear, reference.lora_linear, inputs, **{"scaling": 0.7} | options)


def gradients(inputs, function=ops.lora_linear, **options):
    y = function(**inputs, **options)
    wanted = tuple(tensor for tensor in inputs.values() if tensor.requires_grad)
    return [y, *torch.autograd.grad(y, wanted, torch.cos(torch.arange(y.numel()).to(y)).view(y.shape))]


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_matches_reference(implementation, dtype, adapter, dropout_p, magnitude):
    with implementation.active() as device:
        inputs = make_inputs(63, 60, 70, 5, dtype, device, adapter=adapter, magnitude=magnitude)
        check(inputs, dropout_p=dropout_p, seed=SEED, strided_grads=True)


@on_every_implementation
@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 70), k=st.integers(1, 150), n=st.integers(1, 80), rank=st.integers(1, 40),
       dropout_p=st.sampled_from([0.0, 0.5]), dtype=st.sampled_from(DTYPES))  # fmt: skip
def test_any_shape_and_rank(implementation, tokens, k, n, rank, dropout_p, dtype):
    with implementation.active() as device:
        inputs = make_inputs(tokens, k, n, rank, dtype, device)
        check(inputs, dropout_p=dropout_p, seed=SEED, roundings=2)


def test_a_float32_adapter_adds_to_bfloat16_in_float32():
    s, b = random_tensor(33, 5, dtype=torch.float32), random_tensor(70, 5, dtype=torch.float32, seed=1)
    y = -(0.7 * s @ b.t()).detach().bfloat16()  # what is left is what bfloat16 products alone would not see
    exact = y.double() + 0.7 * s.double() @ b.double().t()
    plain = (y + 0.7 * s @ b.t()).bfloat16()
    torch.ops.memkernels.lora_up_add_(y, s.detach(), b.detach(), 0.7, None, None)
    assert_within_factor_two("y", y, exact.detach(), plain.detach())


def test_float64_is_exact():
    for dropout_p, magnitude in itertools.product((0.0, 0.3), (False, True)):
        inputs = make_inputs((3, 5), 8, 6, 2, torch.float64, magnitude=magnitude)
        options = {"dropout_p": dropout_p, "seed": SEED, "scaling": 0.7}
        for ours, plain in zip(
            gradients(inputs, **options), gradients(inputs, reference.lora_linear, **options), strict=True
        ):
            torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    inputs = make_inputs(5, 4, 3, 2, torch.float64)
    function = lambda *tensors: ops.lora_linear(  # noqa: E731
        **dict(zip(inputs, tensors, strict=True)), scaling=0.7, dropout_p=0.3, seed=SEED
    )
    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


TENSORS = ("x", "weight", "lora_a", "lora_b", "bias", "magnitude")


@pytest.mark.parametrize("trained", [*itertools.combinations(TENSORS, 1), ("x", "lora_a", "lora_b"), ("x", "lora_b"),
                                     ("lora_a", "lora_b", "magnitude"), TENSORS], ids="-".join)  # fmt: skip
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_gradients_only_where_they_are_wanted(trained, dropout_p, magnitude):
    inputs = make_inputs(33, 20, 12, 3, torch.float32, magnitude=magnitude)
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in trained)
    check(inputs, dropout_p=dropout_p, seed=SEED)


def peft_layer(inputs, dropout_p=0.0, rslora=False):
    """PEFT's layer over the same tensors, alpha 6."""
    n, k = inputs["weight"].shape
    model = torch.nn.Sequential(torch.nn.Linear(k, n, dtype=inputs["weight"].dtype))
    model[0].weight.data, model[0].bias.data = inputs["weight"].detach(), inputs["bias"].detach()
    config = peft.LoraConfig(
        r=inputs["lora_a"].shape[0], lora_alpha=6, lora_dropout=dropout_p, target_modules=["0"], use_rslora=rslora,
        use_dora="magnitude" in inputs,
    )  # fmt: skip
    layer = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0]
    layer.lora_A.default.weight.data = inputs["lora_a"].detach()
    layer.lora_B.default.weight.data = inputs["lora_b"].detach()
    parameters = [layer.lora_A.default.weight, layer.lora_B.default.weight]
    if "magnitude" in inputs:
        parameters.append(layer.lora_magnitude_vector.default.weight)
        parameters[-1].data = inputs["magnitude"].detach()
    return layer, parameters


class SeededDropout(torch.nn.Module):
    """A dropout layer with our mask, so that the two see the same."""

    def __init__(self, dropout_p):
        super().__init__()
        self.dropout_p = dropout_p

    def forward(self, x):
        keep = reference.keep_mask(SEED, *x.flatten(0, -2).shape, self.dropout_p).view(x.shape)
        return torch.where(keep, x / (1 - self.dropout_p), 0.0)


@pytest.mark.parametrize("implementation", implementations("row_dropout")[-2:], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("magnitude", "rslora"), [(False, False), (False, True), (True, False)])
def test_agrees_with_peft(implementation, dtype, adapter, dropout_p, magnitude, rslora):
    """On a CPU and on a GPU; CPUs differ in the dropout alone, which is tested on each."""
    inputs = make_inputs((2, 15), 60, 70, 9, dtype, adapter=adapter, magnitude=magnitude)
    names = ("x", "lora_a", "lora_b", *(("magnitude",) if magnitude else ()))
    results = {}
    for kind, of in (("plain", dtype), ("exact", torch.float64)):
        copies = {
            name: tensor.detach() if kind == "plain" else tensor.detach().to(of) for name, tensor in inputs.items()
        }
        layer, parameters = peft_layer(copies, dropout_p, rslora)
        layer.lora_dropout["default"] = SeededDropout(dropout_p)
        x = copies["x"].requires_grad_()
        y = layer(x)
        cotangent = torch.cos(torch.arange(y.numel()).to(dtype)).to(of).view(y.shape)
        results[kind] = [y, *torch.autograd.grad(y, (x, *parameters), cotangent)]
    with implementation.active() as device:
        inputs = {name: tensor.detach().to(device).requires_grad_(name in names) for name, tensor in inputs.items()}
        scaling, seed = 6 / 3 if rslora else 6 / 9, SEED.to(device)
        y = ops.lora_linear(**inputs, scaling=scaling, dropout_p=dropout_p, seed=seed)
        cotangent = torch.cos(torch.arange(y.numel()).to(dtype)).view(y.shape).to(device)
        ours = [y, *torch.autograd.grad(y, tuple(inputs[name] for name in names), cotangent)]
    for name, actual, exact, plain in zip(("y", *names), ours, results["exact"], results["plain"], strict=True):
        assert_within_factor_two(name, actual.cpu(), exact, plain, atol=1e-5 if dtype == torch.float32 else 1e-6)


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 15, 64, 65, 130])
def test_the_mask_is_that_of_the_reference_at_any_first_row(implementation, dtype, columns):
    with implementation.active() as device:
        x = random_tensor(37, columns, dtype=dtype, device=device).detach()
        seed = SEED.to(device)
        whole = reference.row_dropout(x, seed, 0.3, 5, torch.float32)
        for out in (dtype, torch.float32):
            torch.testing.assert_close(row_dropout(x, seed, 0.3, 5, out), whole.to(out))
        torch.testing.assert_close(row_dropout(x[10:], seed, 0.3, 15, torch.float32), whole[10:])
        ones, far = torch.ones_like(x), 2**31 - 40
        for first_row in (5, far):
            keep = reference.keep_mask(seed, *x.shape, 0.3, first_row)
            assert torch.equal(row_dropout(ones, seed, 0.3, first_row, dtype) != 0, keep)
        y = random_tensor(37, columns, dtype=dtype, device=device, seed=2).detach()
        expected = (y.float() + whole).to(dtype)
        row_dropout_add_(y, x, seed, 0.3, 5)
        torch.testing.assert_close(y, expected)


def test_the_mask_keeps_its_share_and_differs_by_seed_row_and_column():
    keep = reference.keep_mask(SEED, 512, 512, 0.1)
    share = keep.double().mean().item()
    assert abs(share - 0.9) < 4 * (0.09 / keep.numel()) ** 0.5
    for shifted in (keep.roll(1, 0), keep.roll(1, 1), keep.roll(16, 1), reference.keep_mask(SEED + 1, 512, 512, 0.1)):
        assert abs((keep & shifted).double().mean().item() - 0.81) < 4 * (0.81 * 0.19 / keep.numel()) ** 0.5


def test_a_seed_is_drawn_from_torchs_generator():
    inputs = make_inputs(9, 20, 12, 3, torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first, other = (ops.lora_linear(**inputs, dropout_p=0.5) for _ in range(2))
        torch.manual_seed(5)
        again = ops.lora_linear(**inputs, dropout_p=0.5)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32], ids=str)
def test_saves_x_once_and_a_few_columns(dropout_p, adapter):
    tokens, k, rank = 64, 32, 3
    inputs = make_inputs(tokens, k, 40, rank, torch.bfloat16, adapter=adapter)
    every = tuple(inputs.values())
    seed = 8 if dropout_p else 0

    def saved(frozen=(), exclude=every[1:]):
        for name, tensor in inputs.items():
            tensor.requires_grad_(name not in frozen)
        return saved_bytes(lambda: ops.lora_linear(**inputs, dropout_p=dropout_p), exclude=exclude)

    x, s = tokens * k * 2, tokens * rank * adapter.itemsize
    assert saved() == x + s + seed
    assert saved(frozen=("lora_a", "weight")) == s + seed
    assert saved(frozen=("lora_b", "weight")) == x + seed
    assert saved(frozen=("lora_a", "lora_b", "weight")) == seed


@pytest.mark.parametrize(
    ("trained", "products"),
    [
        (("x", "lora_a", "lora_b"), ["lora_up_grad", "lora_down_grad", "lora_input_grad"]),
        (("lora_a", "lora_b"), ["lora_up_grad", "lora_down_grad"]),
        (("lora_b",), ["lora_up_grad"]),
        (("x",), ["lora_up_grad", "lora_input_grad"]),
        (("weight",), ["mm"]),
        (("bias",), []),
    ],
)
def test_a_frozen_tensor_costs_no_product(trained, products):
    inputs = make_inputs(8, 20, 20, 3, torch.float32)
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in trained)
    y = ops.lora_linear(**inputs)
    with Calls() as calls:
        y.sum().backward()
    assert calls.names == products


def backward_peak(tokens, k, n, dropout_p):
    torch.set_num_threads(2)
    inputs = make_inputs(tokens, k, n, 8, torch.bfloat16)
    inputs["weight"].requires_grad_(False)
    wanted = tuple(inputs[name] for name in ("x", "lora_a", "lora_b"))
    y = ops.lora_linear(**inputs, dropout_p=dropout_p)
    torch.autograd.grad(y, wanted, y.detach(), retain_graph=True)
    return peak_bytes(lambda: torch.autograd.grad(y, wanted, y.detach()))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_backward_holds_dx_and_a_tile(dropout_p):
    tokens, k, n = 16384, 512, 256
    # In float32, of a product and of both operands, by 1024 rows.
    blocks = 4 * (1024 * k + 1024 * n + n * k) if torch.bfloat16 in SLOW_DTYPES else 0
    assert run_in_child(backward_peak, tokens, k, n, dropout_p) <= tokens * k * 2 + (7 << 20) + blocks  # and two tiles


def test_equal_inputs_give_equal_gradients_and_inputs_are_left_alone():
    inputs = make_inputs(200, 100, 70, 3, torch.float32, magnitude=True)
    copies = [tensor.detach().clone() for tensor in inputs.values()]
    y = ops.lora_linear(**inputs, dropout_p=0.3, seed=SEED)
    first, second = (torch.autograd.grad(y.sum(), tuple(inputs.values()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs.values(), copies, strict=True))


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_autocast_follows_linear(magnitude):
    inputs = make_inputs(33, 24, 40, 3, torch.float32, magnitude=magnitude)

    def layers(x, weight, lora_a, lora_b, bias, magnitude=None):
        adapter = 0.7 * F.linear(F.linear(x, lora_a), lora_b)
        if magnitude is None:
            return F.linear(x, weight, bias) + adapter
        norms = torch.linalg.vector_norm(weight + 0.7 * lora_b.float() @ lora_a.float(), dim=1).detach()
        return (magnitude / norms * (F.linear(x, weight) + adapter) + bias).bfloat16()

    check_autocast(partial(ops.lora_linear, scaling=0.7), layers, partial(reference.lora_linear, scaling=0.7), inputs)


def test_known_row_squares_give_the_same():
    inputs = make_inputs(9, 20, 12, 3, torch.bfloat16, magnitude=True)
    squares = ops.row_squares(inputs["weight"])
    assert_within_factor_two(
        "squares", squares, inputs["weight"].double().square().sum(1), inputs["weight"].float().square().sum(1)
    )
    assert torch.equal(ops.lora_linear(**inputs), ops.lora_linear(**inputs, row_squares=squares))


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3}], ids=str)
@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_compiles_whole_and_equals_eager(options, magnitude):
    inputs = make_inputs((3, 11), 24, 40, 3, torch.float32, magnitude=magnitude)
    check_compiled(lambda **tensors: ops.lora_linear(**tensors, **options, seed=SEED), inputs)


@on_every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_pass_opcheck(implementation, dtype):
    library = torch.ops.memkernels
    with implementation.active() as device:
        x, weight, a, b = (
            tensor.detach() for tensor in list(make_inputs(9, 20, 12, 3, dtype, device, bias=False).values())
        )
        seed, scale = SEED.to(device), torch.ones(12, device=device)
        s, dy = torch.ones(9, 3, dtype=dtype, device=device), torch.ones(9, 12, dtype=dtype, device=device)
        for mask in ((None, 0.0, 0), (seed, 0.3, 4)):
            torch.library.opcheck(library.lora_down.default, (x, a, *mask))
            torch.library.opcheck(library.lora_down_grad.default, (s, x, *mask))
            torch.library.opcheck(library.lora_input_grad.default, (dy, weight, s, a, *mask))
            torch.library.opcheck(library.lora_input_add_.default, (x.clone(), s, a, *mask))
        for of in (None, scale):
            torch.library.opcheck(library.lora_up.default, (x, weight, None, s, b, 0.5, of))
        for of in (None, s):
            torch.library.opcheck(library.lora_up_grad.default, (dy, of, b, 0.5, True))
        torch.library.opcheck(library.row_dropout.default, (x, seed, 0.3, 4, torch.float32))
        torch.library.opcheck(library.row_dropout_add_.default, (x.clone(), x, seed, 0.3, 4))
        torch.library.opcheck(library.row_squares.default, (weight,))
        torch.library.opcheck(library.adapted_row_norms.default, (weight, a, b, 0.5, None))


@pytest.mark.parametrize("tokens", [(0,), (2, 0)])
def test_zero_tokens(tokens):
    inputs = make_inputs(tokens, 20, 12, 3, torch.bfloat16, magnitude=True)
    y, *grads = gradients(inputs, dropout_p=0.5)
    assert y.shape == (*tokens, 12)
    for tensor, grad in zip(inputs.values(), grads, strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


def test_non_contiguous_tensors():
    inputs = make_inputs((12, 5), 10, 14, 3, torch.float32)
    inputs["lora_a"] = random_tensor(10, 3, dtype=torch.float32, seed=20)

    def transposed(function):
        return lambda x, lora_a, **k: function(x.transpose(0, 1), lora_a=lora_a.t(), **k)

    check_op(transposed(ops.lora_linear), transposed(reference.lora_linear), inputs, dropout_p=0.3, seed=SEED)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lora_a": torch.zeros(3, 19)}, ValueError, "lora_a: expected shape"),
        ({"lora_a": torch.zeros(0, 20)}, ValueError, "lora_a: expected shape"),
        ({"lora_b": torch.zeros(12, 4)}, ValueError, "lora_b: expected shape"),
        ({"lora_b": torch.zeros(12, 3).half()}, TypeError, "lora_b: expected torch.float32"),
        ({"weight": torch.zeros(12, 20).half()}, TypeError, "weight: expected torch.float32"),
        ({"weight": torch.zeros(12)}, ValueError, "weight: expected shape"),
        ({"x": torch.zeros(9, 21)}, ValueError, "x: expected shape"),
        ({"x": torch.zeros(9, 20).long()}, TypeError, "x: expected float32"),
        ({"lora_a": torch.zeros(3, 20).half(), "lora_b": torch.zeros(12, 3).half()}, TypeError, "lora_a of weight"),
        ({"bias": torch.zeros(11)}, ValueError, "bias: expected shape"),
        ({"bias": torch.zeros(12).half()}, TypeError, "bias: expected"),
        ({"magnitude": torch.zeros(11)}, ValueError, "magnitude: expected shape"),
        ({"magnitude": torch.zeros(12).half()}, TypeError, "magnitude of weight"),
        ({"row_squares": torch.zeros(12)}, ValueError, "row_squares: expected None"),
        *(
            ({"scaling": value}, TypeError, "scaling: expected a finite number")
            for value in ("1", None, True, torch.ones(()))
        ),
        *(({"scaling": value}, ValueError, "scaling: expected a finite number") for value in (math.nan, -math.inf)),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: expected"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p: expected"),
        ({"lora_b": torch.zeros(12, 3, device="meta")}, ValueError, "lora_b: expected device"),
    ],
)
def test_bad_input_is_named(change, error, message):
    inputs = {name: tensor.detach() for name, tensor in make_inputs(9, 20, 12, 3, torch.float32).items()}
    with pytest.raises(error, match=message):
        ops.lora_linear(**inputs | change)
