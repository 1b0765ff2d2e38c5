"""optim.ShardedOptimizer at stages 1 and 2, on 1 to 4 gloo processes, against one process with all gradients."""

import contextlib
import functools
import gc
import math
import weakref

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh

import memkernels
from memkernels import optim
from memkernels.optim.sharded import ShardedOptimizer
from memkernels.optim.sharded.layout import make_buckets

# eps keeps gradients whose terms cancel from being divided by themselves, rounding and all.
OPTIONS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}
BUCKET = 6000  # bytes: several buckets, and parameters larger than one


class Model(torch.nn.Module):
    """Uneven sizes, a tied weight, a frozen one, a parameter that only some batches use, one that none uses, and one
    of another dtype."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(37, 24)
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(24, 65), torch.nn.GELU(), torch.nn.Linear(65, 24)) for _ in range(3)
        )
        self.frozen = torch.nn.Linear(24, 24).requires_grad_(False)
        self.rare = torch.nn.Linear(24, 24, bias=False)
        self.never = torch.nn.Linear(3, 5)
        self.scale = torch.nn.Parameter(torch.ones(24, dtype=torch.bfloat16))
        self.register_buffer("shift", torch.rand(24) > 0.5)
        self.head = torch.nn.Linear(24, 37, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, rare=True):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        if rare:
            x = x + self.rare(x)
        return self.head(self.frozen(x) + self.shift)


def model_of(seed=0):
    torch.manual_seed(seed)
    return Model()


def loss_of(model, step, part, rank, rare=True):
    """Of a batch that each rank, step and part of a step has for itself; a large gradient at first."""
    ids = torch.randint(0, 37, (4, 9), generator=torch.Generator().manual_seed(1000 * step + 10 * part + rank))
    loss = torch.nn.functional.cross_entropy(model(ids, rare).flatten(0, 1), ids.roll(1).flatten())
    # The bfloat16 parameter's gradient is exact, and too small to change the norm: others are compared to float32.
    return loss * (10.0 if step < 3 else 1.0) + (model.scale.float() * 2**-12 * (1 + part + rank)).sum()


def groups_of(model):
    """Two, one without decay; the second dtype among the first."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() > 1 or p.dtype == torch.bfloat16]},
        {"params": [p for p in params if p.dim() == 1 and p.dtype == torch.float32], "weight_decay": 0.0, "lr": 1e-3},
    ]


def is_rare(step, part, rank):
    """A parameter that gets a gradient on some ranks, on all, or on none (steps that 4 divides)."""
    return step % 4 != 0 and (step + part + rank) % 3 != 0


def whole_steps(optimizer, model, ranks, steps, parts, max_norm, first=0):
    """One process with the mean of the ranks' gradients; returns the norms."""
    norms = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for part in range(parts):
            for rank in range(ranks):
                (loss_of(model, step, part, rank, is_rare(step, part, rank)) / ranks).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf).item())
        optimizer.step()
    return norms


def sharded_steps(optimizer, model, steps, parts, max_norm, first=0, no_sync=True, clip_apart=False):
    rank, norms = dist.get_rank(), []
    for step in range(first, first + steps):
        for part in range(parts):
            accumulate = no_sync and part < parts - 1
            with optimizer.no_sync() if accumulate else contextlib.nullcontext():
                loss_of(model, step, part, rank, is_rare(step, part, rank)).backward()
        if clip_apart:
            norms.append(optimizer.clip_grad_norm_(max_norm).item())
            optimizer.step()
        else:
            optimizer.step(max_norm=max_norm)
            norms.append(optimizer.grad_norm.item())
    optimizer.wait()
    return norms


def assert_equal(model, expected, rtol, bfloat16=2**-7):
    """The largest difference of a parameter over its largest magnitude; a tipped rounding in bfloat16."""
    for (name, actual), (_, value) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        difference = (actual.double() - value.double()).abs().max() / value.double().abs().max()
        assert difference <= (bfloat16 if value.dtype == torch.bfloat16 else rtol), (name, difference)


def as_one_process(stage, whole_class, ways):
    """Twenty steps with accumulation and clipping."""
    ranks, first_rank = dist.get_world_size(), dist.get_rank() == 0
    expected, model = model_of(), model_of(dist.get_rank())  # the first rank's values reach the others
    options = OPTIONS | {"rounding": "remainder"}
    if whole_class is torch.optim.AdamW:  # has no exact weights for bfloat16
        expected.scale.requires_grad_(False)
        model.scale.requires_grad_(False)
    whole = whole_class(groups_of(expected), **(options if whole_class is optim.AdamW else OPTIONS))
    sharded = ShardedOptimizer(model, optim.AdamW, stage=stage, params=groups_of(model), bucket_bytes=BUCKET, **options)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in (whole, sharded)]
    for first, steps in ((0, 15), (15, 5)):
        norms = sharded_steps(sharded, model, steps, 2, 1.0, first, **ways)
        if first_rank:
            expected_norms = whole_steps(whole, expected, ranks, steps, 2, 1.0, first)
            torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected_norms), rtol=1e-5, atol=0)
        for schedule in schedules:
            schedule.step()
    if first_rank:
        assert_equal(model, expected, 1e-6)
        assert torch.equal(model.never.weight, model_of().never.weight)
    assert_same_on_every_rank(model)


def assert_same_on_every_rank(model):
    own = torch.cat([tensor.detach().float().reshape(-1) for tensor in (*model.parameters(), *model.buffers())])
    first = own.clone()
    dist.broadcast(first, 0)
    assert torch.equal(own, first)


def twenty_steps(cases):
    for case in cases:
        as_one_process(*case)


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, [(1, optim.AdamW, {}), (2, torch.optim.AdamW, {"clip_apart": True})]),
        (3, [(1, torch.optim.AdamW, {"no_sync": False}), (2, optim.AdamW, {"no_sync": False})]),
    ],
)
def test_twenty_steps_are_those_of_one_process(ranks, cases, tmp_path):
    run_ranks(twenty_steps, ranks, tmp_path, cases, seconds=120)


STORAGES = [
    (cls, {"state_bits": bits, "rounding": rounding, "seed": 5, "lr": 1e-2})
    for cls in (optim.AdamW, optim.Lion)
    for bits in (32, 16, 8, 4)
    for rounding in ("stochastic", "remainder")
]


def four_steps(make):
    """Of gradients that are the same on every rank."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(70, 99), torch.nn.Linear(99, 7)).bfloat16()
    optimizer = make(model)
    for step in range(4):
        optimizer.zero_grad()
        x = torch.randn(8, 70, generator=torch.Generator().manual_seed(step)).bfloat16()
        model(x).square().mean().backward()
        optimizer.step()
    return optimizer, [p.detach() for p in model.parameters()]


def every_storage():
    """Four times a gradient is exact, and so is its quarter."""
    for cls, options in STORAGES:
        _, expected = four_steps(lambda model, cls=cls, options=options: cls(model.parameters(), **options))
        for stage in (1, 2):
            make = functools.partial(ShardedOptimizer, optimizer_class=cls, stage=stage, bucket_bytes=9000, **options)
            optimizer, actual = four_steps(make)
            optimizer.wait()
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), (cls, options)


def test_every_storage_gives_the_bits_of_one_process(tmp_path):
    run_ranks(every_storage, 4, tmp_path, seconds=120)


def edge_cases(folder):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # Smaller than a block: all but the first rank have nothing, and still step.
    model = torch.nn.Linear(3, 2)
    optimizer = ShardedOptimizer(model, optim.SGD, lr=1.0, process_group=dist.group.WORLD)
    before = model.weight.detach().clone()
    model(torch.full((1, 3), 1.0 + rank)).sum().backward()
    optimizer.step()
    optimizer.wait()
    torch.testing.assert_close(model.weight.detach(), before - (1 + ranks) / 2)
    # A norm that is not finite leaves the gradients of other elements as they are.
    model(torch.tensor([[math.inf, 1.0, 1.0]])).sum().backward()
    assert optimizer.clip_grad_norm_(1.0) == math.inf
    assert all(sums[sums.isfinite()].eq(ranks).all() for sums in optimizer._all_sums().values())
    optimizer.step()
    assert optimizer.skipped
    alive = [weakref.ref(kept) for kept in (optimizer, model.weight)]
    del optimizer
    gc.collect()
    model(torch.ones(1, 3)).sum().backward()  # exchanges nothing
    del model
    gc.collect()
    assert [kept() for kept in alive] == [None] * 2
    for stage in (1, 2):
        unusual_steps(stage, rank, ranks)
    others_group(rank)
    if not torch.cuda.is_available():
        unnamed_backend(folder, rank, ranks)


def unnamed_backend(folder, rank, ranks):
    """torch takes what fits the machine."""
    dist.destroy_process_group()
    dist.init_process_group(init_method=f"file://{folder}/unnamed", rank=rank, world_size=ranks)
    for stage in (1, 3):
        model = torch.nn.Linear(3, 2)
        optimizer = ShardedOptimizer(model, optim.SGD, stage=stage, lr=1.0)
        before = full(model.weight)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.wait()
        torch.testing.assert_close(full(model.weight), before - 1.0)


def full(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach().clone()


def others_group(rank):
    """A group of the first two ranks."""
    group = dist.new_group([0, 1])
    model = torch.nn.Linear(3, 2)
    if rank == 2:
        with pytest.raises(ValueError, match="process_group: expected one that this rank is in"):
            ShardedOptimizer(model, optim.SGD, process_group=group)
        with pytest.raises(ValueError, match="process_group: expected one that this rank is in"):
            memkernels.micro_batch(lambda part, targets: model(part).sum(), torch.ones(2, 3), process_group=group)
        return
    optimizer = ShardedOptimizer(model, optim.SGD, process_group=group, lr=1.0)
    before = model.weight.detach().clone()
    memkernels.micro_batch(lambda part, targets: model(part).sum() / targets, torch.ones(2, 3), optimizer=optimizer)
    optimizer.step()
    optimizer.wait()
    torch.testing.assert_close(model.weight.detach(), before - 1.0)


def unusual_steps(stage, rank, ranks):
    model, alone = model_of(), model_of()
    mesh = init_device_mesh("cpu", (ranks,))
    options = {"lr": 1e-3, "rounding": "remainder"}
    optimizer = ShardedOptimizer(model, optim.SGD, stage=stage, bucket_bytes=BUCKET, mesh=mesh, **options)
    plain = optim.SGD([p for p in alone.parameters() if p.requires_grad], **options)

    def assert_as_one_process():
        optimizer.wait()
        plain.step()
        plain.zero_grad()
        assert_equal(model, alone, 1e-6)
        assert_same_on_every_rank(model)

    # What is not finite on one rank is skipped by all, and gone afterwards.
    (loss_of(model, 0, 0, rank) * (math.inf if rank == ranks - 1 else 1.0)).backward()
    optimizer.step(max_norm=1.0)
    assert optimizer.skipped and not optimizer.grad_norm.isfinite()
    assert_as_one_process()

    # A rank without any gradient counts as one of zeros.
    if rank == 0:
        loss_of(model, 0, 0, 0).backward()
    (loss_of(alone, 0, 0, 0) / ranks).backward()
    optimizer.step()
    assert not optimizer.skipped
    assert_as_one_process()

    # Dropped gradients leave nothing behind; nor does the model's own zero_grad between steps.
    loss_of(model, 1, 0, rank).backward()
    optimizer.zero_grad()
    with optimizer.no_sync():
        loss_of(model, 1, 0, rank).backward()
    optimizer.zero_grad()
    model.zero_grad()
    (loss_of(model, 2, 0, 0) * 4.0).backward()
    loss_of(alone, 2, 0, 0).backward()
    optimizer.step(loss_scale=4.0)
    assert_as_one_process()

    # Every part within no_sync: the step exchanges them. A closure.
    def closure():
        with optimizer.no_sync():
            loss = loss_of(model, 3, 0, 0)
            loss.backward()
        return loss

    expected = loss_of(alone, 3, 0, 0)
    expected.backward()
    torch.testing.assert_close(optimizer.step(closure), expected)
    assert_as_one_process()

    # Parameters that were read before they had come are said to be.
    loss_of(model, 4, 0, 0).backward()
    optimizer.step()
    if ranks > 1:
        with pytest.raises(RuntimeError, match="was used before its new value had come"):
            model.embed.weight.sum().backward()
    optimizer.wait()
    optimizer.zero_grad()
    loss_of(alone, 4, 0, 0).backward()
    assert_as_one_process()
    failed_backward(model, alone, optimizer)
    assert_as_one_process()
    not_reached(stage)
    with pytest.raises(RuntimeError, match="groups are added when"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="max_norm: expected"):
        optimizer.step(max_norm=0.0)


def failed_backward(model, alone, optimizer):
    """Of which some buckets were sent, or none: neither another backward nor a step takes what it left."""

    def fail(_):
        raise ValueError("a bug")

    for parameter in (model.embed.weight, model.layers[2][2].bias):
        handle = parameter.register_hook(fail)
        for then in (lambda: loss_of(model, 6, 0, 0).backward(), optimizer.step):
            with pytest.raises(ValueError, match="a bug"):
                loss_of(model, 6, 0, 0).backward()
            handle.remove()
            with pytest.raises(RuntimeError, match=r"failed, and left a part .* zero_grad"):
                then()
            optimizer.zero_grad()
            handle = parameter.register_hook(fail)
        handle.remove()
    loss_of(model, 7, 0, 0).backward()
    loss_of(alone, 7, 0, 0).backward()
    optimizer.step()


def not_reached(stage):
    """Parameters that the optimizer does not have, or no longer."""
    layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    layers[1].requires_grad_(False)
    optimizer = ShardedOptimizer(layers, optim.SGD, stage=stage, params=list(layers.parameters()))
    layers[1].weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"1\.weight: it was frozen when the optimizer was made"):
        optimizer.step()
    layers[1].requires_grad_(False)
    layers.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"0\.bias: its memory is another|0\.weight: its memory is another"):
        optimizer.step()
    with pytest.raises(ValueError, match="weight: expected a tensor with values, got one on the meta device"):
        ShardedOptimizer(torch.nn.Linear(2, 2, device="meta"), optim.SGD, stage=stage)


def test_unusual_steps(tmp_path):
    run_ranks(edge_cases, 3, tmp_path, tmp_path, seconds=120)


def every_error(stage):
    rank = dist.get_rank()

    def sharded(model=None, cls=optim.AdamW, **options):
        return ShardedOptimizer(model or torch.nn.Linear(3, 2), cls, **({"stage": stage} | options))

    uneven, other_names = torch.nn.Linear(3, 2 + rank), torch.nn.ModuleDict({f"at{rank}": torch.nn.Linear(3, 2)})
    devices = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2, device="meta" if rank else "cpu"))
    for arguments, error, match in (
        ({"stage": 5}, ValueError, r"stage: expected one of \(1, 2, 3\), got 5"),
        ({"stage": 3 if rank else 1}, ValueError, "the ranks differ: rank 0 has AdamW, stage"),
        ({"state_bits": 7}, ValueError, "state_bits: expected one of"),
        ({"state_bits": 16 if rank else 7}, ValueError, r"state_bits: expected one of \(32, 16, 8, 4\), got 7"),
        ({"bucket_bytes": 0}, ValueError, "bucket_bytes: expected a positive integer"),
        ({"reduce_dtype": torch.int8}, ValueError, "reduce_dtype: expected one of"),
        ({"cls": optim.Muon}, ValueError, r"params\[1\]: expected a matrix"),
        ({"cls": torch.optim.AdamW}, TypeError, "optimizer_class: expected an optimizer of"),
        (
            {"model": torch.nn.Linear(3, 2).requires_grad_(False)},
            ValueError,
            "model: expected a parameter that requires a gradient",
        ),
        ({"params": [torch.nn.Parameter(torch.ones(2))]}, ValueError, "params: expected parameters of model"),
        ({"model": uneven}, ValueError, r"rank 0 has trained weight \(2, 3\) torch.float32; rank 1 has .* \(3, 3\)"),
        ({"model": other_names}, ValueError, "the ranks differ: rank 0 has trained at0.weight"),
        ({"params": [{}] if rank else None}, (KeyError, ValueError), "params"),
        ({"lr": 0.1 * (1 + rank)}, ValueError, "the ranks differ"),
        ({"model": devices}, ValueError, "1.weight: expected device cpu, that of 0.weight, got meta"),
    ):
        with pytest.raises(error, match=match):
            sharded(**arguments)
    sharded()  # the group is in order still


def errors_at_every_stage():
    for stage in (1, 2, 3):
        every_error(stage)


def test_errors_are_those_of_every_rank(tmp_path):
    run_ranks(errors_at_every_stage, 2, tmp_path, seconds=60)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_element_has_one_rank_and_no_block_is_cut(ranks):
    sizes = [1, 0, 300, 5000, 256, 70, 4097, 12]
    dtypes = [torch.float32, torch.bfloat16]
    named = [(f"p{i}", torch.nn.Parameter(torch.zeros(n, dtype=dtypes[i % 3 == 2])), i) for i, n in enumerate(sizes)]
    buckets = make_buckets(named, ranks, 8000)
    assert sorted(piece.place for bucket in buckets for piece in bucket.pieces) == list(range(len(sizes)))
    for bucket in buckets:
        flat = torch.zeros(bucket.size, dtype=torch.int64)
        assert bucket.shard_size % 256 == 0
        assert len(bucket.pieces) == 1 or sum(p.parameter.nbytes for p in bucket.pieces) <= 8000
        for piece in bucket.pieces:
            assert piece.parameter.dtype == bucket.dtype and piece.start % 256 == 0
            bucket.view(flat, piece).add_(1)
            covered = []
            for rank in range(ranks):
                first, last = bucket.elements_of(piece, rank)
                assert first == last or first % 256 == 0
                covered += range(first, last)
                assert all(
                    rank * bucket.shard_size <= piece.start + e < (rank + 1) * bucket.shard_size
                    for e in (first, last - 1)
                    if last > first
                )
            assert covered == list(range(piece.parameter.numel()))
        for first, last in bucket.gaps():
            flat[first:last] += 1
        assert (flat == 1).all()


class Plain(torch.nn.Module):
    """Layers whose rows do not fall to the ranks in equal parts, and a tied weight."""

    def __init__(self, width=64):
        super().__init__()
        self.embed = torch.nn.Embedding(37, width)
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(width, 100), torch.nn.GELU(), torch.nn.Linear(100, width))
            for _ in range(2)
        )
        self.head = torch.nn.Linear(width, 37, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def stage_three_steps(model, optimizer, steps, rank, ranks, sharded, no_sync=True):
    norms = []
    for step in range(steps):
        for part in range(2):
            keep = sharded and no_sync and part == 0
            with optimizer.no_sync() if keep else contextlib.nullcontext():
                for share in (rank,) if sharded else range(ranks):
                    ids = torch.randint(
                        0, 37, (4, 9), generator=torch.Generator().manual_seed(100 * step + 10 * part + share)
                    )
                    loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1).flatten())
                    (loss / (1 if sharded else ranks)).backward()
        optimizer.step(max_norm=1.0)
        optimizer.zero_grad()
        norms.append(optimizer.grad_norm.item())
    return norms


def stage_three(mesh_shape):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicas", "shards")[-len(mesh_shape) :])
    torch.manual_seed(rank)
    model = Plain()
    optimizer = ShardedOptimizer(model, optim.AdamW, stage=3, mesh=mesh, **OPTIONS)
    expected = Plain()
    expected.load_state_dict({name: tensor.full_tensor() for name, tensor in model.state_dict().items()})
    whole = optim.AdamW(expected.parameters(), **OPTIONS)
    held = sum(p.to_local().numel() for p in model.parameters())
    assert held < 0.6 * sum(p.numel() for p in expected.parameters())
    for no_sync in (True, False):
        norms = stage_three_steps(model, optimizer, 10, rank, ranks, True, no_sync)
        torch.testing.assert_close(norms, stage_three_steps(expected, whole, 10, rank, ranks, False), rtol=1e-5, atol=0)
    for (name, own), value in zip(model.named_parameters(), expected.parameters(), strict=True):
        difference = (own.full_tensor() - value).norm() / value.norm()
        assert difference <= 1e-6, (name, difference)
    before = model.embed.weight.to_local().clone()
    (model(torch.zeros(1, 2, dtype=torch.int64)).sum() * (math.inf if rank == 0 else 1.0)).backward()
    optimizer.step()
    assert optimizer.skipped and torch.equal(model.embed.weight.to_local(), before)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    model.embed.weight.grad.to_local().fill_(math.inf)
    assert optimizer.clip_grad_norm_(1.0) == math.inf and model.layers[0][0].weight.grad.to_local().eq(2).all()
    optimizer.zero_grad()
    unsynced_steps(model, optimizer)
    with pytest.raises(TypeError, match=r"embed\.weight: expected a tensor that is not divided yet, got a DTensor"):
        ShardedOptimizer(model, optim.AdamW)
    with pytest.raises(ValueError, match=r"state_bits: expected 32 or 16 for embed\.weight"):
        ShardedOptimizer(Plain(), optim.AdamW, stage=3, mesh=mesh, state_bits=8)
    parameters_left_out()


class Either(torch.nn.Module):
    """A layer of whose parameters a rank may leave out some, and none uses others."""

    def __init__(self, width):
        super().__init__()
        self.always, self.rare = torch.nn.Linear(width, width), torch.nn.Linear(width, width)
        self.never = torch.nn.Linear(2, 2)

    def forward(self, x, rare):
        x = x + self.always(x)
        return x + self.rare(x) if rare else x


class Rare(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.outside = torch.nn.Embedding(37, 24), torch.nn.Linear(24, 37)
        self.layers = torch.nn.ModuleList(Either(24) for _ in range(2))

    def forward(self, ids, rare):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, rare)
        return x @ self.embed.weight.t() + (self.outside(x) if rare else 0)


def parameters_left_out():
    """At stage 3 too a parameter is stepped where any rank had a gradient for it, and only there."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model, expected = Rare(), Rare()
    expected.load_state_dict(model.state_dict())
    optimizer = ShardedOptimizer(model, optim.AdamW, stage=3, **OPTIONS)
    whole = optim.AdamW(expected.parameters(), **OPTIONS)
    for step in range(6):
        for each in (expected, model) if step == 3 else ():  # dropped, and with it that there were any
            each(torch.arange(9)[None], True).sum().backward()
            each.zero_grad()
        for of_rank in range(ranks):
            ids = torch.randint(0, 37, (4, 9), generator=torch.Generator().manual_seed(10 * step + of_rank))
            rare = step % 3 != 0 and (step + of_rank) % 2 == 0
            for each, share in ((expected, ranks), (model, 1)):
                if each is expected or of_rank == rank:
                    loss = torch.nn.functional.cross_entropy(each(ids, rare).flatten(0, 1), ids.roll(1).flatten())
                    (loss / share).backward()
        optimizer.step(max_norm=1.0)
        whole.step(max_norm=1.0)
        whole.zero_grad()
    for (name, own), value in zip(model.named_parameters(), expected.parameters(), strict=True):
        difference = (own.full_tensor() - value).norm() / value.norm()
        assert difference <= 1e-6, (name, difference)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None  # the model keeps none
    model.zero_grad()


def unsynced_steps(model, optimizer):
    """Gradients that were not exchanged are said to be, and `zero_grad` drops them."""

    def backward():
        model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()

    backward()
    norm = optimizer.clip_grad_norm_(1e9)
    optimizer.zero_grad()
    with optimizer.no_sync():
        with optimizer.no_sync():
            backward()
        backward()
    with pytest.raises(RuntimeError, match="the last part of a batch runs outside of it"):
        optimizer.step()
    optimizer.zero_grad()
    backward()
    assert optimizer.clip_grad_norm_(1e9) == norm


@pytest.mark.parametrize("mesh_shape", [(3,), (2, 2)])
def test_stage_three_is_as_one_process_on_one_mesh_and_on_two(mesh_shape, tmp_path):
    run_ranks(stage_three, math.prod(mesh_shape), tmp_path, mesh_shape, seconds=120)
