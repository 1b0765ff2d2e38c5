"""Sums of a parameter's gradient over tiles of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memkernels.ops.matmul import add_product


class GradientSum:
    """The gradient of one tensor, summed over tiles of tokens, in float32 or wider.

    The sum is rounded to the tensor's dtype once, and so is each tile's term, but for products that are added as they
    are made (`add_product`). A single tile's term is the sum itself: no buffer is made.

    Args:
        tensor: whose gradient it is.
        tiles: how many terms there will be.
    """

    def __init__(self, tensor: Tensor, tiles: int):
        self.tensor = tensor
        self.wide_dtype = torch.promote_types(tensor.dtype, torch.float32) if tiles > 1 else tensor.dtype
        self.total: Tensor | None = None

    def add(self, term: Tensor) -> None:
        """Adds a term of the tensor's shape, which belongs to the sum from now on."""
        if self.total is None:
            self.total = term.to(self.wide_dtype)
        else:
            self.total.add_(term)

    def add_product(self, dy: Tensor, x: Tensor) -> None:
        """Adds dy^T x: the gradient of a weight (out, in) from dy (tokens, out) and x (tokens, in)."""
        self.total = add_product(self.total, dy.t(), x, self.wide_dtype)

    def result(self) -> Tensor:
        """The gradient, in the tensor's dtype; zeros if nothing was added."""
        return torch.zeros_like(self.tensor) if self.total is None else self.total.to(self.tensor.dtype)


def gradient_sums(tensors: Sequence[Tensor], needed: Sequence[bool], tiles: int = 1) -> list[GradientSum | None]:
    """A sum for each tensor that needs a gradient, else None."""
    return [GradientSum(tensor, tiles) if need else None for tensor, need in zip(tensors, needed, strict=True)]


def results(sums: Sequence[GradientSum | None]) -> list[Tensor | None]:
    """The gradients, None where none was wanted."""
    return [None if total is None else total.result() for total in sums]
