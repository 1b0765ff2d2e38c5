"""8-bit floats in blocks of 128."""

from memkernels.ops.fp8_blocks.op import fp8_decode_, fp8_encode_
from memkernels.ops.fp8_blocks.reference import BLOCK

__all__ = ["BLOCK", "fp8_decode_", "fp8_encode_"]
