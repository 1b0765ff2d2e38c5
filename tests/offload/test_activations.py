"""offload_activations: the same bits of loss and gradients, in less memory, through whatever a training step does."""

import contextlib
import ctypes
import functools
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from offloaded_model import assert_same_bits, batch, build, disk, step
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from memkernels import patch
from memkernels.offload import offload_activations
from memkernels.offload.layers import LayerWatch
from memkernels.testing import peak_bytes, run_in_child

pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")

KB, MB = 1 << 10, 1 << 20
PR_SET_THP_DISABLE = 41  # of Linux's prctl


def in_use(offload):
    gc.collect()
    return offload._store._file.statistics()["in_use"]


def assert_free(offload, left=0):
    """No more than `left` bytes on disk are in use once the last writes have ended."""
    deadline = time.monotonic() + 10
    while in_use(offload) > left and time.monotonic() < deadline:
        time.sleep(0.01)
    assert in_use(offload) == left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep_last_layers": 0, "prefetch": 0},
        {"keep_last_layers": 2, "prefetch": 5, "max_host_bytes": None},
        {"tier": "auto", "max_host_bytes": 1280 * KB},
        {"tier": "host", "path": None, "max_host_bytes": None},
    ],
    ids=["disk", "all", "large staging", "auto", "host"],
)
def test_loss_and_gradients_keep_their_bits(tmp_path, options, dtype):
    model = build().to(dtype)
    options = {"path": tmp_path, "min_bytes": KB, "max_host_bytes": MB // 2, "tier": "disk"} | options
    offload = offload_activations(options.pop("tier"), **options)
    for seed in range(3):
        x = batch(seed).to(dtype)
        assert_same_bits(step(model, x, offload), step(model, x))
    statistics = offload.statistics
    if options["path"] is not None:
        assert statistics["moved"] > 0 and statistics["disk_bytes_written"] > 0
        assert_free(offload)


def test_around_the_whole_loop(tmp_path):
    model, x = build(), batch()
    expected = step(model, x)
    offload = disk(tmp_path)
    with offload:
        for _ in range(3):
            assert_same_bits(step(model, x), expected)
    assert offload.statistics["moved"] > 30


def peaks(path):
    """Of steps of 20 products whose results of 16 MB are kept for backward, in memory and on disk; of 10 on disk."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(20)))
    x = torch.randn(16384, 256)
    offload = offload_activations("disk", path=path, max_host_bytes=48 * MB, keep_last_layers=0)

    def run(model, context):
        with context:
            loss = model(x).square().mean()
        loss.backward()

    found = []
    for layers, context in ((10, offload), (20, offload), (20, contextlib.nullcontext())):
        run(model[:layers], context)
        found.append(peak_bytes(functools.partial(run, model[:layers], context)))
    return found


def test_the_disk_tier_frees_memory(tmp_path):
    few, many, plain = run_in_child(peaks, str(tmp_path))
    assert plain > 20 * 16 * MB
    assert many < 0.4 * plain and many < few + 16 * MB


@pytest.mark.parametrize("checkpointed", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("inside", [True, False])
def test_gradient_checkpointing(tmp_path, checkpointed, inside):
    model, x = build(checkpointed=checkpointed), batch().requires_grad_()
    expected = step(model, x)
    offload = disk(tmp_path)
    for _ in range(2):
        if inside:
            with offload:
                assert_same_bits(step(model, x), expected)
        else:
            assert_same_bits(step(model, x, offload), expected)
    assert offload.statistics["moved"] > 0
    assert_free(offload)


def test_backward_twice(tmp_path):
    model, x = build(), batch()

    def twice(loss):
        loss.backward(retain_graph=True)
        loss.backward()

    assert_same_bits(step(model, x, disk(tmp_path), twice), step(model, x, None, twice))


@pytest.mark.parametrize("first", [0, 1])
def test_several_forward_passes_in_flight(tmp_path, first):
    model = build()

    def both(offload):
        torch.manual_seed(2)
        model.zero_grad()
        losses = []
        for seed in range(2):
            if offload is None:
                losses.append(model(batch(seed)))
            else:
                with offload:
                    losses.append(model(batch(seed)))
        for i in (first, 1 - first):
            losses[i].backward()
        return [p.grad for p in model.parameters()]

    offload = disk(tmp_path)
    for _ in range(2):
        assert_same_bits(both(offload), both(None))
    assert_free(offload)


def test_threads(tmp_path):
    models = [build() for _ in range(3)]
    offload, found = disk(tmp_path), {}

    def train(i):
        model = models[i]
        for _ in range(4):
            model.zero_grad()
            with offload:
                loss = model(batch(i))
            loss.backward()
        found[i] = [loss.detach(), *(p.grad for p in model.parameters())]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(F, "dropout", lambda x, p: x)  # its generator is shared
        expected = [step(model, batch(i)) for i, model in enumerate(models)]
        threads = [threading.Thread(target=train, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(3):
        assert_same_bits(found[i], expected[i])


def test_threads_leave_in_any_order(tmp_path):
    """One that leaves ends its own entry: another's modules, and so its buffers, are known for as long as it is in."""

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(64, 64))

        def forward(self, x):
            return x * self.table

    offload, found = disk(tmp_path), []
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first():
        with offload:
            first_in.set()
            assert second_in.wait(10)
        first_out.set()

    def second():
        x = torch.randn(64, 64, requires_grad=True)
        assert first_in.wait(10)
        with offload:
            second_in.set()
            assert first_out.wait(10)
            found.extend((Owner()(x), x.exp()))
        found.append(x.exp())

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and offload.statistics["moved"] == 1  # the exponential within


def test_a_branch_that_backward_does_not_reach_is_freed(tmp_path):
    offload, x = disk(tmp_path), torch.randn(512, 64, requires_grad=True)
    with offload:
        used, unused = torch.exp(x * 2), torch.exp(x * 3)
    used.sum().backward()
    assert torch.equal(x.grad, (torch.exp(x * 2) * 2).detach())
    assert_free(offload, left=512 * 64 * 4)  # of the branch that may still come
    del used, unused
    assert_free(offload)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_an_exception_the_step_runs_again(tmp_path, where):
    model, x, offload = build(), batch(), disk(tmp_path)
    expected = step(model, x)

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if where == "forward":
                raise ArithmeticError
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            raise ArithmeticError

    handle = model.layers[2].register_forward_hook(lambda module, args, out: Failing.apply(out))
    with pytest.raises(ArithmeticError):
        step(model, x, offload)
    handle.remove()
    assert_free(offload)
    assert_same_bits(step(model, x, offload), expected)
    torch.ones(4 * KB, requires_grad=True).exp().sum().backward()  # no hook is left


def test_what_shares_a_storage_moves_once(tmp_path):
    offload = disk(tmp_path, max_host_bytes=16 * MB)
    x = torch.randn(512, 768, requires_grad=True)
    with offload:
        h = x * 1.0
        parts = h.view(512, 3, 256).unbind(1)
        y = sum((part.transpose(0, 1).sin().exp() * part.T).sum() for part in parts) + (h * h).sum()
    counted = offload.statistics
    y.backward()
    # h itself, and of each part: sin's result is exp's argument and not saved, its exponential is.
    assert counted["disk_bytes_written"] == 4 * 512 * 768 * 2 and counted["shared"] >= 4
    gradient, x.grad = x.grad, None
    h = x * 1.0
    parts = h.view(512, 3, 256).unbind(1)
    (sum((part.transpose(0, 1).sin().exp() * part.T).sum() for part in parts) + (h * h).sum()).backward()
    assert torch.equal(gradient, x.grad)


def test_a_small_part_of_a_large_storage_moves_alone(tmp_path):
    offload, weight = disk(tmp_path), torch.ones(4, 33, requires_grad=True)
    large = torch.randn(1000, 133)[:, 1:]
    with offload:
        y = large[500:520, 3:36] @ weight.t()
    assert offload.statistics["moved"] == 1
    assert 0 <= offload.statistics["disk_bytes_written"] - 4 * (19 * 133 + 33) < 64
    y.sum().backward()
    torch.testing.assert_close(weight.grad, large[500:520, 3:36].sum(0).expand(4, 33))


def test_what_is_expanded_takes_no_room(tmp_path):
    offload, x = disk(tmp_path), torch.randn(300, 512, requires_grad=True)
    row, one = torch.randn(512) * 1, torch.randn(()) * 1
    with offload:
        y = x * row.expand(300, 512) + x * one.expand(300, 512)
    assert offload.statistics["disk_bytes_written"] == 2048
    y.sum().backward()
    assert torch.equal(x.grad, row.expand(300, 512) + one.expand(300, 512))


def test_complex_views_and_empty_tensors(tmp_path):
    def compute():
        z = torch.complex(*torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))).requires_grad_()
        h = z * 1
        y = (h.conj() * h).real + (h.conj().imag * h.imag) + torch.cat([h[:0].real, h.real]) * h.mH.conj().real
        y.sum().backward()
        return [y.detach(), z.grad]

    with disk(tmp_path):
        found = compute()
    assert_same_bits(found, compute())


def test_parameters_buffers_leaves_and_small_tensors_stay(tmp_path):
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.frozen = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64, 64), False)
            self.register_buffer("table", torch.randn(64, 64))

        def forward(self, x):
            return (x @ self.weight.t() @ self.frozen.data * self.table * self.table.t()).sum()

    offload, x = disk(tmp_path), torch.randn(64, 64, requires_grad=True)
    with offload:
        Owner()(x)
    assert offload.statistics["moved"] == 0 and offload.statistics["stayed"] > 4


def test_the_last_layers_and_the_loss_stay(tmp_path):
    model, x = build(layers=4), batch()
    moved = []
    for keep in range(6):
        offload = disk(tmp_path, keep_last_layers=keep)
        for _ in range(2):
            step(model, x, offload)
        moved.append(offload.statistics["moved"] / 2)
    layers = moved[1] - moved[2]
    assert moved[0] > moved[1] > layers and moved[2] - moved[3] == moved[3] - moved[4] == layers
    assert moved[4] == moved[5] < layers


def test_the_last_layers_of_lists_of_lists_are_known():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(2))

        def forward(self, x):
            for layer in (*self.layers[0], *self.layers[1]):
                x = layer(x)
                seen.append(watch.in_last_layers)
            return x

    seen, watch = [], LayerWatch(1, weakref.WeakKeyDictionary())
    try:
        Nested()(torch.ones(2, 4))
    finally:
        watch.end()
    assert seen == [False, False, False, True]


def test_a_second_gradient(tmp_path):
    def compute():
        x = batch().requires_grad_()
        (dx,) = torch.autograd.grad((x.sin().exp() * x).sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), x)
        return [dx.detach(), ddx]

    with disk(tmp_path):
        found = compute()
    assert_same_bits(found, compute())


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_patched_models(tmp_path, recompute):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=97, use_cache=False
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    patch(model, recompute=recompute)
    tokens = torch.randint(97, (2, 70))

    def run(_):
        return model(input_ids=tokens, labels=tokens).loss

    run.zero_grad, run.parameters = model.zero_grad, model.parameters
    offload = disk(tmp_path, keep_last_layers=0)
    for _ in range(2):
        assert_same_bits(step(run, tokens, offload), step(run, tokens))
    assert offload.statistics["moved"] >= 6
    assert_free(offload)


@pytest.mark.filterwarnings("ignore:Using `torch.compile")  # hooks on all modules see a compiled one called twice
def test_compiled_models(tmp_path):
    model, x = build(layers=2), batch()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(F, "dropout", lambda x, p: x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        offload = disk(tmp_path, keep_last_layers=0)
        expected = step(compiled, x)
        for _ in range(2):
            assert_same_bits(step(compiled, x, offload), expected)
        assert offload.statistics["moved"] > 0


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_entering_again_compiles_nothing_again(tmp_path):
    compiled = CompileCounterWithBackend("aot_eager")
    model, x = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), backend=compiled), torch.randn(4, 8)
    for offload in (disk(tmp_path), disk(tmp_path)):
        for _ in range(6):
            with offload:
                model(x).sum().backward()
    assert compiled.frame_count == 1


def test_hooks_that_are_disabled_leave_nothing_behind(tmp_path):
    offload = disk(tmp_path)
    with torch.autograd.graph.disable_saved_tensors_hooks("not now"), pytest.raises(RuntimeError, match="not now"):
        offload.__enter__()
    assert not nn.modules.module._has_any_global_hook()
    x = torch.randn(64, 64, requires_grad=True)
    with offload:
        y = x.exp()
    assert offload.statistics["moved"] == 1 and not nn.modules.module._has_any_global_hook()
    y.sum().backward()


def test_the_second_step_reads_ahead_in_the_order_of_the_first(tmp_path):
    offload = disk(tmp_path, prefetch=1)
    leaves = [torch.randn(256 * (i + 1), requires_grad=True) for i in range(6)]
    load, ahead = offload._store.load, []

    def recorded(stored, then):
        ahead.append([other.nbytes // KB - 1 for other in then])
        return load(stored, then)

    offload._store.load = recorded
    for expected in ([[2], [], [4], [0], [3], [1]], [[0], [5], [1], [4], [2], [1]]):
        ahead.clear()
        with offload:
            outputs = [torch.exp(leaf) for leaf in leaves]
        for i in (3, 0, 5, 1, 4, 2):
            outputs[i].sum().backward(retain_graph=True)
        assert ahead == expected


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"min_bytes": 0}, ValueError, "min_bytes: expected an integer of 1 or more, got 0"),
        ({"keep_last_layers": -1}, ValueError, "keep_last_layers: expected an integer of 0 or more, got -1"),
        ({"prefetch": 1.5}, TypeError, "prefetch: expected an integer of 0 or more, got 1.5"),
        ({"max_host_bytes": -1}, ValueError, "max_host_bytes: expected a positive number"),
        ({"max_host_bytes": "1GB"}, TypeError, "max_host_bytes: expected a positive number.*'1GB'"),
        ({"path": "/no/such/folder"}, OSError, "disk tier: .*'/no/such/folder'"),
    ],
)
def test_bad_arguments_are_named(options, kind, message):
    with pytest.raises(kind, match=message):
        offload_activations("disk", **options)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_limit_smaller_than_one_tensor_leaves_the_step_to_be_run_again(tmp_path, tier):
    model, x = build(), batch()
    expected = step(model, x)
    model.zero_grad()
    options = {"path": tmp_path} if tier == "disk" else {}
    with pytest.raises(MemoryError, match=rf"tier '{tier}'.* bytes .*wanted, \d+ "):
        step(model, x, offload_activations(tier, max_host_bytes=20 * KB, min_bytes=KB, **options))
    assert all(p.grad is None for p in model.parameters())
    assert_same_bits(step(model, x, disk(tmp_path)), expected)


def test_damage_is_an_error_in_backward_and_the_step_runs_again(tmp_path):
    model, x, offload = build(), batch(), disk(tmp_path)
    expected = step(model, x)
    before = [p.detach().clone() for p in model.parameters()]

    def damage(loss):
        with open(f"/proc/self/fd/{offload._store._file.fileno()}", "r+b") as raw:
            for page in range(0, in_use(offload), 4096):
                raw.seek(page)
                raw.write(b"damaged!")
        loss.backward()

    with pytest.raises(OSError, match=r"disk tier: the checksum of \d+ bytes at offset \d+ does not match"):
        step(model, x, offload, damage)
    assert_same_bits([p.detach() for p in model.parameters()], before)
    assert_same_bits(step(model, x, offload), expected)


def train_on_a_full_disk(path):
    # MKL's first logsumexp of a process, if two threads take it at once, errs by 5e-5 in one of them now and then.
    torch.ones(1).logsumexp(0)
    model, x, offload = build(), batch(), disk(path)
    try:
        step(model, x, offload)
    except OSError as error:
        print(error)
    os.environ["FULL_DISK_PREALLOCATES"] = os.environ["FULL_DISK_HOLDS"] = str(1 << 40)
    assert_same_bits(step(model, x, offload), step(model, x))
    print("again")


@pytest.mark.parametrize("limit", ["PREALLOCATES", "HOLDS"])
def test_a_disk_that_fills_up_is_an_error_and_the_step_runs_again(tmp_path, full_disk, limit):
    said = run_function("train_on_a_full_disk", tmp_path, **full_disk, **{f"FULL_DISK_{limit}": str(MB)})
    error, again = said.splitlines()
    assert "disk tier: " in error and "No space left on device" in error and str(tmp_path) in error
    assert "bytes wanted" in error and " available" in error and again == "again"


def be_killed(path):
    model, x, offload = build(), batch(), disk(path)
    with offload:
        loss = model(x)
    assert in_use(offload) > MB and loss is not None
    os.kill(os.getpid(), signal.SIGKILL)


def test_nothing_is_left_behind_when_killed(tmp_path):
    run_function("be_killed", tmp_path, status=-signal.SIGKILL)
    assert not list(tmp_path.iterdir())


def run_function(name, path, status=0, **environment):
    """A function of this file in a process of its own; what it printed."""
    code = f"import runpy; runpy.run_path({str(Path(__file__))!r})[{name!r}]({str(path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    return done.stdout


def grow_over_steps(path, steps):
    """How resident memory, but for that of files, grows relatively after the first tenth of the steps.

    Without what was freed but kept by malloc, which a busy machine's slower writes raise once, and without huge pages,
    which the kernel may put where a few small ones were.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    model, x, offload = build(layers=2), batch(tokens=32), disk(path)

    def resident():
        gc.collect()
        libc.malloc_trim(0)
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0])

    first = 0
    for i in range(steps):
        step(model, x, offload)
        if i == steps // 10:
            first = resident()
    return resident() / first - 1


@pytest.mark.parametrize("steps", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_resident_memory_stays_flat(steps, tmp_path):
    assert run_in_child(grow_over_steps, str(tmp_path), steps) < 0.01
