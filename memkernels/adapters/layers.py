"""The linear layers and embeddings of a model, and those of them that carry an adapter."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from memkernels.adapters.experts import adapted_experts
from memkernels.adapters.targets import matches
from memkernels.integrations import bitsandbytes
from memkernels.integrations.plain import is_own
from memkernels.nn.adapted_experts import ExpertsLoRA
from memkernels.nn.lora_embedding import LoRAEmbedding, check_embedding
from memkernels.nn.lora_layer import LoRALayer
from memkernels.nn.lora_linear import LoRALinear, check_base_weight, is_adaptable
from memkernels.ops.checks import PLAIN_TENSORS, check_module

ALL_LINEAR = "all-linear"


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear | LoRAEmbedding]:
    """By name, the linear layers and embeddings that carry an adapter.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: there is none, and none on experts.
    """
    check_module(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (LoRALinear, LoRAEmbedding))}
    if not layers and not adapted_experts(model):
        raise ValueError(
            f"model: found no LoRALinear or LoRAEmbedding in {type(model).__name__}; memkernels.lora puts them there."
        )
    return layers


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """By name, the layers that may carry one, and do not."""
    return {name: module for name, module in _outside(model) if is_adaptable(module)}


def embeddings(model: nn.Module) -> dict[str, nn.Embedding]:
    """By name, those that carry no adapter; of what classes ever, which `check_layers` checks."""
    return {name: module for name, module in _outside(model) if isinstance(module, nn.Embedding)}


def _outside(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules below the model that are not within a layer with an adapter."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LoRALayer))
    return ((name, of) for name, of in model.named_modules() if name and not name.startswith(inside))


def folder_of(directory: Any) -> Path:
    """
    Raises:
        TypeError: it is no path.
    """
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"directory: expected a folder's path, got {directory!r}.")
    return Path(directory)


def names_of(argument: str, names: Any) -> list[str]:
    """One name or several, as a list.

    Raises:
        TypeError: something else.
    """
    listed = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]
    for name in listed:
        if not isinstance(name, str):
            raise TypeError(f"{argument}: expected names, got {name!r}.")
    return listed


def chosen_layers(model: nn.Module, targets: str | Iterable[str]) -> dict[str, Any]:
    """By name, the layers that `targets` name; "all-linear": every linear one but a language model's output head.

    Raises:
        ValueError: a target that matches no layer, or no layer at all.
    """
    layers = linear_layers(model)
    if targets == ALL_LINEAR:
        output: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = output()
        chosen = {name: layer for name, layer in layers.items() if layer is not head}
        if not chosen:
            raise ValueError(f"targets: {type(model).__name__} has no linear layer.")
        return chosen
    wanted, layers = names_of("targets", targets), layers | embeddings(model)
    for target in wanted:
        if not any(matches(name, [target]) for name in layers):
            raise ValueError(f"targets: {type(model).__name__} has no linear layer or embedding {target!r}.")
    return {name: layer for name, layer in layers.items() if matches(name, wanted)}


def other_linears(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """The names of what `targets` name and looks like a linear layer, of classes that carry no adapter."""
    return [
        name
        for name, module in model.named_modules()
        if hasattr(module, "in_features")
        and hasattr(module, "out_features")
        and not is_adaptable(module)
        and (targets == ALL_LINEAR or matches(name, names_of("targets", targets)))
    ]


def check_layers(layers: Mapping[str, Any]) -> None:
    """That each may carry an adapter, under which its tensors are read and it is never called.

    Raises:
        TypeError: a weight that is not of a floating dtype, or one of bitsandbytes that cannot be read; an embedding of
            another class than LoRAEmbedding takes; it is named.
        ValueError: a layer with hooks, or with a forward of its own; an embedding with an option that LoRAEmbedding has
            not; it is named.
    """
    for name, layer in layers.items():
        (check_embedding if isinstance(layer, nn.Embedding) else check_base_weight)(name, layer)
        if not is_own(layer):
            raise ValueError(
                f"{name}: expected a layer without hooks and with its class's forward, since an adapter's layer reads "
                "its tensors and never calls it."
            )


def bases(model: nn.Module, layers: Iterable[Any]) -> dict[Any, Any]:
    """By layer, the one that its adapter goes on: itself, or what reads a weight of bitsandbytes where it is.

    The values of such a weight come in the dtype of the model's first plain parameter, which is that of its inputs:
    compute_dtype may be another, and so may be that of the checkpoint.
    """
    dtype = next((of.dtype for of in model.parameters() if type(of) in PLAIN_TENSORS and of.is_floating_point()), None)
    return {layer: bitsandbytes.as_linear(layer, dtype) if bitsandbytes.is_layer(layer) else layer for layer in layers}


def adapted_layer(
    layer: Any, r: int, *, dropout: float = 0.0, tied_to: Any = None, **options: Any
) -> LoRALinear | LoRAEmbedding:
    """A layer of `bases` with a new adapter, in its mode; options: alpha, use_dora and use_rslora."""
    if isinstance(layer, nn.Embedding):
        return LoRAEmbedding(layer, r, **options).train(layer.training)
    return LoRALinear(layer, r, dropout=dropout, tied_to=tied_to, **options).train(layer.training)


def replace_layers(model: nn.Module, adapted: Mapping[nn.Module, LoRALayer]) -> None:
    """Puts each adapted layer wherever the layer is that it adapts, and freezes every other parameter."""
    for parent in list(model.modules()):
        if not isinstance(parent, LoRALayer):
            for name, child in list(parent._modules.items()):
                if child is not None and child in adapted:
                    setattr(parent, name, adapted[child])
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LoRALayer):
            for parameter in module.adapter.values():
                parameter.requires_grad_(True)
        elif isinstance(module, ExpertsLoRA):
            module.requires_grad_(True)
