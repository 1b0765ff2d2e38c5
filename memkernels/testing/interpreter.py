"""What Triton's interpreter gets wrong about bfloat16, set right for the tests that run under it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def hardware_bfloat16() -> Iterator[None]:
    """Makes the interpreter multiply bfloat16, and round to it, as GPUs do.

    Triton 3.7 keeps bfloat16 there as 16-bit integers: tl.dot multiplies those (float32 holds the product of two
    exactly), and a conversion from float32 cuts where the hardware rounds to nearest even.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def widened_dot(builder, a, b, *args):
        return create_dot(builder, widened(a), widened(b), *args)

    def rounded_cast(builder, source, dtype):
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(builder, source, dtype)
        values = np.ascontiguousarray(source.data, dtype=np.float32)
        bits = values.view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16), tl.bfloat16)

    with (
        mock.patch.object(InterpreterBuilder, "create_dot", widened_dot),
        mock.patch.object(InterpreterBuilder, "cast_impl", rounded_cast),
    ):
        yield
