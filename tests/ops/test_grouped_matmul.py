"""ops.grouped_matmul and its operators: each backend against the reference, and what rows and offsets may be."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from experts import random_ids

from memkernels import _library, ops
from memkernels.ops.moe import reference
from memkernels.ops.moe.weights import select_backend
from memkernels.testing import check_op, implementations, random_tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@contextmanager
def device_of(backend: str):
    """Where a backend runs: Triton's kernels on a GPU, else under the interpreter."""
    if backend != "triton":
        yield "cpu"
        return
    with implementations("grouped_product")[0].active() as device:
        yield device


def check_grouped_matmul(backend, plan, size, columns, dtype, device, *, transposed=False):
    def weights_of(stored):
        return stored.mT if transposed else stored

    shape = (plan.num_experts, size, columns) if transposed else (plan.num_experts, columns, size)
    check_op(
        lambda x_grouped, stored: ops.grouped_matmul(x_grouped, weights_of(stored), plan, backend=backend),
        lambda x_grouped, stored: reference.grouped_matmul(x_grouped, weights_of(stored), plan.offsets),
        {
            "x_grouped": random_tensor(plan.pair_of_row.shape[0], size, dtype=dtype, device=device),
            "stored": random_tensor(*shape, dtype=dtype, device=device, seed=1),
        },
        strided_grads=True,
    )


@dtypes
@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize("backend", ["loop", "grouped_mm", "triton"])
def test_grouped_matmul_matches_the_reference(dtype, capacity, backend):
    with device_of(backend) as device:
        ids = random_ids(23, 2, 5, nowhere=True).to(device)
        plan = ops.moe_plan(torch.where(ids == 5, 7, ids), 7, capacity=capacity)  # experts 5 and 6 get nothing
        # Rows of 16 bytes' multiples, as grouped_mm wants.
        check_grouped_matmul(backend, plan, 24, 16, dtype, device)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns", [48, 37], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("routing", ["spread", "to one", "one token", "no token", "nowhere", "one expert"])
def test_triton_products_of_any_groups(routing, columns, transposed):
    """Several tiles a group, none full, and a walk over the rows' size of several steps."""
    tokens = {"one token": 1, "no token": 0}.get(routing, 45)
    experts = 1 if routing == "one expert" else 5
    ids = random_ids(tokens, 1, experts, nowhere=routing == "spread")
    if routing in ("to one", "nowhere"):
        ids.fill_({"to one": 3, "nowhere": experts}[routing])
    with device_of("triton") as device:
        plan = ops.moe_plan(ids.to(device), experts)
        size = 80 if columns == 48 else 70
        check_grouped_matmul("triton", plan, size, columns, torch.float32, device, transposed=transposed)


def grouped_operators(x, tokens, dy, weights, offsets, backend="triton"):
    """A product by rows, one by columns and the weights' gradient, x and dy gathered."""
    memkernels, rows = torch.ops.memkernels, tokens.shape[0]
    return (
        memkernels.grouped_product(x, tokens, weights.mT, offsets, rows, backend),
        memkernels.grouped_product(dy, tokens, weights, offsets, rows, backend),
        memkernels.grouped_weight_grad(dy, tokens, x, tokens, offsets, backend),
    )


def grouped_inputs(tokens, experts, size, columns, dtype, device):
    """x, the token of each row, dy, weights, offsets; rows beyond the last group have token -1."""
    plan = ops.moe_plan(random_ids(tokens, 2, experts, nowhere=True).to(device), experts)
    shapes = ((tokens, size), (tokens, columns), (experts, columns, size))
    x, dy, weights = (random_tensor(*s, dtype=dtype, device=device, seed=i).detach() for i, s in enumerate(shapes))
    return x, plan.token_of_row, dy, weights, plan.offsets


@pytest.mark.parametrize("size", [48, 37], ids=["descriptors", "pointers"])
def test_triton_keeps_what_is_not_finite_with_its_rows_and_expert(size):
    with device_of("triton") as device:
        x, tokens, dy, weights, offsets = grouped_inputs(45, 5, size, 16, torch.float32, device)
        expected = grouped_operators(x, tokens, dy, weights, offsets)
        bounds = offsets.tolist()
        ill = tokens[bounds[2]]  # a token of expert 2, and the rows of it, one of them another expert's
        x[ill], weights[1] = torch.inf, torch.nan
        found = grouped_operators(x, tokens, dy, weights, offsets)
    well = tokens != ill
    well[bounds[1] : bounds[2]] = False
    assert torch.equal(found[0][well], expected[0][well]) and not found[0][~well][:, 0].isfinite().any()
    others = [expert for expert in range(5) if ill not in tokens[bounds[expert] : bounds[expert + 1]]]
    assert len(others) < 5 and torch.equal(found[2][others], expected[2][others])


def test_triton_never_follows_rows_or_offsets_out_of_bounds():
    with device_of("triton") as device:
        x, tokens, dy, weights, offsets = grouped_inputs(9, 4, 16, 32, torch.float32, device)
        for shift in (10**9, -(10**9)):
            y, dx, dweights = grouped_operators(x, tokens + shift, dy, weights, offsets)
            assert not y.any() and not dx.any() and not dweights.any()
            grouped_operators(x, tokens, dy, weights, offsets + shift)


@pytest.mark.parametrize("backend", ["loop", "triton"])
def test_a_product_adds_nothing_to_rows_of_no_expert(backend):
    """Not even zero, which would read and write them, and make -0 to 0."""
    with device_of(backend) as device:
        y, x = torch.full((40, 16), -0.0, device=device), torch.ones(40, 4, device=device)
        offsets = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
        torch.ops.memkernels.grouped_product_add_(y, x, torch.ones(2, 4, 16, device=device), offsets, backend)
    assert (y[:5] == 4).all() and y[5:].signbit().all()


@pytest.mark.parametrize("size", [64, 15], ids=["descriptors", "pointers"])
def test_triton_products_have_addresses_beyond_32_bits(size):
    with device_of("triton") as device:
        x, tokens, dy, weights, offsets = grouped_inputs(3, 4, size, 16, torch.float16, device)
        expected = grouped_operators(x, tokens, dy, weights, offsets)
        # Gigabytes of addresses, of which a few rows are ever touched.
        far = [
            torch.empty_strided(near.shape, strides, dtype=near.dtype, device=device).copy_(near)
            for near, strides in ((x, (2**30, 1)), (dy, (2**30, 1)), (weights, (2**30, size, 1)))
        ]
        found = grouped_operators(far[0], tokens, *far[1:], offsets)
        assert all(map(torch.equal, found, expected))


def test_auto_takes_triton_where_it_runs():
    assert select_backend("auto", torch.zeros(1), 8) == "loop"
    with pytest.raises(ValueError, match=r"backend: grouped_mm takes weights \(E, out, in\), got one for each expert"):
        select_backend("grouped_mm", torch.zeros(1), [torch.zeros(2, 2)])
    with implementations("grouped_product")[0].active() as device:
        x = torch.zeros(1, device=device)
        assert select_backend("auto", x, 7) == "triton"
        with mock.patch.object(_library, "_products", "matmul"):
            assert select_backend("auto", x, 7) == "loop"


def test_grouped_matmul_of_bad_input_names_the_argument():
    plan = ops.moe_plan(random_ids(9, 2, 4), 4)
    with pytest.raises(ValueError, match=r"weights: expected shape \(4, out, 5\).*got \(3, 7, 5\)"):
        ops.grouped_matmul(torch.zeros(18, 5), torch.zeros(3, 7, 5), plan)
    with pytest.raises(TypeError, match=r"weights: expected torch.float32, as x, got torch\.bfloat16"):
        ops.grouped_matmul(torch.zeros(18, 5), torch.zeros(4, 7, 5, dtype=torch.bfloat16), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_matmul_follows_autocast_as_linear_does(dtype):
    plan = ops.moe_plan(random_ids(23, 2, 5), 5)
    x_grouped = random_tensor(46, 8, dtype=dtype)
    weights = random_tensor(5, 12, 8, dtype=torch.float32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.grouped_matmul(x_grouped, weights, plan)
    y.sum().backward()
    assert torch.equal(y, ops.grouped_matmul(x_grouped.bfloat16(), weights.bfloat16(), plan))
    assert y.dtype == torch.bfloat16 and x_grouped.grad.dtype == dtype and weights.grad.dtype == torch.float32


def test_a_frozen_expert_costs_no_gradient():
    """Of weights of their own, as experts of SwitchTransformers have them."""
    x, offsets = torch.randn(6, 4), torch.tensor([0, 2, 6])
    none, whole = torch.ops.memkernels.separate_weight_grad(x, None, x, None, offsets, [False, True])
    assert none.numel() == 0 and torch.equal(whole, x[2:].t() @ x[2:])
