import os
import subprocess
from pathlib import Path

import pytest
from disk_folder import on_disk


@pytest.fixture
def tmp_path(tmp_path):
    """On a disk."""
    with on_disk(tmp_path) as folder:
        yield folder


@pytest.fixture(params=[True, False], ids=["io_uring", "threads"])
def io_uring(request):
    """Whether a file has it; each test runs with it, where the kernel has it, and without."""
    runtime = pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")
    if request.param and (missing := runtime.io_uring_missing()):
        pytest.skip(missing)
    return request.param


@pytest.fixture(scope="session")
def no_io_uring(tmp_path_factory):
    """Environment variables under which a process has no io_uring; see no_io_uring.cpp."""
    return {"LD_PRELOAD": compile_library("no_io_uring.cpp", tmp_path_factory)}


@pytest.fixture(scope="session")
def full_disk(tmp_path_factory, no_io_uring):
    """Environment variables under which a process finds its disk full; see full_disk.cpp."""
    return {"LD_PRELOAD": f"{compile_library('full_disk.cpp', tmp_path_factory)}:{no_io_uring['LD_PRELOAD']}"}


@pytest.fixture(scope="session")
def plain_file_system(tmp_path_factory):
    """Environment variables under which file systems offer less; see plain_file_system.cpp."""
    return {"LD_PRELOAD": compile_library("plain_file_system.cpp", tmp_path_factory)}


@pytest.fixture(scope="session")
def few_threads(tmp_path_factory):
    """Environment variables under which a process gets no more than some threads; see few_threads.cpp."""
    return {"LD_PRELOAD": compile_library("few_threads.cpp", tmp_path_factory)}


@pytest.fixture(scope="session")
def slow_memcpy(tmp_path_factory):
    """Environment variables under which a process's threads copy late; see slow_memcpy.cpp."""
    return {"LD_PRELOAD": compile_library("slow_memcpy.cpp", tmp_path_factory), "SLOW_MEMCPY": "200000"}


@pytest.fixture(scope="session")
def fake_cudart(tmp_path_factory):
    """Path of a CUDA runtime that is none; see fake_cudart.cpp."""
    return compile_library("fake_cudart.cpp", tmp_path_factory)


def compile_library(source, tmp_path_factory):
    built = tmp_path_factory.mktemp("library") / f"lib{Path(source).stem}.so"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-pthread", "-shared", "-fPIC", "-o", built]
    subprocess.run([*command, Path(__file__).with_name(source)], check=True)
    return str(built)
