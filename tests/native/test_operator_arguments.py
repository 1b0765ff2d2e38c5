"""Native CPU operators called by themselves: each checks what its kernel relies on, before it touches anything."""

from __future__ import annotations

import re

import pytest
import torch
from operator_calls import CALLS, assert_refused, strided, tensors_of, wrong_calls

import memkernels.ops
import memkernels.optim
import memkernels.quant  # noqa: F401  these define the operators
from memkernels import _library

pytestmark = pytest.mark.skipif(_library.cpu_library is None, reason=str(_library.cpu_missing))


@wrong_calls(CALLS)
def test_what_does_not_fit_is_refused(call, name):
    assert_refused(torch.ops.memkernels, call, name)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.operator)
def test_what_is_not_contiguous_is_read_right_or_refused(call):
    operator = getattr(torch.ops.memkernels, call.operator)
    expected_arguments = call.fresh()
    expected = operator(**expected_arguments), tensors_of(expected_arguments)
    for name, value in call.fresh().items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            continue
        arguments = call.fresh(**{name: strided(value)})
        try:
            result = operator(**arguments)
        except RuntimeError as error:
            assert re.search(call.refusal, str(error))
        else:
            torch.testing.assert_close((result, tensors_of(arguments)), expected, rtol=0, atol=0, equal_nan=True)


def test_every_native_operator_is_called():
    registered = {name for name, devices in _library._native_devices.items() if "cpu" in devices}
    assert registered == {call.operator for call in CALLS}
