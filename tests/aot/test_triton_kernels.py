"""Every Triton kernel, compiled for every target: it compiles, fits, spills nothing, and multiplies on tensor cores."""

import functools
import importlib

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from memkernels.testing.cases import kernel_cases, ops_with_triton
from memkernels.testing.kernel_table import submit_compile, triton_processes

pytestmark = pytest.mark.xdist_group("triton_kernels")

# Ops of hundreds of configurations, and the targets that are compiled here of those and of what many targets share;
# `make test-slow` compiles the others.
SWEPT, OF_MANY = ("lora_linear", "quantized"), ("sm_80", "sm_90", "gfx942")


def groups(op, case):
    """A case's targets: those compiled here, and the others."""
    whole = op not in SWEPT and len(case.targets) <= 2
    few = tuple(target for target in case.targets if whole or target.name in OF_MANY)
    return few, tuple(target for target in case.targets if target not in few)


COMPILATIONS = [
    pytest.param(op, case, target, marks=marks, id=f"{op}-{case.label}-{target}".replace(" ", "-"))
    for op in ops_with_triton()
    for case in kernel_cases(op)
    for marks, targets in zip(((), pytest.mark.slow), groups(op, case), strict=True)
    for target in targets
]


@pytest.fixture(scope="module")
def compiled():
    """Of an op, a case and a target: the resources of each kernel. A group's targets compile two at a time."""
    with triton_processes(interpret=False) as pool:

        @functools.cache
        def compile_group(op, case, targets):
            return {target: submit_compile(pool, op, case.label, target) for target in targets}

        def resources(op, case, target):
            group = next(targets for targets in groups(op, case) if target in targets)
            return compile_group(op, case, group)[target].result()

        yield resources


@pytest.mark.parametrize("op, case, target", COMPILATIONS)
def test_kernel_keeps_its_budget(compiled, op, case, target):
    for kernel, resources in compiled(op, case, target).items():
        assert resources.spills == 0 and resources.stack_bytes == 0, f"{kernel} spills: {resources}"
        assert resources.shared_bytes <= target.max_shared_bytes, f"{kernel} does not fit a block: {resources}"
        if resources.multiplies:
            assert resources.tensor_cores, f"{kernel} multiplies without tensor cores: {resources}"


@pytest.mark.parametrize("op", ops_with_triton())
def test_every_kernel_has_a_case(compiled, op):
    module = importlib.import_module(f"memkernels.ops.{op}.triton")
    kernels = {name for name, value in vars(module).items() if name.endswith("_kernel") and hasattr(value, "run")}
    covered = {
        kernel for case in kernel_cases(op) for target in groups(op, case)[0] for kernel in compiled(op, case, target)
    }
    assert kernels - covered == set(), "launched by no case"
