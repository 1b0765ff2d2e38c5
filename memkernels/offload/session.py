"""What one entry of the context manager does with each tensor that autograd saves."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memkernels.offload.budget import Claim
from memkernels.offload.compression import Codec, Compress, codec_for
from memkernels.offload.layers import LayerWatch
from memkernels.offload.order import Order, Tape
from memkernels.offload.source import Source
from memkernels.offload.store import Stored, TieredStore
from memkernels.offload.tensors import Span, View, bytes_of, span_of, span_to_move, storage_id, witness_of
from memkernels.ops.checks import PLAIN_TENSORS
from memkernels.ops.saved import is_compressible

_CLEAN_EVERY = 256  # saved tensors after which a tape that nobody went back on is looked through


@dataclass(frozen=True)
class Policy:
    """Which tensors move, how many are read ahead, and in which bits."""

    min_bytes: int = 1 << 20
    keep_last_layers: int = 1
    prefetch: int = 2
    compress: Compress | None = None


@dataclass
class Counts:
    """Saved tensors that moved, that share what moved already, and that stayed."""

    moved: int = 0
    shared: int = 0
    stayed: int = 0


@dataclass(frozen=True, eq=False)
class _Unchanged:
    """What autograd checks of what it saves without hooks: that `counted`, of a tensor so `named`, is at `version`."""

    counted: Tensor
    version: int
    named: str

    @staticmethod
    def of(tensor: Tensor, counted: Tensor | None = None) -> _Unchanged:
        named = "a nested tensor" if tensor.is_nested else f"a tensor of shape {tuple(tensor.shape)}"
        return _Unchanged(witness_of(tensor) if counted is None else counted, tensor._version, named)

    def check(self) -> None:
        version = self.counted._version
        if version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation:"
                f" {self.named} is at version {version}; expected version {self.version} instead."
            )


@dataclass(frozen=True, eq=False)
class _Stays:
    """The tensor itself, and its share of the host tier where that counts it."""

    tensor: Tensor
    unchanged: _Unchanged
    claim: Claim | None = None

    @staticmethod
    def of(tensor: Tensor, claim: Claim | None = None) -> _Stays:
        kept = tensor.detach()
        return _Stays(kept, _Unchanged.of(tensor, kept), claim)

    def unpack(self) -> Tensor:
        self.unchanged.check()
        return self.tensor


@dataclass(frozen=True, eq=False)
class _Moved:
    """`nbytes` of a storage, in `codec` where there is one."""

    stored: Stored
    nbytes: int
    codec: Codec | None
    view: View
    session: Session
    tape: Tape
    position: int
    unchanged: _Unchanged

    def unpack(self) -> Tensor:
        self.unchanged.check()
        return self.session.load(self)


@dataclass(frozen=True, eq=False)
class _Wrapped:
    """A tensor subclass, such as DTensor or NF4Tensor, whose parts went their own ways."""

    rebuild: Callable[[dict[str, Any]], Tensor]
    parts: dict[str, Any]
    unchanged: _Unchanged

    def unpack(self) -> Tensor:
        self.unchanged.check()
        parts = {name: part.unpack() if isinstance(part, _PACKED) else part for name, part in self.parts.items()}
        return self.rebuild(parts).detach()


_PACKED = (_Stays, _Moved, _Wrapped)


@dataclass(frozen=True)
class _Entry:
    """Bytes of a storage, and what holds them, in which bits."""

    source: Source
    span: Span
    codec: Codec | None
    found: weakref.ref[Stored | Claim]


def _arrived(tensor: Any) -> Tensor:
    """Of what an asynchronous collective still fills (AsyncCollectiveTensor) the tensor, once it is there."""
    return tensor.trigger_wait() if hasattr(tensor, "trigger_wait") else tensor


class _Known:
    """What was taken of one storage: stored copies or claims."""

    def __init__(self, tensor: Tensor):
        self.storage = StorageWeakRef(tensor.untyped_storage())  # while it is held, no other storage has this identity
        self._entries: list[_Entry] = []

    def find(self, tensor: Tensor, source: Source, compressible: bool) -> tuple[Stored | Claim, _Entry] | None:
        """What holds the bytes of a tensor."""
        span = span_of(tensor)
        for entry in self._entries:
            fits = entry.codec is None or (compressible and entry.codec.dtype == tensor.dtype)
            if fits and entry.source.is_that_of(source) and entry.span.holds(span):
                found = entry.found()
                if found is not None:
                    return found, entry
        return None

    def add(self, entry: _Entry) -> None:
        self._entries.append(entry)

    @property
    def stale(self) -> bool:
        return self.storage.expired() or all(entry.found() is None for entry in self._entries)


class Session:
    """Packs for the thread that made it, until `end`; what was packed may come back later, in any thread."""

    def __init__(
        self,
        store: TieredStore,
        policy: Policy,
        order: Order,
        expected_calls: weakref.WeakKeyDictionary[torch.nn.Module, int],
        counts: Counts,
    ):
        self._store = store
        self._policy = policy
        self._order = order
        self._counts = counts
        self._lock = threading.RLock()
        self._tape = Tape(order)
        self._known: dict[int, _Known] = {}
        self._watch = LayerWatch(policy.keep_last_layers, expected_calls)

    def end(self) -> None:
        self._watch.end()

    def pack(self, tensor: Tensor) -> Any:
        with self._lock:
            self._store.let_go()
            return self._pack(tensor, tensor)

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        return packed.unpack()

    def load(self, moved: _Moved) -> Tensor:
        with self._lock:
            self._watch.leave_last_layers()
            upcoming = moved.tape.upcoming(moved.position, self._policy.prefetch)
        self._store.let_go()
        data = self._store.load(moved.stored, upcoming)
        return moved.view.tensor(data if moved.codec is None else moved.codec.decode(data, moved.nbytes))

    def _pack(self, tensor: Tensor, whole: Tensor) -> Any:
        """Packs what is saved, `whole`, or a part of it where it wraps others."""
        tensor = _arrived(tensor)
        if is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, torch.nn.Parameter):
            return self._pack_parts(tensor, whole)
        if self._stays(tensor):
            self._counts.stayed += 1
            return _Stays.of(tensor)
        known = self._known.get(storage_id(tensor))
        if known is None:
            known = self._known[storage_id(tensor)] = _Known(tensor)
        source, compressible = Source.of(tensor, whole), is_compressible(whole)
        before = known.find(tensor, source, compressible)
        if before is not None:
            self._counts.shared += 1
            found, entry = before
        else:
            found, entry = self._take(tensor, source, compressible)
            known.add(entry)
        if isinstance(found, Claim):
            return _Stays.of(tensor, found)
        self._turn_tape()
        return _Moved(
            found,
            entry.span.nbytes,
            entry.codec,
            View.of(tensor, entry.span),
            self,
            self._tape,
            self._tape.append(found),
            _Unchanged.of(tensor),
        )

    def _take(self, tensor: Tensor, source: Source, compressible: bool) -> tuple[Stored | Claim, _Entry]:
        codec = codec_for(self._policy.compress, tensor) if compressible else None
        span = span_to_move(tensor) if codec is None else span_of(tensor)
        # What is in host memory is on the host tier as it is.
        found: Stored | Claim | None = self._store.claim_in_place(tensor.device, span.nbytes)
        if found is None:
            data = bytes_of(tensor, span)
            found = self._store.put(data if codec is None else codec.encode(data))
            self._counts.moved += 1
        else:
            codec = None
            self._counts.stayed += 1
        return found, _Entry(source, span, codec, weakref.ref(found))

    def _pack_parts(self, tensor: Any, whole: Tensor) -> _Wrapped:
        names, context = tensor.__tensor_flatten__()
        parts = {name: getattr(tensor, name) for name in names}
        for name, part in parts.items():
            # Jagged tensors are known to have one shape by the identity of their offsets.
            if isinstance(part, Tensor) and (name == "_values" or not tensor.is_nested):
                parts[name] = self._pack(part, whole)
        cls, size, stride = type(tensor), tensor.size(), tensor.stride()
        return _Wrapped(
            lambda parts: cls.__tensor_unflatten__(parts, context, size, stride),
            parts,
            _Unchanged.of(tensor),
        )

    def _stays(self, tensor: Tensor) -> bool:
        """Parameters, buffers and what else its owner holds on to; small tensors; those of the last layers."""
        if type(tensor) not in PLAIN_TENSORS or tensor.layout != torch.strided or tensor.device.type == "meta":
            return True
        # Nested tensors that are no subclass have sizes for each part; those of zeros have no memory.
        if tensor.is_quantized or tensor.is_nested or tensor._is_zerotensor():
            return True
        for owner in (tensor, tensor._base):
            if owner is not None and (isinstance(owner, torch.nn.Parameter) or (owner.is_leaf and owner.requires_grad)):
                return True
        return (
            self._watch.in_last_layers
            or span_of(tensor).nbytes < self._policy.min_bytes
            or storage_id(tensor) in self._watch.owned
        )

    def _turn_tape(self) -> None:
        """A new tape where backward through the current one began, or nothing on it is left."""
        if self._tape.unpacked or (len(self._tape) % _CLEAN_EVERY == 0 and not self._tape.alive):
            self._tape = Tape(self._order)
            self._known = {identity: known for identity, known in self._known.items() if not known.stale}

    def forget_gone(self) -> None:
        """Lets go of what is known of storages that are gone, which until then keep their identities."""
        self._known = {identity: known for identity, known in self._known.items() if not known.storage.expired()}
