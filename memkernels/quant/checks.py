"""Checks of what is quantised."""

from __future__ import annotations

from torch import Tensor

from memkernels._library import FLOATING
from memkernels.ops.quantized.tensor import QuantizedTensor


def check_values(weight: Tensor) -> None:
    """A tensor of values with at least one dimension."""
    if not isinstance(weight, Tensor) or isinstance(weight, QuantizedTensor):
        raise TypeError(f"weight: expected a tensor of values, got {type(weight).__name__}.")
    if weight.dtype not in FLOATING:
        raise TypeError(f"weight: expected float32, bfloat16 or float16, got {weight.dtype}.")
    if weight.dim() == 0:
        raise ValueError("weight: expected at least one dimension, got a scalar.")
