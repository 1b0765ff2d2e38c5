"""How block ops follow autocast: the dtype of their products, and their weights in it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def is_autocast(x: Tensor) -> bool:
    """Whether autocast casts the operands of a product with x, as those of `torch.nn.functional.linear`."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def product_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it casts, else x's."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Where autocast casts no operand of products with x. On meta it casts none, and raises where it is asked to."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def check_product_dtype(x: Tensor, dtype: torch.dtype, **weights: Tensor | None) -> None:
    """The weights, by their arguments' names: of any dtype under autocast, else of `dtype`."""
    if is_autocast(x):
        return
    for name, tensor in weights.items():
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, as x, got {tensor.dtype}.")


def as_product_dtype(x: Tensor, dtype: torch.dtype, **weights: Tensor | None) -> dict[str, Any]:
    """The weights, by their arguments' names: cast under autocast, else of `dtype` already."""
    check_product_dtype(x, dtype, **weights)
    # Not `.to` where there is nothing to do: the compiler reads a quantised weight's encoding off an input alone.
    return {
        name: tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)
        for name, tensor in weights.items()
    }
