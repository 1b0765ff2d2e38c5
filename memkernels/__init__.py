"""Kernels for training models in less memory: Triton, CUDA C++ and native CPU code under drop-in PyTorch layers.

`memkernels.ops` holds the functions, `memkernels.nn` the layers; `patch` puts them into a model of transformers, and
`lora` adapters into any.
Importing memkernels loads neither Triton nor transformers.
"""

from memkernels import nn, offload, ops, optim
from memkernels.adapters import (
    load_adapter,
    load_base,
    lora,
    merge_adapter,
    parameters_on_meta,
    save_adapter,
    unmerge_adapter,
)
from memkernels.integrations import patch, unpatch
from memkernels.microbatch import micro_batch
from memkernels.planner import plan
from memkernels.profiling import profile

__all__ = [
    "load_adapter", "load_base", "lora", "merge_adapter", "micro_batch", "nn", "offload", "ops", "optim",
    "parameters_on_meta", "patch", "plan", "profile", "save_adapter", "unmerge_adapter", "unpatch",
]  # fmt: skip
__version__ = "0.1.0"
