"""micro_batch with optim.ShardedOptimizer, at every stage: all ranks' gradients, through running out of memory."""

import contextlib
import functools
import os
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks

from memkernels import micro_batch, optim
from memkernels.microbatch import run
from memkernels.optim import ShardedOptimizer
from memkernels.optim.agreement import Exchange
from memkernels.optim.sharded import fsdp_exchanges, reduction

LIMIT = 2  # rows of a part


class Failing(torch.autograd.Function):
    """Runs out of memory in backward, when the gradients of later layers are complete, for more than `limit` rows."""

    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        if len(dy) > ctx.limit:
            raise torch.OutOfMemoryError("full")
        return dy, None


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(11, 40)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(40, 40) for _ in range(3))

    def forward(self, ids, limit=100, fails_before=False):
        if fails_before and len(ids) > limit:
            raise torch.OutOfMemoryError("full")
        x = self.embed(ids)
        for i, layer in enumerate(self.layers):
            x = Failing.apply(layer(x).tanh(), limit if i == 1 else 100)
        return x


def batch_of(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 40, (rows, 6), generator=generator)
    labels[:, :2] = -100
    labels[0] = -100
    return {"ids": torch.randint(0, 11, (rows, 6), generator=generator), "labels": labels}


def make_step(model, sizes, **options):
    def step(part, targets):
        sizes.append(len(part["ids"]))
        logits = model(part["ids"], **options).flatten(0, 1)
        return F.cross_entropy(logits, part["labels"].flatten(), reduction="sum") / targets

    return step


def loss_before(model, rank):
    return model(batch_of(3, 10 + rank)["ids"]).square().mean()


def expected_values(rows, ranks):
    """After a step of SGD at a rate of 1: the mean of the ranks' losses from before, and the batches of all of them."""
    model = Model().double()
    sum(loss_before(model, rank) / ranks for rank in range(ranks)).backward()
    batches = [batch_of(rows[rank], rank) for rank in range(ranks)]
    logits = torch.cat([model(batch["ids"]).flatten(0, 1) for batch in batches])
    F.cross_entropy(logits, torch.cat([batch["labels"].flatten() for batch in batches])).backward()
    return [parameter.detach() - parameter.grad for parameter in model.parameters()]


def parts_of_a_batch(folder, rows, stages=(1, 2, 3)):
    """Rank 0 has memory for fewer rows than the others, which may have more."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    expected = expected_values(rows, ranks)
    for stage in stages:
        own = LIMIT if rank == 0 else 100
        for options, size, before in (
            ({}, LIMIT, True),
            ({"limit": own}, "auto", True),
            ({"limit": own, "fails_before": True}, "auto", False),
        ):
            model, sizes = Model(), []
            optimizer = ShardedOptimizer(model, optim.SGD, stage=stage, lr=1.0, bucket_bytes=8000)
            if before:
                loss_before(model, rank).backward()
            step = make_step(model, sizes, **options)
            loss = micro_batch(step, batch_of(rows[rank], rank), size=size, optimizer=optimizer)
            assert loss.isfinite() and (sizes[0] > LIMIT) == (size == "auto") and max(sizes[-2:]) <= LIMIT
            if not before:
                loss_before(model, rank).backward()
            optimizer.step()
            assert_values(model, optimizer, expected)
        memory_limit(stage, rank, rows, expected)
        alone(stage, rank)
        if stage < 3:
            no_memory_to_exchange(stage, rank, rows, expected)
            no_gradient(stage, rank)
        memory_runs_out_within_an_exchange(stage, rank)
    no_memory_within_gloo(rank, rows, expected)
    dies(rank)
    (folder / "all").touch()
    os._exit(0)


def alone(stage, rank):
    """One rank has no memory for a single row, or another error, in forward or backward: every rank says so."""
    model = Model()
    optimizer = ShardedOptimizer(model, optim.SGD, stage=stage, lr=1.0, bucket_bytes=8000)
    loss_before(model, rank).backward()
    norm = optimizer.clip_grad_norm_(1e9)
    started = time.monotonic()
    for fails_before in (False, True):
        step = make_step(model, [], limit=0 if rank == 1 else 100, fails_before=fails_before)
        error, message = (
            (torch.OutOfMemoryError, "full") if rank == 1 else (MemoryError, "another rank ran out of memory")
        )
        with pytest.raises(error, match=message):
            micro_batch(step, batch_of(2, rank), optimizer=optimizer)
    broken = make_step(model, [], limit="two" if rank == 1 else 100)
    with pytest.raises(TypeError if rank == 1 else RuntimeError, match=r"'>' not supported|another rank failed"):
        micro_batch(broken, batch_of(2, rank), optimizer=optimizer)
    assert time.monotonic() - started < 60
    assert optimizer.clip_grad_norm_(1e9) == norm


@contextlib.contextmanager
def refusing(when):
    """Has memory run out for buckets on their way, where when() says so."""
    real = torch.empty

    def empty(size, *rest, **options):
        if isinstance(size, int) and size >= 256 and when():
            raise torch.OutOfMemoryError("full")
        return real(size, *rest, **options)

    with mock.patch.object(torch, "empty", empty):
        yield


def no_memory_to_exchange(stage, rank, rows, expected):
    """On one rank, for large parts, for any, or from the start; in buckets alike or as large as their parameter."""
    started = time.monotonic()
    for bucket_bytes, reduce_dtype in ((8000, None), (4000, None), (4000, torch.bfloat16)):
        make = functools.partial(
            ShardedOptimizer, optimizer_class=optim.SGD, stage=stage, lr=1.0, bucket_bytes=bucket_bytes,
            reduce_dtype=reduce_dtype,
        )  # fmt: skip
        model, sizes = Model(), []
        optimizer, step = make(model), make_step(model, sizes)
        with refusing(lambda sizes=sizes: rank == 1 and bool(sizes) and sizes[-1] > LIMIT):
            micro_batch(step, batch_of(rows[rank], rank), optimizer=optimizer)
        assert sizes[0] > LIMIT >= max(sizes[-2:])
        loss_before(model, rank).backward()
        optimizer.step()
        if reduce_dtype is None:
            assert_values(model, optimizer, expected)

        error, message = (
            (torch.OutOfMemoryError, "full") if rank == 1 else (MemoryError, "another rank ran out of memory")
        )
        for from_the_start in (False, True):
            model, sizes, norm = Model(), [], 0.0
            optimizer, step = make(model), make_step(model, sizes)
            if bucket_bytes < 8000 and not from_the_start:  # otherwise there is memory for every bucket then
                loss_before(model, rank).backward()
                norm = optimizer.clip_grad_norm_(1e9)
            refused = refusing(lambda sizes=sizes, now=from_the_start: rank == 1 and (now or bool(sizes)))
            with refused, pytest.raises(error, match=message):
                micro_batch(step, batch_of(2, rank), optimizer=optimizer)
            assert optimizer.clip_grad_norm_(1e9) == norm and bool(sizes) != from_the_start
            loss_before(model, rank).backward()  # as if nothing had been
            optimizer.step()
        gradients_of_no_sync(make, rank, error, message)
    assert time.monotonic() - started < 60


def gradients_of_no_sync(make, rank, error, message):
    """Memory runs out while those are exchanged that were there before: none is left on any rank."""
    model, sizes = Model(), []
    optimizer = make(model)
    with optimizer.no_sync():
        loss_before(model, rank).backward()
    reserve, reserved = optimizer._reducer.reserve, []
    optimizer._reducer.reserve = lambda: reserved.append(reserve())
    with refusing(lambda: rank == 1 and bool(reserved)), pytest.raises(error, match=message):
        micro_batch(make_step(model, sizes), batch_of(2, rank), optimizer=optimizer)
    assert not sizes and optimizer.clip_grad_norm_(1e9) == 0


def no_gradient(stage, rank):
    """A rank whose loss has none of the optimizer's parameters."""
    model, other = Model(), torch.ones((), requires_grad=True)
    optimizer = ShardedOptimizer(model, optim.SGD, stage=stage, lr=1.0, bucket_bytes=8000)
    step = make_step(model, [])
    micro_batch((lambda *_: other * 2) if rank == 1 else step, batch_of(2, rank), optimizer=optimizer)
    assert optimizer.clip_grad_norm_(1e9) > 0
    assert other.grad == (2 if rank == 1 else None)


def memory_runs_out_within_an_exchange(stage, rank):
    """Half of it may have been sent: the rank does not go on with smaller parts, nor do the others wait for it."""
    group = dist.new_group()
    model, sizes = Model(), []
    optimizer = ShardedOptimizer(model, optim.SGD, stage=stage, process_group=group, lr=1.0, bucket_bytes=8000)
    full = RuntimeError("DefaultCPUAllocator: not enough memory")
    real = reduction.start

    def start(collective, *tensors, **options):
        if collective is dist.all_to_all_single:
            return Exchange(mock.Mock(**{"wait.side_effect": full}), options["group"])
        return real(collective, *tensors, **options)

    in_gloo = mock.patch.object(reduction, "start", start)
    if stage == 3:
        in_gloo = mock.patch.object(fsdp_exchanges.DefaultReduceScatter, "__call__", mock.Mock(side_effect=full))
    started = time.monotonic()
    with (
        in_gloo if rank == 1 else contextlib.nullcontext(),
        pytest.raises(optim.RankFailure, match="memory ran out on this rank" if rank == 1 else "one of them has ended"),
    ):
        micro_batch(make_step(model, sizes), batch_of(2, rank), optimizer=optimizer)
    assert sizes == [2] and time.monotonic() - started < 20
    dist.barrier()
    # Another group of the same ranks goes on.
    model, options = Model(), {"process_group": dist.new_group(), "lr": 1.0, "bucket_bytes": 8000}
    optimizer = ShardedOptimizer(model, optim.SGD, stage=stage, **options)
    expected = [parameter.detach() for parameter in Model().parameters()]
    assert_values(model, optimizer, expected)
    loss_before(model, rank).backward()
    optimizer.step(max_norm=1.0)
    assert optimizer.grad_norm.isfinite() and not optimizer.skipped
    with pytest.raises(AssertionError):
        assert_values(model, optimizer, expected)


def no_memory_within_gloo(rank, rows, expected):
    """At stage 3 gloo copies what it exchanges: for large parts rank 1 has no memory for that."""
    model, sizes, real = Model(), [], torch.empty_like
    optimizer = ShardedOptimizer(model, optim.SGD, stage=3, lr=1.0)

    def empty_like(tensor, *rest, **options):
        if rank == 1 and sizes and sizes[-1] > LIMIT:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return real(tensor, *rest, **options)

    with mock.patch.object(torch, "empty_like", empty_like):
        micro_batch(make_step(model, sizes), batch_of(rows[rank], rank), optimizer=optimizer)
    assert sizes[0] > LIMIT >= max(sizes[-2:])
    loss_before(model, rank).backward()
    optimizer.step()
    assert_values(model, optimizer, expected)


def dies(rank):
    """At stage 3, within a part."""
    model = Model()
    optimizer = ShardedOptimizer(model, optim.SGD, stage=3, lr=1.0)
    step = make_step(model, [])
    started = time.monotonic()
    dist.barrier()
    with pytest.raises(optim.RankFailure, match="one of them has ended"):
        micro_batch(lambda *part: os._exit(0) if rank == 1 else step(*part), batch_of(2, rank), optimizer=optimizer)
    # Without the optimizer's listening, in FSDP2's own exchange.
    with pytest.raises(optim.RankFailure, match="one of them has ended"):
        model(batch_of(2, rank)["ids"])
    assert time.monotonic() - started < 60


def assert_values(model, optimizer, expected):
    optimizer.wait()
    for (name, actual), value in zip(model.named_parameters(), expected, strict=True):
        actual = actual.full_tensor() if hasattr(actual, "full_tensor") else actual
        difference = (actual.double() - value).abs().max() / value.abs().max()
        assert difference < 1e-6, (name, difference)


def memory_limit(stage, rank, rows, expected):
    """A part is over it on the first rank alone."""
    sizes, real = [], run.peak_bytes
    run.peak_bytes = lambda part, device: (part(), sizes[-1] if rank == 0 else 0)[1]
    try:
        model = Model()
        optimizer = ShardedOptimizer(model, optim.SGD, stage=stage, lr=1.0)
        loss_before(model, rank).backward()
        micro_batch(make_step(model, sizes), batch_of(rows[rank], rank), memory_limit=LIMIT, optimizer=optimizer)
    finally:
        run.peak_bytes = real
    optimizer.step()
    assert_values(model, optimizer, expected)
    # Without the optimizer, or around it, nothing is computed that would be wrong.
    again = functools.partial(micro_batch, make_step(model, sizes), batch_of(4, 0), size=LIMIT)
    with pytest.raises(ValueError, match="optimizer: expected the ShardedOptimizer of the model"):
        again()
    optimizer.zero_grad()
    with optimizer.no_sync(), pytest.raises(RuntimeError, match=r"outside of no_sync\(\)"):
        again(optimizer=optimizer)
    one_row = functools.partial(make_step(model, sizes, limit=0), batch_of(1, 0))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        micro_batch(lambda *_: one_row(1.0), torch.ones(2), size=1, optimizer=optimizer)
    with pytest.raises(ValueError, match="size: expected the same on every rank"):
        again(optimizer=optimizer, size=1 + rank)
    wrong = {"size": 0} if rank == 0 else {}
    with pytest.raises((ValueError, RuntimeError), match=r"size: expected|another rank failed"):
        again(optimizer=optimizer, **wrong)
    wrong = {"optimizer": model} if rank == 0 else {"optimizer": optimizer}
    with pytest.raises((TypeError, RuntimeError), match=r"optimizer: expected a Sharded|another rank failed"):
        again(process_group=dist.group.WORLD, **wrong)
    wrong = {"process_group": "gloo"} if rank == 0 else {}
    with pytest.raises((ValueError, RuntimeError), match=r"process_group: expected one|another rank failed"):
        again(optimizer=optimizer, **wrong)


@pytest.mark.parametrize("rows", [[3, 5], pytest.param([3, 5, 3, 4], marks=pytest.mark.slow)])
def test_parts_of_a_batch_at_every_stage(tmp_path, rows):
    run_ranks(parts_of_a_batch, len(rows), tmp_path, tmp_path, rows, seconds=120)
    assert (tmp_path / "all").exists()
