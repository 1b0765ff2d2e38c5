"""The configurations of the fp8 blocks' Triton kernels that the checks without a GPU compile and count."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from memkernels.ops.fp8_blocks.triton import fp8_decode_, fp8_encode_
from memkernels.testing.cases import KernelCase

_SIZE = 1 << 14


def _tensors(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.zeros(_SIZE, dtype=torch.uint8, device=device)
    return torch.ones(_SIZE, dtype=dtype, device=device), codes, torch.ones(_SIZE // 128, device=device)


def _encode(dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    values, codes, scales = _tensors(dtype, device)
    fp8_encode_(values, codes, scales)
    return values, codes, scales


def _decode(dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    values, codes, scales = _tensors(dtype, device)
    fp8_decode_(codes, scales, values)
    return values, codes, scales


KERNEL_CASES = [
    KernelCase(f"{launch.__name__[1:]} {str(dtype)[6:]}", partial(launch, dtype), traffic_limit=1.0)
    for launch in (_encode, _decode)
    for dtype in (torch.float32, torch.bfloat16)
]
