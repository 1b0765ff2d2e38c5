"""Bytes that each trained parameter has of something, and which of them a tier takes."""

from __future__ import annotations

from collections.abc import Iterable

TIER_BYTES = 1 << 20  # of a parameter, from which on they move: the optimizers' min_bytes
AHEAD = 2  # parameters that are fetched ahead: their prefetch


class PerParameter:
    """Of the parameters in their order, each with how many equal ones it stands for; a tier takes those that have
    `least` bytes."""

    def __init__(self, sizes: Iterable[tuple[int, int]], least: int = TIER_BYTES) -> None:
        self._sizes, self._least = tuple(sizes), least

    def at_stage(self, stage: int, ranks: int) -> PerParameter:
        """The same, where at ZeRO's stage 3 a tier takes a rank's rows of a parameter, which have to be as many."""
        return PerParameter(self._sizes, TIER_BYTES * ranks) if stage == 3 else self

    @property
    def total(self) -> int:
        return sum(nbytes * times for nbytes, times in self._sizes)

    @property
    def moved(self) -> int:
        """Of those that a tier takes."""
        return sum(nbytes * times for nbytes, times in self._sizes if nbytes >= self._least)

    @property
    def largest(self) -> int:
        """Of those that a tier takes, the largest; 0: it takes none."""
        return max(self._taken(), default=0)

    @property
    def in_flight(self) -> int:
        """What is on a device at most, of those that a tier takes, while one of them is computed with: itself, the one
        before on its way back, and those that are fetched ahead."""
        sizes = [0, *self._taken()]
        return max((sum(sizes[i - 1 : i + 1 + AHEAD]) for i in range(1, len(sizes))), default=0)

    def _taken(self) -> list[int]:
        """One after the other; of equal ones as many as are in flight together."""
        sizes: list[int] = []
        for nbytes, times in self._sizes:
            if nbytes >= self._least:
                sizes += [nbytes] * min(times, AHEAD + 2)
        return sizes
