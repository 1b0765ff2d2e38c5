"""Copies of memory of the host by threads: CopyEngine with HostCalls."""

import ctypes

import pytest
from runtime_process import run_python

_runtime = pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")
CopyEngine, HostCalls, PinnedSlab = _runtime.CopyEngine, _runtime.HostCalls, _runtime.PinnedSlab

KB, MB = 1 << 10, 1 << 20
SIZE = 3 * MB + 5


def address(memory):
    return ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))


@pytest.fixture
def slab():
    return PinnedSlab(limit=64 * MB, step=MB)


@pytest.fixture
def engine():
    return CopyEngine(HostCalls(), device=0)


def test_bytes_go_there_and_back(slab, engine):
    source, target = bytearray(bytes(range(1, 256)) * (SIZE // 255 + 1))[:SIZE], bytearray(SIZE)
    block = slab.allocate(SIZE)
    out = engine.out(address(source), block, stream=0)
    out.wait_on(engine.in_stream)
    engine.into(address(target), block, stream=0).wait()
    assert target == source and out.done()


def test_a_copy_of_no_address_is_refused_and_leaves_the_block_free(slab, engine):
    with pytest.raises(RuntimeError, match="cudaMemcpyAsync: Invalid argument"):
        engine.out(0, slab.allocate(KB), stream=0)
    assert engine.pending() == 0 and slab.statistics()["in_use"] == 0


# Each begins a copy that is late by 0.2 s, in a process whose first thread is not.
BEGIN = """
import ctypes, os
def address(memory):
    return ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))

size = 1 << 20
slab, engine = _runtime.PinnedSlab(limit=1 << 24, step=1 << 20), _runtime.CopyEngine(_runtime.HostCalls(), device=0)
source, target, block = bytearray(b"1" * size), bytearray(size), slab.allocate(size)
"""


def said(code, *arguments, **environment):
    found, errors = run_python(BEGIN + code, *arguments, **environment).communicate(timeout=60)
    assert found, errors
    return found.split()


def test_what_does_not_wait_for_a_copy_is_early(slow_memcpy):
    code = """
copy = engine.out(address(source), block, stream=0)
print(copy.done(), bytes(memoryview(block)[:1]) == b"1")
copy.wait()
print(copy.done(), bytes(memoryview(block)[:1]) == b"1")
"""
    assert said(code, **slow_memcpy) == ["False", "False", "True", "True"]


def test_a_stream_waits_for_a_copy_that_it_is_told_of(slow_memcpy):
    """The other way's stream, by what it is told or by what the copy's own stream was given before; and this thread."""
    code = """
other = slab.allocate(size)
engine.out(address(source), other, stream=0)  # so that the next one comes later than a copy of the other way would
engine.out(address(source), block, stream=0).wait_on(engine.in_stream)
engine.into(address(target), block, stream=0).wait()
print(target == source)
source[:], target[:] = b"2" * size, bytes(size)
engine.out(address(source), other, stream=0)
engine.out(address(source), block, stream=0)
engine.into(address(target), block, stream=engine.out_stream).wait()
print(target == source)
source[:] = b"3" * size
engine.out(address(source), block, stream=0).wait_on(0)
print(bytes(memoryview(block)) == source)
"""
    assert said(code, **slow_memcpy) == ["True", "True", "True"]


def test_a_block_is_free_after_its_copy(slow_memcpy):
    code = """
engine.out(address(source), block, stream=0)
del block
print(engine.pending(), slab.statistics()["in_use"] == size)
other = slab.allocate(size)
late = engine.out(address(source), other, stream=0)
late.wait()
print(engine.pending(), slab.statistics()["in_use"] == size)
"""
    assert said(code, **slow_memcpy) == ["1", "True", "0", "True"]


def test_a_file_writes_what_a_copy_has_filled(slow_memcpy, tmp_path):
    code = """
file, back = _runtime.SpillFile(sys.argv[1], threads=2), slab.allocate(size)
extent = file.write(block, after=engine.out(address(source), block, stream=0))
extent.writing.wait()
file.read(extent, back).wait()
print(bytes(memoryview(back)) == source)
"""
    assert said(code, tmp_path, **slow_memcpy) == ["True"]


def test_an_engine_ends_with_its_copies(slow_memcpy):
    code = """
kept = memoryview(block)
copies = [engine.out(address(source), block, stream=0) for _ in range(3)]
del engine
print(all(copy.done() for copy in copies), bytes(kept) == source)
"""
    assert said(code, **slow_memcpy) == ["True", "True"]


def test_a_forked_child_is_told_and_may_drop_what_it_inherited(slow_memcpy):
    code = """
copy = engine.out(address(source), block, stream=0)
child = os.fork()
if child == 0:
    begins = lambda: engine.into(address(target), block, stream=0)
    for use in (copy.wait, copy.done, lambda: copy.wait_on(0), begins, engine.pending):
        try:
            use()
        except RuntimeError as error:
            print("copies-of-another" if "copies of another process" in str(error) else error, flush=True)
    del use, begins, copy, engine, block, slab
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
copy.wait()
print(bytes(memoryview(block)) == source)
"""
    assert said(code, **slow_memcpy) == ["copies-of-another"] * 5 + ["7", "True"]


def test_threads_that_do_not_start_are_an_error(few_threads):
    code = """
del engine
kept = []
try:
    for _ in range(9):
        kept.append(_runtime.CopyEngine(_runtime.HostCalls(), device=0))
except RuntimeError as error:
    print(len(kept), str(error).replace(" ", "-"))
"""
    count, error = said(code, **few_threads, FEW_THREADS="5")
    assert error == "cudaStreamCreateWithFlags:-Resource-temporarily-unavailable" and int(count) <= 2
