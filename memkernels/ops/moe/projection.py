"""Grouped projections: how the experts' block multiplies by the experts' weights, of whatever kind.

As `memkernels.ops.projection`, with rows in groups: a projection is its tensors and a static description.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from memkernels.ops.gradient_sum import GradientSum


class Groups(NamedTuple):
    """R rows in groups: those of expert e are offsets[e] to offsets[e + 1]."""

    offsets: Tensor
    num_rows: int


class GroupedDescription(Protocol):
    """What is static of a grouped projection: hashable, without tensors."""

    @property
    def num_tensors(self) -> int: ...

    def bind(self, tensors: Sequence[Tensor]) -> GroupedProjection: ...


class GroupedProjection(Protocol):
    """y[r] = x[rows[r]] W_e^T (+ ...) for the rows r of group e. Without `rows`, x has a row for each r."""

    @property
    def description(self) -> GroupedDescription: ...

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    def forward(self, x: Tensor, rows: Tensor | None, groups: Groups) -> Tensor: ...

    def input_grad(self, dy: Tensor, rows: Tensor | None, groups: Groups) -> Tensor:
        """dx[r] from dy[rows[r]], a row for each r."""
        ...

    def add_gradients(
        self,
        dy: Tensor,
        dy_rows: Tensor | None,
        x: Tensor,
        x_rows: Tensor | None,
        groups: Groups,
        sums: Sequence[GradientSum | None],
    ) -> None:
        """Adds the gradients to the sums of `tensors`, in their order; None where no gradient is wanted."""
        ...


@dataclass(frozen=True)
class DenseExperts:
    """Dense weights (E, out, in); by `torch.nn.functional.grouped_mm`, or a product an expert."""

    grouped_mm: bool

    @property
    def num_tensors(self) -> int:
        return 1

    def bind(self, tensors: Sequence[Tensor]) -> DenseExpertsProjection:
        (weights,) = tensors
        return DenseExpertsProjection(weights, self.grouped_mm)


class DenseExpertsProjection:
    """y[r] = x[rows[r]] weights[e]^T."""

    def __init__(self, weights: Tensor, grouped_mm: bool):
        self.weights = weights
        self.grouped_mm = grouped_mm

    @property
    def description(self) -> DenseExperts:
        return DenseExperts(self.grouped_mm)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weights,)

    def forward(self, x: Tensor, rows: Tensor | None, groups: Groups) -> Tensor:
        return torch.ops.memkernels.grouped_product(x, rows, self.weights.transpose(1, 2), *groups, self.grouped_mm)

    def input_grad(self, dy: Tensor, rows: Tensor | None, groups: Groups) -> Tensor:
        return torch.ops.memkernels.grouped_product(dy, rows, self.weights, *groups, self.grouped_mm)

    def add_gradients(
        self,
        dy: Tensor,
        dy_rows: Tensor | None,
        x: Tensor,
        x_rows: Tensor | None,
        groups: Groups,
        sums: Sequence[GradientSum | None],
    ) -> None:
        if sums[0] is not None:
            grad = torch.ops.memkernels.grouped_weight_grad(dy, dy_rows, x, x_rows, groups.offsets, self.grouped_mm)
            sums[0].add(grad)
