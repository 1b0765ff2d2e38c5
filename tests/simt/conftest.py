"""CUDA C++ operators on CPU tensors: csrc/cuda/*.cu with their torch wrappers, compiled by g++ against csrc/simt."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from operator_calls import CUDA_OPERATORS
from torch.utils.cpp_extension import include_paths

import memkernels.ops
import memkernels.optim
import memkernels.quant  # noqa: F401  all define operators

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture(scope="session")
def simt(tmp_path_factory: pytest.TempPathFactory):
    """`torch.ops.memkernels_simt`: the operators of CUDA_OPERATORS by the CUDA kernels."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed; it compiles CUDA kernels for the CPU here")
    folder = tmp_path_factory.mktemp("simt")
    # As one file: torch's headers take the compiler longer than the operators.
    source, library = folder / "operators.cpp", folder / "operators.so"
    source.write_text("".join(f'#include "{path}"\n' for path in sorted((CSRC / "cuda").glob("*.cu"))))
    torch_lib = Path(torch.__file__).parent / "lib"
    command = [compiler, "-std=c++20", "-O1", "-pthread", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-I", CSRC / "simt", "-I", CSRC]
    command += [part for path in include_paths() for part in ("-isystem", path)]
    command += [source, "-o", library, f"-L{torch_lib}", "-ltorch", "-ltorch_cpu"]
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert compiled.returncode == 0, compiled.stderr
    definitions = torch.library.Library("memkernels_simt", "DEF")
    for name in CUDA_OPERATORS:
        schema = str(getattr(torch.ops.memkernels, name).default._schema)
        definitions.define(schema.removeprefix("memkernels::"))
    torch.ops.load_library(library)
    yield torch.ops.memkernels_simt
    definitions._destroy()


@pytest.fixture
def calls(simt) -> Iterator[list[str]]:
    """Puts the CUDA kernels in the place of the native CPU ones, and lists the calls that reach them."""
    library = torch.library.Library("memkernels", "IMPL")
    made: list[str] = []

    def counted(name):
        def call(*args):
            made.append(name)
            return getattr(simt, name)(*args)

        return call

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is overridden, which is the point
        for name in CUDA_OPERATORS:
            library.impl(name, counted(name), "CPU", allow_override=True)
    yield made
    library._destroy()
