"""Copies of a device's tensors into blocks of a slab and back, beside what is computed."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from memkernels.offload.lent import Lent
from memkernels.offload.runtime import load_runtime

_UNDER_WAY = 256 << 20  # bytes of device memory that copies out of it hold, at most, beside one tensor


class Cuda(Protocol):
    """What copies need of a CUDA: the functions of its runtime, its devices, their streams, and what those use."""

    calls: Any

    def has(self, device: torch.device) -> bool: ...
    def stream(self, device: torch.device) -> int: ...
    def use(self, tensor: Tensor) -> None: ...


class TorchCuda:
    """The CUDA that torch computes with.

    Args:
        library: path of the runtime library that torch has loaded.
    """

    def __init__(self, library: str):
        self.calls = load_runtime().CudaCalls(library)

    @staticmethod
    def has(device: torch.device) -> bool:
        return device.type == "cuda"

    @staticmethod
    def stream(device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    @staticmethod
    def use(tensor: Tensor) -> None:
        """Tells the allocator that the current stream uses memory that may have been made for another."""
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


class HostThreads:
    """Memory of the host, copied by threads; who uses it waits for a copy on its own thread."""

    def __init__(self) -> None:
        self.calls = load_runtime().HostCalls()

    @staticmethod
    def has(device: torch.device) -> bool:
        return device.type == "cpu"

    @staticmethod
    def stream(device: torch.device) -> int:
        return 0

    @staticmethod
    def use(tensor: Tensor) -> None:
        pass


def find_cuda() -> Cuda | None:
    """torch's CUDA; None where there is none, or its runtime library is not to be found."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    for path in _loaded_libraries():
        if Path(path).name.startswith("libcudart.so"):
            return TorchCuda(path)
    return None


def _loaded_libraries() -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line[line.index("/") :] for line in lines if "/" in line]


class Arrival:
    """Bytes on their way into memory of the device, for the stream that was current when they set off."""

    def __init__(self, copies: DeviceCopies, copy: Any, stream: int, tensor: Tensor):
        self.copies = copies
        self.copy = copy
        self.stream = stream
        self.tensor: Tensor | None = tensor  # until it is handed out
        self._lent: Lent | None = None

    @property
    def usable(self) -> bool:
        return self.tensor is not None or (self._lent is not None and self._lent.usable)

    def hand_out(self) -> Tensor | None:
        """The tensor; of one that was handed out before what still serves, or None."""
        if self.tensor is None:
            return None if self._lent is None else self._lent.again()
        tensor, self.tensor = self.tensor, None
        self._lent = Lent(tensor)
        return tensor


class DeviceCopies:
    """Copies between one device and a slab's blocks.

    Memory that a copy reads or writes is held here until the copy is done, or until the stream that uses it waits for
    the copy: what that stream is given from then on may have the memory. It would go back to the stream
    that it was made for, which has not waited where it is another, so the allocator is told that this one uses it.
    """

    def __init__(self, cuda: Cuda, device: torch.device, *, under_way: int = _UNDER_WAY):
        self._cuda = cuda
        self._device = device
        self._engine = load_runtime().CopyEngine(cuda.calls, device=device.index or 0)
        self._limit = under_way
        self._lock = threading.RLock()
        self._leaving: deque[tuple[Any, int, Tensor]] = deque()
        self._arriving: dict[Arrival, Tensor] = {}

    def out(self, source: Tensor, block: Any) -> Any:
        """Begins to copy `source`, (n,) uint8, into a block; it may go once this returns, but must not change before
        the copy is done."""
        stream = self._cuda.stream(self._device)
        with self._lock:
            self.let_go()
            self._cuda.use(source)
            copy = self._engine.out(source.data_ptr(), block, stream=stream)
            self._leaving.append((copy, stream, source))
            # Where copies are slower than what is computed, computing waits, so that memory is free in time: the host
            # runs ahead of both, and would otherwise hold on to everything.
            while sum(tensor.numel() for _, _, tensor in self._leaving) > self._limit + source.numel():
                oldest, stream_of, _ = self._leaving.popleft()
                oldest.wait_on(stream_of)
        return copy

    def into(self, block: Any, after: Any = None) -> Arrival:
        """Begins to copy a block into new memory of the device, once `after`, the copy that fills it, is done."""
        stream = self._cuda.stream(self._device)
        tensor = torch.empty(block.nbytes, dtype=torch.uint8, device=self._device)
        with self._lock:
            if after is not None and not after.done():
                after.wait_on(self._engine.in_stream)
            arrival = Arrival(self, self._engine.into(tensor.data_ptr(), block, stream=stream), stream, tensor)
            self._arriving[arrival] = tensor
        return arrival

    def take(self, arrival: Arrival) -> Tensor | None:
        """What arrived, for the current stream to use; None where it set off for another stream, or serves no more."""
        if arrival.stream != self._cuda.stream(self._device):
            return None
        tensor = arrival.hand_out()
        if tensor is not None:
            arrival.copy.wait_on(arrival.stream)
            with self._lock:
                self._arriving.pop(arrival, None)
        return tensor

    def let_go(self) -> None:
        """Holds memory no longer whose copies are done."""
        with self._lock:
            while self._leaving and self._leaving[0][0].done():
                self._leaving.popleft()
            for arrival in [arrival for arrival in self._arriving if arrival.copy.done()]:
                del self._arriving[arrival]
