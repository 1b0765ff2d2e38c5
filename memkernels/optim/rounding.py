"""float32 values in bfloat16, nothing lost in the mean or nothing lost at all, in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels.ops.philox import philox


def random_bits(
    size: int, seed: int, tensor: int, index: int, step: int, device: torch.device, origin: int = 0
) -> Tensor:
    """16 random bits for each of `size` elements, int32: half e // 16 % 2, the low one first, of word e % 128 // 32 of
    Philox at the counter (e // 128 * 16 + e % 16, tensor, index, step) for element e.

    Args:
        tensor: 0 for the parameter, 1 and 2 for its moments.
        index: the parameter's place among all of the optimizer's.
        origin: the first element.
    """
    first, before = divmod(origin, 128)
    runs = -(-(before + size) // 128)
    key = torch.tensor(seed, dtype=torch.int64, device=device)
    counter = torch.arange(first * 16, (first + runs) * 16, device=device).view(runs, 1, 16)
    which, parameter, time = (key.new_full((1, 1, 1), value) for value in (tensor, index, step))
    words = torch.cat(philox(key, (counter, which, parameter, time)), dim=1)
    return torch.stack([words & 0xFFFF, words >> 16], dim=2).view(-1)[before : before + size].int()


def round_stochastic(values: Tensor, random: Tensor) -> Tensor:
    """float32 to bfloat16: up or down with the probabilities whose mean is the value. `random` are 16 random bits."""
    bits = values.view(torch.int32)
    rounded = ((bits.long() + random) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isnan(), values.to(torch.bfloat16), rounded)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 that `split` took apart."""
    return ((high.view(torch.int16).int() << 16) + low).view(torch.float32)


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as the nearest bfloat16 (of two as near the one of larger magnitude) and 16 bits, int16, that are its own
    low ones and say too which way it was rounded. Nothing is lost; a NaN becomes the quiet one."""
    bits = torch.where(values.isnan(), torch.nan, values).view(torch.int32).long()
    high = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return high, bits.to(torch.int16)
