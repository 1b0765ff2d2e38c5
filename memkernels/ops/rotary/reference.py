"""Rotary position embedding in plain PyTorch: the specification, and the fallback where no kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    size = cos.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = (table.to(wide.dtype).unsqueeze(-2) for table in (cos, sin))
    rotated, rest = wide[..., :size], wide[..., size:]
    a, b = rotated.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else rotated.chunk(2, -1)
    (cos_a, cos_b), (sin_a, sin_b) = cos.chunk(2, -1), sin.chunk(2, -1)
    pair = (a * cos_a - b * sin_a, b * cos_b + a * sin_b)
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((rotated, rest), -1).to(x.dtype)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Each pair (a, b) of q and k becomes (a cos - b sin, b cos + a sin), in float32 or wider inside."""
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)
