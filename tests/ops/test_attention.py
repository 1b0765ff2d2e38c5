"""ops.attention: every feature on every implementation against the float64 reference, and what it saves."""

import pytest
import torch
from attention_inputs import make_inputs, make_slopes, starts
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memkernels import ops
from memkernels.ops.attention import reference
from memkernels.ops.attention.configs import FLOAT32, PLAIN, fitting
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
IMPLEMENTATIONS = implementations("attention_fwd")
on_every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)


def finite(result):
    """A row that sees nothing has lse = -inf, which has no difference to take."""
    out, lse = result
    return out, torch.where(lse.isinf(), torch.zeros_like(lse), lse)


def check(inputs, of=slice(None), **options):
    """Of (out, lse), those that `of` says."""
    dtype = inputs["q"].dtype

    def exact_or_plain(**arguments):
        # At the inputs' own dtype the reference rounds between steps, as eager PyTorch does: the error to compare with.
        inner = arguments["q"].dtype if arguments["q"].dtype != torch.float32 else None
        return finite(reference.attention(**arguments, inner_dtype=inner))[of]

    seed = options.get("seed")
    reference_options = options | ({"seed": torch.tensor(seed)} if seed is not None else {})
    check_op(
        lambda **arguments: finite(ops.attention(**arguments, **options, return_lse=True))[of],
        lambda **arguments: exact_or_plain(**arguments, **reference_options),
        inputs,
        atol=2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 8,
    )


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"queries": 1, "keys": 77, "size": 64},
        {"queries": 130, "keys": 50, "heads": 2, "kv_heads": 1, "size": 17, "value_size": 33},
        {"queries": 50, "keys": 130, "heads": 2, "size": 128, "value_size": 16},
        {"batch": 1, "queries": 49, "keys": 97, "heads": 1, "kv_heads": 1, "size": 16},
        {"batch": 1, "queries": 33, "keys": 40, "heads": 2, "kv_heads": 1, "size": 96},
        {"batch": 1, "queries": 33, "keys": 40, "heads": 3, "kv_heads": 3, "size": 192, "value_size": 128},
        {"batch": 1, "queries": 33, "keys": 40, "heads": 2, "kv_heads": 1, "size": 256},
    ],
    ids=["gqa", "one query", "odd sizes", "long keys", "one head", "96", "192 and 128", "256"],
)
def test_matches_reference(implementation, shape, causal, dtype):
    with implementation.active() as device:
        check(make_inputs(dtype, device, **shape), causal=causal)


@pytest.mark.parametrize("implementation", [of for of in IMPLEMENTATIONS if of.name.startswith("cpu-")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_larger_than_a_gpu_takes(implementation, dtype):
    with implementation.active() as device:
        shape = {"batch": 1, "queries": 33, "keys": 40, "heads": 2, "kv_heads": 1, "size": 300, "value_size": 520}
        check(make_inputs(dtype, device, **shape), causal=True, softcap=4.0)


@pytest.mark.parametrize("implementation", implementations("attention_fwd")[-1:], ids=str)
@pytest.mark.parametrize(("size", "value_size"), [(96, 130), (256, 256), (20, 130)])
@pytest.mark.parametrize("precision", ["exact", "tf32"])
def test_large_heads_in_parts(implementation, size, value_size, precision, monkeypatch):
    """The tiles of float32 that multiply queries and keys in parts of the head size."""
    triton = pytest.importorskip("memkernels.ops.attention.triton", reason="Triton is not installed")
    config = FLOAT32[precision][256]._replace(PRECISION="ieee")
    assert all(tile.PART < 96 for tile in (config.forward, config.dkdv, config.dq))
    monkeypatch.setattr(triton, "select_config", lambda *args: config)
    with implementation.active() as device:
        shape = {"batch": 1, "queries": 50, "keys": 61, "heads": 2, "kv_heads": 1}
        inputs = make_inputs(torch.float32, device, size=size, value_size=value_size, **shape)
        check(inputs, causal=True, dropout_p=0.2, seed=3, softcap=2.0)


def test_parts_of_heads_are_such_as_products_take():
    """tl.dot takes 16 columns and more, which the interpreter does not check; heads are padded to powers of two."""
    for config in (config for table in FLOAT32.values() for config in table.values()):
        for tile in (config.forward, config.dkdv, config.dq):
            assert tile.PART in (16, 32, 64, 128, 256)


@pytest.mark.parametrize(
    ("sizes", "heads"),
    [((64, 64), 64), ((64, 128), (128, 64)), ((128, 16), (128, 64)), ((96, 128), 128), ((64, 256), 256)],
)
def test_tiles_are_for_both_head_sizes(sizes, heads):
    assert fitting(PLAIN["sm_80"], sizes) is PLAIN["sm_80"][heads]


@on_every_implementation
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"window": (20, 0)},
        {"window": (5, 9)},
        {"window": (0, 0), "causal": True},
        {"window": (30, -1), "causal": True, "softcap": 3.0},
        {"softcap": 1.5},
        {"scale": 0.3},
        {"scale": 5.0},
        {"scale": -5.0},
        {"dropout_p": 0.3, "seed": 1234567890123},
        {"dropout_p": 0.9, "seed": -5, "causal": True},
    ],
    ids=str,
)
def test_options_match_reference(implementation, options, dtype):
    with implementation.active() as device:
        check(make_inputs(dtype, device, queries=70, keys=101, size=32), **options)


@on_every_implementation
@pytest.mark.parametrize("softcap", [50.0, 1000.0])
def test_a_softcap_far_above_the_scores_rounds_as_little(implementation, softcap):
    """50 is Gemma 2's."""
    with implementation.active() as device:
        inputs = make_inputs(torch.float32, device, batch=1, queries=70, keys=101, heads=2, kv_heads=1, size=32)
        check(inputs, softcap=softcap)


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [50, 90], ids=["", "queries that see the sink alone"])
@pytest.mark.parametrize("by_batch", [False, True], ids=["(H,)", "(B, H)"])
def test_alibi_and_sinks_match_reference(implementation, by_batch, queries, dtype):
    with implementation.active() as device:
        inputs = make_inputs(dtype, device, queries=queries, keys=60, size=16)
        inputs["alibi_slopes"] = make_slopes(*((2, 4) if by_batch else (4,)), device=device)
        inputs["sinks"] = random_tensor(4, dtype=torch.float32, device=device, seed=9)
        check(inputs, causal=True, window=(40, 0))


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_packed_sequences_match_reference(implementation, dropout_p, dtype):
    with implementation.active() as device:
        inputs = make_inputs(dtype, device, queries=120, keys=140, size=24, packed=True)
        starts = {
            "cu_seqlens_q": torch.tensor([0, 1, 1, 60, 120], dtype=torch.int32, device=device),
            "cu_seqlens_k": torch.tensor([0, 50, 51, 60, 140], dtype=torch.int32, device=device),
        }
        check(inputs, causal=True, dropout_p=dropout_p, seed=3, **starts)


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option_at_once_matches_reference(implementation, dtype):
    with implementation.active() as device:
        inputs = make_inputs(dtype, device, queries=90, keys=110, size=24, value_size=40, packed=True)
        inputs["alibi_slopes"] = make_slopes(3, 4, device=device)
        inputs["sinks"] = random_tensor(4, dtype=torch.float32, device=device, seed=9)
        starts = {
            "cu_seqlens_q": torch.tensor([0, 20, 60, 90], dtype=torch.int32, device=device),
            "cu_seqlens_k": torch.tensor([0, 20, 50, 110], dtype=torch.int32, device=device),
        }
        check(inputs, causal=True, window=(25, -1), softcap=4.0, scale=0.3, dropout_p=0.2, seed=11, **starts)


@on_every_implementation
@pytest.mark.parametrize(
    "shape", [{"queries": 0}, {"keys": 0}, {"batch": 0}], ids=["no queries", "no keys", "no sequences"]
)
def test_nothing_to_attend(implementation, shape):
    with implementation.active() as device:
        inputs = make_inputs(torch.float32, device, **({"queries": 5, "keys": 7, "size": 16} | shape))
        out, lse = ops.attention(**inputs, return_lse=True)
        gradients = torch.autograd.grad(out.sum(), tuple(inputs.values()))
        assert torch.equal(out, torch.zeros_like(inputs["q"])) and lse.isneginf().all()
        for tensor, gradient in zip(inputs.values(), gradients, strict=True):
            assert torch.equal(gradient, torch.zeros_like(tensor))


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_that_see_nothing_give_zero_and_zero_gradients(implementation, dtype):
    with implementation.active() as device:
        inputs = make_inputs(dtype, device, queries=100, keys=40, size=16)
        out, lse = ops.attention(**inputs, causal=True, return_lse=True)
        (out.float().sum() + lse[..., 60:].sum()).backward()
        assert torch.equal(out[:, :60], torch.zeros_like(out[:, :60])) and lse[..., :60].isneginf().all()
        assert torch.equal(inputs["q"].grad[:, :60], torch.zeros_like(out[:, :60]))
        assert not any(tensor.grad.isnan().any() for tensor in inputs.values())


@on_every_implementation
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_slopes_below_zero(implementation, causal):
    """Whose scores grow with the distance: exp overflows at the rows that fill up a tile of queries."""
    with implementation.active() as device:
        inputs = make_inputs(torch.float32, device, batch=1, queries=50, keys=200, size=16)
        inputs["alibi_slopes"] = -torch.ones(4, device=device)
        exact = {name: tensor.detach().double().requires_grad_(name in "qkv") for name, tensor in inputs.items()}
        results = []
        for function, of in ((ops.attention, inputs), (reference.attention, exact)):
            options = {} if function is reference.attention else {"return_lse": True}
            out, lse = function(**of, causal=causal, **options)
            wanted = [of[name] for name in "qkv"]
            results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), wanted)])
        for ours, wanted in zip(*results, strict=True):
            torch.testing.assert_close(ours, wanted.float(), rtol=1e-3, atol=1e-3)


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_a_number_stays_in_its_row_and_is_seen(implementation, dtype):
    with implementation.active() as device:
        inputs = make_inputs(dtype, device, batch=1, queries=70, keys=70, size=16)
        with torch.no_grad():
            inputs["q"][0, 20, 1, 3] = float("nan")
        out, lse = ops.attention(**inputs, causal=True, return_lse=True)
        assert out[0, 20, 1].isnan().all() and lse[0, 1, 20].isnan()
        assert out.isnan().sum() == 16 and lse.isnan().sum() == 1
        out.float().sum().backward()
        nan = inputs["q"].grad.isnan()
        assert nan[0, 20, 1].all() and nan.sum() == 16
        assert inputs["k"].grad[0, :21, 0].isnan().all() and inputs["v"].grad[0, :21, 0].isnan().all()


@on_every_implementation
@pytest.mark.parametrize("dtype, packed", [*zip(DTYPES, (False, True, False), strict=True)], ids=str)
def test_the_gradient_of_lse_alone(implementation, dtype, packed):
    """Of q, k and sinks; that of v is zero."""
    with implementation.active() as device:
        inputs = make_inputs(dtype, device, queries=50, keys=61, size=24, packed=packed)
        inputs["sinks"] = random_tensor(4, dtype=torch.float32, device=device, seed=9)
        options = {"causal": True, "window": (40, -1), "softcap": 4.0}
        if packed:
            options["cu_seqlens_q"] = starts(0, 20, 50).to(device)
            options["cu_seqlens_k"] = starts(0, 41, 61).to(device)
        check(inputs | {"v": inputs["v"].detach()}, of=1, **options)
        ops.attention(**inputs, **options, return_lse=True)[1].sum().backward()
        assert torch.equal(inputs["v"].grad, torch.zeros_like(inputs["v"]))


@on_every_implementation
def test_transposed_inputs_and_strided_gradients(implementation):
    with implementation.active() as device:
        inputs = {n: t.detach().transpose(1, 2).contiguous().requires_grad_() for n, t in
                  make_inputs(torch.float32, device, queries=33, keys=33, size=16).items()}  # fmt: skip

        def through(function):
            return lambda q, k, v: function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)

        check_op(
            through(ops.attention),
            through(lambda *a, **o: reference.attention(*a, **o)[0]),
            inputs,
            strided_grads=True,
            atol=2e-6,
        )


@on_every_implementation
@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "row", "head"])
def test_offsets_beyond_32_bits(implementation, dimension):
    """Of inputs and of the incoming gradient; those of results are in test_large_offsets.py."""
    with implementation.active() as device:
        shape, strides = [1, 2, 1, 16], [32, 16, 16, 1]
        shape[dimension], strides[dimension] = 3, 2**30
        near = [random_tensor(*shape, dtype=torch.float16, device=device, seed=i).detach() for i in range(4)]
        # Four gigabytes of addresses each, of which a few rows are ever touched.
        far = [torch.empty_strided(x.shape, strides, dtype=x.dtype, device=device).copy_(x) for x in near]
        masks = (None, None, None, None, None, shape[1], shape[1], 0.25, -1, 0, 0.0, 0.0)
        results = []
        for q, k, v, dout in (near, far):
            out, lse = torch.ops.memkernels.attention_fwd(q, k, v, *masks)
            gradients = torch.ops.memkernels.attention_bwd(dout, None, q, k, v, out, lse, *masks, True)[:3]
            results.append((out, lse, *gradients))
        assert all(map(torch.equal, *results))


@on_every_implementation
@settings(max_examples=12, deadline=None)
@given(
    queries=st.integers(1, 60), keys=st.integers(1, 120), size=st.integers(1, 40), group=st.integers(1, 3),
    value_size=st.sampled_from((None, 3, 130)), left=st.integers(-1, 50), right=st.integers(-1, 50),
    causal=st.booleans(),
)  # fmt: skip
def test_any_shape(implementation, queries, keys, group, left, right, causal, **sizes):
    """One query at least sees several keys, or none does; else see test_one_visible_key."""
    offset = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
    seen = (offset >= -left if left >= 0 else offset == offset) & (offset <= (0 if causal else right % 2**31))
    assume(seen.sum(1).max() != 1)
    with implementation.active() as device:
        inputs = make_inputs(
            torch.float32, device, batch=1, queries=queries, keys=keys, heads=group, kv_heads=1, **sizes
        )
        check(inputs, window=(left, right), causal=causal)


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_visible_key(implementation, dtype):
    """The exact dq and dk are zero; each term of theirs is the rounding of dout . v and of dout . out, at any order."""
    with implementation.active() as device:
        inputs = make_inputs(dtype, device, queries=9, keys=9, size=17, value_size=130)
        q, k, v = inputs.values()
        out = ops.attention(**inputs, window=(0, 0))
        dout = random_tensor(*out.shape, dtype=dtype, device=device, seed=3).detach()
        dq, dk = torch.autograd.grad(out, (q, k), dout)
        assert torch.equal(out, v.repeat_interleave(2, 2))
        terms = (dout.double() * out.double()).abs().sum(-1, keepdim=True) * 130 * torch.finfo(torch.float32).eps
        terms = terms * 17**-0.5
        assert (dq.double().abs() <= terms * k.detach().double().abs().repeat_interleave(2, 2)).all()
        bound = (terms * q.detach().double().abs()).unflatten(2, (2, 2)).sum(3)
        assert (dk.double().abs() <= bound).all()


def test_the_same_seed_gives_the_same_mask_and_torchs_generator_the_seed():
    inputs = make_inputs(torch.float32, "cpu")
    torch.manual_seed(0)
    first = ops.attention(**inputs, dropout_p=0.5)
    second = ops.attention(**inputs, dropout_p=0.5)
    torch.manual_seed(0)
    again = ops.attention(**inputs, dropout_p=0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (70, 130)}, {}], ids=str)
def test_the_result_depends_on_neither_threads_nor_run(set_threads, options, heads, dtype):
    """With fewer heads than threads these share a head, and take turns at the gradients of its queries."""
    results = []
    for threads in (1, 2, 4, 4, 4):
        set_threads(threads)
        inputs = make_inputs(dtype, "cpu", batch=1, queries=600, keys=700, heads=heads[0], kv_heads=heads[1])
        inputs["sinks"] = random_tensor(heads[0], dtype=torch.float32, seed=9)
        out, lse = ops.attention(**inputs, **options, return_lse=True)
        (out.float().square().sum() + lse.sum()).backward()
        results.append([out, lse, *(tensor.grad for tensor in inputs.values())])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def transient_bytes(dtype, length):
    """Peak of the forward and of the backward operator, each beyond its inputs and results."""
    torch.set_num_threads(2)

    def measure(length):
        q, k, v, dout = (torch.randn(1, length, 8, 64).to(getattr(torch, dtype)) for _ in range(4))
        masks = (None, None, None, None, None, length, length, 0.125, -1, 0, 0.0, 0.0)
        results = []
        forward = peak_bytes(lambda: results.extend(torch.ops.memkernels.attention_fwd(q, k, v, *masks)))
        arguments = (dout, None, q, k, v, *results, *masks, True)
        backward = peak_bytes(lambda: results.extend(torch.ops.memkernels.attention_bwd(*arguments)))
        out, lse, *gradients = results
        return [forward - out.nbytes - lse.nbytes, backward - sum(gradient.nbytes for gradient in gradients)]

    measure(64)  # what comes once
    return measure(length)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transient_memory_is_linear_in_the_sequence(dtype):
    lengths = 4096, 16384
    short, long = (run_in_child(transient_bytes, dtype, length) for length in lengths)
    assert max(long) < 64e6
    for of_short, of_long in zip(short, long, strict=True):
        assert of_long <= of_short * lengths[1] / lengths[0] + (4 << 20)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_saves_its_inputs_out_and_lse(dropout_p):
    """Of dropout the seed, and no mask."""
    inputs = make_inputs(torch.bfloat16, "cpu", batch=1, queries=64, keys=64, heads=2, kv_heads=2, size=32)
    kept = saved_bytes(lambda: ops.attention(**inputs, dropout_p=dropout_p), exclude=tuple(inputs.values()))
    assert kept == 64 * 2 * (32 * 2 + 4) + (8 if dropout_p else 0)


def test_gradcheck_of_the_reference_path():
    inputs = make_inputs(torch.float64, "cpu", batch=1, queries=5, keys=7, size=4)
    sinks = random_tensor(4, dtype=torch.float64)
    function = lambda q, k, v, sinks: ops.attention(q, k, v, sinks=sinks, causal=True, softcap=2.0, return_lse=True)  # noqa: E731
    assert torch.autograd.gradcheck(function, (*inputs.values(), sinks))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_follows_torchs_attention(backend):
    inputs = make_inputs(torch.float32, "cpu", heads=2, kv_heads=2)
    inputs["k"] = inputs["k"].detach().bfloat16().requires_grad_()  # as a product under autocast leaves it

    def torchs(q, k, v):
        heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    def run(function, dtype, **options):
        copies = {name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() for name, tensor in inputs.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            out = function(**copies, **options)
        return [out, *torch.autograd.grad(out, tuple(copies.values()), torch.ones_like(out))]

    exact, plain = run(torchs, torch.float64), run(torchs, None)
    ours = run(ops.attention, None, causal=True, backend=backend)
    for name, a, e, p in zip(("out", *inputs), ours, exact, plain, strict=True):
        assert a.dtype == p.dtype, name
        eps = torch.finfo(torch.bfloat16).eps / torch.finfo(a.dtype).eps
        assert_within_factor_two(name, a, e, p, roundings=eps)
