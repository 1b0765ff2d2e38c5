"""Grouped projections of rows that went through dropout, by a mask that is never stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from memkernels.ops.gradient_sum import GradientSum
from memkernels.ops.lora_linear.dropout import row_dropout
from memkernels.ops.moe.projection import GroupedDescription, GroupedProjection, Groups


@dataclass(frozen=True)
class DroppedExperts:
    """Other experts' weights, behind dropout of what they multiply. Its tensors: the mask's seed, and theirs."""

    inner: GroupedDescription
    dropout_p: float

    @property
    def num_tensors(self) -> int:
        return 1 + self.inner.num_tensors

    def bind(self, tensors: Sequence[Tensor]) -> DroppedExpertsProjection:
        seed, *others = tensors
        return DroppedExpertsProjection(self.inner.bind(others), seed, self.dropout_p)


class DroppedExpertsProjection:
    """y[r] = (m[r] * x[r]) W_e^T / (1 - p), m the mask of `row_dropout` for the grouped row r: x comes grouped."""

    def __init__(self, inner: GroupedProjection, seed: Tensor, dropout_p: float):
        self.inner = inner
        self.seed = seed
        self.dropout_p = dropout_p

    @property
    def description(self) -> DroppedExperts:
        return DroppedExperts(self.inner.description, self.dropout_p)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.seed, *self.inner.tensors)

    def forward(self, x: Tensor, rows: Tensor | None, groups: Groups) -> Tensor:
        assert rows is None
        return self.inner.forward(self._dropped(x), None, groups)

    def low_rank_grad(self, dy: Tensor, rows: Tensor | None, groups: Groups) -> Tensor | None:
        return self.inner.low_rank_grad(dy, rows, groups)

    def input_grad(self, dy: Tensor, rows: Tensor | None, groups: Groups, p: Tensor | None) -> Tensor:
        return self._dropped(self.inner.input_grad(dy, rows, groups, p))

    def add_gradients(
        self,
        dy: Tensor,
        dy_rows: Tensor | None,
        x: Tensor,
        x_rows: Tensor | None,
        groups: Groups,
        sums: Sequence[GradientSum | None],
        p: Tensor | None,
    ) -> None:
        assert x_rows is None
        if any(total is not None for total in sums):
            self.inner.add_gradients(dy, dy_rows, self._dropped(x), None, groups, sums[1:], p)

    def _dropped(self, rows: Tensor) -> Tensor:
        return row_dropout(rows, self.seed, self.dropout_p, 0, rows.dtype)
