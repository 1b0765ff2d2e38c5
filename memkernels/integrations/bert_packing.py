"""Padding packed away: the encoder sees the visible tokens of a batch as one row, and their starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memkernels._library import has_kernel
from memkernels.integrations.bert_attention import gives_no_weights
from memkernels.integrations.plain import has_hooks, replaced_slot
from memkernels.integrations.replacement import by_name


@dataclass(frozen=True)
class Packed:
    """Where the visible tokens of a (B, S) batch are: `index` (T,) in its rows, and what `ops.attention` takes."""

    index: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def model_forward(model: Any, *args, names: tuple[str, ...], keep_hidden: bool = False, **kwargs) -> Any:
    """Where attention_mask (B, S) hides tokens, the encoder computes the visible ones alone.

    Hidden positions of last_hidden_state are then zero. They are computed as transformers does where somebody reads
    them (`keep_hidden`, a pooler whose first token is hidden, hooks, outputs of each layer) and under torch.compile.
    """
    kwargs |= by_name(names, args)
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


def head_forward(model: Any, *args, names: tuple[str, ...], reads_all: bool, **kwargs) -> Any:
    """Hidden positions are computed where a label stands at one, or where the head `reads_all`."""
    kwargs |= by_name(names, args)
    keep_hidden = torch.compiler.is_compiling() or reads_all or _has_hidden_labels(**kwargs)
    return type(model).forward(model, **kwargs, **({"keep_hidden": True} if keep_hidden else {}))


def _has_hidden_labels(labels: Tensor | None = None, attention_mask: Tensor | None = None, **_) -> bool:
    if labels is None or attention_mask is None:
        return False
    return labels.shape != attention_mask.shape or bool(((labels != -100) & (attention_mask == 0)).any())


def _may_pack(model: Any, kwargs: dict) -> bool:
    mask = kwargs.get("attention_mask")
    attentions = (layer.attention.self for layer in model.encoder.layer)
    return (
        not torch.compiler.is_compiling()
        and isinstance(mask, Tensor)
        and mask.dim() == 2
        and all(kwargs.get(name) is None for name in ("encoder_hidden_states", "cache"))
        and not kwargs.get("is_causal")
        and not (kwargs.get("output_hidden_states") or getattr(model.config, "output_hidden_states", False))
        and gives_no_weights(model.config, kwargs)
        and model.config.chunk_size_feed_forward == 0
        and has_kernel("attention_fwd", model.embeddings.word_embeddings.weight)
        and all(replaced_slot(module) is not None for module in (model.encoder, *attentions))
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
