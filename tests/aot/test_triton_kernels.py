"""Every Triton kernel, compiled for every target: it compiles, fits, spills nothing, and multiplies on tensor cores."""

import ast
import functools
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from gate_cases import gate_targets

import memkernels
from memkernels.testing.cases import kernel_cases, ops_with_triton
from memkernels.testing.kernel_table import submit_compile, submit_launched, triton_processes

pytestmark = pytest.mark.xdist_group("triton_kernels")


def groups(op, case):
    """A case's targets: those of the gate, and the others."""
    of_gate = gate_targets(op, case)
    return of_gate, tuple(target for target in case.targets if target not in of_gate)


COMPILATIONS = [
    pytest.param(op, case, target, marks=marks, id=f"{op}-{case.label}-{target}".replace(" ", "-"))
    for op in ops_with_triton()
    for case in kernel_cases(op)
    for marks, targets in zip(((), pytest.mark.slow), groups(op, case), strict=True)
    for target in targets
]


@pytest.fixture(scope="module")
def pool():
    with triton_processes(interpret=False) as processes:
        yield processes


@pytest.fixture(scope="module")
def compiled(pool):
    """Of an op, a case and a target: the resources of each kernel. A group's targets compile two at a time."""

    @functools.cache
    def compile_group(op, case, targets):
        return {target: submit_compile(pool, op, case.label, target) for target in targets}

    def resources(op, case, target):
        group = next(targets for targets in groups(op, case) if target in targets)
        return compile_group(op, case, group)[target].result()

    return resources


@pytest.mark.parametrize("op, case, target", COMPILATIONS)
def test_kernel_keeps_its_budget(compiled, op, case, target):
    for kernel, resources in compiled(op, case, target).items():
        assert resources.spills == 0 and resources.stack_bytes == 0, f"{kernel} spills: {resources}"
        assert resources.shared_bytes <= target.max_shared_bytes, f"{kernel} does not fit a block: {resources}"
        if resources.multiplies:
            assert resources.tensor_cores, f"{kernel} multiplies without tensor cores: {resources}"
        assert resources.rounded_products == 0, f"{kernel} multiplies float32 as tf32, unasked: {resources}"


def declared_kernels():
    """Every function of the package that Triton compiles and whose name says it is launched, as its module and name."""
    root = Path(memkernels.__file__).parent
    for path in root.rglob("*.py"):
        module = ".".join(("memkernels", *path.relative_to(root).with_suffix("").parts))
        functions = [found for found in ast.walk(ast.parse(path.read_text())) if isinstance(found, ast.FunctionDef)]
        for function in functions:
            if function.name.endswith("_kernel") and "triton.jit" in map(ast.unparse, function.decorator_list):
                yield module, function.name


def test_every_kernel_has_a_case(pool):
    kernels = set(declared_kernels())
    assert ("memkernels.ops.wide_norm_triton", "_wide_norm_bwd_means_kernel") in kernels
    launched = set().union(*(found.result() for found in [submit_launched(pool, op) for op in ops_with_triton()]))
    assert kernels - launched == set(), "launched by no case"
    assert launched - kernels == set(), "launched, and not named as a kernel"
