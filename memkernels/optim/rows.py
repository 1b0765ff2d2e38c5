"""Parameters whose rows are divided among ranks, as FSDP2 does it: sums over all of one, and one whole after the other.

Each function is called by every rank of a parameter's mesh, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memkernels.optim.agreement import start, wait_for
from memkernels.optim.local import division_of, is_distributed


def is_divided_by_rows(parameter: Tensor) -> bool:
    """Whether it is a DTensor of which ranks have rows, along one dimension of a mesh, with copies along others."""
    division = division_of(parameter)
    if division is None:
        return False
    divided = [placement for placement in division[1] if not placement.is_replicate()]
    return len(divided) == 1 and divided[0].is_shard(0)


def sum_over_ranks(local: Tensor, parameter: Tensor) -> Tensor:
    """The sum of what the ranks found in their rows of a parameter, in place; of a plain one what is there."""
    if is_distributed(parameter):
        wait_for(start(dist.all_reduce, local, group=group_of_rows(parameter)))
    return local


def through_whole(
    function: Callable[[Tensor], Tensor], parts: Sequence[Tensor], parameters: Sequence[Tensor]
) -> Iterator[Tensor]:
    """This rank's rows of function(matrix) for each matrix, of which `parts` are its rows.

    A rank brings one of them together at a time, the next rank the next one, as long as the same ranks have their rows,
    and sends the rows of the result back.

    Args:
        function: gives a matrix of the same shape and dtype.
        parameters: in whose shapes and by whose division the matrices are.
    """
    for wave in waves(parameters):
        shapes = [parameter.shape for parameter in parameters[wave]]
        yield from _wave(function, parts[wave], shapes, group_of_rows(parameters[wave.start]))


def waves(parameters: Sequence[Tensor]) -> Iterator[slice]:
    """Which of them come together at a time, each on another rank."""
    groups = [group_of_rows(parameter) for parameter in parameters]
    at = 0
    while at < len(groups):
        group, end = groups[at], at + 1
        most = min(at + dist.get_world_size(group), len(groups))
        while end < most and groups[end] is group:
            end += 1
        yield slice(at, end)
        at = end


def _wave(
    function: Callable[[Tensor], Tensor], parts: Sequence[Tensor], shapes: Sequence[torch.Size], group: Any
) -> Iterator[Tensor]:
    """Of as many matrices as there are ranks, or fewer: the i-th is the i-th rank's."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    here = [part.numel() for part in parts] + [0] * (ranks - len(parts))
    rows, columns = shapes[rank] if rank < len(parts) else (0, 0)
    each = -(-rows // ranks)
    of_ranks = [max(0, min(each, rows - r * each)) * columns for r in range(ranks)]
    sent = torch.cat([part.reshape(-1) for part in parts])
    whole = sent.new_empty(rows * columns)
    _exchange(whole, sent, of_ranks, here, group)
    if whole.numel():
        whole = function(whole.view(rows, columns)).reshape(-1)
    received = torch.empty_like(sent)
    _exchange(received, whole, here, of_ranks, group)
    for part, rows_of_it in zip(parts, received.split(here[: len(parts)]), strict=True):
        yield rows_of_it.view(part.shape)


def _exchange(received: Tensor, sent: Tensor, from_each: list[int], to_each: list[int], group: Any) -> None:
    options = {"output_split_sizes": from_each, "input_split_sizes": to_each}
    wait_for(start(dist.all_to_all_single, received, sent, group=group, **options))


def group_of_rows(parameter: Tensor) -> Any:
    """The ranks that have its rows."""
    division = division_of(parameter)
    assert division is not None
    mesh, placements = division
    return mesh.get_group([placement.is_shard(0) for placement in placements].index(True))
