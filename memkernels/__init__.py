"""Kernels for training models in less memory: Triton, CUDA C++ and native CPU code under drop-in PyTorch layers.

`memkernels.ops` holds the functions, `memkernels.nn` the layers; `patch` puts them into a model of transformers.
Importing memkernels loads neither Triton nor transformers.
"""

from memkernels import nn, ops
from memkernels.integrations import patch, unpatch

__all__ = ["nn", "ops", "patch", "unpatch"]
__version__ = "0.1.0"
