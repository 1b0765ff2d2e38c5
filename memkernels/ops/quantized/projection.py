"""The projection of a quantised weight, for every block op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memkernels.ops.gradient_sum import GradientSum
from memkernels.ops.quantized import operators  # noqa: F401  defines the operators
from memkernels.ops.quantized.encoding import Encoding


@dataclass(frozen=True)
class Quantized:
    """What is static of a quantised weight: its encoding, and whether it has a bias."""

    encoding: Encoding
    has_bias: bool = False

    @property
    def num_tensors(self) -> int:
        return len(self.encoding.part_names) + self.has_bias

    def bind(self, tensors: Sequence[Tensor]) -> QuantizedProjection:
        count = len(self.encoding.part_names)
        return QuantizedProjection(self.encoding, tuple(tensors[:count]), tensors[count] if self.has_bias else None)


class QuantizedProjection:
    """y = x W^T + bias, W frozen and dequantised a tile at a time, in front of each product, forward and backward."""

    def __init__(self, encoding: Encoding, parts: tuple[Tensor, ...], bias: Tensor | None = None):
        self.encoding = encoding
        self.parts = parts
        self.bias = bias

    @property
    def description(self) -> Quantized:
        return Quantized(self.encoding, self.bias is not None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.parts if self.bias is None else (*self.parts, self.bias)

    @property
    def out_features(self) -> int:
        return self.encoding.rows

    @property
    def stored(self) -> tuple[list[Tensor], str, list[int]]:
        """The matrix as operators take it."""
        return list(self.parts), self.encoding.kind, self.encoding.sizes

    def forward(self, x: Tensor, first_row: int = 0) -> Tensor:
        return torch.ops.memkernels.quantized_linear(x, self.bias, *self.stored)

    def input_grad(self, dy: Tensor, into: Tensor | None = None, first_row: int = 0) -> Tensor:
        if into is None:
            return torch.ops.memkernels.quantized_input_grad(dy, *self.stored)
        torch.ops.memkernels.quantized_input_grad_add_(into, dy, *self.stored)
        return into

    def add_gradients(self, dy: Tensor, x: Tensor, sums: Sequence[GradientSum | None], first_row: int = 0) -> None:
        if self.bias is not None and sums[-1] is not None:
            sums[-1].add(dy.sum(0))
