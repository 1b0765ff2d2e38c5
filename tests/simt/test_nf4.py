"""NF4's kernels in CUDA C++ as operators, on CPU tensors: the bits of the native CPU kernels and of bitsandbytes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memkernels import quant
from memkernels.ops import matmul
from memkernels.quant import operators, reference
from memkernels.testing import poisoned_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.xdist_group("simt_operators")  # one library, compiled once
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dtypes
@pytest.mark.parametrize(
    ("size", "block_size"), [(4096, 64), (10003, 128), (33, 32), (12289, 4096), (1, 64), (2100, 1024)]
)
def test_codes_and_absmax_are_those_of_bitsandbytes(simt, dtype, size, block_size):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    values = normal(size, dtype=dtype)
    values[: min(size, block_size)] = 0
    packed, state = bitsandbytes.functional.quantize_4bit(values, blocksize=block_size, quant_type="nf4")
    with poisoned_memory():
        ours = simt.nf4_quantize(values, block_size)
        out = torch.empty(1, size, dtype=dtype)
    simt.nf4_dequantize_(out, *ours, None, None, None, block_size, size, 0, 0)
    assert torch.equal(ours[0], packed.view(-1)) and torch.equal(ours[1], state.absmax)
    assert torch.equal(out.view(-1), bitsandbytes.functional.dequantize_4bit(packed, state).view(-1))


@dtypes
@pytest.mark.parametrize("block_size", [32, 96, 160, 512, 1056, 4096])
def test_quantises_as_the_cpu_kernels_do(simt, dtype, block_size):
    values = normal(5 * block_size + 37, dtype=dtype)[3:]  # from an odd address on
    for ours, theirs in zip(
        simt.nf4_quantize(values, block_size), operators.nf4_quantize(values, block_size), strict=True
    ):
        assert torch.equal(ours, theirs)


@dtypes
@pytest.mark.parametrize("nested", [False, True])
def test_a_linear_layer_has_the_same_bits(calls, dtype, nested):
    values, x = normal(96, 160, dtype=dtype), normal(7, 160, dtype=dtype, seed=1).requires_grad_()
    weight = quant.quantize_nf4(values, double_quant=nested)
    y = F.linear(x, weight)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert set(calls) == {"nf4_quantize", "nf4_dequantize_"}
    dense = torch.empty(96, 160, dtype=dtype)
    reference.nf4_dequantize_(dense, *weight.parts, *[None] * (5 - len(weight.parts)), 64, 160, 0, 0)
    expected = matmul.linear(x.detach(), dense)
    assert torch.equal(y, expected) and torch.equal(dx, matmul.mm(2 * expected, dense))


@dtypes
@pytest.mark.parametrize(("first_row", "first_column"), [(0, 0), (2, 8), (1, 3), (4, 75)])
@pytest.mark.parametrize("row_size", [76, 160])
def test_rectangles_of_a_wider_tensor(simt, dtype, first_row, first_column, row_size):
    parts = quant.quantize_nf4(normal(6, row_size, dtype=dtype), 32).parts
    wide = torch.full((6 - first_row, row_size + 5), 7.0, dtype=dtype)
    expected = wide.clone()
    columns = slice(2, 2 + row_size - first_column)
    for op, into in ((simt, wide), (torch.ops.memkernels, expected)):
        op.nf4_dequantize_(into[:, columns], *parts, 32, row_size, first_row, first_column)
    assert torch.equal(wide, expected)


def test_bad_arguments_are_named(simt):
    parts = quant.quantize_nf4(normal(8, 64)).parts
    out = torch.empty(8, 64)
    with pytest.raises(RuntimeError, match="block_size: expected a multiple of 32 up to 4096, got 48"):
        simt.nf4_quantize(normal(64), 48)
    with pytest.raises(RuntimeError, match="expected float32, bfloat16 or float16"):
        simt.nf4_quantize(normal(64).double(), 64)
    with pytest.raises(RuntimeError, match="outside of what packed and absmax hold"):
        simt.nf4_dequantize_(out, *parts, 64, 64, 1, 0)
    with pytest.raises(RuntimeError, match="out: expected contiguous rows"):
        simt.nf4_dequantize_(torch.empty(64, 8).t(), *parts, 64, 64, 0, 0)
    with pytest.raises(RuntimeError, match=r"nested_code: expected shape \(256\), got \(255\)"):
        simt.nf4_dequantize_(out, *parts[:3], torch.zeros(255), parts[4], 64, 64, 0, 0)
