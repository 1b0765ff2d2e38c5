"""An embedding with a low-rank adapter in plain PyTorch, as PEFT computes it: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    padding_idx: int | None = None,
    embed_scale: Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """y of `ops.lora_embedding`; the adapter at its own dtype, the sum rounded to weight's."""
    base = F.embedding(ids, weight)
    adapter = F.embedding(ids, lora_a.t(), padding_idx) @ lora_b.t() * scaling
    if embed_scale is not None:
        base, adapter = base * embed_scale.to(base.dtype), adapter * embed_scale.to(adapter.dtype)
    if magnitude is None:
        return (base + adapter).to(weight.dtype)
    merged = weight + scaling * (lora_b.detach() @ lora_a.detach()).t().to(weight.dtype)
    scale = magnitude / torch.linalg.vector_norm(merged, dim=0)
    return (scale * base + scale * adapter).to(weight.dtype)
