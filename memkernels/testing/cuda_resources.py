"""Registers, shared memory and spills of the CUDA C++ kernels on every architecture, from nvcc; no GPU is needed.

`python -m memkernels.testing.cuda_resources` prints the table of a checkout, in Markdown, and with --output writes it
under a heading. Its units are the files of tests/compile, each of which instantiates the kernels of one
csrc/cuda/*.cuh.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120")
HEADING = """# CUDA C++ kernels

Written by `python -m memkernels.testing.cuda_resources --output docs/cuda_kernels.md`, by nvcc on a machine without a
GPU: facts of the compiler, no measurement on a GPU. csrc/simt runs the kernels on a CPU in the tests.

## Traffic

Bytes of global memory, from the shapes: each kernel reads its inputs once and writes its outputs once, which is the
least. e bytes an element.

| kernel | reads | writes |
| --- | --- | --- |
| `cross_entropy_stats_kernel` | e a logit, 20 a row | 16 a row |
| `cross_entropy_grad_kernel` | e a logit, 20 a row | e a logit |
| `nf4_quantize_kernel` | e a value | 1/2 a value, 4 a block |
| `nf4_dequantize_kernel` | 1/2 a value, 4 a block, or nested 1 a block and 4 per 256 | e a value |
| `moe_dispatch_kernel` | e an element of x, 4 a choice | e an element of the grouped rows |
| `moe_combine_kernel` | e an element of the grouped rows, 4 a choice | e an element of y |
| `moe_combine_bwd_kernel` | e an element of dy and of the grouped rows, 4 a choice | the latter, 4 a choice |
| `moe_count_kernel` | 4 or 8 a choice | 4 an expert and 1024 choices |
| `moe_scan_kernel` | 4 an expert and 1024 choices | as many, 8 an expert |
| `moe_place_kernel` | 4 or 8 a choice, 4 an expert and 1024 choices | 8 a choice |
| `optimizer_kernel` | e a gradient, p a parameter, s for all of its moments | p and s a parameter |
| `optimizer_kernel` with `Direction` | e a gradient, s for the momentum | 2 and s a gradient |
| `factored_squares_kernel` | e an element | 4 a row of a tile, 4 a column of a tile |
| `small_squares_kernel` | e an element | 4 a row, 4 a column |
| `part_sums_kernel` | 4 a row or a column of a tile | 4 a row or a column |
| `factored_square_sum_kernel` | e an element, 4 a row and 256 columns, 4 a column and 64 rows | 8 per 65,536 elements |
| `adafactor_kernel` | the former, 4 a column and 32 rows, p a parameter, s for its moment | p and s a parameter |
| `square_sum_kernel` | e an element | 8 per 8192 elements |
| `wide_norm_fwd_kernel` | e an element of x and of the residual | e an element of y and of residual_out, 4 or 8 a row |
| `wide_norm_bwd_kernel` | e an element of dy, h and dresidual_out, 4 or 8 a row | e an element of dx |

A choice's weight adds 4 bytes. dy is read once for every 4 choices of a token. The plan's ids are read twice, since no
choice can be placed before all are counted: 8 bytes beside a row of thousands. p is 4 of float32 and of bfloat16 with
the remainder, and 2 of bfloat16 that is rounded; s is, for each moment, 4, 2, 1 + 4 / 256 or 1/2 + 4 / 128.

A tile of Adafactor's squares has 128 columns of float32 or 256 of bfloat16, and 256 rows, of tall matrices so many that
a column has at most 64 tiles. Its sums, written and read again where a row or a column has several, are below 3.5% of a
gradient of 1,000 rows and columns; the factors of rows and columns are below 4% of it in the sum of squares, and 3% of
what the step moves. Where rows are no multiple of 256 elements, an element's factors come from caches.

The norms of wide rows take those above 8,192 elements, and above 4,096 where they are no multiple of 16. A block holds
16,384 elements; longer rows, up to 524,288 elements or 16,384 a multiprocessor, are held by teams of blocks, which send
each other 8 bytes for each sum of a row, or 16. The parameters are read once a team; in backward a team writes 4 bytes
a parameter, its sum of the gradients. Beside 40 rows a team that is below 5%. A multiprocessor has one block, in
forward without teams two. Wider rows are Triton's, and read twice (kernels.md).

## Resources

Each cell: registers per thread / static shared memory per block in bytes / spilled bytes. The norms of wide rows have
up to 64 KiB of dynamic shared memory besides, and layer norm's backward of float32 96 KiB.

"""

_ENTRY = re.compile(r"Compiling entry function '(?P<symbol>\S+)'")
_SPILLS = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill"
)
_USED = re.compile(r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?")


@dataclass(frozen=True)
class CudaResources:
    """What one kernel needs on one architecture: registers per thread, bytes per block or per thread.

    spill_bytes counts spill stores and loads; stack_bytes is local memory per thread, spills included.
    """

    kernel: str
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME, as setup.py finds it, else of PATH; None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def compile_resources(source: Path, architecture: str) -> list[CudaResources]:
    """Compiles `source` for one architecture such as "90a" and returns what each of its kernels needs.

    Raises:
        FileNotFoundError: there is no nvcc.
        RuntimeError: nvcc failed; the message is its output.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc is not found; install the CUDA toolkit or set CUDA_HOME.")
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", "-cubin"]
        command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas", "-v,--warn-on-spills"]
        command += ["-o", f"{folder}/kernels.cubin", str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"nvcc failed on {source} for sm_{architecture}:\n{result.stdout}{result.stderr}")
    return parse_ptxas(result.stdout + result.stderr, architecture)


def parse_ptxas(text: str, architecture: str) -> list[CudaResources]:
    """What `ptxas -v` says of each kernel, in its order."""
    found: list[CudaResources] = []
    for block in re.split(r"(?=Compiling entry function)", text)[1:]:
        entry, spills, used = _ENTRY.search(block), _SPILLS.search(block), _USED.search(block)
        if not (entry and spills and used):
            raise RuntimeError(f"ptxas printed something unforeseen for sm_{architecture}:\n{block}")
        found.append(
            CudaResources(
                kernel=_readable(entry["symbol"]),
                architecture=architecture,
                registers=int(used["registers"]),
                shared_bytes=int(used["shared"] or 0),
                stack_bytes=int(spills["stack"]),
                spill_bytes=int(spills["stores"]) + int(spills["loads"]),
            )
        )
    return found


def all_resources(sources: Iterable[Path], *, architectures: Sequence[str] = ARCHITECTURES) -> list[CudaResources]:
    """`compile_resources` of every source on every architecture, two compilers at a time."""
    tasks = [(source, architecture) for source in sources for architecture in architectures]
    with ThreadPoolExecutor(2) as pool:
        return [one for found in pool.map(lambda task: compile_resources(*task), tasks) for one in found]


def table(resources: Iterable[CudaResources]) -> str:
    """Markdown: one line per kernel, one column per architecture: registers / shared bytes / spilled bytes."""
    by_kernel: dict[str, dict[str, CudaResources]] = {}
    for one in resources:
        by_kernel.setdefault(one.kernel, {})[one.architecture] = one
    architectures = list(dict.fromkeys(a for row in by_kernel.values() for a in row))
    lines = ["| kernel | " + " | ".join(f"sm_{a}" for a in architectures) + " |"]
    lines.append("| --- " * (1 + len(architectures)) + "|")
    for kernel, row in sorted(by_kernel.items()):
        cells = [f"{row[a].registers} / {row[a].shared_bytes} / {row[a].spill_bytes}" for a in architectures]
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _readable(symbol: str) -> str:
    """`cross_entropy_grad_kernel<float, RowShape<32, 4>, false>` for a mangled name; itself without c++filt."""
    if shutil.which("c++filt") is None:
        return symbol
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\b(?:void |memkernels::(?:cuda::)?)", "", name)
    return re.sub(r"\((?:int|bool|unsigned int)\)", "", name).split("(")[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m memkernels.testing.cuda_resources",
        description="Registers / shared bytes / spilled bytes of each CUDA C++ kernel, as Markdown.",
    )
    parser.add_argument("sources", nargs="*", type=Path, help="CUDA files; those of tests/compile without any")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), help="such as 80 90a; all without it")
    parser.add_argument("--output", type=Path, help="write here instead of printing")
    options = parser.parse_args(arguments)
    sources = options.sources or sorted((ROOT / "tests" / "compile").glob("*.cu"))
    text = table(all_resources(sources, architectures=options.arch))
    if options.output:
        options.output.write_text(f"{HEADING}{text}\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
