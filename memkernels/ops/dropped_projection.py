"""Projections of rows that went through dropout, by a mask that is never stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from memkernels.ops.gradient_sum import GradientSum
from memkernels.ops.lora_linear.dropout import row_dropout, row_dropout_add_
from memkernels.ops.projection import Description, Projection


@dataclass(frozen=True)
class Dropped:
    """Another projection, behind dropout of what it multiplies. Its tensors: the mask's seed, and those."""

    inner: Description
    dropout_p: float

    @property
    def num_tensors(self) -> int:
        return 1 + self.inner.num_tensors

    def bind(self, tensors: Sequence[Tensor]) -> DroppedProjection:
        seed, *others = tensors
        return DroppedProjection(self.inner.bind(others), seed, self.dropout_p)


class DroppedProjection:
    """y = (m * x / (1 - p)) W^T (+ ...), m the mask of `row_dropout`."""

    def __init__(self, inner: Projection, seed: Tensor, dropout_p: float):
        self.inner = inner
        self.seed = seed
        self.dropout_p = dropout_p

    @property
    def description(self) -> Dropped:
        return Dropped(self.inner.description, self.dropout_p)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.seed, *self.inner.tensors)

    @property
    def out_features(self) -> int:
        return self.inner.out_features

    def forward(self, x: Tensor, first_row: int = 0) -> Tensor:
        return self.inner.forward(self.dropped(x, first_row), first_row)

    def input_grad(self, dy: Tensor, into: Tensor | None = None, first_row: int = 0) -> Tensor:
        through = self.inner.input_grad(dy, None, first_row)
        if into is None:
            return self.dropped(through, first_row)
        row_dropout_add_(into, through, self.seed, self.dropout_p, first_row)
        return into

    def add_gradients(self, dy: Tensor, x: Tensor, sums: Sequence[GradientSum | None], first_row: int = 0) -> None:
        if any(total is not None for total in sums):
            self.inner.add_gradients(dy, self.dropped(x, first_row), sums[1:], first_row)

    def dropped(self, rows: Tensor, first_row: int) -> Tensor:
        """m * rows / (1 - p)."""
        return row_dropout(rows, self.seed, self.dropout_p, first_row, rows.dtype)
