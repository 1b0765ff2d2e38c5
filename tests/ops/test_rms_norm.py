"""ops.rms_norm: every implementation against the float64 reference, and what it saves, rejects and compiles to."""

import pytest
import torch
from compilers import check_compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from norms import check_under_autocast

from memkernels import nn, ops
from memkernels.ops import wide_norm
from memkernels.ops.rms_norm import reference
from memkernels.testing import check_op, implementations, random_tensor, saved_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = implementations("rms_norm_fwd")
on_every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)


def make_inputs(shape, dtype, device, *, residual=False, weight_dtype=None):
    inputs = {
        "x": random_tensor(*shape, dtype=dtype, device=device, seed=1),
        "weight": random_tensor(shape[-1], dtype=weight_dtype or dtype, device=device, seed=2),
    }
    if residual:
        inputs["residual"] = random_tensor(*shape, dtype=dtype, device=device, seed=3)
    return inputs


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(63, 60), (1, 1), (5, 7), (2, 3, 130), (4, 1024), (257, 16)], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_matches_reference(implementation, shape, dtype, residual):
    with implementation.active() as device:
        check_op(ops.rms_norm, reference.rms_norm, make_inputs(shape, dtype, device, residual=residual), eps=1e-5)


@on_every_implementation
def test_weight_offset_and_strided_gradient(implementation):
    with implementation.active() as device:
        inputs = make_inputs((9, 33), torch.bfloat16, device, residual=True)
        check_op(ops.rms_norm, reference.rms_norm, inputs, weight_offset=1.0, strided_grads=True)


@on_every_implementation
def test_float32_weight_under_bfloat16_activations(implementation):
    with implementation.active() as device:
        inputs = make_inputs((9, 33), torch.bfloat16, device, weight_dtype=torch.float32)
        check_op(ops.rms_norm, reference.rms_norm, inputs)


@on_every_implementation
def test_non_contiguous_input(implementation):
    with implementation.active() as device:
        base = random_tensor(40, 12, dtype=torch.float32, device=device)
        check_op(lambda x, weight: ops.rms_norm(x.t(), weight), lambda x, weight: reference.rms_norm(x.t(), weight),
                 {"x": base, "weight": random_tensor(40, dtype=torch.float32, device=device, seed=2)})  # fmt: skip


@on_every_implementation
def test_zero_rows_and_zero_columns(implementation):
    with implementation.active() as device:
        x, weight = make_inputs((0, 8), torch.float32, device).values()
        y = ops.rms_norm(x, weight)
        y.sum().backward()
        assert y.shape == (0, 8) and torch.equal(weight.grad, torch.zeros_like(weight))
        empty, no_weight = make_inputs((3, 0), torch.float32, device).values()
        ops.rms_norm(empty, no_weight).sum().backward()
        assert empty.grad.shape == (3, 0)


@on_every_implementation
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("rows", "size", "dtype"),
    [(21, 8208, torch.bfloat16), (21, 4099, torch.float32), (5, 16400, torch.bfloat16)],
    ids=str,
)
def test_wide_rows(implementation, rows, size, dtype, residual):
    """Rows that no Triton program holds in backward: in blocks of columns, or in CUDA C++ where GPUs have it."""
    with implementation.active() as device:
        inputs = make_inputs((rows, size), dtype, device, residual=residual)
        check_op(ops.rms_norm, reference.rms_norm, inputs, eps=1e-5, weight_offset=1.0)


@on_every_implementation
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), size=st.integers(1, 70), data=st.sampled_from(DTYPES))
def test_any_shape(implementation, rows, size, data):
    with implementation.active() as device:
        check_op(ops.rms_norm, reference.rms_norm, make_inputs((rows, size), data, device, residual=True), roundings=2)


@on_every_implementation
def test_large_and_tiny_values_stay_finite(implementation):
    with implementation.active() as device:
        x = torch.tensor([[1e-30] * 16, [3e18] * 16, [0.0] * 16], device=device)
        y = ops.rms_norm(x, torch.ones(16, device=device))
        expected = reference.rms_norm(x.double(), torch.ones(16, device=device, dtype=torch.float64))
        torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=0)


@on_every_implementation
def test_the_weight_gradient_does_not_depend_on_threads(implementation):
    with implementation.active() as device:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x, weight = make_inputs((501, 64), torch.float32, device).values()
            ops.rms_norm(x, weight).square().sum().backward()
            results.append(weight.grad)
        assert torch.equal(*results)


@on_every_implementation
def test_autocast_norms_what_products_leave_in_its_dtype(implementation):
    with implementation.active() as device:
        residual = make_inputs((9, 33), torch.float32, device, residual=True)
        check_under_autocast(ops.rms_norm, reference.rms_norm, residual, device, ("weight",))


def test_gradcheck_of_the_reference_path():
    inputs = make_inputs((3, 5), torch.float64, "cpu", residual=True)
    assert torch.autograd.gradcheck(lambda x, w, r: ops.rms_norm(x, w, residual=r), tuple(inputs.values()))


@on_every_implementation
def test_opcheck(implementation):
    with implementation.active() as device:
        for residual in (False, True):
            inputs = {k: v.detach() for k, v in make_inputs((6, 10), torch.bfloat16, device, residual=residual).items()}
            x, weight, added = inputs["x"], inputs["weight"], inputs.get("residual")
            torch.library.opcheck(torch.ops.memkernels.rms_norm_fwd.default, (x, added, weight, 1e-6, 0.0))
            rstd = torch.rand(6, device=device)
            args = (x, added, x, weight, rstd, 0.0)
            torch.library.opcheck(torch.ops.memkernels.rms_norm_bwd.default, (*args, True))
            torch.library.opcheck(torch.ops.memkernels.rms_norm_bwd.default, (*args, False))


def test_compiles_whole_and_equals_eager():
    def step(x, weight, residual):
        y, h = ops.rms_norm(x, weight, residual=residual)
        return (y * 2 + h).sum()

    check_compiled(step, make_inputs((33, 48), torch.float32, "cpu", residual=True))


def test_saves_the_input_itself_and_rstd():
    x, weight = make_inputs((64, 32), torch.bfloat16, "cpu").values()
    assert saved_bytes(lambda: ops.rms_norm(x, weight), exclude=(x, weight)) == 64 * 4
    residual = random_tensor(64, 32, dtype=torch.bfloat16)
    h_bytes = 64 * 32 * 2
    assert (
        saved_bytes(lambda: ops.rms_norm(x, weight, residual=residual), exclude=(x, residual, weight))
        == 64 * 4 + h_bytes
    )


def test_a_second_backward_gives_the_same_gradient():
    x, weight = make_inputs((8, 16), torch.float32, "cpu").values()
    y = ops.rms_norm(x, weight)
    first, second = (torch.autograd.grad(y.sum(), (x, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_only_where_they_are_wanted():
    x, weight = make_inputs((8, 16), torch.float32, "cpu").values()
    ops.rms_norm(x.detach(), weight).sum().backward()
    assert weight.grad is not None
    ops.rms_norm(x, weight.detach()).sum().backward()
    assert x.grad is not None
    residual = random_tensor(8, 16, dtype=torch.float32)
    ops.rms_norm(x.detach(), weight, residual=residual)[1].sum().backward()
    assert torch.equal(residual.grad, torch.ones_like(residual))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 8, dtype=torch.int32)}, TypeError, "x: expected float32"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least one dimension"),
        ({"x": torch.zeros(4, 8).to_sparse()}, TypeError, "x: expected a dense tensor, got .* torch.sparse_coo"),
        ({"weight": torch.zeros(8).to_sparse()}, TypeError, "weight: expected a dense tensor"),
        ({"x": torch.nested.nested_tensor([torch.zeros(4, 8)])}, TypeError, "x: expected a dense tensor, got a nested"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight: expected shape \(8,\).*got \(7,\)"),
        ({"weight": torch.zeros(8, dtype=torch.float16)}, TypeError, "weight: expected torch.float32, as x, got"),
        (
            {"x": torch.zeros(4, 8, dtype=torch.bfloat16), "weight": torch.zeros(8, dtype=torch.float16)},
            TypeError,
            "weight: expected torch.bfloat16, as x, or float32, got torch.float16",
        ),
        ({"weight": torch.zeros(8, device="meta")}, ValueError, "weight: expected device cpu"),
        ({"residual": torch.zeros(3, 8)}, ValueError, r"residual: expected shape \(4, 8\)"),
        ({"residual": torch.zeros(4, 8, dtype=torch.bfloat16)}, TypeError, "residual: expected torch.float32"),
        ({"eps": None}, TypeError, "eps: expected a finite number from 0 up, got None"),
        ({"eps": -1.0}, ValueError, "eps: expected a finite number from 0 up, got -1.0"),
        ({"weight_offset": "1"}, TypeError, "weight_offset: expected a finite number, got '1'"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"x": torch.zeros(4, 8), "weight": torch.zeros(8)} | change
    with pytest.raises(error, match=message):
        ops.rms_norm(**arguments)


def test_module_has_torchs_state_dict_and_result():
    ours, theirs = nn.RMSNorm(32), torch.nn.RMSNorm(32, eps=1e-6)
    theirs.weight.data.normal_()
    ours.load_state_dict(theirs.state_dict())
    x = random_tensor(5, 32, dtype=torch.float32)
    torch.testing.assert_close(ours(x), theirs(x))
    for norm in (nn.RMSNorm, nn.LayerNorm):
        with pytest.raises(ValueError, match="eps: expected a finite number from 0 up, got -1"):
            norm(32, eps=-1)
    with pytest.raises(TypeError, match="weight_offset: expected a finite number, got '1'"):
        nn.RMSNorm(32, weight_offset="1")


@pytest.mark.parametrize(
    ("amd", "cuda_kernel", "bias", "dtype", "widest"),
    [
        (False, True, False, torch.float32, 8192),
        (False, True, True, torch.bfloat16, 8192),
        (False, False, False, torch.float32, 16384),
        (False, False, True, torch.float32, 8192),
        (False, False, True, torch.bfloat16, 16384),
        (True, False, False, torch.float32, 32768),
        (True, False, True, torch.bfloat16, 16384),
    ],
)
def test_widest_row_that_a_triton_program_holds_in_forward(monkeypatch, amd, cuda_kernel, bias, dtype, widest):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(torch.version, "hip", "6.4" if amd else None)
    monkeypatch.setattr(wide_norm, "has_kernel", lambda operator, x: cuda_kernel)

    def holds(size):
        x = torch.empty(1, size, device="meta", dtype=dtype)
        return wide_norm.holds_row_in_forward(x, x[0] if bias else None)

    assert holds(widest) and not holds(widest + 16)
    assert holds(widest // 2 - 1) and not holds(widest // 2 + 1)
