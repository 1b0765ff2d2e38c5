"""Projections and gradient sums: what every block op relies on."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memkernels.ops.gradient_sum import GradientSum
from memkernels.ops.projection import Dense, DenseProjection
from memkernels.testing import assert_within_factor_two, random_tensor


def make_projection(dtype, *, bias=True):
    weight = random_tensor(24, 10, dtype=dtype, seed=1)
    return DenseProjection(weight, random_tensor(24, dtype=dtype, seed=2) if bias else None)


@pytest.mark.parametrize("bias", [True, False])
def test_agrees_with_autograd_of_linear(bias):
    projection = make_projection(torch.float32, bias=bias)
    x, dy = random_tensor(7, 10, dtype=torch.float32, seed=3), random_tensor(7, 24, dtype=torch.float32, seed=4)
    y = torch.nn.functional.linear(x, projection.weight, projection.bias)
    expected = torch.autograd.grad(y, (x, *projection.tensors), dy)
    with torch.no_grad():
        sums = [GradientSum(tensor, 1) for tensor in projection.tensors]
        projection.add_gradients(dy, x, sums)
        torch.testing.assert_close(projection.forward(x), y.detach())
        actual = (projection.input_grad(dy), *(total.result() for total in sums))
        torch.testing.assert_close(projection.input_grad(dy, into=torch.ones(7, 10)), expected[0] + 1)
    torch.testing.assert_close(actual, expected)


def test_a_frozen_tensor_gets_no_product():
    projection = make_projection(torch.float32)
    x, dy = torch.ones(7, 10), torch.ones(7, 24)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        bias_sum = GradientSum(projection.bias, 1)
        projection.add_gradients(dy, x, [None, bias_sum])
    assert counter.get_total_flops() == 0
    assert torch.equal(bias_sum.result(), torch.full((24,), 7.0))


@pytest.mark.parametrize("bias", [True, False])
def test_is_made_again_from_its_tensors(bias):
    projection = make_projection(torch.float32, bias=bias)
    description = projection.description
    assert description == Dense(has_bias=bias) and description.num_tensors == len(projection.tensors)
    again = description.bind(projection.tensors)
    assert again.weight is projection.weight and again.bias is projection.bias and again.out_features == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_over_tiles_in_float32(dtype):
    tiles = 64
    weight = random_tensor(24, 10, dtype=dtype)
    x, dy = random_tensor(tiles * 8, 10, dtype=dtype, seed=3), random_tensor(tiles * 8, 24, dtype=dtype, seed=4)
    total, narrow = GradientSum(weight, tiles), torch.zeros_like(weight)
    with torch.no_grad():
        for dy_tile, x_tile in zip(dy.chunk(tiles), x.chunk(tiles), strict=True):
            total.add_product(dy_tile, x_tile)
            narrow += dy_tile.t() @ x_tile
        exact = dy.double().t() @ x.double()
        assert_within_factor_two("sum", total.result(), exact, dy.t() @ x)
    if dtype != torch.float32:
        ours, theirs = ((value.double() - exact).abs().mean() for value in (total.result(), narrow))
        assert ours < theirs / 2


def test_a_single_tile_makes_no_buffer():
    weight = random_tensor(24, 10, dtype=torch.bfloat16)
    term = torch.ones(24, 10, dtype=torch.bfloat16)
    total = GradientSum(weight, 1)
    total.add(term)
    assert total.result() is term


def test_nothing_added_is_zero():
    assert torch.equal(GradientSum(torch.ones(3, 2, dtype=torch.float16), 4).result(), torch.zeros(3, 2).half())
