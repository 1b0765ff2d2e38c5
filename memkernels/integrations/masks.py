"""Masks told instead of built: which tokens see each other, as starts of sequences and not as an (S, S) mask.

transformers passes an `attention_mask` of four dimensions on to its attention modules as it is. A told mask is such a
tensor, of int32: (1, 1, 0, 0) says that each row is one sequence, and (1, 1, longest, B + 1) repeats, as a view, the
starts of the B sequences that the flattened rows hold, and their end. Attention is causal within each, and windows are
the attention module's own. Only modules that `patch` replaced are ever given one.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from memkernels._library import has_kernel
from memkernels.integrations.family import Family
from memkernels.integrations.plain import has_foreign_forward, has_hooks, replaced_slot

IMPLEMENTATIONS = ("sdpa", "eager")  # of attention, which `ops.attention` may stand in for
CACHES = ("cache", "past_key_values")  # what transformers calls a cache, and what it called it before


def has_cache(kwargs: dict) -> bool:
    return any(kwargs.get(name) is not None for name in CACHES)


def stack_of(base_model: Any) -> Any:
    """The stack of layers in a base model, which may have others beside it, or be it."""
    return getattr(base_model, "language_model", base_model)


def tells(model: Any, family: Family, kwargs: dict) -> bool:
    """Whether every attention module of this call would understand a told mask, and no token sees a later one.

    The call is to the stack of layers `model`, or to the base model around it.
    """
    of_tokens = getattr(model, family.embeddings)
    embeddings = of_tokens.weight if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    use_cache, output_attentions = (
        getattr(model.config, name) if kwargs.get(name) is None else kwargs[name]
        for name in ("use_cache", "output_attentions")
    )
    return (
        model.config._attn_implementation in IMPLEMENTATIONS
        and not use_cache
        and not has_cache(kwargs)
        and kwargs.get("encoder_hidden_states") is None
        and not output_attentions
        and kwargs.get("is_causal") is not False
        and not (family.image_types and _may_have_images(kwargs.get("token_type_ids")))
        and has_kernel("attention_fwd", embeddings)
        and all(_understands(layer, family) for layer in getattr(model, family.layers))
    )


def _may_have_images(types: Tensor | None) -> bool:
    return types is not None and (torch.compiler.is_compiling() or bool((types == 1).any()))


def _understands(layer: Any, family: Family) -> bool:
    attention = getattr(layer, family.self_attention)
    return (
        type(attention) is family.attention
        and replaced_slot(attention) is not None
        and bool(attention.is_causal)
        and not has_hooks(attention)
        and (replaced_slot(layer) is not None or not has_foreign_forward(layer))
    )


def told_mask(
    attention_mask: Tensor | dict[str, Tensor | None] | None, position_ids: Tensor | None, shape: tuple[int, int]
) -> Tensor | None:
    """The told mask of (rows, length) tokens; None where the mask hides tokens, or what it says is not known yet.

    Masks by type of layer, which transformers takes as they are, may show later tokens too: nothing is told of them.
    As transformers reads position_ids: without an attention_mask a sequence begins where they do not rise by one.
    """
    if torch.compiler.is_compiling() and (attention_mask is not None or position_ids is not None):
        return None
    if attention_mask is not None and not (_is_of_tokens(attention_mask) and bool(attention_mask.all())):
        return None
    device = None if position_ids is None else position_ids.device
    one_a_row = torch.empty(1, 1, 0, 0, dtype=torch.int32, device=device)
    if attention_mask is not None or position_ids is None:
        return one_a_row
    if position_ids.dim() != 2:
        return None
    begins = begins_of(position_ids.expand(shape))
    starts = begins.flatten().nonzero().flatten()
    if starts.shape[0] == shape[0]:
        return one_a_row
    starts = torch.cat((starts, starts.new_tensor([begins.numel()]))).int()
    return starts.expand(1, 1, int(starts.diff().max()), -1)


def _is_of_tokens(mask: Any) -> TypeGuard[Tensor]:
    """Whether a mask is (B, S), which tokens are padding, and says no more."""
    return isinstance(mask, Tensor) and mask.dim() == 2


def is_told(mask: Any) -> TypeGuard[Tensor]:
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.int32


def begins_of(position_ids: Tensor) -> Tensor:
    """Which tokens of (B, S) begin a packed sequence: the first, and those where position_ids do not rise by one."""
    return position_ids.diff(prepend=position_ids[:, :1]) != 1


def sequences(mask: Tensor) -> tuple[Tensor, int] | None:
    """Starts and longest of the packed sequences of a told mask; None: each row is one."""
    return None if mask.shape[3] == 0 else (mask[0, 0, 0], mask.shape[2])


def without_padding(model: Any, family: Family, kwargs: dict, target: Tensor, ignore_index: int) -> tuple[dict, Tensor]:
    """The arguments of a base model and its target as one row of packed sequences, told by position_ids.

    As they are where nothing is padded or all is, where it is not on the right, where a padded position has a target,
    or where every row is padded and the rotary embedding is stretched by the longest, padding included.
    """
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    others = (kwargs.get(name) is not None for name in ("position_ids", "inputs_embeds"))
    if not _is_of_tokens(mask) or ids is None or any(others) or torch.compiler.is_compiling():
        return kwargs, target
    visible = mask.to(ids.device, torch.bool)
    padded_right = (visible[:, 1:] <= visible[:, :-1]).all() & visible.any() & ~visible.all()
    if not bool(padded_right & ((target == ignore_index) | visible).all()):
        return kwargs, target
    if _stretches_by_length(stack_of(model)) and not bool(visible[:, -1].any()):
        return kwargs, target
    counted = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    positions = counted if family.positions is None else family.positions(model, kwargs)
    positions = positions[..., visible].unsqueeze(-2)
    packed = {"input_ids": ids[visible][None], "position_ids": positions, "attention_mask": None}
    if kwargs.get("token_type_ids") is not None:
        packed["token_type_ids"] = kwargs["token_type_ids"].expand(ids.shape)[visible][None]
    return kwargs | packed, target[visible][None]


def _stretches_by_length(model: Any) -> bool:
    """Whether the frequencies of the rotary embedding depend on the longest position of the call."""
    kinds = getattr(getattr(model, "rotary_emb", None), "rope_type", None)
    return not {"dynamic", "longrope"}.isdisjoint(kinds.values() if isinstance(kinds, dict) else (kinds,))
