"""The operators on GPUs: a row of 128 values is a block. The conversions are integer arithmetic, so that they
need no hardware for e4m3."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # blocks a program


@triton.jit
def _fp8_encode_kernel(values_ptr, codes_ptr, scales_ptr, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """n values to n codes and a scale for each 128: n (itemsize + 1 + 4 / 128) bytes moved."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    places = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.load(values_ptr + places, mask=places < n, other=0.0).to(tl.float32)
    raw = values.to(tl.int32, bitcast=True)
    infinite = (raw & 0x7FFFFFFF) == 0x7F800000
    largest = tl.max(tl.where(infinite, 0, raw & 0x7FFFFFFF), axis=1)
    known = largest < 0x7F800000  # none is NaN
    scale = tl.div_rn(tl.maximum(tl.where(known, largest.to(tl.float32, bitcast=True), 1.0), 1e-30), 448.0)
    scaled = tl.where(known[:, None] & (infinite == 0), values * tl.div_rn(1.0, scale)[:, None], 0.0)
    bits = scaled.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 20 bits of the mantissa go, to nearest even, and 120 of the exponent's bias; below 2^-6 codes are multiples of
    # 2^-9, as floats from 16384 on are.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    codes = tl.where(infinite, 0x7F, tl.where(magnitude < 0x3C800000, small, normal)) | ((raw >> 24) & 0x80)
    tl.store(codes_ptr + places, codes.to(tl.uint8), mask=places < n)
    tl.store(scales_ptr + rows, tl.where(known, scale, float("nan")), mask=rows * BLOCK < n)


@triton.jit
def _fp8_decode_kernel(codes_ptr, scales_ptr, values_ptr, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse: as many bytes."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    places = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    codes = tl.load(codes_ptr + places, mask=places < n, other=0).to(tl.int32)
    scale = tl.load(scales_ptr + rows, mask=rows * BLOCK < n, other=0.0)
    magnitude = codes & 0x7F
    normal = ((magnitude + 960) << 20).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 0x7F, float("inf"), value)
    value = tl.where((codes & 0x80) != 0, -value, value) * scale[:, None]
    tl.store(values_ptr + places, value.to(values_ptr.dtype.element_ty), mask=places < n)


def fp8_encode_(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    n = values.numel()
    if n:
        _fp8_encode_kernel[_grid(n)](values, codes, scales, n, ROWS=ROWS, BLOCK=128)


def fp8_decode_(codes: Tensor, scales: Tensor, values: Tensor) -> None:
    n = values.numel()
    if n:
        _fp8_decode_kernel[_grid(n)](codes, scales, values, n, ROWS=ROWS, BLOCK=128)


def _grid(n: int) -> tuple[int]:
    return (triton.cdiv(n, ROWS * 128),)
