"""The size of a part that is tried next, by what ran and by what did not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary


@dataclass
class Fitting:
    """The largest size that ran, and the smallest that did not fit."""

    fits: int = 0
    fails: float = math.inf

    def size(self, count: int) -> int:
        """The size to begin a batch of `count` with: one that fits, or one in between that would make fewer parts: of
        the numbers of parts that are open the middle one, so that a few batches find the fewest."""
        if count <= self.fits or self.fails == math.inf:
            return count
        if self.fits == 0:
            return self._half(count)
        most = math.ceil(count / self.fits)
        fewest = math.ceil(count / (self.fails - 1))
        number = (fewest + most) // 2
        return math.ceil(count / number) if number < most else self.fits

    def size_after_failure(self, count: int) -> int:
        """The size to begin the batch anew with: one that fitted before, or half of what did not."""
        return self.fits or self._half(count)

    def ran(self, size: int) -> None:
        self.fits = max(self.fits, size)

    def failed(self, size: int) -> None:
        """What fitted once and does no longer counts as never tried."""
        self.fails = min(self.fails, size)
        if self.fits >= size:
            self.fits = 0

    def _half(self, count: int) -> int:
        return min(count, math.ceil(self.fails / 2))


# By the step's owner and function, the limit, and what a row of the batch was like. An owner that is gone takes its own
# along.
_fitting: WeakKeyDictionary[Any, dict[tuple, Fitting]] = WeakKeyDictionary()


def known(step: Callable, kind: tuple) -> Fitting:
    """What is remembered of a step and of batches of a kind, to be written to."""
    owner, function = (step.__self__, step.__func__) if isinstance(step, MethodType) else (step, None)
    try:
        return _fitting.setdefault(owner, {}).setdefault((function, *kind), Fitting())
    except TypeError:  # no key: not hashable, or not to be referenced weakly
        return Fitting()
