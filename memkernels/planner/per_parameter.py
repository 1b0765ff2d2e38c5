"""Bytes that each trained parameter has of something, and which of them a tier takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property

TIER_BYTES = 1 << 20  # of a parameter, from which on they move: the optimizers' min_bytes
AHEAD = 2  # parameters that are fetched ahead: their prefetch


class PerParameter:
    """Of the parameters in their order, each with how many equal ones it stands for; a tier takes those that have
    TIER_BYTES.

    Args:
        divide: at stages 1 and 2, the same of the one of so many ranks that has most; by default of each parameter an
            equal part.
        gathered: of the largest of those that at stage 3 are lent for as many parameters as ranks at a time.
    """

    def __init__(
        self,
        sizes: Iterable[tuple[int, int]],
        *,
        divide: Callable[[int], PerParameter] | None = None,
        gathered: int = 0,
    ) -> None:
        self._sizes, self._divide, self._gathered = tuple(sizes), divide, gathered

    def at_stage(self, stage: int, ranks: int) -> PerParameter:
        """The same of one rank."""
        if stage == 0:
            return self
        if stage < 3 and self._divide is not None:
            return self._divide(ranks)
        gathered = self._gathered if self._gathered >= TIER_BYTES * ranks else 0
        return PerParameter(((math.ceil(nbytes / ranks), times) for nbytes, times in self._sizes), gathered=gathered)

    @cached_property
    def total(self) -> int:
        return sum(nbytes * times for nbytes, times in self._sizes)

    @cached_property
    def moved(self) -> int:
        """Of those that a tier takes."""
        return sum(nbytes * times for nbytes, times in self._sizes if nbytes >= TIER_BYTES)

    @cached_property
    def largest(self) -> int:
        """Of those that a tier takes, the most that is lent at a time; 0: it takes none."""
        return max([*self._taken(), self._gathered], default=0)

    @cached_property
    def in_flight(self) -> int:
        """What is on a device at most, of those that a tier takes, while one of them is computed with: itself, the one
        before on its way back, and those that are fetched ahead."""
        sizes = [0, *self._taken()]
        around = max((sum(sizes[i - 1 : i + 1 + AHEAD]) for i in range(1, len(sizes))), default=0)
        return around + max(0, self._gathered - max(sizes))

    def _taken(self) -> list[int]:
        """One after the other; of equal ones as many as are in flight together."""
        sizes: list[int] = []
        for nbytes, times in self._sizes:
            if nbytes >= TIER_BYTES:
                sizes += [nbytes] * min(times, AHEAD + 2)
        return sizes
