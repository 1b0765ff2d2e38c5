"""ops.apply_rotary: every implementation against the float64 reference, strides, and transformers' own functions."""

import pytest
import torch
from compilers import check_compiled
from hypothesis import given, settings
from hypothesis import strategies as st

from memkernels import ops
from memkernels.ops.rotary import reference
from memkernels.testing import check_op, implementations, poisoned_memory, random_tensor, saved_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = implementations("rotary_fwd")
on_every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
both_pairings = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def make_tables(shape, dtype, device="cpu"):
    """Unrelated halves: a kernel that reads one half only is wrong."""
    return {
        name: random_tensor(*shape, dtype=dtype, device=device, seed=seed).detach()
        for name, seed in (("cos", 3), ("sin", 4))
    }


def make_inputs(batch, tokens, heads, kv_heads, size, dtype, device="cpu", *, width=None, table_dtype=None, tables=2):
    leading = {1: (1, tokens), 2: (tokens,), 3: (batch, tokens)}[tables]
    return {
        "q": random_tensor(batch, tokens, heads, size, dtype=dtype, device=device, seed=1),
        "k": random_tensor(batch, tokens, kv_heads, size, dtype=dtype, device=device, seed=2),
        **make_tables((*leading, width or size), table_dtype or dtype, device),
    }


def real_tables(tokens, width, dtype=torch.float32):
    """The tables of Hugging Face: (1, S, R) with equal halves."""
    angles = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.cat((angles, angles), -1)[None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


@on_every_implementation
@both_pairings
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "kv_heads", "size"),
    [(2, 19, 3, 1, 60), (1, 1, 1, 1, 2), (3, 5, 4, 2, 128), (2, 33, 2, 2, 34)],
)
def test_matches_reference(implementation, batch, tokens, heads, kv_heads, size, dtype, interleaved):
    with implementation.active() as device:
        inputs = make_inputs(batch, tokens, heads, kv_heads, size, dtype, device)
        check_op(ops.apply_rotary, reference.apply_rotary, inputs, interleaved=interleaved)


@on_every_implementation
@both_pairings
@pytest.mark.parametrize("width", [2, 32, 58])
def test_partial_rotary_passes_the_rest_through(implementation, width, interleaved):
    with implementation.active() as device:
        inputs = make_inputs(2, 7, 3, 2, 60, torch.bfloat16, device, width=width)
        check_op(ops.apply_rotary, reference.apply_rotary, inputs, interleaved=interleaved)
        for given_, rotated in zip(
            (inputs["q"], inputs["k"]), ops.apply_rotary(**inputs, interleaved=interleaved), strict=True
        ):
            assert torch.equal(given_[..., width:], rotated[..., width:])


@on_every_implementation
@pytest.mark.parametrize("tables", [1, 2, 3], ids=["(1,S,R)", "(S,R)", "(B,S,R)"])
def test_float32_tables_of_every_shape_under_bfloat16(implementation, tables):
    with implementation.active() as device:
        inputs = make_inputs(3, 21, 4, 2, 64, torch.bfloat16, device, table_dtype=torch.float32, tables=tables)
        check_op(ops.apply_rotary, reference.apply_rotary, inputs)


@on_every_implementation
@both_pairings
def test_strided_gradients(implementation, interleaved):
    with implementation.active() as device:
        inputs = make_inputs(2, 9, 3, 2, 32, torch.float32, device, width=24)
        check_op(ops.apply_rotary, reference.apply_rotary, inputs, interleaved=interleaved, strided_grads=True)


LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "slice of a fused projection": lambda x: torch.cat((x, x), -2)[..., : x.shape[-2], :],
    "slice of wider heads": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "last dimension strided": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded over heads": lambda x: x[:, :, :1].expand(x.shape),
}


@on_every_implementation
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_layout(implementation, layout):
    def with_layout(function):
        return lambda q, k, cos, sin: function(LAYOUTS[layout](q), LAYOUTS[layout](k), cos, sin)

    with implementation.active() as device:
        inputs = make_inputs(2, 37, 4, 3, 48, torch.bfloat16, device, tables=3)
        check_op(with_layout(ops.apply_rotary), with_layout(reference.apply_rotary), inputs)
        q, k = LAYOUTS[layout](inputs["q"].detach()), LAYOUTS[layout](inputs["k"].detach())
        torch.library.opcheck(torch.ops.memkernels.rotary_fwd.default, (q, k, inputs["cos"], inputs["sin"], False))


@on_every_implementation
def test_a_transposed_input_gives_a_transposed_output_and_no_copy(implementation):
    with implementation.active() as device:
        inputs = make_inputs(2, 37, 4, 3, 48, torch.bfloat16, device)
        q, k = (LAYOUTS["heads first"](inputs[name].detach()) for name in ("q", "k"))
        q_out, k_out = ops.apply_rotary(q, k, inputs["cos"], inputs["sin"])
        assert q_out.stride() == q.stride() and k_out.stride() == k.stride()


@on_every_implementation
@both_pairings
@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "token", "head"])
def test_offsets_beyond_32_bits(implementation, interleaved, dimension):
    with implementation.active() as device:
        inputs = {name: t.detach() for name, t in make_inputs(3, 3, 3, 3, 12, torch.float16, device, width=8).items()}
        expected = ops.apply_rotary(**inputs, interleaved=interleaved)
        strides = [36 * 3, 36, 12, 1]
        strides[dimension] = 2**30
        for name in "qk":
            # Four gigabytes of addresses, of which a few rows are ever touched.
            sparse = torch.empty_strided(inputs[name].shape, strides, dtype=torch.float16, device=device)
            inputs[name] = sparse.copy_(inputs[name])
        assert all(map(torch.equal, ops.apply_rotary(**inputs, interleaved=interleaved), expected))


@on_every_implementation
def test_no_tokens_and_no_heads(implementation):
    with implementation.active() as device:
        for tokens, heads in ((0, 2), (3, 0)):
            inputs = make_inputs(2, tokens, heads, 1, 8, torch.float32, device)
            q, k = ops.apply_rotary(**inputs)
            (q.sum() + k.sum()).backward()
            assert inputs["q"].grad.shape == (2, tokens, heads, 8)
            assert inputs["k"].grad.shape == (2, tokens, 1, 8)


@on_every_implementation
@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 40),
    heads=st.integers(1, 5),
    half=st.integers(1, 40),
    rest=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
)
def test_any_shape(implementation, tokens, heads, half, rest, dtype, interleaved):
    with implementation.active() as device:
        inputs = make_inputs(2, tokens, heads, 1, 2 * half + rest, dtype, device, width=2 * half)
        check_op(ops.apply_rotary, reference.apply_rotary, inputs, interleaved=interleaved, roundings=2)


@on_every_implementation
@pytest.mark.parametrize("used", ["q", "k"])
def test_a_result_that_is_not_used(implementation, used):
    with implementation.active() as device, poisoned_memory():
        inputs = make_inputs(1, 5, 2, 1, 16, torch.float32, device)
        outputs = dict(zip("qk", ops.apply_rotary(**inputs), strict=True))
        (gradient,) = torch.autograd.grad(outputs[used].sum(), (inputs[used],))
        (expected,) = torch.autograd.grad(
            dict(zip("qk", reference.apply_rotary(**inputs), strict=True))[used].sum(), (inputs[used],)
        )
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_transformers_llama(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="needs transformers")
    cos, sin = real_tables(29, 64, dtype)
    inputs = make_inputs(2, 29, 4, 2, 64, dtype)

    def theirs(q, k):
        return tuple(
            x.transpose(1, 2)
            for x in llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos.to(q), sin.to(q))
        )

    check_op(lambda q, k: ops.apply_rotary(q, k, cos, sin), theirs, {name: inputs[name] for name in "qk"})


@pytest.mark.parametrize("width", [32, 64])
def test_interleaved_equals_transformers_glm(width):
    glm = pytest.importorskip("transformers.models.glm.modeling_glm", reason="needs transformers")
    cos, sin = real_tables(29, width)
    q, k = (make_inputs(2, 29, 4, 2, 64, torch.float32)[name].detach() for name in "qk")
    ours = ops.apply_rotary(q, k, cos, sin, interleaved=True)
    theirs = glm.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected)


@on_every_implementation
def test_autocast_rotates_what_products_leave_in_its_dtype(implementation):
    """The tables stay float32; q and k are bfloat16, and so are the results."""

    def scores(rotate):
        def run(x, w_q, w_k, cos, sin):
            with torch.autocast(x.device.type, torch.bfloat16):
                q, k = (torch.nn.functional.linear(x, w).unflatten(-1, (3, 16)) for w in (w_q, w_k))
                q_out, k_out = rotate(q, k, cos, sin)
                assert q_out.dtype == q.dtype and k_out.dtype == k.dtype
                return q_out.transpose(1, 2) @ k_out.transpose(1, 2).mT

        return run

    with implementation.active() as device:
        inputs = {"x": random_tensor(2, 9, 24, dtype=torch.float32, device=device)}
        for seed, name in enumerate(("w_q", "w_k"), 1):
            inputs[name] = random_tensor(48, 24, dtype=torch.float32, device=device, seed=seed, scale=24**-0.5)
        tables = make_tables((9, 16), torch.float32, device)
        check_op(scores(ops.apply_rotary), scores(reference.apply_rotary), inputs | tables)
        q = random_tensor(2, 9, 3, 16, dtype=torch.float32, device=device)
        with torch.autocast(device, torch.bfloat16):
            inside = ops.apply_rotary(q, q, **tables)
        assert all(map(torch.equal, inside, ops.apply_rotary(q, q, **tables)))


def test_gradcheck_of_the_reference_path():
    inputs = make_inputs(2, 3, 2, 1, 6, torch.float64, width=4)
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(
            lambda q, k, pairs=interleaved: ops.apply_rotary(q, k, inputs["cos"], inputs["sin"], interleaved=pairs),
            (inputs["q"], inputs["k"]),
        )


@on_every_implementation
@both_pairings
def test_operators_pass_opcheck(implementation, interleaved):
    with implementation.active() as device:
        inputs = make_inputs(2, 5, 3, 1, 12, torch.bfloat16, device, width=8)
        arguments = (*(tensor.detach() for tensor in inputs.values()), interleaved)
        torch.library.opcheck(torch.ops.memkernels.rotary_fwd.default, arguments)
        torch.library.opcheck(torch.ops.memkernels.rotary_bwd.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_and_equals_eager(dynamic):
    def step(q, k, cos, sin):
        q, k = ops.apply_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return (q.transpose(1, 2) @ k.transpose(1, 2).mT).square().mean()

    inputs = make_inputs(2, 9, 17, 17, 32, torch.float32)
    tables = zip(("cos", "sin"), (table[:17] for table in real_tables(17, 32)), strict=True)
    check_compiled(step, {name: inputs[name] for name in ("q", "k")} | dict(tables), dynamic=dynamic)


def test_saves_cos_and_sin_alone():
    inputs = make_inputs(2, 16, 4, 2, 32, torch.bfloat16)
    tables = (inputs["cos"], inputs["sin"])
    assert saved_bytes(lambda: ops.apply_rotary(**inputs), exclude=tables) == 0


def test_a_second_backward_gives_the_same_gradient():
    inputs = make_inputs(1, 6, 2, 1, 16, torch.float32)
    q, k = ops.apply_rotary(**inputs)
    total = q.square().sum() + k.sum()
    first, second = (torch.autograd.grad(total, (inputs["q"], inputs["k"]), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


Z = torch.zeros


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Z(2, 5, 3, 8, dtype=torch.int32)}, TypeError, "q: expected float32"),
        ({"q": Z(2, 5, 24)}, ValueError, r"q: expected four dimensions.*got shape \(2, 5, 24\)"),
        ({"k": Z(2, 4, 1, 8)}, ValueError, r"k: expected \(B, S, H, D\).*got \(2, 4, 1, 8\)"),
        ({"k": Z(2, 5, 1, 8, dtype=torch.bfloat16)}, TypeError, "k: expected torch.float32, as q"),
        ({"k": Z(2, 5, 1, 8, device="meta")}, ValueError, "k: expected device cpu"),
        ({"cos": Z(5, 10)}, ValueError, r"cos: expected an even last dimension of at most q's 8.*\(5, 10\)"),
        ({"cos": Z(5, 7)}, ValueError, "cos: expected an even last dimension"),
        ({"cos": Z(6, 8)}, ValueError, r"cos: expected shape \(5, 8\)"),
        ({"cos": Z(3, 5, 8)}, ValueError, r"cos: expected shape \(2, 5, 8\)"),
        ({"cos": Z(5, 8, dtype=torch.float16)}, TypeError, "cos: expected torch.float32"),
        ({"sin": Z(5, 6)}, ValueError, r"sin: expected shape \(5, 8\)"),
        ({"sin": Z(5, 8, dtype=torch.bfloat16)}, TypeError, "sin: expected torch.float32"),
        ({"cos": Z(5, 8, requires_grad=True)}, ValueError, "cos: got a tensor that requires grad"),
        ({"sin": Z(5, 8, requires_grad=True)}, ValueError, "sin: got a tensor that requires grad"),
        ({"interleaved": "x"}, TypeError, "interleaved: expected True or False, got 'x'"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"q": Z(2, 5, 3, 8), "k": Z(2, 5, 1, 8), "cos": Z(5, 8), "sin": Z(5, 8)} | change
    with pytest.raises(error, match=message):
        ops.apply_rotary(**arguments)
