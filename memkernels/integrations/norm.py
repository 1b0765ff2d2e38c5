"""RMS norms; and what a block op takes of the norms around it, of either kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memkernels import ops
from memkernels.integrations.family import Family, VisionTower
from memkernels.integrations.layer_norm import is_plain_layer_norm, layer_norm_arguments
from memkernels.integrations.plain import has_hooks
from memkernels.integrations.replacement import Replacement, bind


def plan_norm(norm: nn.Module, family: Family) -> Replacement:
    return Replacement("RMS norm", bind(norm_forward, norm, family=family))


def norm_forward(norm: Any, hidden_states: Tensor, *, family: Family) -> Tensor:
    """`ops.rms_norm`, which computes in float32 and rounds once."""
    weight, eps = norm_weight(norm, hidden_states), getattr(norm, family.norm_eps)
    y = ops.rms_norm(hidden_states, weight, eps, weight_offset=family.norm_offset)
    assert isinstance(y, Tensor)
    return y


def norm_weight(norm: Any, x: Tensor) -> Tensor:
    """The weight, in float32 where x has that and the model has not (its embeddings were given)."""
    weight = norm.weight
    return weight if weight.dtype in (x.dtype, torch.float32) else weight.to(x.dtype)


def norm_fits(norm: Any, family: Family | VisionTower) -> bool:
    """Whether a block op may compute the norm of a sublayer's input, or of its output if there is one."""
    if norm is None or family.norm is nn.LayerNorm:
        return norm is None or is_plain_layer_norm(norm)
    return type(norm) is family.norm and not has_hooks(norm)


def norm_arguments(before: Any, after: Any, x: Tensor, family: Family | VisionTower) -> dict[str, Any]:
    """What a block op takes of the norms before and after it; a layer norm has none after it."""
    if family.norm is nn.LayerNorm:
        return layer_norm_arguments(before)
    return {
        "norm_weight": norm_weight(before, x), "norm_eps": getattr(before, family.norm_eps),
        "norm_offset": family.norm_offset, "post_norm_weight": None if after is None else norm_weight(after, x),
    }  # fmt: skip
