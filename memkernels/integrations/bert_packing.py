"""Padding packed away: the encoder sees the visible tokens of a batch as one row, and their starts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memkernels._library import has_kernel
from memkernels.integrations.plain import has_hooks, slot

# Of BertModel.forward.
_ARGUMENTS = (
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "encoder_hidden_states",
    "encoder_attention_mask", "cache", "use_cache",
)  # fmt: skip
_PER_LAYER_OUTPUTS = ("output_hidden_states", "output_attentions")


@dataclass(frozen=True)
class Packed:
    """Where the visible tokens of a (B, S) batch are: `index` (T,) in its rows, and what `ops.attention` takes."""

    index: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def model_forward(model: Any, *args, keep_hidden: bool = False, **kwargs) -> Any:
    """Where attention_mask (B, S) hides tokens, the encoder computes the visible ones alone.

    Hidden positions of last_hidden_state are then zero. They are computed as transformers does where somebody reads
    them (`keep_hidden`, a pooler whose first token is hidden, hooks, outputs of each layer) and under torch.compile.
    """
    kwargs |= dict(zip(_ARGUMENTS, args, strict=False))
    packed = None if keep_hidden or not _may_pack(model, kwargs) else _pack(model, kwargs["attention_mask"])
    if packed is not None:
        kwargs |= {"attention_mask": None, "packed": packed}
    return type(model).forward(model, **kwargs)


def encoder_forward(encoder: Any, hidden_states: Tensor, *args, packed: Packed | None = None, **kwargs) -> Any:
    """The layers on the visible tokens, (1, T, d), and their outputs back among zeros."""
    if packed is None:
        return type(encoder).forward(encoder, hidden_states, *args, **kwargs)
    rows = hidden_states.flatten(0, 1).index_select(0, packed.index)[None]
    outputs = type(encoder).forward(encoder, rows, *args, packed=packed, **kwargs)
    rows = outputs.last_hidden_state[0]
    states = rows.new_zeros(hidden_states.shape[:-1].numel(), rows.shape[-1]).index_copy(0, packed.index, rows)
    outputs.last_hidden_state = states.view(hidden_states.shape)
    return outputs


def head_forward(model: Any, *args, **kwargs) -> Any:
    """Hidden positions are computed where a label stands at one, and for answers' spans, which compete with them."""
    keep_hidden = torch.compiler.is_compiling() or _reads_hidden(model, args, kwargs)
    return type(model).forward(model, *args, **kwargs, **({"keep_hidden": True} if keep_hidden else {}))


def _reads_hidden(model: Any, args: tuple, kwargs: dict) -> bool:
    if len(args) > 2 or type(model).__name__ == "BertForQuestionAnswering":
        return True
    labels, mask = kwargs.get("labels"), args[1] if len(args) == 2 else kwargs.get("attention_mask")
    if labels is None or mask is None:
        return False
    return labels.shape != mask.shape or bool(((labels != -100) & (mask == 0)).any())


def _may_pack(model: Any, kwargs: dict) -> bool:
    mask = kwargs.get("attention_mask")
    return (
        not torch.compiler.is_compiling()
        and isinstance(mask, Tensor)
        and mask.dim() == 2
        and all(kwargs.get(name) is None for name in ("encoder_hidden_states", "cache"))
        and not any(kwargs.get(name) or getattr(model.config, name, False) for name in _PER_LAYER_OUTPUTS)
        and model.config._attn_implementation == "sdpa"
        and model.config.chunk_size_feed_forward == 0
        and has_kernel("attention_fwd", model.embeddings.word_embeddings.weight)
        and all(_is_replaced(module) for module in (model.encoder, *(of.attention.self for of in model.encoder.layer)))
        and not any(has_hooks(module) for module in model.encoder.modules())
    )


def _pack(model: Any, mask: Tensor) -> Packed | None:
    """None: nothing is hidden, or what is hidden is read."""
    visible = mask != 0
    lengths = visible.sum(1)
    shortest, longest = (int(length) for length in lengths.aminmax())
    first_is_read = model.pooler is not None and not bool(visible[:, 0].all())
    if shortest in (0, mask.shape[1]) or first_is_read:
        return None
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return Packed(visible.flatten().nonzero()[:, 0], cu_seqlens, longest)


def _is_replaced(module: Any) -> bool:
    current = module.__dict__.get(slot(module))
    return isinstance(current, partial) and current.func.__module__.startswith("memkernels.integrations.")
