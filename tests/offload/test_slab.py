"""memkernels._runtime's slab: memory in blocks by best fit, which grows and shrinks in steps."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slab_blocks import bytes_of, filled

_runtime = pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")
PinnedSlab = _runtime.PinnedSlab

MB = 1 << 20


@given(st.lists(st.tuples(st.integers(1, 40_000), st.integers(0, 7)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_blocks_of_a_slab_never_overlap_and_free_ranges_join(requests):
    slab = PinnedSlab(limit=64 * MB, step=16384)
    blocks = []
    for seed, (nbytes, victim) in enumerate(requests):
        blocks.append(filled(slab, nbytes, seed))
        if victim < len(blocks) - 1:
            blocks.pop(victim)
    assert all(bytes(memoryview(block)) == content for block, content in blocks)
    rounded = sum(-(-block.nbytes // 4096) * 4096 for block, _ in blocks)
    addresses = [torch.frombuffer(block, dtype=torch.uint8).data_ptr() for block, _ in blocks]
    assert all(address % 4096 == 0 for address in addresses)
    statistics = slab.statistics()
    assert (statistics["in_use"], statistics["ranges"]) == (rounded, len(blocks))
    blocks.clear()
    statistics = slab.statistics()
    assert statistics["in_use"] == 0 and statistics["largest_free"] == statistics["size"]


def test_the_smallest_range_that_fits_is_taken():
    slab = PinnedSlab(limit=MB, step=4096)
    blocks = [slab.allocate(pages * 4096) for pages in (4, 1, 2, 1, 3, 1)]
    addresses = [torch.frombuffer(block, dtype=torch.uint8).data_ptr() for block in blocks]
    blocks[0] = blocks[2] = blocks[4] = None
    assert torch.frombuffer(slab.allocate(5000), dtype=torch.uint8).data_ptr() == addresses[2]


def test_a_slab_grows_in_steps_to_its_limit():
    slab = PinnedSlab(limit=5 * MB, step=2 * MB)
    assert slab.statistics()["size"] == 0
    held = [slab.allocate(MB)]
    assert slab.statistics()["size"] == 2 * MB
    held.append(slab.allocate(3 * MB))
    assert slab.statistics()["size"] == 4 * MB and slab.statistics()["peak_in_use"] == 4 * MB
    held.append(slab.allocate(MB))
    with pytest.raises(
        MemoryError, match=f"4096 bytes wanted beyond what is free in one piece, 0 of {5 * MB} available"
    ):
        slab.allocate(1)
    held.clear()
    assert slab.allocate(5 * MB).nbytes == 5 * MB


def resident(first_block, limit):
    """Bytes in memory of a slab, of which a block is the first."""
    begin, total, holds = torch.frombuffer(first_block, dtype=torch.uint8).data_ptr(), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            holds = begin <= int(found[1], 16) < begin + limit
        elif holds and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def test_steps_that_nothing_needed_go_back_to_the_system():
    slab = PinnedSlab(limit=64 * MB, step=4 * MB)
    first, second, third = (filled(slab, 4 * MB, seed)[0] for seed in range(3))
    assert resident(first, 64 * MB) == 12 * MB
    del second, third
    slab.trim()  # since the one before, which never was, both were in use
    assert slab.statistics()["size"] == 12 * MB and resident(first, 64 * MB) == 12 * MB
    slab.trim()
    assert slab.statistics()["size"] == slab.statistics()["in_use"] == 4 * MB and resident(first, 64 * MB) == 4 * MB
    assert bytes(memoryview(first)) == bytes_of(4 * MB, 0)
    again, content = filled(slab, 9 * MB, 1)
    assert bytes(memoryview(again)) == content and slab.statistics()["size"] == 16 * MB


def test_a_step_with_a_block_at_its_end_stays():
    slab = PinnedSlab(limit=64 * MB, step=4 * MB)
    blocks = [slab.allocate(4 * MB) for _ in range(3)]
    del blocks[:2]
    for _ in range(3):
        slab.trim()
    assert slab.statistics()["size"] == 12 * MB and slab.statistics()["largest_free"] == 8 * MB
    blocks.clear()
    for _ in range(2):
        slab.trim()
    assert slab.statistics()["size"] == slab.statistics()["largest_free"] == 0
    with pytest.raises(MemoryError, match=f"{65 * MB} bytes wanted .* {64 * MB} of {64 * MB} available"):
        slab.allocate(65 * MB)


@given(st.lists(st.tuples(st.integers(1, 40_000), st.integers(0, 7), st.booleans()), max_size=40))
@settings(max_examples=60, deadline=None)
def test_trimming_takes_nothing_in_use(requests):
    slab, blocks = PinnedSlab(limit=64 * MB, step=16384), []
    for seed, (nbytes, victim, trims) in enumerate(requests):
        blocks.append(filled(slab, nbytes, seed))
        if victim < len(blocks) - 1:
            blocks.pop(victim)
        if trims:
            slab.trim()
    assert all(bytes(memoryview(block)) == content for block, content in blocks)
    blocks.clear()
    slab.trim()
    slab.trim()
    assert slab.statistics()["size"] == slab.statistics()["largest_free"] == 0


@pytest.mark.parametrize(
    ("limit", "step", "name"), [(0, 1, "limit"), (-1, 1, "limit"), (100, 1, "limit"), (MB, 0, "step")]
)
def test_a_slab_of_no_size_is_refused(limit, step, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        PinnedSlab(limit=limit, step=step)


def test_a_block_outlives_its_slab():
    block, content = filled(PinnedSlab(limit=MB, step=4096), 5000, 0)
    assert bytes(memoryview(block)) == content
