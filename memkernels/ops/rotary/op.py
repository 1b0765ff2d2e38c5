"""Rotary position embedding: operators, autograd Function and public function."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels._library import define, has_kernel, implement_with_triton
from memkernels.ops.checks import (
    check_dtype_or_float32,
    check_flag,
    check_floating,
    check_like,
    check_same_device,
    check_shape,
)
from memkernels.ops.distinct import distinct
from memkernels.ops.rotary import reference


def with_rows(x: Tensor) -> Tensor:
    """x itself where its heads lie apart in memory, each contiguous; else a contiguous copy."""
    rows = x.stride(3) == 1 and all(stride >= x.shape[3] for stride in x.stride()[:3])
    return x if rows else x.contiguous()


def _fake(q, k, cos, sin, interleaved):
    return torch.empty_like(with_rows(q)), torch.empty_like(with_rows(k))


define("rotary_fwd(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)", _fake)
define("rotary_bwd(Tensor dq, Tensor dk, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)", _fake)
implement_with_triton("memkernels.ops.rotary.triton", "rotary_fwd", "rotary_bwd")


class _Rotary(torch.autograd.Function):
    """The rotation, or its transpose; each is the other's backward."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved, transposed):
        ctx.interleaved, ctx.transposed = interleaved, transposed
        ctx.save_for_backward(cos, sin)
        rotate = torch.ops.memkernels.rotary_bwd if transposed else torch.ops.memkernels.rotary_fwd
        return rotate(q, k, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dq, dk = _Rotary.apply(dq, dk, cos, sin, ctx.interleaved, not ctx.transposed)
        else:
            rotate = torch.ops.memkernels.rotary_fwd if ctx.transposed else torch.ops.memkernels.rotary_bwd
            dq, dk = rotate(dq, dk, cos, sin, ctx.interleaved)
        return dq, dk, None, None, None, None


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_floating("q", q)
    if q.dim() != 4:
        raise ValueError(f"q: expected four dimensions (B, S, H, D), got shape {tuple(q.shape)}.")
    check_floating("k", k)
    if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(f"k: expected (B, S, H, D) with B, S and D of q, {tuple(q.shape)}, got {tuple(k.shape)}.")
    if k.dtype != q.dtype:
        raise TypeError(f"k: expected {q.dtype}, as q, got {k.dtype}.")
    check_same_device("q", q, k=k)
    check_tables(q, (*q.shape[:2], q.shape[3]), q.dtype, cos, sin)


def check_tables(like: Tensor, shape: tuple[int, int, int], dtype: torch.dtype, cos: Tensor, sin: Tensor) -> None:
    """cos and sin fit queries of shape (B, S, D) and `dtype`, on the device of `like`."""
    batch, length, size = shape
    check_floating("cos", cos)
    check_dtype_or_float32("cos", cos, dtype, "q")
    width = cos.shape[-1] if cos.dim() else 0
    if width == 0 or width % 2 or width > size:
        raise ValueError(f"cos: expected an even last dimension of at most q's {size}, got shape {tuple(cos.shape)}.")
    if cos.dim() == 3 and cos.shape[0] == 1:
        check_shape("cos", cos, (1, length, width), "1, S and the rotated width")
    elif cos.dim() == 3:
        check_shape("cos", cos, (batch, length, width), "B, S and the rotated width")
    else:
        check_shape("cos", cos, (length, width), "S and the rotated width")
    check_like("sin", sin, "cos", cos)
    check_same_device("q", like, cos=cos, sin=sin)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: got a tensor that requires grad; no gradient is given for it: detach it.")


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys.

    The first R elements of each head are R/2 pairs (a, b). Pair i of token s becomes

        a' = a * cos[s, i] - b * sin[s, i]        b' = b * cos[s, i + R/2] + a * sin[s, i + R/2]

    computed in float32 and rounded once, under autocast too; the other D - R elements pass through. The two halves of
    cos and sin are read as they are, equal or not. Su et al. 2021, arXiv 2104.09864; with R = D it is
    q * cos + rotate_half(q) * sin.

    Args:
        q: (B, S, Hq, D); float32, bfloat16 or float16 (float64 is computed by the reference). Any strides; a view
            such as `(B, H, S, D).transpose(1, 2)` is read, and its result laid out, as it is.
        k: (B, S, Hk, D); q's dtype.
        cos: (S, R), (1, S, R) or (B, S, R), R even and at most D; q's dtype or float32. The layout is that of Hugging
            Face's Llama and GLM, `cat((angles, angles), -1).cos()`, also where pairs are interleaved. Of a table that
            holds each angle twice in a row, `repeat_interleave(angles, 2, -1)` (Cohere, CodeGen), give
            `cat((table[..., ::2],) * 2, -1)`: its shape is the same, so that it is not told apart.
        sin: like cos.
        interleaved: pair i is the elements 2i and 2i + 1 (GPT-J, GLM) instead of i and i + R/2 (GPT-NeoX, Llama).

    Returns:
        The rotated q and k, each with the shape, dtype and layout in memory of its input.

    Raises:
        TypeError: a dtype other than those above, or an interleaved that is no bool.
        ValueError: a shape or device that does not fit q; cos or sin that requires grad.

    Saved for backward: cos and sin. The gradients may be differentiated again.
    """
    _check(q, k, cos, sin)
    check_flag("interleaved", interleaved)
    if not has_kernel("rotary_fwd", q):
        return reference.apply_rotary(q, k, cos, sin, interleaved=interleaved)
    return _Rotary.apply(*distinct(q, k, cos, sin), interleaved, False)
