"""ops.attention(backend=...): what each backend lacks, what "auto" takes, and torch's operators behind our Function."""

from unittest import mock

import pytest
import torch
from compilers import check_compiled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from memkernels import ops
from memkernels.ops.attention import aten, backends, reference
from memkernels.ops.attention.backends import Call, select_implementation
from memkernels.testing import check_op, random_tensor

H100, A100, RTX3090, RTX4090, RTX5090, T4 = (9, 0), (8, 0), (8, 6), (8, 9), (12, 0), (7, 5)


def make_call(**change):
    """A causal call in bfloat16 that every backend on a GPU has what it takes for."""
    call = Call(
        torch.device("cuda", 0), torch.bfloat16, (64, 64), (128, 128), same_lengths=True, packed=False, grouped=False,
        empty=False, window=(-1, 0), softcap=False, alibi_slopes=False, sinks=False, dropout=False, deterministic=False,
        lse=False,
    )  # fmt: skip
    return call._replace(**change)


@pytest.fixture
def gpu():
    """Makes torch report an NVIDIA GPU of a compute capability, and a version of cuDNN."""

    def report(capability, cudnn=91600):
        patches = {
            "torch.cuda.get_device_capability": lambda device: capability,
            "torch.backends.cudnn.version": lambda: cudnn,
            "torch.backends.cuda.is_flash_attention_available": lambda: True,
            "memkernels.ops.attention.backends.missing": lambda operator, device_type: None,
        }
        for name, replacement in patches.items():
            stack.append(mock.patch(name, replacement))
            stack[-1].start()

    stack = []
    yield report
    for patch in stack:
        patch.stop()


@pytest.mark.parametrize(
    ("capability", "cudnn", "change", "expected"),
    [
        (H100, 91600, {}, "cudnn"),
        (H100, 91600, {"grouped": True}, "cudnn"),
        (H100, 91500, {}, "flash"),
        (H100, None, {}, "flash"),
        (H100, 91600, {"window": (64, 0)}, "flash"),
        (H100, 91600, {"packed": True}, "flash"),
        (H100, 91600, {"head_sizes": (256, 256)}, "flash"),
        (H100, 91600, {"head_sizes": (136, 136)}, "flash"),
        (H100, 91600, {"lengths": (96, 128), "same_lengths": False}, "flash"),
        (H100, 91600, {"lengths": (96, 128), "same_lengths": False, "window": (-1, -1)}, "cudnn"),
        (A100, 91600, {"grouped": True}, "flash"),
        (A100, 91600, {"head_sizes": (256, 256)}, "flash"),
        (A100, 91600, {"lengths": (1, 128), "same_lengths": False}, "flash"),
        (A100, 91600, {"lengths": (128, 1), "same_lengths": False}, "kernels"),
        (A100, 91600, {"lengths": (128, 1), "same_lengths": False, "window": (-1, -1)}, "flash"),
        (A100, 91600, {"packed": True, "same_lengths": False}, "kernels"),
        *((gpu, 91600, {"head_sizes": (192, 192)}, "flash") for gpu in (RTX3090, RTX4090, RTX5090)),
        *((gpu, 91600, {"head_sizes": (200, 200)}, "kernels") for gpu in (RTX3090, RTX4090, RTX5090)),
        (T4, 91600, {}, "kernels"),
        (A100, 91600, {"dtype": torch.float32}, "kernels"),
        (A100, 91600, {"dtype": torch.float64}, "reference"),
        (A100, 91600, {"head_sizes": (60, 60)}, "kernels"),
        (A100, 91600, {"head_sizes": (64, 128)}, "kernels"),
        (A100, 91600, {"head_sizes": (264, 264)}, "reference"),
        *((A100, 91600, {name: True}, "kernels")
          for name in ("softcap", "alibi_slopes", "sinks", "dropout", "deterministic", "lse", "empty")),
    ],
    ids=str,
)  # fmt: skip
def test_auto_takes_torchs_operators_where_they_can(gpu, capability, cudnn, change, expected):
    gpu(capability, cudnn)
    assert select_implementation("auto", make_call(**change)) == expected


def test_torchs_switches_switch_off_its_operators(gpu):
    gpu(H100)
    with mock.patch("torch.backends.cuda.cudnn_sdp_enabled", lambda: False):
        assert select_implementation("auto", make_call()) == "flash"
        with mock.patch("torch.backends.cuda.flash_sdp_enabled", lambda: False):
            assert select_implementation("auto", make_call()) == "kernels"


@pytest.mark.parametrize(
    ("backend", "change", "message"),
    [
        ("flash", {}, "backend: expected one of auto, triton, aten, cpu, reference, got 'flash'"),
        ("cpu", {}, "backend: 'cpu' lacks tensors on cuda"),
        ("triton", {"device": torch.device("cpu")}, "backend: 'triton' lacks tensors on cpu"),
        ("triton", {"dtype": torch.float64}, "backend: 'triton' lacks torch.float64"),
        ("triton", {"head_sizes": (64, 264)}, "backend: 'triton' lacks head sizes over 256"),
        ("cpu", {"device": torch.device("cpu"), "dtype": torch.float64}, "backend: 'cpu' lacks torch.float64"),
        ("aten", {"device": torch.device("meta")}, "backend: 'aten' lacks tensors on meta"),
        ("aten", {"softcap": True, "sinks": True}, "backend: 'aten' lacks softcap, sinks, which this call needs"),
        ("aten", {"alibi_slopes": True}, "'aten' lacks alibi_slopes"),
        ("aten", {"dropout": True}, "'aten' lacks the mask of dropout_p"),
        ("aten", {"lse": True}, "'aten' lacks return_lse with a gradient"),
        ("aten", {"deterministic": True}, "'aten' lacks deterministic gradients"),
        ("aten", {"dtype": torch.float32}, "'aten' lacks torch.float32"),
        ("aten", {"head_sizes": (64, 32)}, "'aten' lacks a head size of v that is not q's"),
        ("aten", {"device": torch.device("cpu"), "window": (9, 0)}, "'aten' lacks a window"),
        ("aten", {"device": torch.device("cpu"), "grouped": True}, "'aten' lacks grouped heads"),
        ("aten", {"device": torch.device("cpu"), "packed": True}, "'aten' lacks packed sequences"),
        ("aten", {"device": torch.device("cpu"), "same_lengths": False}, "'aten' lacks a causal mask of more or fewer"),
    ],
)  # fmt: skip
def test_a_backend_says_what_it_lacks(gpu, backend, change, message):
    gpu(A100)
    with pytest.raises(ValueError, match=message):
        select_implementation(backend, make_call(**change))


def inputs_of(dtype, *, queries=33, keys=33, heads=2, size=24):
    shapes = {"q": (2, queries, heads, size), "k": (2, keys, heads, size), "v": (2, keys, heads, size)}
    return {name: random_tensor(*shape, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    ("options", "keys"),
    [({"causal": True}, 33), ({"scale": 0.4}, 33), ({}, 50)],
    ids=["causal", "scale", "longer keys"],
)
def test_torchs_cpu_operator_matches_reference(dtype, options, keys):
    half = dtype != torch.float32
    check_op(
        lambda **tensors: ops.attention(**tensors, **options, backend="aten"),
        lambda **tensors: reference.attention(
            **tensors, **options, inner_dtype=dtype if half and tensors["q"].dtype == dtype else None
        )[0],
        inputs_of(dtype, keys=keys),
        strided_grads=True,
        atol=2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 4,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU, which torch's operators run on")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in ("flash", "cudnn") for options in ({"causal": True}, {"scale": 0.4})]
    + [("flash", options) for options in ({"causal": True, "window": (16, -1)}, {"window": (16, 9)}, {"packed": True})],
    ids=str,
)
def test_torchs_gpu_operators_match_reference(name, options, dtype, monkeypatch):
    """Without lse, which they return without a gradient; heads are grouped."""
    limit = aten.head_limits(torch.device("cuda")).get(name)
    if limit is None:
        pytest.skip(f"torch's {name} operator does not run on this GPU")
    monkeypatch.setattr(backends, "_head_limits", lambda device: ((name, limit),))
    lead, options = (2, 97), dict(options)
    if options.pop("packed", False):
        cu_seqlens = torch.tensor([0, 1, 60, 97], dtype=torch.int32, device="cuda")
        options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "causal": True}
        lead = (97,)
    shapes = {"q": (*lead, 4, 64), "k": (*lead, 2, 64), "v": (*lead, 2, 64)}
    check_op(
        lambda **tensors: ops.attention(**tensors, **options, backend="aten"),
        lambda **tensors: reference.attention(
            **tensors, **options, inner_dtype=dtype if tensors["q"].dtype == dtype else None
        )[0],
        {n: random_tensor(*of, dtype=dtype, device="cuda", seed=i) for i, (n, of) in enumerate(shapes.items())},
        strided_grads=True,
        atol=torch.finfo(dtype).eps / 4,
    )


def test_the_reference_by_name_equals_the_kernels():
    results = []
    for backend in ("cpu", "reference"):
        inputs = inputs_of(torch.float32, keys=40)
        out, lse = ops.attention(**inputs, causal=True, softcap=5.0, return_lse=True, backend=backend)
        (out.square().sum() + lse.sum()).backward()
        results.append([out, lse, *(tensor.grad for tensor in inputs.values())])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


def test_the_reference_gives_zero_to_queries_that_see_nothing():
    inputs = inputs_of(torch.float32, queries=50, keys=20)
    out, lse = ops.attention(**inputs, causal=True, return_lse=True, backend="reference")
    (out.sum() + lse[..., 30:].sum()).backward()
    assert not out[:, :30].any() and lse[..., :30].isneginf().all() and not inputs["q"].grad[:, :30].any()
    assert all(tensor.grad.isfinite().all() and tensor.grad.any() for tensor in inputs.values())


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_gradients_on_cpu_are_the_same_on_every_run(backend):
    runs = []
    for _ in range(3):
        inputs = inputs_of(torch.float32, queries=300, keys=300)
        ops.attention(**inputs, causal=True, deterministic=True, backend=backend).square().sum().backward()
        runs.append([tensor.grad for tensor in inputs.values()])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


class Record(TorchDispatchMode):
    """Notes the arguments of attention's operators, by name and with their defaults."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "attention" in func.__name__:
            declared = func._schema.arguments
            given = dict(zip((argument.name for argument in declared), args, strict=False)) | kwargs
            self.calls.append({argument.name: argument.default_value for argument in declared} | given)
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "window", "packed", "causal_flag", "window_arguments"),
    [
        ("flash", (-1, 0), False, True, (None, None)),
        ("flash", (-1, -1), True, False, (None, None)),
        ("flash", (16, 0), True, False, (16, 0)),
        ("flash", (16, -1), False, False, (16, None)),
        ("cudnn", (-1, 0), False, True, None),
        ("cudnn", (-1, -1), False, False, None),
    ],
)
def test_arguments_of_torchs_gpu_operators(name, window, packed, causal_flag, window_arguments):
    """On fake CUDA tensors: torch's schemas and shape functions accept the arguments, and the masks are as meant."""
    forward, backward = aten.OPERATORS[name]
    with FakeTensorMode(), Record() as record:
        lead = (64,) if packed else (2, 32)
        q, dout = (torch.empty(*lead, 4, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        k, v = (torch.empty(*lead, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        starts = torch.empty(3, dtype=torch.int32, device="cuda") if packed else None
        masks = (starts, starts, None, None, None, 32, 32, 0.25, *window, 0.0, 0.0)
        out, lse = forward(q, k, v, *masks)
        dq, dk, dv, dsinks = backward(dout, None, q, k, v, out, lse, *masks, False)
        assert out.shape == q.shape and lse.dtype == torch.float32 and dsinks is None
        assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    assert len(record.calls) == 2
    for call in record.calls:
        assert call["is_causal"] is causal_flag and call["scale"] == 0.25 and call["dropout_p"] == 0.0
        if name == "flash":
            assert (call["window_size_left"], call["window_size_right"]) == window_arguments
            assert call["cum_seq_q"] is starts and call["cum_seq_k"] is starts
            assert (call["max_q"], call["max_k"]) == (32, 32)
    if name == "cudnn":
        assert record.calls[0]["compute_log_sumexp"] and record.calls[0]["query"].shape == (2, 4, 32, 64)


def test_the_block_uses_torchs_operators_too():
    """The half-block with torch's operators behind it equals that with this package's."""
    results = []
    for implementation in ("kernels", "flash_for_cpu"):
        x, *weights = (
            random_tensor(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate([(2, 9, 32)] + [(32, 32)] * 4)
        )
        with mock.patch("memkernels.ops.attention_block.op.select_implementation", return_value=implementation):
            y = ops.attention_block(x, *(weight * 32**-0.5 for weight in weights), num_heads=2, causal=True)
        y.square().sum().backward()
        results.append([y, x.grad, *(weight.grad for weight in weights)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiles_whole_by_name():
    def step(q, k, v):
        return ops.attention(q, k, v, causal=True, backend="aten")

    check_compiled(step, inputs_of(torch.float32))
