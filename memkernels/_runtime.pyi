# What csrc/runtime/module.cpp holds. Errors of files are OSError with errno and path, those of memory MemoryError.

class SlabBlock:
    """A range of a slab, to be read and written through the buffer protocol; free again with its last reference."""

    @property
    def nbytes(self) -> int: ...
    def __buffer__(self, flags: int) -> memoryview: ...

class PinnedSlab:
    """One region of page-aligned host memory; blocks begin at multiples of 4096 bytes, in the smallest free range.

    Address space for `limit` bytes is reserved at once; memory is taken `step` bytes at a time, where the region grows.
    """

    def __init__(self, *, limit: int, step: int, cuda: CudaCalls | None = None) -> None:
        """With `cuda` each step is registered with CUDA once, so that it is pinned."""
    def allocate(self, nbytes: int) -> SlabBlock:
        """MemoryError: the limit leaves no range of `nbytes`; it names the bytes wanted and available."""

    def trim(self) -> None:
        """Gives back to the system the steps at the end that no block was in since this was called last."""

    @property
    def limit(self) -> int: ...
    def statistics(self) -> dict[str, int]:
        """size, in_use, peak_in_use, largest_free in bytes; ranges in use."""

class Transfer:
    """A write or read under way."""

    def done(self) -> bool: ...
    def wait(self) -> None:
        """Returns when it is done; OSError: it failed, or a checksum does not match."""

class Extent:
    """A range of a file; free again with its last reference."""

    @property
    def nbytes(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def writing(self) -> Transfer: ...

class SpillFile:
    """A file in `folder` that has no name, mode 0600, and goes with the process, however that ends.

    It grows by preallocated steps of 256 MiB, holds a CRC32C for each 64 KiB, and is written and read by `threads`
    threads, 4 MiB at a time, reads first: each thread hands two such parts to the kernel at once through io_uring,
    or moves one where there is no io_uring.
    """

    def __init__(self, folder: str, *, threads: int, io_uring: bool = True) -> None: ...
    def write(self, block: SlabBlock, after: Copy | None = None) -> Extent:
        """Begins to write a block, once the copy that fills it is done; it may be dropped at once.

        OSError: the disk has no room for it.
        """

    def read(self, extent: Extent, block: SlabBlock) -> Transfer:
        """Begins to read an extent, whose writing is done, into a block of the same size."""

    def trim(self) -> None:
        """Gives back to the disk the steps at the end that no extent was in since this was called last."""

    def fileno(self) -> int: ...
    @property
    def io_uring(self) -> bool:
        """Whether transfers go through io_uring."""

    @property
    def direct(self) -> bool:
        """Whether transfers go past the page cache; without it the file system does not offer that."""

    @property
    def in_memory(self) -> bool:
        """Whether the folder is of a file system that lies in memory (tmpfs)."""

    @property
    def bytes_written(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...
    def statistics(self) -> dict[str, int]:
        """size, in_use, peak_in_use, largest_free in bytes; ranges in use."""

class CudaCalls:
    """The functions of a CUDA runtime library that copies need; RuntimeError: it has no such library or function."""

    def __init__(self, library: str) -> None: ...

class HostCalls(CudaCalls):
    """The same for memory of the host: a stream is a thread, and stream 0 the thread that calls."""

    def __init__(self) -> None: ...

class Copy:
    """A copy under way between device memory and a block; RuntimeError: in a forked child."""

    def done(self) -> bool: ...
    def wait(self) -> None: ...
    def wait_on(self, stream: int) -> None:
        """What the stream is given from now on begins after the copy."""

class CopyEngine:
    """Copies on two streams of its own, one each way; a block is free again, and an event used again, after its copy.

    Each copy waits for what `stream`, that of the caller, was given before; it is the caller who waits for the copy.
    With `HostCalls` the device is the host, and the streams are two threads. RuntimeError: in a forked child.
    """

    def __init__(self, cuda: CudaCalls, *, device: int) -> None: ...
    def out(self, address: int, block: SlabBlock, *, stream: int) -> Copy:
        """Begins to copy device memory into a block."""

    def into(self, address: int, block: SlabBlock, *, stream: int) -> Copy:
        """Begins to copy a block into device memory."""

    @property
    def out_stream(self) -> int: ...
    @property
    def in_stream(self) -> int: ...
    def pending(self) -> int:
        """Copies that are not done."""

def io_uring_missing() -> str | None:
    """Why transfers cannot go through io_uring here; None where they can."""

def crc32c(data: object, *, hardware: bool = True) -> int:
    """CRC32C of a buffer, by the processor's instruction where it has one, or by tables."""
