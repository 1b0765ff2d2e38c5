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
from memkernels.ops.moe import operators  # noqa: F401  defines the operators


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

    def low_rank_grad(self, dy: Tensor, rows: Tensor | None, groups: Groups) -> Tensor | None:
        """p of an adapter, a row for each r, which both halves of backward are given; None without an adapter."""
        ...

    def input_grad(self, dy: Tensor, rows: Tensor | None, groups: Groups, p: Tensor | None) -> Tensor:
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
        p: Tensor | None,
    ) -> None:
        """Adds the gradients to the sums of `tensors`, in their order; None where no gradient is wanted."""
        ...


@dataclass(frozen=True)
class DenseExperts:
    """Dense weights (E, out, in), and how products with them are computed."""

    backend: str

    @property
    def num_tensors(self) -> int:
        return 1

    def bind(self, tensors: Sequence[Tensor]) -> DenseExpertsProjection:
        (weights,) = tensors
        return DenseExpertsProjection(weights, self.backend)


class DenseExpertsProjection:
    """y[r] = x[rows[r]] weights[e]^T."""

    def __init__(self, weights: Tensor, backend: str):
        self.weights = weights
        self.backend = backend

    @property
    def description(self) -> DenseExperts:
        return DenseExperts(self.backend)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weights,)

    def forward(self, x: Tensor, rows: Tensor | None, groups: Groups) -> Tensor:
        return torch.ops.memkernels.grouped_product(x, rows, self.weights.transpose(1, 2), *groups, self.backend)

    def low_rank_grad(self, dy: Tensor, rows: Tensor | None, groups: Groups) -> None:
        return None

    def input_grad(self, dy: Tensor, rows: Tensor | None, groups: Groups, p: Tensor | None) -> Tensor:
        return torch.ops.memkernels.grouped_product(dy, rows, self.weights, *groups, self.backend)

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
        if sums[0] is not None:
            grad = torch.ops.memkernels.grouped_weight_grad(dy, dy_rows, x, x_rows, groups.offsets, self.backend)
            sums[0].add(grad)
