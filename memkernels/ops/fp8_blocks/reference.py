"""Values in blocks of 128 as 8-bit floats (e4m3) of one float32 scale a block: the specification, in plain PyTorch.

    scale = max(absmax, 1e-30) / 448        code = e4m3(x / scale), to nearest        x' = code scale

    |x' - x| <= max(|x| / 16, absmax / 458752) for absmax from 1e-30 on, and then rounding to x's dtype

Infinities have the code of e4m3's NaN with their sign, and absmax is that of the others; a block that holds a NaN comes
back as NaN. codes: (n,) uint8; scales: (ceil(n / 128),) float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
LARGEST = 448.0
LEAST_ABSMAX = 1e-30
INFINITY = 0x7F


def fp8_encode_(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Fills codes and scales; values: (n,), floating."""
    padded = torch.nn.functional.pad(values.float(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    infinite = padded.isinf()
    bounded = torch.where(infinite, 0, padded)
    absmax = bounded.abs().amax(1)
    known = ~absmax.isnan()
    scale = absmax.clamp(min=LEAST_ABSMAX) / LARGEST
    scaled = torch.where(known[:, None], bounded * (1 / scale)[:, None], 0)
    of_infinities = torch.where(padded < 0, INFINITY | 0x80, INFINITY).to(torch.uint8)
    of_all = torch.where(infinite, of_infinities, scaled.to(torch.float8_e4m3fn).view(torch.uint8))
    codes.copy_(of_all.view(-1)[: values.numel()])
    scales.copy_(torch.where(known, scale, torch.nan))


def fp8_decode_(codes: Tensor, scales: Tensor, values: Tensor) -> None:
    """Fills values."""
    of_elements = scales.repeat_interleave(BLOCK)[: values.numel()]
    of_infinities = torch.where(codes < 0x80, torch.inf, -torch.inf)
    decoded = torch.where(codes & 0x7F == INFINITY, of_infinities, codes.view(torch.float8_e4m3fn).float())
    values.copy_(decoded * of_elements)
