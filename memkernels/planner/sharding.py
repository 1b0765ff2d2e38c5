"""What each rank has of the optimizer's states at ZeRO's stages 1 and 2, by the layout of `ShardedOptimizer`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from memkernels.optim.buckets import BUCKET_BYTES
from memkernels.optim.optimizer import LowMemoryOptimizer
from memkernels.optim.sharded.layout import Bucket, make_buckets
from memkernels.optim.sharded.whole import owners_of
from memkernels.planner.per_parameter import PerParameter


def buckets_of(parameters: Sequence[Tensor], ranks: int) -> tuple[Bucket, ...]:
    """Those that `ShardedOptimizer` exchanges, where it is given no size."""
    named = [("", parameter, place) for place, parameter in enumerate(parameters)]
    return make_buckets(named, ranks, BUCKET_BYTES)


def of_most(
    states: Mapping[LowMemoryOptimizer, Mapping[Tensor, int]], parameters: Sequence[Tensor], ranks: int
) -> PerParameter:
    """The states of the rank that has most of them in memory while a tier lends it one.

    Args:
        states: bytes of each parameter's, by the optimizer that steps it.
        parameters: of the model, in its order.
    """
    of_ranks: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for optimizer, nbytes in states.items():
        buckets = buckets_of([parameter for parameter in parameters if parameter in nbytes], ranks)
        for rank, parameter, elements in _parts(buckets, ranks, optimizer.elementwise):
            of_ranks[rank].append((nbytes[parameter] * elements // parameter.numel(), 1))
    return max(map(PerParameter, of_ranks), key=lambda of: of.total - of.moved + of.largest + of.in_flight)


def _parts(buckets: Sequence[Bucket], ranks: int, elementwise: bool) -> Iterator[tuple[int, Tensor, int]]:
    """Each rank, each parameter that it has elements of, and how many."""
    owners = {} if elementwise else owners_of(buckets, ranks)
    for bucket in buckets:
        for piece in (piece for piece in bucket.pieces if piece.parameter.numel()):
            if not elementwise:
                yield owners[piece.place], piece.parameter, piece.parameter.numel()
                continue
            last = piece.start + piece.parameter.numel() - 1
            for rank in range(piece.start // bucket.shard_size, last // bucket.shard_size + 1):
                first, end = bucket.elements_of(piece, rank)
                yield rank, piece.parameter, end - first
