"""`lora`: adapters put into a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from memkernels.adapters.layers import check_module, linear_layers, matches, replace_layers
from memkernels.nn.lora_linear import LoRALinear, check_adapter

ALL_LINEAR = "all-linear"


def lora(
    model: nn.Module,
    r: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.05,
    targets: str | Iterable[str] = ALL_LINEAR,
    *,
    use_dora: bool = False,
    use_rslora: bool = False,
) -> list[str]:
    """Puts a low-rank adapter on linear layers of a model, in place, and freezes everything else.

    Each becomes an `nn.LoRALinear`: y = x W^T + scaling (m * x) A^T B^T, at first the layer's own y.
    `memkernels.patch`, before or after, takes the adapters into its block ops. `save_adapter` writes what PEFT reads.

    Args:
        model: holds the layers, torch.nn.Linear or transformers' Conv1D.
        r: rank, from 1 up.
        alpha: scaling is alpha / r, with use_rslora alpha / sqrt(r).
        dropout: probability with which an element of A's input is dropped in training, in [0, 1).
        targets: names of layers, or what their names end in after a dot ("q_proj"); "all-linear": every one but a
            language model's output head.
        use_dora: weight-decomposed adapters.
        use_rslora: rank-stabilised scaling.

    Returns:
        The names of the layers that now carry an adapter.

    Raises:
        TypeError: model is not a torch.nn.Module, or a layer's weight is not of a floating dtype.
        ValueError: r or dropout is out of its range; a target that matches no layer, or no layer at all; a model with
            adapters already. It is unchanged.
    """
    check_module(model)
    check_adapter(r, dropout)
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError(f"model: {type(model).__name__} has adapters already.")
    layers = _chosen(model, targets)
    options: dict[str, Any] = {"alpha": alpha, "dropout": dropout, "use_dora": use_dora, "use_rslora": use_rslora}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        adapted = {layer: LoRALinear(layer, r, **options) for layer in layers.values()}
    except Exception:
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    for layer, of in adapted.items():
        of.train(layer.training)
    replace_layers(model, adapted)
    return list(layers)


def _chosen(model: nn.Module, targets: str | Iterable[str]) -> dict[str, nn.Module]:
    layers = linear_layers(model)
    if targets == ALL_LINEAR:
        output: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = output()
        chosen = {name: layer for name, layer in layers.items() if layer is not head}
        if not chosen:
            raise ValueError(f"targets: {type(model).__name__} has no linear layer.")
        return chosen
    wanted = [targets] if isinstance(targets, str) else list(targets)
    for target in wanted:
        if not any(matches(name, [target]) for name in layers):
            raise ValueError(f"targets: {type(model).__name__} has no linear layer {target!r}.")
    return {name: layer for name, layer in layers.items() if matches(name, wanted)}
