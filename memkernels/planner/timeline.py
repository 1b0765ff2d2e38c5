"""A traced step as what is in use at each moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from memkernels.planner.per_parameter import AHEAD, TIER_BYTES
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
        tiered: as `moments`, where gradients move to a tier as soon as they are complete, of a batch's first part and
            of those that follow, whose gradients are added to the sums from there.
        small_gradients: bytes when backward ends of those that no tier takes.
    """

    moments: Sequence[Moment]
    gradients: int
    flops: int
    moved: int
    update: int = 0
    updates: Sequence[Moment] = ()
    tiered: tuple[Sequence[Moment], Sequence[Moment]] = ((), ())
    small_gradients: int = 0


def timeline(events: Iterable[Event], saved: set[int], on_host: bool) -> Timeline:
    """What `events` come to.

    Args:
        saved: the storages that are alive when forward ends.
        on_host: whether the memory is the host's, where sums that are fetched are in offload's staging blocks.
    """
    events = list(events)
    moments, updates, gradients = _moments(events, saved)
    moving = [event.amount for event in events if event.happening is Happening.COMPLETE and event.amount >= TIER_BYTES]
    around = [sum(moving[max(0, i - 1) : i + 1 + AHEAD]) for i in range(len(moving))]
    first, _, small = _moments(events, saved, [0] * len(moving))
    later = first if on_host else _moments(events, saved, around)[0]
    totals: Counter[Happening] = Counter()
    for happening, amount, _ in events:
        totals[happening] += amount
    return Timeline(
        moments,
        gradients,
        totals[Happening.COMPUTE],
        totals[Happening.MOVE],
        max((event.amount for event in events if event.happening is Happening.UPDATE), default=0),
        updates,
        (first, later),
        small,
    )


def _moments(
    events: Iterable[Event], saved: set[int], fetched: Sequence[int] | None = None
) -> tuple[list[Moment], list[Moment], int]:
    """The highest moments, those of steps within backward, and the gradients when it ends.

    Args:
        fetched: bytes that are there besides when gradients are complete that a tier takes, in their order; None: there
            is no tier.
    """
    moments: list[Moment] = []
    updates: list[Moment] = []
    gradients = activations = transients = newest = 0
    complete: set[int] = set()
    moved: set[int] = set()
    coming = iter(fetched or ())
    for happening, amount, storage in events:
        if happening is Happening.ALLOCATE:
            complete.discard(storage)
            moved.discard(storage)
            if storage in saved:
                activations += amount
            else:
                transients += amount
            moments.append(Moment(gradients, activations, transients))
        elif happening is Happening.RELEASE and storage in moved:
            pass
        elif happening is Happening.RELEASE and storage in complete:
            gradients -= amount
        elif happening is Happening.RELEASE and storage in saved:
            activations -= amount
        elif happening is Happening.RELEASE:
            transients -= amount
        elif happening is Happening.COMPLETE and storage not in complete:
            complete.add(storage)
            newest = amount
            if fetched is not None and amount >= TIER_BYTES:
                moments.append(Moment(gradients, activations, transients + next(coming)))
                moved.add(storage)
                transients -= amount
                continue
            transients -= amount
            gradients += amount
        elif happening is Happening.UPDATE:
            updates.append(Moment(0, activations, transients + newest + amount))
    return _highest(moments), _highest(updates), gradients


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
