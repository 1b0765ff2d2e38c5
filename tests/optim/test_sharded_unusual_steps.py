"""optim.ShardedOptimizer at stages 1 and 2: steps without gradients, that fail, that are dropped; other groups."""

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from uneven_model import BUCKET, assert_equal, assert_same_on_every_rank, loss_of, model_of

import memkernels
from memkernels import optim
from memkernels.optim.sharded import ShardedOptimizer


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
    copied = copy.deepcopy(model)
    copied.scale.grad = torch.ones_like(copied.scale)
    copied.zero_grad()  # drops the copy's gradients, and not those of the model that it is of
    assert copied.scale.grad is None
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
