"""The two sublayers of a pre-norm layer, each as one op or as modules, or the whole layer as one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memkernels import ops

Sublayer = Callable[[Tensor], Tensor]


def run_sublayers(
    x: Tensor,
    attention: dict[str, Any] | None,
    mlp: dict[str, Any] | None,
    sublayers: tuple[Sublayer, Sublayer],
    *,
    whole: bool,
    dropouts: Sequence[Sublayer | None] = (None, None),
) -> Tensor:
    """h = x + dropout(attention(x)), y = h + dropout(mlp(h)).

    `attention` and `mlp` are the arguments of `ops.attention_block` and `ops.gated_mlp`, whose results `dropouts` drop;
    where they are None, `sublayers` is called, which drops itself, with `whole` under torch.utils.checkpoint. With
    `whole` and no dropout both are one `ops.decoder_layer`.
    """
    run = partial(checkpoint, use_reentrant=False) if whole else call
    packed = attention is not None and attention.get("cu_seqlens") is not None
    rows = x.reshape(1, -1, x.shape[-1]) if packed else x
    if whole and attention is not None and mlp is not None and all(of is None for of in dropouts):
        return ops.decoder_layer(rows, attention, mlp).view(x.shape)
    if attention is not None:
        h = (rows + _dropped(dropouts[0], ops.attention_block(rows, **attention))).view(x.shape)
    else:
        h = x + run(sublayers[0], x)
    return h + (_dropped(dropouts[1], ops.gated_mlp(h, **mlp)) if mlp is not None else run(sublayers[1], h))


def call(sublayer: Sublayer, x: Tensor) -> Tensor:
    return sublayer(x)


def _dropped(dropout: Sublayer | None, y: Tensor) -> Tensor:
    return y if dropout is None else dropout(y)
