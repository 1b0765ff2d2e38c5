"""Linear modules whose tensors an op may take: torch.nn.Linear and Conv1D, plain or with an adapter, ours or PEFT's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from memkernels.integrations import peft_lora
from memkernels.integrations.plain import has_foreign_forward, has_hooks, is_plain_linear, replaced_slot
from memkernels.nn import linears
from memkernels.nn.lora_linear import LoRALinear
from memkernels.ops.lora_linear.weight import LoRAWeight
from memkernels.ops.quantized.tensor import QuantizedTensor
from memkernels.ops.weights import Weight


def is_linear(module: Any, *, in_parts: bool = False) -> bool:
    """Whether an op may take the module's tensors in this call, with `in_parts` by `parts`, and not call it."""
    if in_parts and not _has_parts(module):
        return False
    if not _is_adapted(module):
        return _is_plain(module)
    foreign = has_foreign_forward(module) and replaced_slot(module) is None
    return not foreign and not has_hooks(module) and why_not(module) is None


def why_not(layer: Any) -> str | None:
    """Why no op may take the tensors of a layer with an adapter in this call; None where one may."""
    if not _is_plain(layer.base_layer):
        return "an adapter of a base with hooks or another kind of weight"
    return None if type(layer) is LoRALinear else peft_lora.why_not(layer)


def weight_and_bias(module: Any) -> tuple[Weight, Tensor | None]:
    """What an op takes of a module that `is_linear`: its weight, (out, in), with its adapter if it has one."""
    if type(module) is LoRALinear:
        return linears.weight_and_bias(module)
    base = module.base_layer if peft_lora.is_lora(module) else module
    weight, bias = base.weight.t() if type(base) is Conv1D else base.weight, base.bias
    return peft_lora.adapted(module, weight, bias) if peft_lora.is_lora(module) else (weight, bias)


def parts(module: Any, sizes: Sequence[int]) -> list[tuple[Weight, Tensor | None]]:
    """`weight_and_bias` of one module that computes several projections at once, of `sizes` outputs."""
    weight, bias = weight_and_bias(module)
    weights = weight.split(sizes) if isinstance(weight, LoRAWeight) else weight.split(list(sizes))
    biases = [None] * len(sizes) if bias is None else bias.split(list(sizes))
    return list(zip(weights, biases, strict=True))


def _is_adapted(module: Any) -> bool:
    return type(module) is LoRALinear or peft_lora.is_lora(module)


def _has_parts(module: Any) -> bool:
    weight = (module.base_layer if _is_adapted(module) else module).weight
    return not isinstance(weight, QuantizedTensor) or weight.encoding.has_whole_rows


def _is_plain(module: Any) -> bool:
    return is_plain_linear(module, nn.Linear, quantized=True) or is_plain_linear(module, Conv1D)
