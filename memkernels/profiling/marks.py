"""Marks in the profiler's record, among its allocations: what an address is, and what the step is doing.

A mark is an empty `record_function`, so that it has the clock of the allocations and its place among them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.profiler import record_function

_PREFIX = "memkernels.memory"


def mark(kind: str, *values: object) -> None:
    """Leaves a mark; none of its parts but the last holds a `|`."""
    with record_function("|".join((_PREFIX, kind, *map(str, values)))):
        pass


def parse(name: str) -> list[str] | None:
    """Kind and values of a mark, from an event's name; None for other events."""
    return name.split("|")[1:] if name.startswith(_PREFIX + "|") else None


def place(tensor: Tensor) -> tuple[torch.device, int]:
    """Where a tensor's storage lies: device and address."""
    return tensor.device, tensor.untyped_storage().data_ptr()
