"""The gradient of a norm's parameter on GPUs: programs or blocks sum over shares of the rows, and these are summed."""

from __future__ import annotations

import torch
from torch import Tensor


def partial_sums(rows: Tensor, shares: int, wanted: bool) -> Tensor:
    """Memory for the sums of each share of `rows` (..., size): (shares, size) in float32; none where not wanted."""
    return rows.new_empty((shares if wanted else 0, rows.shape[-1]), dtype=torch.float32)


def total(partial: Tensor, parameter: Tensor, wanted: bool) -> Tensor:
    """Their sum in the parameter's dtype; empty where not wanted."""
    return partial.sum(0).to(parameter.dtype) if wanted else parameter.new_empty(0)
