"""The stack of decoder layers: masks told instead of built, and no cache that nobody asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memkernels.integrations.family import Family
from memkernels.integrations.masks import has_cache, stack_of, tells, told_mask
from memkernels.integrations.replacement import Replacement, argument_names, bind, by_name


def plan_model(model: nn.Module, family: Family) -> Replacement:
    return Replacement("stack of layers", bind(model_forward, model, family=family, names=argument_names(model)))


def model_forward(model: Any, *args, family: Family, names: tuple[str, ...], **kwargs) -> Any:
    """Causal attention, within windows and packed sequences too, without an (S, S) mask where no token is hidden.

    In training no cache unless the call asks for one, as transformers has it under gradient checkpointing: its
    configurations ask for one by default, and attention that fills a cache cannot be computed again.
    A base model around the stack is told a mask for each type of layer. Where nothing can be told, packed sequences are
    masked that the model would not look for.
    """
    stack = stack_of(model)
    kwargs |= by_name(names, args)
    asked = kwargs.get("use_cache") is not None or has_cache(kwargs)
    if model.training and torch.is_grad_enabled() and not asked:
        kwargs["use_cache"] = False
    given = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    if given is not None and tells(stack, family, kwargs):
        positions = kwargs.get("position_ids")
        if family.sequence_positions is not None:
            positions = family.sequence_positions(positions)
        mask = told_mask(kwargs.get("attention_mask"), positions, given.shape[:2])
        if mask is not None:
            kwargs["attention_mask"] = mask if stack is model else dict.fromkeys(stack.config.layer_types, mask)
    if family.packed_masks is not None and given is not None and _is_without_mask(model, kwargs):
        dtype = getattr(model, family.embeddings).weight.dtype if given is kwargs.get("input_ids") else given.dtype
        positions = kwargs["position_ids"].expand(given.shape[0], -1)
        kwargs["attention_mask"] = family.packed_masks(model, positions, dtype)
    return type(model).forward(model, **kwargs)


def _is_without_mask(model: Any, kwargs: dict) -> bool:
    """Whether, as transformers reads them, position_ids say which sequences are packed."""
    use_cache = model.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
    return (
        kwargs.get("position_ids") is not None
        and kwargs.get("attention_mask") is None
        and not use_cache
        and not has_cache(kwargs)
        and model.config._attn_implementation == "eager"
    )
