"""NF4 and row-wise int8 in plain PyTorch: the specification.

NF4: Dettmers et al. 2023, arXiv 2305.14314, appendix E; the 8-bit code of the blocks' absolute maxima: Dettmers et al.
2021, arXiv 2110.02861, section 2.2. Both as bitsandbytes computes and stores them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Quantiles of the normal distribution, scaled to [-1, 1]; the first eight have probability 1/16 each, as the last.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NESTED_BLOCK = 256
# Absolute maxima below this count as this when they divide: the reciprocal stays finite.
LEAST_ABSMAX = 1e-38


def nested_code() -> Tensor:
    """The 256 values of the 8-bit code of absolute maxima, ascending, float32: sign, decimal exponent and fraction.

    Of the seven bits beside the sign, the exponent 10^-e takes e and a stop bit, and a linear fraction in [0.1, 1] the
    rest; 0 and 1 fill the two codes that are left.
    """
    values = [torch.tensor([0.0, 1.0])]
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1, dtype=torch.float32)
        magnitudes = 10 ** (bits - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [magnitudes, -magnitudes]
    return torch.cat(values).sort().values


def quantize_blocks(values: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes (n,) of the values nearest to each element over its block's absmax, ties to the lower; absmax, (blocks,).

    The last block, if incomplete, is divided by its absmax where the others are multiplied by its reciprocal, and has
    an absmax of at least LEAST_ABSMAX.
    """
    values = values.reshape(-1).float()
    n = values.numel()
    whole = values[: n - n % block_size].view(-1, block_size)
    absmax = whole.abs().amax(1) if n >= block_size else values.new_empty(0)
    scaled = (whole * (1.0 / absmax.clamp(min=LEAST_ABSMAX))[:, None]).view(-1)
    if n % block_size:
        rest = values[whole.numel() :]
        largest = rest.abs().amax(0, keepdim=True).clamp(min=LEAST_ABSMAX)
        scaled, absmax = torch.cat([scaled, rest / largest]), torch.cat([absmax, largest])
    code = code.to(values.device)
    return torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8), absmax


def nf4_quantize(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """packed (ceil(n / 2),) uint8, the first of two neighbours in the high nibble; absmax, (blocks,) float32."""
    codes, absmax = quantize_blocks(values, torch.tensor(NF4_VALUES), block_size)
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=NF4_VALUES.index(0.0))
    return (codes[::2] << 4) | codes[1::2], absmax


def nf4_dequantize_(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    row_size: int,
    first_row: int,
    first_column: int,
) -> None:
    """out = value of a code * its block's absmax, in float32, or float64 for that dtype, rounded to out's dtype."""
    wide = torch.promote_types(out.dtype, torch.float32)
    rows, columns = (torch.arange(size, device=packed.device) for size in out.shape)
    index = (first_row + rows)[:, None] * row_size + first_column + columns
    code = (packed[index // 2] >> (4 - index % 2 * 4).to(torch.uint8)) & 15
    values = torch.tensor(NF4_VALUES, dtype=wide, device=packed.device)
    scales = dequantize_absmax(absmax, nested_absmax, nested_code, offset)
    out.copy_(values[code.int()] * scales[index // block_size].to(wide))


def dequantize_absmax(
    absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None
) -> Tensor:
    """One absmax a block, in float32."""
    if nested_absmax is None or nested_code is None or offset is None:
        return absmax
    scales = nested_absmax.repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
    return nested_code[absmax.int()] * scales + offset
