"""Adapters of experts' weights, PEFT's `target_parameters`: where they are in a model, and their layout in its file.

PEFT wraps a module of experts once for each such weight, in the module's order, so that a key has ".base_layer" for
each wrapper outside of its own. There lora_A is (E r, in), the rows of an expert together, and lora_B (out, r E), the
columns of an index of the rank together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memkernels._library import FLOATING
from memkernels.adapters.base import replace_module
from memkernels.adapters.targets import matches
from memkernels.integrations.plain import is_own
from memkernels.nn.adapted_experts import AdaptedExperts, ExpertsLoRA
from memkernels.nn.expert_mesh import gathered, held
from memkernels.nn.moe import MoE
from memkernels.optim.agreement import on_all

_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertsPlace:
    """A weight of experts that has an adapter, or is to have one.

    Args:
        owner: the name of the module that has the weight.
        weight: the weight's name there.
        layer: by which PEFT's file has the adapter.
    """

    owner: str
    weight: str
    layer: str

    @property
    def name(self) -> str:
        return _name(self.owner, self.weight)

    def module(self, model: nn.Module) -> Any:
        return model.get_submodule(self.owner)

    def value(self, model: nn.Module) -> Tensor:
        return getattr(self.module(model), self.weight)

    def num_experts(self, model: nn.Module) -> int:
        """Of all ranks."""
        owner = self.module(model)
        return owner.router.num_experts if isinstance(owner, MoE) else self.value(model).shape[0]

    def set_value(self, model: nn.Module, weight: Tensor) -> None:
        """Puts a frozen weight in the place of its own, if it is another."""
        if weight is not self.value(model):
            setattr(self.module(model), self.weight, nn.Parameter(weight, requires_grad=False))

    def why_not(self, model: nn.Module) -> str | None:
        """Why it can carry no adapter; None where it can."""
        owner = self.module(model)
        of_transformers = hasattr(owner, "is_concatenated")
        if not (of_transformers or isinstance(owner, (AdaptedExperts, MoE))) or self.weight not in _WEIGHTS:
            return "it is no weight of experts"
        dtype = self.value(model).dtype
        if dtype not in (*FLOATING, torch.float64):
            return f"its dtype is {dtype}"
        if not of_transformers:
            return None
        if not is_own(owner):
            return f"its {type(owner).__name__} has hooks, or a forward of its own"
        from memkernels.integrations.experts import why_not  # imports transformers, whose experts these are

        return why_not(owner)

    def shapes(self, model: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        """Of the file's tensors."""
        experts, (_, out, size) = self.num_experts(model), self.value(model).shape
        return {"lora_A": (experts * r, size), "lora_B": (out, r * experts)}


def adapted_experts(model: nn.Module) -> dict[ExpertsPlace, ExpertsLoRA]:
    """The weights of experts that carry an adapter, and it."""
    places = _places(model, lambda owner, of, weight: isinstance(of, (AdaptedExperts, MoE)) and weight in of.adapters)
    return {place: place.module(model).adapters[place.weight] for place in places}


def targeted_places(model: nn.Module, targets: Iterable[str]) -> list[ExpertsPlace]:
    """The parameters that `target_parameters` names, as PEFT finds them."""
    targets = list(targets)
    return _places(model, lambda owner, of, weight: matches(_name(owner, weight), targets))


def chosen_places(model: nn.Module, targets: Iterable[str]) -> list[ExpertsPlace]:
    """`targeted_places` of targets that each name one, where an adapter may be.

    Raises:
        ValueError: a target that names no parameter, or one that is no weight of experts that memkernels computes.
    """
    targets = list(targets)
    places = targeted_places(model, targets)
    for target in targets:
        if not any(matches(place.name, [target]) for place in places):
            raise ValueError(f"target_parameters: {type(model).__name__} has no parameter {target!r}.")
    for place in places:
        reason = place.why_not(model)
        if getattr(place.module(model), "expert_mesh", None) is not None:
            reason = "its experts are on several ranks, which nn.MoE.adapt gives adapters"
        if reason is not None:
            raise ValueError(f"target_parameters: {place.name} carries no adapter: {reason}.")
    return places


def add_adapter(model: nn.Module, place: ExpertsPlace, r: int, **options: Any) -> None:
    """Puts an adapter there; a module of transformers becomes an `nn.AdaptedExperts` with its weights.

    options: of `nn.ExpertsLoRA`.
    """
    owner = place.module(model)
    if not isinstance(owner, (AdaptedExperts, MoE)):
        owner = _replace(model, owner)
    mesh = getattr(owner, "expert_mesh", None)
    owner.adapters[place.weight] = ExpertsLoRA(held(getattr(owner, place.weight), mesh), r, expert_mesh=mesh, **options)


def meshes_of(adapters: Iterable[ExpertsLoRA]) -> list[Any]:
    """Those whose ranks hold adapted experts, each once."""
    return list(dict.fromkeys(of.expert_mesh for of in adapters if of.expert_mesh is not None))


def on_ranks_of(meshes: Iterable[Any], function: Callable[[], Any]) -> None:
    """function() on the ranks of meshes, which all call it; where it raises on one, every rank raises."""
    for mesh in meshes:
        function = partial(on_all, mesh.get_group(), function)
    function()


def to_peft(adapter: ExpertsLoRA) -> dict[str, Tensor]:
    """Its factors as PEFT's file has them; of experts on several ranks, which all call it, those of all."""
    a, b = (gathered(factor.detach(), adapter.expert_mesh) for factor in (adapter.lora_A, adapter.lora_B))
    return {"lora_A": a.flatten(0, 1), "lora_B": b.permute(1, 2, 0).flatten(1)}


def from_peft(experts: int, r: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors (E, r, in) and (E, out, r) of those of the file."""
    a, b = tensors["lora_A"], tensors["lora_B"]
    return {"lora_A": a.unflatten(0, (experts, r)), "lora_B": b.unflatten(1, (r, experts)).permute(2, 0, 1)}


def _places(model: nn.Module, is_chosen: Callable[[str, nn.Module, str], bool]) -> list[ExpertsPlace]:
    places = []
    for owner, module in model.named_modules():
        weights = [name for name, _ in module.named_parameters(recurse=False) if is_chosen(owner, module, name)]
        for index, weight in enumerate(weights):
            places.append(ExpertsPlace(owner, weight, owner + ".base_layer" * (len(weights) - 1 - index)))
    return places


def _name(owner: str, weight: str) -> str:
    return f"{owner}.{weight}" if owner else weight


def _replace(model: nn.Module, experts: Any) -> AdaptedExperts:
    from memkernels.integrations.mlp import activation_name

    activation = activation_name(experts.act_fn)
    assert activation is not None
    gate_up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    adapted = AdaptedExperts(
        gate_up, experts.down_proj, activation, gated=experts.has_gate, replaced_class=type(experts)
    ).train(experts.training)
    replace_module(model, experts, adapted)
    return adapted
