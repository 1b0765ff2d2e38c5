"""A traced step as what is in use at each moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from memkernels.planner.trace import Event, Happening


class Moment(NamedTuple):
    """Bytes in use, beside parameters and states.

    `gradients` are those that are complete, `activations` what is alive when forward ends, `transients` all else.
    """

    gradients: int
    activations: int
    transients: int


class Timeline(NamedTuple):
    """Of one forward and backward.

    Args:
        moments: those that no other exceeds both in gradients and in all else.
        gradients: bytes when backward ends.
        flops: operations.
        moved: bytes that offload wrote; it reads as many.
        update: bytes that the step of a parameter takes, at most.
        updates: moments of steps within backward, the gradient of the parameter among the transients; as `moments`.
    """

    moments: list[Moment]
    gradients: int
    flops: int
    moved: int
    update: int = 0
    updates: Sequence[Moment] = ()


def timeline(events: Iterable[Event], saved: set[int]) -> Timeline:
    """What `events` come to; `saved` are the storages that are alive when forward ends."""
    moments: list[Moment] = []
    updates: list[Moment] = []
    totals: Counter[Happening] = Counter()
    gradients = activations = transients = update = newest = 0
    complete: set[int] = set()
    for happening, amount, storage in events:
        totals[happening] += amount
        if happening is Happening.ALLOCATE:
            complete.discard(storage)
            if storage in saved:
                activations += amount
            else:
                transients += amount
            moments.append(Moment(gradients, activations, transients))
        elif happening is Happening.RELEASE and storage in complete:
            gradients -= amount
        elif happening is Happening.RELEASE and storage in saved:
            activations -= amount
        elif happening is Happening.RELEASE:
            transients -= amount
        elif happening is Happening.COMPLETE and storage not in complete:
            complete.add(storage)
            transients -= amount
            gradients += amount
            newest = amount
        elif happening is Happening.UPDATE:
            update = max(update, amount)
            updates.append(Moment(0, activations, transients + newest + amount))
    flops, moved = totals[Happening.COMPUTE], totals[Happening.MOVE]
    return Timeline(_highest(moments), gradients, flops, moved, update, _highest(updates))


def _highest(moments: list[Moment]) -> list[Moment]:
    """Those that no other exceeds both in gradients and in all else, most gradients first."""
    found: list[Moment] = []
    highest = -1
    for moment in sorted(set(moments), key=lambda of: (of.gradients, of.activations + of.transients), reverse=True):
        rest = moment.activations + moment.transients
        if rest > highest:
            found.append(moment)
            highest = rest
    return found
