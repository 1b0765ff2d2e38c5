"""The operators of 8-bit floats in blocks of 128, with the reference, which has the formulas, where no kernel runs.

n (itemsize + 1 + 4 / 128) bytes are moved, each way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels._library import define, has_kernel, implement_with_triton
from memkernels.ops.fp8_blocks import reference

define("fp8_encode_(Tensor values, Tensor(a!) codes, Tensor(b!) scales) -> ()")
define("fp8_decode_(Tensor codes, Tensor scales, Tensor(a!) values) -> ()")
implement_with_triton("memkernels.ops.fp8_blocks.triton", "fp8_encode_", "fp8_decode_")


def fp8_encode_(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Fills codes, (n,) uint8, and scales, (ceil(n / 128),) float32; values: (n,) float32, bfloat16 or float16. All
    contiguous."""
    implementation = torch.ops.memkernels if has_kernel("fp8_encode_", values) else reference
    implementation.fp8_encode_(values, codes, scales)


def fp8_decode_(codes: Tensor, scales: Tensor, values: Tensor) -> None:
    """Fills values, of any of those dtypes."""
    implementation = torch.ops.memkernels if has_kernel("fp8_decode_", values) else reference
    implementation.fp8_decode_(codes, scales, values)
