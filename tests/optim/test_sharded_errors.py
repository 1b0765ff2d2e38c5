"""optim.ShardedOptimizer: an argument that is wrong on one rank is an error on all of them."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from memkernels import optim
from memkernels.optim.sharded import ShardedOptimizer


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
        ({"params": [{}] if rank else None}, (TypeError, ValueError), "params: expected parameters, or groups of them"),
        ({"params": 5}, TypeError, "params: expected parameters, or groups of them, got int"),
        ({"params": []}, ValueError, "params: expected a parameter"),
        ({"params": [3]}, TypeError, "params: expected parameters of model, got int"),
        ({"process_group": "gloo"}, ValueError, "process_group: expected a ProcessGroup, got 'gloo'"),
        ({"process_group": 0 if rank else None}, ValueError, "process_group: expected a ProcessGroup, got 0"),
        ({"state_bits": 8.0}, ValueError, "state_bits: expected one of"),
        ({"lr": 0.1 * (1 + rank)}, ValueError, "the ranks differ"),
        ({"model": devices}, ValueError, "1.weight: expected device cpu, that of 0.weight, got meta"),
    ):
        with pytest.raises(error, match=match):
            sharded(**arguments)
    sharded()  # the group is in order still


def no_elements_at_stage_three():
    model = torch.nn.Linear(3, 2)
    model.extra = torch.nn.Parameter(torch.empty(0, 4))
    with pytest.raises(ValueError, match=r"extra: expected elements, .* got shape \(0, 4\): freeze it"):
        ShardedOptimizer(model, optim.AdamW, stage=3)
    model.extra.requires_grad_(False)
    optimizer = ShardedOptimizer(model, optim.AdamW, stage=3)
    before = model.weight.full_tensor()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight.full_tensor(), before)


def errors_at_every_stage():
    for stage in (1, 2, 3):
        every_error(stage)
    no_elements_at_stage_three()


def test_errors_are_those_of_every_rank(tmp_path):
    run_ranks(errors_at_every_stage, 2, tmp_path, seconds=60)
