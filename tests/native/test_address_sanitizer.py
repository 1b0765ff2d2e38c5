"""The dispatch to experts under AddressSanitizer: random calls of the native CPU operators and of CUDA's on the CPU.

A Python with libasan loaded first imports the package, whose native library is one that AddressSanitizer checks. It is
built for the baseline instruction set, whose loads and stores are all plain ones, which the compiler instruments.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
FLAGS = ["-std=c++20", "-g1", "-pthread", "-fPIC", "-fsanitize=address"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
BASELINE = ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]

pytestmark = pytest.mark.xdist_group("address_sanitizer")  # one library, compiled once


def build(library: Path, sources: list[Path], flags: list[object]) -> Path:
    """Compiles the sources, two at a time, into a library with AddressSanitizer."""
    includes = ["-I", CSRC, *(part for path in include_paths() for part in ("-isystem", path))]
    objects = [library.with_suffix("") / f"{source.stem}.o" for source in sources]
    objects[0].parent.mkdir()
    commands = [
        ["g++", *FLAGS, *flags, *includes, "-x", "c++", "-c", source, "-o", output]
        for source, output in zip(sources, objects, strict=True)
    ]
    for first in range(0, len(commands), 2):
        running = [
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands[first : first + 2]
        ]
        for process in running:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    torch_lib = Path(torch.__file__).parent / "lib"
    link = ["g++", "-shared", "-fsanitize=address", *objects, "-o", library, f"-L{torch_lib}", "-ltorch", "-ltorch_cpu"]
    subprocess.run(link, check=True, timeout=300)
    return library


def make_package(folder: Path, kernels: Iterable[str]) -> Path:
    """The folder of a package `memkernels` that is this one, but for its CPU library: these kernels, sanitized."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed; it compiles the kernels with AddressSanitizer")
    package = folder / "memkernels"
    package.mkdir()
    for path in (ROOT / "memkernels").iterdir():
        if path.name not in ("_C_cpu.so", "__pycache__"):
            (package / path.name).symlink_to(path)
    sources = [CSRC / "library.cpp", *(CSRC / "cpu" / f"{name}.cpp" for name in ("isa", *kernels))]
    build(package / "_C_cpu.so", sources, BASELINE)
    return folder


@pytest.fixture(scope="session")
def with_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_package(tmp_path_factory.mktemp("with_moe"), ("expert_activation", "moe_rows", "moe_plan"))
    build(folder / "simt.so", [CSRC / "cuda" / "moe.cu"], ["-I", CSRC / "simt", "-Wno-unknown-pragmas"])
    return folder


def run_python(folder: Path, *arguments: object) -> None:
    """Runs Python on arguments, with the package of a folder and AddressSanitizer; fails where it does."""
    # libstdc++ before Python starts: libasan looks there for what throws exceptions.
    names = ("libasan.so", "libstdc++.so")
    preloaded = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True) for name in names]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(found.stdout.strip() for found in preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves memory behind when it ends
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]


# The first case, how many, and how many by CUDA's operators too. The first few are the gate's.
@pytest.mark.parametrize("cases", [(0, 300, 3), pytest.param((300, 50_000, 300), marks=pytest.mark.slow)], ids=str)
def test_random_calls(with_moe, cases):
    run_python(with_moe, HERE / "random_moe.py", with_moe / "simt.so", *cases)


@pytest.mark.slow
def test_the_tests_of_native_operators(tmp_path):
    folder = make_package(tmp_path, [path.stem for path in (CSRC / "cpu").glob("*.cpp") if path.stem != "isa"])
    options = (
        "-q",
        "-x",
        "-c",
        ROOT / "pyproject.toml",
        f"--rootdir={ROOT}",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    )
    run_python(folder, "-m", "pytest", *options, HERE / "test_operator_arguments.py")
    run_python(folder, "-m", "pytest", *options, "-m", "not slow", "-k", "cpu-baseline", ROOT / "tests" / "ops")
