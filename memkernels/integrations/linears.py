"""Linear modules whose tensors an op may take: torch.nn.Linear, Conv1D and bitsandbytes' in NF4 and int8.

Plain, or with an adapter, ours or PEFT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from memkernels.integrations import bitsandbytes, peft_lora
from memkernels.integrations.plain import has_foreign_forward, has_hooks, is_plain_linear, replaced_slot
from memkernels.nn import linears
from memkernels.nn.lora_linear import LoRALinear
from memkernels.ops.lora_linear.weight import LoRAWeight
from memkernels.ops.quantized.tensor import QuantizedTensor
from memkernels.ops.weights import Weight


def is_linear(module: Any, x: Tensor | None = None, *, in_parts: bool = False) -> bool:
    """Whether an op may take the module's tensors in this call with x, with `in_parts` by `parts`, and not call it.

    Without x, as before any call, it is that for which the module was made.
    """
    if in_parts and not _has_parts(module):
        return False
    if not _is_adapted(module):
        return _is_plain(module, x)
    foreign = has_foreign_forward(module) and replaced_slot(module) is None
    return not foreign and not has_hooks(module) and why_not(module, x) is None


def is_head(module: Any) -> bool:
    """`is_linear` for whatever x of the weight's dtype, which one of bitsandbytes' has not."""
    return not bitsandbytes.is_layer(_base(module)) and is_linear(module)


def why_not(layer: Any, x: Tensor | None = None) -> str | None:
    """Why no op may take the tensors of a layer with an adapter in this call with x; None where one may."""
    base = layer.base_layer
    if not _is_plain(base, x):
        of_weight = bitsandbytes.why_not(base, x) if bitsandbytes.is_layer(base) else None
        return f"an adapter of a base with {of_weight or 'hooks or another kind of weight'}"
    return None if type(layer) is LoRALinear else peft_lora.why_not(layer, x)


def weight_and_bias(module: Any, x: Tensor) -> tuple[Weight, Tensor | None]:
    """What an op takes of a module that `is_linear` in a call with x: weight, (out, in), with any adapter, and bias."""
    if type(module) is LoRALinear:
        return linears.weight_and_bias(module)
    base = _base(module)
    weight: Tensor
    if bitsandbytes.is_layer(base):
        weight, bias = bitsandbytes.weight_and_bias(base, x)
    else:
        weight, bias = base.weight.t() if type(base) is Conv1D else base.weight, base.bias
    return peft_lora.adapted(module, weight, bias) if peft_lora.is_lora(module) else (weight, bias)


def parts(module: Any, x: Tensor, sizes: Sequence[int]) -> list[tuple[Weight, Tensor | None]]:
    """`weight_and_bias` of one module that computes several projections at once, of `sizes` outputs."""
    weight, bias = weight_and_bias(module, x)
    weights = weight.split(sizes) if isinstance(weight, LoRAWeight) else weight.split(list(sizes))
    biases = [None] * len(sizes) if bias is None else bias.split(list(sizes))
    return list(zip(weights, biases, strict=True))


def _is_adapted(module: Any) -> bool:
    return type(module) is LoRALinear or peft_lora.is_lora(module)


def _base(module: Any) -> Any:
    return module.base_layer if _is_adapted(module) else module


def _has_parts(module: Any) -> bool:
    base = _base(module)
    if bitsandbytes.is_layer(base):
        return bitsandbytes.has_whole_rows(base)
    return not isinstance(base.weight, QuantizedTensor) or base.weight.encoding.has_whole_rows


def _is_plain(module: Any, x: Tensor | None) -> bool:
    if bitsandbytes.is_layer(module):
        return not has_hooks(module) and not has_foreign_forward(module) and bitsandbytes.why_not(module, x) is None
    return is_plain_linear(module, nn.Linear, quantized=True) or is_plain_linear(module, Conv1D)
