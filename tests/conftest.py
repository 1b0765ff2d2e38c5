"""Before any test: without a GPU Triton kernels run under the interpreter; torch uses two threads, one under xdist."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
