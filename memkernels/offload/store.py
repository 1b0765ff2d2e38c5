"""Bytes kept in host memory or on disk."""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from memkernels.offload.budget import Budget, Claim
from memkernels.offload.device import Arrival, Cuda, DeviceCopies, HostThreads, find_cuda
from memkernels.offload.lent import Lent
from memkernels.offload.memory import available_memory, total_memory
from memkernels.offload.runtime import load_runtime
from memkernels.ops.checks import check_integer

Tier = Literal["host", "disk", "auto"]
TIERS = ("host", "disk", "auto")

STAGING_BYTES = 128 << 20  # bytes of host memory through which the disk is written and read, by default
_SLAB_STEP = 16 << 20
_PARTS = 8  # that the staging blocks hold of a tensor which is larger than they are
# They hand parts to the disk and compute checksums: more than cores, which are busy with what trains.
THREADS = 8


@dataclass(eq=False)
class Stored:
    """Bytes in a `TieredStore`; they are free again with its last reference.

    They came from `device` and go back there. On disk: `extent` is where, `block` the memory they are still or again
    in, `reading` what fills it from the file, and `filling` what filled it from a device's memory. `lent` is what was
    handed out last, and `arrival` the same where a copy brought it. Of those that passed in `parts` these have it all
    but `lent`.
    """

    nbytes: int
    device: torch.device
    claim: Claim | None = None
    extent: Any = None
    block: Any = None
    filling: Any = None
    reading: Any = None
    lent: Lent | None = None
    arrival: Arrival | None = None
    parts: tuple[Stored, ...] = ()

    @property
    def at_hand(self) -> bool:
        """Whether what was handed out serves again, or a copy of it is on its way."""
        return (self.lent is not None and self.lent.usable) or (self.arrival is not None and self.arrival.usable)


@dataclass
class StoreStatistics:
    """Bytes moved since the store was made, and how often `load` found them in memory or being read."""

    host_bytes: int = 0
    disk_bytes_written: int = 0
    disk_bytes_read: int = 0
    loads: int = 0
    loads_ready: int = 0


# Told of what any store takes in; for the memory profile.
watchers: set[Callable[[Stored], None]] = set()


class TieredStore:
    """Keeps bytes in host memory ("host"), in a file without a name ("disk"), or in host memory to its limit and then
    in the file ("auto").

    What goes to disk is copied into a few staging blocks, so that its owner may free it at once, and written from
    there; the blocks written last stay, for as long as nothing else needs them, and are not read again. What of the
    host's is larger than all of them passes in parts. It may be used from several threads.

    Memory of a CUDA device is copied on streams of the store's own, beside what is computed, and the slab is pinned.
    Memory of the host is copied by the thread that puts it: a copy beside would take cores and bandwidth from what is
    computed, and hold on to the memory meanwhile. What is read from the file comes back in its block, without one; of
    what the host tier keeps, threads of the store's own make the copies that are fetched meanwhile.

    Args:
        tier: "host", "disk" or "auto".
        max_host_bytes: bytes of host memory the store may hold. "host": default all there is. "disk": those of the
            staging blocks, default 128 MiB, and where one tensor of a device is larger, that. "auto": default half of
            what is available now, within the limits of control groups; a quarter of it is for staging.
        path: folder of the file, on a file system that is not in memory; default that of `tempfile`.

    Raises:
        TypeError: max_host_bytes is no integer, or path no name of a folder.
        ValueError: a tier, limit or path that does not fit.
        OSError: path does not exist or cannot be written.
        ImportError: `memkernels._runtime` is not built.
    """

    def __init__(
        self, tier: Tier, *, max_host_bytes: int | None = None, path: str | os.PathLike[str] | None = None
    ) -> None:
        if tier not in TIERS:
            raise ValueError(f"tier: expected {', '.join(TIERS)}, got {tier!r}.")
        if max_host_bytes is not None:
            check_integer("max_host_bytes", max_host_bytes, "a positive number of bytes or None")
        if not isinstance(path, str | os.PathLike | None):
            raise TypeError(f"path: expected a folder's name or None, got {path!r}.")
        if tier == "host" and path is not None:
            raise ValueError(f"path: expected None for tier 'host', which has no file, got {os.fspath(path)!r}.")
        self.tier = tier
        self.path = None if tier == "host" else os.fspath(path if path is not None else tempfile.gettempdir())
        self.statistics = StoreStatistics()
        memory = total_memory()
        limit = max_host_bytes or {"host": memory, "disk": STAGING_BYTES, "auto": available_memory() // 2}[tier]
        self._staging = {"host": 0, "disk": limit, "auto": limit // 4}[tier]
        self._staging_may_grow = max_host_bytes is None
        self._host = Budget(limit - self._staging)
        runtime = load_runtime()
        self._file: Any = None if self.path is None else runtime.SpillFile(self.path, threads=THREADS)
        if self._file is not None and self._file.in_memory:
            raise ValueError(
                f"path: {self.path} is on a file system in memory (tmpfs), where a file frees nothing; name a folder on"
                f" a disk for tier {tier!r}."
            )
        self._cuda = find_cuda()
        self._host_threads = HostThreads()
        self._copies: dict[torch.device, DeviceCopies] = {}
        # What is handed out belongs to the caller and is not counted, so memory itself is the slab's limit.
        self._slab = runtime.PinnedSlab(limit=memory, step=_SLAB_STEP, cuda=self._cuda and self._cuda.calls)
        self._lock = threading.RLock()
        self._in_memory: list[weakref.ref[Stored]] = []  # those on disk that hold a block, oldest first

    @property
    def direct(self) -> bool:
        """Whether the file is read and written past the page cache."""
        return self._file is not None and self._file.direct

    def claim_in_place(self, device: torch.device, nbytes: int) -> Claim | None:
        """Room in host memory for what is there already and stays where it is, as a CPU tensor does under "host".

        Returns:
            The claim, to be held as long as the bytes are; None where they are in memory of another device, or where
            the tier's limit sends them to disk.

        Raises:
            MemoryError: "host", and its limit is reached.
        """
        return None if self.is_device(device) else self._claim(nbytes)

    def is_device(self, device: torch.device) -> bool:
        """Whether its memory is not the host's."""
        return device.type != "cpu" or self._copies_of(device) is not None

    def put(self, source: Tensor) -> Stored:
        """Copies bytes in; source, (n,) uint8 on any device, may go once this returns. It may change as well, but for
        one in memory of a CUDA device, whose copy is under way.

        Raises:
            MemoryError: they do not fit into host memory, or not through the staging blocks.
            OSError: the disk is full, or an earlier write failed and failed again.
        """
        stored = self._put(source)
        for watcher in list(watchers):
            watcher(stored)
        return stored

    def _put(self, source: Tensor) -> Stored:
        nbytes = source.numel()
        claim = self._claim(nbytes)
        if claim is not None:
            stored = Stored(nbytes, source.device, claim=claim, block=self._allocate(nbytes))
            stored.filling = self._fill(stored.block, source)
            self.statistics.host_bytes += nbytes
            return stored
        if nbytes <= self._staging:
            return self._put_on_disk(source)
        if not self._staging_may_grow:
            raise MemoryError(
                f"{self._named}: {nbytes} bytes of one tensor wanted, {self._staging} available in the staging blocks"
                " that max_host_bytes allows."
            )
        if self.is_device(source.device):  # on which it is to arrive whole
            return self._put_on_disk(source)
        parts = source.split(-(-self._staging // _PARTS))
        return Stored(nbytes, source.device, parts=tuple(self._put_on_disk(part) for part in parts))

    def _put_on_disk(self, source: Tensor) -> Stored:
        nbytes = source.numel()
        with self._lock:
            self._make_room(nbytes)
            block = self._allocate(nbytes)
        filling = self._fill(block, source)
        extent = self._file.write(block, after=filling)
        stored = Stored(nbytes, source.device, block=block, filling=filling, extent=extent)
        with self._lock:
            self._in_memory.append(weakref.ref(stored))
            self.statistics.disk_bytes_written += nbytes
        return stored

    def load(self, stored: Stored, then: Iterable[Stored] = ()) -> Tensor:
        """The bytes, (n,) uint8: on the CUDA device they came from, ready for its current stream, or in host memory.
        Another load may give the same memory, and none that was written to since. `then` is fetched meanwhile: from
        disk, and what is in host memory to its device.

        Raises:
            OSError: reading failed, or a checksum does not match.
        """
        copies, then = self._copies_of(stored.device), list(_in_parts(then))
        with self._lock:
            if stored.parts:
                return self._load_parts(stored, then)
            self.statistics.loads += 1
            found = self._at_hand(stored)
            if found is not None:
                self.statistics.loads_ready += 1
                self._read_ahead(then, beside=stored)
            else:
                block = self._in_host_memory(stored, then)
                if copies is None:
                    found = _as_tensor(block)
                    if stored.block is not None:  # nothing else has the bytes: whoever gets them may change them
                        found = found.clone()
                    stored.lent, stored.arrival = Lent(found), None
                else:
                    stored.arrival = copies.into(block, stored.filling)
                    found = copies.take(stored.arrival)
                    assert found is not None
            self._send_ahead(then)
            return found

    def _load_parts(self, stored: Stored, then: list[Stored]) -> Tensor:
        found = self._at_hand(stored)
        if found is not None:
            self._read_ahead(then, beside=stored)
            return found
        found = torch.empty(stored.nbytes, dtype=torch.uint8)
        ahead, last = [*reversed(stored.parts), *then], stored.nbytes
        for i, part in enumerate(reversed(stored.parts)):
            found[last - part.nbytes : last].copy_(self.load(part, ahead[i + 1 : i + 1 + _PARTS]))
            last -= part.nbytes
        stored.lent = Lent(found)
        return found

    def trim(self) -> None:
        """Gives host memory back to the system, and the file's end to its disk, that nothing needed since this was
        called last."""
        self._slab.trim()
        if self._file is not None:
            self._file.trim()

    @staticmethod
    def _at_hand(stored: Stored) -> Tensor | None:
        """What was handed out before and still serves, or has been sent ahead."""
        if stored.arrival is not None:
            return stored.arrival.copies.take(stored.arrival)
        return None if stored.lent is None else stored.lent.again()

    def let_go(self) -> None:
        """Holds device memory no longer whose copies are done."""
        for copies in list(self._copies.values()):
            copies.let_go()

    def _copies_of(self, device: torch.device) -> DeviceCopies | None:
        """Those of a CUDA device."""
        if self._cuda is None or not self._cuda.has(device):
            return None
        return self._copies_by(self._cuda, device)

    def _copies_ahead(self, stored: Stored) -> DeviceCopies | None:
        """What brings it from its block before it is used; None where the block itself will be."""
        copies = self._copies_of(stored.device)
        if copies is None and stored.extent is None:
            return self._copies_by(self._host_threads, torch.device("cpu"))
        return copies

    def _copies_by(self, cuda: Cuda, device: torch.device) -> DeviceCopies:
        if device not in self._copies:
            with self._lock:
                self._copies.setdefault(device, DeviceCopies(cuda, device))
        return self._copies[device]

    def _claim(self, nbytes: int) -> Claim | None:
        claim = self._host.claim(nbytes)
        if claim is None and self.tier == "host":
            raise MemoryError(
                f"offload to tier 'host': {nbytes} bytes wanted, {self._host.available} of max_host_bytes="
                f"{self._host.limit} available."
            )
        return claim

    def _fill(self, block: Any, source: Tensor) -> Any:
        """Copies into a block; returns the copy where it is under way."""
        copies = self._copies_of(source.device)
        if copies is not None:
            return copies.out(source, block)
        _as_tensor(block).copy_(source)
        return None

    def _in_host_memory(self, stored: Stored, then: list[Stored]) -> Any:
        """The block that holds the bytes, or will once `filling` is done; of those that are on disk it is kept no
        longer."""
        if stored.block is None:
            self._begin_reading(stored)
        elif stored.reading is None or stored.reading.done():
            self.statistics.loads_ready += 1
        self._read_ahead(then, beside=stored)
        block = stored.block
        if stored.reading is not None:
            reading, stored.reading = stored.reading, None
            try:
                reading.wait()
            except Exception:
                stored.block = None
                raise
        if stored.extent is not None and _succeeded(stored.extent.writing):
            stored.block = None
        return block

    def _read_ahead(self, then: list[Stored], beside: Stored) -> None:
        """Begins to read where the staging blocks have room; `beside` is being handed out and takes none."""
        for stored in then:
            if stored.block is None and not stored.at_hand:
                held = sum(other.nbytes for other in self._waiting() if other is not beside)
                if held == 0 or held + stored.nbytes <= self._staging:
                    try:
                        self._begin_reading(stored)
                    except MemoryError:  # it is read when it is wanted
                        return

    def _send_ahead(self, then: list[Stored]) -> None:
        """Begins to copy to where they are used those that are in host memory."""
        for stored in then:
            copies = self._copies_ahead(stored)
            if copies is None or stored.block is None or stored.at_hand:
                continue
            if stored.reading is not None:
                if not _succeeded(stored.reading):
                    continue
                stored.reading = None
            stored.arrival = copies.into(stored.block, stored.filling)
            if stored.extent is not None and _succeeded(stored.extent.writing):
                stored.block = None

    def _begin_reading(self, stored: Stored) -> None:
        block = self._allocate(stored.nbytes)
        stored.reading = self._file.read(stored.extent, block)
        stored.block = block
        self._in_memory.append(weakref.ref(stored))
        self.statistics.disk_bytes_read += stored.nbytes

    def _make_room(self, nbytes: int) -> None:
        """Lets go of staging blocks, oldest first, until `nbytes` fit beside the others."""
        waiting = self._waiting()
        held = sum(stored.nbytes for stored in waiting)
        for stored in waiting:
            if held + nbytes <= self._staging:
                break
            self._finish_writing(stored)
            stored.block = stored.reading = None
            held -= stored.nbytes
        self._waiting()

    def _finish_writing(self, stored: Stored) -> None:
        """Where writing failed it begins again elsewhere in the file: the disk may have room by now."""
        try:
            stored.extent.writing.wait()
        except OSError:
            stored.extent = self._file.write(stored.block, after=stored.filling)
            stored.extent.writing.wait()

    def _allocate(self, nbytes: int) -> Any:
        try:
            return self._slab.allocate(nbytes)
        except MemoryError as error:
            raise MemoryError(f"{self._named}: {nbytes} bytes wanted; {error}") from error

    @property
    def _named(self) -> str:
        return f"offload to tier {self.tier!r}" + ("" if self.path is None else f" in {self.path}")

    def _waiting(self) -> list[Stored]:
        """Those on disk that hold a block, oldest first."""
        live = [stored for ref in self._in_memory if (stored := ref()) is not None and stored.block is not None]
        self._in_memory = [weakref.ref(stored) for stored in live]
        return live


def _in_parts(several: Iterable[Stored]) -> Iterator[Stored]:
    """Each, or the parts that are to be read of it: those written last come first, and may be in memory still."""
    for stored in several:
        if not stored.parts:
            yield stored
        elif not stored.at_hand:
            yield from reversed(stored.parts)


def _succeeded(transfer: Any) -> bool:
    """Whether it is done, and without an error."""
    if not transfer.done():
        return False
    try:
        transfer.wait()
    except OSError:
        return False
    return True


def _as_tensor(block: Any) -> Tensor:
    return torch.frombuffer(block, dtype=torch.uint8)
