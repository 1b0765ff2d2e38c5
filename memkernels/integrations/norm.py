"""RMS norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memkernels import ops
from memkernels.integrations.family import Family
from memkernels.integrations.replacement import Replacement, bind


def plan_norm(norm: nn.Module, family: Family) -> Replacement:
    return Replacement("RMS norm", bind(norm_forward, norm, offset=family.norm_offset))


def norm_forward(norm: Any, hidden_states: Tensor, *, offset: float) -> Tensor:
    """`ops.rms_norm`, which computes in float32 and rounds once."""
    y = ops.rms_norm(hidden_states, norm_weight(norm, hidden_states), norm.variance_epsilon, weight_offset=offset)
    assert isinstance(y, Tensor)
    return y


def norm_weight(norm: Any, x: Tensor) -> Tensor:
    """The weight, in float32 where x has that and the model has not (its embeddings were given)."""
    weight = norm.weight
    return weight if weight.dtype in (x.dtype, torch.float32) else weight.to(x.dtype)


def norm_arguments(norm: Any, x: Tensor, family: Family) -> dict[str, Any]:
    """What a block op takes of the norm in front of it."""
    return {
        "norm_weight": norm_weight(norm, x), "norm_eps": norm.variance_epsilon, "norm_offset": family.norm_offset
    }  # fmt: skip
