"""The configurations of RMS norm's Triton kernels that the checks without a GPU compile and count."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from memkernels.ops.rms_norm.triton import rms_norm_bwd, rms_norm_fwd
from memkernels.testing.cases import KernelCase

ROWS = 256


def _forward(dtype: torch.dtype, size: int, with_residual: bool, device: str) -> tuple[Tensor, ...]:
    x, weight = torch.ones(ROWS, size, dtype=dtype, device=device), torch.ones(size, dtype=dtype, device=device)
    if not with_residual:
        y, _, rstd = rms_norm_fwd(x, None, weight, 1e-6, 0.0)
        return x, weight, y, rstd
    residual = torch.ones_like(x)
    return x, residual, weight, *rms_norm_fwd(x, residual, weight, 1e-6, 0.0)


def _backward(dtype: torch.dtype, size: int, with_residual: bool, device: str) -> tuple[Tensor, ...]:
    dy, h, weight = (torch.ones(*shape, dtype=dtype, device=device) for shape in ((ROWS, size), (ROWS, size), (size,)))
    dresidual_out = torch.ones_like(dy) if with_residual else None
    rstd = torch.ones(ROWS, device=device)
    outputs = rms_norm_bwd(dy, dresidual_out, h, weight, rstd, 0.0, True)
    return dy, h, weight, rstd, *outputs, *([dresidual_out] if dresidual_out is not None else [])


KERNEL_CASES = [
    KernelCase(
        f"{launch.__name__[1:]} {str(dtype)[6:]} {size}{' residual' if with_residual else ''}",
        partial(launch, dtype, size, with_residual),
    )
    for launch in (_forward, _backward)
    for dtype, size, with_residual in (
        (torch.bfloat16, 128, False),
        (torch.bfloat16, 4096, False),
        (torch.bfloat16, 4096, True),
        (torch.float16, 8192, True),
        (torch.float32, 5000, True),
    )
]
