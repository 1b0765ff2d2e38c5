"""`save_adapter`: the adapters of a model as PEFT's two files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from memkernels.adapters.beside import (
    all_biases,
    are_tied,
    bias_of,
    embeddings_beside,
    has_extended_vocabulary,
    tensors_beside,
    trained_modules,
)
from memkernels.adapters.config import FILE, AdapterConfig
from memkernels.adapters.experts import ExpertsPlace, adapted_experts, meshes_of, on_ranks_of, to_peft
from memkernels.adapters.layers import adapted_layers, folder_of
from memkernels.adapters.targets import Targets, matches
from memkernels.adapters.tensors import WEIGHTS, key_beside, key_of
from memkernels.adapters.tied import is_tied
from memkernels.atomic import write_together
from memkernels.nn.adapted_experts import ExpertsLoRA
from memkernels.nn.lora_embedding import LoRAEmbedding
from memkernels.nn.lora_layer import LoRALayer
from memkernels.nn.lora_linear import LoRALinear, is_conv1d
from memkernels.ops.quantized.tensor import QuantizedTensor


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which PEFT reads: `peft.PeftModel.from_pretrained`.

    What else of the model is trained is written too: biases of adapted layers, or all there are, and modules with other
    parameters that require a gradient, whole (`modules_to_save`). So are embeddings where the model's
    configuration has another vocabulary than the one that it was made from. ensure_weight_tying is set where two of
    the modules are one parameter, or a head has the adapter of its embedding, which is written for both.

    Both are written beside their places and then moved there, adapter_config.json last and the old one taken away
    first: where it is, the two are of one call.

    Args:
        model: has adapters, by `memkernels.lora` or `load_adapter`. Where they are of experts on several ranks
            (`nn.MoE` with `expert_mesh`), all ranks call it; the first gathers and writes those of all, and the others
            return when it has.
        directory: where to; made if there is none.

    Raises:
        TypeError: model is not a torch.nn.Module, or directory no path.
        ValueError: it has no adapter, or adapters that one configuration of PEFT's cannot tell, or is trained in a
            module that PEFT cannot save; with `expert_mesh`, the first rank raised, whose error is named. Nothing is
            written.
    """
    from safetensors.torch import save_file

    folder = folder_of(directory)
    layers, experts = adapted_layers(model), adapted_experts(model)
    bias = bias_of(model, layers)
    config = _config({**layers, **{place.name: adapter for place, adapter in experts.items()}}, bias)
    owners = [*layers, *(place.owner for place in experts)]
    known = [of for layer in layers.values() for of in (*layer.adapter.values(), layer.bias)]
    known += [of for adapter in experts.values() for of in adapter.parameters()]
    if bias == "all":
        known += all_biases(model).values()
    modules = trained_modules(model, owners, known)
    beside = tensors_beside(model, modules, layers, bias)
    if has_extended_vocabulary(model):
        beside = _embeddings(model, layers) | beside
    tied = are_tied(model, modules) or any(map(is_tied, layers.values()))
    config = replace(config, ensure_weight_tying=tied)
    conv = any(is_conv1d(layer.base_layer) for layer in layers.values())
    targets = Targets(
        _targets(model, layers.keys()),
        target_parameters=_parameters(model, experts, conv) or None,
        modules_to_save=modules or None,
    )
    text = config.to_json(targets, fan_in_fan_out=conv, base_model=_name(model))
    tensors = {
        key_of(name, kind): parameter.detach().contiguous()
        for name, layer in layers.items()
        for kind, parameter in _adapter(layer).items()
    } | {
        key_of(place.layer, kind): tensor.contiguous()
        for place, adapter in experts.items()
        for kind, tensor in to_peft(adapter).items()
    }
    tensors |= {key_beside(name): tensor.detach().clone() for name, tensor in beside.items()}  # two may be one memory
    meshes = meshes_of(experts.values())

    def write() -> None:
        if any(mesh.get_local_rank() for mesh in meshes):
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_together({
            folder / WEIGHTS: lambda file: save_file(tensors, file, metadata={"format": "pt"}),
            folder / FILE: lambda file: file.write_text(text, encoding="utf-8"),
        })  # fmt: skip

    on_ranks_of(meshes, write)


def _adapter(layer: LoRALinear | LoRAEmbedding) -> Mapping[str, Tensor]:
    """By kind, the tensors that PEFT's file has of a layer; of a tied head those of the embedding's, transposed."""
    return dict(zip(("lora_A", "lora_B"), layer.factors, strict=True)) if is_tied(layer) else layer.adapter


def _embeddings(model: nn.Module, layers: Mapping[str, LoRALayer]) -> dict[str, Tensor]:
    """By key, embeddings as dense tensors without adapters."""
    found = embeddings_beside(model, layers)
    for name, layer in layers.items():
        if layer.merged and any(key.startswith(f"{name}.") for key in found):
            raise ValueError(f"{name}: expected an adapter that is not merged, since its base is saved too.")
    return {key: of.dequantize() if isinstance(of, QuantizedTensor) else of for key, of in found.items()}


def _config(layers: Mapping[str, LoRALayer | ExpertsLoRA], bias: str) -> AdapterConfig:
    """One configuration of every adapter, with patterns where rank or alpha are not the first one's."""
    first = next(iter(layers.values()))
    options: dict[str, Any] = {"dropout_p": 0.0}
    for option in ("dropout_p", "use_dora", "use_rslora"):
        values = {name: getattr(layer, option) for name, layer in layers.items() if hasattr(layer, option)}
        for name, value in values.items():  # an embedding has no dropout
            first_name = next(iter(values))
            if value != values[first_name]:
                raise ValueError(f"{name}: {option}: expected that of {first_name}, as PEFT's configuration has one.")
            options[option] = value
    return AdapterConfig(
        first.r, first.alpha, options["dropout_p"], options["use_dora"], options["use_rslora"], bias,
        rank_pattern={_whole(name): layer.r for name, layer in layers.items() if layer.r != first.r},
        alpha_pattern={_whole(name): layer.alpha for name, layer in layers.items() if layer.alpha != first.alpha},
    )  # fmt: skip


def _whole(name: str) -> str:
    """A pattern of this name alone, and of none that ends in it."""
    return f"^{re.escape(name)}"


def _targets(model: nn.Module, layers: Set[str]) -> list[str] | str:
    """The layers' names; a regular expression of them where PEFT would find other modules that end in one."""
    names = sorted(layers)
    inside = tuple(f"{name}." for name in names)
    others = {name for name, _ in model.named_modules() if not name.startswith(inside)} - layers
    return "|".join(map(re.escape, names)) if any(matches(other, names) for other in others) else names


def _parameters(model: nn.Module, places: Iterable[ExpertsPlace], conv: bool) -> list[str]:
    """The names of experts' weights, by which PEFT finds these and no others."""
    names = sorted(place.name for place in places)
    if any(not place.owner for place in places):
        raise ValueError(f"{names[0]}: expected experts within a model, since PEFT wraps their module, got the model.")
    if names and conv:
        raise ValueError(f"{names[0]}: expected no adapter of a Conv1D beside it, for which PEFT has fan_in_fan_out.")
    others = {name for name, _ in model.named_parameters()} - set(names)
    for name in names:
        if any(matches(other, [name]) for other in others):
            raise ValueError(f"{name}: expected a name that is no other's end, by which PEFT can find the parameter.")
    return names


def _name(model: nn.Module) -> str | None:
    return getattr(model, "name_or_path", None) or None
