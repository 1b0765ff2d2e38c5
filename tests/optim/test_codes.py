"""The codes of moments: the code books, and that the kernels store the nearest code, on every instruction set."""

import pytest
import torch

from memkernels.optim import codes
from memkernels.quant.reference import nested_code
from memkernels.testing import implementations, poisoned_memory

on_every_implementation = pytest.mark.parametrize("implementation", implementations("adamw_"), ids=str)
few_bits = pytest.mark.parametrize("bits", [8, 4])


def run(bits, grad, moments, absmax, beta):
    """One step of size zero: m and v become (1 - beta) times g and g^2, and beta times what they were."""
    param = torch.ones_like(grad)
    torch.ops.memkernels.adamw_(
        [param], [grad], moments, absmax, [], [1], [0], [0], 0, bits, 1.0, None, None, 0.0, beta, beta, 1e-8, 0.0
    )


def spread(size):
    """Values of both signs over nine decades, and zeros."""
    generator = torch.Generator().manual_seed(0)
    magnitude = 10 ** (-9 * torch.rand(size, generator=generator))
    sign = torch.randint(-1, 2, (size,), generator=generator)
    return magnitude * sign


def assert_nearest(stored, absmax, bits, signed, exact):
    size, block = exact.numel(), codes.BLOCK_SIZE[bits]
    scales = absmax.repeat_interleave(block)[:size].double()
    book = codes.code_book(bits, signed).double()
    zero_alone = bits == 8 and not signed
    distance = (exact.double()[:, None] - scales[:, None] * book[zero_alone:]).abs().amin(1)
    if zero_alone:
        distance = torch.where(exact == 0, 0, distance)
    error = (codes.decode(stored, absmax, bits, signed, exact.shape).double() - exact.double()).abs()
    assert (error <= distance * (1 + 1e-5) + 1e-6 * exact.abs()).all()
    largest = torch.nn.functional.pad(exact.abs(), (0, -size % block)).view(-1, block)
    assert torch.equal(absmax, largest.amax(1))


@few_bits
def test_code_books_ascend_from_the_negative_to_one(bits):
    for signed in (True, False):
        book = codes.code_book(bits, signed)
        assert book.shape == (2**bits,) and (book.diff() > 0).all() and book[-1] == 1
        assert (book == 0).sum() == (0 if (bits, signed) == (4, False) else 1)
    torch.testing.assert_close(codes.code_book(8, True), nested_code(), rtol=1e-6, atol=0)


@on_every_implementation
@few_bits
def test_every_code_is_read_and_written_as_itself(implementation, bits):
    size = codes.BLOCK_SIZE[bits]
    stored = torch.arange(size, dtype=torch.uint8)
    if bits == 4:
        stored = (stored[::2] & 15) << 4 | (stored[1::2] & 15)
    absmax = [torch.tensor([3.0]), torch.tensor([0.7])]
    moments = [stored.clone(), stored.clone()]
    with implementation.active():
        run(bits, torch.zeros(size), moments, absmax, beta=1.0)
    for moment in moments:
        assert torch.equal(moment, stored)
    assert absmax[0].item() == pytest.approx(3.0) and absmax[1].item() == pytest.approx(0.7)


@on_every_implementation
@few_bits
@pytest.mark.parametrize("size", [1, 100, 256, 257, 5000, 40001])
def test_what_is_stored_is_the_nearest_value(implementation, bits, size):
    grad = spread(size)
    with poisoned_memory():
        (m, m_absmax), (v, v_absmax) = codes.new_moment(grad, bits), codes.new_moment(grad, bits)
    with implementation.active():
        run(bits, grad, [m, v], [m_absmax, v_absmax], beta=0.0)
    assert_nearest(m, m_absmax, bits, True, grad)
    assert_nearest(v, v_absmax, bits, False, grad * grad)


@on_every_implementation
def test_a_second_moment_is_stored_as_zero_only_if_it_is_zero(implementation):
    grad = torch.zeros(256)
    grad[0], grad[1] = 1.0, 1e-6
    moments, absmax = zip(*(codes.new_moment(grad, 8) for _ in range(2)), strict=True)
    with implementation.active():
        run(8, grad, list(moments), list(absmax), beta=0.0)
    assert moments[1][0] == 255 and moments[1][1] == 1 and not moments[1][2:].any()


@few_bits
def test_the_reference_stores_the_nearest_value(bits):
    values = spread(1000)
    for signed in (True, False):
        exact = values if signed else values.square()
        assert_nearest(*codes.encode(exact, bits, signed), bits, signed, exact)


@on_every_implementation
@few_bits
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_poisons_its_block_alone(implementation, bits, poison):
    grad = spread(1024)
    grad[300] = poison
    moments, absmax = zip(*(codes.new_moment(grad, bits) for _ in range(2)), strict=True)
    with implementation.active():
        run(bits, grad, list(moments), list(absmax), beta=0.0)
    block = 300 // codes.BLOCK_SIZE[bits]
    values = codes.decode(moments[0], absmax[0], bits, True, grad.shape).view(-1, codes.BLOCK_SIZE[bits])
    assert values[block].isnan().any()
    assert values[:block].isfinite().all() and values[block + 1 :].isfinite().all()
