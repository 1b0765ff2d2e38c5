"""Decoder layers: where a sublayer and its norms become one op, or the whole layer does."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from memkernels.integrations.attention import block_arguments, fits_block, takes_block
from memkernels.integrations.checkpointing import run_layer
from memkernels.integrations.family import Family
from memkernels.integrations.masks import is_told, sequences
from memkernels.integrations.mlp import activation_of, mlp_arguments
from memkernels.integrations.mlp import fits_block as mlp_fits_block
from memkernels.integrations.norm import norm_arguments, norm_fits
from memkernels.integrations.plain import is_off
from memkernels.integrations.replacement import Replacement, argument_names, bind, by_name, why_left
from memkernels.integrations.sublayers import run_sublayers


def plan_layer(layer: Any, family: Family, recompute: str) -> Replacement:
    if hasattr(layer, "crossattention"):
        return Replacement("decoder layer", left="cross attention")
    fits = {
        "attention": _attention_fits(layer, family),
        "MLP": type(layer.mlp) is not family.mlp or _mlp_fits(layer, family),
    }
    left, whole = why_left(fits), recompute == "layer"
    if whole and left is None and any(getattr(dropout, "p", 0.0) for dropout in _dropouts(layer, family)):
        left = "dropout of the residual: its sublayers are ops, the layer is none"
    names = argument_names(layer)[1:]
    return Replacement("decoder layer", bind(layer_forward, layer, family=family, names=names, whole=whole), left)


def layer_forward(
    layer: Any, hidden_states: Tensor, *args, family: Family, names: tuple[str, ...], whole: bool, **kwargs
) -> Tensor:
    """The layer by `ops.attention_block` and `ops.gated_mlp`, with `whole` and no dropout by `ops.decoder_layer`.

    A sublayer that its op cannot compute is called as a module, and with `whole` recomputed by torch.utils.checkpoint.
    That is asked anew at each call, since adapters, hooks, masks and caches come and go.
    """
    kwargs |= by_name(names, args)
    if kwargs.get("encoder_hidden_states") is not None:
        return type(layer).forward(layer, hidden_states, **kwargs)
    return run_layer(partial(_layer, family=family), layer, hidden_states, whole=whole, **kwargs)


def _layer(layer: Any, hidden_states: Tensor, *, family: Family, whole: bool, **kwargs) -> Tensor:
    """h = x + dropout(norm(attention(norm(x)))), y = h + dropout(norm(mlp(norm(h))))."""
    attention, mlp = None, None
    takes = takes_block(_attention(layer, family), hidden_states, kwargs)
    if takes and _attention_fits(layer, family, hidden_states):
        attention = _attention_arguments(layer, hidden_states, family, **kwargs)
    if _mlp_fits(layer, family, hidden_states):
        mlp = _mlp_arguments(layer, hidden_states, family)
    sublayers = (partial(_attention_sublayer, layer, family, **kwargs), partial(_mlp_sublayer, layer, family))
    dropouts = tuple(None if dropout is None or is_off(dropout) else dropout for dropout in _dropouts(layer, family))
    return run_sublayers(hidden_states, attention, mlp, sublayers, whole=whole, dropouts=dropouts)


def _attention_sublayer(layer: Any, family: Family, hidden_states: Tensor, **kwargs) -> Tensor:
    before, after = _norms(layer, family)[:2]
    out = _attention(layer, family)(hidden_states=before(hidden_states), **kwargs)[0]
    return _after(layer, family.dropouts[0], after, out)


def _mlp_sublayer(layer: Any, family: Family, hidden_states: Tensor) -> Tensor:
    before, after = _norms(layer, family)[2:]
    out = layer.mlp(before(hidden_states))
    return _after(layer, family.dropouts[1], after, out[0] if isinstance(out, tuple) else out)


def _after(layer: Any, dropout: str | None, norm: Any, out: Tensor) -> Tensor:
    out = out if norm is None else norm(out)
    return out if dropout is None else getattr(layer, dropout)(out)


def _attention_arguments(
    layer: Any, x: Tensor, family: Family, *, position_embeddings=None, attention_mask=None, **_
) -> dict[str, Any]:
    """What `ops.attention_block` takes; with cu_seqlens where the mask says that sequences are packed."""
    before, after = _norms(layer, family)[:2]
    packed = sequences(attention_mask) if is_told(attention_mask) else None
    options: dict[str, Any] = {}
    if packed is not None:
        options = dict(zip(("cu_seqlens", "max_seqlen"), packed, strict=True))
        if position_embeddings is not None:
            tables = (table.expand(*x.shape[:2], -1).reshape(1, -1, table.shape[-1]) for table in position_embeddings)
            position_embeddings = (next(tables), next(tables))
    arguments = block_arguments(_attention(layer, family), x, position_embeddings, attention_mask, family)
    return arguments | norm_arguments(before, after, x, family) | options


def _mlp_arguments(layer: Any, x: Tensor, family: Family) -> dict[str, Any]:
    before, after = _norms(layer, family)[2:]
    activation = activation_of(layer.mlp, family)
    assert activation is not None
    return mlp_arguments(layer.mlp, x, family, activation) | norm_arguments(before, after, x, family)


def _attention_fits(layer: Any, family: Family, x: Tensor | None = None) -> bool:
    """Whether one op may compute the attention and its norms in a call with x."""
    norms = _norms(layer, family)[:2]
    return fits_block(_attention(layer, family), family, x) and all(norm_fits(norm, family) for norm in norms)


def _mlp_fits(layer: Any, family: Family, x: Tensor | None = None) -> bool:
    """Whether one op may compute the MLP and its norms in a call with x."""
    norms = _norms(layer, family)[2:]
    return mlp_fits_block(layer.mlp, family, x) and all(norm_fits(norm, family) for norm in norms)


def _attention(layer: Any, family: Family) -> Any:
    return getattr(layer, family.self_attention)


def _norms(layer: Any, family: Family) -> list[Any]:
    return [None if name is None else getattr(layer, name) for name in family.norms]


def _dropouts(layer: Any, family: Family) -> list[Any]:
    """Of what attention and the MLP add to the residual; None where there is none."""
    places = zip((layer, layer), family.dropouts, strict=True)
    inner = zip((_attention(layer, family), layer.mlp), family.inner_dropouts, strict=True)
    return [
        next((getattr(module, name) for module, name in of if name is not None), None)
        for of in zip(places, inner, strict=True)
    ]
