"""Allocations of a recorded stretch of a program, and what they were for, out of the profiler's events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch._C._profiler import _EventType

from memkernels.profiling.categories import CATEGORIES
from memkernels.profiling.marks import parse

_BACKWARD = "autograd::engine::evaluate_function: "


@dataclass
class Allocation:
    """Memory from `first` to `last` (ns; None: it was still there at the end).

    `op` allocated it, or the node of backward did; `module` is what called the op, in forward.
    """

    device: str
    nbytes: int
    first: int
    last: int | None = None
    category: str = "temporary"
    op: str = ""
    module: str = ""
    saved: int | None = None  # when autograd first saved it outside of backward


@dataclass(frozen=True)
class Phase:
    """forward, backward or optimizer, from `first` to `last` (ns)."""

    name: str
    first: int
    last: int


@dataclass
class Record:
    """`offloaded` are the bytes on tiers of offload from some time on."""

    first: int
    last: int
    allocations: list[Allocation] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    offloaded: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class _Event:
    time: int
    end: int
    name: str
    op: str  # the outermost that runs
    in_backward: bool
    memory: tuple[str, int, int] | None  # device, address, bytes allocated or (negative) freed


def read(tree: list[Any]) -> Record:
    """The record of a profiler's `experimental_event_tree()`."""
    events = sorted(_flat(tree), key=lambda event: event.time)
    if not events:
        raise RuntimeError("profile: nothing was recorded: nothing ran, or another profiler was begun meanwhile.")
    record = Record(events[0].time, max(event.end for event in events))
    alive: dict[tuple[str, int], Allocation] = {}
    modules: list[str] = []
    offloaded = 0
    for event in events:
        if event.memory is not None:
            key, nbytes = event.memory[:2], event.memory[2]
            before = alive.pop(key, None)
            if before is not None:
                before.last = event.time
            if nbytes > 0:
                module = modules[-1] if modules and not event.in_backward else ""
                alive[key] = Allocation(key[0], nbytes, event.time, op=event.op, module=module)
                record.allocations.append(alive[key])
            continue
        match parse(event.name):
            case ["alive", category, device, address, size]:
                key = device, int(address)
                alive[key] = Allocation(device, int(size), record.first, category=category)
                record.allocations.append(alive[key])
            case ["freed", device, address]:
                if (freed := alive.pop((device, int(address)), None)) is not None:
                    freed.last = event.time
            case ["is", category, device, address]:
                _categorise(alive.get((device, int(address))), category, event)
            case ["offloaded", change]:
                offloaded += int(change)
                record.offloaded.append((event.time, offloaded))
            case ["kept", nbytes_kept]:
                offloaded += int(nbytes_kept)
                record.offloaded.append((record.first, offloaded))
            case ["enter", *parts]:
                modules.append("|".join(parts))
            case ["leave"] if modules:
                modules.pop()
    record.phases = list(_phases(events))
    _drop_saved_in_vain(record)
    return record


def _flat(tree: list[Any]) -> Iterator[_Event]:
    waiting = [(event, "", False) for event in tree]
    while waiting:
        event, op, in_backward = waiting.pop()
        name, memory = event.name, None
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            device = str(fields.device)
            memory = device, fields.ptr, fields.alloc_size
        elif name.startswith(_BACKWARD):
            op, in_backward = name.removeprefix(_BACKWARD), True
        elif not op and event.tag == _EventType.TorchOp and "::" in name:
            op = name
        yield _Event(event.start_time_ns, event.end_time_ns, name, op, in_backward, memory)
        waiting.extend((child, op, in_backward) for child in event.children)


def _categorise(allocation: Allocation | None, category: str, event: _Event) -> None:
    if allocation is None:
        return
    if category == "activations" and not event.in_backward and allocation.saved is None:
        allocation.saved = event.time
    if CATEGORIES[category].rank > CATEGORIES[allocation.category].rank:
        allocation.category = category


def _phases(events: list[_Event]) -> Iterator[Phase]:
    """Forward from a call of an outermost module on, backward over autograd's nodes, the optimizer's step."""
    name, first, last = "", 0, 0
    for event in events:
        found = parse(event.name) or [""]
        if found[0] == "phase" and not event.in_backward:
            now = found[1]
        elif event.name.startswith(_BACKWARD):
            now = "backward"
        else:
            if name == "forward" and event.memory is None:
                last = max(last, event.end)
            continue
        if now != name:
            if name:
                yield Phase(name, first, event.time if name == "optimizer" else last)
            name, first = now, event.time
        last = max(last, event.end)
    if name:
        yield Phase(name, first, last)


def _drop_saved_in_vain(record: Record) -> None:
    """What was saved but is gone when backward begins, as checkpointing and offload let it go, is temporary."""
    backward = [phase.first for phase in record.phases if phase.name == "backward"]
    for allocation in record.allocations:
        if allocation.category == "activations" and allocation.saved is not None and allocation.last is not None:
            begins = next((first for first in backward if first > allocation.saved), None)
            if begins is not None and allocation.last < begins:
                allocation.category = "temporary"
