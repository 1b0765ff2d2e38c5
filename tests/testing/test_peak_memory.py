import pytest
import torch

from memkernels.testing import peak_memory
from memkernels.testing.peak_memory import peak_bytes, run_in_child

MB = 1 << 20


def allocate_then_free_half(size):
    def step():
        both = [torch.ones(size // 2, dtype=torch.uint8) for _ in range(2)]
        both.pop()
        return both

    return step


def measure(size, higher_before=0, fallback=False):
    """Peak of a step of `size` bytes, after one of `higher_before` bytes has come and gone."""
    kept = torch.ones(64 * MB, dtype=torch.uint8)
    allocate_then_free_half(higher_before)()
    if fallback:
        peak_memory._reset_high_water_mark = lambda: False
    peak = peak_bytes(allocate_then_free_half(size))
    assert kept.numel() == 64 * MB
    return peak


def fail(message):
    raise ValueError(message)


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("higher_before", [0, 400 * MB])
def test_peak_is_that_of_the_step_alone(higher_before, fallback):
    peak = run_in_child(measure, 100 * MB, higher_before, fallback)
    assert peak == pytest.approx(100 * MB, rel=0.03)


def test_a_step_that_allocates_nothing_has_no_peak():
    assert run_in_child(measure, 0) < 2 * MB


def test_a_failure_in_the_child_carries_its_message():
    with pytest.raises(RuntimeError, match=r"(?s)fail.*ValueError: no such thing"):
        run_in_child(fail, "no such thing")


def test_a_nested_function_is_refused():
    with pytest.raises(ValueError, match="function must be at the top level"):
        run_in_child(lambda: 0)
