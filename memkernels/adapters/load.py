"""`load_adapter`: PEFT's two files into a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memkernels.adapters.config import AdapterConfig, read_config
from memkernels.adapters.layers import bases, check_layers, linear_layers, replace_layers
from memkernels.adapters.tensors import WEIGHTS, check_tensors, key_of, read_tensors
from memkernels.nn.lora_linear import LoRALinear, shape_of
from memkernels.ops.checks import check_module


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> list[str]:
    """Puts the adapters that PEFT or `save_adapter` wrote into a model, in place; their parameters are trained.

    Everything is checked before anything is changed. The adapter keeps the file's dtype where that is the layer's or
    float32, and becomes float32 otherwise.

    Args:
        model: without adapters: they are put where the file has them, on layers that `memkernels.lora` takes,
            bitsandbytes' among them, and everything else is frozen. With adapters of
            `memkernels.lora`: on the same layers and of the same ranks as the file's, which take their place.
        directory: holds adapter_config.json and adapter_model.safetensors.

    Returns:
        The names of the layers that carry an adapter.

    Raises:
        TypeError: model is not a torch.nn.Module; a layer whose weight cannot carry an adapter, as one in FP4.
        FileNotFoundError: a file is missing.
        ValueError: a file that is damaged, of another kind of adapter or of another model, has values that are not
            finite, or lacks tensors of a layer that target_modules name; file and key are named. A layer with hooks or
            a forward of its own, which its adapter would drop. The model is as it was.
    """
    check_module(model)
    (config, targets), file = read_config(Path(directory)), Path(directory) / WEIGHTS
    tensors = read_tensors(file)
    present = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    plain = linear_layers(model)
    layers: dict[str, Any] = present or plain
    for name, of in tensors.items():
        if name not in layers:
            kind = "layer with an adapter" if present else "linear layer"
            raise ValueError(f"{file}: {key_of(name, next(iter(of)))}: {type(model).__name__} has no {kind} {name!r}.")
        check_tensors(file, name, of, _shapes(config, name, layers[name]))
    for name, layer in present.items():
        if name not in tensors:
            raise ValueError(f"{file}: {key_of(name, 'lora_A')}: missing.")
        if layer.r != config.rank_of(name):
            raise ValueError(
                f"model: {name}: expected an adapter of rank {config.rank_of(name)}, as the file's, got {layer.r}."
            )
        if layer.use_dora != config.use_dora or layer.merged:
            raise ValueError(f"model: {name}: expected an adapter with use_dora={config.use_dora} that is not merged.")
    for name in plain:
        if name not in tensors and targets.have(name):
            raise ValueError(f"{file}: {key_of(name, 'lora_A')}: missing, though target_modules names the layer.")
    if not present:
        check_layers({name: layers[name] for name in tensors})
        read = bases(model, (layers[name] for name in tensors))
        adapted = {layers[name]: _adapted(read[layers[name]], config, name) for name in tensors}
        replace_layers(model, adapted)
        layers = {name: adapted[layers[name]] for name in tensors}
    for name, of in tensors.items():
        _fill(layers[name], config, name, of)
    return list(tensors)


def _shapes(config: AdapterConfig, name: str, layer: Any) -> dict[str, tuple[int, ...]]:
    r = config.rank_of(name)
    n, k = layer.weight.shape if isinstance(layer, LoRALinear) else shape_of(layer)
    return {"lora_A": (r, k), "lora_B": (n, r)} | ({"lora_magnitude_vector": (n,)} if config.use_dora else {})


def _adapted(layer: Any, config: AdapterConfig, name: str) -> LoRALinear:
    return LoRALinear(layer, config.rank_of(name), use_dora=config.use_dora).train(layer.training)


@torch.no_grad()
def _fill(layer: LoRALinear, config: AdapterConfig, name: str, tensors: dict[str, Tensor]) -> None:
    layer.alpha, layer.dropout_p, layer.use_rslora = config.alpha_of(name), config.lora_dropout, config.use_rslora
    for kind, parameter in layer.adapter.items():
        dtype = tensors[kind].dtype
        if dtype not in (layer.weight.dtype, torch.float32):
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        if dtype != parameter.dtype:
            parameter.data = parameter.data.to(dtype)
        parameter.copy_(tensors[kind])
