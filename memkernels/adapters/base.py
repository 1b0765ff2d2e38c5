"""Quantised bases: the weights under adapters in few bits, one layer after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memkernels._library import FLOATING
from memkernels.integrations import bitsandbytes
from memkernels.nn.lora_linear import is_conv1d
from memkernels.ops.checks import PLAIN_TENSORS
from memkernels.ops.quantized.tensor import QuantizedTensor
from memkernels.quant.nf4 import quantize_nf4

BASES = ("nf4", None)


def check_base(base: str | None) -> None:
    if base not in BASES:
        raise ValueError(f"base: expected one of {', '.join(map(repr, BASES))}, got {base!r}.")


def check_quantizable(layers: Mapping[str, Any]) -> None:
    """That each layer's weight is quantised, or may be: plain, finite, of float32, bfloat16 or float16.

    Raises:
        TypeError, ValueError: one is not; it is named.
    """
    for name, layer in layers.items():
        if not bitsandbytes.is_layer(layer):
            check_quantizable_weight(f"{name}.weight", layer.weight)


def check_quantizable_weight(name: str, weight: Tensor) -> None:
    """`check_quantizable` of one weight."""
    if isinstance(weight, QuantizedTensor):
        return
    if type(weight) not in PLAIN_TENSORS:
        raise TypeError(f"base: {name}: expected a plain tensor, got {type(weight).__name__}.")
    if weight.dtype not in FLOATING:
        raise TypeError(f"base: {name}: expected float32, bfloat16 or float16, got {weight.dtype}.")
    if weight.is_meta:
        raise ValueError(f"base: {name}: expected values, got a tensor on the meta device.")
    # Not isfinite(), which makes several tensors of the weight's size.
    if weight.numel() and not torch.stack(weight.detach().aminmax()).isfinite().all():
        raise ValueError(f"base: {name}: expected finite values.")


def quantize_layers(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Weights in NF4, in place, where they are not quantised yet: each dense one is freed before the next is quantised.

    A Conv1D becomes the torch.nn.Linear that computes the same, since storage is by rows of (N, K).
    """
    for layer in layers.values():
        if _is_quantized(layer):
            continue
        if is_conv1d(layer):
            replace_conv1d(model, layer, quantize_nf4(layer.weight.detach().t().contiguous()))
        else:
            layer.weight = nn.Parameter(quantize_nf4(layer.weight.detach()), requires_grad=False)


def quantize_experts(owner: Any, name: str) -> None:
    """A weight of experts in NF4, in place, if it is not quantised yet."""
    weight = getattr(owner, name)
    if not isinstance(weight, QuantizedTensor):
        setattr(owner, name, nn.Parameter(quantize_nf4(weight.detach()), requires_grad=False))


def _is_quantized(layer: Any) -> bool:
    return bitsandbytes.is_layer(layer) or isinstance(layer.weight, QuantizedTensor)


def replace_conv1d(model: nn.Module, layer: Any, weight: QuantizedTensor) -> None:
    """Puts in a Conv1D's place the torch.nn.Linear with its bias that computes the same with a weight (N, K)."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta").train(layer.training)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = layer.bias
    replace_module(model, layer, linear)
    del layer.weight


def replace_module(model: nn.Module, module: nn.Module, by: nn.Module) -> None:
    """Puts another wherever the module is."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is module:
                setattr(parent, name, by)
