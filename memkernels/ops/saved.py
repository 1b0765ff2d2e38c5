"""What Functions say of tensors that they save."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def compressible(tensor: Tensor) -> Tensor:
    """Says of values that a Function made and saves that offload may keep them in fewer bits, as it may what requires a
    gradient. Nothing else is rounded: statistics, routing weights, masks and tables have large effects."""
    if not torch.compiler.is_compiling():  # a graph has no place for it
        tensor._memkernels_compressible = True  # type: ignore[attr-defined]
    return tensor


def exact(tensor: Tensor) -> Tensor:
    """Says of what a Function saves that offload keeps every bit of it, though it may require a gradient."""
    if not torch.compiler.is_compiling():
        tensor._memkernels_compressible = False  # type: ignore[attr-defined]
    return tensor


def is_compressible(tensor: Tensor) -> bool:
    return getattr(tensor, "_memkernels_compressible", tensor.requires_grad)


def let_go(ctx: Any) -> None:
    """In backward: autograd no longer holds what the Function saved, which it otherwise does until backward returns.
    Where the graph is retained it still does."""
    if not torch.compiler.is_compiling():
        ctx.maybe_clear_saved_tensors()
