"""CUDA C++ kernels on the CPU: the C++ programs of this folder, compiled by g++ against csrc/simt.

Each program checks its own results; sanitizers check each program. Nothing here has run on a GPU.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SANITIZERS = {
    "plain": [],
    "thread": ["-fsanitize=thread"],
    # AddressSanitizer stops at a null pointer too, and no kernel has a vtable: the two checks only cost compile time.
    "address": ["-fsanitize=address,undefined", "-fno-sanitize=null,vptr", "-fno-sanitize-recover=all"],
}

DTYPES = ["float32", "float16", "bfloat16"]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run_program(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run_program(name, build, *arguments, define=None)` runs tests/simt/<name>.cpp, built as SANITIZERS says."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed; it compiles CUDA kernels for the CPU here")
    folder = tmp_path_factory.mktemp("simt")

    def run(name: str, build: str, *arguments: str, define: str | None = None) -> subprocess.CompletedProcess[str]:
        program = folder / f"{name}-{build}-{define}"
        if not program.exists():
            command = [compiler, "-std=c++20", "-O1", "-g1", "-pthread", "-I", CSRC / "simt", "-I", CSRC]
            command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *SANITIZERS[build]]
            command += [f"-D{define}"] if define else []
            command += [HERE / f"{name}.cpp", "-o", program]
            compiled = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert compiled.returncode == 0, compiled.stderr
        return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)

    return run


@pytest.mark.parametrize("build", SANITIZERS)
@pytest.mark.parametrize("name", ["intrinsics", "block_reduce"])
def test_program(run_program: Run, name: str, build: str) -> None:
    result = run_program(name, build)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("build", ["thread", "address"])
def test_team_sums(run_program: Run, build: str) -> None:
    result = run_program("team_sums", build)
    assert result.returncode == 0, result.stdout + result.stderr


# AddressSanitizer's build checks the same results: the plain one only tells whether a sanitizer hides a fault.
@pytest.mark.parametrize("build", [pytest.param("plain", marks=pytest.mark.slow), "thread", "address"])
@pytest.mark.parametrize("name", ["linear_cross_entropy", "nf4", "moe"])
def test_kernels(run_program: Run, name: str, build: str) -> None:
    # Which thread touches what hangs on the dtype by its size alone: one dtype has races enough.
    result = run_program(name, build, *(DTYPES if build != "thread" else ["bfloat16"]))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("build", ["thread", "address"])  # test_wide_norm.py has the values
def test_wide_norm_kernels(run_program: Run, build: str) -> None:
    result = run_program("wide_norm", build, *(["float32", "bfloat16"] if build != "thread" else ["bfloat16"]))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("build", ["thread", "address"])  # test_optimizers.py has the plain one
def test_optimizer_kernels(run_program: Run, build: str) -> None:
    result = run_program("optimizer", build)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("build", ["thread", "address"])  # test_adafactor.py has the plain one
def test_adafactor_kernels(run_program: Run, build: str) -> None:
    result = run_program("adafactor", build, *(["float32", "bfloat16"] if build != "thread" else ["bfloat16"]))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("barrier", [0, 1])
def test_removed_syncthreads_is_a_race(run_program: Run, barrier: int) -> None:
    result = run_program("block_reduce", "thread", define=f"REMOVE_SYNC={barrier}")
    assert "data race" in result.stderr and "cuda_reduce.cuh" in result.stderr
    assert result.returncode != 0


@pytest.mark.xdist_group("simt_out_of_bounds")  # one program, compiled once
@pytest.mark.parametrize(
    ("access", "report"),
    [
        ("global", "heap-buffer-overflow"),
        ("static_shared", "heap-buffer-overflow"),
        ("dynamic_shared", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
    ],
)
def test_bad_access_is_reported(run_program: Run, access: str, report: str) -> None:
    result = run_program("out_of_bounds", "address", access)
    assert report in result.stderr and "out_of_bounds.cpp" in result.stderr
    assert result.returncode != 0
