"""What a computation allocates, found by running its code on tensors without memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from memkernels._library import python_implementation
from memkernels.offload.tensors import plain_parts, storage_id
from memkernels.ops import matmul
from memkernels.planner.flops import formula_of

aten = torch.ops.aten
_QUESTIONS = (aten.is_nonzero.default, aten.item.default, aten._local_scalar_dense.default)


class Happening(Enum):
    """What an event of a trace tells: memory taken or given back, a gradient complete, memory that the step of its
    parameter takes, operations, bytes moved."""

    ALLOCATE = "allocate"
    RELEASE = "release"
    COMPLETE = "complete"
    UPDATE = "update"
    COMPUTE = "compute"
    MOVE = "move"


class Event(NamedTuple):
    """`amount` is in bytes, of COMPUTE in operations; `storage` numbers the storage that it is about."""

    happening: Happening
    amount: int
    storage: int = -1


class Trace(TorchDispatchMode):
    """Records what happens to the memory of tensors while it is `running`, and how much is computed.

    Tensors are made without memory (`FakeTensor`): they have shapes, dtypes and storages that live as long as those of
    the real ones would, since the same Python code holds them. Operators that are Python themselves run too, so that
    their buffers count; of the others what they return counts. A question about values (is every label valid, is every
    weight finite?) is answered with yes.

    Operations are those of matrix products and attention, two for each multiplication with addition.

    Args:
        device: whose memory; tensors elsewhere are not recorded.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.device = device
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._live: dict[int, tuple[int, weakref.ref]] = {}  # by a storage's identity: its number, itself
        self._count = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it tensors have no memory, and are recorded; products are torch's.

        By blocks, where this processor takes them, they would be traced block by block, some thousands a step; those of
        csrc/cpu/matmul.cpp are no operations that torch counts.
        """
        none: frozenset[torch.dtype] = frozenset()
        with mock.patch.multiple(matmul, SLOW_DTYPES=none, NATIVE_DTYPES=none), self._fake, self:
            yield

    def storages(self, tensor: Tensor) -> set[int]:
        """The numbers of the storages that hold a tensor, or the parts of one."""
        identities = set(map(storage_id, plain_parts(tensor)))
        return {self._live[identity][0] for identity in identities if identity in self._live}

    def alive(self) -> set[int]:
        """The numbers of the storages that are in use."""
        return {number for number, _ in self._live.values()}

    def complete(self, gradient: Tensor) -> None:
        """Records that backward has a parameter's whole gradient."""
        for storage in self.storages(gradient):
            self.events.append(Event(Happening.COMPLETE, gradient.untyped_storage().nbytes(), storage))

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Within it a parameter is stepped: one event, of what that takes at its highest."""
        first = len(self.events)
        yield
        in_use = highest = 0
        for event in self.events[first:]:
            in_use += {Happening.ALLOCATE: event.amount, Happening.RELEASE: -event.amount}.get(event.happening, 0)
            highest = max(highest, in_use)
        self.events[first:] = [Event(Happening.UPDATE, highest)]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if any(is_traceable_wrapper_subclass(leaf) for leaf in leaves):
            return NotImplemented  # it takes itself apart, and its parts come here
        # What torch remembers of a call keeps the storages among its arguments alive.
        self._fake.cache_enabled = not any(isinstance(leaf, torch.UntypedStorage) for leaf in leaves)
        if func in _QUESTIONS:
            return True
        run = python_implementation(func, self.device.type)
        if run is None:
            result = func(*args, **kwargs)
            formula = formula_of(func._overloadpacket)
            if formula is not None:
                self.events.append(Event(Happening.COMPUTE, formula(*args, **kwargs, out_val=result)))
        else:
            with self:
                result = run(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor) and leaf.device.type == self.device.type:
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        identity = storage._cdata
        if identity in self._live:
            return
        number, nbytes = self._count, storage.nbytes()
        self._count += 1
        self.events.append(Event(Happening.ALLOCATE, nbytes, number))

        def release(_: object) -> None:
            del self._live[identity]
            self.events.append(Event(Happening.RELEASE, nbytes, number))

        self._live[identity] = number, weakref.ref(storage, release)
