"""What a block op takes of a torch.nn.LayerNorm in front of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from memkernels.integrations.plain import has_foreign_forward, has_hooks


def is_plain_layer_norm(norm: Any) -> bool:
    """Whether an op may take the norm's tensors."""
    return (
        type(norm) is nn.LayerNorm and norm.weight is not None and not has_hooks(norm) and not has_foreign_forward(norm)
    )


def layer_norm_arguments(norm: Any) -> dict[str, Any]:
    return {"norm": "layer", "norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}
