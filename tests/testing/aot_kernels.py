"""Kernels whose resources are known beforehand, printed as JSON, and sources of cases under changes.

`test_aot.py` runs this without TRITON_INTERPRET.
"""

import functools
import json
import sys
from dataclasses import asdict
from unittest import mock

import torch
import triton
import triton.language as tl

from memkernels.testing.aot import case_source, compile_case
from memkernels.testing.cases import TARGETS, KernelCase


@triton.jit
def copy_kernel(x_ptr, y_ptr, size, BLOCK_N: tl.constexpr):
    columns = tl.arange(0, BLOCK_N)
    tl.store(y_ptr + columns, tl.load(x_ptr + columns, mask=columns < size), mask=columns < size)


@triton.jit
def spilling_kernel(x_ptr, y_ptr, BLOCK_N: tl.constexpr):
    columns = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + columns)
    tl.store(y_ptr + columns, x * tl.sum(x))


@triton.jit
def dot_kernel(x_ptr, y_ptr, out_ptr, inner, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    m, k = tl.arange(0, 64), tl.arange(0, BLOCK)
    total = tl.zeros((64, 64), tl.float32)
    for first in range(0, inner, BLOCK):
        x = tl.load(x_ptr + m[:, None] * inner + first + k[None, :])
        y = tl.load(y_ptr + m[:, None] * inner + first + k[None, :])
        if x_ptr.dtype.element_ty == tl.int8:
            x, y = x.to(tl.float32), y.to(tl.float32)
        total = tl.dot(x, y.T, total, input_precision=PRECISION)
    tl.store(out_ptr + m[:, None] * 64 + m[None, :], total)


@triton.jit
def descriptor_kernel(x_ptr, y_ptr, rows, size):
    x = tl.make_tensor_descriptor(x_ptr, [rows, size], [size, 1], [64, 64])
    y = tl.make_tensor_descriptor(y_ptr, [rows, size], [size, 1], [64, 64])
    y.store([0, 0], x.load([0, 0]))


def copy(device):
    x = torch.empty(1000, device=device)
    copy_kernel[(1,)](x, x, 1000, BLOCK_N=1024)


def spill(device):
    x = torch.empty(1 << 15, device=device)
    spilling_kernel[(1,)](x, x, BLOCK_N=1 << 15, num_warps=1)


def dot(dtype, precision, device):
    x = torch.empty(64, 256, dtype=dtype, device=device)
    dot_kernel[(1,)](x, x, torch.empty(64, 64, device=device), 256, PRECISION=precision, BLOCK=32)


def dot_bfloat16(device):
    dot(torch.bfloat16, None, device)


def dot_tf32(device):
    dot(torch.float32, "tf32", device)


def dot_ieee(device):
    dot(torch.float32, "ieee", device)


def dot_widened_ieee(device):
    dot(torch.int8, "ieee", device)


def descriptor(device):
    x = torch.empty(64, 64, dtype=torch.bfloat16, device=device)
    descriptor_kernel[(1,)](x, x, 64, 64)


CASES = {
    copy: ["sm_80", "gfx942"],
    spill: ["sm_80", "sm_90", "gfx942"],
    dot_bfloat16: [target.name for target in TARGETS],
    dot_tf32: ["sm_80", "sm_90"],
    dot_ieee: ["sm_80", "sm_90"],
    dot_widened_ieee: ["sm_90", "sm_100"],
    descriptor: ["sm_90", "sm_100"],
}

FACTOR = tl.constexpr(2.0)


@triton.jit
def scaled(x):
    return x * FACTOR


@triton.jit
def scaled_otherwise(x):
    return FACTOR * x


@triton.jit
def calling_kernel(x_ptr, size, BLOCK_N: tl.constexpr):
    columns = tl.arange(0, BLOCK_N)
    tl.store(x_ptr + columns, scaled(tl.load(x_ptr + columns)), mask=columns < size)


def calling(block, device):
    x = torch.empty(1000, device=device)
    calling_kernel[(1,)](x, x.numel(), BLOCK_N=block)
    return (x,)


def sources():
    """Of a case as it is, and after one change each."""

    def source(block=1024, **changed):
        with mock.patch.dict(globals(), changed):
            return case_source(KernelCase("calling", functools.partial(calling, block)))

    return {
        "as it is": source(),
        "the constant": source(FACTOR=tl.constexpr(3.0)),
        "the callee": source(scaled=scaled_otherwise),
        "an argument": source(2048),
        "as it was": source(),
    }


if __name__ == "__main__":
    by_name = {target.name: target for target in TARGETS}
    resources = {
        launch.__name__: {
            name: [asdict(found) for found in compile_case(KernelCase(launch.__name__, launch), by_name[name]).values()]
            for name in names
        }
        for launch, names in CASES.items()
    }
    json.dump({"resources": resources, "sources": sources()}, sys.stdout)
