"""The norm of all gradients together, and what clipping by it multiplies them with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from memkernels.optim.local import division_of, local_of
from memkernels.optim.operators import square_sum


def total_norm(grads: Sequence[Tensor], squares_of_others: Sequence[Tensor] = ()) -> Tensor:
    """The Euclidean norm of all elements, 0-dim float32; of DTensors of all ranks' parts, on every rank.

    Of gradients that are elsewhere `squares_of_others` has the sums of squares, 0-dim float64.
    """
    squares = [*total_squares(grads), *squares_of_others]
    return torch.stack(squares).sum().sqrt().float() if squares else torch.zeros(())


def total_squares(grads: Sequence[Tensor]) -> list[Tensor]:
    """Sums of squares that together are those of all elements, 0-dim float64; of DTensors of all ranks' parts."""
    by_division: dict[Any, list[Tensor]] = {}
    for grad in grads:
        division = division_of(grad)
        by_division.setdefault(division, []).append(local_of(grad))
    return [_over_ranks(square_sum(parts), division) for division, parts in by_division.items()]


def _over_ranks(square: Tensor, division: Any) -> Tensor:
    if division is not None:
        mesh, placements = division
        for dim, placement in enumerate(placements):
            if not placement.is_replicate():  # divided, by FSDP2 within tensor parallelism too, which is no `Shard`
                torch.distributed.all_reduce(square, group=mesh.get_group(dim))
    return square


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` has it; where the norm is. NaN for NaN."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def is_on_gpu(number: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor of one element that the host would have to wait for."""
    return isinstance(number, Tensor) and number.numel() == 1 and number.device.type != "cpu"


def as_number(value: float | Tensor) -> float | Tensor:
    """A number; of a tensor on a GPU itself, as 0-dim float32."""
    return value.float().reshape(()) if is_on_gpu(value) else float(value)


def divided(scale: float | Tensor, by: float | Tensor) -> float | Tensor:
    """scale / by, float32 on its device where `by` is a tensor on a GPU; of one on CPU the number is taken."""
    if is_on_gpu(by):
        return scale / by.float().reshape(())
    return scale / float(by)
