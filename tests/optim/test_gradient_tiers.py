"""offload_gradients: the bits of steps whose gradients were in memory all along."""

import gc
from itertools import pairwise

import pytest
import torch
from torch import nn

from memkernels import micro_batch
from memkernels.optim import SGD, AdamW, Lion, offload_gradients, offload_states, step_in_backward
from memkernels.testing import peak_bytes, run_in_child

pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")

KB, MB = 1 << 10, 1 << 20
WEIGHT = 65 * 65 * 4


class Model(nn.Module):
    """Layers of which one is frozen, and one that only some parts of a batch reach."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(65, 65) for _ in range(5))
        self.rare = nn.Linear(65, 65)
        self.layers[2].requires_grad_(False)

    def forward(self, x, rare):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.rare(x) if rare else x


def build(optimizer_class=AdamW, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Model().to(dtype)
    return model, optimizer_class(model.parameters(), **options)


def accumulate(model, seed):
    """The gradients of three parts, of which one reaches every parameter."""
    for part in range(3):
        x = torch.randn(9, 65, generator=torch.Generator().manual_seed(3 * seed + part))
        model(x.to(next(model.parameters()).dtype), rare=part == 1).square().mean().backward()


def train(model, optimizer, steps, first=0, max_norm=None):
    for seed in range(first, first + steps):
        accumulate(model, seed)
        optimizer.step(max_norm=max_norm)
        if optimizer.gradient_tiers is None:
            optimizer.zero_grad()
        assert all(param.grad is None for param in model.parameters())
    return [param.detach().clone() for param in model.parameters()]


def assert_same(found, expected):
    assert all(torch.equal(ours, plain) for ours, plain in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("optimizer_class", "dtype", "options", "tier", "states_too"),
    [
        (AdamW, torch.float32, {"state_bits": 8}, "disk", False),
        (AdamW, torch.float32, {}, "disk", True),
        (Lion, torch.bfloat16, {}, "disk", False),
        (Lion, torch.bfloat16, {}, "auto", False),
        (SGD, torch.float32, {"lr": 0.1}, "host", False),
    ],
)
def test_steps_keep_their_bits(folder, optimizer_class, dtype, options, tier, states_too):
    expected = train(*build(optimizer_class, dtype, **options), 3)
    model, optimizer = build(optimizer_class, dtype, **options)
    # "disk" must read again what it wrote; "auto" has a quarter for staging, and so a place for three of five weights.
    weight = WEIGHT * dtype.itemsize // 4
    limit = {"host": None, "disk": 2 * weight + KB, "auto": 4 * weight + KB}[tier]
    where = {"path": None if tier == "host" else folder, "min_bytes": KB}
    offload_gradients(optimizer, tier, max_host_bytes=limit, **where)
    if states_too:
        offload_states(optimizer, tier, **where)
    assert_same(train(model, optimizer, 3), expected)
    statistics = optimizer.gradient_tiers.store.statistics
    assert (statistics.disk_bytes_written > 0) == (tier != "host")
    assert (statistics.disk_bytes_read > 0) == (tier != "host")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_is_by_the_norm_of_all(folder, dtype):
    plain_model, plain = build(SGD, dtype, lr=0.1)
    expected = train(plain_model, plain, 1, max_norm=0.02)
    model, optimizer = build(SGD, dtype, lr=0.1)
    offload_gradients(optimizer, "disk", path=folder, min_bytes=KB)
    found = train(model, optimizer, 1, max_norm=0.02)
    torch.testing.assert_close(optimizer.grad_norm, plain.grad_norm)
    assert plain.grad_norm > 0.04
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_where_gradients_are_meanwhile(folder):
    model, optimizer = build()
    offload_gradients(optimizer, "disk", path=folder, min_bytes=KB)
    accumulate(model, 0)
    moved = {
        name for name, param in model.named_parameters() if optimizer.gradient_tiers.has(param) and param.grad is None
    }
    assert moved == {f"{name}.weight" for name in ("layers.0", "layers.1", "layers.3", "layers.4", "rare")}
    assert model.rare.bias.grad is not None
    for writing in [kept.stored.extent.writing for kept in optimizer.gradient_tiers._sums.values()]:
        writing.wait()
    optimizer.zero_grad()
    assert not any(map(optimizer.gradient_tiers.has, model.parameters()))
    assert optimizer.gradient_tiers.store._file.statistics()["in_use"] == 0


def test_those_that_come_next_are_read_ahead(folder):
    model, optimizer = build()
    offload_gradients(optimizer, "disk", path=folder, min_bytes=KB, prefetch=1)
    store, loads = optimizer.gradient_tiers.store, []
    load = store.load

    def recorded(stored, then=()):
        loads.append((stored, list(then)))
        return load(stored, then)

    store.load = recorded
    for _ in range(2):
        model(torch.randn(9, 65), rare=True).square().mean().backward()
    optimizer.step()
    assert len(loads) == 10
    for order in (loads[:5], loads[5:]):
        assert all(then == [following] for (_, then), (following, _) in pairwise(order)) and order[-1][1] == []


def test_a_closure_and_a_loss_scale(folder):
    found = []
    for offload in (False, True):
        model, optimizer = build(SGD, lr=0.1)
        if offload:
            offload_gradients(optimizer, "disk", path=folder, min_bytes=KB)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 65), rare=True).square().mean() * 8
            loss.backward()
            return loss.item()

        accumulate(model, 7)  # what the closure drops
        found.append((optimizer.step(closure, loss_scale=8.0), [param.detach() for param in model.parameters()]))
    assert found[0][0] == found[1][0]
    assert_same(found[1][1], found[0][1])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("max_norm", [None, 1e4])
def test_gradients_that_are_part_of_a_graph_stay(folder, max_norm):
    found, norms = [], []
    for offload in (False, True):
        model, optimizer = build(SGD, lr=0.1)
        if offload:
            offload_gradients(optimizer, "disk", path=folder, min_bytes=KB)
        x = torch.ones(2, 65)
        model(x, rare=True).square().mean().backward()
        model(x, rare=True).square().mean().backward(create_graph=True)
        if offload:
            assert model.rare.weight.grad.requires_grad
        optimizer.step(max_norm=max_norm)
        found.append([param.detach() for param in model.parameters()])
        norms.append(optimizer.grad_norm)
    assert_same(found[1], found[0])
    torch.testing.assert_close(norms[1], norms[0])


def residents(path):
    """Peaks of a batch in two parts and its step over 24 MB of parameters: gradients in memory, on disk."""
    found = []
    for offload in (False, True):
        params = [nn.Parameter(torch.zeros(512, 1024)) for _ in range(12)]
        optimizer = SGD(params)
        if offload:
            offload_gradients(optimizer, "disk", path=path, max_host_bytes=4 * MB)

        def step(params=params, optimizer=optimizer):
            for _ in range(2):
                sum(param.square().sum() for param in params).backward()
            optimizer.step()

        found.append(peak_bytes(step))
    return found


def test_memory_is_that_of_few_parameters(folder):
    plain, offloaded = run_in_child(residents, str(folder))
    assert plain > 24 * MB and offloaded < 16 * MB


def test_after_a_disk_that_filled_up_the_batch_runs_again(folder, monkeypatch):
    expected = train(*build(), 1)
    model, optimizer = build()
    offload_gradients(optimizer, "disk", path=folder, min_bytes=KB)
    store, put, left = optimizer.gradient_tiers.store, optimizer.gradient_tiers.store.put, [7]

    def filling(source):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "disk tier: No space left on device: 4096 bytes wanted")
        return put(source)

    with monkeypatch.context() as patched:
        patched.setattr(store, "put", filling)
        with pytest.raises(OSError, match="No space left on device"):
            accumulate(model, 0)
    optimizer.zero_grad()
    assert_same(train(model, optimizer, 1), expected)


def test_a_damaged_sum_is_an_error_and_leaves_parameters_that_come_later(folder):
    model, optimizer = build(SGD, lr=0.1)
    offload_gradients(optimizer, "disk", path=folder, min_bytes=KB, max_host_bytes=WEIGHT + KB, prefetch=0)
    before = [param.detach().clone() for param in model.parameters()]
    accumulate(model, 0)
    store = optimizer.gradient_tiers.store
    damaged = optimizer.gradient_tiers._sums[model.layers[0].weight].stored
    store._finish_writing(damaged)
    damaged.block = None
    with open(f"/proc/self/fd/{store._file.fileno()}", "r+b") as raw:
        raw.seek(damaged.extent.offset)
        raw.write(b"something else")
    with pytest.raises(OSError, match="does not match: the file was damaged"):
        optimizer.step()
    assert_same(list(model.parameters()), before)


def test_gradients_stay_where_the_optimizer_is_gone(folder):
    model, optimizer = build()
    offload_gradients(optimizer, "disk", path=folder, min_bytes=KB)
    del optimizer
    gc.collect()
    accumulate(model, 0)
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"min_bytes": 0}, ValueError, "min_bytes: expected an integer of 1 or more, got 0"),
        ({"prefetch": -1}, ValueError, "prefetch: expected an integer of 0 or more"),
        ({"path": "/no/such/folder"}, OSError, "disk tier: .*/no/such/folder"),
    ],
)
def test_bad_arguments_are_named(arguments, kind, message):
    model, optimizer = build()
    with pytest.raises(kind, match=message):
        offload_gradients(optimizer, "disk", **arguments)
    assert optimizer.gradient_tiers is None
    accumulate(model, 0)
    assert model.rare.weight.grad is not None


def test_what_does_not_go_together_is_refused(folder):
    model, optimizer = build()
    with pytest.raises(TypeError, match=r"optimizer: expected one of memkernels\.optim, got AdamW"):
        offload_gradients(torch.optim.AdamW(model.parameters()), "disk")
    with pytest.raises(ValueError, match="got that of step_in_backward"):
        offload_gradients(step_in_backward(Model(), AdamW).optimizer, "disk", path=folder)
    offload_gradients(optimizer, "disk", path=folder, min_bytes=KB)
    with pytest.raises(ValueError, match="offloaded already"):
        offload_gradients(optimizer, "disk", path=folder)
    with pytest.raises(ValueError, match=r"optim\.offload_gradients, whose sums keep the parts"):
        micro_batch(lambda part, targets: model(part, rare=True).sum() / targets, torch.ones(4, 65), size=2)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(2, 65), rare=True).sum()).backward()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(TypeError, match=r"torch\.amp\.GradScaler does not see them"):
        scaler.step(optimizer)
    assert_same(list(model.parameters()), before)
