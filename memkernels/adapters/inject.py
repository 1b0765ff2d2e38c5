"""`lora`: adapters put into a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from memkernels.adapters.base import (
    check_base,
    check_quantizable,
    check_quantizable_weight,
    quantize_experts,
    quantize_layers,
)
from memkernels.adapters.experts import ExpertsPlace, add_adapter, chosen_places
from memkernels.adapters.layers import (
    ALL_LINEAR,
    adapted_layer,
    bases,
    check_layers,
    chosen_layers,
    names_of,
    other_linears,
    replace_layers,
)
from memkernels.adapters.report import LoRAReport, report_of
from memkernels.adapters.tied import tied_heads
from memkernels.nn.lora_layer import check_adapter
from memkernels.ops.checks import check_module


def lora(
    model: nn.Module,
    r: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.05,
    targets: str | Iterable[str] = ALL_LINEAR,
    base: str | None = None,
    *,
    target_parameters: Iterable[str] = (),
    use_dora: bool = False,
    use_rslora: bool = False,
    ensure_weight_tying: bool = False,
) -> LoRAReport:
    """Puts a low-rank adapter on linear layers and embeddings of a model, in place, and freezes everything else.

    Each becomes an `nn.LoRALinear`, y = x W^T + scaling (m * x) A^T B^T, or an `nn.LoRAEmbedding`,
    y = W[ids] + scaling A[:, ids]^T B^T; at first y is the layer's own.
    `memkernels.patch`, before or after, takes the adapters into its block ops. `save_adapter` writes what PEFT reads.

    Args:
        model: holds the layers: torch.nn.Linear, transformers' Conv1D, or bitsandbytes' Linear4bit in NF4 and
            Linear8bitLt, whose weights then count as `memkernels.quant`'s, in the same memory.
        r: rank, from 1 up.
        alpha: scaling is alpha / r, with use_rslora alpha / sqrt(r).
        dropout: probability with which an element of A's input is dropped in training, in [0, 1).
        targets: names of linear layers and embeddings, or what they end in after a dot ("q_proj", "embed_tokens");
            "all-linear": every linear one but a language model's output head.
        target_parameters: names of experts' weights that are one parameter, or what they end in after a dot
            ("experts.down_proj"), of `nn.MoE` or of a module of transformers, which becomes an `nn.AdaptedExperts`.
            Their adapters have no dropout and no use_dora. Those that are not named are in the report, as left.
        base: "nf4" quantises the weights under the adapters (QLoRA: Dettmers et al. 2023, arXiv 2305.14314), by
            `quant.quantize_nf4`, one after the other: each dense weight is freed before the next is quantised, unless
            something else holds it. A weight that is quantised already stays as it is, and so does an embedding's.
            None: the weights as they are.
        use_dora: weight-decomposed adapters.
        use_rslora: rank-stabilised scaling.
        ensure_weight_tying: the model's embedding of tokens and the heads that have its weight get one adapter, where
            targets name one of them. Without it an adapter is of the layers that are named alone.

    Returns:
        A report: the names of the layers, and of the experts' weights, that now carry an adapter, what their weights
        take, and what was left.

    Raises:
        TypeError: model is not a torch.nn.Module; r is no int, alpha or dropout no number, or a target no name; a
            layer's weight is not of a floating dtype or, with base, not a plain tensor of float32, bfloat16 or float16;
            one of bitsandbytes that cannot be read where it is, as one in FP4 or not quantised yet.
        ValueError: r, alpha or dropout is out of its range, or base unknown; a target that matches no layer or no
            weight of experts, or no layer at all; dropout or use_dora beside target_parameters; a layer with hooks or a
            forward of its own, which its adapter would drop; experts that `ops.moe_mlp` does not compute; a model with
            adapters already; with base, a weight that is not finite; an embedding with max_norm, scale_grad_by_freq or
            sparse; ensure_weight_tying beside use_dora, or where no head is tied, or none of them named. The model is
            unchanged.
    """
    check_module(model)
    check_adapter(r, alpha, dropout)
    check_base(base)
    if any(hasattr(module, of) for module in model.modules() for of in ("lora_A", "lora_embedding_A")):
        raise ValueError(f"model: {type(model).__name__} has adapters already.")
    targets = targets if targets == ALL_LINEAR else names_of("targets", targets)
    parameters = names_of("target_parameters", target_parameters)
    if not targets and not parameters:
        raise ValueError("targets: expected at least one name, got none.")
    layers, left = chosen_layers(model, targets), other_linears(model, targets)
    heads = _tied_heads(model, layers, use_dora) if ensure_weight_tying else {}
    check_layers(layers)
    places = _chosen_experts(model, parameters, dropout, use_dora)
    options: dict[str, Any] = {"alpha": alpha, "dropout": dropout, "use_dora": use_dora, "use_rslora": use_rslora}
    if base is not None:
        dense = {name: layer for name, layer in layers.items() if not isinstance(layer, nn.Embedding)}
        check_quantizable(dense)
        for place in places:
            check_quantizable_weight(place.name, place.value(model))
        quantize_layers(model, dense)
        layers = {name: model.get_submodule(name) for name in layers}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        adapted = {layer: adapted_layer(of, r, **options) for layer, of in bases(model, layers.values()).items()}
        for head, embedding in heads.items():
            layers[head] = model.get_submodule(head)
            adapted[layers[head]] = adapted_layer(layers[head], r, tied_to=adapted[embedding], **options)
    except Exception:
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    for place in places:
        add_adapter(model, place, r, alpha=alpha, use_rslora=use_rslora)
        if base is not None:
            quantize_experts(place.module(model), place.weight)
    replace_layers(model, adapted)
    return report_of(model, {name: adapted[layer] for name, layer in layers.items()}, left)


def _tied_heads(model: nn.Module, layers: dict[str, Any], use_dora: bool) -> dict[str, nn.Embedding]:
    """By name, the heads that share the adapter of an embedding, and it; it is among `layers` then and they are not."""
    if use_dora:
        raise ValueError("use_dora: expected none beside ensure_weight_tying, got True.")
    name, embedding, heads = tied_heads(model)
    if name not in layers and not layers.keys() & heads.keys():
        raise ValueError(f"ensure_weight_tying: expected {' or '.join((name, *heads))} among targets.")
    for head in heads:
        layers.pop(head, None)
    layers[name] = embedding
    check_layers(heads)
    return dict.fromkeys(heads, embedding)


def _chosen_experts(model: nn.Module, targets: list[str], dropout: float, use_dora: bool) -> list[ExpertsPlace]:
    for name, value in (("dropout", dropout), ("use_dora", use_dora)) if targets else ():
        if value:
            raise ValueError(f"{name}: expected none beside target_parameters, as adapters of experts have none.")
    return chosen_places(model, targets)
