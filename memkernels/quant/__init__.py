"""Weights in few bits: quantised once, and dequantised a tile at a time in front of each product."""

import torch

from memkernels.ops.quantized.tensor import QuantizedTensor
from memkernels.quant.checkpoint import from_plain, load_file, save_file, to_plain
from memkernels.quant.int8 import Int8Tensor, quantize_int8
from memkernels.quant.nf4 import NF4Tensor, quantize_nf4


def dequantize(weight: QuantizedTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The values of a quantised weight, a plain tensor, in its dtype or another.

    Raises:
        TypeError: weight is not quantised.
    """
    if not isinstance(weight, QuantizedTensor):
        raise TypeError(f"weight: expected a quantised tensor, got {type(weight).__name__}.")
    return weight.dequantize(dtype)


__all__ = [
    "Int8Tensor", "NF4Tensor", "QuantizedTensor", "dequantize", "from_plain", "load_file", "quantize_int8",
    "quantize_nf4", "save_file", "to_plain",
]  # fmt: skip
