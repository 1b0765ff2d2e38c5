"""Vision towers: attention, MLPs, and blocks whose sublayers become one op each, or that become one as a whole."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from memkernels.integrations import mlp as mlps
from memkernels.integrations.checkpointing import run_layer
from memkernels.integrations.family import VisionTower
from memkernels.integrations.norm import norm_arguments, norm_fits
from memkernels.integrations.replacement import Replacement, bind, why_left
from memkernels.integrations.sublayers import run_sublayers
from memkernels.integrations.vision_attention import attention_forward, block_arguments, fits_block, takes_attention


def plan_vision(module: nn.Module, tower: VisionTower, recompute: str) -> Replacement | None:
    kind = type(module)
    if kind is tower.attention:
        return Replacement("attention of images", bind(attention_forward, module))
    if kind is tower.mlp:
        return mlps.plan_mlp(module, tower, recompute != "none")
    if kind is tower.block and recompute != "none":
        return _plan_block(module, tower, recompute)
    return None


def _plan_block(block: Any, tower: VisionTower, recompute: str) -> Replacement:
    fits = {"attention": _attention_fits(block, tower), "MLP": _mlp_fits(block, tower)}
    forward = bind(block_forward, block, tower=tower, whole=recompute == "layer")
    return Replacement("vision block", forward, why_left(fits))


def block_forward(
    block: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    *,
    tower: VisionTower,
    whole: bool,
    **kwargs,
) -> Tensor:
    """The block by `ops.attention_block` and `ops.gated_mlp`, with `whole` by `ops.decoder_layer`.

    A sublayer that its op cannot compute is called as a module, and with `whole` recomputed by torch.utils.checkpoint.
    """
    kwargs |= {"cu_seqlens": cu_seqlens, "position_embeddings": position_embeddings}
    return run_layer(partial(_block, tower=tower), block, hidden_states, whole=whole, **kwargs)


def _block(block: Any, x: Tensor, *, tower: VisionTower, whole: bool, **kwargs) -> Tensor:
    attention, mlp = None, None
    if takes_attention(block.attn, x) and _attention_fits(block, tower, x):
        attention = block_arguments(block.attn, x, **kwargs) | norm_arguments(block.norm1, None, x, tower)
    activation = mlps.activation_of(block.mlp, tower)
    if activation is not None and _mlp_fits(block, tower, x):
        mlp = mlps.mlp_arguments(block.mlp, x, tower, activation) | norm_arguments(block.norm2, None, x, tower)
    sublayers = (partial(_attention_sublayer, block, **kwargs), partial(_mlp_sublayer, block))
    return run_sublayers(x, attention, mlp, sublayers, whole=whole)


def _attention_sublayer(block: Any, x: Tensor, **kwargs) -> Tensor:
    return block.attn(block.norm1(x), **kwargs)


def _mlp_sublayer(block: Any, x: Tensor) -> Tensor:
    return block.mlp(block.norm2(x))


def _attention_fits(block: Any, tower: VisionTower, x: Tensor | None = None) -> bool:
    return fits_block(block.attn, tower, x) and norm_fits(block.norm1, tower)


def _mlp_fits(block: Any, tower: VisionTower, x: Tensor | None = None) -> bool:
    return mlps.fits_block(block.mlp, tower, x) and norm_fits(block.norm2, tower)
