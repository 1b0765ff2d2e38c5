"""PEFT: its LoRA layers by `ops.lora_linear`; as the weights of a block op they are never called."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memkernels.integrations.bitsandbytes import is_layer
from memkernels.integrations.family import CustomFamily
from memkernels.integrations.linears import weight_and_bias, why_not
from memkernels.integrations.peft_lora import is_lora, named, takes_names
from memkernels.integrations.replacement import Replacement, bind
from memkernels.ops.lora_linear.op import adapted_linear
from memkernels.ops.lora_linear.weight import LoRAWeight


def plan(module: Any, recompute: str, loss: bool) -> Replacement | None:
    kind = type(module)
    if is_lora(module):
        return Replacement("LoRA adapter", bind(lora_forward, module), why_not(module))
    if hasattr(module, "adapter_layer_names"):
        return Replacement("adapter", left=f"memkernels fuses no adapter of {kind.__module__}.{kind.__name__}")
    return None


def lora_forward(layer: Any, x: Tensor, *args, **kwargs) -> Tensor:
    """`ops.lora_linear` where it computes what the call asks for, else PEFT's."""
    if not args and kwargs.keys() == {"adapter_names"} and takes_names(layer, x, kwargs["adapter_names"]):
        return named(layer, x, kwargs["adapter_names"])
    if args or kwargs or why_not(layer, x) is not None:
        return type(layer).forward(layer, x, *args, **kwargs)
    weight, bias = weight_and_bias(layer, x)
    if not isinstance(weight, LoRAWeight):
        return layer.base_layer(x)
    y = adapted_linear(x, weight, bias)
    return y.to(x.dtype) if is_layer(layer.base_layer) else y  # under autocast too, as bitsandbytes returns it


FAMILY = CustomFamily(plan)
