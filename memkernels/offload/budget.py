"""A number of bytes that may be taken up, and the claims on it."""

from __future__ import annotations

import threading


class Budget:
    """`limit` bytes; a claim gives its share back with its last reference."""

    def __init__(self, limit: int):
        self.limit = limit
        self._used = 0
        self._lock = threading.RLock()  # a claim may be collected while its own thread makes another

    @property
    def available(self) -> int:
        return self.limit - self._used

    def claim(self, nbytes: int) -> Claim | None:
        """A claim on `nbytes`; None where they are not available."""
        with self._lock:
            if nbytes > self.available:
                return None
            self._used += nbytes
            return Claim(self, nbytes)

    def _give_back(self, nbytes: int) -> None:
        with self._lock:
            self._used -= nbytes


class Claim:
    def __init__(self, budget: Budget, nbytes: int):
        self._budget = budget
        self.nbytes = nbytes

    def __del__(self) -> None:
        self._budget._give_back(self.nbytes)
