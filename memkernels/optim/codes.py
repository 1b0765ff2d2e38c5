"""Moments in few bits, in plain PyTorch: the specification, and what converts states between widths.

A moment x is stored by blocks of 256 elements (8 bits) or 128 (4 bits), counted from the first of its parameter: codes
of x / absmax, one absmax (float32) a block. In four bits two neighbours share a byte, the first in its high half.

Dynamic codes (Dettmers et al. 2021, arXiv 2110.02861, section 2.2) have the magnitudes 0, 1 and, in each of D decades
[10^(i - D), 10^(i - D + 1)], i = 0 ... D - 1, the centres of P equal cells:

    10^(i - D + 1) (2 P + 9 (2 j + 1)) / (20 P)     j = 0 ... P - 1

8 bits: D = 7, P = 2^i with signs and 2^(i + 1) without. 4 bits with signs: D = 3, P = 2^i. A code is the index of its
value among the ascending ones (1 has no negative counterpart).

In four bits a moment without signs has the values 1/16, 2/16, ..., 1 instead (Li et al. 2023, arXiv 2309.01507): a zero
would leave eps alone under m. In 8 bits, for the same reason, such a moment is stored as zero only if it is zero. Their
rank-1 normalisation needs the maxima of whole rows and columns, which a shard does not have: here all is by blocks.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from memkernels.quant.reference import LEAST_ABSMAX

STATE_BITS = (32, 16, 8, 4)
BLOCK_SIZE = {8: 256, 4: 128}


@functools.cache
def code_book(bits: int, signed: bool) -> Tensor:
    """The values of the codes, ascending, float32."""
    if bits == 4 and not signed:
        return torch.arange(1, 17) / 16
    decades = 7 if bits == 8 else 3
    magnitudes = [torch.zeros(1)]
    for i in range(decades):
        cells = 2 ** (i if signed else i + 1)
        centres = 2 * cells + 9 * (2 * torch.arange(cells, dtype=torch.float32) + 1)
        magnitudes.append(centres * torch.tensor(10.0 ** (i - decades + 1) / (20 * cells), dtype=torch.float32))
    negative = [-part.flip(0) for part in reversed(magnitudes[1:])] if signed else []
    return torch.cat([*negative, *magnitudes, torch.ones(1)])


def new_moment(parameter: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """A moment of zeros, and its absolute maxima where it has codes."""
    if bits >= 16:
        dtype = torch.float32 if bits == 32 else torch.bfloat16
        return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device), None
    size = parameter.numel()
    codes = parameter.new_zeros(size if bits == 8 else -(-size // 2), dtype=torch.uint8)
    return codes, parameter.new_zeros(-(-size // BLOCK_SIZE[bits]), dtype=torch.float32)


def decode(stored: Tensor, absmax: Tensor | None, bits: int, signed: bool, shape: torch.Size) -> Tensor:
    """A moment's values, float32."""
    if absmax is None:
        return stored.float()
    size = shape.numel()
    codes = stored if bits == 8 else torch.stack([stored >> 4, stored & 15], dim=1).view(-1)[:size]
    values = code_book(bits, signed).to(stored.device)[codes.int()]
    return (values * absmax.repeat_interleave(BLOCK_SIZE[bits])[:size]).view(shape)


def encode(values: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor | None]:
    """`values`, float32, as a moment of 32, 8 or 4 bits, or in bfloat16, rounded to nearest."""
    if bits >= 16:
        return values.to(torch.float32 if bits == 32 else torch.bfloat16), None
    size, block = values.numel(), BLOCK_SIZE[bits]
    blocks = torch.nn.functional.pad(values.reshape(-1), (0, -size % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=LEAST_ABSMAX))[:, None]).view(-1)[:size]
    book = code_book(bits, signed).to(values.device)
    codes = torch.bucketize(scaled, (book[:-1] + book[1:]) / 2, out_int32=True)
    if not signed and bits == 8:
        codes = torch.where(scaled > 0, codes.clamp(min=1), codes)
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes, absmax
    if size % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[::2] << 4) | codes[1::2], absmax
