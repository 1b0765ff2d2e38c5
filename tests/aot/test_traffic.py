"""Every Triton kernel moves little more than the least possible through global memory, by the interpreter's count."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from gate_cases import SWEPT, in_gate

from memkernels.testing.cases import kernel_cases, ops_with_triton
from memkernels.testing.kernel_table import submit_count, triton_processes

COUNTED = "sm_80"


def is_counted(op, case):
    return in_gate(op, case) and (op not in SWEPT or any(target.name == COUNTED for target in case.targets))


CASES = [
    pytest.param(
        op, case, marks=() if is_counted(op, case) else pytest.mark.slow, id=f"{op}-{case.label}".replace(" ", "-")
    )
    for op in ops_with_triton()
    for case in kernel_cases(op)
]


@pytest.fixture(scope="module")
def interpreter():
    with triton_processes(interpret=True, workers=1) as pool:
        yield pool


@pytest.mark.parametrize("op, case", CASES)
def test_traffic_is_near_the_least(interpreter, op, case):
    traffic = submit_count(interpreter, op, case.label).result()
    assert traffic.ratio >= 1, f"the case lists more than the kernels need to move: {traffic}"
    assert case.traffic_limit is None or traffic.ratio <= case.traffic_limit, traffic
