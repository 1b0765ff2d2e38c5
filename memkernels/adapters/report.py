"""What `lora` did to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from memkernels.nn.lora_linear import LoRALinear
from memkernels.ops.quantized.tensor import QuantizedTensor


@dataclass(frozen=True)
class LoRAReport:
    """What `lora` did; print it.

    Args:
        model: class of the model.
        adapted: the names of the layers that now carry an adapter.
        trained: the adapters' parameters, which alone are trained.
        quantized: the names of those layers whose weight is quantised.
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
            stored, dense = (f"{size / 1e6:.4g} MB" for size in (self.stored_bytes, self.dense_bytes))
            text += f"; {len(self.quantized)} of them over quantised weights: {stored}, dense {dense}"
        if self.left:
            text += f"; left as they are: {len(self.left)} layers or parameters of other kinds, {self.left[0]} first"
        return text


def report_of(model: nn.Module, adapted: Mapping[str, LoRALinear], left: Sequence[str]) -> LoRAReport:
    """`left`: layers, beside parameters of more than two dimensions."""
    trained = sum(parameter.numel() for layer in adapted.values() for parameter in layer.adapter.values())
    weights = {name: layer.weight for name, layer in adapted.items() if isinstance(layer.weight, QuantizedTensor)}
    stored = sum(part.nbytes for weight in weights.values() for part in weight.parts)
    dense = sum(weight.numel() * weight.dtype.itemsize for weight in weights.values())
    stacked = [name for name, parameter in model.named_parameters() if parameter.dim() > 2]
    return LoRAReport(type(model).__name__, list(adapted), trained, list(weights), stored, dense, [*left, *stacked])
