"""The grouped projection of experts' weights that are quantised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memkernels.ops.gradient_sum import GradientSum
from memkernels.ops.moe import operators  # noqa: F401  defines the operators
from memkernels.ops.moe.projection import Groups
from memkernels.ops.quantized.encoding import Encoding


@dataclass(frozen=True)
class QuantizedExperts:
    """The encoding of quantised weights (E, out, in), and how products with them are computed."""

    encoding: Encoding
    backend: str

    @property
    def num_tensors(self) -> int:
        return len(self.encoding.part_names)

    def bind(self, tensors: Sequence[Tensor]) -> QuantizedExpertsProjection:
        return QuantizedExpertsProjection(self, tuple(tensors))


class QuantizedExpertsProjection:
    """y[r] = x[rows[r]] W_e^T, W_e frozen and dequantised a tile at a time, in front of each product."""

    def __init__(self, description: QuantizedExperts, tensors: tuple[Tensor, ...]):
        self.description = description
        self.tensors = tensors

    def forward(self, x: Tensor, rows: Tensor | None, groups: Groups) -> Tensor:
        return self._product(x, rows, groups, by_rows=True)

    def low_rank_grad(self, dy: Tensor, rows: Tensor | None, groups: Groups) -> None:
        return None

    def input_grad(self, dy: Tensor, rows: Tensor | None, groups: Groups, p: Tensor | None) -> Tensor:
        return self._product(dy, rows, groups, by_rows=False)

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
        """The weights are frozen."""

    def _product(self, x: Tensor, rows: Tensor | None, groups: Groups, *, by_rows: bool) -> Tensor:
        matrix, parts = self.description.encoding.as_matrix(self.tensors)
        return torch.ops.memkernels.grouped_quantized_product(
            x, rows, list(parts), matrix.kind, matrix.sizes, *groups, by_rows, self.description.backend
        )
