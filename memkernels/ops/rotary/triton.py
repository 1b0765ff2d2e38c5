"""Rotary position embedding for GPUs. A program takes a few tokens: cos and sin are read once for all heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memkernels.ops.rotary.op import with_rows


@triton.jit
def _rotate_heads(
    x_ptr,
    x_offsets,
    x_head_stride,
    out_ptr,
    out_offsets,
    out_head_stride,
    heads,
    in_tile,
    cos_a,
    cos_b,
    sin_a,
    sin_b,
    half,
    size,
    INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
):
    """a' = a * cos_a - b * sin_a, b' = b * cos_b + a * sin_b for the pairs of every head of a tile of tokens.

    x_offsets, out_offsets: (BLOCK_M,), where each token's heads begin; cos_a and the like: (BLOCK_M, BLOCK_R).
    """
    pair = tl.arange(0, BLOCK_R)
    mask = in_tile[:, None] & (pair < half)[None, :]
    x = x_ptr + x_offsets[:, None]
    out = out_ptr + out_offsets[:, None]
    for _ in range(heads):
        if INTERLEAVED:
            both = tl.arange(0, 2 * BLOCK_R)
            both_mask = in_tile[:, None] & (both < 2 * half)[None, :]
            pairs = tl.load(x + both[None, :], mask=both_mask, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(pairs, (pairs.shape[0], BLOCK_R, 2)))
            rotated = tl.join(a * cos_a - b * sin_a, b * cos_b + a * sin_b)
            rotated = tl.reshape(rotated, (pairs.shape[0], 2 * BLOCK_R))
            tl.store(out + both[None, :], rotated.to(out_ptr.dtype.element_ty), mask=both_mask)
        else:
            a = tl.load(x + pair[None, :], mask=mask, other=0.0).to(tl.float32)
            b = tl.load(x + half + pair[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(out + pair[None, :], (a * cos_a - b * sin_a).to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(out + half + pair[None, :], (b * cos_b + a * sin_b).to(out_ptr.dtype.element_ty), mask=mask)
        if BLOCK_PASS > 0:
            rest = 2 * half + tl.arange(0, BLOCK_PASS)
            rest_mask = in_tile[:, None] & (rest < size)[None, :]
            tl.store(out + rest[None, :], tl.load(x + rest[None, :], mask=rest_mask), mask=rest_mask)
        x += x_head_stride
        out += out_head_stride


@triton.jit
def _rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    tokens,
    q_heads,
    k_heads,
    half,
    size,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    q_out_batch_stride,
    q_out_token_stride,
    q_out_head_stride,
    k_out_batch_stride,
    k_out_token_stride,
    k_out_head_stride,
    cos_batch_stride,
    INTERLEAVED: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
):
    """q and k rotated by the first 2 * half columns of cos and sin; TRANSPOSE gives the gradient.

    q: (B, tokens, q_heads, size), k: (B, tokens, k_heads, size); cos, sin: (1 or B, tokens, 2 * half). Moves each once.
    """
    tiles = tl.cdiv(tokens, BLOCK_M)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    token = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_tile = token < tokens
    pair = tl.arange(0, BLOCK_R)
    mask = in_tile[:, None] & (pair < half)[None, :]
    table = batch * cos_batch_stride + token[:, None] * (2 * half) + pair[None, :]
    cos_a = tl.load(cos_ptr + table, mask=mask, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + table + half, mask=mask, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + table, mask=mask, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + table + half, mask=mask, other=0.0).to(tl.float32)
    if TRANSPOSE:
        sin_a, sin_b = -sin_b, -sin_a
    _rotate_heads(
        q_ptr, batch * q_batch_stride + token * q_token_stride, q_head_stride,
        q_out_ptr, batch * q_out_batch_stride + token * q_out_token_stride, q_out_head_stride,
        q_heads, in_tile, cos_a, cos_b, sin_a, sin_b, half, size, INTERLEAVED, BLOCK_R, BLOCK_PASS,
    )  # fmt: skip
    _rotate_heads(
        k_ptr, batch * k_batch_stride + token * k_token_stride, k_head_stride,
        k_out_ptr, batch * k_out_batch_stride + token * k_out_token_stride, k_out_head_stride,
        k_heads, in_tile, cos_a, cos_b, sin_a, sin_b, half, size, INTERLEAVED, BLOCK_R, BLOCK_PASS,
    )  # fmt: skip


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transpose: bool
) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = with_rows(q), with_rows(k), cos.contiguous(), sin.contiguous()
    batches, tokens, _, size = q.shape
    half = cos.shape[-1] // 2
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    block_r = triton.next_power_of_2(half)
    block_m = max(1, 1024 // block_r)
    programs = batches * triton.cdiv(tokens, block_m)
    if programs:
        _rotary_kernel[(programs,)](
            q, k, cos, sin, q_out, k_out, tokens, q.shape[2], k.shape[2], half, size,
            *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3],
            cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0,
            INTERLEAVED=interleaved, TRANSPOSE=transpose, BLOCK_M=block_m, BLOCK_R=block_r,
            BLOCK_PASS=triton.next_power_of_2(size - 2 * half) if size > 2 * half else 0, num_warps=4,
        )  # fmt: skip
    return q_out, k_out


def rotary_fwd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _rotate(q, k, cos, sin, interleaved, False)


def rotary_bwd(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _rotate(dq, dk, cos, sin, interleaved, True)
