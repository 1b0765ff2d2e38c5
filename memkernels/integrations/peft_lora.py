"""What is active in a LoRA layer of PEFT, and what an op takes of it.

PEFT switches, merges and disables adapters at any time, so a layer's state is read at each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memkernels.integrations.bitsandbytes import values_dtype
from memkernels.integrations.plain import has_hooks, is_plain_linear
from memkernels.nn.row_squares import kept_row_squares
from memkernels.ops.lora_linear.weight import LoRAWeight
from memkernels.ops.weights import Weight

_LAYERS = (
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
)


def is_lora(module: Any) -> bool:
    """Whether it is PEFT's LoRA layer around a linear module: a plain one, or bitsandbytes' of 4 or 8 bits."""
    kind = type(module)
    return (kind.__module__, kind.__name__) in _LAYERS


def why_not(layer: Any, x: Tensor | None = None) -> str | None:
    """Why a LoRA layer's adapter in this call with x is none that `adapted` takes; None where it is."""
    if layer.disable_adapters and layer.merged:
        return "a merged adapter that PEFT has yet to take out"
    names = active(layer)
    if len(names) > 1:
        return "several active adapters"
    return None if not names else _why_not(layer, names[0], x)


def adapted(layer: Any, weight: Tensor, bias: Tensor | None) -> tuple[Weight, Tensor | None]:
    """The weight (out, in) and bias of a LoRA layer's base with the adapter that is active, if one is."""
    names = active(layer)
    if not names:
        return weight, bias
    (name,) = names
    a, b, dropout, scaling = (of[name] for of in (layer.lora_A, layer.lora_B, layer.lora_dropout, layer.scaling))
    dropout_p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    magnitude = layer.lora_magnitude_vector[name].weight if name in layer.lora_variant else None
    if b.bias is not None:
        bias = (scaling * b.bias + (0.0 if bias is None else bias)).to(weight.dtype)
    squares = None if magnitude is None else kept_row_squares(layer, weight)
    return LoRAWeight(weight, a.weight, b.weight, scaling, dropout_p, None, magnitude, squares), bias


def takes_names(layer: Any, x: Tensor, adapter_names: Sequence[str]) -> bool:
    """Whether `named` computes a call in which each sample has the adapter of its name."""
    names = _named(layer, adapter_names)
    return (
        not layer.disable_adapters
        and not layer.merged
        and len(x) == len(adapter_names)
        and all(_why_not(layer, name, x) is None and name not in layer.lora_variant for name in names)
        and all(layer.lora_B[name].bias is None for name in names)
        and not any(layer.lora_dropout[name].training and getattr(layer.lora_dropout[name], "p", 0.0) for name in names)
        and len({layer.lora_A[name].weight.dtype for name in names}) <= 1
    )


def named(layer: Any, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
    """y = base(x) + (m * (x A^T)) B^T: each sample of x with the adapter of its name, all adapters in one product.

    A and B have all of the batch's adapters side by side, and m keeps of each sample the columns of its own. An adapter
    that is not finite makes all samples NaN.
    """
    y = layer.base_layer(x)
    names = _named(layer, adapter_names)
    if not names:
        return y
    a = torch.cat([layer.lora_A[name].weight for name in names])
    b = torch.cat([layer.scaling[name] * layer.lora_B[name].weight for name in names], 1)
    ranks = torch.tensor([layer.lora_A[name].weight.shape[0] for name in names])
    of_column = torch.arange(len(names)).repeat_interleave(ranks)
    of_sample = torch.tensor([names.index(name) if name in names else -1 for name in adapter_names])
    mask = (of_sample[:, None] == of_column).to(x.device)
    s = F.linear(x.to(a.dtype), a) * mask.view(len(mask), *(1,) * (x.dim() - 2), -1)
    return y + F.linear(s, b).to(y.dtype)


def saved_module(module: Any) -> Any:
    """The module that computes in this call where PEFT trains a copy of one (modules_to_save); else `module` itself."""
    kind = type(module)
    if kind.__name__ != "ModulesToSaveWrapper" or kind.__module__ != "peft.utils.other" or has_hooks(module):
        return module
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    copies, (name, *_) = module.modules_to_save, module.active_adapters
    return copies[name] if name in copies else module  # noqa: SIM401  a ModuleDict has no get


def active(layer: Any) -> list[str]:
    """The adapters that a call of the layer applies."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _named(layer: Any, adapter_names: Sequence[str]) -> list[str]:
    """The adapters of the layer that a batch names, once each."""
    return [name for name in dict.fromkeys(adapter_names) if name in layer.lora_A]


def _why_not(layer: Any, name: str, x: Tensor | None) -> str | None:
    base, a, b, dropout = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant).__name__ != "DoraLinearVariant":
        return f"an adapter of the kind {type(variant).__name__}"
    parts = [a, b, dropout] + ([] if variant is None else [layer.lora_magnitude_vector[name]])
    if any(map(has_hooks, parts)) or not is_plain_linear(a) or not is_plain_linear(b):
        return "an adapter with hooks or another kind of weight"
    if type(dropout) not in (nn.Dropout, nn.Identity) or getattr(dropout, "p", 0.0) >= 1.0:
        return "an adapter with dropout of another kind"
    dtypes = {values_dtype(base, x) or a.weight.dtype, torch.float32}
    if b.weight.dtype != a.weight.dtype or any(part.weight.dtype not in dtypes for part in (a, *parts[3:])):
        return "an adapter in a dtype that is neither its base's nor float32"
    return None
