"""offload_activations of a device's tensors, through the CUDA runtime of fake_cudart.cpp.

CPU tensors stand for the device's: what torch computes of them is work on the fake's host stream, which a copy's events
make wait as they would a stream of a GPU.
"""

import ctypes
import functools
import gc
import shutil
import time

import pytest
import torch
from offloaded_model import assert_same_bits, batch, build, step
from torch.multiprocessing.reductions import StorageWeakRef

from memkernels.offload import TieredStore, device, offload_activations, store
from memkernels.testing import poisoned_memory, run_in_child

_runtime = pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")

KB, MB = 1 << 10, 1 << 20
SLOW = 1000  # microseconds


class FakeCuda:
    """The fake, for which the CPU is a device and its own thread a stream."""

    def __init__(self, library):
        self.fake = ctypes.CDLL(library)
        self.fake.fake_host_stream.restype = ctypes.c_void_p
        self.calls = _runtime.CudaCalls(library)
        self.host = self.fake.fake_host_stream()
        self.used = []
        self.timing()
        self.forget_wait(-1)

    def has(self, device):
        return device.type == "cpu"

    def stream(self, device):
        return self.host

    def use(self, tensor):
        self.used.append((tensor.data_ptr(), self.host))

    def timing(self, out=0, into=0, random=0, seed=0):
        self.fake.fake_delay(out, into, 0, random, seed)

    def forget_wait(self, number):
        self.fake.fake_forget_wait(ctypes.c_int64(number))

    def waits(self):
        """Since `forget_wait`: the streams that waited, and those that they waited for."""
        found, pair = [], (ctypes.c_void_p * 2)()
        addresses = ctypes.byref(pair), ctypes.byref(pair, ctypes.sizeof(ctypes.c_void_p))
        while self.fake.fake_wait(ctypes.c_int64(len(found)), *addresses) & 1:
            found.append(tuple(pair))
        return found


def install(cuda, under_way=0):
    """From now on stores copy through `cuda`; device memory held by copies is at most `under_way` and one tensor."""
    patched = pytest.MonkeyPatch()
    patched.setattr(store, "find_cuda", lambda: cuda)
    patched.setattr(store, "DeviceCopies", functools.partial(device.DeviceCopies, under_way=under_way))
    return patched


@pytest.fixture
def cuda(fake_cudart):
    cuda = FakeCuda(fake_cudart)
    patched = install(cuda)
    yield cuda
    patched.undo()
    cuda.timing()
    gc.collect()
    cuda.fake.cudaStreamDestroy(ctypes.c_void_p(cuda.host))
    assert cuda.fake.fake_alive() == 0


def offload_on(tier, path, **options):
    options = {"min_bytes": KB, "max_host_bytes": MB // 2 if tier == "disk" else 64 * MB} | options
    return offload_activations(tier, path=None if tier == "host" else path, **options)


@pytest.mark.parametrize(
    ("tier", "options"),
    [
        ("host", {}),
        ("host", {"keep_last_layers": 0, "prefetch": 0}),
        ("disk", {}),
        ("disk", {"keep_last_layers": 0, "prefetch": 4}),
        ("auto", {"max_host_bytes": 1280 * KB}),
    ],
)
def test_delays_change_no_bit_of_loss_and_gradients(cuda, tmp_path, tier, options):
    model, x = build(), batch()
    expected = step(model, x)
    offload = offload_on(tier, tmp_path, **options)
    for timing in ({}, {"out": SLOW}, {"into": SLOW}, {"random": SLOW, "seed": 1}):
        cuda.timing(**timing)
        assert_same_bits(step(model, x, offload), expected)
    moved = offload.statistics
    assert moved["moved"] > 0 and cuda.fake.fake_copies() >= 2 * moved["moved"]
    assert (moved["host_bytes"] > 0) == (tier != "disk") and (moved["disk_bytes_written"] > 0) == (tier != "host")


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_checkpointing_and_two_backwards(cuda, tmp_path, tier):
    cuda.timing(random=100)

    def twice(loss):
        loss.backward(retain_graph=True)
        loss.backward()

    for options in ({}, {"checkpointed": "not reentrant"}):
        model, x = build(**options), batch().requires_grad_()
        backward = None if options else twice
        assert_same_bits(step(model, x, offload_on(tier, tmp_path), backward), step(model, x, None, backward))


def chain(x, offload):
    """The gradient through products whose results, all saved, need the memory that the one before had."""
    with offload:
        y = x
        for i in range(5):
            y = (y * (1 + 0.1 * i)).sin()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return gradient


def bits_without_each_wait(library):
    """For each wait for a copy: who waits ("compute", or a copy "in"), for which, and whether bits stay without it."""
    libc = ctypes.CDLL(None)
    # M_TRIM_THRESHOLD, M_MMAP_MAX, M_PERTURB: what is freed stays mapped and is filled, for late copies to find.
    assert libc.mallopt(-1, 1 << 30) and libc.mallopt(-4, 0) and libc.mallopt(-6, 0x5A)
    cuda, into, arrived = FakeCuda(library), device.DeviceCopies.into, []

    def kept_into(*arguments):  # a copy in that nobody waited for would be one into the heap's own records
        arrival = into(*arguments)
        arrived.append(arrival.tensor)
        return arrival

    device.DeviceCopies.into = kept_into
    install(cuda)
    x = torch.randn(64 * KB, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = chain(x, offload_activations("host", min_bytes=1))
    found, number, count = [], -1, 0
    cuda.fake.fake_lazy(True)
    while number < count:
        offload = offload_activations("host", min_bytes=1)
        cuda.forget_wait(number)
        with poisoned_memory():
            same = torch.equal(chain(x, offload), expected)
        waits = cuda.waits()
        if number < 0:
            assert same
            count = len(waits)
        elif waits[number][1] != cuda.host:
            engine = next(iter(offload._store._copies.values()))._engine
            names = {cuda.host: "compute", engine.in_stream: "in", engine.out_stream: "out"}
            found.append((*(names[stream] for stream in waits[number]), same))
        number += 1
    return found


def test_each_wait_for_a_copy_is_needed(fake_cudart):
    """Copies happen as late as they may, so that what does not wait for one is too early, surely."""
    found = run_in_child(bits_without_each_wait, fake_cudart)
    assert {tuple(wait) for *wait, _ in found} == {("compute", "out"), ("in", "out"), ("compute", "in")}
    assert len(found) >= 9 and not any(same for *_, same in found), found


def noise(seed):
    return torch.randint(256, (MB,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_memory_of_the_device_is_held_for_as_long_as_its_copy(cuda):
    cuda.timing(out=100 * SLOW)
    kept, source = TieredStore("host"), noise(0)
    alive = StorageWeakRef(source.untyped_storage())
    stored = kept.put(source)
    del source
    kept.let_go()
    assert not alive.expired() and not stored.filling.done()
    wait_until(stored.filling.done)
    kept.let_go()
    assert alive.expired()
    assert torch.equal(kept.load(stored), noise(0))


def test_computing_waits_where_copies_hold_too_much(cuda):
    cuda.timing(out=10 * SLOW)
    patched = install(cuda, under_way=2 * MB)
    kept, held, stored = TieredStore("host"), [], []
    for seed in range(6):
        source = noise(seed)
        held.append(StorageWeakRef(source.untyped_storage()))
        stored.append(kept.put(source))
        del source
        assert sum(not storage.expired() for storage in held) <= 3
    patched.undo()
    for seed in range(6):
        assert torch.equal(kept.load(stored[seed]), noise(seed))


def test_the_allocator_is_told_which_stream_waits_for_a_copy(cuda):
    kept, source = TieredStore("host"), noise(0)
    kept.put(source)
    assert cuda.used == [(source.data_ptr(), cuda.host)]


def test_the_allocator_of_torch_is_told_of_the_current_stream(monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: told.append((len(tensor), stream)))
    device.TorchCuda.use(torch.empty(3))
    assert told == [(3, "current of cpu")]


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_what_is_sent_ahead_arrives_once(cuda, tmp_path, tier):
    kept = TieredStore(tier, path=None if tier == "host" else tmp_path, max_host_bytes=8 * MB)
    stored = [kept.put(noise(seed)) for seed in range(4)]
    cuda.fake.fake_copies()
    first = kept.load(stored[3], then=stored[1:3])
    assert cuda.fake.fake_copies() == 3
    again = kept.load(stored[3], then=[])
    assert again.data_ptr() == first.data_ptr() and torch.equal(again, noise(3))
    assert all(torch.equal(kept.load(stored[i]), noise(i)) for i in (2, 1))
    assert cuda.fake.fake_copies() == 0 and kept.statistics.loads_ready >= 3
    del first, again
    assert torch.equal(kept.load(stored[3]), noise(3))
    assert cuda.fake.fake_copies() == 1


def test_what_is_sent_ahead_and_dropped_is_held_until_it_arrived(cuda):
    kept = TieredStore("host")
    stored = [kept.put(noise(seed)) for seed in range(2)]
    kept.load(stored[0])
    cuda.timing(into=100 * SLOW)
    kept.load(stored[0], then=[stored[1]])
    arrival = stored[1].arrival
    arriving = StorageWeakRef(arrival.tensor.untyped_storage())
    arrival.tensor = None
    stored.clear()
    kept.let_go()
    assert not arriving.expired() and not arrival.copy.done()
    wait_until(arrival.copy.done)
    kept.let_go()
    assert arriving.expired()
    engine = next(iter(kept._copies.values()))._engine
    assert engine.pending() == 0 and kept._slab.statistics()["in_use"] == 0


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_what_was_written_to_on_the_device_is_not_handed_out_again(cuda, tmp_path, tier):
    kept = TieredStore(tier, path=None if tier == "host" else tmp_path)
    stored = kept.put(noise(0))
    first = kept.load(stored)
    assert kept.load(stored).data_ptr() == first.data_ptr()
    first.zero_()
    again = kept.load(stored)
    assert again.data_ptr() != first.data_ptr() and torch.equal(again, noise(0))


def test_another_stream_gets_a_copy_of_its_own(cuda):
    kept = TieredStore("host")
    stored = kept.put(noise(0))
    first = kept.load(stored)
    cuda.host, before = cuda.fake.fake_host_stream(), cuda.host
    second = kept.load(stored)
    cuda.fake.cudaStreamDestroy(ctypes.c_void_p(before))
    assert second.data_ptr() != first.data_ptr() and torch.equal(second, noise(0))


def test_a_write_to_what_is_being_copied_raises_in_backward(cuda):
    """As without offload: the copy may find either."""
    x = torch.randn(64, 64, requires_grad=True)
    with offload_activations("host", min_bytes=KB):
        h = x * 1
        square = h * h
    assert torch.equal(square.grad_fn._saved_self, h)
    h.detach().mul_(2)
    with pytest.raises(RuntimeError, match=r"shape \(64, 64\) is at version 1; expected version 0"):
        _ = square.grad_fn._saved_self


def test_the_runtime_is_the_one_that_torch_has_loaded(fake_cudart, tmp_path, monkeypatch):
    assert device.find_cuda() is None or torch.cuda.is_available()
    library = tmp_path / "libcudart.so.13"
    shutil.copy(fake_cudart, library)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "_loaded_libraries", lambda: ["/usr/lib/libc.so.6", str(library)])
    found = device.find_cuda()
    assert found.has(torch.device("cuda:1")) and not found.has(torch.device("cpu"))
    assert found.calls is not None
    monkeypatch.setattr(device, "_loaded_libraries", lambda: [])
    assert device.find_cuda() is None
