"""What PEFT's files have beside adapters: modules trained whole (`modules_to_save`), and biases of adapted layers.

Their keys are the names of the tensors in the model with its adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memkernels.ops.checks import PLAIN_TENSORS


def tensors_beside(
    model: nn.Module, modules_to_save: Iterable[str], layers: Mapping[str, Any], biases: bool
) -> dict[str, Tensor]:
    """By key, the tensors of the modules whose names end in one of these and, with `biases`, the biases of `layers`.

    `layers`: by name, those that carry an adapter or are to.
    """
    ends = tuple(modules_to_save)
    found = {
        f"{name}.{key}": tensor
        for name, module in model.named_modules(remove_duplicate=False)
        if ends and name.endswith(ends)
        for key, tensor in module.state_dict(keep_vars=True).items()
    }
    if biases:
        found |= {f"{name}.base_layer.bias": layer.bias for name, layer in layers.items() if layer.bias is not None}
    return found


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
def fill_beside(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts the tensors into the model, trained; one that is also another module's stays that module's."""
    for key, given in tensors.items():
        parent, _, name = key.rpartition(".")
        module = model.get_submodule(parent)
        own = getattr(module, name)
        if isinstance(own, nn.Parameter) and not own.requires_grad:
            setattr(module, name, nn.Parameter(given.to(own.device, own.dtype)))
        else:
            own.copy_(given)
