"""Kernels for training models in less memory: Triton, CUDA C++ and native CPU code under drop-in PyTorch layers.

`memkernels.ops` holds the functions, `memkernels.nn` the layers. Importing memkernels loads neither Triton nor
transformers.
"""

from memkernels import nn, ops

__all__ = ["nn", "ops"]
__version__ = "0.1.0"
