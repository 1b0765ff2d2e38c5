"""Row kernels past 2^31 elements: what lies there has to equal, bit for bit, the same rows by themselves.

Strided operands have such offsets without the memory; test_rotary.py and test_gated_hidden.py reach them so. What is
contiguous takes it: here Triton's interpreter runs the last program of a launch over memory of which the rest is never
touched, and `make test-slow` runs the native kernels over all of it.
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
from memkernels.testing import implementations

OPERATORS = torch.ops.memkernels
FAR = 3  # rows, or elements, past 2^31
NARROW, WIDE = 64, 8208
NATIVE = [
    implementation
    for implementation in implementations("rms_norm_fwd")
    if implementation.name in (f"cpu-{_library.cpu_isa()}", "gpu")
]


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
    + [(gated_activation, 2**31 + FAR, 1)],
    ids=["rms_norm", "rms_norm wide", "layer_norm", "layer_norm wide", "gated_activation"],
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
@pytest.mark.parametrize("op", [rms_norm, layer_norm, gated_activation])
@pytest.mark.parametrize("implementation", NATIVE, ids=str)
def test_offsets_of_native_kernels(implementation, op):
    """Inputs never written read as one page of zeros; the outputs of an operator, one at a time, take up to 9 GB."""
    with implementation.active() as device:
        check(op, 2**19 + FAR, 4096, torch.bfloat16, device)
