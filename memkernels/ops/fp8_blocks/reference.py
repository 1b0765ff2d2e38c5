"""Values in blocks of 128 as 8-bit floats (e4m3) of one float32 scale a block: the specification, in plain PyTorch.

    scale = max(absmax, 1e-30) / 448        code = e4m3(x / scale), to nearest        x' = code scale

    |x' - x| <= max(|x| / 16, absmax / 458752) for absmax from 1e-30 on, and then rounding to x's dtype

A block that holds an infinity or a NaN comes back as NaN. codes: (n,) uint8; scales: (ceil(n / 128),) float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
LARGEST = 448.0
LEAST_ABSMAX = 1e-30


def fp8_encode_(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Fills codes and scales; values: (n,), floating."""
    padded = torch.nn.functional.pad(values.float(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    absmax = padded.abs().amax(1)
    finite = absmax <= torch.finfo(torch.float32).max
    scale = absmax.clamp(min=LEAST_ABSMAX) / LARGEST
    scaled = torch.where(finite[:, None], padded * (1 / scale)[:, None], 0)
    codes.copy_(scaled.to(torch.float8_e4m3fn).view(torch.uint8).view(-1)[: values.numel()])
    scales.copy_(torch.where(finite, scale, torch.nan))


def fp8_decode_(codes: Tensor, scales: Tensor, values: Tensor) -> None:
    """Fills values."""
    of_elements = scales.repeat_interleave(BLOCK)[: values.numel()]
    values.copy_(codes.view(torch.float8_e4m3fn).float() * of_elements)
