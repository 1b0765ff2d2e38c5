"""What PEFT's files have beside adapters: modules trained whole (`modules_to_save`), biases, and frozen embeddings.

Their keys are the names of the tensors in the model with its adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memkernels.ops.checks import PLAIN_TENSORS


def tensors_beside(
    model: nn.Module, modules_to_save: Iterable[str], layers: Mapping[str, Any], bias: str
) -> dict[str, Tensor]:
    """By key, the tensors of the modules whose names end in one of these, and the biases that PEFT's `bias` trains.

    `layers`: by name, those that carry an adapter or are to.
    """
    ends = tuple(modules_to_save)
    found = {
        f"{name}.{key}": tensor
        for name, module in model.named_modules(remove_duplicate=False)
        if ends and name.endswith(ends)
        for key, tensor in module.state_dict(keep_vars=True).items()
    }
    if bias == "lora_only":
        found |= {f"{name}.base_layer.bias": layer.bias for name, layer in layers.items() if layer.bias is not None}
    elif bias == "all":
        found |= {_adapted_key(name, layers): tensor for name, tensor in all_biases(model).items()}
    return found


def all_biases(model: nn.Module) -> dict[str, Tensor]:
    """By name, what bias="all" of PEFT trains and writes: whatever is called so, buffers too."""
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if "bias" in name}


def bias_of(model: nn.Module, layers: Mapping[str, Any]) -> str:
    """PEFT's `bias` by which what is trained is: "all" where all are, one of them in a module that is else frozen.

    `layers`: by name, those that carry an adapter.
    """
    every = {name: of for name, of in all_biases(model).items() if isinstance(of, nn.Parameter)}
    if all(of.requires_grad for of in every.values()):
        adapted = {id(layer.bias) for layer in layers.values()}
        for name in (name for name, of in every.items() if id(of) not in adapted):
            module = model.get_submodule(name.rpartition(".")[0])
            if not all(of.requires_grad for of in module.parameters(recurse=False)):
                return "all"
    return "lora_only" if any(of.bias is not None and of.bias.requires_grad for of in layers.values()) else "none"


def are_tied(model: nn.Module, modules: Iterable[str]) -> bool:
    """Whether two of the modules have one parameter."""
    distinct = {model.get_submodule(name) for name in modules}
    owned = [id(of) for module in distinct for of in module.parameters(recurse=False)]
    return len(owned) != len(set(owned))


def embeddings_beside(model: nn.Module, layers: Container[str]) -> dict[str, Tensor]:
    """By key, the tensors of the embedding of tokens and of the output head, below adapters where they have one.

    PEFT writes them of a vocabulary that was extended, and of a head with an adapter.
    """
    ends: list[Any] = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            ends.append(getattr(model, get, lambda: None)())
        except NotImplementedError:  # transformers knows not which they are
            continue
    return {
        _adapted_key(f"{name}.{key}", layers): tensor
        for name, module in model.named_modules(remove_duplicate=False)
        if any(module is end for end in ends)
        for key, tensor in module.state_dict(keep_vars=True).items()
        if ".lora_" not in f".{key}"
    }


def has_extended_vocabulary(model: Any) -> bool:
    """Whether the configuration that the model came with, of a folder or of the Hub's cache, has another vocab_size."""
    config: Any = getattr(model, "config", None)
    name = getattr(model, "name_or_path", None)
    if not name or not hasattr(config, "get_text_config"):
        return False
    try:
        given = type(config).from_pretrained(name, local_files_only=True)
        sizes = [getattr(of.get_text_config(), "vocab_size", None) for of in (given, config)]
    except (OSError, ValueError):
        return False
    return sizes[0] != sizes[1]


def _adapted_key(name: str, layers: Container[str]) -> str:
    """The name that a tensor of a layer has once the layer carries an adapter, if it is among `layers`."""
    layer, _, key = name.rpartition(".")
    return f"{layer}.base_layer.{key}" if layer in layers else name


def trained_modules(model: nn.Module, adapted: Collection[str], others: Iterable[Tensor | None]) -> list[str]:
    """The modules that have trained parameters beside `others`, those of the `adapted` modules' adapters and biases.

    Raises:
        ValueError: PEFT cannot find one by its name, or save it whole; it is named.
    """
    known = {id(parameter) for parameter in others}
    names = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if any(of.requires_grad and id(of) not in known for of in module.parameters(recurse=False))
    ]
    every = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for name in names:
        tensors = model.get_submodule(name).state_dict(keep_vars=True).values()
        longer = [other for other in every if other.endswith(name) and other not in names]
        if not name or any(f"{of}.".startswith(f"{name}.") or name.startswith(f"{of}.") for of in adapted):
            reason = "with adapters"
        elif not all(type(tensor) in PLAIN_TENSORS for tensor in tensors):
            reason = "whose tensors are not all plain ones"
        elif longer:
            reason = f"in whose name that of {longer[0]} ends"
        else:
            continue
        raise ValueError(
            f"{name or type(model).__name__}: it has trained parameters beside adapters, which PEFT does not save of a "
            f"module {reason}: freeze them, by requires_grad_(False), to save the adapters alone."
        )
    return names


@torch.no_grad()
def fill_beside(model: nn.Module, tensors: Mapping[str, Tensor], trained: Container[str], tied: bool) -> None:
    """Puts the tensors into the model, those of `trained` to be so.

    Of these one that is also another module's stays that module's as it was, or if `tied` changes and trains with it.
    """
    for key, given in tensors.items():
        parent, _, name = key.rpartition(".")
        module = model.get_submodule(parent)
        own = getattr(module, name)
        if not tied and key in trained and isinstance(own, nn.Parameter) and not own.requires_grad:
            setattr(module, name, nn.Parameter(given.to(own.device, own.dtype)))
            continue
        own.copy_(given)
        if isinstance(own, nn.Parameter) and key in trained:
            own.requires_grad_(True)
