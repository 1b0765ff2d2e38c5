"""Where ranks may cut a parameter whose moments are in blocks: between them, so that they are those of one process."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from memkernels.optim.local import division_of

ALIGNMENT = 256  # elements of a block in 8 bits, of two in 4 bits, and of a run of random bits


def check_division(name: str, parameter: Tensor) -> None:
    """Raises ValueError where any rank's part of a DTensor begins or ends within a block, on every rank."""
    check_cuts(name, parameter.shape, _cuts_of(parameter))


def check_cuts(name: str, shape: Sequence[int], cuts: Mapping[int, Iterable[int]]) -> None:
    """Raises ValueError where parts do not consist of whole blocks of a parameter's elements.

    Args:
        cuts: by dimension, the indices in it at which parts begin.
    """
    for dim, indices in cuts.items():
        inner = math.prod(shape[dim + 1 :])
        begins = [index * inner for index in indices]
        if begins and math.prod(shape[:dim]) > 1:  # parts of columns, which begin in every row anew
            begins.append(shape[dim] * inner)
        if any(element % ALIGNMENT for element in begins):
            raise ValueError(
                f"state_bits: expected 32 or 16 for {name}, of which the ranks' parts begin within blocks of"
                f" {ALIGNMENT} elements: put it into a group of its own with state_bits=32."
            )


def cuts_of_rows(rows: int, ranks: int) -> range:
    """The rows that FSDP2 begins the ranks' parts with, but for the first."""
    of_rank = max(1, -(-rows // ranks))
    return range(of_rank, rows, of_rank)


def _cuts_of(parameter: Tensor) -> dict[int, list[int]]:
    division = division_of(parameter)
    parts: dict[int, list[Tensor]] = {}  # of each dimension the indices that some rank has, in their order there
    for ranks, placement in zip(division[0].shape, division[1], strict=True) if division else ():
        if not placement.is_replicate():
            dim = placement.dim
            whole = parts.get(dim, [torch.arange(parameter.shape[dim], device="cpu")])
            # What tensor parallelism has divided before FSDP2, each rank's part of which is divided.
            factor = getattr(placement, "split_factor", 1)
            parts[dim] = [part for of in whole for part in _split(of, ranks, factor)]
    return {dim: [cut for part in of_dim for cut in _begins(part) if cut] for dim, of_dim in parts.items()}


def _split(indices: Tensor, ranks: int, factor: int) -> Iterator[Tensor]:
    chunks = [piece.chunk(ranks) for piece in indices.chunk(factor)]
    for rank in range(ranks):
        yield torch.cat([of_piece[rank] for of_piece in chunks if rank < len(of_piece)] or [indices[:0]])


def _begins(part: Tensor) -> list[int]:
    """The first index of each run of them."""
    follows = part.diff() == 1
    return part[torch.cat((follows.new_zeros(min(1, len(part))), follows)).logical_not()].tolist()
