"""Philox 4x32-10 in plain PyTorch: the generator behind every dropout mask, as the kernels compute it.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Words are held in int64, 0 <= word < 2^32.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 64-bit product, in two halves since int64 has no room for its sign."""
    low_half, high_half = (constant & 0xFFFF) * word, (constant >> 16) * word
    middle = (low_half >> 16) + (high_half & 0xFFFF)
    high = (high_half >> 16) + (middle >> 16)
    return high & _WORD, ((middle << 16) | (low_half & 0xFFFF)) & _WORD


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter of four words (tensors that broadcast), under a 64-bit seed (0-dim int64)."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    key_a, key_b = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high_a, low_a = _multiply(_ROUND_A, c0)
        high_b, low_b = _multiply(_ROUND_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ key_a, low_b, high_a ^ c3 ^ key_b, low_a
        key_a, key_b = (key_a + _KEY_A) & _WORD, (key_b + _KEY_B) & _WORD
    return c0, c1, c2, c3


def row_words(seed: Tensor, rows: int, columns: int, first_row: int = 0) -> Tensor:
    """A random word for each element of a matrix, (rows, columns); its first row is the whole's row first_row.

    The word of (row, column) is word (column % 64) // 16 of Philox at (column // 64 * 16 + column % 16, row, 0, 0).
    """
    row = torch.arange(first_row, first_row + rows, device=seed.device)[:, None]
    column = torch.arange(columns, device=seed.device)[None]
    zero = torch.zeros_like(row)
    words = torch.stack(philox(seed, (column // 64 * 16 + column % 16, row, zero, zero)))
    return torch.gather(words, 0, (column % 64 // 16).expand(rows, columns)[None])[0]


def threshold(dropout_p: float) -> int:
    """A word below this is dropped."""
    return min(_WORD, int(dropout_p * 2.0**32))


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """A 0-dim int64 tensor on `device`; without a seed, drawn from torch's generator of that device."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), device=device, dtype=torch.int64)
    if isinstance(seed, Tensor):
        has_value = seed.numel() == 1 and seed.device.type != "meta" and seed.layout == torch.strided
        fits = has_value and not (seed.is_floating_point() or seed.is_complex() or seed.dtype == torch.bool)
    else:
        fits = hasattr(seed, "__index__") and not isinstance(seed, bool) and -(2**63) <= seed < 2**63
    if not fits:
        raise ValueError(f"seed: expected an integer of 64 bits, or a tensor of one, got {seed!r}.")
    return torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(())
