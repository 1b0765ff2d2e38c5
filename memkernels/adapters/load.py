"""`load_adapter`: PEFT's two files into a model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memkernels.adapters.beside import embeddings_beside, fill_beside, tensors_beside
from memkernels.adapters.config import AdapterConfig, read_config
from memkernels.adapters.experts import ExpertsPlace, adapted_experts, add_adapter, from_peft, targeted_places
from memkernels.adapters.layers import (
    adapted_layer,
    bases,
    check_layers,
    embeddings,
    folder_of,
    linear_layers,
    replace_layers,
)
from memkernels.adapters.targets import Targets
from memkernels.adapters.tensors import WEIGHTS, check_beside, check_tensors, key_of, read_tensors
from memkernels.adapters.tied import is_embedding_of, is_tied
from memkernels.nn.adapted_experts import ExpertsLoRA
from memkernels.nn.expert_mesh import held, own_part
from memkernels.nn.lora_embedding import LoRAEmbedding
from memkernels.nn.lora_layer import LoRALayer
from memkernels.nn.lora_linear import LoRALinear, shape_of
from memkernels.ops.checks import check_module


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> list[str]:
    """Puts the adapters that PEFT or `save_adapter` wrote into a model, in place; their parameters are trained.

    Everything is checked before anything is changed. The adapter keeps the file's dtype where that is the layer's or
    float32, and becomes float32 otherwise. What the file has trained beside them, modules whole (`modules_to_save`;
    with ensure_weight_tying what is tied to them too) and biases (`bias="lora_only"` or "all"), takes the model's
    place, and is trained too. With ensure_weight_tying a head and the embedding that it is tied to share one adapter,
    if the file's two are the same. Embeddings that it has frozen, of a head or an embedding with an adapter or of a
    vocabulary that was extended, are copied into the model's, which is extended before by
    `model.resize_token_embeddings`.

    Args:
        model: without adapters: they are put where the file has them, on layers that `memkernels.lora` takes,
            embeddings and bitsandbytes' among them, and by target_parameters on weights of experts, those of `nn.MoE`
            or of a module of transformers, which becomes an `nn.AdaptedExperts`; everything else is frozen. With
            adapters: on the same layers and of the same ranks as the file's, which take their place. Each rank of an
            `nn.MoE`'s `expert_mesh` takes the adapters of its experts.
        directory: holds adapter_config.json and adapter_model.safetensors.

    Returns:
        The names of the layers, and of the experts' weights, that carry an adapter.

    Raises:
        TypeError: model is not a torch.nn.Module, or directory no path; a layer whose weight cannot carry an adapter,
            as one in FP4.
        FileNotFoundError: a file is missing.
        ValueError: a file that is damaged, of another kind of adapter or of another model, has values that are not
            finite, or lacks tensors of a layer that target_modules name, or of a weight that target_parameters do; file
            and key are named. A layer with hooks or a forward of its own, which its adapter would drop; a parameter
            that is no weight of experts, or of experts that `ops.moe_mlp` does not compute. The model is as it was.
    """
    check_module(model)
    given = _read(folder_of(directory))
    config, tensors = given.config, given.tensors
    has_adapters = any(isinstance(module, (LoRALayer, ExpertsLoRA)) for module in model.modules())
    places = _checked_experts(model, given, has_adapters)
    layers = _checked_layers(model, given, [name for name in tensors if name not in places], has_adapters)
    heads = _checked_heads(model, given, layers)
    trained = _checked_beside(model, given, layers, [*layers, *(place.owner for place in places.values())])
    if not has_adapters:
        read = bases(model, layers.values())
        adapted: dict[Any, LoRALinear | LoRAEmbedding] = {}
        for name in sorted(layers, key=lambda name: name in heads):  # heads after what they are tied to
            tied_to = adapted[layers[heads[name]]] if name in heads else None
            adapted[layers[name]] = adapted_layer(
                read[layers[name]], config.rank_of(name), tied_to=tied_to, use_dora=config.use_dora
            )
        for place in places.values():
            add_adapter(model, place, config.rank_of(place.name))
        replace_layers(model, adapted)
        layers = {name: adapted[layer] for name, layer in layers.items()}
    for name, layer in layers.items():
        _fill_layer(layer, config, name, tensors[name])
    for place, adapter in adapted_experts(model).items():
        _fill_experts(adapter, config, place, model, tensors[place.layer])
    fill_beside(model, given.others, trained, config.ensure_weight_tying)
    return [*layers, *(place.name for place in places.values())]


@dataclass(frozen=True)
class _Given:
    """What the files say; `tensors` by their names of layers, `others` beside adapters by their own."""

    config: AdapterConfig
    targets: Targets
    file: Path
    tensors: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]

    def at(self, layer: str, kind: str = "lora_A") -> str:
        """File and key, for errors."""
        return f"{self.file}: {key_of(layer, kind)}"


def _read(directory: Path) -> _Given:
    config, targets = read_config(directory)
    return _Given(config, targets, directory / WEIGHTS, *read_tensors(directory / WEIGHTS))


def _checked_layers(model: nn.Module, given: _Given, names: list[str], has_adapters: bool) -> dict[str, Any]:
    """By name, the layers that the file has adapters of: `names`."""
    config = given.config
    present = {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    plain = linear_layers(model) | embeddings(model)
    layers: dict[str, Any] = present if has_adapters else plain
    for name in names:
        if name not in layers:
            kind = "layer with an adapter" if has_adapters else "linear layer or embedding"
            at = given.at(name, next(iter(given.tensors[name])))
            raise ValueError(f"{at}: {type(model).__name__} has no {kind} {name!r}.")
        check_tensors(given.file, name, given.tensors[name], _shapes(config, name, layers[name]))
    for name, layer in present.items():
        if name not in names:
            raise ValueError(f"{given.at(name, next(iter(_shapes(config, name, layer))))}: missing.")
        _check_rank(name, layer, config)
        if layer.use_dora != config.use_dora or layer.merged:
            raise ValueError(f"model: {name}: expected an adapter with use_dora={config.use_dora} that is not merged.")
    for name, layer in plain.items():
        if name not in names and given.targets.have(name):
            kind = next(iter(_shapes(config, name, layer)))
            raise ValueError(f"{given.at(name, kind)}: missing, though target_modules names the layer.")
    layers = {name: layers[name] for name in names}
    if not has_adapters:
        check_layers(layers)
    return layers


def _checked_heads(model: nn.Module, given: _Given, layers: dict[str, Any]) -> dict[str, str]:
    """By name, the heads that are to have, or have, the adapter of an embedding, and the embedding's name."""
    heads: dict[str, str] = {}
    names = {layer: name for name, layer in layers.items()}
    for name, layer in layers.items():
        if is_tied(layer):
            heads[name] = names[layer.tied_to]
            if not _are_transposed(given, name, heads[name]):
                raise ValueError(f"{given.at(name)}: expected that of {heads[name]}, as the model's, transposed.")
        elif given.config.ensure_weight_tying and not given.config.use_dora and type(layer) is nn.Linear:
            of = next((other for other in layers.values() if is_embedding_of(other, layer.weight)), None)
            if of is not None and _are_transposed(given, name, names[of]):
                heads[name] = names[of]
    return heads


def _are_transposed(given: _Given, head: str, embedding: str) -> bool:
    a, b = (given.tensors[head][kind] for kind in ("lora_A", "lora_B"))
    of_a, of_b = (given.tensors[embedding][kind] for kind in ("lora_embedding_A", "lora_embedding_B"))
    return torch.equal(a, of_b.t()) and torch.equal(b, of_a.t())


def _checked_experts(model: nn.Module, given: _Given, has_adapters: bool) -> dict[str, ExpertsPlace]:
    """By the file's names of layers, the weights of experts that it has adapters of."""
    config = given.config
    present = {place.name: adapter for place, adapter in adapted_experts(model).items()}
    places = {place.layer: place for place in targeted_places(model, given.targets.target_parameters or ())}
    for layer, place in places.items():
        reason = place.why_not(model)
        if reason is not None:
            raise ValueError(f"{given.at(layer)}: {place.name} carries no adapter: {reason}.")
        if layer not in given.tensors:
            raise ValueError(f"{given.at(layer)}: missing, though target_parameters has {place.name}.")
        check_tensors(given.file, layer, given.tensors[layer], place.shapes(model, config.rank_of(place.name)))
        adapter = present.pop(place.name, None)
        if adapter is not None:
            _check_rank(place.name, adapter, config)
            if adapter.merged:
                raise ValueError(f"model: {place.name}: expected an adapter that is not merged.")
        elif has_adapters:
            raise ValueError(f"{given.at(layer)}: the model has no adapter of {place.name}.")
    for name in present:
        raise ValueError(f"{given.file}: expected an adapter of {name}, as the model has, found none.")
    return places


def _checked_beside(model: nn.Module, given: _Given, layers: dict[str, Any], adapted: list[str]) -> dict[str, Tensor]:
    """By key, what the file trains beside the adapters on `layers`, which are not within it.

    Frozen embeddings it may have besides.
    """
    expected = tensors_beside(model, given.targets.modules_to_save or (), layers, given.config.bias)
    for name in adapted:
        within = next(
            (key for key in expected if key.startswith(f"{name}.") and key != f"{name}.base_layer.bias"), None
        )
        if within is not None:
            raise ValueError(f"{given.at(name)}: expected no adapter of what modules_to_save names: {within}.")
    check_beside(given.file, given.others, expected, embeddings_beside(model, layers))
    return expected


def _check_rank(name: str, adapter: LoRALayer | ExpertsLoRA, config: AdapterConfig) -> None:
    if adapter.r != config.rank_of(name):
        raise ValueError(
            f"model: {name}: expected an adapter of rank {config.rank_of(name)}, as the file's, got {adapter.r}."
        )


def _shapes(config: AdapterConfig, name: str, layer: Any) -> dict[str, tuple[int, ...]]:
    r = config.rank_of(name)
    if isinstance(layer, nn.Embedding):
        k, n = layer.weight.shape
    else:
        n, k = layer.weight.shape if isinstance(layer, LoRALayer) else shape_of(layer)
    kinds = "lora_embedding_" if isinstance(layer, (nn.Embedding, LoRAEmbedding)) else "lora_"
    shapes: dict[str, tuple[int, ...]] = {f"{kinds}A": (r, k), f"{kinds}B": (n, r)}
    return shapes | ({"lora_magnitude_vector": (n,)} if config.use_dora else {})


def _fill_layer(layer: LoRALayer, config: AdapterConfig, name: str, tensors: dict[str, Tensor]) -> None:
    layer.alpha, layer.use_rslora = config.alpha_of(name), config.use_rslora
    if isinstance(layer, LoRALinear):
        layer.dropout_p = config.lora_dropout
    _fill(layer.adapter, tensors, layer.weight.dtype)


def _fill_experts(
    adapter: ExpertsLoRA, config: AdapterConfig, place: ExpertsPlace, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    adapter.alpha, adapter.use_rslora = config.alpha_of(place.name), config.use_rslora
    factors = from_peft(place.num_experts(model), adapter.r, tensors)
    _fill(dict(adapter.named_parameters()), factors, place.value(model).dtype, adapter.expert_mesh)


@torch.no_grad()
def _fill(
    parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], base_dtype: torch.dtype, expert_mesh=None
) -> None:
    for kind, parameter in parameters.items():
        dtype = tensors[kind].dtype
        if dtype not in (base_dtype, torch.float32):
            dtype = torch.promote_types(base_dtype, torch.float32)
        if dtype != parameter.dtype:
            parameter.data = parameter.data.to(dtype)
        held(parameter, expert_mesh).copy_(own_part(tensors[kind], expert_mesh))
