"""GPT-2's blocks: where a sublayer and the norm in front of it become one op, or the whole block does."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memkernels import ops
from memkernels.integrations import gpt2_attention, gpt2_mlp
from memkernels.integrations.checkpointing import run_layer
from memkernels.integrations.layer_norm import is_plain_layer_norm, layer_norm_arguments
from memkernels.integrations.mlp import activation_name
from memkernels.integrations.plain import is_off
from memkernels.integrations.replacement import Replacement, bind


def plan_layer(block: Any, recompute: str) -> Replacement:
    if hasattr(block, "crossattention"):
        return Replacement("decoder layer", left="cross attention")
    activation = activation_name(block.mlp.act)
    fits = {"attention": _attention_fits(block), "MLP": _mlp_fits(block, activation)}
    others = " and ".join(name for name, fit in fits.items() if not fit)
    left = f"{others} with a hook, or an adapter, weight or activation that no op takes" if others else None
    whole = recompute == "layer"
    if whole and left is None and (block.attn.resid_dropout.p or block.mlp.dropout.p):
        left = "dropout of the residual: its sublayers are ops, the layer is none"
    return Replacement("decoder layer", bind(layer_forward, block, activation=activation, whole=whole), left)


def layer_forward(
    block: Any,
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    *args,
    activation: str | None,
    whole: bool,
    **kwargs,
) -> Tensor:
    """The block by `ops.attention_block` and `ops.gated_mlp`, with `whole` and no dropout by `ops.decoder_layer`.

    A sublayer that its op cannot compute is called as a module, and with `whole` recomputed by torch.utils.checkpoint.
    """
    if encoder_hidden_states is not None:
        states = (hidden_states, cache, attention_mask, encoder_hidden_states, *args)
        return type(block).forward(block, *states, **kwargs)
    kwargs |= {"cache": cache, "attention_mask": attention_mask}
    return run_layer(partial(_layer, activation=activation), block, hidden_states, whole=whole, **kwargs)


def _layer(block: Any, hidden_states: Tensor, *, activation: str | None, whole: bool, **kwargs) -> Tensor:
    """h = x + dropout(attention(norm(x))), y = h + dropout(mlp(norm(h)))."""
    attention, mlp = None, None
    if _attention_fits(block) and gpt2_attention.takes_attention(block.attn, hidden_states, kwargs):
        attention = gpt2_attention.block_arguments(block.attn) | layer_norm_arguments(block.ln_1)
    if activation is not None and _mlp_fits(block, activation):
        mlp = gpt2_mlp.mlp_arguments(block.mlp, activation) | layer_norm_arguments(block.ln_2)
    dropouts = (block.attn.resid_dropout, block.mlp.dropout)
    if whole and attention is not None and mlp is not None and all(map(is_off, dropouts)):
        return ops.decoder_layer(hidden_states, attention, mlp)
    run = partial(checkpoint, use_reentrant=False) if whole else _call
    if attention is not None:
        hidden_states = hidden_states + dropouts[0](ops.attention_block(hidden_states, **attention))
    else:
        hidden_states = hidden_states + run(partial(_attention_sublayer, block, **kwargs), hidden_states)
    if mlp is not None:
        return hidden_states + dropouts[1](ops.gated_mlp(hidden_states, **mlp))
    return hidden_states + run(partial(_mlp_sublayer, block), hidden_states)


def _call(sublayer: Any, hidden_states: Tensor) -> Tensor:
    return sublayer(hidden_states)


def _attention_sublayer(block: Any, hidden_states: Tensor, **kwargs) -> Tensor:
    return block.attn(block.ln_1(hidden_states), **kwargs)[0]


def _mlp_sublayer(block: Any, hidden_states: Tensor) -> Tensor:
    return block.mlp(block.ln_2(hidden_states))


def _attention_fits(block: Any) -> bool:
    """Whether one op may compute the attention and the norm in front of it."""
    return is_plain_layer_norm(block.ln_1) and gpt2_attention.fits_block(block.attn)


def _mlp_fits(block: Any, activation: str | None) -> bool:
    """Whether one op may compute the MLP and the norm in front of it."""
    return activation is not None and is_plain_layer_norm(block.ln_2) and gpt2_mlp.fits_block(block.mlp)
