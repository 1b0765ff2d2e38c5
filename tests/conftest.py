"""Before any test: without a GPU Triton kernels run under the interpreter; torch uses two threads, one under xdist.

The interpreter multiplies by numpy's OpenBLAS, whose kernels for AVX2 round q k^T and k q^T apart, as no GPU does: on
x86 an older kernel is named, before numpy is imported.

Hypothesis draws the same examples every time, so that one commit is green or red for everybody; `make test-slow` draws
new ones (--hypothesis-profile=search).
"""

import gc
import os
import platform
from collections.abc import Iterator

if platform.machine() in ("x86_64", "AMD64"):
    os.environ["OPENBLAS_CORETYPE"] = "Sandybridge"

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(THREADS)
settings.register_profile("gate", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile("gate")


def pytest_collection_finish() -> None:
    """Nothing of thousands of collected tests is garbage: tests that count tensors by `gc` look at what came later."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _give_threads_back() -> Iterator[None]:
    """Whatever a test sets: two processes of two threads each on two cores wait for each other, ten times as long."""
    yield
    torch.set_num_threads(THREADS)
