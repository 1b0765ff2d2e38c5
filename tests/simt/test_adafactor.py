"""Adafactor in CUDA C++ as operators, on CPU tensors: against float64, and the bits of the CPU kernel's step."""

from __future__ import annotations

import math

import pytest
import torch
from optimizer_steps import normal

from memkernels import optim
from memkernels.optim import codes, rounding
from memkernels.testing import assert_within_factor_two, implementations

pytestmark = pytest.mark.xdist_group("simt_operators")  # one library, compiled once

# Between them one part of a row or a column and several, rows of whole packs and not, few lanes a row and all of them,
# and small matrices, of which blocks have several.
SHAPES = ((1, 1, 3000), (1, 300, 16), (3, 41, 77), (1, 600, 264), (2, 17, 512), (130, 3, 3))
# Rows of whole runs and not, of several warps, and elements of which each has a factor of its own.
FACTORED = ((1, 1, 3000), (3, 80, 77), (2, 70, 512), (130, 3, 3))
SCALE, FACTOR = 3.0, torch.tensor(0.125)


def factors_of(shape):
    return normal((*shape[:2], 1), 1).abs() + 0.1, normal((shape[0], 1, shape[2]), 2).abs() + 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_squares_of_rows_and_columns(simt, shape, dtype):
    grad = normal(shape, 0, dtype)
    exact, plain = ((SCALE * FACTOR * grad.to(wide)).square() for wide in (torch.float64, torch.float32))
    for dim, sums in zip((-1, -2), simt.factored_squares(grad, SCALE, FACTOR), strict=True):
        of_dim = exact.sum(dim, keepdim=True)
        # Of few terms torch's sum may be exact to the last bit by chance.
        slack = 2**-23 * float(of_dim.abs().max())
        assert_within_factor_two(f"dim {dim}", sums, of_dim, plain.sum(dim, keepdim=True), atol=slack)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_sums_of_nothing(simt, shape):
    for sums, expected in zip(simt.factored_squares(torch.ones(shape), 1.0, None), (2, 1), strict=True):
        size = [of for dim, of in enumerate(shape) if dim != expected]
        assert sums.numel() == math.prod(size) and not sums.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", FACTORED, ids=str)
def test_sum_of_all_squares(simt, shape, dtype):
    grad, (rows, columns) = normal(shape, 0, dtype), factors_of(shape)
    u = SCALE * FACTOR * grad.double() * (rows.double() * columns.double()).clamp(max=2.0)
    exact = u.square().sum()
    result = simt.factored_square_sum(grad, rows, columns, 2.0, SCALE, FACTOR)
    assert result.shape == () and abs(result - exact) <= 1e-5 * exact


@pytest.fixture
def native():
    """`torch.ops.memkernels` by the CPU kernels that fuse nothing, as csrc/simt does."""
    (plain,) = (one for one in implementations("adafactor_") if one.name == "cpu-baseline")
    with plain.active():
        yield torch.ops.memkernels


@pytest.mark.parametrize(("kept", "offset"), [("float32", 0), ("float32", 1), ("stochastic", 0), ("remainder", 1)])
@pytest.mark.parametrize("bits", [None, 32, 16, 8, 4])
@pytest.mark.parametrize("shape", FACTORED, ids=str)
def test_a_step_has_the_bits_of_the_cpu_kernel(simt, native, shape, bits, kept, offset):
    size = math.prod(shape)

    def placed(values):
        """At an address where no quad can be read at once, if there is an offset."""
        return torch.cat([values.new_zeros(offset), values.reshape(-1)])[offset:]

    def step(operators):
        high, low = rounding.split(normal(shape, 3).view(-1))
        param = placed(normal(shape, 3) if kept == "float32" else high)
        moments, absmax = [], []
        if bits is not None:
            stored, maxima = codes.encode(normal(size, 4), bits, True)
            moments, absmax = [placed(stored)], [] if maxima is None else [placed(maxima)]
        remainders = [placed(low)] if kept == "remainder" else []
        rows, columns = factors_of(shape)
        numbers = (-SCALE, FACTOR, torch.tensor(0.5), 0.2, 0.0 if bits is None else 0.9, 0.1, rows, columns, 2.0)
        operators.adafactor_(
            [param], [placed(normal(shape, 5, param.dtype))], moments, absmax, remainders, [3], [2], [512], 7,
            bits or 32, *numbers,
        )  # fmt: skip
        return [param, *moments, *absmax, *remainders]

    for ours, theirs in zip(step(simt), step(native), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"beta1": 0.9, "state_bits": 8}], ids=str)
def test_adafactor_steps_by_the_kernels(calls, options):
    shapes = ((40, 24), (3, 17, 9), (257,))
    ours, theirs = ([torch.nn.Parameter(normal(shape, i)) for i, shape in enumerate(shapes)] for _ in range(2))
    optimizers = [optim.Adafactor(params, lr=0.05, **options) for params in (ours, theirs)]
    for step in range(2):
        for i, (param, other) in enumerate(zip(ours, theirs, strict=True)):
            param.grad = normal(param.shape, 10 * step + i)
            other.grad = param.grad.clone()
        optimizers[0].step(max_norm=0.5)
        with pytest.MonkeyPatch.context() as patch:
            for module in ("adafactor", "operators"):
                patch.setattr(f"memkernels.optim.{module}.has_kernel", lambda *_: False)
            optimizers[1].step(max_norm=0.5)
    assert set(calls) == {"square_sum", "factored_squares", "factored_square_sum", "adafactor_"}
    for param, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-4, atol=1e-5)
