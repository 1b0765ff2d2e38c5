"""optim.ShardedOptimizer at stages 1 and 2, on 2 to 4 gloo processes, against one process with all gradients."""

import contextlib
import functools
import math

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from uneven_model import BUCKET, OPTIONS, assert_equal, assert_same_on_every_rank, loss_of, model_of

from memkernels import optim
from memkernels.optim.sharded import ShardedOptimizer


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
