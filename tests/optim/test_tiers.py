"""offload_states: the bits of a step whose states were in memory all along, wherever they are in between."""

import copy
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from memkernels.optim import SGD, Adafactor, AdamW, Lion, Muon, offload_states, step_in_backward
from memkernels.testing import peak_bytes, run_in_child

pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")

KB, MB = 1 << 10, 1 << 20


def build(optimizer_class=AdamW, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(65, 65) for _ in range(6)), nn.Tanh(), nn.LayerNorm(65), nn.Linear(65, 7))
    model.to(dtype)[2].bias.requires_grad_(False)
    params = [p for p in model.parameters() if optimizer_class is not Muon or p.dim() == 2]
    return model, optimizer_class(params, **options)


def train(model, optimizer, steps, first=0, max_norm=1.0):
    for seed in range(first, first + steps):
        x = torch.randn(9, 65, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step(max_norm=max_norm)
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def assert_same(found, expected):
    assert all(torch.equal(ours, plain) for ours, plain in zip(found, expected, strict=True))


@pytest.mark.parametrize("tier", ["disk", "auto", "host"])
@pytest.mark.parametrize(
    ("optimizer_class", "dtype", "options"),
    [
        (AdamW, torch.float32, {}),
        (AdamW, torch.float32, {"state_bits": 8}),
        (AdamW, torch.bfloat16, {"state_bits": 4, "rounding": "remainder"}),
        (Lion, torch.bfloat16, {"state_bits": 16}),
        (SGD, torch.float32, {"momentum": 0.9, "lr": 0.1}),
        (Muon, torch.float32, {}),
        (Adafactor, torch.float32, {"beta1": 0.9}),
    ],
)
def test_steps_keep_their_bits(folder, tier, optimizer_class, dtype, options):
    expected = train(*build(optimizer_class, dtype, **options), 5)
    model, optimizer = build(optimizer_class, dtype, **options)
    train(model, optimizer, 2)  # states that exist already
    # "auto" has a quarter for staging, and so a place for three of six parameters; "disk" must read again.
    largest = max(sum(v.nbytes + 64 for v in state.values()) for state in optimizer.state.values())
    limit = {"host": None, "disk": 2 * largest, "auto": 4 * largest + 4 * KB}[tier]
    offload_states(optimizer, tier, min_bytes=KB, path=None if tier == "host" else folder, max_host_bytes=limit)
    assert_same(train(model, optimizer, 3, first=2), expected)
    statistics = optimizer.tiers.store.statistics
    assert (statistics.disk_bytes_written > 0) == (tier != "host")
    on_disk = sum(not isinstance(state, dict) for state in optimizer.state.values())
    assert {"host": on_disk == 0, "disk": on_disk >= 6, "auto": 2 <= on_disk < 6}[tier]


def test_a_copy_has_its_states_in_memory(folder):
    model, optimizer = build()
    offload_states(optimizer, "disk", min_bytes=1, path=folder)
    train(model, optimizer, 2)
    copied = copy.deepcopy((model, optimizer))
    assert copied[1].tiers is None and all(type(state) is dict for state in copied[1].state.values())
    assert_same(train(*copied, 2, first=2), train(model, optimizer, 2, first=2))


def test_the_disk_tier_reads_what_it_wrote(folder):
    expected = train(*build(), 4)
    model, optimizer = build()
    offload_states(optimizer, "disk", min_bytes=1, path=folder, max_host_bytes=80 * KB, prefetch=1)
    assert_same(train(model, optimizer, 4), expected)
    assert optimizer.tiers.store.statistics.disk_bytes_read > 0


def test_within_backward_the_parameters_before_are_read_ahead(folder):
    model, _ = build()
    stepper = step_in_backward(model, AdamW)
    offload_states(stepper.optimizer, "disk", min_bytes=KB, path=folder, max_host_bytes=40 * KB, prefetch=1)
    store, loads = stepper.optimizer.tiers.store, []
    load = store.load

    def recorded(stored, then=()):
        loads.append((stored, list(then)))
        return load(stored, then)

    store.load = recorded
    for _ in range(2):
        model(torch.randn(9, 65)).square().mean().backward()
    assert len(loads) == 7  # the weights'
    assert all(then == [following] for (_, then), (following, _) in pairwise(loads))


def test_within_backward(folder):
    def run(offload):
        model, _ = build()
        stepper = step_in_backward(model, AdamW, state_bits=8)
        if offload:
            offload_states(stepper.optimizer, "disk", min_bytes=KB, path=folder)
        for seed in range(3):
            x = torch.randn(9, 65, generator=torch.Generator().manual_seed(seed))
            stepper.backward(model(x).square().mean())
        return [p.detach() for p in model.parameters()]

    assert_same(run(True), run(False))


@pytest.mark.parametrize("other", [{}, {"state_bits": 8}])
def test_checkpoints_are_those_of_states_in_memory(folder, tmp_path, other):
    plain_model, plain = build(**other)
    train(plain_model, plain, 2)
    model, optimizer = build(**other)
    offload_states(optimizer, "disk", min_bytes=KB, path=folder)
    train(model, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved, expected = torch.load(tmp_path / "state.pt", weights_only=True), plain.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    for key, state in expected["state"].items():
        assert list(saved["state"][key]) == list(state)
        assert_same(list(saved["state"][key].values()), list(state.values()))
    # Whoever reads states by parameter finds them as well.
    for param, of_plain in zip(model.parameters(), plain_model.parameters(), strict=True):
        if of_plain in plain.state:
            assert_same([v for _, v in optimizer.state[param].items()], list(plain.state[of_plain].values()))
            assert "step" in optimizer.state[param] and optimizer.state[param]["step"] == 2
    model_again, again = build(**other)
    model_again.load_state_dict(model.state_dict())
    offload_states(again, "disk", min_bytes=KB, path=folder)
    again.load_state_dict(saved)
    assert not isinstance(again.state[next(model_again.parameters())], dict)
    assert_same(train(model_again, again, 2, first=2), train(plain_model, plain, 2, first=2))


def resident(path):
    """Peaks of two steps over 24 MB of parameters, above them and their gradients: states in memory, on disk."""
    found = []
    for offload in (False, True):
        params = [nn.Parameter(torch.zeros(512, 1024)) for _ in range(12)]
        optimizer = AdamW(params)
        if offload:
            offload_states(optimizer, "disk", path=path, max_host_bytes=8 * MB)
        for param in params:
            param.grad = torch.ones_like(param)
        found.append(peak_bytes(lambda optimizer=optimizer: (optimizer.step(), optimizer.step())))
    return found


def test_memory_is_that_of_few_parameters(folder):
    plain, offloaded = run_in_child(resident, str(folder))
    assert plain > 47 * MB and offloaded < 28 * MB


def test_what_cannot_be_written_stays_in_memory_and_all_parameters_make_the_step(folder, monkeypatch):
    expected = [train(*build(), steps) for steps in (3, 4)]
    model, optimizer = build()
    offload_states(optimizer, "disk", min_bytes=KB, path=folder)
    train(model, optimizer, 2)
    params = list(model.parameters())

    def full(source):
        raise OSError(28, "disk tier: No space left on device: 4096 bytes wanted")

    with monkeypatch.context() as patched:
        patched.setattr(optimizer.tiers.store, "put", full)
        with pytest.raises(OSError, match="disk tier: No space left"):
            train(model, optimizer, 1, first=2)
    assert_same(params, expected[0])
    assert all(isinstance(state, dict) for state in optimizer.state.values())
    optimizer.zero_grad()
    assert_same(train(model, optimizer, 1, first=3), expected[1])
    assert not isinstance(optimizer.state[params[0]], dict)


def test_a_failure_of_a_step_that_raised_is_not_that_of_the_next(folder, monkeypatch):
    model, optimizer = build()
    offload_states(optimizer, "disk", min_bytes=KB, path=folder)
    train(model, optimizer, 2)

    def full(source):
        raise OSError(28, "disk tier: No space left on device")

    def damaged(stored, then):
        raise OSError("disk tier: checksum does not match")

    with monkeypatch.context() as patched:
        patched.setattr(optimizer.tiers.store, "put", full)
        with pytest.raises(OSError, match="does not match"), optimizer.tiers.step():
            with optimizer.tiers.fetched(optimizer, next(iter(model.parameters())), []):
                pass
            patched.setattr(optimizer.tiers.store, "load", damaged)
            with optimizer.tiers.fetched(optimizer, list(model.parameters())[2], []):
                pass
    optimizer.zero_grad()
    train(model, optimizer, 1, first=2)


def test_writes_that_fail_later_are_made_again(folder):
    class Faulty:
        """A file whose first writes seem to go well."""

        failing = True

        def __init__(self, file):
            self._file, self.read = file, file.read

        def write(self, block, after=None):
            extent = self._file.write(block, after=after)
            return SimpleNamespace(writing=SimpleNamespace(done=lambda: True, wait=full)) if self.failing else extent

    def full():
        raise OSError(28, "disk tier: short write: No space left on device")

    expected = [train(*build(), steps) for steps in (1, 2)]
    model, optimizer = build()
    offload_states(optimizer, "disk", min_bytes=KB, path=folder, max_host_bytes=80 * KB)
    store = optimizer.tiers.store
    store._file = Faulty(store._file)
    with pytest.raises(OSError, match="short write: No space left"):
        train(model, optimizer, 1)
    assert_same(list(model.parameters()), expected[0])
    Faulty.failing = False
    optimizer.zero_grad()
    assert_same(train(model, optimizer, 1, first=1), expected[1])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"min_bytes": 0}, ValueError, "min_bytes: expected an integer of 1 or more, got 0"),
        ({"prefetch": -1}, ValueError, "prefetch: expected an integer of 0 or more"),
        ({"path": "/no/such/folder"}, OSError, "disk tier: .*/no/such/folder"),
    ],
)
def test_bad_arguments_are_named(arguments, kind, message):
    _, optimizer = build()
    with pytest.raises(kind, match=message):
        offload_states(optimizer, "disk", **arguments)
    assert optimizer.tiers is None


def test_others_optimizers_are_refused(folder):
    model, optimizer = build()
    with pytest.raises(TypeError, match=r"optimizer: expected one of memkernels\.optim, got AdamW"):
        offload_states(torch.optim.AdamW(model.parameters()), "disk")
    offload_states(optimizer, "disk", path=folder)
    with pytest.raises(ValueError, match="offloaded already"):
        offload_states(optimizer, "disk", path=folder)


def test_importing_optimizers_needs_no_runtime(monkeypatch):
    monkeypatch.delattr("memkernels._runtime", raising=False)
    monkeypatch.setitem(sys.modules, "memkernels._runtime", None)
    _, optimizer = build()
    with pytest.raises(ImportError, match=r"memkernels\._runtime is not built"):
        offload_states(optimizer, "disk")
