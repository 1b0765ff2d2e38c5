"""The optimizers that a plan may have, by name, and which of them trains which parameters."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from torch import Tensor

from memkernels.optim import SGD, Adafactor, AdamW, Lion, Muon
from memkernels.optim.optimizer import LowMemoryOptimizer

OPTIMIZERS: dict[str, tuple[type[LowMemoryOptimizer], dict[str, Any]]] = {
    "adamw": (AdamW, {}), "lion": (Lion, {}), "sgd": (SGD, {"momentum": 0.9}), "adafactor": (Adafactor, {}),
    "muon": (Muon, {}),
}  # fmt: skip


def make_optimizers(
    name: str, trained: Sequence[Tensor], in_layers: Container[Tensor], **storage: Any
) -> list[LowMemoryOptimizer]:
    """Those that train `trained`: one, or Muon for the matrices within layers and AdamW for all else.

    Args:
        storage: state_bits and rounding.
    """
    kind, options = OPTIMIZERS[name]
    if kind is not Muon:
        return [kind(trained, **options, **storage)]
    matrices = {parameter for parameter in trained if parameter.dim() == 2 and parameter in in_layers}
    divided = {Muon: [p for p in trained if p in matrices], AdamW: [p for p in trained if p not in matrices]}
    return [of(parameters, **storage) for of, parameters in divided.items() if parameters]
