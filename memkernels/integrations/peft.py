"""PEFT: its LoRA layers by `ops.lora_linear`; as the weights of a block op they are never called."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memkernels.integrations.bitsandbytes import is_layer
from memkernels.integrations.family import CustomFamily, Family, family_of
from memkernels.integrations.linears import weight_and_bias, why_not
from memkernels.integrations.peft_lora import active, is_lora, named, takes_names
from memkernels.integrations.replacement import Replacement, bind
from memkernels.ops.lora_linear.op import adapted_linear
from memkernels.ops.lora_linear.weight import LoRAWeight


def plan(module: Any, recompute: str, loss: bool) -> Replacement | None:
    kind = type(module)
    if is_lora(module):
        return Replacement("LoRA adapter", bind(lora_forward, module), why_not(module))
    if kind.__module__ == "peft.tuners.lora.layer" and kind.__name__ == "ParamWrapper":
        left = _why_multiplied_out(module)
        return None if left is None else Replacement("adapter", left=left)
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


def _why_multiplied_out(wrapper: Any) -> str | None:
    """Why PEFT's adapter of a parameter (target_parameters) is not left factored by `experts.experts_forward`."""
    base = wrapper.get_base_layer()
    family = family_of(base)
    if not isinstance(family, Family) or type(base) is not family.experts or family.experts_left is not None:
        return "an adapter of a parameter that is no weight of experts that memkernels computes"
    if wrapper.num_experts == 1:
        return "an adapter of one expert alone"
    return "several active adapters" if len(active(wrapper)) > 1 else None


FAMILY = CustomFamily(plan)
