"""optim.ShardedOptimizer with Muon and Adafactor: each parameter is stepped as a whole on one rank, or at stage 3 by
rows on all."""

import math

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from memkernels import micro_batch, optim
from memkernels.optim import ShardedOptimizer, muon
from memkernels.optim.local import local_of

BUCKET = 9000  # bytes: several buckets, and parameters larger than one


class Model(torch.nn.Module):
    """Beside matrices of uneven sizes a frozen one, one that no step reaches, vectors, a number, and nothing."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(40, 70)
        self.second = torch.nn.Linear(70, 40, bias=False)
        self.frozen = torch.nn.Linear(40, 40).requires_grad_(False)
        self.rare = torch.nn.Linear(40, 40, bias=False)
        self.never = torch.nn.Linear(3, 5, bias=False)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.nothing = torch.nn.Parameter(torch.zeros(0, 5))
        self.to(dtype)

    def forward(self, x, rare=True):
        x = self.frozen(x + self.second(self.first(x).tanh()))
        return (self.rare(x) if rare else x) * self.scale + self.nothing.sum()


def of_class(model, cls):
    """The parameters that are for it."""
    return [p for p in model.parameters() if cls is optim.Adafactor or (p.dim() == 2) == (cls is optim.Muon)]


def loss_of(model, step, rank=0, rare=True):
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(100 * step + rank))
    return model(x.to(model.scale.dtype), rare).float().square().mean()


def train(model, optimizer, steps, first=0):
    """Of gradients that are the same on every rank."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return model, optimizer


STORAGES = [
    (cls, dtype, {"state_bits": bits, "rounding": rounding, "seed": 5, "lr": 1e-2} | moment)
    for cls, moment in ((optim.Muon, {}), (optim.Adafactor, {"beta1": 0.9}))
    for bits, dtype, rounding in (
        (32, torch.float32, "stochastic"), (16, torch.bfloat16, "remainder"), (4, torch.bfloat16, "stochastic"),
    )
] + [(optim.Muon, torch.float32, {"state_bits": 8}), (optim.Adafactor, torch.float32, {})]  # fmt: skip


def every_storage():
    """Four times a gradient is exact, and so is its quarter."""
    for cls, dtype, options in STORAGES:
        model = Model(dtype)
        expected, whole = train(model, cls(of_class(model, cls), **options), 3)
        for stage in (1, 2):
            model = Model(dtype)
            params = of_class(model, cls)
            sharded = ShardedOptimizer(model, cls, stage=stage, params=params, bucket_bytes=BUCKET, **options)
            train(model, sharded, 3)
            sharded.wait()
            for (name, actual), value in zip(model.named_parameters(), expected.parameters(), strict=True):
                assert torch.equal(actual, value), (cls, options, dtype, stage, name)
            assert_states(sharded, whole)
            held, of_all = (bytes_of(optimizer.state) for optimizer in (sharded.local, whole))
            assert held <= of_all / 4 + bytes_of({0: max(whole.state.values(), key=lambda s: bytes_of({0: s}))})


def bytes_of(states):
    return sum(local_of(value).nbytes for state in states.values() for key, value in state.items() if key != "step")


def assert_states(sharded, whole):
    """Those of a parameter are all on one rank, in the bits of one process."""
    for part, parameter in zip(sharded.parts()[0], whole.param_groups[0]["params"], strict=True):
        mine, theirs = sharded.local.state.get(part.parameter, {}), whole.state.get(parameter, {})
        owners = torch.tensor(float(part.parameter.numel() == part.shape.numel()))
        dist.all_reduce(owners)
        assert mine.keys() == theirs.keys() and owners == (1 if part.shape.numel() and theirs else owners)
        for key, value in theirs.items():
            if part.parameter.numel() or key == "step":
                assert torch.equal(mine[key], value), (part.name, key)
            else:
                assert part.shape.numel() == 0 or mine[key].numel() == 0


def test_every_storage_gives_the_bits_of_one_process(tmp_path):
    run_ranks(every_storage, 4, tmp_path, seconds=120)


def muon_beside_adamw():
    """Each rank with gradients of its own, one of them without that of a matrix; in parts, clipped, and one skipped."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    options = {optim.Muon: {"lr": 0.02, "momentum": 0.9}, optim.AdamW: {"lr": 1e-2, "eps": 1e-4}}
    expected = Model()
    alone = [cls(of_class(expected, cls), **of) for cls, of in options.items()]
    for stage in (1, 2):
        model = Model()
        sharded = [
            ShardedOptimizer(
                model, cls, stage=stage, params=of_class(model, cls), bucket_bytes=BUCKET,
                process_group=dist.new_group(), **of,
            )
            for cls, of in options.items()
        ]  # fmt: skip
        for step in range(5):
            with sharded[0].no_sync(), sharded[1].no_sync():
                loss_of(model, 2 * step, rank, rank > 0).backward()
            loss_of(model, 2 * step + 1, rank).backward()
            if step == 3:
                (model.scale * torch.inf if rank else model.scale).backward()
            for optimizer in sharded:
                optimizer.step(max_norm=0.5)
            assert [optimizer.skipped for optimizer in sharded] == [False, step == 3]
            if stage == 1:
                one_step(expected, alone, step, ranks)
        for optimizer in sharded:
            optimizer.wait()
        for (name, actual), value in zip(model.named_parameters(), expected.parameters(), strict=True):
            if value.numel():
                difference = (actual - value).abs().max() / value.abs().max()
                assert difference < 1e-5, (name, difference)


def one_step(model, optimizers, step, ranks):
    for rank in range(ranks):
        (loss_of(model, 2 * step, rank, rank > 0) / ranks).backward()
        (loss_of(model, 2 * step + 1, rank) / ranks).backward()
    for optimizer in optimizers[: 1 if step == 3 else 2]:
        optimizer.step(max_norm=0.5)
    model.zero_grad()


CASES = [(optim.Muon, {"state_bits": 8, "rounding": "remainder"}), (optim.Adafactor, {"state_bits": 4, "beta1": 0.9})]


def sharded_of(case, stage):
    cls, options = CASES[case]
    model = Model(torch.bfloat16)
    params = of_class(model, cls)
    return model, ShardedOptimizer(model, cls, stage=stage, params=params, bucket_bytes=BUCKET, lr=1e-2, **options)


def alone_of(case, steps):
    cls, options = CASES[case]
    model = Model(torch.bfloat16)
    return train(model, cls([*named_of(model, cls)], lr=1e-2, **options), steps)


def named_of(model, cls):
    chosen = set(of_class(model, cls))
    return ((name, p) for name, p in model.named_parameters() if p in chosen)


def save_on_two(folder):
    for case in range(len(CASES)):
        optim.save_checkpoint(folder / f"two-{case}", *train(*sharded_of(case, 2), 2), extra=case)


def load_on_three(folder):
    for case in range(len(CASES)):
        model, optimizer = sharded_of(case, 1)
        assert optim.load_checkpoint(folder / f"two-{case}", model, optimizer) == case
        expected, whole = alone_of(case, 2)
        optimizer.wait()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
        assert_states(optimizer, whole)
        optim.save_checkpoint(folder / f"three-{case}", model, optimizer)


def test_checkpoints_go_between_numbers_of_ranks_stages_and_one_process(tmp_path):
    run_ranks(save_on_two, 2, tmp_path, tmp_path, seconds=60)
    run_ranks(load_on_three, 3, tmp_path, tmp_path, seconds=60)
    for case in range(len(CASES)):
        model, optimizer = alone_of(case, 0)
        optim.load_checkpoint(tmp_path / f"three-{case}", model, optimizer)
        optim.save_checkpoint(tmp_path / f"one-{case}", model, optimizer)
        train(model, optimizer, 2, first=2)
        expected, _ = alone_of(case, 4)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
        model, optimizer = alone_of(case, 0)
        optim.load_checkpoint(tmp_path / f"one-{case}", model, optimizer)
        train(model, optimizer, 2, first=2)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    model, optimizer = alone_of(0, 0)
    with pytest.raises(ValueError, match="a checkpoint of another model"):
        optim.load_checkpoint(tmp_path / "one-1", model, optimizer)


def in_parts():
    """A rank's first part is all that it has memory for."""
    rank = dist.get_rank()
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(rank))

    def step(part, targets):
        if rank and len(part) > 3:
            raise MemoryError("full")
        return model(part).square().sum() / targets

    model = Model()
    optimizers = [
        ShardedOptimizer(model, cls, params=of_class(model, cls), process_group=dist.new_group())
        for cls in (optim.Muon, optim.AdamW)
    ]
    with pytest.raises(ValueError, match="optimizer: expected the ShardedOptimizer of the model"):
        micro_batch(step, x, size=2, optimizer=optimizers[0])
    values = []
    for size in ("auto", 8):
        model = Model()
        optimizer = ShardedOptimizer(model, optim.Adafactor, stage=2, bucket_bytes=BUCKET, lr=1e-2)
        if size == "auto":
            micro_batch(step, x, optimizer=optimizer)
        else:
            (model(x).square().sum() / 8).backward()
        optimizer.step()
        optimizer.wait()
        values.append([p.detach() for p in model.parameters()])
    for ours, whole in zip(*values, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-5)


def of_gradients_of_their_own():
    muon_beside_adamw()
    in_parts()


def test_ranks_with_gradients_of_their_own(tmp_path):
    run_ranks(of_gradients_of_their_own, 3, tmp_path, seconds=120)


class Rows(torch.nn.Module):
    """Rows that do not fall to three ranks in equal parts, once fewer than there are ranks; and a stack of matrices."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(40, 70)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(70, 70, bias=False) for _ in range(4))
        self.last = torch.nn.Linear(70, 2, bias=False)
        self.stack = torch.nn.Parameter(torch.randn(4, 2, 2))
        self.to(dtype)

    def forward(self, x):
        x = self.first(x).tanh()
        for layer in self.layers:
            x = x + layer(x).tanh()
        return sum(self.last(x) @ matrix for matrix in self.stack.unbind())


def loss_of_rows(model, step, rank):
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(100 * step + rank))
    return model(x.to(model.first.weight.dtype)).float().square().mean()


OF_ROWS = {
    "muon": {optim.Muon: {"lr": 0.02, "momentum": 0.9}, optim.AdamW: {"lr": 1e-2, "eps": 1e-4}},
    "adafactor": {optim.Adafactor: {"lr": 0.05, "beta1": 0.9}},
}


def by_rows(mesh_shape, folder):
    """Each rank with gradients of its own; a model with two optimizers, on one mesh and on copies of shards."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicas", "shards")[-len(mesh_shape) :])
    for name, classes in OF_ROWS.items():
        expected, model = Rows(), Rows()
        alone = [cls(of_class(expected, cls), **of) for cls, of in classes.items()]
        sharded = [
            ShardedOptimizer(model, cls, stage=3, mesh=mesh, params=of_class(model, cls), **of)
            for cls, of in classes.items()
        ]
        for step in range(5):
            loss_of_rows(model, step, rank).backward()
            for of_rank in range(ranks):
                (loss_of_rows(expected, step, of_rank) / ranks).backward()
            for ours, whole in zip(sharded, alone, strict=True):
                ours.step(max_norm=0.5)
                whole.step(max_norm=0.5)
                torch.testing.assert_close(ours.grad_norm, whole.grad_norm, rtol=1e-5, atol=0)
            expected.zero_grad()
        assert_near(model, expected)
        held = bytes_of(sharded[0].local.state)
        assert held < bytes_of(alone[0].state) / mesh_shape[-1] * 1.2, (held, bytes_of(alone[0].state))
        if len(sharded) == 1:  # goes on in one process
            optim.save_checkpoint(folder / f"{name}-{len(mesh_shape)}", model, sharded[0])
    if len(mesh_shape) == 1:
        on_two_meshes(mesh)
        offloaded(mesh, folder)
        refused(mesh)
        round_trip(folder)


def assert_near(model, expected):
    for (name, actual), value in zip(model.named_parameters(), expected.parameters(), strict=True):
        difference = (actual.full_tensor() - value).abs().max() / value.abs().max()
        assert difference < 1e-5, (name, difference)


def on_two_meshes(mesh):
    """Muon's matrices whose rows are divided among other ranks than the next one's."""
    alone = [torch.nn.Parameter(torch.randn(9, 4, generator=torch.Generator().manual_seed(i))) for i in range(6)]
    whole_rows = init_device_mesh("cpu", (mesh.size(), 1), mesh_dim_names=("replicas", "shards"))

    def divide(tensor, i):
        of = (whole_rows, [Replicate(), Shard(0)]) if i % 2 else (mesh, [Shard(0)])
        return distribute_tensor(tensor.detach(), *of)

    divided = [torch.nn.Parameter(divide(p, i)) for i, p in enumerate(alone)]
    for i, (whole, rows) in enumerate(zip(alone, divided, strict=True)):
        whole.grad = whole.detach().sin()
        rows.grad = divide(whole.grad, i)
    for params in (alone, divided):
        optim.Muon(params, lr=0.1).step()
    for whole, rows in zip(alone, divided, strict=True):
        torch.testing.assert_close(rows.full_tensor(), whole.detach(), rtol=1e-5, atol=1e-6)


def offloaded(mesh, folder):
    """Muon's states on disk: the bits of those in memory, and every rank makes as many directions."""
    made = []
    orthogonal = muon.orthogonal
    muon.orthogonal = lambda *of: made.append(of) or orthogonal(*of)
    results = []
    for tier in (None, "disk"):
        rows = [torch.randn(6 + i, 8, generator=torch.Generator().manual_seed(i)) for i in range(2 * mesh.size())]
        params = [torch.nn.Parameter(distribute_tensor(of, mesh, [Shard(0)])) for of in rows]
        optimizer = optim.Muon(params, lr=0.1)
        if tier is not None:
            optim.offload_states(optimizer, tier, path=folder, min_bytes=1)
        for _ in range(2):
            for param in params:
                param.grad = param.detach().sin()
            optimizer.step()
        results.append(params)
    muon.orthogonal = orthogonal
    assert len(made) == 2 * 2 * 2
    for in_memory, on_disk in zip(*results, strict=True):
        assert torch.equal(local_of(in_memory), local_of(on_disk))


def refused(mesh):
    """What does not fit a model that is divided already; and columns."""
    model = Rows()
    ShardedOptimizer(model, optim.SGD, stage=3)
    with pytest.raises(ValueError, match="reduce_dtype: expected None for a model that is divided already"):
        ShardedOptimizer(model, optim.SGD, stage=3, reduce_dtype=torch.bfloat16)
    group = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        with pytest.raises(ValueError, match=r"process_group: expected the ranks \[0, 1, 2\] that stack"):
            ShardedOptimizer(model, optim.SGD, stage=3, process_group=group)
    columns = torch.nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
    with pytest.raises(TypeError, match=r"params\[0\]: expected a plain tensor or a DTensor divided by rows"):
        optim.Muon([columns])
    optim.AdamW([columns])


def round_trip(folder):
    """From one process to rows, and back: every bit of the states."""
    for case in ROUND_TRIP:
        model, optimizer = of_round_trip(case, lambda *made, **options: ShardedOptimizer(*made, stage=3, **options))
        assert optim.load_checkpoint(folder / f"from-{case}", model, optimizer) == case
        optim.save_checkpoint(folder / f"to-{case}", model, optimizer)


ROUND_TRIP = {
    "muon": (optim.Muon, torch.bfloat16, {"rounding": "remainder"}),
    "adafactor": (optim.Adafactor, torch.float32, {"state_bits": 16, "beta1": 0.9}),
    "codes": (optim.Adafactor, torch.float32, {"state_bits": 4}),  # without a moment, of which codes would be
}


def of_round_trip(case, make):
    cls, dtype, options = ROUND_TRIP[case]
    model = Rows(dtype)
    return model, make(model, cls, params=of_class(model, cls), lr=0.01, **options)


def in_one_process(model, cls, params, **options):
    return cls(params, **options)


@pytest.mark.parametrize("mesh_shape", [(3,), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_by_rows_at_stage_three(mesh_shape, tmp_path):
    before = {}
    for case in ROUND_TRIP:
        model, optimizer = of_round_trip(case, in_one_process)
        for step in range(2):
            loss_of_rows(model, step, 0).backward()
            optimizer.step()
        before[case] = model, optimizer
        optim.save_checkpoint(tmp_path / f"from-{case}", model, optimizer, extra=case)
    run_ranks(by_rows, math.prod(mesh_shape), tmp_path, mesh_shape, tmp_path, seconds=120)
    model = Rows()
    optimizer = optim.Adafactor(model.parameters(), **OF_ROWS["adafactor"][optim.Adafactor])
    optim.load_checkpoint(tmp_path / f"adafactor-{len(mesh_shape)}", model, optimizer)
    assert {float(state["step"]) for state in optimizer.state.values()} == {5.0}
    for case in ROUND_TRIP if len(mesh_shape) == 1 else ():
        model, optimizer = of_round_trip(case, in_one_process)
        optim.load_checkpoint(tmp_path / f"to-{case}", model, optimizer)
        for a, b in zip(model.parameters(), before[case][0].parameters(), strict=True):
            assert torch.equal(a, b)
            mine, theirs = optimizer.state.get(a, {}), before[case][1].state.get(b, {})
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(value, mine[key]) for key, value in theirs.items())
