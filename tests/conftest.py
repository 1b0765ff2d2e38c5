"""Before any test: Triton kernels run under the interpreter where there is no GPU, and torch uses two threads."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(2)
