"""Products of matrices as the ops multiply: torch's, but where torch has nothing as fast on a CPU.

- With AVX-512 for bfloat16 and no AMX, csrc/cpu/matmul.cpp multiplies what is not small.
- Without AVX-512 for bfloat16 and AVX512-FP16 for float16, torch multiplies such matrices without vectors, up to a
  hundred times slower than float32. With AVX2, csrc/cpu/matmul.cpp multiplies these too, but for the longest sums.
  Elsewhere a block of each operand is widened in front of a float32 product. Both round the sum once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from memkernels._library import cpu_isa, define, implement_with_python
from memkernels.ops.huge_pages import on_huge_pages

_BLOCK = 1024  # of rows, columns and depth: 12 MiB in all, and conversions of a few percent of the product's time


def _slow_dtypes() -> frozenset[torch.dtype]:
    """The 16-bit dtypes that torch multiplies without oneDNN on this processor; none where torch does not say."""
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    found = {dtype: getattr(torch.ops.mkldnn, check, None) for dtype, check in checks.items()}
    return frozenset(dtype for dtype, check in found.items() if check is not None and not check())


SLOW_DTYPES = _slow_dtypes()
# The dtypes that csrc/cpu/matmul.cpp multiplies on this processor.
_NATIVE_BY_ISA: dict[str | None, frozenset[torch.dtype]] = {
    "avx512": frozenset({torch.float32, torch.bfloat16}),
    "avx2": SLOW_DTYPES,
}
NATIVE_DTYPES = _NATIVE_BY_ISA.get(cpu_isa(), frozenset())
_LEAST_NATIVE = 1 << 22  # m n k
_LONGEST_PACKED = 4 << 10  # bytes of a row of a
_LONGEST_WIDENED = 4096  # k, of which too few rows are widened at a time


def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a b, for a (m, k) and b (k, n) of one dtype; as `torch.mm`."""
    return torch.mm(a, b, out=out) if _is_torchs(a) else _product(a, b, None, 1.0, out)


def addmm(c: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
    """c + alpha a b, for c that broadcasts to (m, n) and may be `out`; as `torch.addmm`."""
    return torch.addmm(c, a, b, alpha=alpha, out=out) if _is_torchs(a) else _product(a, b, c, alpha, out)


def add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype, memory: Tensor | None = None) -> Tensor:
    """total + a b in `dtype`, that of total, which is written to; a new tensor where total is None.

    Args:
        memory: for the product, (m, n) of a's dtype, where it is made and rounded before it is added; new by default.
    """
    if dtype == a.dtype:
        return mm(a, b) if total is None else addmm(total, a, b, out=total)
    if dtype == torch.float32 and not _is_torchs(a) and not torch.compiler.is_compiling():
        sums = a.new_empty(a.shape[0], b.shape[1], dtype=dtype) if total is None else total
        if a.dtype in SLOW_DTYPES or _takes_native(a, b, sums):
            return _multiply(a, b, total, 1.0, sums)
    product = mm(a, b, out=memory)
    return product.to(dtype) if total is None else total.add_(product)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, for x (tokens, in) and weight (out, in); as `torch.nn.functional.linear`."""
    if _is_torchs(x):
        return torch.nn.functional.linear(x, weight, bias)
    return _product(x, weight.t(), bias, 1.0, None)


def _is_torchs(a: Tensor) -> bool:
    return a.device.type != "cpu" or a.dtype not in NATIVE_DTYPES | SLOW_DTYPES


def _product(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, out: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():  # opaque: sizes are not known, and Inductor would leave out a sum's rounding
        product = torch.ops.memkernels.matmul(a, b, c, alpha)
        return product if out is None else out.copy_(product)
    return _multiply(a, b, c, alpha, on_huge_pages(_new_product(a, b, c, alpha)) if out is None else out)


def _new_product(a: Tensor, b: Tensor, c: Tensor | None, alpha: float) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _multiply(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, out: Tensor) -> Tensor:
    shape = (a.shape[0], b.shape[1])
    if a.shape[1] != b.shape[0] or a.dtype != b.dtype or out.shape != shape:
        raise RuntimeError(
            f"a, b, out: expected (m, k), (k, n) and (m, n) of one dtype, got {tuple(a.shape)} {a.dtype},"
            f" {tuple(b.shape)} {b.dtype} and {tuple(out.shape)}."
        )
    if _takes_native(a, b, out):
        torch.ops.memkernels.matmul_into_(a, b, None if c is None else c.expand(shape), alpha, out)
        return out
    if a.dtype in SLOW_DTYPES:
        return _by_blocks(a, b, c, alpha, out)
    return torch.mm(a, b, out=out) if c is None else torch.addmm(c, a, b, alpha=alpha, out=out)


def _takes_native(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether csrc/cpu/matmul.cpp is the faster (`python -m memkernels.bench matmul`).

    Of what torch multiplies by vectors, a has enough rows and columns for its tiles, and they are in its order or short
    enough to be packed.
    """
    (m, k), n = a.shape, b.shape[1]
    if a.dtype not in NATIVE_DTYPES or 1 not in out.stride():
        return False
    if a.dtype in SLOW_DTYPES:
        return 0 < k <= _LONGEST_WIDENED
    return (
        m >= 32
        and k >= 64
        and (a.stride(1) == 1 or (n >= 64 and k * a.dtype.itemsize <= _LONGEST_PACKED))
        and m * n * k >= _LEAST_NATIVE
    )


def _by_blocks(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, out: Tensor) -> Tensor:
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


# out = c + alpha a b
define("matmul_into_(Tensor a, Tensor b, Tensor? c, float alpha, Tensor(a!) out) -> ()")
# The same as a new tensor, by whatever `_multiply` takes.
define("matmul(Tensor a, Tensor b, Tensor? c, float alpha) -> Tensor", _new_product)
implement_with_python("matmul", lambda a, b, c, alpha: _multiply(a, b, c, alpha, _new_product(a, b, c, alpha)))
