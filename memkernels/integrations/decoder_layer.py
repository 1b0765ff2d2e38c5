"""Decoder layers: where a sublayer and its norms become one op, or the whole layer does."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from memkernels.integrations.attention import block_arguments, fits_block, takes_block
from memkernels.integrations.family import Family
from memkernels.integrations.masks import CACHES, has_cache, is_told, sequences
from memkernels.integrations.mlp import activation_of, mlp_arguments
from memkernels.integrations.mlp import fits_block as mlp_fits_block
from memkernels.integrations.norm import norm_arguments, norm_fits
from memkernels.integrations.plain import has_hooks
from memkernels.integrations.replacement import Replacement, bind
from memkernels.integrations.sublayers import run_sublayers


def plan_layer(layer: Any, family: Family, recompute: str) -> Replacement:
    fits = {
        "attention": _attention_fits(layer, family),
        "MLP": type(layer.mlp) is not family.mlp or _mlp_fits(layer, family),
    }
    others = " and ".join(name for name, fit in fits.items() if not fit)
    left = f"{others} with a hook, or an adapter, weight or activation that no op takes" if others else None
    return Replacement("decoder layer", bind(layer_forward, layer, family=family, whole=recompute == "layer"), left)


def layer_forward(layer: Any, hidden_states: Tensor, *, family: Family, whole: bool, **kwargs) -> Tensor:
    """The layer by `ops.attention_block` and `ops.gated_mlp`, with `whole` by `ops.decoder_layer`.

    A sublayer that its op cannot compute is called as a module, and with `whole` recomputed by torch.utils.checkpoint.
    That is asked anew at each call, since adapters, hooks, masks and caches come and go. Gradient checkpointing that
    the user enabled takes the place of `whole`; as in transformers, a layer that is checkpointed gets no cache.
    """
    if not layer.training or not torch.is_grad_enabled():
        return _layer(layer, hidden_states, family, whole=False, **kwargs)
    if layer.gradient_checkpointing:
        kwargs = {name: value for name, value in kwargs.items() if name not in (*CACHES, "use_cache")}
        body = partial(_layer, layer, family=family, whole=False, **kwargs)
        return layer._gradient_checkpointing_func(body, hidden_states)
    return _layer(layer, hidden_states, family, whole=whole and not has_cache(kwargs), **kwargs)


def _layer(layer: Any, hidden_states: Tensor, family: Family, *, whole: bool, **kwargs) -> Tensor:
    """h = x + norm(attention(norm(x))), y = h + norm(mlp(norm(h)))."""
    attention, mlp = None, None
    if _attention_fits(layer, family) and takes_block(layer.self_attn, hidden_states, kwargs):
        attention = _attention_arguments(layer, hidden_states, family, **kwargs)
    if _mlp_fits(layer, family):
        mlp = _mlp_arguments(layer, hidden_states, family)
    sublayers = (partial(_attention_sublayer, layer, family, **kwargs), partial(_mlp_sublayer, layer, family))
    return run_sublayers(hidden_states, attention, mlp, sublayers, whole=whole)


def _attention_sublayer(layer: Any, family: Family, hidden_states: Tensor, **kwargs) -> Tensor:
    before, after = _norms(layer, family)[:2]
    out = layer.self_attn(hidden_states=before(hidden_states), **kwargs)[0]
    return _after(layer, family.dropouts[0], after, out)


def _mlp_sublayer(layer: Any, family: Family, hidden_states: Tensor) -> Tensor:
    before, after = _norms(layer, family)[2:]
    out = layer.mlp(before(hidden_states))
    return _after(layer, family.dropouts[1], after, out[0] if isinstance(out, tuple) else out)


def _after(layer: Any, dropout: str | None, norm: Any, out: Tensor) -> Tensor:
    out = out if norm is None else norm(out)
    return out if dropout is None else getattr(layer, dropout)(out)


def _attention_arguments(
    layer: Any, x: Tensor, family: Family, *, position_embeddings: tuple[Tensor, Tensor], attention_mask=None, **_
) -> dict[str, Any]:
    """What `ops.attention_block` takes; with cu_seqlens where the mask says that sequences are packed."""
    before, after = _norms(layer, family)[:2]
    packed = sequences(attention_mask) if is_told(attention_mask) else None
    options: dict[str, Any] = {}
    if packed is not None:
        tables = (table.expand(*x.shape[:2], -1).reshape(1, -1, table.shape[-1]) for table in position_embeddings)
        position_embeddings = (next(tables), next(tables))
        options = dict(zip(("cu_seqlens", "max_seqlen"), packed, strict=True))
    arguments = block_arguments(layer.self_attn, position_embeddings, family)
    return arguments | norm_arguments(before, after, x, family) | options


def _mlp_arguments(layer: Any, x: Tensor, family: Family) -> dict[str, Any]:
    before, after = _norms(layer, family)[2:]
    activation = activation_of(layer.mlp, family)
    assert activation is not None
    return mlp_arguments(layer.mlp, family, activation) | norm_arguments(before, after, x, family)


def _attention_fits(layer: Any, family: Family) -> bool:
    """Whether one op may compute the attention and its norms."""
    norms = _norms(layer, family)[:2]
    return (
        fits_block(layer.self_attn, family)
        and all(norm_fits(norm, family) for norm in norms)
        and _drops_nothing(layer, family.dropouts[0])
    )


def _mlp_fits(layer: Any, family: Family) -> bool:
    """Whether one op may compute the MLP and its norms."""
    norms = _norms(layer, family)[2:]
    return (
        mlp_fits_block(layer.mlp, family)
        and all(norm_fits(norm, family) for norm in norms)
        and _drops_nothing(layer, family.dropouts[1])
    )


def _norms(layer: Any, family: Family) -> list[Any]:
    return [None if name is None else getattr(layer, name) for name in family.norms]


def _drops_nothing(layer: Any, name: str | None) -> bool:
    if name is None:
        return True
    dropout = getattr(layer, name)
    return not has_hooks(dropout) and (dropout.p == 0 or not dropout.training)
