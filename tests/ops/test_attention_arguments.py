"""ops.attention: that bad input names the argument, on every backend and in operators, and what numbers are taken."""

import pytest
import torch
from attention_inputs import starts

from memkernels import ops
from memkernels.ops.attention.backends import BACKENDS
from memkernels.ops.attention.checks import starts_fit
from memkernels.ops.attention.op import seen_window
from memkernels.testing import random_tensor


@pytest.mark.parametrize("bad", [(1, 8), (0, 7), (0, 9), (0, 5, 3, 8)], ids=str)
def test_the_cpu_kernels_refuse_starts_that_leave_rows_out(bad):
    q, k, v = (torch.zeros(8, 2, 16) for _ in range(3))
    good, rest = starts(*[0] * (len(bad) - 1), 8), (None, None, None, 8, 8, 0.25, -1, -1, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="cu_seqlens_q: expected starts that rise from 0 to 8"):
        torch.ops.memkernels.attention_fwd(q, k, v, starts(*bad), good, *rest)
    out, lse = torch.ops.memkernels.attention_fwd(q, k, v, good, good, *rest)
    with pytest.raises(RuntimeError, match="cu_seqlens_k: expected starts that rise from 0 to 8"):
        torch.ops.memkernels.attention_bwd(out, lse, q, k, v, out, lse, good, starts(*bad), *rest, False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": None}, TypeError, "q: expected a tensor, got NoneType"),
        ({"q": torch.zeros(2, 8, 4, 16, dtype=torch.int64)}, TypeError, "q: expected float32"),
        ({"k": torch.zeros(2, 8, 2, 16, dtype=torch.bfloat16)}, TypeError, "k: expected torch.float32, as q"),
        ({"q": torch.zeros(8, 4, 16)}, ValueError, r"q: expected \(B, S, H, D\)"),
        ({"q": torch.zeros(2, 8, 0, 16)}, ValueError, "q: expected at least one head"),
        ({"k": torch.zeros(2, 8, 2, 8), "v": torch.zeros(2, 8, 2, 8)}, ValueError, "k: expected head size 16"),
        ({"k": torch.zeros(2, 8, 3, 16), "v": torch.zeros(2, 8, 3, 16)}, ValueError, "k: expected a number of heads"),
        ({"k": torch.zeros(1, 8, 2, 16), "v": torch.zeros(1, 8, 2, 16)}, ValueError, "k: expected batch size 2"),
        ({"v": torch.zeros(2, 7, 2, 16)}, ValueError, "v: expected shape"),
        ({"v": torch.zeros(2, 8, 2, 16, device="meta")}, ValueError, "v: expected device cpu"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
        ({"scale": "0.5"}, TypeError, "scale: expected a finite number, got '0.5'"),
        ({"scale": torch.tensor(0.5)}, TypeError, "scale: expected a finite number"),
        ({"softcap": "5"}, TypeError, "softcap: expected"),
        ({"dropout_p": "0.1"}, TypeError, r"dropout_p: expected a number in \[0, 1\), got '0.1'"),
        ({"dropout_p": None}, TypeError, r"dropout_p: expected a number in \[0, 1\), got None"),
        ({"causal": 1}, TypeError, "causal: expected True or False, got 1"),
        ({"deterministic": "yes"}, TypeError, "deterministic: expected True or False, got 'yes'"),
        ({"return_lse": None}, TypeError, "return_lse: expected True or False, got None"),
        ({"v": torch.zeros(2, 8, 2, 16).to_sparse()}, TypeError, "v: expected a dense tensor, got .* torch.sparse_coo"),
        ({"sinks": torch.zeros(4).to_sparse()}, TypeError, "sinks: expected a dense tensor, got .* torch.sparse_coo"),
        ({"window": (-2, 0)}, ValueError, "window: expected two numbers of keys"),
        ({"window": (0, -3)}, ValueError, "window: expected two numbers of keys"),
        ({"window": (1.5, 0)}, TypeError, "window: expected two numbers of keys"),
        ({"window": (True, 0)}, TypeError, "window: expected two numbers of keys"),
        ({"window": (1, torch.tensor(0))}, TypeError, "window: expected two numbers of keys"),
        ({"window": (1, 2, 3)}, ValueError, "window: expected two numbers of keys"),
        ({"window": 5}, ValueError, "window: expected two numbers of keys"),
        ({"softcap": -1.0}, ValueError, "softcap: expected"),
        ({"softcap": float("nan")}, ValueError, "softcap: expected"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: expected"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p: expected"),
        ({"dropout_p": 0.1, "seed": 0.5}, ValueError, "seed: expected an integer of 64 bits"),
        ({"dropout_p": 0.1, "seed": 2**64}, ValueError, "seed: expected an integer of 64 bits"),
        (
            {"dropout_p": 0.1, "seed": torch.zeros(1, dtype=torch.int64).to_sparse()},
            ValueError, "seed: expected an integer of 64 bits",
        ),
        ({"dropout_p": 0.1, "seed": torch.zeros(2)}, ValueError, "seed: expected an integer of 64 bits"),
        ({"max_seqlen_q": 8}, ValueError, "max_seqlen_q: expected None without cu_seqlens_q and cu_seqlens_k"),
        ({"max_seqlen_k": 8}, ValueError, "max_seqlen_k: expected None without cu_seqlens_q and cu_seqlens_k"),
        ({"sinks": [0.0] * 4}, TypeError, "sinks: expected a tensor, got list"),
        ({"sinks": torch.zeros(3)}, ValueError, "sinks: expected shape"),
        ({"sinks": torch.zeros(4, dtype=torch.float64)}, TypeError, "sinks: expected float32"),
        ({"alibi_slopes": torch.zeros(4, dtype=torch.float64)}, TypeError, "alibi_slopes: expected float32"),
        ({"alibi_slopes": torch.zeros(3, 4)}, ValueError, "alibi_slopes: expected shape"),
        ({"alibi_slopes": torch.zeros(4, requires_grad=True)}, ValueError, "alibi_slopes: .*no gradient"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument_on_every_backend(backend, change, error, message):
    arguments = {"q": torch.zeros(2, 8, 4, 16), "k": torch.zeros(2, 8, 2, 16), "v": torch.zeros(2, 8, 2, 16)} | change
    with pytest.raises(error, match=message):
        ops.attention(**arguments, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("cu_seqlens_q", "cu_seqlens_k", "error", "message"),
    [
        (starts(0, 8), None, ValueError, "cu_seqlens_k: expected with its counterpart"),
        (starts(0, 8), starts(0, 4, 8), ValueError, "cu_seqlens_k: expected shape"),
        (starts(0, 5, 3, 8), starts(0, 3, 5, 8), ValueError, "cu_seqlens_q: expected starts that rise from 0 to 8"),
        (starts(0, 9), starts(0, 8), ValueError, "cu_seqlens_q: expected starts that rise from 0 to 8"),
        (starts(0, 8), starts(1, 8), ValueError, "cu_seqlens_k: expected starts that rise from 0 to 8"),
        (starts(0, 8, dtype=torch.int64), starts(0, 8, dtype=torch.int64), TypeError, "cu_seqlens_q: expected int32"),
    ],
)
def test_bad_sequence_starts_are_named_on_every_backend(backend, cu_seqlens_q, cu_seqlens_k, error, message):
    q, k, v = (torch.zeros(8, 2, 16) for _ in range(3))
    with pytest.raises(error, match=message):
        ops.attention(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_longest_sequence_that_is_too_short_is_named_on_every_backend(backend):
    q, k, v = (torch.zeros(8, 2, 16) for _ in range(3))
    options = {"cu_seqlens_q": starts(0, 3, 8), "cu_seqlens_k": starts(0, 3, 8), "backend": backend}
    with pytest.raises(ValueError, match="max_seqlen_q: expected at least 5"):
        ops.attention(q, k, v, **options, max_seqlen_q=4)
    for wrong in ("5", 5.0, torch.tensor(5)):
        with pytest.raises(TypeError, match="max_seqlen_q: expected an integer from 0 up or None"):
            ops.attention(q, k, v, **options, max_seqlen_q=wrong)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_window_of_any_size_is_taken(backend):
    q, k, v = (random_tensor(1, 5, 2, 16, dtype=torch.float32) for _ in range(3))
    assert seen_window((2**31, 2**70), False) == (2**31 - 1, 2**31 - 1)
    assert torch.equal(
        ops.attention(q, k, v, window=(2**70, 2**31), backend=backend), ops.attention(q, k, v, backend=backend)
    )


def test_no_softcap_is_zero_or_none():
    q, k, v = (random_tensor(1, 5, 2, 16, dtype=torch.float32) for _ in range(3))
    assert torch.equal(ops.attention(q, k, v, softcap=None), ops.attention(q, k, v))


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        ((0, 3, 8), True),
        ((0, 0, 5, 8), True),
        ((0, 5, 3, 8), False),
        ((1, 8), False),
        ((0, 9), False),
        ((0, 1, 8), False),
    ],
)
def test_what_a_gpu_asserts_of_sequence_starts(values, fits):
    assert starts_fit(starts(*values), 8, 5).item() is fits
