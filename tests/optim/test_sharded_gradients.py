"""What ShardedOptimizer's ranks do with gradients beside a plain step: layers in lists of lists, loss scales, dtypes on
their way, dropped and loaded values."""

import contextlib
import copy
import functools
import importlib.util
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from memkernels import micro_batch
from memkernels.offload.store import Stored
from memkernels.optim import (
    SGD,
    Adafactor,
    AdamW,
    Lion,
    Muon,
    ShardedGradScaler,
    ShardedOptimizer,
    load_checkpoint,
    offload_states,
    save_checkpoint,
)
from memkernels.optim.sharded.gradients import Buffers
from memkernels.optim.sharded.layout import make_buckets
from memkernels.optim.tiers import TieredState
from memkernels.testing import assert_within_factor_two


class Nested(torch.nn.Module):
    """Layers in a list of lists and in a dictionary, none of which is called."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleList(torch.nn.Linear(9, 9) for _ in range(2)) for _ in range(2)
        )
        self.layers.append(torch.nn.ModuleDict({"last": torch.nn.Linear(9, 9)}))

    def forward(self, x):
        for layer in [*self.layers[0], *self.layers[1], self.layers[2]["last"]]:
            x = x + layer(x).tanh()
        return x


def full(model):
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def one_process(steps, make=Nested, scale=1.0):
    torch.manual_seed(0)
    model = make()
    optimizer = SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        sum(loss_of(model, step, rank) / dist.get_world_size() for rank in range(dist.get_world_size())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def loss_of(model, step, rank):
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(10 * step + rank))
    return model(x).square().mean()


def assert_values(model, expected):
    for actual, value in zip(full(model), full(expected), strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-7)


def sharded(stage, make=Nested, **options):
    torch.manual_seed(0)
    model = make()
    return model, ShardedOptimizer(model, SGD, stage=stage, lr=0.1, **options)


def lists_of_lists():
    """Every layer waits for its own bucket alone, so that one that nobody waits for has old values."""
    rank = dist.get_rank()
    for stage in (1, 2, 3):
        model, optimizer = sharded(stage, bucket_bytes=400)
        for step in range(3):
            loss_of(model, step, rank).backward()
            optimizer.step()
        optimizer.wait()
        assert_values(model, one_process(3))
        if stage < 3:  # a submodule's values, too, are loaded when those of the step have come
            saved = {name: torch.full_like(value, 3.0) for name, value in model.layers[0].state_dict().items()}
            loss_of(model, 3, rank).backward()
            optimizer.step()
            model.layers[0].load_state_dict(saved)
            optimizer.wait()
            assert all((p == 3.0).all() for p in model.layers[0].parameters())


def dropped():
    """By the model's zero_grad, in either way; by the optimizer's on a rank that had no gradient of its own."""
    rank, expected = dist.get_rank(), one_process(1)
    for stage in (1, 2, 3):
        for drop in (
            lambda model, _: model.zero_grad(),
            lambda model, _: model.zero_grad(set_to_none=False),
            lambda _, optimizer: optimizer.zero_grad(),
        ):
            model, optimizer = sharded(stage, bucket_bytes=400)
            if rank == 0 or stage == 3:
                loss_of(model, 5, rank).backward()
            else:
                optimizer.end_backward()
            with optimizer.no_sync() if stage < 3 else contextlib.nullcontext():
                drop(model, optimizer)
            loss_of(model, 0, rank).backward()
            optimizer.step()
            optimizer.wait()
            assert_values(model, expected)


def scaled():
    """One rank's loss is not finite in the second of three steps: none steps, and all scales are halved."""
    rank = dist.get_rank()
    for stage in (1, 2, 3):
        for unscales in (False, True):
            model, optimizer = sharded(stage)
            scaler = ShardedGradScaler("cpu", init_scale=1024.0, growth_interval=100)
            for step, factor in ((0, 1.0), (7, math.inf), (1, 1.0)):
                loss = loss_of(model, step, rank) * (factor if rank == 1 else 1.0)
                scaler.scale(loss).backward()
                if unscales:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer, max_norm=1e9)
                scaler.update()
                assert optimizer.skipped == (step == 7)
            assert scaler.get_scale() == 512.0
            optimizer.wait()
            assert_values(model, one_process(2))
        plain = torch.amp.GradScaler("cpu", init_scale=8.0)
        plain.scale(loss_of(model, 0, rank)).backward()
        with pytest.raises(TypeError, match=r"expected a memkernels\.optim\.ShardedGradScaler"):
            plain.step(optimizer)


class Vector(torch.nn.Module):
    """A parameter whose gradient is what it is multiplied by."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.values = torch.nn.Parameter(torch.zeros(700, dtype=dtype))

    def forward(self, x):
        return (self.values * x).sum()


def gradients_of(rank, step, dtype):
    return torch.randn(700, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)


def dtypes_on_their_way():
    """Gradients rounded to the dtype they are sent in, added up in float32, kept in the parameters' dtype."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for stage in (1, 2):
        for dtype, wire in (
            (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16, None),
        ):  # fmt: skip
            model, optimizer = sharded(stage, functools.partial(Vector, dtype), reduce_dtype=wire)
            kept = torch.zeros(700, dtype=dtype)
            for step in range(2):
                model(gradients_of(rank, step, dtype)).backward()
                own, others = gradients_of(rank, step, dtype), gradients_of(1 - rank, step, dtype)
                others = others.to(wire or dtype).float()
                if stage == 1:  # its own is not sent
                    kept = ((kept + own).float() + others).to(dtype)
                else:
                    kept = (kept.float() + (own.to(wire or dtype).float() + others)).to(dtype)
            optimizer.clip_grad_norm_(1e9)
            sums = optimizer._all_sums()[0]
            first = optimizer.local.origins[optimizer._own.part(0)]
            assert torch.equal(sums, kept[first : first + len(sums)]), (stage, dtype, wire)
    # At stage 3, where FSDP2 adds, no worse than its sum in the dtype that it is told.
    model, optimizer = sharded(3, Vector, reduce_dtype=torch.bfloat16)
    model(gradients_of(rank, 0, torch.float32)).backward()
    actual = model.values.grad.full_tensor()
    parts = [gradients_of(r, 0, torch.float32) for r in range(ranks)]
    exact, plain = sum(p.double() for p in parts) / ranks, sum(p.bfloat16() for p in parts) / ranks
    assert_within_factor_two("gradient", actual, exact, plain.float(), roundings=0.0, atol=0.0)


STORAGES = [
    (SGD, {"momentum": 0.9}, torch.float32),
    (Lion, {"state_bits": 8}, torch.float32),
    (AdamW, {"state_bits": 8, "rounding": "remainder"}, torch.bfloat16),
    (AdamW, {"rounding": "remainder"}, torch.bfloat16),
]


class Wide(torch.nn.Module):
    """Rows that fall to two ranks at multiples of 256 elements, and a frozen parameter."""

    def __init__(self, dtype):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64, dtype=dtype) for _ in range(2))
        self.layers[0].bias.requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def groups_of(model):
    """Two; states of the biases, half a block on each rank, in 32 bits."""
    return [
        {"params": [layer.weight for layer in model.layers], "weight_decay": 0.1},
        {"params": [layer.bias for layer in model.layers], "lr": 3e-3, "state_bits": 32},
    ]


def equal_steps(model, optimizer, first, steps):
    """Of gradients that are the same on every rank, so that their mean is exact."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(model.layers[0].weight.dtype)
        model(x).square().mean().backward()
        optimizer.step()


def storages_and_state_dicts():
    """Every stage gives one process's bits, through a state_dict in between."""
    for cls, options, dtype in STORAGES:
        torch.manual_seed(0)
        whole = Wide(dtype)
        models = {stage: copy.deepcopy(whole) for stage in (1, 2, 3)}
        frozen = whole.layers[0].bias.clone()
        plain = cls(groups_of(whole), lr=1e-2, **options)
        equal_steps(whole, plain, 0, 4)
        for stage, model in models.items():
            make = functools.partial(ShardedOptimizer, stage=stage, lr=1e-2, bucket_bytes=9000, **options)
            optimizer = make(model, cls, params=groups_of(model))
            equal_steps(model, optimizer, 0, 2)
            saved = copy.deepcopy(optimizer.state_dict())
            values = [part.to_local() if stage == 3 else part.detach() for part in optimizer_parts(optimizer)]
            values = [value.clone() for value in values]
            equal_steps(model, optimizer, 7, 2)  # is undone
            optimizer.wait()
            with torch.no_grad():
                for part, value in zip(optimizer_parts(optimizer), values, strict=True):
                    (part.to_local() if stage == 3 else part).copy_(value)
            optimizer.send_values()
            optimizer.load_state_dict(saved)
            equal_steps(model, optimizer, 2, 2)
            optimizer.wait()
            for actual, value in zip(full(model), full(whole), strict=True):
                assert torch.equal(actual, value), (cls.__name__, options, stage)
            assert torch.equal(full(model.layers[0])[1], frozen)


def optimizer_parts(optimizer):
    return [part.parameter for group in optimizer.parts() for part in group]


def torchs_adamw():
    """20 steps at torch's default betas and eps, each rank with a batch of its own."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for stage in (1, 3):
        torch.manual_seed(0)
        model = Wide(torch.float32)
        plain = copy.deepcopy(model)
        optimizer = ShardedOptimizer(model, AdamW, stage=stage)
        theirs = torch.optim.AdamW(plain.parameters())
        for step in range(20):
            batches = [torch.randn(8, 64, generator=torch.Generator().manual_seed(9 * step + r)) for r in range(ranks)]
            model(batches[rank]).square().mean().backward()
            optimizer.step()
            theirs.zero_grad()
            sum(plain(batch).square().mean() / ranks for batch in batches).backward()
            theirs.step()
        optimizer.wait()
        for actual, value in zip(full(model), full(plain), strict=True):
            assert (actual - value).norm() / value.norm() < 1e-6, stage


def offloaded(folder, stage):
    """States on disk between steps: the same bits, with clipping apart and a checkpoint; and a disk that fails."""
    rank = dist.get_rank()
    models, optimizers = [], []
    for offload in (None, "host", "disk"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(512, 600), torch.nn.Linear(600, 5))
        optimizer = ShardedOptimizer(model, AdamW, stage=stage, offload=offload, lr=1e-2)
        for step in range(4):
            x = torch.randn(4, 512, generator=torch.Generator().manual_seed(2 * step + rank))
            model(x).square().mean().backward()
            assert optimizer.clip_grad_norm_(0.01) > 0.01
            optimizer.step()
            if step == 1:
                path = folder / f"{stage}{offload}{step}"
                save_checkpoint(path, model, optimizer)
                load_checkpoint(path, model, optimizer)
        optimizer.wait()
        models.append(model)
        optimizers.append(optimizer)
    for model in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(full(model), full(models[0]), strict=True))
    on_disk = [isinstance(state, TieredState) for state in optimizers[2].local.state.values()]
    assert any(on_disk) and not any(isinstance(state, TieredState) for state in optimizers[0].local.state.values())
    in_memory, from_disk = (optimizers[i].local.state_dict()["state"] for i in (0, 2))
    for place, state in in_memory.items():
        assert {key: (type(value), value.shape) for key, value in from_disk[place].items()} == {
            key: (type(value), value.shape) for key, value in state.items()
        }
    models[2](torch.ones(1, 512)).sum().backward()
    failing = mock.patch.object(optimizers[2].local, "step_scaled", side_effect=OSError("no space"))
    with failing if rank else contextlib.nullcontext(), pytest.raises((OSError, ValueError), match="no space"):
        optimizers[2].step()
    with pytest.raises(ValueError, match="offload: expected one of"):
        ShardedOptimizer(Wide(torch.float32), AdamW, stage=stage, offload="tape")


def disks_that_fail_by_rows():
    """A step that exchanges rows ends on both ranks where one cannot read a state, with what came."""
    for cls in (Muon, Adafactor):
        model = torch.nn.Sequential(*(torch.nn.Linear(16, 16, bias=False) for _ in range(3)))
        optimizer = ShardedOptimizer(model, cls, stage=3)
        offload_states(optimizer.local, "disk", min_bytes=1)
        model(torch.ones(1, 16)).sum().backward()
        optimizer.step()
        model(torch.ones(1, 16)).sum().backward()
        failing = mock.patch.object(optimizer.local.tiers.store, "load", side_effect=OSError("cannot read"))
        error, match = (OSError, "cannot read") if dist.get_rank() else (ValueError, "rank 1: OSError: cannot read")
        with failing if dist.get_rank() else contextlib.nullcontext(), pytest.raises(error, match=match):
            optimizer.step()


def in_parts(optimizer, model, step):
    """Two backwards, whose sums are clipped apart in some steps, and within the step in others."""
    dtype = next(model.parameters()).dtype
    for part in range(2):
        seed = 10 * step + 2 * part + dist.get_rank()
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        model(x).float().square().sum().backward()
        if step == 1:
            assert optimizer.clip_grad_norm_(0.01) > 0.01
    optimizer.step(max_norm=0.02 if step == 2 else None)


def layers(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6))).to(dtype)


def sums_on_a_tier():
    """The bits of sums in memory, of states on disk too, and of Adafactor, for which a step has all at once."""
    bucket = 36_000  # bytes, of two layers in float32
    for cls, dtype, options, states_too in (
        (AdamW, torch.float32, {}, False),
        (AdamW, torch.float32, {}, True),
        (Lion, torch.bfloat16, {"reduce_dtype": torch.float32}, False),
        (Adafactor, torch.float32, {}, False),
    ):
        found = []
        for tier in (None, "host", "disk"):
            model = layers(dtype)
            optimizer = ShardedOptimizer(model, cls, bucket_bytes=bucket, lr=1e-2, **options)
            if tier is not None:
                limit = 20_000 if tier == "disk" else None  # one sum of 18 KiB
                optimizer.offload_gradients(tier, max_host_bytes=limit, min_bytes=1024, prefetch=1)
            if tier is not None and states_too:
                offload_states(optimizer.local, tier, min_bytes=1024)
            for step in range(4):
                in_parts(optimizer, model, step)
            optimizer.wait()
            found.append(full(model))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True)), (cls, dtype, options)
        assert optimizer._reducer.gradients.tier.statistics.disk_bytes_read > 0


def where_sums_are():
    """On disk, none in memory, until a step or `zero_grad` lets go of them; as before after a part that fails."""
    model, expected = layers(), layers()
    plain = ShardedOptimizer(expected, SGD, lr=0.1)
    optimizer = ShardedOptimizer(model, SGD, lr=0.1)
    optimizer.offload_gradients("disk", min_bytes=1024)
    gradients = optimizer._reducer.gradients
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(2):
        for trained, stepped in ((model, optimizer), (expected, plain)):
            trained(x).square().sum().backward()
            assert stepped.clip_grad_norm_(0.01) > 0.01
        assert [type(kept.kept) for kept in gradients._sums.values()] == [Stored] and not gradients.shards
        parts = []

        def fails_in_the_second(part, targets, parts=parts):
            parts.append(part)
            if len(parts) == 2:
                raise ArithmeticError
            return model(part).square().sum() / targets

        with pytest.raises(ArithmeticError):
            micro_batch(fails_in_the_second, x, size=2, optimizer=optimizer)
        optimizer.step(max_norm=0.005)
        plain.step(max_norm=0.005)
        torch.testing.assert_close(optimizer.grad_norm, plain.grad_norm)
        assert not gradients._sums
    optimizer.wait()
    plain.wait()
    assert_values(model, expected)
    model(x).sum().backward()
    assert gradients._sums
    optimizer.zero_grad()
    assert not gradients._sums


def disks_that_fail():
    """On one rank: an error on every rank, before a parameter changes; without those sums the next step is made."""
    model, expected = layers(), layers()
    plain = ShardedOptimizer(expected, SGD, lr=0.1)
    optimizer = ShardedOptimizer(model, SGD, lr=0.1)
    optimizer.offload_gradients("disk", min_bytes=1024)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(dist.get_rank()))
    for method in ("put", "load"):
        error = OSError("no space")
        failing = mock.patch.object(optimizer._reducer.gradients.tier, method, side_effect=error)
        with failing if dist.get_rank() else contextlib.nullcontext():
            for _ in range(2):
                model(x).square().mean().backward()
            for refused in (optimizer.step, optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
                with pytest.raises((OSError, ValueError), match="no space"):
                    refused()
        assert_values(model, layers())
        optimizer.zero_grad()
    for trained, stepped in ((model, optimizer), (expected, plain)):
        trained(x).square().mean().backward()
        stepped.step()
        stepped.wait()
    assert_values(model, expected)


def offload_that_is_refused():
    for stage in (1, 3):
        with pytest.raises(ValueError, match=f"optimizer: expected stage 2, .* got {stage}"):
            ShardedOptimizer(layers(), SGD, stage=stage, lr=0.1).offload_gradients("disk")
    model = layers()
    optimizer = ShardedOptimizer(model, SGD, lr=0.1)
    for options, message in (({"prefetch": -1}, "prefetch: expected an integer of 0 or more, got -1"),
                             ({"path": f"/no/such/{dist.get_rank()}"}, "disk tier: .*/no/such/")):  # fmt: skip
        with pytest.raises((ValueError, OSError), match=message):
            optimizer.offload_gradients("disk", **options)
    model(torch.ones(1, 64)).sum().backward()
    with pytest.raises(RuntimeError, match="optimizer: expected no gradients"):
        optimizer.offload_gradients("disk")
    optimizer.zero_grad()
    optimizer.offload_gradients("disk")
    with pytest.raises(ValueError, match="optimizer: its gradients are offloaded already"):
        optimizer.offload_gradients("disk")


def every_case(folder):
    for case in (lists_of_lists, dropped, scaled, dtypes_on_their_way, storages_and_state_dicts, torchs_adamw):
        case()
    if importlib.util.find_spec("memkernels._runtime"):  # not built without pybind11 or Python's headers
        for stage in (2, 3):
            offloaded(folder, stage)
        for case in (sums_on_a_tier, where_sums_are, disks_that_fail, disks_that_fail_by_rows, offload_that_is_refused):
            case()


def test_gradients_on_two_ranks(tmp_path):
    run_ranks(every_case, 2, tmp_path, tmp_path, seconds=120)


def test_a_large_parameter_has_memory_of_its_own_size_while_it_is_sent():
    sizes = [300, 100_000, 200, 500]
    named = [(str(n), torch.nn.Parameter(torch.zeros(n)), i) for i, n in enumerate(sizes)]
    buckets = make_buckets(named, 2, 4096)
    buffers = Buffers(buckets, 4096, torch.device("cpu"))
    large, *small = sorted((bucket.size for bucket in buckets), reverse=True)
    for size in (*small, large, *small):
        buffer = buffers.borrow(size, torch.float32)
        assert len(buffer) == size and buffer.untyped_storage().nbytes() <= (
            4 * size if size == large else 4 * max(small)
        )
        buffers.give_back(buffer)
    assert sum(memory.nbytes for memory in buffers._free[torch.float32]) == 4 * max(small)
