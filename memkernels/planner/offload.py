"""`offload.offload_activations` in a trace: what would move, moves, and its bytes are counted."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memkernels.offload.order import Order
from memkernels.offload.session import Counts, Policy, Session
from memkernels.planner.trace import Event, Happening, Trace


@contextmanager
def offloading(trace: Trace) -> Iterator[None]:
    """What autograd saves within it is offloaded as `offload_activations("disk")` would, with its default arguments."""
    expected: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
    store: Any = _CountingStore(trace)
    session = Session(store, Policy(), Order(), expected, Counts())
    with torch.autograd.graph.saved_tensors_hooks(session.pack, session.unpack), _Forgetful(session):
        try:
            yield
        finally:
            session.end()


class _Forgetful(TorchDispatchMode):
    """Has a session let go of storages as soon as they are gone, since a trace sees them go when nothing names them."""

    def __init__(self, session: Session):
        super().__init__()
        self._session = session

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._session.forget_gone()
        return func(*args, **(kwargs or {}))


@dataclass(eq=False)
class _Stored:
    nbytes: int
    device: torch.device


class _CountingStore:
    """A `TieredStore` that keeps no bytes."""

    def __init__(self, trace: Trace):
        self._trace = trace

    def claim_in_place(self, device: torch.device, nbytes: int) -> None:
        """Nothing stays where it is."""

    def let_go(self) -> None:
        """There is nothing to let go of."""

    def put(self, source: Tensor) -> _Stored:
        self._trace.events.append(Event(Happening.MOVE, source.numel()))
        return _Stored(source.numel(), source.device)

    def load(self, stored: _Stored, then: Sequence[_Stored] = ()) -> Tensor:
        return torch.empty(stored.nbytes, dtype=torch.uint8, device=stored.device)
