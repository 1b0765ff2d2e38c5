"""`merge_adapter` and `unmerge_adapter`: adapters into the weights and out again, a tile of one layer at a time."""

from __future__ import annotations

from torch import nn

from memkernels.adapters.layers import adapted_layers


def merge_adapter(model: nn.Module) -> None:
    """Merges every adapter of a model into its layer's weight: W = g (W + scaling B A), rounded to W's dtype once.

    In place, by `nn.LoRALinear.merge`; above the model are needed a tile of rows and, with DoRA, a few rows a layer. A
    quantised weight becomes a dense one, layer by layer, so that the model grows to its dense size, and is kept beside.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: it has no adapter, one that is merged already, or one that is not finite; the layer is named. The
            model is unchanged.
    """
    layers = adapted_layers(model)
    for name, layer in layers.items():
        try:
            layer.merged_scale()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for layer in layers.values():
        layer.merge()


def unmerge_adapter(model: nn.Module) -> None:
    """Takes every adapter of a model out of its layer's weight again, to the weight's rounding.

    Quantised weights are put back exactly.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: it has no adapter, or one that is not merged; the layer is named. The model is unchanged.
    """
    layers = adapted_layers(model)
    for name, layer in layers.items():
        if not layer.merged:
            raise ValueError(f"{name}: its adapter is not merged.")
    for layer in layers.values():
        layer.unmerge()
