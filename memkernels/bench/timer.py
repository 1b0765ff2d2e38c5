"""Interleaved timing: every provider once a round, so that a busy neighbour slows them all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Measure = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Action:
    """What is timed: `run` gets what `prepare` returned; `prepare` is outside the clock."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Plan:
    """Rounds fill `budget` seconds, but number at least `least` and at most `most`, after `warmup` calls each."""

    budget: float = 6.0
    least: int = 7
    most: int = 200
    warmup: int = 2


@dataclass(frozen=True)
class Timing:
    """Seconds over rounds, and the median over rounds of the ratio to the baseline in the same round."""

    median: float
    p10: float
    p90: float
    ratio: float


def wall_clock(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that `run` takes; freeing its result is not counted."""
    start = clock()
    result = run()
    elapsed = clock() - start
    del result
    return elapsed


def cuda_clock(flush_bytes: int = 256 << 20) -> Measure:
    """Seconds between two CUDA events around a call, with the L2 cache overwritten before it."""
    flush = torch.empty(flush_bytes, dtype=torch.int8, device="cuda")

    def measure(run: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    return measure


def time_interleaved(
    actions: Mapping[str, Action], baseline: str, *, plan: Plan | None = None, measure: Measure = wall_clock
) -> dict[str, Timing]:
    """Time the actions round-robin, the first of each round rotating.

    Args:
        actions: one per provider.
        baseline: the provider that ratios are taken to.
        plan: rounds and warm-up.
        measure: runs a call and returns its seconds.

    Returns:
        A `Timing` per provider, in the order of `actions`.

    Raises:
        ValueError: `baseline` is not among the actions.
    """
    if baseline not in actions:
        raise ValueError(f"baseline must be one of {list(actions)}, got {baseline!r}")
    plan = plan or Plan()
    once = 0.0
    for action in actions.values():
        once += min(_call(action, measure) for _ in range(plan.warmup))
    rounds = max(plan.least, min(plan.most, int(plan.budget / max(once, 1e-9))))
    names = list(actions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(_call(actions[name], measure))
    finally:
        if collecting:
            gc.enable()
    return {name: _timing(seconds[name], seconds[baseline]) for name in names}


def _call(action: Action, measure: Measure) -> float:
    prepared = action.prepare()
    return measure(lambda: action.run(prepared))


def _timing(seconds: list[float], baseline: list[float]) -> Timing:
    deciles = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds
    ratios = [own / other for own, other in zip(seconds, baseline, strict=True)]
    return Timing(statistics.median(seconds), deciles[0], deciles[-1], statistics.median(ratios))
