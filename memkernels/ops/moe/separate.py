"""Experts whose weights are tensors of their own, as those of SwitchTransformers: operators and grouped projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memkernels._library import define, implement_with_python
from memkernels.ops.checks import check_like
from memkernels.ops.gradient_sum import GradientSum
from memkernels.ops.matmul import mm
from memkernels.ops.moe.products import groups_of, loop_product, rows_of
from memkernels.ops.moe.projection import Groups


def _product_fake(x, rows, weights, offsets, num_rows):
    return x.new_empty(num_rows, weights[0].shape[1])


def _weight_grad_fake(dy, dy_rows, x, x_rows, offsets, needed):
    return [x.new_empty((dy.shape[1], x.shape[1]) if wanted else 0) for wanted in needed]


def _weight_grad(
    dy: Tensor, dy_rows: Tensor | None, x: Tensor, x_rows: Tensor | None, offsets: Tensor, needed: Sequence[bool]
) -> list[Tensor]:
    return [
        mm(rows_of(dy, dy_rows, group).t(), rows_of(x, x_rows, group)) if wanted else x.new_empty(0)
        for wanted, group in zip(needed, groups_of(offsets), strict=True)
    ]


# As grouped_product and grouped_weight_grad, with one tensor (in, out) an expert; gradients are empty unless needed.
define(
    "separate_product(Tensor x, Tensor? rows, Tensor[] weights, Tensor offsets, SymInt num_rows) -> Tensor",
    _product_fake,
)
define(
    "separate_weight_grad(Tensor dy, Tensor? dy_rows, Tensor x, Tensor? x_rows, Tensor offsets, bool[] needed)"
    " -> Tensor[]",
    _weight_grad_fake,
)
implement_with_python("separate_product", loop_product)
implement_with_python("separate_weight_grad", _weight_grad)


def check_separate(name: str, weights: Sequence[Tensor]) -> None:
    """Alike weights (out, in), one an expert.

    Raises:
        TypeError, ValueError: there are none, or they differ.
    """
    if not isinstance(weights, Sequence) or not weights:
        raise TypeError(
            f"{name}: expected a tensor, or a sequence of one for each expert, got {type(weights).__name__}."
        )
    for expert, weight in enumerate(weights):
        check_like(f"{name}[{expert}]", weight, f"{name}[0]", weights[0])


@dataclass(frozen=True)
class SeparateExperts:
    """A dense weight (out, in) for each expert."""

    num_experts: int

    @property
    def num_tensors(self) -> int:
        return self.num_experts

    def bind(self, tensors: Sequence[Tensor]) -> SeparateExpertsProjection:
        return SeparateExpertsProjection(tensors)


class SeparateExpertsProjection:
    """y[r] = x[rows[r]] weights[e]^T."""

    def __init__(self, weights: Sequence[Tensor]):
        self.weights = tuple(weights)

    @property
    def description(self) -> SeparateExperts:
        return SeparateExperts(len(self.weights))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.weights

    def forward(self, x: Tensor, rows: Tensor | None, groups: Groups) -> Tensor:
        return torch.ops.memkernels.separate_product(x, rows, [weight.t() for weight in self.weights], *groups)

    def low_rank_grad(self, dy: Tensor, rows: Tensor | None, groups: Groups) -> None:
        return None

    def input_grad(self, dy: Tensor, rows: Tensor | None, groups: Groups, p: Tensor | None) -> Tensor:
        return torch.ops.memkernels.separate_product(dy, rows, list(self.weights), *groups)

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
        needed = [total is not None for total in sums]
        if not any(needed):
            return
        grads = torch.ops.memkernels.separate_weight_grad(dy, dy_rows, x, x_rows, groups.offsets, needed)
        for total, grad in zip(sums, grads, strict=True):
            if total is not None:
                total.add(grad)
