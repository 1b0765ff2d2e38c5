"""8-bit floats in blocks: the reference's codes on every implementation, and the stated error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memkernels.ops import fp8_blocks
from memkernels.ops.fp8_blocks import reference
from memkernels.testing import implementations, poisoned_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
on_every_implementation = pytest.mark.parametrize("implementation", implementations("fp8_encode_"), ids=str)


def round_trip(values, implementation=None):
    """Codes, scales and the values that come back."""
    n = values.numel()
    codes, scales = torch.empty(n, dtype=torch.uint8), torch.empty(-(-n // 128))
    back = torch.empty_like(values)
    if implementation is None:
        reference.fp8_encode_(values, codes, scales)
        reference.fp8_decode_(codes, scales, back)
        return codes, scales, back
    with implementation.active() as device, poisoned_memory():
        there = [t.to(device) for t in (values, codes, scales, back)]
        fp8_blocks.fp8_encode_(*there[:3])
        fp8_blocks.fp8_decode_(*there[1:])
    return tuple(t.cpu() for t in there[1:])


def spread(n, dtype=torch.float32, seed=0):
    """Values of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=generator) * torch.exp(2 * torch.randn(n, generator=generator))).to(dtype)


def assert_within_the_stated_error(values, back):
    exact, found = values.double(), back.double()
    padded = torch.nn.functional.pad(exact.abs(), (0, -len(exact) % 128)).view(-1, 128)
    absmax = padded.amax(1).repeat_interleave(128)[: len(exact)]
    bound = torch.maximum(exact.abs() / 16, absmax / 458752)
    rounding = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[values.dtype]
    tiny = torch.finfo(values.dtype).smallest_normal
    assert ((found - exact).abs() <= bound * (1 + 1e-6) + found.abs() * rounding + tiny).all()


@on_every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 63, 128, 129, 5000])
def test_codes_are_those_of_the_reference_and_the_error_is_as_stated(implementation, dtype, n):
    values = spread(n, dtype)
    codes, scales, back = round_trip(values, implementation)
    expected = round_trip(values)
    assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])
    assert torch.equal(back, expected[2])
    assert_within_the_stated_error(values, back)


@on_every_implementation
def test_every_code_and_every_midpoint(implementation):
    """With a scale of one: codes are those of torch's e4m3, ties to the even one."""
    finite = torch.arange(256, dtype=torch.uint8)[(torch.arange(256) & 0x7F) != 0x7F]
    grid = finite.view(torch.float8_e4m3fn).float().sort().values
    middle = (grid[1:] + grid[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(sign * 1000.0)) for sign in (1, -1)]
    values = torch.cat([grid, middle, *near])
    values = torch.cat([torch.full((len(values) // 127 + 1, 1), 448.0), padded_to(values, 127)], dim=1).reshape(-1)
    codes, scales, back = round_trip(values, implementation)
    assert (scales == 1).all()
    assert torch.equal(back, values.to(torch.float8_e4m3fn).float())
    assert torch.equal(codes, values.to(torch.float8_e4m3fn).view(torch.uint8))


def padded_to(values, width):
    rows = len(values) // width + 1
    return torch.nn.functional.pad(values, (0, rows * width - len(values))).view(rows, width)


@on_every_implementation
def test_zeros_tiny_values_and_what_is_not_finite(implementation):
    values = torch.zeros(6, 128)
    values[1] = 1e-38
    values[2, 5], values[2, 9], values[2, 7] = torch.inf, -torch.inf, 3.0
    values[3, 6], values[3, 7], values[4, 0], values[5] = torch.nan, torch.inf, 3.0, -torch.inf
    codes, scales, back = round_trip(values.view(-1), implementation)
    back = back.view(6, 128)
    for exact in (0, 2, 4, 5):
        assert torch.equal(back[exact], values[exact])
    assert (back[1].abs() <= 1e-30).all()
    assert back[3].isnan().all()
    expected = round_trip(values.view(-1))
    known = [0, 1, 2, 4, 5]
    assert torch.equal(codes.view(6, 128)[known], expected[0].view(6, 128)[known])
    assert torch.equal(scales[known], expected[1][known])


@given(st.integers(1, 700), st.sampled_from(DTYPES), st.floats(-25, 25), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_the_error_is_as_stated_at_any_scale(n, dtype, exponent, seed):
    limit = 3.0 if dtype == torch.float16 else 25
    values = (spread(n, seed=seed) * 10 ** max(min(exponent, limit), -limit)).clamp(-6e4, 6e4).to(dtype)
    assert_within_the_stated_error(values, round_trip(values)[2])
