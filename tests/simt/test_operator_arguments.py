"""CUDA C++ operators check the same of their arguments as the native CPU ones."""

from __future__ import annotations

import pytest
from operator_calls import CUDA_CALLS, assert_refused, wrong_calls

pytestmark = pytest.mark.xdist_group("simt_operators")  # one library, compiled once


@wrong_calls(CUDA_CALLS)
def test_what_does_not_fit_is_refused(simt, call, name):
    assert_refused(simt, call, name)
