"""memkernels._runtime's spill file where the system gives less: a full disk, transfers that stop on their way, file
systems and kernels that offer little, few threads."""

import re

import pytest
from runtime_process import run_python

pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")

MB = 1 << 20


def test_a_full_disk_names_bytes_wanted_and_available(tmp_path, full_disk):
    code = """
import os
slab, file = _runtime.PinnedSlab(limit=1 << 28, step=1 << 20), _runtime.SpillFile(sys.argv[1], threads=1)
kept = file.write(slab.allocate(1 << 20))
try:
    file.write(slab.allocate(8 << 20))
except OSError as error:
    print(error.errno, error)
kept.writing.wait()
print(os.fstat(file.fileno()).st_size)
"""
    child = run_python(code, tmp_path, **full_disk, FULL_DISK_PREALLOCATES=str(4 * MB))
    said, errors = child.communicate(timeout=60)
    error, size = said.splitlines()
    assert error.startswith("28 [Errno 28] disk tier: No space left on device: 8388608 bytes wanted beyond"), errors
    assert " available" in error and str(tmp_path) in error
    assert int(size) == MB  # the file holds no more of a disk than it uses where there is no whole step


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


def test_threads_that_do_not_start_are_an_error(tmp_path, few_threads):
    code = """
try:
    _runtime.SpillFile(sys.argv[1], threads=4)
except RuntimeError as error:
    print(error)
"""
    said, errors = run_python(code, tmp_path, **few_threads, FEW_THREADS="2").communicate(timeout=60)
    assert said == "Resource temporarily unavailable\n", errors
