"""The configurations of the noise's Triton kernel that the checks without a GPU compile and count."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from memkernels.ops.router_logits.triton import row_noise
from memkernels.testing.cases import KernelCase


def _noise(dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    x = torch.ones(512, 256, dtype=dtype, device=device)
    return x, row_noise(x, torch.zeros((), dtype=torch.int64, device=device), 1e-2, 0)


KERNEL_CASES = [
    KernelCase(f"row noise {str(dtype)[6:]}", partial(_noise, dtype)) for dtype in (torch.float32, torch.bfloat16)
]
