"""ops.lora_embedding: against the float64 reference, and what it saves, sums, rejects, compiles to."""

import math

import pytest
import torch
from compilers import check_compiled
from hypothesis import given, settings
from hypothesis import strategies as st

from memkernels import ops
from memkernels.ops.lora_embedding import reference
from memkernels.ops.lora_linear import products
from memkernels.testing import check_op, random_tensor, saved_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE = torch.tensor(3.3)


def make_inputs(shape, count, size, rank, dtype, *, adapter=None, magnitude=False):
    adapter = adapter or dtype
    ids = torch.randint(0, count, shape, generator=torch.Generator().manual_seed(9))
    inputs = {
        "ids": ids,
        "weight": random_tensor(count, size, dtype=dtype).detach(),
        "lora_a": random_tensor(rank, count, dtype=adapter, seed=1),
        "lora_b": random_tensor(size, rank, dtype=adapter, seed=2),
    }
    return inputs | ({"magnitude": random_tensor(size, dtype=dtype, seed=3)} if magnitude else {})


def check(inputs, **options):
    check_op(ops.lora_embedding, reference.lora_embedding, inputs, **{"scaling": 0.7} | options)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setitem(products._TILE_BYTES, "cpu", 1)  # 64 rows, the least


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=str)
@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"embed_scale": SCALE, "padding_idx": 4}], ids=str)
def test_matches_reference(dtype, adapter, magnitude, options, small_tiles):
    inputs = make_inputs((3, 47), 11, 20, 3, dtype, adapter=adapter, magnitude=magnitude)
    check(inputs, strided_grads=True, **options)


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(0, 9), max_size=3), count=st.integers(1, 40), size=st.integers(1, 50),
       rank=st.integers(1, 20), dtype=st.sampled_from(DTYPES), magnitude=st.booleans())  # fmt: skip
def test_any_shape_and_rank(shape, count, size, rank, dtype, magnitude):
    check(make_inputs(tuple(shape), count, size, rank, dtype, magnitude=magnitude), roundings=2)


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_gradients_are_those_of_finite_differences(magnitude):
    inputs = make_inputs((5,), 4, 3, 2, torch.float64)
    ids, weight = inputs.pop("ids"), inputs.pop("weight")
    if magnitude:  # g counts as a constant of A and B, so that its gradient alone is that of the function
        inputs = {name: of.detach() for name, of in inputs.items()} | {
            "magnitude": random_tensor(3, dtype=weight.dtype)
        }
    function = lambda *tensors: ops.lora_embedding(  # noqa: E731
        ids, weight, **dict(zip(inputs, tensors, strict=True)), scaling=0.7, embed_scale=SCALE
    )
    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("trained", ["lora_a", "lora_b", "magnitude"])
def test_gradients_only_where_they_are_wanted(trained):
    inputs = make_inputs((9,), 11, 20, 3, torch.float32, magnitude=True)
    for name in inputs.keys() - {"ids", "weight"}:
        inputs[name].requires_grad_(name == trained)
    check(inputs)


def test_int32_and_non_contiguous_ids_and_factors():
    inputs = make_inputs((6, 5), 11, 20, 3, torch.float32)
    ids, a = inputs["ids"], inputs["lora_a"]
    expected = ops.lora_embedding(**inputs)
    assert torch.equal(ops.lora_embedding(**inputs | {"ids": ids.int()}), expected)
    strided = ids.t().contiguous().t()
    other = ops.lora_embedding(**inputs | {"ids": strided, "lora_a": a.detach().t().contiguous().t()})
    assert torch.equal(other, expected)


def test_the_gradient_of_a_has_the_columns_of_ids_that_there_are():
    inputs = make_inputs((400,), 7, 4, 2, torch.bfloat16) | {"ids": torch.tensor([5, 1] * 200)}
    y = ops.lora_embedding(**inputs)
    (da,) = torch.autograd.grad(y, inputs["lora_a"], torch.full_like(y, 1 / 256))
    # In bfloat16 a sum of 200 equal terms stops growing; in float32 it is rounded once.
    expected = (inputs["lora_b"].detach().double().sum(0) * 200 / 256).to(da.dtype)
    assert torch.equal(da[:, [5, 1]], expected[:, None].expand(2, 2))
    assert not da[:, [0, 2, 3, 4, 6]].any()
    (again,) = torch.autograd.grad(ops.lora_embedding(**inputs), inputs["lora_a"], torch.full_like(y, 1 / 256))
    assert torch.equal(again, da)


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_saves_ids_alone(magnitude):
    inputs = make_inputs((300,), 11, 20, 3, torch.float32, magnitude=magnitude)
    exclude = tuple(inputs[name] for name in inputs if name != "ids")
    saved = saved_bytes(lambda: ops.lora_embedding(**inputs), exclude=exclude)
    columns = 2 * 4 * 20 if magnitude else 0  # g, and the norms that its gradient is divided by
    assert saved == 8 * 300 + columns


def test_under_autocast_the_sum_is_in_float32():
    inputs = make_inputs((9,), 11, 20, 3, torch.float32)
    expected = ops.lora_embedding(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.lora_embedding(**inputs)
    assert torch.equal(y, expected)
    wanted = (inputs["lora_a"], inputs["lora_b"])
    for ours, of in zip(*(torch.autograd.grad(of.sum(), wanted) for of in (y, expected)), strict=True):
        assert torch.equal(ours, of)


def test_column_squares_are_those_of_the_weight():
    inputs = make_inputs((9,), 11, 20, 3, torch.float32, magnitude=True)
    squares = ops.row_squares(inputs["weight"].t())
    torch.testing.assert_close(ops.lora_embedding(**inputs, column_squares=squares), ops.lora_embedding(**inputs))


def test_opcheck():
    library = torch.ops.memkernels
    ids, weight, a, b = make_inputs((2, 9), 11, 20, 3, torch.bfloat16).values()
    a, b, dy = a.detach(), b.detach(), random_tensor(2, 9, 20, dtype=torch.bfloat16).detach()
    for scales in ((None, None), (SCALE, torch.rand(20))):
        torch.library.opcheck(library.lora_embedding_fwd.default, (ids, weight, a, b, 0.5, *scales))
        for wanted in ([True, True, scales[1] is not None], [False, True, False]):
            arguments = (dy, ids, weight, a, b, 0.5, *scales, 3, wanted)
            torch.library.opcheck(library.lora_embedding_bwd.default, arguments)


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_compiles_whole(magnitude):
    inputs = make_inputs((9,), 11, 20, 3, torch.float32, magnitude=magnitude)
    check_compiled(
        lambda **tensors: ops.lora_embedding(**tensors, scaling=0.7, padding_idx=2), inputs, backend="aot_eager"
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.zeros(3)}, TypeError, "ids: expected int64 or int32, got torch.float32"),
        ({"ids": [1]}, TypeError, "ids: expected a tensor"),
        ({"ids": torch.tensor([11])}, IndexError, "out of range"),
        ({"ids": torch.tensor([-1])}, IndexError, "out of range"),
        ({"weight": torch.zeros(11, 20, requires_grad=True)}, ValueError, "weight: expected a frozen one"),
        ({"weight": torch.zeros(11)}, ValueError, "weight: expected shape"),
        ({"weight": torch.zeros(11, 20).long()}, TypeError, "weight: expected float32"),
        ({"lora_a": torch.zeros(3, 12)}, ValueError, r"lora_a: expected shape \(r, 11\)"),
        ({"lora_a": torch.zeros(0, 11)}, ValueError, "lora_a: expected shape"),
        ({"lora_a": torch.zeros(3, 11).half()}, TypeError, "lora_a: expected torch.float32"),
        ({"lora_b": torch.zeros(20, 4)}, ValueError, r"lora_b: expected shape \(20, 3\)"),
        ({"lora_b": torch.zeros(20, 3).half()}, TypeError, "lora_b: expected torch.float32"),
        ({"lora_b": torch.zeros(20, 3, device="meta")}, ValueError, "lora_b: expected device"),
        ({"scaling": math.inf}, ValueError, "scaling: expected a finite number"),
        ({"scaling": "1"}, TypeError, "scaling: expected a finite number"),
        ({"padding_idx": 11}, ValueError, "padding_idx: expected a number below 11"),
        ({"padding_idx": -1}, ValueError, "padding_idx: expected an integer from 0 up"),
        ({"padding_idx": 1.0}, TypeError, "padding_idx: expected an integer"),
        ({"embed_scale": torch.ones(2)}, ValueError, "embed_scale: expected one element"),
        ({"magnitude": torch.ones(11)}, ValueError, "magnitude: expected shape"),
        ({"magnitude": torch.ones(20).half()}, TypeError, "magnitude: expected torch.float32"),
        ({"column_squares": torch.ones(20)}, ValueError, "column_squares: expected None"),
    ],
)
def test_bad_input_is_named(change, error, message):
    inputs = make_inputs((9,), 11, 20, 3, torch.float32)
    with pytest.raises(error, match=message):
        ops.lora_embedding(**inputs | change)
