"""TieredStore: bytes in host memory and on disk."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from memkernels.offload import TieredStore

pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")

MB = 1 << 20


def noise(nbytes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=generator)


@pytest.fixture(params=["host", "disk", "auto"])
def store(request, tmp_path):
    if request.param == "host":
        return TieredStore("host")
    return TieredStore(request.param, path=tmp_path, max_host_bytes=8 * MB)


def test_bytes_come_back_whatever_becomes_of_their_source(store):
    sources = [noise(3 * MB // 2 + seed, seed) for seed in range(10)]
    stored = []
    for source in sources:
        copy = source.clone()
        stored.append(store.put(copy))
        copy.zero_()
    for turn in (reversed(range(10)), range(10)):
        for i in turn:
            assert torch.equal(store.load(stored[i], then=stored[max(i - 2, 0) : i]), sources[i])


def test_what_is_dropped_is_free(store):
    stored = [store.put(noise(MB, seed)) for seed in range(10)]
    loaded = store.load(stored[0])
    del stored
    assert torch.equal(loaded, noise(MB, 0))
    del loaded
    regions = [store._slab] if store.tier == "host" else [store._slab, store._file]
    deadline = time.monotonic() + 10  # for writes under way
    while any(region.statistics()["in_use"] for region in regions):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_staging_blocks_stay_within_their_limit(tmp_path):
    store = TieredStore("disk", path=tmp_path, max_host_bytes=4 * MB)
    stored = [store.put(noise(MB, seed)) for seed in range(40)]
    assert store._slab.statistics()["peak_in_use"] == 4 * MB
    for i in reversed(range(40)):
        store.load(stored[i], then=stored[max(i - 8, 0) : i])
    assert store._slab.statistics()["peak_in_use"] <= 5 * MB  # and one in use


def test_what_was_written_last_is_not_read(tmp_path):
    store = TieredStore("disk", path=tmp_path, max_host_bytes=4 * MB)
    stored = [store.put(noise(MB, seed)) for seed in range(8)]
    for i in reversed(range(4, 8)):
        assert torch.equal(store.load(stored[i]), noise(MB, i))
    assert store.statistics.disk_bytes_read == 0 and store.statistics.loads_ready == 4
    store.load(stored[3])
    assert store.statistics.disk_bytes_read == MB and store.statistics.loads_ready == 4


def test_what_is_read_ahead_is_ready(tmp_path):
    store = TieredStore("disk", path=tmp_path, max_host_bytes=4 * MB)
    stored = [store.put(noise(MB, seed)) for seed in range(12)]
    del stored[8:]  # those still in memory
    store.load(stored[3], then=[stored[2], stored[1]])
    stored[2].reading.wait()
    assert torch.equal(store.load(stored[2]), noise(MB, 2))
    assert store.statistics.loads_ready == 1 and store.statistics.disk_bytes_read == 3 * MB


def test_reading_ahead_waits_where_memory_is_short(tmp_path, monkeypatch):
    store = TieredStore("disk", path=tmp_path, max_host_bytes=4 * MB)
    stored = [store.put(noise(MB, seed)) for seed in range(8)]
    del stored[4:]  # those still in memory
    allocate, left = store._allocate, [1]

    def short(nbytes):
        if not left:
            raise MemoryError("none left")
        left.pop()
        return allocate(nbytes)

    with monkeypatch.context() as patched:
        patched.setattr(store, "_allocate", short)
        assert torch.equal(store.load(stored[2], then=[stored[1]]), noise(MB, 2))
    assert torch.equal(store.load(stored[1]), noise(MB, 1))


def test_what_host_memory_holds_is_copied_ahead_by_threads(tmp_path):
    store = TieredStore("auto", path=tmp_path, max_host_bytes=8 * MB)
    stored = [store.put(noise(MB, seed)) for seed in range(8)]  # the last two on disk
    stored[7].extent.writing.wait()
    first = store.load(stored[5], then=[stored[4], stored[7]])
    assert stored[4].arrival is not None and stored[7].arrival is None
    ahead = stored[4].arrival.tensor.data_ptr()
    found = store.load(stored[4])
    assert found.data_ptr() == ahead and torch.equal(found, noise(MB, 4)) and torch.equal(first, noise(MB, 5))
    assert store.statistics.loads_ready == 2  # what is in memory always is
    found.zero_()
    for _ in range(2):
        again = store.load(stored[4])
        assert torch.equal(again, noise(MB, 4)) and again.data_ptr() != found.data_ptr()


def test_bytes_in_use_are_shared(tmp_path):
    store = TieredStore("disk", path=tmp_path, max_host_bytes=MB)
    stored = [store.put(noise(MB, seed)) for seed in range(3)]
    first = store.load(stored[0])
    assert store.load(stored[0]).data_ptr() == first.data_ptr()
    assert store.statistics.disk_bytes_read == MB


def test_auto_fills_host_memory_first(tmp_path):
    store = TieredStore("auto", path=tmp_path, max_host_bytes=8 * MB)
    stored = [store.put(noise(MB, seed)) for seed in range(8)]
    assert [s.extent is None for s in stored] == [True] * 6 + [False] * 2
    assert (store.statistics.host_bytes, store.statistics.disk_bytes_written) == (6 * MB, 2 * MB)
    del stored[2]
    assert store.put(noise(MB)).extent is None


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"tier": "gpu"}, ValueError, "tier: expected host, disk, auto, got 'gpu'"),
        ({"tier": "disk", "max_host_bytes": 0}, ValueError, "max_host_bytes: expected a positive number"),
        ({"tier": "disk", "max_host_bytes": 1.5}, TypeError, "max_host_bytes: expected a positive number"),
        ({"tier": "disk", "path": 3}, TypeError, "path: expected a folder's name or None, got 3"),
        ({"tier": "host", "path": "/tmp"}, ValueError, "path: expected None for tier 'host'"),
        ({"tier": "disk", "path": "/no/such/folder"}, FileNotFoundError, "disk tier: .*'/no/such/folder'"),
        ({"tier": "auto", "path": "/proc"}, OSError, "disk tier: .*'/proc'"),
        ({"tier": "disk", "path": "/dev/shm"}, ValueError, "path: /dev/shm is on a file system in memory"),
    ],
)
def test_bad_arguments_are_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        TieredStore(**arguments)


def test_more_than_the_limit_is_an_error_that_names_it(tmp_path):
    store = TieredStore("host", max_host_bytes=3 * MB)
    held = store.put(noise(2 * MB))
    with pytest.raises(MemoryError, match=f"tier 'host': {2 * MB} bytes wanted, {MB} of max_host_bytes={3 * MB} avail"):
        store.put(noise(2 * MB))
    del held
    store.put(noise(3 * MB))
    store = TieredStore("disk", path=tmp_path, max_host_bytes=MB)
    with pytest.raises(MemoryError, match=f"'disk' in {tmp_path}: {MB + 1} bytes of one tensor wanted, {MB} available"):
        store.put(noise(MB + 1))


@pytest.fixture
def small(tmp_path):
    """Without a limit of the caller's, and with few staging blocks all the same."""
    store = TieredStore("disk", path=tmp_path)
    store._staging = MB
    return store


def test_without_a_limit_a_large_tensor_passes_in_parts(small):
    sources = [noise(3 * MB + 5, 0), noise(MB, 1), noise(2 * MB, 2)]
    large, other, last = stored = [small.put(source) for source in sources]
    assert small._slab.statistics()["peak_in_use"] == MB
    for _ in range(2):
        for kept, source in zip(stored, sources, strict=True):
            assert torch.equal(small.load(kept, then=[large, last]), source)
    assert small._slab.statistics()["peak_in_use"] <= 2 * MB + MB // 4  # and one in use
    first = small.load(large)
    assert small.load(large, then=[last]).data_ptr() == first.data_ptr()
    first.zero_()
    assert torch.equal(small.load(large), sources[0]) and other.parts == ()


def test_parts_of_a_large_tensor_are_read_ahead(small):
    large, other = small.put(noise(3 * MB)), small.put(noise(MB, 1))
    other.extent.writing.wait()
    small.load(other, then=[large])
    ahead = [part for part in large.parts if part.reading is not None]
    assert ahead == list(large.parts[-8:])
    for part in ahead:
        part.reading.wait()
    ready, read = small.statistics.loads_ready, small.statistics.disk_bytes_read
    assert torch.equal(small.load(large), noise(3 * MB))
    assert small.statistics.loads_ready >= ready + 8 and small.statistics.disk_bytes_read == read + 2 * MB


def test_without_the_runtime_the_reason_is_given(monkeypatch):
    monkeypatch.delattr("memkernels._runtime", raising=False)
    monkeypatch.setitem(sys.modules, "memkernels._runtime", None)
    with pytest.raises(ImportError, match=r"memkernels\._runtime is not built for Python 3"):
        TieredStore("host")


def test_what_could_not_be_written_stays_in_memory(tmp_path):
    def fail():
        raise OSError("No space left on device")

    store, values = TieredStore("disk", path=tmp_path), torch.arange(64, dtype=torch.uint8)
    stored = store.put(values)
    stored.extent = SimpleNamespace(writing=SimpleNamespace(done=lambda: True, wait=fail))
    for _ in range(2):
        assert torch.equal(store.load(stored), values)


class Faulty:
    """A file of which the next transfers fail."""

    def __init__(self, file):
        self._file = file
        self.writes = self.reads = 0  # that are to fail

    def write(self, block, after=None):
        if self.writes == 0:
            return self._file.write(block, after=after)
        self.writes -= 1
        return SimpleNamespace(nbytes=block.nbytes, writing=SimpleNamespace(done=lambda: True, wait=self._fail))

    def read(self, extent, block):
        if self.reads == 0:
            return self._file.read(extent, block)
        self.reads -= 1
        raise RuntimeError("no threads")

    @staticmethod
    def _fail():
        raise OSError(28, "disk tier: No space left on device")


@pytest.fixture
def faulty(tmp_path):
    store = TieredStore("disk", path=tmp_path, max_host_bytes=2 * MB)
    store._file = Faulty(store._file)
    return store


def test_a_read_that_does_not_begin_leaves_nothing_that_seems_read(faulty):
    stored = [faulty.put(noise(MB, seed)) for seed in range(4)]
    faulty._file.reads = 1
    with pytest.raises(RuntimeError, match="no threads"):
        faulty.load(stored[0])
    assert torch.equal(faulty.load(stored[0]), noise(MB, 0))


def test_what_could_not_be_written_is_written_again(faulty):
    faulty._file.writes = 1
    stored = [faulty.put(noise(MB, seed)) for seed in range(5)]
    assert stored[0].block is None
    for seed in range(5):
        assert torch.equal(faulty.load(stored[seed]), noise(MB, seed))


def test_an_error_of_writing_ends_when_the_disk_has_room(faulty):
    stored = [faulty.put(noise(MB, 0))]
    faulty._file.writes = 4
    stored += [faulty.put(noise(MB, 1))]
    stored += [faulty.put(noise(MB, 2))]
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            faulty.put(noise(MB, 3))
    stored += [faulty.put(noise(MB, seed)) for seed in range(3, 6)]
    for seed in range(6):
        assert torch.equal(faulty.load(stored[seed]), noise(MB, seed))


def test_memory_that_there_is_not_is_an_error_that_names_the_tier(tmp_path):
    store = TieredStore("disk", path=tmp_path)
    wanted = store._slab.limit + MB
    with pytest.raises(MemoryError, match=f"tier 'disk' in {tmp_path}: {wanted} bytes wanted; host memory: "):
        store._allocate(wanted)
