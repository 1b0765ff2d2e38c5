"""How block ops follow autocast: the dtype of their products, and their weights in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, as `torch.nn.functional.linear` takes it; else x's."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def as_product_dtype(x: Tensor, dtype: torch.dtype, **weights: Tensor | None) -> dict[str, Any]:
    """The weights, by their arguments' names: cast under autocast, else of `dtype` already."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    for name, tensor in weights.items():
        if tensor is not None and tensor.dtype != dtype and not autocast:
            raise TypeError(f"{name}: expected {dtype}, as x, got {tensor.dtype}.")
    # Not `.to` where there is nothing to do: the compiler reads a quantised weight's encoding off an input alone.
    return {
        name: tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)
        for name, tensor in weights.items()
    }
