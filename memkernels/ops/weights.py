"""Weights as the block ops take them: a tensor, or a weight of another kind that makes its own projection."""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from memkernels.ops.autocast import as_product_dtype
from memkernels.ops.lora_linear.weight import LoRAWeight
from memkernels.ops.projection import DenseProjection, Projection
from memkernels.ops.quantized.op import quantized_projection
from memkernels.ops.quantized.tensor import QuantizedTensor

Weight = Tensor | LoRAWeight


@overload
def base_of(weight: Weight) -> Tensor: ...
@overload
def base_of(weight: Weight | None) -> Tensor | None: ...
def base_of(weight):
    """The (out, in) tensor of a weight, which has its shape, dtype and device."""
    return weight.weight if isinstance(weight, LoRAWeight) else weight


def as_product_weights(x: Tensor, dtype: torch.dtype, **weights: Weight | None) -> dict[str, Any]:
    """`as_product_dtype` of weights of any kind."""
    return {
        name: weight.as_product_dtype(name, x, dtype)
        if isinstance(weight, LoRAWeight)
        else as_product_dtype(x, dtype, **{name: weight})[name]
        for name, weight in weights.items()
    }


def projection_of(weight: Weight, bias: Tensor | None) -> Projection:
    if isinstance(weight, LoRAWeight):
        return weight.projection(bias)
    return quantized_projection(weight, bias) if isinstance(weight, QuantizedTensor) else DenseProjection(weight, bias)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """The projection in plain PyTorch, for the references."""
    if isinstance(weight, LoRAWeight):
        return weight.linear(x, bias)
    return F.linear(x, weight.dequantize() if isinstance(weight, QuantizedTensor) else weight, bias)
