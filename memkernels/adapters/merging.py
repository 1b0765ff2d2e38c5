"""`merge_adapter` and `unmerge_adapter`: adapters into the weights and out again, a tile of one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from torch import Tensor, nn

from memkernels.adapters.experts import adapted_experts, meshes_of, on_ranks_of
from memkernels.adapters.layers import adapted_layers
from memkernels.adapters.tied import is_tied
from memkernels.ops.quantized.tensor import QuantizedTensor
from memkernels.optim.local import local_of


def merge_adapter(model: nn.Module) -> None:
    """Merges every adapter of a model into its layer's weight: W = g (W + scaling B A), rounded to W's dtype once.

    In place, by the layers' `merge` and `nn.ExpertsLoRA.merge`, one for an embedding and a head that is tied to it and
    to its adapter (ensure_weight_tying); above the model are needed a tile of rows and, with
    DoRA, a few rows a layer. A quantised weight becomes a dense one, layer by layer, so that the model grows to its
    dense size, and is kept beside. Where experts are on several ranks (`nn.MoE` with `expert_mesh`), all ranks call it,
    and each merges what it holds.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: it has no adapter, one that is merged already, or one that is not finite; a dense weight that is
            also another layer's, as that of a head which is tied to the embedding is, and its adapter not. The layers
            are named. With `expert_mesh`, another rank raised, whose error is named. The model is unchanged.
    """
    layers, experts = adapted_layers(model), adapted_experts(model)
    checks: dict[str, Callable] = {name: layer.merged_scale for name, layer in layers.items()}
    checks |= {place.name: adapter.check_merge for place, adapter in experts.items()}

    def check() -> None:
        for name, of_adapter in checks.items():
            try:
                of_adapter()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        adapted = [layer.base_layer.weight for layer in layers.values()] + [place.value(model) for place in experts]
        _check_own_weights(model, adapted, [of.base_layer for of in layers.values() if is_tied(of)])

    on_ranks_of(meshes_of(experts.values()), check)
    for layer in layers.values():
        if not is_tied(layer):
            layer.merge()
    for place, adapter in experts.items():
        place.set_value(model, adapter.merge(place.value(model)))


def unmerge_adapter(model: nn.Module) -> None:
    """Takes every adapter of a model out of its layer's weight again, to the weight's rounding.

    Quantised weights are put back exactly. Experts on several ranks as in `merge_adapter`.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: it has no adapter, or one that is not merged; the layer is named. The model is unchanged.
    """
    layers, experts = adapted_layers(model), adapted_experts(model)
    for name, of in [*layers.items(), *((place.name, adapter) for place, adapter in experts.items())]:
        if not of.merged:
            raise ValueError(f"{name}: its adapter is not merged.")
    for layer in layers.values():
        if not is_tied(layer):
            layer.unmerge()
    for place, adapter in experts.items():
        place.set_value(model, adapter.unmerge(place.value(model)))


def _check_own_weights(model: nn.Module, weights: Iterable[Tensor], tied: Collection[nn.Module]) -> None:
    """That no dense weight under an adapter, which a merge writes in place, is also another module's.

    tied: those that a merge of what has their weight is for.
    """
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if any(module is of for of in tied):
            continue
        for key, parameter in module.named_parameters(name, recurse=False):
            if not isinstance(parameter, QuantizedTensor) and parameter.numel():
                holders.setdefault(local_of(parameter).data_ptr(), []).append(key)
    for weight in weights:
        names = [] if isinstance(weight, QuantizedTensor) else holders.get(local_of(weight).data_ptr(), [])
        if len(names) > 1:
            raise ValueError(
                f"{' and '.join(names)}: expected a weight of each layer's own, got one that a merge would change for "
                "all: give the layer with the adapter a copy, a torch.nn.Parameter, and untie them in the model's "
                "configuration."
            )
