"""Every Triton kernel moves little more than the least possible through global memory, by the interpreter's count."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from memkernels.testing.cases import kernel_cases, ops_with_triton
from memkernels.testing.kernel_table import submit_count, triton_processes

# Of ops of hundreds of configurations, those of these targets are counted here, the others by `make test-slow`.
SWEPT, COUNTED = ("lora_linear", "quantized"), {"sm_80", "gfx942"}


def marks(op, case):
    counted = op not in SWEPT or any(target.name in COUNTED for target in case.targets)
    return () if counted else pytest.mark.slow


CASES = [
    pytest.param(op, case, marks=marks(op, case), id=f"{op}-{case.label}".replace(" ", "-"))
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
