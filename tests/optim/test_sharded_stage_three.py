"""optim.ShardedOptimizer at stage 3, on gloo processes of one mesh and of two, against one process."""

import contextlib
import gc
import math
import weakref

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from uneven_model import OPTIONS

from memkernels import optim
from memkernels.optim.sharded import ShardedOptimizer


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


def rounded_steps():
    """Ranks whose rows begin anywhere, with the same gradients: every element is rounded as in one process, but for a
    few whose factors sums in another order change."""
    for optimizer_class, options, equal in (
        (optim.AdamW, {"lr": 1e-2, "state_bits": 16}, 1.0),
        (optim.Adafactor, {"lr": 1e-2}, 0.99),
        (optim.Adafactor, {"lr": 1e-2, "beta1": 0.9, "state_bits": 16}, 0.99),
    ):
        torch.manual_seed(0)
        models = [Plain(width=30).bfloat16() for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        sharded = ShardedOptimizer(models[0], optimizer_class, stage=3, **options)
        for model, optimizer in zip(models, (sharded, optimizer_class(models[1].parameters(), **options)), strict=True):
            for step in range(3):
                ids = torch.randint(0, 37, (4, 9), generator=torch.Generator().manual_seed(step))
                model(ids).float().square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        for (name, own), value in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            share = (own.full_tensor() == value).float().mean()
            assert share >= equal, (optimizer_class, options, name, share)


def test_stage_three_rounds_at_random_by_the_elements_of_whole_parameters(tmp_path):
    run_ranks(rounded_steps, 2, tmp_path, seconds=120)
