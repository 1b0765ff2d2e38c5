"""Helpers for testing kernels: tolerances, every implementation in turn, NaN-poisoned memory, memory meters."""

from memkernels.testing.gradients import check_op, random_tensor
from memkernels.testing.implementations import Implementation, implementations
from memkernels.testing.memory import poisoned_memory, saved_bytes
from memkernels.testing.peak_memory import peak_bytes, run_in_child
from memkernels.testing.tolerance import assert_within_factor_two

__all__ = [
    "Implementation",
    "assert_within_factor_two",
    "check_op",
    "implementations",
    "peak_bytes",
    "poisoned_memory",
    "random_tensor",
    "run_in_child",
    "saved_bytes",
]
