"""The order in which saved tensors come back, learned from the step before."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

from memkernels.offload.store import Stored

_LENGTHS = 16  # numbers of saved tensors that an order is remembered for


class Order:
    """What followed what in backward, by position in forward, for each number of saved tensors; for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._learned: dict[int, dict[int, int]] = {}

    def exchange(self, length: int, observed: dict[int, int]) -> dict[int, int]:
        """What was observed with as many tensors before; `observed` is what the next one gets."""
        with self._lock:
            before = self._learned.pop(length, {})
            self._learned[length] = observed
            if len(self._learned) > _LENGTHS:
                del self._learned[next(iter(self._learned))]
            return before


class Tape:
    """The saved tensors of one forward pass, in its order.

    After position p comes what came after it in the step before; where none is known, p - 1.
    """

    def __init__(self, order: Order):
        self._order = order
        self._records: list[weakref.ref[Stored]] = []
        self._followed: dict[int, int] | None = None
        self._observed: dict[int, int] = {}
        self._last: int | None = None

    def __len__(self) -> int:
        return len(self._records)

    @property
    def alive(self) -> bool:
        return any(ref() is not None for ref in self._records)

    @property
    def unpacked(self) -> bool:
        """Whether backward began."""
        return self._last is not None

    def append(self, stored: Stored) -> int:
        self._records.append(weakref.ref(stored))
        return len(self._records) - 1

    def upcoming(self, position: int, count: int) -> list[Stored]:
        """At most `count` that are expected after `position`, which is being unpacked."""
        if self._followed is None:
            self._followed = self._order.exchange(len(self._records), self._observed)
        if self._last is not None:
            self._observed.setdefault(self._last, position)
        self._last = position
        own = self._records[position]()
        found: list[Stored] = []
        for stored in self._after(position):
            if len(found) == count:
                break
            if stored is not own and stored not in found:
                found.append(stored)
        return found

    def _after(self, position: int) -> Iterator[Stored]:
        assert self._followed is not None
        for _ in self._records:
            position = self._followed.get(position, position - 1)
            if not 0 <= position < len(self._records):
                return
            if (stored := self._records[position]()) is not None:
                yield stored
