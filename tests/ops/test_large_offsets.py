"""Row kernels past 2^31 elements: what lies there has to equal, bit for bit, the same rows by themselves.

Strided operands have such offsets without the memory; test_rotary.py, test_gated_hidden.py and test_attention.py reach
them so. What is contiguous takes it: here Triton's interpreter runs the last program of a launch over memory of which
the rest is never touched, and `make test-slow` runs the native kernels over all of it.
"""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from last_programs import last_programs_only

from memkernels import _library
from memkernels.ops import wide_norm_triton
from memkernels.ops.layer_norm import triton as layer_norm_triton
from memkernels.ops.rms_norm import triton as rms_norm_triton
from memkernels.quant.nf4 import NF4Encoding
from memkernels.testing import implementations

OPERATORS = torch.ops.memkernels
FAR = 3  # rows, or elements, past 2^31
NARROW, WIDE = 64, 16400
one_at_a_time = pytest.mark.xdist_group("large_offsets")  # two would take 18 GB


def native(operator):
    names = f"cpu-{_library.cpu_isa()}", "gpu"
    return [implementation for implementation in implementations(operator) if implementation.name in names]


def rms_norm(x, residual, dy, dh, weight, statistics):
    forward = OPERATORS.rms_norm_fwd(x, residual, weight, 1e-6, 0.0)
    yield from zip(("y", "residual_out", "rstd"), forward, strict=True)
    del forward
    yield "dx", OPERATORS.rms_norm_bwd(dy, dh, x, weight, statistics, 0.0, False)[0]


def layer_norm(x, residual, dy, dh, weight, statistics):
    forward = OPERATORS.layer_norm_fwd(x, residual, weight, weight, 1e-5)
    yield from zip(("y", "residual_out", "mean", "rstd"), forward, strict=True)
    del forward
    yield "dx", OPERATORS.layer_norm_bwd(dy, dh, x, weight, statistics, statistics, False, False)[0]


def gated_activation(gate, up, dh, *_):
    yield "h", OPERATORS.gated_activation_fwd(gate, up, "silu")
    yield from zip(("dgate", "dup"), OPERATORS.gated_activation_bwd(dh, gate, up, "silu"), strict=True)


def attention(q, k, v, dout, _, lse):
    """Sequences of FAR rows, with one head."""
    q, k, v, dout = (x.reshape(-1, FAR, 1, x.shape[-1]) for x in (q, k, v, dout))
    masks = (None, None, None, None, None, FAR, FAR, 0.25, -1, 0, 0.0, 0.0)
    out, lse_out = OPERATORS.attention_fwd(q, k, v, *masks)
    yield "out", out.flatten(0, 2)
    yield "lse", lse_out.flatten()
    lse = lse.view(lse_out.shape)
    gradients = OPERATORS.attention_bwd(dout, None, q, k, v, out, lse, *masks, True)[:3]
    yield from ((name, gradient.flatten(0, 2)) for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True))


def check(op, rows, size, dtype, device, far=nullcontext):
    """Of the inputs the last rows alone are written; within `far` the op runs over the whole."""
    generator = torch.Generator(device).manual_seed(0)
    values = [torch.randn(FAR, size, generator=generator, dtype=dtype, device=device) for _ in range(4)]
    weight = torch.randn(size, generator=generator, dtype=dtype, device=device)
    statistics = torch.rand(FAR, generator=generator, device=device) + 0.5
    whole = []
    for value in (*values, statistics):
        whole.append(torch.empty(rows, *value.shape[1:], dtype=value.dtype, device=device))
        whole[-1][-FAR:] = value
    near = dict(op(*values, weight, statistics))
    with far():
        for name, output in op(*whole[:4], weight, whole[4]):
            assert torch.equal(output[-FAR:], near[name]), name
            del output  # the next operator's results would come beside it


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves, in make test-slow")
@pytest.mark.parametrize(
    ("op", "rows", "size"),
    [(norm, triton.cdiv(2**31, size) + FAR, size) for norm in (rms_norm, layer_norm) for size in (NARROW, WIDE)]
    + [(gated_activation, 2**31 + FAR, 1), (attention, FAR * (triton.cdiv(2**31, FAR * NARROW) + 1), NARROW)],
    ids=["rms_norm", "rms_norm wide", "layer_norm", "layer_norm wide", "gated_activation", "attention"],
)
def test_offsets_of_triton_kernels(monkeypatch, op, rows, size):
    # Programs enough that one walks no further than its first rows, as GPUs of so many multiprocessors would have.
    for module in (rms_norm_triton, layer_norm_triton, wide_norm_triton):
        monkeypatch.setattr(module, "num_programs", lambda x, rows, per_program: triton.cdiv(rows, per_program))
    monkeypatch.setattr(wide_norm_triton, "MAX_SHARES", 2**31)
    interpreter = implementations("rms_norm_fwd")[-1]
    assert interpreter.name == "triton-interpreter"
    with interpreter.active() as device:
        check(op, rows, size, torch.float16, device, last_programs_only)


@pytest.mark.slow
@one_at_a_time
@pytest.mark.parametrize("op", [rms_norm, layer_norm, gated_activation])
@pytest.mark.parametrize("implementation", native("rms_norm_fwd"), ids=str)
def test_offsets_of_native_kernels(implementation, op):
    """Inputs never written read as one page of zeros; the outputs of an operator, one at a time, take up to 9 GB."""
    with implementation.active() as device:
        check(op, 2**19 + FAR, 4096, torch.bfloat16, device)


# --- mixture of experts ---


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def dispatch(x, grouped, weights, rows, offsets):
    yield "x_grouped", OPERATORS.moe_dispatch(x, weights, rows, offsets, len(grouped))[-FAR:]


def combine(x, grouped, weights, rows, offsets):
    yield "y", OPERATORS.moe_combine(grouped, weights, rows)[-FAR:]


def combine_bwd(x, grouped, weights, rows, offsets):
    dy_grouped, dweights = OPERATORS.moe_combine_bwd(x, grouped, weights, rows, offsets)
    yield from (("dy_grouped", dy_grouped[-FAR:]), ("dweights", dweights[-FAR:]))


@one_at_a_time
@pytest.mark.parametrize("op", [dispatch, pytest.param(combine, marks=pytest.mark.slow), combine_bwd])
@pytest.mark.parametrize("implementation", native("moe_dispatch"), ids=str)
def test_offsets_of_dispatch_and_combine(implementation, op):
    """The last tokens alone have rows, the last ones, so that but `combine` touches no others, which are 4 GB each."""
    count, size = 2**19 + FAR, 4096
    with implementation.active() as device:
        x, grouped = torch.randn(2, FAR, size, device=device).bfloat16()
        near = x, grouped, torch.rand(FAR, 1, device=device)
        rows = int32([2], [0], [1]).to(device)
        expected = dict(op(*near, rows, int32(0, FAR).to(device)))
        far = [torch.empty(count, *tensor.shape[1:], dtype=tensor.dtype, device=device) for tensor in near]
        for whole, last in zip(far, near, strict=True):
            whole[-FAR:] = last
        far_rows = int32([-1]).to(device).repeat(count, 1)
        far_rows[-FAR:] = rows + count - FAR
        for name, output in op(*far, far_rows, int32(0, count).to(device)):
            assert torch.equal(output, expected[name]), name


def grouped_product(x, weights, y, offsets):
    return [OPERATORS.grouped_product(x, None, weights, offsets, len(x), "triton")]


def grouped_product_add(x, weights, y, offsets):
    OPERATORS.grouped_product_add_(y, x, weights, offsets, "triton")
    return [y]


def expert_activation(x, weights, y, offsets):
    row_weight = torch.empty(len(x))
    row_weight[-1] = 0.5
    return [
        OPERATORS.expert_activation_fwd(x, row_weight, False, "silu"),
        *OPERATORS.expert_activation_bwd(y, x, row_weight, False, "silu"),
        y,
    ]


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="of a launch only the interpreter can run the end")
triton_products = implementations("grouped_product")[0]


@interpreted
@pytest.mark.parametrize("op", [grouped_product, grouped_product_add, expert_activation])
def test_offsets_of_the_experts_rows(op):
    """One row past a multiple of the tile's: the last tile has the last row, and no later one has none."""
    generator, size = torch.Generator().manual_seed(0), 32
    x, y, weights = (torch.randn(rows, size, generator=generator).half() for rows in (1, 1, size))
    count = 2**31 // size + 1
    far_x, far_y = (torch.empty(count, size, dtype=torch.float16) for _ in range(2))
    far_x[-1], far_y[-1] = x[0], y[0]
    with triton_products.active():
        near = op(x, weights[None], y, int32(0, 1))
        with last_programs_only():
            for output, expected in zip(op(far_x, weights[None], far_y, int32(0, count)), near, strict=True):
                assert torch.equal(output[-1:], expected)


@interpreted
def test_offsets_of_the_experts_gradients():
    dy, x = torch.randn(1, 16).half(), torch.randn(1, 32).half()
    offsets = torch.zeros(2**31 // (16 * 32) + 2, dtype=torch.int32)
    offsets[-1] = 1
    with triton_products.active():
        near = OPERATORS.grouped_weight_grad(dy, None, x, None, offsets[-2:], "triton")
        with last_programs_only():
            far = OPERATORS.grouped_weight_grad(dy, None, x, None, offsets, "triton")
    assert torch.equal(far[-1:], near)


@interpreted
def test_offsets_of_quantised_experts():
    """Each of three experts has a row; the last tile is of the last 32 rows of the last expert."""
    experts, size, last, tile = 3, 64, 64, 32
    rows = triton.cdiv(2**31, experts * size * last) * last
    x = torch.randn(1, size).half()
    packed, absmax = torch.randint(256, (last * size // 2,), dtype=torch.uint8), torch.rand(last)
    far = [torch.empty(experts * rows * size // 2, dtype=torch.uint8), torch.empty(experts * rows)]
    far[0][-len(packed) :], far[1][-last:] = packed, absmax

    def product(parts, rows, offsets):
        sizes = NF4Encoding((rows, size), torch.float16, size, False).sizes
        x_rows = x.expand(len(offsets) - 1, size)
        return OPERATORS.grouped_quantized_product(
            x_rows, None, parts, "nf4", sizes, offsets, len(x_rows), True, "triton"
        )

    with triton_products.active():
        near = product([packed, absmax], last, int32(0, 1))
        with last_programs_only():
            y = product(far, experts * rows, int32(*range(experts + 1)))
    assert torch.equal(y[-1:, -tile:], near[:, -tile:])
