"""The routers' product in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels.ops.philox import row_words


def router_logits(
    x: Tensor,
    weight: Tensor,
    *,
    jitter: float = 0.0,
    seed: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """x' weight^T, in float32 or wider; zero of padding."""
    if padding_mask is not None:
        x = x.masked_fill(padding_mask[:, None], 0.0)
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype) if seed is None else row_noise(x, seed, jitter, 0)
    return torch.nn.functional.linear(x, weight.to(dtype))


def row_noise(x: Tensor, seed: Tensor, width: float, first_row: int) -> Tensor:
    """u * x in float32 or wider; u is uniform in [1 - width, 1 + width], by the upper 24 bits of an element's word."""
    words = row_words(seed, x.shape[0], x.shape[1], first_row)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * ((words >> 8).to(wide.dtype) * (width * 2.0**-23) + (1.0 - width))
