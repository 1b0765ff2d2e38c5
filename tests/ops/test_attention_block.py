"""ops.attention_block: every implementation against the float64 reference, and what it saves, rejects, compiles to."""

import inspect
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from autocast import check_autocast
from compilers import check_compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from memkernels import ops
from memkernels.ops.attention_block import reference
from memkernels.ops.attention_block.op import plan_attention_block
from memkernels.testing import check_op, implementations, peak_bytes, random_tensor, run_in_child, saved_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = implementations("attention_fwd")
on_every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)


def make_inputs(shape, dtype, device="cpu", *, heads=4, kv_heads=2, size=12, v_size=None, d=20, norm=True,
                norm_bias=False, bias=False, head_norms=False, rotary=0, sinks=False, post_norm=False,
                alibi=False):  # fmt: skip
    """Arguments that are tensors; the first dimensions of x are `shape`."""
    v_size = v_size or size
    shapes = {"x": (*shape, d), "w_q": (heads * size, d), "w_k": (kv_heads * size, d), "w_v": (kv_heads * v_size, d),
              "w_o": (d, heads * v_size)}  # fmt: skip
    shapes |= {"norm_weight": (d,)} if norm else {}
    shapes |= {"norm_bias": (d,)} if norm_bias else {}
    shapes |= {f"b_{name}": (shapes[f"w_{name}"][0],) for name in "qkvo"} if bias else {}
    shapes |= {"q_norm_weight": (size,), "k_norm_weight": (size,)} if head_norms else {}
    shapes |= {"post_norm_weight": (d,)} if post_norm else {}
    shapes |= {"sinks": (heads,)} if sinks else {}
    inputs = {
        name: random_tensor(*of, dtype=torch.float32 if name == "sinks" else dtype, device=device, seed=seed,
                            scale=of[1] ** -0.5 if name.startswith("w_") else 1.0)
        for seed, (name, of) in enumerate(shapes.items())
    }  # fmt: skip
    if alibi:
        inputs["alibi_slopes"] = 2.0 ** -torch.arange(1.0, heads + 1, device=device)
    if rotary:
        angles = torch.arange(shape[-1])[:, None] / 50.0 ** (torch.arange(rotary // 2) / rotary)
        tables = torch.cat((angles, angles), -1).to(dtype).to(device)
        inputs |= {"cos": tables.cos(), "sin": tables.sin()}
    return inputs


def check(inputs, *, strided_grads=False, max_seqlen=None, **options):
    check_op(
        lambda **k: ops.attention_block(**k, max_seqlen=max_seqlen, **options),
        lambda **k: reference.attention_block(**k, **options),
        inputs,
        strided_grads=strided_grads,
        # Over 40 draws the error was 1.0 to 1.4 times plain PyTorch's in root mean square, but up to 4.3 times in the
        # largest of two dozen elements: in float32, sums over tokens whose terms, of order ten, cancel.
        roundings=2.0,
        atol=1e-5,
    )


def gradients(inputs, **options):
    y = ops.attention_block(**inputs, **options)
    wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, torch.ones_like(y))]


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(implementation, dtype):
    with implementation.active() as device:
        inputs = make_inputs((2, 37), dtype, device, rotary=12)
        check(inputs, num_heads=4, causal=True)


@on_every_implementation
@pytest.mark.parametrize(
    ("parts", "options"),
    [
        ({"norm": False}, {}),
        # Rotated, since a bias of k that is not turned has no gradient but noise.
        ({"norm_bias": True, "bias": True, "rotary": 12}, {"norm": "layer", "causal": True}),
        ({"head_norms": True, "rotary": 12}, {"causal": True, "norm_offset": 1.0}),
        ({"post_norm": True, "bias": True, "rotary": 12}, {"causal": True, "norm_offset": 1.0}),
        ({"rotary": 8}, {"interleaved": True, "window": (5, 3)}),
        ({"sinks": True, "v_size": 10}, {"causal": True, "window": (6, -1), "softcap": 5.0}),
        ({"kv_heads": 1}, {"dropout_p": 0.3, "seed": 5, "scale": 0.5}),
        ({"alibi": True}, {"causal": True}),
    ],
    ids=[
        "plain", "layer-norm-bias", "head-norms", "post-norm", "interleaved-window", "sinks-softcap", "dropout",
        "alibi",
    ],
)  # fmt: skip
def test_every_part(implementation, parts, options):
    with implementation.active() as device:
        seed = {"seed": torch.tensor(options["seed"])} if "seed" in options else {}
        check(make_inputs((2, 19), torch.float32, device, **parts), num_heads=4, **options | seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs_and_gradients(dtype):
    inputs = make_inputs((19, 2), dtype, rotary=12)
    inputs.update(cos=inputs["cos"].repeat(10, 1)[:19], sin=inputs["sin"].repeat(10, 1)[:19])

    def transposed(function):
        return lambda x, w_q, **k: function(x.transpose(0, 1), w_q=w_q.t().contiguous().t(), num_heads=4, **k)

    check_op(transposed(ops.attention_block), transposed(reference.attention_block), inputs, strided_grads=True)


@on_every_implementation
def test_packed_sequences_equal_each_by_itself(implementation):
    with implementation.active() as device:
        inputs = make_inputs((1, 40), torch.float32, device, rotary=12)
        starts = torch.tensor([0, 13, 13, 40], dtype=torch.int32, device=device)
        check(inputs, num_heads=4, causal=True, cu_seqlens=starts)
        inputs["x"] = inputs["x"].detach()[0].requires_grad_()
        check(inputs, num_heads=4, causal=True, cu_seqlens=starts, max_seqlen=30)


@on_every_implementation
@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 23), min_size=1, max_size=3).filter(any), d=st.integers(8, 30),
    kv_heads=st.integers(1, 2), group=st.integers(1, 3), half_size=st.integers(1, 12), v_size=st.integers(1, 20),
    turned=st.booleans(), packed=st.booleans(), causal=st.booleans(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(implementation, lengths, d, kv_heads, group, half_size, v_size, turned, packed, causal, dtype):
    heads, rows = kv_heads * group, (1, sum(lengths)) if packed else (len(lengths), max(lengths))
    sizes = {"heads": heads, "kv_heads": kv_heads, "size": 2 * half_size, "v_size": v_size, "d": d}
    with implementation.active() as device:
        options = {"num_heads": heads, "causal": causal}
        if packed:
            starts = [0, *itertools.accumulate(lengths)]
            options["cu_seqlens"] = torch.tensor(starts, dtype=torch.int32, device=device)
        check(make_inputs(rows, dtype, device, **sizes, rotary=2 * half_size * turned), **options)


EVERY = ("x", "w_q", "w_k", "w_v", "w_o", "norm_weight", "q_norm_weight", "k_norm_weight", "b_q", "b_o", "sinks",
         "post_norm_weight")  # fmt: skip


@pytest.mark.parametrize("trained", [*itertools.combinations(EVERY, 1), EVERY[:5], ("w_o", "sinks")], ids="-".join)
def test_gradients_only_where_they_are_wanted(trained):
    inputs = make_inputs((1, 9), torch.float32, head_norms=True, bias=True, rotary=12, sinks=True, post_norm=True)
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in trained)
    check(inputs, num_heads=4, causal=True)


@pytest.mark.parametrize(
    ("trained", "products"),
    [
        (("x", "w_q", "w_k", "w_v", "w_o"), 11),  # recompute 3, dout, dx 3, dW 4
        (("x",), 7),
        (("w_o",), 1),
        (("w_q",), 5),
    ],
)
def test_a_frozen_weight_costs_no_product(trained, products):
    tokens, d = 8, 48
    inputs = make_inputs((1, tokens), torch.float32, kv_heads=4, d=d)
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in trained)
    y = ops.attention_block(**inputs, num_heads=4)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == products * 2 * tokens * d * d


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("packed", "dropout_p"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_saves_x_out_and_lse(dtype, packed, dropout_p):
    """Of dropout the seed, and no mask."""
    tokens, d, heads, v_size = 24, 20, 4, 10
    inputs = make_inputs((1, tokens), dtype, rotary=12, v_size=v_size, head_norms=True)
    starts = torch.tensor([0, 11, 24], dtype=torch.int32) if packed else None
    every = (*inputs.values(), *(() if starts is None else (starts,)))
    options = {"num_heads": heads, "causal": True, "cu_seqlens": starts, "dropout_p": dropout_p}
    saved = saved_bytes(lambda: ops.attention_block(**inputs, **options), exclude=every)
    assert saved == tokens * (heads * v_size * dtype.itemsize + heads * 4) + (8 if dropout_p else 0)
    with_x = saved_bytes(lambda: ops.attention_block(**inputs, **options), exclude=every[1:])
    assert with_x == saved + tokens * d * dtype.itemsize


def backward_peak(tokens, d, heads):
    torch.set_num_threads(2)
    inputs = make_inputs((1, tokens), torch.bfloat16, d=d, heads=heads, kv_heads=heads, size=d // heads, rotary=8)
    y = ops.attention_block(**inputs, num_heads=heads, causal=True)
    wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
    torch.autograd.grad(y, wanted, y.detach(), retain_graph=True)
    return peak_bytes(lambda: torch.autograd.grad(y, wanted, y.detach()))


def test_transient_memory_of_backward_is_linear_in_tokens():
    tokens, d, heads = 4096, 256, 4
    # n, q, k, v, dout, dq, dk, dv and two that turn or norm them; a float32 copy of some within attention.
    assert run_in_child(backward_peak, tokens, d, heads) <= 16 * tokens * d * 2 + 4 * d * d * 4 + (8 << 20)
    assert heads * tokens * tokens * 2 > 16 * tokens * d * 2 + (8 << 20)


def test_a_second_backward_gives_the_same_gradients_and_inputs_are_left_alone():
    inputs = make_inputs((2, 9), torch.float32, rotary=12, head_norms=True)
    copies = [tensor.detach().clone() for tensor in inputs.values()]
    wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
    y = ops.attention_block(**inputs, num_heads=4)
    first, second = (torch.autograd.grad(y.sum(), wanted, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs.values(), copies, strict=True))


def test_a_scaled_loss_gives_scaled_gradients():
    inputs = make_inputs((2, 9), torch.float32, rotary=12)
    whole = gradients(inputs, num_heads=4)[1:]
    (ops.attention_block(**inputs, num_heads=4).sum() * 0.25).backward()
    wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
    for tensor, grad in zip(wanted, whole, strict=True):
        torch.testing.assert_close(tensor.grad, grad * 0.25)


@pytest.mark.parametrize("norm", [True, False])
def test_autocast_follows_the_layers_it_replaces(norm):
    inputs = make_inputs((2, 17), torch.float32, norm=norm, bias=True)

    def layers(x, w_q, w_k, w_v, w_o, norm_weight=None, b_q=None, b_k=None, b_v=None, b_o=None):
        n = x if norm_weight is None else F.rms_norm(x, x.shape[-1:], norm_weight, 1e-6)
        q, k, v = (
            F.linear(n, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
            for w, b, heads in ((w_q, b_q, 4), (w_k, b_k, 2), (w_v, b_v, 2))
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return F.linear(out.transpose(1, 2).flatten(-2), w_o, b_o)

    check_autocast(partial(ops.attention_block, num_heads=4, causal=True), layers, layers, inputs)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_whole_and_equals_eager(packed):
    starts = torch.tensor([0, 11, 24], dtype=torch.int32) if packed else None

    def step(**tensors):
        return ops.attention_block(
            **tensors, num_heads=4, causal=True, cu_seqlens=starts, max_seqlen=13 if packed else None
        )

    check_compiled(step, make_inputs((1, 24), torch.float32, rotary=12, head_norms=True, bias=True))


def test_works_under_activation_checkpointing():
    inputs = make_inputs((2, 9), torch.float32, rotary=12)
    wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
    options = {"num_heads": 4, "dropout_p": 0.4}
    torch.manual_seed(3)
    expected = torch.autograd.grad(ops.attention_block(**inputs, **options).sum(), wanted)
    torch.manual_seed(3)
    y = torch.utils.checkpoint.checkpoint(lambda: ops.attention_block(**inputs, **options), use_reentrant=False)
    actual = torch.autograd.grad(y.sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_gradcheck_of_the_reference_path():
    inputs = make_inputs((1, 5), torch.float64, heads=2, kv_heads=1, size=4, d=6, rotary=4, head_norms=True, bias=True)
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}

    def function(*tensors):
        return ops.attention_block(**inputs | dict(zip(wanted, tensors, strict=True)), num_heads=2, causal=True)

    assert torch.autograd.gradcheck(function, tuple(wanted.values()))


def test_no_tokens():
    inputs = make_inputs((2, 0), torch.float32)
    y, dx, dw_q, *_ = gradients(inputs, num_heads=4, causal=True)
    assert y.shape == dx.shape == (2, 0, 20)
    assert torch.equal(dw_q, torch.zeros_like(dw_q))


def test_the_checked_call_has_the_public_signature():
    public, checked = (inspect.signature(f).parameters for f in (ops.attention_block, plan_attention_block))
    assert public == checked


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 8, dtype=torch.int32)}, TypeError, "x: expected float32"),
        ({"x": torch.zeros(6, 8)}, ValueError, r"x: expected \(B, S, d\), or cu_seqlens"),
        ({"num_heads": 3}, ValueError, "num_heads: expected a divisor of w_q's 16 rows, got 3"),
        ({"num_heads": 0}, ValueError, "num_heads: expected a positive integer, got 0"),
        ({"num_heads": 4.0}, TypeError, "num_heads: expected a positive integer, got 4.0"),
        ({"num_heads": None}, TypeError, "num_heads: expected a positive integer, got None"),
        ({"norm_eps": None}, TypeError, "norm_eps: expected a finite number from 0 up, got None"),
        ({"scale": "0.5"}, TypeError, "scale: expected a finite number, got '0.5'"),
        ({"w_q": torch.zeros(16, 7)}, ValueError, r"w_q: expected shape \(out, 8\), got \(16, 7\)"),
        ({"w_k": torch.zeros(12, 8)}, ValueError, "w_k: expected heads of 4 rows, as many as divide q's 4, got 12"),
        ({"w_v": torch.zeros(9, 8)}, ValueError, "w_v: expected rows for k's 2 heads, got 9"),
        ({"w_o": torch.zeros(8, 8)}, ValueError, r"w_o: expected shape \(8, 16\)"),
        ({"w_o": torch.zeros(8, 16, dtype=torch.bfloat16)}, TypeError, "w_o: expected torch.float32, as x"),
        ({"w_v": torch.zeros(8, 8, device="meta")}, ValueError, "w_v: expected device cpu"),
        ({"b_k": torch.zeros(16)}, ValueError, r"b_k: expected shape \(8,\) \(w_k's rows\)"),
        ({"norm_weight": torch.zeros(7)}, ValueError, r"norm_weight: expected shape \(8,\)"),
        ({"norm": "batch"}, ValueError, "norm: expected one of rms, layer"),
        ({"q_norm_weight": torch.zeros(8)}, ValueError, r"q_norm_weight: expected shape \(4,\)"),
        ({"cos": torch.zeros(3, 4)}, ValueError, "sin: expected with its counterpart"),
        ({"cos": torch.zeros(4, 4), "sin": torch.zeros(4, 4)}, ValueError, r"cos: expected shape \(3, 4\)"),
        ({"interleaved": "x"}, TypeError, "interleaved: expected True or False, got 'x'"),
        ({"causal": 1}, TypeError, "causal: expected True or False, got 1"),
        ({"deterministic": 0}, TypeError, "deterministic: expected True or False, got 0"),
        ({"window": (-2, 0)}, ValueError, "window: expected two numbers of keys"),
        ({"softcap": -1.0}, ValueError, "softcap: expected 0"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a number"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks: expected shape \(4,\)"),
        ({"max_seqlen": 3}, ValueError, "max_seqlen: expected None without cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, ValueError, r"x: expected \(T, d\) or \(1, T, d\)"),
        (
            {"x": torch.zeros(6, 8), "cu_seqlens": torch.tensor([0, 4, 3, 6], dtype=torch.int32)},
            ValueError,
            "cu_seqlens: expected starts that rise from 0 to 6",
        ),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"x": torch.zeros(2, 3, 8), "w_q": torch.zeros(16, 8), "w_k": torch.zeros(8, 8)}
    arguments |= {"w_v": torch.zeros(8, 8), "w_o": torch.zeros(8, 16), "num_heads": 4} | change
    with pytest.raises(error, match=message):
        ops.attention_block(**arguments)
