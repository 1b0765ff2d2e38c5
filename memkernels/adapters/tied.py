"""Adapters of tied weights, PEFT's `ensure_weight_tying`: one for an embedding and the heads that have its weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from memkernels.nn.lora_linear import LoRALinear


def is_tied(layer: Any) -> bool:
    """Whether its adapter is that of an embedding."""
    return isinstance(layer, LoRALinear) and layer.tied_to is not None


def is_embedding_of(layer: Any, weight: Tensor) -> bool:
    """Whether it is an embedding, without an adapter, of this weight."""
    return isinstance(layer, nn.Embedding) and layer.weight is weight


def tied_heads(model: nn.Module) -> tuple[str, nn.Embedding, dict[str, nn.Linear]]:
    """The embedding of tokens and its name, and by name the linear layers, without adapters, of its weight.

    Raises:
        ValueError: there is no such embedding, or no such layer, or its weight is one of another kind of module's too.
    """
    kind = type(model).__name__
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    if name is None or not isinstance(embedding, nn.Embedding):
        raise ValueError(f"ensure_weight_tying: {kind} has no embedding that get_input_embeddings() finds.")
    others = {
        other: module
        for other, module in model.named_modules()
        if module is not embedding and any(of is embedding.weight for of in module.parameters(recurse=False))
    }
    for other, module in others.items():
        if type(module) is not nn.Linear:
            raise ValueError(f"ensure_weight_tying: {other} has {name}'s weight, and is no torch.nn.Linear.")
    if not others:
        raise ValueError(f"ensure_weight_tying: {kind} has no linear layer of {name}'s weight.")
    return name, embedding, others  # type: ignore[return-value]
