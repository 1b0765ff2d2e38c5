"""Products of matrices as the ops multiply: torch's, but by blocks in float32 where torch has nothing fast.

Without AVX-512 for bfloat16 and AVX512-FP16 for float16, torch multiplies such matrices on CPU without vectors, up to
a hundred times slower than float32. There a block of each operand is widened in front of a float32 product, and the sum
is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from memkernels._library import define, implement_with_python

_BLOCK = 1024  # of rows, columns and depth: 12 MiB in all, and conversions of a few percent of the product's time


def _slow_dtypes() -> frozenset[torch.dtype]:
    """The 16-bit dtypes that torch multiplies without oneDNN on this processor; none where torch does not say."""
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    found = {dtype: getattr(torch.ops.mkldnn, check, None) for dtype, check in checks.items()}
    return frozenset(dtype for dtype, check in found.items() if check is not None and not check())


SLOW_DTYPES = _slow_dtypes()


def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a b, for a (m, k) and b (k, n) of one dtype; as `torch.mm`."""
    return _by_blocks(a, b, None, 1.0, out) if _is_slow(a) else torch.mm(a, b, out=out)


def addmm(c: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
    """c + alpha a b, for c that broadcasts to (m, n) and may be `out`; as `torch.addmm`."""
    return _by_blocks(a, b, c, alpha, out) if _is_slow(a) else torch.addmm(c, a, b, alpha=alpha, out=out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, for x (tokens, in) and weight (out, in); as `torch.nn.functional.linear`."""
    if _is_slow(x):
        return _by_blocks(x, weight.t(), bias, 1.0, None)
    return torch.nn.functional.linear(x, weight, bias)


def _is_slow(a: Tensor) -> bool:
    return a.dtype in SLOW_DTYPES and a.device.type == "cpu"


def _by_blocks(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, out: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():  # opaque, or Inductor would leave out the sum's rounding
        product = torch.ops.memkernels.mm_by_blocks(a, b, c, alpha)
        return product if out is None else out.copy_(product)
    return _multiply(a, b, c, alpha, _new_product(a, b, c, alpha) if out is None else out)


def _new_product(a: Tensor, b: Tensor, c: Tensor | None, alpha: float) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _multiply(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, out: Tensor) -> Tensor:
    shape = (a.shape[0], b.shape[1])
    if a.shape[1] != b.shape[0] or a.dtype != b.dtype or out.shape != shape:
        raise RuntimeError(
            f"a, b, out: expected (m, k), (k, n) and (m, n) of one dtype, got {tuple(a.shape)} {a.dtype},"
            f" {tuple(b.shape)} {b.dtype} and {tuple(out.shape)}."
        )
    added = None if c is None else c.expand(out.shape)
    for columns in _blocks(b.shape[1]):
        for rows in _blocks(a.shape[0]):
            size = (rows.stop - rows.start, columns.stop - columns.start)
            total = torch.zeros(size, dtype=torch.float32, device=a.device)
            for depth in _blocks(a.shape[1]):
                torch.addmm(total, _widened(a[rows, depth]), _widened(b[depth, columns]), alpha=alpha, out=total)
            out[rows, columns] = total if added is None else total.add_(added[rows, columns])
    return out


def _blocks(size: int) -> Iterator[slice]:
    return (slice(first, min(first + _BLOCK, size)) for first in range(0, size, _BLOCK))


def _widened(block: Tensor) -> Tensor:
    """In float32, its elements in the order that they have in memory."""
    return block.float() if block.stride(1) == 1 else block.t().float().t()


define("mm_by_blocks(Tensor a, Tensor b, Tensor? c, float alpha) -> Tensor", _new_product)
implement_with_python("mm_by_blocks", lambda a, b, c, alpha: _multiply(a, b, c, alpha, _new_product(a, b, c, alpha)))
