"""What the block ops take of a module's linear layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from memkernels.nn.lora_linear import LoRALinear
from memkernels.ops.weights import Weight


def weights_of(module: torch.nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Weights w_<name> and biases b_<name> of the layers <name>_proj, None of none.

    Raises:
        TypeError: a layer other than a torch.nn.Linear or an nn.LoRALinear, whose `weight` may not be all it computes.
    """
    arguments: dict[str, Any] = {}
    for name in names:
        layer = getattr(module, f"{name}_proj")
        if layer is not None and not isinstance(layer, (torch.nn.Linear, LoRALinear)):
            kind = f"{type(layer).__module__}.{type(layer).__name__}"
            raise TypeError(f"{name}_proj: expected a torch.nn.Linear or an nn.LoRALinear, got {kind}.")
        pair = (None, None) if layer is None else weight_and_bias(layer)
        arguments[f"w_{name}"], arguments[f"b_{name}"] = pair
    return arguments


def weight_and_bias(layer: torch.nn.Linear | LoRALinear) -> tuple[Weight, Tensor | None]:
    """The weight, (out, in), with its adapter if it has one that is not merged into it, and the bias."""
    if isinstance(layer, LoRALinear) and not layer.merged:
        return layer.adapted(), layer.bias
    return layer.weight, layer.bias
