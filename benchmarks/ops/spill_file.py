"""The spill file's threads and checksums, against one thread that reads or writes the same file in order.

"raw" is sequential direct I/O, 16 MiB at a time. The folder is that of `tempfile`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import torch

from memkernels.bench import Benchmark, Case, Step, Work
from memkernels.offload.runtime import load_runtime
from memkernels.offload.store import THREADS

BLOCK = 16 << 20


def setup(case: Case, provider: str) -> Step:
    runtime, size = load_runtime(), case.sizes["bytes"]
    slab = runtime.PinnedSlab(limit=size, step=size)
    file = runtime.SpillFile(tempfile.gettempdir(), threads=THREADS)
    blocks = [slab.allocate(BLOCK) for _ in range(size // BLOCK)]
    for block in blocks:
        torch.frombuffer(block, dtype=torch.uint8).random_()
    extents = [file.write(block) for block in blocks]
    for extent in extents:
        extent.writing.wait()
    places = [extent.offset for extent in extents]

    def raw_write() -> None:
        for block, place in zip(blocks, places, strict=True):
            assert os.pwrite(file.fileno(), block, place) == BLOCK

    def raw_read() -> None:
        for block, place in zip(blocks, places, strict=True):
            assert os.preadv(file.fileno(), [block], place) == BLOCK

    def write() -> None:
        extents.clear()  # so that the same ranges are written again
        extents.extend(file.write(block) for block in blocks)
        for extent in extents:
            extent.writing.wait()

    def read() -> None:
        for reading in [file.read(extent, block) for extent, block in zip(extents, blocks, strict=True)]:
            reading.wait()

    moves: dict[tuple[str, str], Callable[[], None]] = {
        ("raw", "write"): raw_write,
        ("raw", "read"): raw_read,
        ("memkernels", "write"): write,
        ("memkernels", "read"): read,
    }
    move = moves[provider, "write" if case.sizes["write"] else "read"]

    def forward() -> torch.Tensor:
        move()
        return torch.ones((), requires_grad=True).clone()  # a step has a backward, of nothing here

    return Step(forward)


def work(case: Case, mode: str) -> Work:
    return Work(bytes=case.sizes["bytes"])


benchmark = Benchmark(
    op="spill_file",
    cases=(
        Case("write-1GiB", torch.uint8, {"bytes": 1 << 30, "write": 1}),
        Case("read-1GiB", torch.uint8, {"bytes": 1 << 30, "write": 0}),
    ),
    providers=("raw", "memkernels"),
    setup=setup,
    work=work,
    baseline="raw",
    modes=("forward",),
)
