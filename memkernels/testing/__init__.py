"""Helpers for testing kernels: tolerances, every implementation in turn, NaN-poisoned memory, saved-bytes meter."""

from memkernels.testing.gradients import check_op, random_tensor
from memkernels.testing.implementations import Implementation, implementations
from memkernels.testing.memory import poisoned_memory, saved_bytes
from memkernels.testing.tolerance import assert_within_factor_two

__all__ = [
    "Implementation",
    "assert_within_factor_two",
    "check_op",
    "implementations",
    "poisoned_memory",
    "random_tensor",
    "saved_bytes",
]
