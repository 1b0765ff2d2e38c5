"""A pre-norm decoder layer in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from memkernels.ops.attention_block.reference import attention_block
from memkernels.ops.gated_mlp.reference import gated_mlp


def decoder_layer(x: Tensor, attention: Mapping[str, Any], mlp: Mapping[str, Any]) -> Tensor:
    """y = h + gated_mlp(h) with h = x + attention_block(x), each with its norm in front."""
    h = x + attention_block(x, **attention)
    return h + gated_mlp(h, **mlp)
