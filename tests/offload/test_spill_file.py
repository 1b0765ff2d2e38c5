"""memkernels._runtime's spill file: what is written is read, checked, and gone with the process."""

import errno
import os
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_process import run_python
from slab_blocks import filled

_runtime = pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")
PinnedSlab, SpillFile = _runtime.PinnedSlab, _runtime.SpillFile

MB = 1 << 20


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


def test_the_file_is_private(tmp_path):
    file = SpillFile(str(tmp_path), threads=1)
    assert os.fstat(file.fileno()).st_mode & 0o777 == 0o600
    assert os.fstat(file.fileno()).st_nlink == 0


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a tmpfs")
def test_a_file_system_in_memory_is_told():
    assert SpillFile("/dev/shm", threads=1).in_memory
