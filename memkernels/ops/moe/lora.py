"""Experts' weights with low-rank adapters, whose products with tokens are all that is ever made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memkernels.ops.autocast import as_product_dtype, is_autocast
from memkernels.ops.checks import check_finite, check_floating, check_same_device, check_shape
from memkernels.ops.gradient_sum import GradientSum
from memkernels.ops.moe import operators  # noqa: F401  defines the operators
from memkernels.ops.moe.projection import GroupedDescription, GroupedProjection, Groups


@dataclass(frozen=True, eq=False)
class ExpertsLoRAWeight:
    """W_e + scaling B_e A_e for each expert e, the adapter of which is never multiplied out.

    `ops.moe_mlp` and `ops.grouped_matmul` take it in the place of a weight. Hu et al. 2021, arXiv 2106.09685; rsLoRA by
    `scaling`.

    Args:
        weight: W, (E, out, in); dense, or quantised (`memkernels.quant`) and frozen.
        lora_a: A, (E, r, in), of weight's dtype or float32; any r from 1 up.
        lora_b: B, (E, out, r), of A's dtype.
        scaling: s, a finite number.

    Raises:
        TypeError: a dtype other than those above; a scaling that is no number.
        ValueError: a shape, device or scaling that does not fit.
    """

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scaling: float = 1.0

    def __post_init__(self):
        weight, lora_a, lora_b = self.weight, self.lora_a, self.lora_b
        for name in ("weight", "lora_a", "lora_b"):
            check_floating(name, getattr(self, name))
        if weight.dim() != 3:
            raise ValueError(f"weight: expected shape (E, out, in), got {tuple(weight.shape)}.")
        experts, out, size = weight.shape
        if lora_a.dim() != 3 or lora_a.shape[1] == 0 or (lora_a.shape[0], lora_a.shape[2]) != (experts, size):
            raise ValueError(
                f"lora_a: expected shape ({experts}, r, {size}), r > 0, for weight's experts and rows,"
                f" got {tuple(lora_a.shape)}."
            )
        check_shape("lora_b", lora_b, (experts, out, lora_a.shape[1]), "weight's experts and out, lora_a's r")
        if lora_a.dtype not in (weight.dtype, torch.float32):
            raise TypeError(f"lora_a: expected {weight.dtype}, as weight, or float32, got {lora_a.dtype}.")
        if lora_b.dtype != lora_a.dtype:
            raise TypeError(f"lora_b: expected {lora_a.dtype}, as lora_a, got {lora_b.dtype}.")
        check_finite("scaling", self.scaling)
        check_same_device("weight", weight, lora_a=lora_a, lora_b=lora_b)

    def as_product_dtype(self, name: str, x: Tensor, dtype: torch.dtype) -> ExpertsLoRAWeight:
        """With its tensors cast under autocast, else its weight checked to be of x's dtype."""
        weight = as_product_dtype(x, dtype, **{name: self.weight})[name]
        if is_autocast(x):
            return replace(self, weight=weight, lora_a=self.lora_a.to(dtype), lora_b=self.lora_b.to(dtype))
        return self

    @property
    def requires_grad(self) -> bool:
        return any(tensor.requires_grad for tensor in (self.weight, self.lora_a, self.lora_b))

    def split(self, sizes: Sequence[int]) -> list[ExpertsLoRAWeight]:
        """In parts of so many experts, as `torch.Tensor.split`."""
        parts = zip(*(tensor.split(sizes) for tensor in (self.weight, self.lora_a, self.lora_b)), strict=True)
        return [ExpertsLoRAWeight(weight, a, b, self.scaling) for weight, a, b in parts]


@dataclass(frozen=True)
class LoRAExperts:
    """What is static of adapted weights: their base's description, and how products with the adapters are computed."""

    base: GroupedDescription
    scaling: float
    backend: str

    @property
    def num_tensors(self) -> int:
        return self.base.num_tensors + 2

    def bind(self, tensors: Sequence[Tensor]) -> LoRAExpertsProjection:
        *base, lora_a, lora_b = tensors
        return LoRAExpertsProjection(self.base.bind(base), lora_a, lora_b, self.scaling, self.backend)


class LoRAExpertsProjection:
    """y[r] = x[rows[r]] W_e^T + s[r] B_e^T with s[r] = scaling x[rows[r]] A_e^T.

    Backward with p[r] = scaling dy[rows[r]] B_e: dA_e is the sum of p[r]^T x[r], dB_e that of dy[r]^T s[r], and
    dx[r] = dy[r] W_e + p[r] A_e. s and p have r elements a row.
    """

    def __init__(self, base: GroupedProjection, lora_a: Tensor, lora_b: Tensor, scaling: float, backend: str):
        self.base = base
        self.lora_a, self.lora_b = lora_a, lora_b
        self.scaling = scaling
        self.backend = backend

    @property
    def description(self) -> LoRAExperts:
        return LoRAExperts(self.base.description, self.scaling, self.backend)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.base.tensors, self.lora_a, self.lora_b)

    def forward(self, x: Tensor, rows: Tensor | None, groups: Groups) -> Tensor:
        y = self.base.forward(x, rows, groups)
        return self._add(y, self._down(x, rows, groups), self.lora_b.mT, groups)

    def low_rank_grad(self, dy: Tensor, rows: Tensor | None, groups: Groups) -> Tensor:
        p = torch.ops.memkernels.grouped_product(dy, rows, self.lora_b, *groups, self.backend)
        return p.mul_(self.scaling)

    def input_grad(self, dy: Tensor, rows: Tensor | None, groups: Groups, p: Tensor | None) -> Tensor:
        assert p is not None
        return self._add(self.base.input_grad(dy, rows, groups, None), p, self.lora_a, groups)

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
        *base_sums, a_sum, b_sum = sums
        self.base.add_gradients(dy, dy_rows, x, x_rows, groups, base_sums, None)
        weight_grad = torch.ops.memkernels.grouped_weight_grad
        if a_sum is not None:
            assert p is not None
            a_sum.add(weight_grad(p, None, x, x_rows, groups.offsets, self.backend))
        if b_sum is not None:
            s = self._down(x, x_rows, groups)
            b_sum.add(weight_grad(dy, dy_rows, s, None, groups.offsets, self.backend))

    def _down(self, x: Tensor, rows: Tensor | None, groups: Groups) -> Tensor:
        """s."""
        s = torch.ops.memkernels.grouped_product(x, rows, self.lora_a.mT, *groups, self.backend)
        return s.mul_(self.scaling)

    def _add(self, y: Tensor, u: Tensor, v: Tensor, groups: Groups) -> Tensor:
        torch.ops.memkernels.grouped_product_add_(y, u, v, groups.offsets, self.backend)
        return y
