"""The dispatch to experts in CUDA C++ as operators, on CPU tensors: what the native CPU kernels give."""

from __future__ import annotations

import pytest
import torch

from memkernels import ops
from memkernels.ops.moe import reference
from memkernels.testing import assert_within_factor_two, poisoned_memory, random_tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.xdist_group("simt_operators")  # one library, compiled once


def random_ids(tokens, choices, experts):
    """Some are `experts`: nowhere."""
    ids = torch.rand(tokens, experts + 1, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :choices]
    return ids.contiguous()


@pytest.mark.parametrize("capacity", [1, 3, 1000])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(0, 2, 4), (23, 2, 5), (1301, 2, 9)], ids=str)
def test_the_plan_is_that_of_the_cpu_kernel(simt, shape, dtype, capacity):
    ids, experts = random_ids(*shape).to(dtype), shape[2]
    with poisoned_memory():
        ours = simt.moe_plan(ids, experts, capacity)
    for mine, theirs in zip(ours, torch.ops.memkernels.moe_plan(ids, experts, capacity), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("choices", [3, 11])  # fewer and more than a block takes at once
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dispatch_and_combine_match_the_reference(simt, calls, dtype, choices):
    experts = choices + 2
    ids = random_ids(23, choices, experts)

    def step():
        x = random_tensor(23, 40, dtype=dtype)
        weights = random_tensor(23, choices, dtype=torch.float32, seed=1)
        grouped, plan = ops.moe_dispatch(x, ids, experts, capacity=9)
        y = ops.moe_combine(grouped.square(), plan, weights)
        return (grouped, y, *torch.autograd.grad(y.square().sum(), (x, weights)))

    with poisoned_memory():
        ours = step()
    assert set(calls) == {"moe_plan", "moe_dispatch", "moe_combine", "moe_combine_bwd"}
    names = ("x_grouped", "y", "gradient of x", "gradient of weights")
    exact, plain = (_reference_step(ids, experts, dtype, at) for at in (torch.float64, dtype))
    for name, *values in zip(names, ours, exact, plain, strict=True):
        assert_within_factor_two(name, *values)


def _reference_step(ids, experts, dtype, at):
    """Of inputs of dtype, computed at another."""
    x = random_tensor(23, 40, dtype=dtype).to(at)
    weights = random_tensor(*ids.shape, dtype=torch.float32, seed=1)
    weights = weights.double() if at == torch.float64 else weights
    row_of_pair, pair_of_row, _, _ = reference.plan(ids, experts, 9)
    grouped = reference.dispatch(x, None, row_of_pair, pair_of_row)
    y = reference.combine(grouped.square(), weights, row_of_pair)
    return (grouped, y, *torch.autograd.grad(y.square().sum(), (x, weights)))


def test_bad_arguments_are_named(simt):
    plan = ops.moe_plan(random_ids(9, 2, 4), 4)
    with pytest.raises(RuntimeError, match="x: expected 9 tokens, as the plan has, got 8"):
        simt.moe_dispatch(torch.zeros(8, 5), None, plan.row_of_pair, plan.offsets, 18)
    with pytest.raises(RuntimeError, match="expected float32, bfloat16 or float16"):
        simt.moe_dispatch(torch.zeros(9, 5).double(), None, plan.row_of_pair, plan.offsets, 18)
    with pytest.raises(RuntimeError, match="expert id out of range"):
        simt.moe_plan(torch.full((9, 2), 5), 4, 18)
