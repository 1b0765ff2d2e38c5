"""Copies beside a stream that computes, through a CUDA runtime made for these tests: fake_cudart.cpp.

Memory of the device is memory of the host there; a stream's operations take the time that a test gives them.
"""

import ctypes
import os
import time

import pytest

_runtime = pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")
CopyEngine, CudaCalls = _runtime.CopyEngine, _runtime.CudaCalls
PinnedSlab, SpillFile = _runtime.PinnedSlab, _runtime.SpillFile

KB, MB = 1 << 10, 1 << 20
SIZE = 20 * KB
SLOW = 100_000  # microseconds


class Memory(bytearray):
    """Memory of the device."""

    @property
    def address(self):
        return ctypes.addressof((ctypes.c_char * len(self)).from_buffer(self))


class Device:
    """The fake device: its calls, a stream that computes, and an engine."""

    def __init__(self, library):
        self.fake = ctypes.CDLL(library)
        self.calls = CudaCalls(library)
        stream = ctypes.c_void_p()
        self.fake.cudaStreamCreateWithFlags(ctypes.byref(stream), 1)
        self.stream = stream.value
        self.slab = PinnedSlab(limit=64 * MB, step=8 * KB, cuda=self.calls)
        self.engine = CopyEngine(self.calls, device=0)
        self.timing()
        self.forget_wait(-1)

    def timing(self, out=0, into=0, fill=0, random=0, seed=0):
        self.fake.fake_delay(out, into, fill, random, seed)

    def forget_wait(self, number):
        self.fake.fake_forget_wait(ctypes.c_int64(number))

    def fill(self, memory, value):
        """What a kernel would do."""
        arguments = ctypes.c_void_p(memory.address), value, ctypes.c_size_t(len(memory))
        self.fake.fake_fill(*arguments, ctypes.c_void_p(self.stream))

    def read(self, memory):
        """The bytes as a kernel finds them."""
        found = Memory(len(memory))
        addresses = ctypes.c_void_p(found.address), ctypes.c_void_p(memory.address)
        self.fake.fake_read(*addresses, ctypes.c_size_t(len(memory)), ctypes.c_void_p(self.stream))
        return found

    def close(self):
        del self.engine, self.slab, self.calls
        self.fake.cudaStreamDestroy(ctypes.c_void_p(self.stream))


@pytest.fixture
def device(fake_cudart):
    device = Device(fake_cudart)
    yield device
    device.fake.fake_pins(True)
    device.fake.fake_refuse_copy(-1)
    device.close()
    assert device.fake.fake_alive() == 0


def there_and_back(device):
    """Fills memory, copies it out, fills it again, copies it into other memory in use until then; what is there."""
    source, target = Memory(SIZE), Memory(SIZE)
    block = device.slab.allocate(SIZE)
    device.fill(source, 1)
    out = device.engine.out(source.address, block, stream=device.stream)
    out.wait_on(device.stream)
    device.fill(source, 2)
    device.fill(target, 3)
    into = device.engine.into(target.address, block, stream=device.stream)
    into.wait_on(device.stream)
    found = device.read(target)
    into.wait()  # it may be late where a wait is forgotten
    return found


@pytest.mark.parametrize("timing", [{}, {"out": SLOW}, {"into": SLOW}, {"fill": SLOW}, {"random": 500}])
def test_copies_keep_their_order(device, timing):
    device.timing(**timing)
    assert there_and_back(device) == b"\1" * SIZE


@pytest.mark.parametrize(
    ("forgotten", "timing"),
    [
        pytest.param(0, {"fill": SLOW}, id="the copy out does not wait for what fills its source"),
        pytest.param(1, {"out": SLOW}, id="its source is filled again before the copy"),
        pytest.param(2, {"fill": SLOW}, id="the copy in does not wait for what uses its target"),
        pytest.param(3, {"into": SLOW}, id="its target is read before the copy"),
    ],
)
def test_each_wait_is_needed(device, forgotten, timing):
    device.timing(**timing)
    device.forget_wait(forgotten)
    assert there_and_back(device) != b"\1" * SIZE


@pytest.mark.parametrize("seed", range(3))
def test_delays_change_no_result(device, seed):
    """Memory is filled with something else as soon as the stream that computes has waited for its copy."""
    device.timing(random=300, seed=seed)
    memory, blocks = Memory(SIZE), []
    for value in range(20):
        device.fill(memory, value)
        blocks.append(device.slab.allocate(SIZE))
        device.engine.out(memory.address, blocks[-1], stream=device.stream).wait_on(device.stream)
    for value in reversed(range(20)):
        device.engine.into(memory.address, blocks.pop(), stream=device.stream).wait_on(device.stream)
        assert device.read(memory) == bytes([value]) * SIZE
        device.fill(memory, 255)
    device.read(memory)  # comes after all that was filled


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_file_writes_what_a_copy_has_filled(device, tmp_path, forgotten):
    device.timing(out=SLOW)
    file, source = SpillFile(str(tmp_path), threads=2), Memory(b"\1" * SIZE)
    block, back = device.slab.allocate(SIZE), device.slab.allocate(SIZE)
    copy = device.engine.out(source.address, block, stream=device.stream)
    extent = file.write(block) if forgotten else file.write(block, after=copy)
    extent.writing.wait()
    file.read(extent, back).wait()
    assert (bytes(memoryview(back)) == bytes(source)) != forgotten
    copy.wait()


def test_a_block_and_an_event_are_free_after_the_copy(device):
    device.timing(out=SLOW)
    source = Memory(SIZE)
    block = device.slab.allocate(SIZE)
    copy = device.engine.out(source.address, block, stream=device.stream)
    alive = device.fake.fake_alive()
    assert not copy.done()
    del block, copy
    assert device.engine.pending() == 1 and device.slab.statistics()["in_use"] == SIZE
    deadline = time.monotonic() + 10
    while device.engine.pending():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert device.slab.statistics()["in_use"] == 0
    device.timing()
    for _ in range(50):
        device.engine.out(source.address, device.slab.allocate(KB), stream=device.stream).wait()
    assert device.fake.fake_alive() <= alive + 1


def test_a_block_of_several_registrations_is_copied_in_parts(device):
    source = Memory(os.urandom(50 * KB))
    blocks = [device.slab.allocate(8 * KB) for _ in range(7)]
    blocks.clear()
    block = device.slab.allocate(len(source))
    assert device.fake.fake_alive() == 7 + 3  # registrations, and streams
    device.fake.fake_copies()  # which counts anew
    device.engine.out(source.address, block, stream=device.stream).wait()
    assert bytes(memoryview(block)) == bytes(source)
    assert device.fake.fake_copies() == 7


def test_an_error_names_the_call(device):
    with pytest.raises(RuntimeError, match="cudaMemcpyAsync: invalid argument"):
        device.engine.out(0, device.slab.allocate(KB), stream=device.stream)


def test_a_missing_runtime_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"no CUDA runtime: .*libcudart\.so\.0"):
        CudaCalls("libcudart.so.0")
    with pytest.raises(RuntimeError, match=r"no CUDA runtime: libc\.so\.6 has no cudaSetDevice"):
        CudaCalls("libc.so.6")


def test_a_copy_of_which_a_part_fails_leaves_none_under_way(device):
    """Neither the block nor the device's memory may go to another while the parts before are copied."""
    device.timing(out=SLOW)
    source = Memory(b"\1" * SIZE)
    blocks = [device.slab.allocate(8 * KB) for _ in range(4)]
    blocks.clear()
    block = device.slab.allocate(SIZE)
    device.fake.fake_refuse_copy(1)
    with pytest.raises(RuntimeError, match="cudaMemcpyAsync: invalid argument"):
        device.engine.out(source.address, block, stream=device.stream)
    assert bytes(memoryview(block))[: 8 * KB] == b"\1" * 8 * KB
    del block
    assert device.engine.pending() == 0 and device.slab.statistics()["in_use"] == 0


def test_no_error_is_left_for_others_to_find(device):
    """torch asks after each kernel for the last error, which a copy that is not done is one of."""
    device.timing(out=SLOW)
    source, block = Memory(SIZE), device.slab.allocate(SIZE)
    copy = device.engine.out(source.address, block, stream=device.stream)
    assert not copy.done() and device.fake.cudaGetLastError() == 0
    copy.wait()
    with pytest.raises(RuntimeError, match="cudaMemcpyAsync"):
        device.engine.out(0, block, stream=device.stream)
    assert device.fake.cudaGetLastError() == 0


def test_what_goes_back_to_the_system_is_registered_no_longer(device):
    blocks = [device.slab.allocate(8 * KB) for _ in range(3)]
    streams = 3
    assert device.fake.fake_alive() == 3 + streams
    del blocks[1:]
    for _ in range(2):
        device.slab.trim()
    assert device.fake.fake_alive() == 1 + streams
    source = Memory(os.urandom(20 * KB))
    block = device.slab.allocate(len(source))
    device.engine.out(source.address, block, stream=device.stream).wait()
    assert bytes(memoryview(block)) == bytes(source)


def test_memory_that_cannot_be_pinned_is_an_error_that_names_the_bytes(device):
    device.fake.fake_pins(False)
    with pytest.raises(MemoryError, match=f"CUDA refused to pin {16 * KB} bytes beyond 0, of a limit of {64 * MB}"):
        device.slab.allocate(10 * KB)
    device.fake.fake_pins(True)
    assert device.fake.cudaGetLastError() == 0
    assert device.slab.allocate(10 * KB).nbytes == 10 * KB
