"""Stage 2 of ZeRO with the sums of gradients in host memory or on disk, from their exchange to the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from memkernels.offload.budget import Claim
from memkernels.offload.store import Stored, TieredStore
from memkernels.optim.operators import square_sum
from memkernels.optim.sharded.gradients import Buffers, PassingGradients, add_up
from memkernels.optim.sharded.layout import Bucket


@dataclass(frozen=True)
class _Sum:
    """A bucket's sum, on the tier or, where it stays, in memory, with its share of that where the tier counts it; the
    sum of its squares. What is on the tier is still to be multiplied by `factors`."""

    kept: Stored | Tensor
    square: Tensor
    claim: Claim | None
    factors: tuple[float, ...] = ()

    def times(self, factor: float) -> _Sum:
        square, factors = self.square * factor**2, self.factors
        if isinstance(self.kept, Tensor):
            self.kept.mul_(factor)
        else:
            factors = (*factors, factor)
        return replace(self, square=square, factors=factors)

    def copy(self) -> _Sum:
        return replace(self, kept=self.kept.clone()) if isinstance(self.kept, Tensor) else self


class SumsOnTier(PassingGradients):
    """One bucket's sum at a time is in memory.

    The first error of the disk is kept for `square` to raise: a backward goes on, in whose exchanges the other ranks
    wait for this one.
    """

    may_fail = True

    def __init__(
        self,
        buckets: Sequence[Bucket],
        buffers: Buffers,
        wire: Sequence[torch.dtype],
        device: torch.device,
        store: TieredStore,
        min_bytes: int,
        prefetch: int,
    ) -> None:
        super().__init__(buckets, buffers, wire, shards=[])
        self.tier = store
        self._device, self._min_bytes, self._prefetch = device, min_bytes, prefetch
        self._sums: dict[int, _Sum] = {}
        self._failure: OSError | MemoryError | None = None

    def store(self, i: int, parts: Tensor) -> None:
        bucket, before = self._buckets[i], self._sums.pop(i, None)
        shard: Tensor | None = None
        if before is not None:
            try:
                shard = self._load(before, i)
            except OSError as error:
                self._failure = self._failure or error
        is_empty = shard is None
        if shard is None:
            shard = torch.empty(bucket.shard_size, dtype=bucket.dtype, device=self._device)
        del before  # so that its place on disk is free
        add_up(shard, parts, is_empty=is_empty)
        self._keep(i, shard)

    def sums(self) -> Iterator[Mapping[int, Tensor]]:
        for i in sorted(self._sums):
            yield {i: self._load(self._sums[i], i)}

    def square(self) -> Tensor:
        if self._failure is not None:
            raise self._failure
        squares = [kept.square for kept in self._sums.values()]
        return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)

    def multiply(self, factor: float) -> None:
        self._sums = {i: kept.times(factor) for i, kept in self._sums.items()}

    def copies(self) -> Any:
        return {i: kept.copy() for i, kept in self._sums.items()}

    def put_back(self, sums: Any) -> None:
        self._sums = sums

    def clear(self, only_sums: bool) -> None:
        super().clear(only_sums)
        self._sums, self._failure = {}, None

    def _load(self, kept: _Sum, i: int) -> Tensor:
        """Bucket i's sum, which may be written to; those of the buckets that come next are read ahead."""
        shard = kept.kept
        if isinstance(shard, Stored):
            following = (self._sums[j].kept for j in range(i + 1, len(self._buckets)) if j in self._sums)
            ahead = (other for other in following if isinstance(other, Stored))
            shard = self.tier.load(shard, list(islice(ahead, self._prefetch))).view(self._buckets[i].dtype)
        for factor in kept.factors:
            shard.mul_(factor)
        return shard

    def _keep(self, i: int, shard: Tensor) -> None:
        kept: Stored | Tensor = shard
        claim = None
        if shard.nbytes >= self._min_bytes:
            try:
                claim = self.tier.claim_in_place(shard.device, shard.nbytes)
                if claim is None:
                    kept = self.tier.put(shard.view(torch.uint8))
            except (OSError, MemoryError) as error:
                self._failure = self._failure or error
        self._sums[i] = _Sum(kept, square_sum([shard]), claim)
