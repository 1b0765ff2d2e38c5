"""Mixture of experts in plain PyTorch: the specification, the oracle in float64, and what runs where no kernel does."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from memkernels.ops.gated_activation.reference import gated_activation
from memkernels.ops.lora_linear.reference import row_dropout


def plan(expert_ids: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row_of_pair, pair_of_row, offsets and counts of a `DispatchPlan`."""
    ids = expert_ids.reshape(-1).long()
    torch._assert_async(
        ((ids >= 0) & (ids <= num_experts)).all(),
        f"expert_ids: expected 0 to {num_experts} (num_experts: nowhere), got an id out of range",
    )
    order = torch.argsort(ids, stable=True)
    # No shape depends on what ids holds: tensors without values have a plan too.
    counts = ids.new_zeros(num_experts + 1).scatter_add_(0, ids, torch.ones_like(ids))
    place = torch.arange(ids.numel(), device=ids.device) - (counts.cumsum(0) - counts)[ids[order]]
    offsets = torch.cat([counts.new_zeros(1), counts[:num_experts].clamp(max=capacity).cumsum(0)])
    kept = (ids[order] < num_experts) & (place < capacity)
    row = torch.where(kept, offsets[ids[order]] + place, -1)
    row_of_pair = torch.empty_like(row)
    row_of_pair[order] = row
    rows = min(ids.numel(), num_experts * capacity)
    # One place more, for those that have no row.
    pair_of_row = row.new_full((rows + 1,), -1).scatter_(0, torch.where(kept, row, rows), order)[:-1]
    return row_of_pair.view(expert_ids.shape).int(), pair_of_row.int(), offsets.int(), counts.int()


def token_of_pair(pairs: Tensor, row_of_pair: Tensor, token_offsets: Tensor | None) -> Tensor:
    """The tokens of choices; -1 of the choice -1."""
    if token_offsets is None:
        return pairs.div(row_of_pair.shape[1], rounding_mode="floor")
    return torch.searchsorted(token_offsets, pairs, right=True) - 1


def dispatch(
    x: Tensor,
    weights: Tensor | None,
    row_of_pair: Tensor,
    pair_of_row: Tensor,
    token_offsets: Tensor | None = None,
) -> Tensor:
    """x_grouped; rows that belong to no expert are zero."""
    grouped = _with_zero_row(x)[token_of_pair(pair_of_row, row_of_pair, token_offsets).long()]
    if weights is not None:
        grouped = grouped * weights.reshape(-1)[pair_of_row.clamp(min=0).long(), None]
    return grouped.to(x.dtype)


def combine(
    y_grouped: Tensor, weights: Tensor | None, row_of_pair: Tensor, token_offsets: Tensor | None = None
) -> Tensor:
    """y; summed in float32 or wider."""
    wide = y_grouped.to(torch.promote_types(y_grouped.dtype, torch.float32))
    rows = _with_zero_row(wide)[row_of_pair.long()]
    if weights is not None:
        rows = rows * weights.unsqueeze(-1)
    if token_offsets is None:
        return rows.sum(1).to(y_grouped.dtype)
    tokens = token_offsets.shape[0] - 1
    pairs = torch.arange(rows.shape[0], dtype=token_offsets.dtype, device=rows.device)
    token = token_of_pair(pairs, row_of_pair, token_offsets)
    return rows.new_zeros(tokens + 1, rows.shape[1]).index_add(0, token, rows)[:tokens].to(y_grouped.dtype)


def _with_zero_row(rows: Tensor) -> Tensor:
    """The rows and, last, where -1 points, one of zeros."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def grouped_matmul(x_grouped: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Row r of group e is x_grouped[r] weights[e]^T; zero beyond the last group."""
    if offsets.is_meta:  # whose rows are whose is not known, nor does the shape of all products together depend on it
        return x_grouped @ weights[0].t()
    ends = offsets.tolist()
    groups = [x_grouped[a:b] @ weight.t() for weight, (a, b) in zip(weights, pairwise(ends), strict=True)]
    rest = x_grouped.new_zeros(x_grouped.shape[0] - ends[-1], weights.shape[1])
    return torch.cat([*groups, rest])


def moe_mlp(
    x: Tensor,
    row_of_pair: Tensor,
    pair_of_row: Tensor,
    offsets: Tensor,
    expert_weights: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    activation: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    token_offsets: Tensor | None = None,
) -> Tensor:
    """The experts' feed-forward layer, each step an op of its own."""
    x_grouped = dispatch(x, None, row_of_pair, pair_of_row, token_offsets)
    gate_up = grouped_matmul(x_grouped, w_gate_up, offsets)
    if w_gate_up.shape[1] == w_down.shape[2]:
        h = gated_activation(gate_up, None, activation)
    else:
        gate, up = gate_up.chunk(2, dim=1)
        h = gated_activation(gate, up, activation)
    if seed is not None:
        h = row_dropout(h, seed, dropout_p, 0, h.dtype)
    return combine(grouped_matmul(h, w_down, offsets), expert_weights, row_of_pair, token_offsets)
