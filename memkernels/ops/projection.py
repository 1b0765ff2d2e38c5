"""Projections: how block ops multiply by a weight, of whatever kind.

A block op is one autograd Function, written once over projections. A projection is its tensors, which the Function
receives, saves and returns gradients for, and a static description, a frozen dataclass kept on `ctx`; the description's
`bind(tensors)` makes the projection again from the tensors in forward and in backward. A new kind of weight is a new
description with a new projection, and no change to any block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from memkernels.ops.gradient_sum import GradientSum
from memkernels.ops.matmul import addmm, linear, mm


class Description(Protocol):
    """What is static of a projection: hashable, without tensors."""

    @property
    def num_tensors(self) -> int: ...

    def bind(self, tensors: Sequence[Tensor]) -> Projection: ...


class Part(Protocol):
    """A description of a part of a block that has tensors: a projection's, or a norm's."""

    @property
    def num_tensors(self) -> int: ...


def split_by(parts: Sequence[Part | None], flat: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Values of a block's tensors, one a tensor, by the parts that they belong to; none for a part that is None."""
    groups, first = [], 0
    for part in parts:
        count = 0 if part is None else part.num_tensors
        groups.append(tuple(flat[first : first + count]))
        first += count
    return groups


class Projection(Protocol):
    """y = x W^T (+ ...) for x (tokens, in), of which a tile may be given: `first_row` is then its place in the whole.

    Backward comes as its two halves, since a block may need dx before x.
    """

    @property
    def description(self) -> Description: ...

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    @property
    def out_features(self) -> int: ...

    def forward(self, x: Tensor, first_row: int = 0) -> Tensor:
        """y, (tokens, out), contiguous and new."""
        ...

    def input_grad(self, dy: Tensor, into: Tensor | None = None, first_row: int = 0) -> Tensor:
        """dx, (tokens, in), contiguous and new; with `into`, added to it in place."""
        ...

    def add_gradients(self, dy: Tensor, x: Tensor, sums: Sequence[GradientSum | None], first_row: int = 0) -> None:
        """Adds one tile's gradients to the sums of `tensors`, in their order; None where no gradient is wanted."""
        ...


@dataclass(frozen=True)
class Dense:
    """A dense weight (out, in), as that of `torch.nn.Linear`, with or without a bias (out,)."""

    has_bias: bool = False

    @property
    def num_tensors(self) -> int:
        return 2 if self.has_bias else 1

    def bind(self, tensors: Sequence[Tensor]) -> DenseProjection:
        return DenseProjection(*tensors)


class DenseProjection:
    """y = x weight^T + bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight = weight
        self.bias = bias

    @property
    def description(self) -> Dense:
        return Dense(self.bias is not None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor, first_row: int = 0) -> Tensor:
        return linear(x, self.weight, self.bias)

    def input_grad(self, dy: Tensor, into: Tensor | None = None, first_row: int = 0) -> Tensor:
        return mm(dy, self.weight) if into is None else addmm(into, dy, self.weight, out=into)

    def add_gradients(self, dy: Tensor, x: Tensor, sums: Sequence[GradientSum | None], first_row: int = 0) -> None:
        weight_sum, bias_sum = sums if self.bias is not None else (sums[0], None)
        if weight_sum is not None:
            weight_sum.add_product(dy, x)
        if bias_sum is not None:
            bias_sum.add(dy.sum(0))
