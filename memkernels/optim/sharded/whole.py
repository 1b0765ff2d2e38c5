"""Parameters that one rank each steps as a whole, since their updates are not of elements."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from memkernels.optim.agreement import start, wait_for
from memkernels.optim.sharded.layout import Bucket, Piece


def owners_of(buckets: Sequence[Bucket], ranks: int) -> dict[int, int]:
    """Which rank steps which parameter, by place: the largest are given away first, each to a rank with the fewest
    elements."""
    owners = {}
    pieces = [piece for bucket in buckets for piece in bucket.pieces]
    elements = [0] * ranks
    for piece in sorted(pieces, key=lambda piece: (-piece.parameter.numel(), piece.place)):
        owner = owners[piece.place] = elements.index(min(elements))
        elements[owner] += piece.parameter.numel()
    return owners


class Owners:
    """Each parameter's rank, which steps it, and what it takes to that."""

    def __init__(self, buckets: Sequence[Bucket], group: dist.ProcessGroup) -> None:
        self._buckets, self._group, self._rank = buckets, group, dist.get_rank(group)
        self._of = owners_of(buckets, dist.get_world_size(group))

    def of(self, piece: Piece) -> int:
        return self._of[piece.place]

    def part(self, piece: Piece, whole: Tensor) -> Tensor:
        """A parameter on its owner; elsewhere nothing, of as many dimensions, but one at least."""
        return whole if self.of(piece) == self._rank else whole.new_empty((0,) * max(1, whole.dim()))

    def gather(self, sums: Mapping[int, Tensor], present: Container[int]) -> dict[int, Tensor]:
        """The gradients of those parameters that are `present`, in the shape of `part`; every rank calls it.

        Args:
            sums: this rank's elements of each, by place: the range that its bucket gives it.
        """
        gathered: dict[int, Tensor] = {}
        exchanges = []
        for bucket in self._buckets:
            for piece in (piece for piece in bucket.pieces if piece.place in present):
                own, owner = sums[piece.place], self.of(piece)
                lengths = [last - first for first, last in (bucket.elements_of(piece, r) for r in range(bucket.ranks))]
                whole = own.new_empty(piece.parameter.numel() if owner == self._rank else 0)
                options = {
                    "output_split_sizes": lengths if owner == self._rank else [0] * bucket.ranks,
                    "input_split_sizes": [len(own) if rank == owner else 0 for rank in range(bucket.ranks)],
                }
                if piece.parameter.numel():
                    exchanges.append(start(dist.all_to_all_single, whole, own, group=self._group, **options))
                gathered[piece.place] = whole.view(self.part(piece, piece.parameter).shape)
        for exchange in exchanges:
            wait_for(exchange)
        return gathered
