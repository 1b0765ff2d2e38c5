"""What `lora` did to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from memkernels.adapters.experts import adapted_experts
from memkernels.memory_size import format_bytes
from memkernels.nn.adapted_experts import ExpertsLoRA
from memkernels.nn.lora_layer import LoRALayer
from memkernels.ops.quantized.tensor import QuantizedTensor


@dataclass(frozen=True)
class LoRAReport:
    """What `lora` did; print it.

    Args:
        model: class of the model.
        adapted: the names of the layers, and of the experts' weights, that now carry an adapter.
        trained: the adapters' parameters, which alone are trained.
        quantized: the names of those whose weight is quantised.
        stored_bytes: that their weights take.
        dense_bytes: that they would take as dense ones.
        left: what carries no adapter and is stored as it was: the names of targets that look like linear layers and are
            of a class that takes none, and of parameters of three or more dimensions, as experts' are that are one
            tensor.
    """

    model: str
    adapted: list[str]
    trained: int
    quantized: list[str]
    stored_bytes: int
    dense_bytes: int
    left: list[str]

    def __str__(self) -> str:
        text = f"{self.model}: {len(self.adapted)} layers with adapters, {self.trained / 1e6:.3g} million parameters"
        if self.quantized:
            stored, dense = map(format_bytes, (self.stored_bytes, self.dense_bytes))
            text += f"; {len(self.quantized)} of them over quantised weights: {stored}, dense {dense}"
        if self.left:
            text += f"; left as they are: {len(self.left)} layers or parameters of other kinds, {self.left[0]} first"
        return text


def report_of(model: nn.Module, adapted: Mapping[str, LoRALayer], left: Sequence[str]) -> LoRAReport:
    """`adapted`, `left`: layers. Experts' weights, adapted or not, are found in the model."""
    experts = adapted_experts(model)
    adapters = [*(layer.adapter.values() for layer in adapted.values()), *(of.parameters() for of in experts.values())]
    trained = sum(parameter.numel() for of in adapters for parameter in of)
    bases = {name: layer.weight for name, layer in adapted.items()}
    bases |= {place.name: place.value(model) for place in experts}
    weights = {name: weight for name, weight in bases.items() if isinstance(weight, QuantizedTensor)}
    stored = sum(part.nbytes for weight in weights.values() for part in weight.parts)
    dense = sum(weight.numel() * weight.dtype.itemsize for weight in weights.values())
    stacked = [
        name
        for owner, module in model.named_modules()
        if not isinstance(module, ExpertsLoRA)
        for name, parameter in module.named_parameters(owner, recurse=False)
        if parameter.dim() > 2 and name not in bases
    ]
    return LoRAReport(type(model).__name__, list(bases), trained, list(weights), stored, dense, [*left, *stacked])
