"""CUDA C++ kernels compiled for every architecture: no spills, registers within budget, 16-byte loads. Nothing runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from memkernels.testing.cuda_resources import (
    ARCHITECTURES,
    ROOT,
    CudaResources,
    compile_resources,
    find_nvcc,
    table,
)

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed; it compiles the CUDA kernels here")

# Two blocks of 512 threads share the 65,536 registers of a multiprocessor, so that one loads while the other reduces.
MAX_REGISTERS = 64
MORE_REGISTERS = {
    # Five blocks of 128 of the optimizers' threads, none of which waits for another warp.
    "optimizer_kernel": 96,
    # Four of them, whose threads hold the columns' factors too; and seven, of which each reads four runs at a time.
    "adafactor_kernel": 128,
    "factored_square_sum_kernel": 72,
    # A block of 256 threads holds a row in all registers of a multiprocessor, which is what it reads the row once for.
    "wide_norm": 255,
}
MAX_SHARED_BYTES = 4096
# For rectangles and rows that no 16-byte boundary fits; the plan of a dispatch, of single ids and counts; the sum of
# few partial sums, and of squares of matrices of a few elements; and optimizers whose parameters and states have 16
# bits at most, of which lanes have quads.
UNALIGNED = re.compile(
    "nf4_dequantize_kernelI.*Lb0E|moe_.*Li1E|moe_(count|scan|place)_kernel|square_sum_total_kernel|part_sums_kernel|small_squares_kernel"
    "|optimizer_kernelI(?!.*PlainFloat)|wide_norm_.*Li1E"
)
SOURCES = sorted(Path(__file__).parent.glob("*.cu"))
# What the gate compiles for; `make test-slow` for all. Of optimizers that is AdamW, where it takes the most registers:
# Lion's and SGD's kernels differ from it by a moment less and a shorter formula. The norms of wide rows are as many
# instructions as a thread has elements, half a minute an architecture.
IN_GATE = {"adafactor": (), "adamw": ("120",), "lion": (), "muon": (), "sgd": (), "square_sum": (), "wide_norm": ()}
USUALLY_IN_GATE = ("80", "90a", "120")


def marks(in_gate: bool) -> tuple[pytest.MarkDecorator, ...]:
    return () if in_gate else (pytest.mark.slow,)


@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        pytest.param(path, name, id=f"{path.stem}-{name}", marks=marks(name in IN_GATE.get(path.stem, USUALLY_IN_GATE)))
        for path in SOURCES
        for name in ARCHITECTURES
    ],
)
def test_kernels_stay_within_budget(source: Path, architecture: str) -> None:
    resources = compile_resources(source, architecture)
    assert resources

    def most(kernel: str) -> int:
        return next((most for name, most in MORE_REGISTERS.items() if kernel.startswith(name)), MAX_REGISTERS)

    over = [
        one
        for one in resources
        if one.spill_bytes or one.stack_bytes or one.registers > most(one.kernel) or one.shared_bytes > MAX_SHARED_BYTES
    ]
    assert not over, "\n" + table(over)


@pytest.mark.parametrize(
    "source", [pytest.param(path, id=path.stem, marks=marks(IN_GATE.get(path.stem) != ())) for path in SOURCES]
)
def test_kernels_load_or_store_16_bytes_at_once(source: Path, tmp_path: Path) -> None:
    command = [find_nvcc(), "-std=c++20", f"-I{ROOT / 'csrc'}", "-arch=sm_80", "-ptx", "-o", tmp_path / "a.ptx", source]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    entries = (tmp_path / "a.ptx").read_text().split(".entry ")[1:]
    assert entries
    for entry in entries:
        name = entry.split("(", 1)[0]
        whole = r"(ld|st)\.global\S*\.v4\.(u32|f32|b32)|(ld|st)\.global\S*\.v2\.(u64|b64)"
        assert re.search(whole, entry) or UNALIGNED.search(name), name


def test_spills_and_shared_memory_are_seen(tmp_path: Path) -> None:
    source = tmp_path / "spill.cu"
    source.write_text(
        """
        __global__ void __launch_bounds__(1024, 2) spilling(float* x) {
          __shared__ float shared[64];
          float v[96];
          for (int i = 0; i < 96; ++i) v[i] = x[i * 1024 + threadIdx.x];
          shared[threadIdx.x % 64] = v[0];
          __syncthreads();
          for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = v[95 - i] * shared[i % 64];
        }
        """
    )
    (found,) = compile_resources(source, "90a")
    assert found.spill_bytes > 0 and found.stack_bytes > 0 and found.shared_bytes == 256 and found.registers <= 32
    assert f"{found.registers} / 256 / {found.spill_bytes}" in table([found])


def test_a_file_that_does_not_compile_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken() { undeclared = 1; }")
    with pytest.raises(RuntimeError, match="undeclared"):
        compile_resources(source, "80")


def test_table_has_a_column_for_each_architecture() -> None:
    rows = [CudaResources("k<float>", arch, 40, 128, 0, 0) for arch in ("80", "90a")]
    assert table(rows).splitlines()[0] == "| kernel | sm_80 | sm_90a |"
    assert table(rows).splitlines()[2] == "| `k<float>` | 40 / 128 / 0 | 40 / 128 / 0 |"
