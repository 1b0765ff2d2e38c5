"""The configurations of rotary's Triton kernel that the checks without a GPU compile and count."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from memkernels.ops.rotary.triton import rotary_bwd, rotary_fwd
from memkernels.testing.cases import KernelCase


def _launch(
    rotate, dtype: torch.dtype, table_dtype: torch.dtype, size: int, width: int, interleaved: bool, device: str
) -> tuple[Tensor, ...]:
    q, k = (torch.ones(2, heads, 64, size, dtype=dtype, device=device).transpose(1, 2) for heads in (8, 2))
    cos, sin = (torch.ones(2, 64, width, dtype=table_dtype, device=device) for _ in range(2))
    return q, k, cos, sin, *rotate(q, k, cos, sin, interleaved)


KERNEL_CASES = [
    KernelCase(
        f"{rotate.__name__[-3:]} {str(dtype)[6:]} {width} of {size}{' interleaved' if interleaved else ''}",
        partial(_launch, rotate, dtype, table_dtype, size, width, interleaved),
    )
    for rotate in (rotary_fwd, rotary_bwd)
    for dtype, table_dtype, size, width, interleaved in (
        (torch.bfloat16, torch.bfloat16, 128, 128, False),
        (torch.bfloat16, torch.float32, 64, 64, False),
        (torch.bfloat16, torch.bfloat16, 128, 64, True),
        (torch.float16, torch.float16, 256, 256, False),
        (torch.float32, torch.float32, 96, 24, True),
    )
]
