"""memkernels.testing.aot: what it reports of kernels whose resources are known beforehand (aot_kernels.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from memkernels.testing.aot import compile_case
from memkernels.testing.cases import TARGETS, KernelCase
from memkernels.testing.triton_resources import Resources


@pytest.fixture(scope="module")
def printed():
    script = Path(__file__).with_name("aot_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = subprocess.run([sys.executable, script], env=environment, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(output)


@pytest.fixture(scope="module")
def resources(printed):
    def one(case, target):
        (found,) = printed["resources"][case][target]
        return Resources(**found)

    return one


def test_a_source_changes_with_all_that_a_row_follows_from(printed):
    sources = printed["sources"]
    assert sources.pop("as it was") == sources["as it is"]
    assert len(set(sources.values())) == len(sources) == 4


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_a_copy_needs_next_to_nothing(resources, target):
    found = resources("copy", target)
    assert 0 < found.registers < 64
    assert found.spills == found.stack_bytes == found.shared_bytes == 0
    assert not found.multiplies and not found.tensor_cores


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_a_kernel_that_spills_is_reported(resources, target):
    found = resources("spill", target)
    assert found.spills > 0 and found.stack_bytes > 0


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_dot_runs_on_tensor_cores(resources, target):
    found = resources("dot_bfloat16", target.name)
    kinds = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
    assert found.multiplies and list(found.tensor_cores) == [kinds.get(target.name, "HMMA")] and found.spills == 0
    assert 0 < found.shared_bytes <= target.max_shared_bytes
    assert (found.async_copies > 0) == (target.backend == "cuda")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_float32_runs_on_tensor_cores_in_tf32_alone(resources, target):
    tf32, ieee = resources("dot_tf32", target), resources("dot_ieee", target)
    assert tf32.multiplies and tf32.tensor_cores
    assert not ieee.multiplies and not ieee.tensor_cores


def test_products_that_the_compiler_rounds_unasked_are_reported(resources):
    assert resources("dot_widened_ieee", "sm_90").rounded_products == 0
    assert resources("dot_widened_ieee", "sm_100").rounded_products > 0
    assert resources("dot_tf32", "sm_90").rounded_products == 0


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_descriptors_copy_by_tma(resources, target):
    assert resources("descriptor", target).tma_copies == 2
    assert resources("dot_bfloat16", target).tma_copies == 0


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="shows what happens under TRITON_INTERPRET=1")
def test_interpretation_is_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        compile_case(KernelCase("copy", lambda device: ()), TARGETS[0])
