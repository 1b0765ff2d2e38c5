"""A linear layer with a low-rank adapter in plain PyTorch, as PEFT computes it: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memkernels.ops.philox import row_words, threshold


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """y of `ops.lora_linear`; each product at its weights' dtype, the sum rounded to x's."""
    dropped = x.to(lora_a.dtype)
    if dropout_p > 0:
        assert seed is not None
        dropped = row_dropout(dropped.flatten(0, -2), seed, dropout_p, 0, lora_a.dtype).view(x.shape)
    adapter = F.linear(F.linear(dropped, lora_a), lora_b) * scaling
    if magnitude is None:
        return (F.linear(x, weight, bias) + adapter).to(x.dtype)
    merged = weight.detach() + scaling * (lora_b.detach() @ lora_a.detach()).to(weight.dtype)
    scale = magnitude / torch.linalg.vector_norm(merged, dim=1)
    # DoRA scales what the adapter's input, dropout included, gives through base and adapter.
    through = F.linear(dropped.to(x.dtype), weight)
    return (F.linear(x, weight, bias) + (scale - 1) * through + scale * adapter).to(x.dtype)


def keep_mask(seed: Tensor, rows: int, columns: int, dropout_p: float, first_row: int = 0) -> Tensor:
    """Which elements of a matrix are kept, (rows, columns): those whose word of `row_words` reaches the threshold."""
    return row_words(seed, rows, columns, first_row) >= threshold(dropout_p)


def row_dropout(x: Tensor, seed: Tensor, dropout_p: float, first_row: int, dtype: torch.dtype) -> Tensor:
    """m * x / (1 - p), in dtype; x holds the rows of a matrix from first_row on."""
    keep = keep_mask(seed, x.shape[0], x.shape[1], dropout_p, first_row)
    return torch.where(keep, x.to(dtype) / (1 - dropout_p), 0.0)
