"""Bytes over time by category, of one device."""

from __future__ import annotations

from dataclasses import dataclass

from memkernels.profiling.categories import CATEGORIES
from memkernels.profiling.record import Allocation, Phase, Record

_LEAST = 1 << 20  # bytes at a device's peak for it to have a timeline beside the first


@dataclass(frozen=True)
class Timeline:
    """From `times[i]` (seconds) on, `series[category][i]` bytes are in use on `device`."""

    device: str
    times: list[float]
    series: dict[str, list[int]]
    offloaded: list[int]
    phases: list[tuple[str, float, float]]
    allocations: list[Allocation]
    first: int

    def total(self, i: int) -> int:
        return sum(values[i] for values in self.series.values())

    @property
    def peak_index(self) -> int:
        return max(range(len(self.times)), key=self.total)

    @property
    def peak(self) -> int:
        """Bytes in use at the peak."""
        return self.total(self.peak_index)

    def by_category(self, i: int) -> dict[str, int]:
        return {category: values[i] for category, values in self.series.items()}

    def seconds(self, nanoseconds: int) -> float:
        """Of a time of the record, since its beginning."""
        return (nanoseconds - self.first) / 1e9

    def reduced(self, count: int) -> Timeline:
        """At most 2 `count` + 1 times: the first, and of each of `count` stretches the one with the most bytes, and the
        last."""
        stretch = max(self.times[-1], 1e-9) / count
        kept = [0]
        begin = 0
        for i in range(1, len(self.times) + 1):
            if i == len(self.times) or int(self.times[i] / stretch) != int(self.times[begin] / stretch):
                kept += sorted({max(range(begin, i), key=self.total), i - 1} - {0})
                begin = i
        series = {category: [values[i] for i in kept] for category, values in self.series.items()}
        times, offloaded = [self.times[i] for i in kept], [self.offloaded[i] for i in kept]
        return Timeline(self.device, times, series, offloaded, self.phases, self.allocations, self.first)


def timelines(record: Record) -> list[Timeline]:
    """Of each device that matters, the one with the highest peak first."""
    devices = dict.fromkeys(allocation.device for allocation in record.allocations)
    found = sorted((_timeline(record, device) for device in devices), key=lambda timeline: -timeline.peak)
    return found[:1] + [timeline for timeline in found[1:] if timeline.peak >= _LEAST]


def _timeline(record: Record, device: str) -> Timeline:
    own = [allocation for allocation in record.allocations if allocation.device == device]
    changes: list[tuple[int, int, str]] = [(time, nbytes, "") for time, nbytes in record.offloaded]
    for allocation in own:
        changes.append((allocation.first, allocation.nbytes, allocation.category))
        if allocation.last is not None:
            changes.append((allocation.last, -allocation.nbytes, allocation.category))
    times = [record.first, *(time for time, _, _ in sorted(changes, key=lambda change: change[0])), record.last]
    times = list(dict.fromkeys(times))
    place = {time: i for i, time in enumerate(times)}
    series = {category: [0] * len(times) for category in CATEGORIES}
    offloaded = [0] * len(times)
    for time, nbytes, category in changes:
        if category:
            series[category][place[time]] += nbytes
    for values in series.values():
        for i in range(1, len(values)):
            values[i] += values[i - 1]
    steps = dict(record.offloaded)
    for i, time in enumerate(times):
        offloaded[i] = steps.get(time, offloaded[i - 1] if i else 0)
    seconds = [(time - record.first) / 1e9 for time in times]
    phases = [_in_seconds(phase, record.first) for phase in record.phases]
    return Timeline(device, seconds, series, offloaded, phases, own, record.first)


def _in_seconds(phase: Phase, first: int) -> tuple[str, float, float]:
    return phase.name, (phase.first - first) / 1e9, (phase.last - first) / 1e9
