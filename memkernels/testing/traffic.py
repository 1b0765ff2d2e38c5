"""Counts the bytes that Triton kernels move through global memory, under Triton's interpreter (TRITON_INTERPRET=1).

Every unmasked lane of a load, store or atomic counts, caches or not, so a ratio of 1 to the least possible (each input
read once, each output written once) means that no kernel reads anything twice. It is a count, not a GPU measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

from memkernels.testing.cases import KernelCase


@dataclass
class Traffic:
    """Bytes read from and written to global memory; an atomic counts as both."""

    read_bytes: int = 0
    written_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.read_bytes + self.written_bytes


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts what the kernels launched inside it move.

    Block pointers and tensor descriptors end in the interpreter's masked load and store, so these four are all.
    """
    from triton.runtime.interpreter import interpreter_builder as builder

    traffic = Traffic()
    load, store = builder.create_masked_load, builder.create_masked_store
    exchange, update = builder.create_atomic_cas, builder.create_atomic_rmw

    def counted_load(pointers, mask, *args, **kwargs):
        traffic.read_bytes += _bytes(pointers, mask)
        return load(pointers, mask, *args, **kwargs)

    def counted_store(pointers, value, mask, *args, **kwargs):
        traffic.written_bytes += _bytes(pointers, mask)
        return store(pointers, value, mask, *args, **kwargs)

    def counted_exchange(pointers, *args):
        moved = pointers.data.size * _itemsize(pointers)
        traffic.read_bytes += moved
        traffic.written_bytes += moved
        return exchange(pointers, *args)

    def counted_update(operation, pointers, value, mask, *args):
        traffic.read_bytes += _bytes(pointers, mask)
        traffic.written_bytes += _bytes(pointers, mask)
        return update(operation, pointers, value, mask, *args)

    replaced: dict[str, Callable[..., Any]] = {
        "create_masked_load": counted_load,
        "create_masked_store": counted_store,
        "create_atomic_cas": counted_exchange,
        "create_atomic_rmw": counted_update,
    }
    with ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(builder, name, function))
        yield traffic


def _itemsize(pointers: Any) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _bytes(pointers: Any, mask: Any) -> int:
    # A block pointer's mask is a plain array, the others' is a handle; both have `data`.
    active = np.broadcast_to(np.asarray(mask.data), pointers.data.shape)
    return int(np.count_nonzero(active)) * _itemsize(pointers)


@dataclass(frozen=True)
class CaseTraffic:
    """What a case moved, and the least it could have."""

    read_bytes: int
    written_bytes: int
    least_bytes: int

    @property
    def ratio(self) -> float:
        return (self.read_bytes + self.written_bytes) / self.least_bytes


def count_case(case: KernelCase) -> CaseTraffic:
    """Runs `case` on the CPU under the interpreter and counts."""
    with count_traffic() as traffic:
        moved = case.launch("cpu")
    if not traffic.total_bytes:
        raise RuntimeError(
            f"{case.label}: no interpreted kernel was launched; set TRITON_INTERPRET=1 before importing it."
        )
    return CaseTraffic(traffic.read_bytes, traffic.written_bytes, sum(tensor.nbytes for tensor in moved))
