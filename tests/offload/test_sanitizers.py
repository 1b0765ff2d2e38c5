"""The runtime's threads under ThreadSanitizer, and its memory under AddressSanitizer and UBSan."""

import subprocess
from pathlib import Path

import pytest

_runtime = pytest.importorskip("memkernels._runtime", reason="built without pybind11 or Python's headers")

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_threads_that_share_all_of_it(tmp_path, sanitizer):
    flags = ["g++", "-std=c++20", "-g1", "-O1", "-pthread", f"-fsanitize={sanitizer}", "-I", CSRC]
    fake, program, spill = tmp_path / "libfake.so", tmp_path / "stress", tmp_path / "spill"
    spill.mkdir()
    sources = [source for source in (CSRC / "runtime").glob("*.cpp") if source.stem != "module"]
    has_uring = _runtime.io_uring_missing() != "built without liburing"
    uring = ["-DMEMKERNELS_LIBURING", "-luring"] if has_uring else []
    subprocess.run([*flags, "-shared", "-fPIC", HERE / "fake_cudart.cpp", "-o", fake], check=True)
    subprocess.run([*flags, HERE / "runtime_stress.cpp", *sources, *uring, "-ldl", "-o", program], check=True)
    done = subprocess.run([program, spill, fake], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr
