"""offload_activations: the same bits of loss and gradients, through whatever a training step does."""

import threading

import pytest
import torch
import torch.nn.functional as F
from offloaded_model import assert_free, assert_same_bits, batch, build, disk, step
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from memkernels import patch
from memkernels.offload import offload_activations

pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")

KB, MB = 1 << 10, 1 << 20


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


def test_memory_that_steps_no_longer_need_goes_back(tmp_path):
    model, offload = build(layers=1), disk(tmp_path, max_host_bytes=64 * MB)
    step(model, batch(tokens=256), offload)
    size = offload._store._slab.statistics()["size"]
    offload._store._slab.allocate(size + MB)  # as a larger step would
    grown = offload._store._slab.statistics()["size"]
    room = offload._store._file.statistics()["size"]
    for exits in range(2, 129):
        with offload:
            pass
        sizes = [of.statistics()["size"] for of in (offload._store._slab, offload._store._file)]
        assert sizes == ([grown, room] if exits < 128 else [0, 0])
    assert_same_bits(step(model, batch(), offload), step(model, batch()))


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


def test_left_in_another_thread(tmp_path):
    """Hooks are of the thread that entered, and stay until it leaves."""
    offload, found = disk(tmp_path), []

    def leave():
        with pytest.raises(RuntimeError, match="this thread has not entered it"):
            offload.__exit__(None, None, None)
        found.append(True)

    with offload:
        thread = threading.Thread(target=leave)
        thread.start()
        thread.join()
        y = torch.randn(64, 64, requires_grad=True).exp()
    leave()
    assert len(found) == 2 and offload.statistics["moved"] == 1
    y.sum().backward()


def test_a_second_gradient(tmp_path):
    def compute():
        x = batch().requires_grad_()
        (dx,) = torch.autograd.grad((x.sin().exp() * x).sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), x)
        return [dx.detach(), ddx]

    with disk(tmp_path):
        found = compute()
    assert_same_bits(found, compute())


def test_a_tangent_of_a_gradient(tmp_path):
    """Forward mode over backward, which saves zeros that have no memory."""

    def compute():
        leaf, tangent = batch().requires_grad_(), batch(seed=2)
        with forward_ad.dual_level():
            x = forward_ad.make_dual(leaf, tangent)
            (dx,) = torch.autograd.grad((x.sin().exp() * x).sum(), x, create_graph=True)
            product = forward_ad.unpack_dual(dx).tangent
            product.square().sum().backward()
        return [product.detach(), leaf.grad]

    with disk(tmp_path) as offload:
        found = compute()
    assert_same_bits(found, compute())
    assert offload.statistics["moved"] > 3


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
