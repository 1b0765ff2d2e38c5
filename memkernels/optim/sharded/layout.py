"""Which elements of a model's parameters each rank keeps the states of.

Parameters lie one after the other in buckets of one dtype, in the order in which backward completes their gradients:
the reverse of the model's. Each begins at a multiple of 256 elements, and each rank has one range of every bucket, of a
multiple of 256. A parameter is therefore cut at multiples of 256 of its own elements alone, which no block of a state
in few bits crosses, so that how many ranks there are changes no state. The elements between two parameters, and those
that fill up the last range, are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from memkernels.optim.blocks import ALIGNMENT


class Piece(NamedTuple):
    """A parameter's place in a bucket: its elements are [start, start + parameter.numel()) of it.

    `place` is the parameter's among all of the optimizer's.
    """

    name: str
    parameter: Tensor
    place: int
    start: int


@dataclass(frozen=True)
class Bucket:
    """Parameters of one dtype, and the length of each rank's range."""

    pieces: tuple[Piece, ...]
    shard_size: int
    ranks: int

    @property
    def size(self) -> int:
        return self.shard_size * self.ranks

    @property
    def nbytes(self) -> int:
        """Of its parameters."""
        return sum(piece.parameter.nbytes for piece in self.pieces)

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].parameter.dtype

    def shard(self, flat: Tensor, rank: int) -> Tensor:
        """A rank's range of the whole bucket."""
        return flat[rank * self.shard_size : (rank + 1) * self.shard_size]

    def view(self, flat: Tensor, piece: Piece) -> Tensor:
        """A parameter's elements of the whole bucket, in its shape."""
        parameter = piece.parameter
        return flat[piece.start : piece.start + parameter.numel()].view(parameter.shape)

    def elements_of(self, piece: Piece, rank: int) -> tuple[int, int]:
        """Which elements [first, last) of a parameter a rank has; none at all as [first, first)."""
        first, last = (
            min(max(at * self.shard_size - piece.start, 0), piece.parameter.numel()) for at in (rank, rank + 1)
        )
        return first, last

    def gaps(self) -> Iterator[tuple[int, int]]:
        """The ranges that no parameter has."""
        last = 0
        for piece in self.pieces:
            if piece.start > last:
                yield last, piece.start
            last = piece.start + piece.parameter.numel()
        if self.size > last:
            yield last, self.size


def make_buckets(parameters: Sequence[tuple[str, Tensor, int]], ranks: int, bucket_bytes: int) -> tuple[Bucket, ...]:
    """The buckets of the parameters, by name and place in the optimizer, in the order in which backward fills them.

    A bucket is closed before it would be larger than `bucket_bytes`; a larger parameter has one of its own.
    """
    buckets: list[Bucket] = []
    open_pieces: dict[torch.dtype, list[Piece]] = {}
    sizes: dict[torch.dtype, int] = {}

    def close(dtype: torch.dtype) -> None:
        pieces, size = open_pieces.pop(dtype), sizes.pop(dtype)
        buckets.append(Bucket(tuple(pieces), _aligned(-(-size // ranks)), ranks))

    for name, parameter, place in reversed(parameters):
        dtype, size = parameter.dtype, _aligned(parameter.numel())
        if dtype in sizes and (sizes[dtype] + size) * parameter.element_size() > bucket_bytes:
            close(dtype)
        start = sizes.get(dtype, 0)
        open_pieces.setdefault(dtype, []).append(Piece(name, parameter, place, start))
        sizes[dtype] = start + size
    for dtype in list(sizes):
        close(dtype)
    return tuple(buckets)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
