"""The configurations of RMS norm's Triton kernels that the checks without a GPU compile and count."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from memkernels.ops.rms_norm.triton import rms_norm_bwd, rms_norm_fwd
from memkernels.testing.cases import AMD, TARGETS, KernelCase


def _rows(held: bool) -> int:
    """So many that what is read once a program is small beside them."""
    return 256 if held else 128


def _forward(dtype: torch.dtype, size: int, with_residual: bool, held: bool, device: str) -> tuple[Tensor, ...]:
    x, weight = torch.ones(_rows(held), size, dtype=dtype, device=device), torch.ones(size, dtype=dtype, device=device)
    if not with_residual:
        y, _, rstd = rms_norm_fwd(x, None, weight, 1e-6, 0.0, held=held)
        return x, weight, y, rstd
    residual = torch.ones_like(x)
    return x, residual, weight, *rms_norm_fwd(x, residual, weight, 1e-6, 0.0, held=held)


def _backward(dtype: torch.dtype, size: int, with_residual: bool, held: bool, device: str) -> tuple[Tensor, ...]:
    rows = _rows(held)
    dy, h, weight = (torch.ones(*shape, dtype=dtype, device=device) for shape in ((rows, size), (rows, size), (size,)))
    dresidual_out = torch.ones_like(dy) if with_residual else None
    rstd = torch.ones(rows, device=device)
    outputs = rms_norm_bwd(dy, dresidual_out, h, weight, rstd, 0.0, True, held=held)
    return dy, h, weight, rstd, *outputs, *([dresidual_out] if dresidual_out is not None else [])


HELD = (
    (torch.bfloat16, 128, False),
    (torch.bfloat16, 4096, False),
    (torch.bfloat16, 4096, True),
    (torch.float16, 8192, True),
    (torch.float32, 8192, True),
    (torch.float32, 4095, True),
)
# In backward, where a warp has 64 lanes; NVIDIA's have CUDA C++ for these.
HELD_BY_AMD = (
    (torch.float32, 5000, True),
    (torch.bfloat16, 16384, True),
    (torch.float32, 16384, True),
)
# The widest, on NVIDIA's where there is no CUDA C++.
HELD_IN_FORWARD = (
    (torch.float32, 5001, True),
    (torch.bfloat16, 16384, True),
    (torch.float32, 16384, True),
)
HELD_IN_FORWARD_BY_AMD = (
    (torch.float32, 10001, True),
    (torch.bfloat16, 32768, True),
    (torch.float32, 32768, True),
)
# Where there is no CUDA C++, and rows that no team of its blocks holds.
WIDE_FORWARD = ((torch.float32, 17001, True), (torch.bfloat16, 40000, False))
WIDE_BACKWARD = ((torch.float32, 5001, True), (torch.bfloat16, 20000, False))
KERNEL_CASES = [
    KernelCase(
        f"{launch.__name__[1:]} {str(dtype)[6:]} {size}{' residual' if with_residual else ''}",
        partial(launch, dtype, size, with_residual, held),
        # A row that no program holds is read twice; its weight once for four rows.
        traffic_limit=1.05 if held else 1.8,
        targets=targets,
    )
    for launch, cases, held, targets in (
        (_forward, HELD, True, TARGETS),
        (_forward, HELD_IN_FORWARD, True, TARGETS),
        (_forward, HELD_IN_FORWARD_BY_AMD, True, AMD),
        (_forward, WIDE_FORWARD, False, TARGETS),
        (_backward, HELD, True, TARGETS),
        (_backward, HELD_BY_AMD, True, AMD),
        (_backward, WIDE_BACKWARD, False, TARGETS),
    )
    for dtype, size, with_residual in cases
]
