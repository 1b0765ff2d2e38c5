"""What Triton's interpreter gets wrong about bfloat16, set right for the tests that run under it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Makes tl.dot multiply bfloat16 under the interpreter.

    Triton 3.7 keeps bfloat16 there as 16-bit integers and multiplies those. Float32 holds the product of two exactly.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def widened_dot(builder, a, b, *args):
        return create_dot(builder, widened(a), widened(b), *args)

    with mock.patch.object(InterpreterBuilder, "create_dot", widened_dot):
        yield
