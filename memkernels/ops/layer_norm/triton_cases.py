"""The configurations of layer norm's Triton kernels that the checks without a GPU compile and count."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from memkernels.ops.layer_norm.triton import layer_norm_bwd, layer_norm_fwd
from memkernels.testing.cases import AMD, NVIDIA, TARGETS, KernelCase


def _rows(held: bool) -> int:
    """So many that what is read once a program is small beside them."""
    return 256 if held else 128


def _forward(
    dtype: torch.dtype, size: int, with_bias: bool, with_residual: bool, held: bool, device: str
) -> tuple[Tensor, ...]:
    x, weight = torch.ones(_rows(held), size, dtype=dtype, device=device), torch.ones(size, dtype=dtype, device=device)
    bias = torch.ones_like(weight) if with_bias else None
    residual = torch.ones_like(x) if with_residual else None
    outputs = layer_norm_fwd(x, residual, weight, bias, 1e-5, held=held)
    return x, weight, *(tensor for tensor in (bias, residual) if tensor is not None), *outputs


def _backward(
    dtype: torch.dtype, size: int, with_bias: bool, with_residual: bool, held: bool, device: str
) -> tuple[Tensor, ...]:
    rows = _rows(held)
    dy, h, weight = (torch.ones(*shape, dtype=dtype, device=device) for shape in ((rows, size), (rows, size), (size,)))
    dresidual_out = torch.ones_like(dy) if with_residual else None
    mean, rstd = (torch.ones(rows, device=device) for _ in range(2))
    outputs = layer_norm_bwd(dy, dresidual_out, h, weight, mean, rstd, True, with_bias, held=held)
    return dy, h, weight, mean, rstd, *outputs, *([dresidual_out] if dresidual_out is not None else [])


HELD = (
    (torch.bfloat16, 128, True, False),
    (torch.bfloat16, 4096, False, True),
    (torch.bfloat16, 4096, True, False),
    (torch.float16, 8192, True, True),
    (torch.float32, 1000, True, True),
    (torch.float32, 8192, True, True),
    (torch.float32, 4095, True, True),
)
# Where a warp has 64 lanes; NVIDIA's have CUDA C++ for these.
HELD_BY_AMD = (
    (torch.float32, 5000, True, True),
    (torch.bfloat16, 16384, True, True),
    (torch.float32, 16384, True, True),
)
# The widest, without bias; on NVIDIA's where there is no CUDA C++.
HELD_IN_FORWARD = (
    (torch.float32, 5001, False, True),
    (torch.bfloat16, 16384, False, True),
    (torch.float32, 16384, False, True),
)
# Beside a bias, in 16 bits.
HELD_IN_FORWARD_BY_NVIDIA = (
    (torch.bfloat16, 8191, True, True),
    (torch.float16, 16384, True, True),
)
HELD_IN_FORWARD_BY_AMD = (
    (torch.float32, 10001, False, True),
    (torch.bfloat16, 32768, False, True),
    (torch.float32, 32768, False, True),
)
# Where there is no CUDA C++, and rows that no team of its blocks holds.
WIDE = ((torch.float32, 5001, True, True), (torch.bfloat16, 20000, True, False))
KERNEL_CASES = [
    KernelCase(
        f"{launch.__name__[1:]} {str(dtype)[6:]} {size}{' bias' if with_bias else ''}"
        f"{' residual' if with_residual else ''}",
        partial(launch, dtype, size, with_bias, with_residual, held),
        # A row that no program holds is read twice; weight and bias once for four rows.
        traffic_limit=1.05 if held else 1.8,
        targets=targets,
    )
    for launch, cases, held, targets in (
        (_forward, HELD, True, TARGETS),
        (_forward, HELD_BY_AMD, True, AMD),
        (_forward, HELD_IN_FORWARD, True, TARGETS),
        (_forward, HELD_IN_FORWARD_BY_NVIDIA, True, NVIDIA),
        (_forward, HELD_IN_FORWARD_BY_AMD, True, AMD),
        (_forward, WIDE, False, TARGETS),
        (_backward, HELD, True, TARGETS),
        (_backward, HELD_BY_AMD, True, AMD),
        (_backward, WIDE, False, TARGETS),
    )
    for dtype, size, with_bias, with_residual in cases
]
