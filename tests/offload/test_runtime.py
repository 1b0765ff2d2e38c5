"""memkernels._runtime: the slab, the file and its checksums."""

import errno
import os
import re
import signal
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_process import run_python

_runtime = pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")
PinnedSlab, SpillFile = _runtime.PinnedSlab, _runtime.SpillFile

MB = 1 << 20


def filled(slab, nbytes, seed):
    block = slab.allocate(nbytes)
    content = bytes_of(nbytes, seed)
    memoryview(block)[:] = content
    return block, content


def bytes_of(nbytes, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=generator).numpy().tobytes()


@pytest.fixture(params=[True, False], ids=["io_uring", "threads"])
def io_uring(request):
    if request.param and (missing := _runtime.io_uring_missing()):
        pytest.skip(missing)
    return request.param


@pytest.mark.parametrize("hardware", [True, False])
@pytest.mark.parametrize(
    ("data", "checksum"),
    [(b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E)],
)
def test_crc32c_of_rfc_3720(hardware, data, checksum):
    assert _runtime.crc32c(data, hardware=hardware) == checksum


@given(st.binary(max_size=300))
@settings(max_examples=50, deadline=None)
def test_crc32c_by_tables_is_that_of_the_instruction(data):
    assert _runtime.crc32c(data, hardware=True) == _runtime.crc32c(data, hardware=False)


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


@pytest.mark.parametrize("nbytes", [1, 4096, 65536 * 3 + 5, 41 * MB + 1])
def test_what_is_written_is_read(tmp_path, nbytes, io_uring):
    slab, file = PinnedSlab(limit=64 * MB, step=MB), SpillFile(str(tmp_path), threads=3, io_uring=io_uring)
    assert file.io_uring == io_uring
    block, content = filled(slab, nbytes, 1)
    extent = file.write(block)
    del block
    extent.writing.wait()
    back = slab.allocate(nbytes)
    file.read(extent, back).wait()
    assert bytes(memoryview(back)) == content
    assert file.bytes_written == file.bytes_read == -(-nbytes // 4096) * 4096


def test_extents_are_reused_and_do_not_overlap(tmp_path, io_uring):
    slab, file = PinnedSlab(limit=64 * MB, step=MB), SpillFile(str(tmp_path), threads=2, io_uring=io_uring)
    kept = {}
    for seed in range(60):
        block, content = filled(slab, 1 + 7919 * (seed % 13), seed)
        kept[seed % 17] = file.write(block), content
    for extent, content in kept.values():
        extent.writing.wait()
        back = slab.allocate(extent.nbytes)
        file.read(extent, back).wait()
        assert bytes(memoryview(back)) == content
    del extent
    kept.clear()
    assert file.statistics()["in_use"] == 0 and file.statistics()["size"] == 256 * MB


def test_room_that_nothing_needed_goes_back_to_the_disk(tmp_path, io_uring):
    slab, file = PinnedSlab(limit=64 * MB, step=MB), SpillFile(str(tmp_path), threads=2, io_uring=io_uring)

    def on_disk():
        size = file.statistics()["size"]
        assert os.fstat(file.fileno()).st_size == size
        return os.fstat(file.fileno()).st_blocks * 512, size

    first, second = (file.write(filled(slab, 5000, seed)[0]) for seed in range(2))
    assert min(on_disk()) == 256 * MB
    for extent in (first, second):
        extent.writing.wait()
    del second, extent
    for _ in range(3):  # the step holds the first
        file.trim()
        assert min(on_disk()) == 256 * MB
    del first
    file.trim()  # which was there until now
    assert min(on_disk()) == 256 * MB
    file.trim()
    assert on_disk() == (0, 0)
    block, content = filled(slab, 9 * MB, 3)
    extent, back = file.write(block), slab.allocate(9 * MB)
    extent.writing.wait()
    file.read(extent, back).wait()
    assert bytes(memoryview(back)) == content and min(on_disk()) == 256 * MB


def test_threads_share_a_file(tmp_path, io_uring):
    slab, file = PinnedSlab(limit=64 * MB, step=MB), SpillFile(str(tmp_path), threads=2, io_uring=io_uring)
    wrong = []

    def work(seed):
        for turn in range(10):
            block, content = filled(slab, 100_000 + seed, 100 * seed + turn)
            extent = file.write(block)
            extent.writing.wait()
            back = slab.allocate(extent.nbytes)
            file.read(extent, back).wait()
            if bytes(memoryview(back)) != content:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("position", [0, 70_000, 5 * MB])
def test_damage_is_found_by_its_checksum(tmp_path, position, io_uring):
    slab, file = PinnedSlab(limit=64 * MB, step=MB), SpillFile(str(tmp_path), threads=2, io_uring=io_uring)
    block, content = filled(slab, 6 * MB, 3)
    extent = file.write(block)
    extent.writing.wait()
    with open(f"/proc/self/fd/{file.fileno()}", "r+b") as raw:
        raw.seek(extent.offset + position)
        raw.write(bytes([content[position] ^ 1]))
    with pytest.raises(
        OSError, match=f"checksum of 65536 bytes at offset {position // 65536 * 65536} does not"
    ) as raised:
        file.read(extent, block).wait()
    assert raised.value.errno == errno.EIO and raised.value.filename == str(tmp_path)


def test_a_transfer_that_does_not_fit_is_refused(tmp_path):
    slab, file = PinnedSlab(limit=MB, step=MB), SpillFile(str(tmp_path), threads=1)
    other = SpillFile(str(tmp_path), threads=1)
    extent = file.write(slab.allocate(100))
    extent.writing.wait()
    with pytest.raises(ValueError, match="block: expected 100 bytes, got 101"):
        file.read(extent, slab.allocate(101))
    with pytest.raises(ValueError, match="extent: expected one of this file"):
        other.read(extent, slab.allocate(100))
    with pytest.raises(ValueError, match="threads"):
        SpillFile(str(tmp_path), threads=0)


@pytest.mark.parametrize(
    ("folder", "kind"), [("missing", FileNotFoundError), ("file", NotADirectoryError), ("/proc", OSError)]
)
def test_a_folder_that_cannot_hold_the_file_is_named(tmp_path, folder, kind):
    (tmp_path / "file").touch()
    with pytest.raises(kind, match="disk tier: ") as raised:
        SpillFile(str(tmp_path / folder), threads=1)
    assert raised.value.filename == str(tmp_path / folder)


def test_a_full_disk_names_bytes_wanted_and_available(tmp_path, full_disk):
    code = """
slab, file = _runtime.PinnedSlab(limit=1 << 28, step=1 << 20), _runtime.SpillFile(sys.argv[1], threads=1)
kept = file.write(slab.allocate(1 << 20))
try:
    file.write(slab.allocate(8 << 20))
except OSError as error:
    print(error.errno, error)
kept.writing.wait()
"""
    child = run_python(code, tmp_path, **full_disk, FULL_DISK_PREALLOCATES=str(4 * MB))
    said, errors = child.communicate(timeout=60)
    assert said.startswith("28 [Errno 28] disk tier: No space left on device: 8388608 bytes wanted beyond"), errors
    assert " available" in said and str(tmp_path) in said


@pytest.mark.parametrize(("short_by", "reason"), [("0", "No space left"), ("100", "short write: Input/output error")])
def test_a_short_write_is_an_error_to_whoever_waits(tmp_path, full_disk, short_by, reason):
    code = """
slab, file = _runtime.PinnedSlab(limit=1 << 28, step=1 << 20), _runtime.SpillFile(sys.argv[1], threads=2)
extent = file.write(slab.allocate(8 << 20))
try:
    extent.writing.wait()
except OSError as error:
    print(error)
"""
    child = run_python(code, tmp_path, **full_disk, FULL_DISK_HOLDS=str(6 * MB), FULL_DISK_SHORT_BY=short_by)
    said, errors = child.communicate(timeout=60)
    assert "disk tier: short write: " in said and reason in said, errors
    assert "4194304 bytes wanted, " in said and " written, " in said and str(tmp_path) in said


def test_a_transfer_that_stops_on_its_way_says_how_far_it_came(tmp_path, io_uring):
    code = """
import os, resource
slab = _runtime.PinnedSlab(limit=1 << 28, step=1 << 20)
file = _runtime.SpillFile(sys.argv[1], threads=2, io_uring=sys.argv[2] == "True")
block = slab.allocate(8 << 20)
extent = file.write(block)
extent.writing.wait()
for size in (6 << 20, (6 << 20) - 100):
    os.ftruncate(file.fileno(), size)
    try:
        file.read(extent, block).wait()
    except OSError as error:
        print(error)
del extent  # so that the same range is written
resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, 6 << 20))
try:
    file.write(block).writing.wait()
except OSError as error:
    print(error)
"""
    said, errors = run_python(code, tmp_path, io_uring).communicate(timeout=60)
    read, read_in_part, written = said.splitlines()
    assert "short read: Input/output error: 4194304 bytes wanted, 2097152 available" in read, errors
    assert "short read: Input/output error: 4194304 bytes wanted, 2097052 available" in read_in_part, errors
    assert "short write: File too large: 4194304 bytes wanted, 2097152 written, " in written, errors


# For a child: a file system of its own at sys.argv[1], of 6 MiB, which `give_room` makes larger.
SMALL_DISK = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
user, group = os.getuid(), os.getgid()

def may(status, what):
    if status != 0:
        print("skip:", what, os.strerror(ctypes.get_errno()))
        sys.exit()

may(libc.unshare(0x10020000), "unshare(CLONE_NEWNS | CLONE_NEWUSER):")
for name, value in ("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1"):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(value)
folder = sys.argv[1].encode()
may(libc.mount(b"tmpfs", folder, b"tmpfs", 0, b"size=6m"), "mount:")

def give_room():
    assert libc.mount(None, folder, None, 32, b"size=64m") == 0
"""


@pytest.mark.parametrize("preallocates", [True, False])
def test_a_disk_that_is_full_for_the_kernel(tmp_path, plain_file_system, io_uring, preallocates):
    """Where the file system preallocates, that fails; where it does not, the write of a part. Both end with the disk's
    getting room."""
    code = """
slab = _runtime.PinnedSlab(limit=1 << 28, step=1 << 20)
file = _runtime.SpillFile(sys.argv[1], threads=2, io_uring=sys.argv[2] == "True")
block, back = slab.allocate(8 << 20), slab.allocate(8 << 20)
memoryview(block)[:] = os.urandom(8 << 20)
extent = None
try:
    extent = file.write(block)
    extent.writing.wait()
except OSError as error:
    print(error.errno, error)
del extent
give_room()
extent = file.write(block)
extent.writing.wait()
file.read(extent, back).wait()
print(bytes(memoryview(back)) == bytes(memoryview(block)))
"""
    environment = {} if preallocates else plain_file_system
    said, errors = run_python(SMALL_DISK + code, tmp_path, io_uring, **environment).communicate(timeout=60)
    if said.startswith("skip: "):
        pytest.skip(f"no file system of its own for a child: {said.removeprefix('skip: ').strip()}")
    wanted = "8388608 bytes wanted beyond" if preallocates else "short write: No space left on device: 4194304 bytes"
    error, again = said.splitlines()
    assert error.startswith("28 [Errno 28] disk tier: ") and "No space left on device" in error, errors
    assert wanted in error and error.endswith(f" available: '{tmp_path}'"), error
    assert again == "True"


def test_a_file_system_that_offers_little_is_enough(tmp_path, plain_file_system, io_uring):
    code = """
import os
slab = _runtime.PinnedSlab(limit=1 << 28, step=1 << 20)
file = _runtime.SpillFile(sys.argv[1], threads=2, io_uring=sys.argv[2] == "True")
block, back = slab.allocate(8 << 20), slab.allocate(8 << 20)
memoryview(block)[:] = os.urandom(8 << 20)
extent = file.write(block)
extent.writing.wait()
file.read(extent, back).wait()
status = os.fstat(file.fileno())
print(os.readlink(f"/proc/self/fd/{file.fileno()}"), os.listdir(sys.argv[1]), oct(status.st_mode), status.st_nlink)
print(status.st_size, status.st_blocks * 512 < 16 << 20, bytes(memoryview(back)) == bytes(memoryview(block)))
"""
    said, errors = run_python(code, tmp_path, io_uring, **plain_file_system).communicate(timeout=60)
    file, content = said.splitlines()
    assert re.fullmatch(rf"{tmp_path}/\.memkernels-\w{{6}} \(deleted\) \[\] 0o100600 0", file), errors
    assert content == f"{256 * MB} True True"


@pytest.mark.parametrize("refused", ["setup", "enter"])
def test_a_kernel_that_refuses_io_uring_leaves_threads(tmp_path, no_io_uring, refused):
    code = """
print(_runtime.io_uring_missing())
slab, file = _runtime.PinnedSlab(limit=1 << 28, step=1 << 20), _runtime.SpillFile(sys.argv[1], threads=2)
block, back = slab.allocate(9 << 20), slab.allocate(9 << 20)
memoryview(block)[:9] = b"something"
extent = file.write(block)
extent.writing.wait()
file.read(extent, back).wait()
print(file.io_uring, bytes(memoryview(back)[:9]))
"""
    environment = no_io_uring | {"NO_IO_URING": refused}
    said, errors = run_python(code, tmp_path, **environment).communicate(timeout=60)
    missing, moved = said.splitlines()
    assert missing in ("the kernel refuses io_uring: Operation not permitted", "built without liburing"), errors
    assert moved == "False b'something'"


@pytest.mark.parametrize("ending", ["normal", "exception", "killed"])
def test_nothing_is_left_behind(tmp_path, ending):
    code = """
import time
slab, file = _runtime.PinnedSlab(limit=1 << 28, step=1 << 20), _runtime.SpillFile(sys.argv[1], threads=2)
extents = [file.write(slab.allocate(1 << 20)) for _ in range(8)]
print("ready", flush=True)
if sys.argv[2] == "exception":
    raise ValueError
if sys.argv[2] == "killed":
    time.sleep(60)
"""
    child = run_python(code, tmp_path, ending)
    assert child.stdout.readline() == "ready\n"
    if ending == "killed":
        assert not list(tmp_path.iterdir())
        os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=60)
    assert child.returncode == {"normal": 0, "exception": 1, "killed": -signal.SIGKILL}[ending]
    assert not list(tmp_path.iterdir())


def test_a_forked_child_ends_and_may_drop_what_it_inherited(tmp_path, io_uring):
    code = """
import os
slab = _runtime.PinnedSlab(limit=1 << 28, step=1 << 20)
file = _runtime.SpillFile(sys.argv[1], threads=2, io_uring=sys.argv[2] == "True")
block = slab.allocate(1 << 20)
extent = file.write(block)
extent.writing.wait()
child = os.fork()
if child == 0:
    for use in (lambda: file.write(block), lambda: file.read(extent, block), extent.writing.wait):
        try:
            use()
        except RuntimeError as error:
            print(error, flush=True)
    del extent, block, file, slab
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    said, errors = run_python(code, tmp_path, io_uring).communicate(timeout=60)
    error = f"disk tier: the file in {tmp_path} belongs to the process that opened it; a fork of it wanted to move"
    moving, waiting = f"{error} {MB} bytes.", "disk tier: a transfer of another process, of which this is a fork."
    assert said.splitlines() == [moving, moving, waiting, "7"], errors


def test_threads_that_do_not_start_are_an_error(tmp_path, few_threads):
    code = """
try:
    _runtime.SpillFile(sys.argv[1], threads=4)
except RuntimeError as error:
    print(error)
"""
    said, errors = run_python(code, tmp_path, **few_threads, FEW_THREADS="2").communicate(timeout=60)
    assert said == "Resource temporarily unavailable\n", errors


def test_the_file_is_private(tmp_path):
    file = SpillFile(str(tmp_path), threads=1)
    assert os.fstat(file.fileno()).st_mode & 0o777 == 0o600
    assert os.fstat(file.fileno()).st_nlink == 0


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a tmpfs")
def test_a_file_system_in_memory_is_told():
    assert SpillFile("/dev/shm", threads=1).in_memory
