"""RMS norm (CENTRED false) and layer norm on GPUs for rows too wide for a program's registers, in blocks of columns:
where `wide_norm.py` has no kernel that holds the row.

A row's statistics need all of it before its first output, so what `rms_norm/triton.py` and `layer_norm/triton.py` read
once is read twice here: x in forward, dy and h in backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memkernels.ops.launch import num_programs
from memkernels.ops.partial_sums import partial_sums

# Rows share the loads of weight and bias; a thread has 8 or 16 elements.
ROW_TILE = {"BLOCK_M": 4, "BLOCK_N": 512, "num_warps": 8}
COLUMN_TILE = {"BLOCK_M": 8, "BLOCK_N": 512, "num_warps": 8}
# Of the rows, in backward: times a wide row's blocks of columns they fill any GPU.
MAX_SHARES = 32


@triton.jit
def _load_h(x_ptr, residual_ptr, offsets, mask, HAS_RESIDUAL: tl.constexpr):
    """x + residual, rounded as it is stored."""
    h = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        h = h.to(x_ptr.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def _load_normed(h_ptr, mean_ptr, rstd, row, in_rows, offsets, mask, CENTRED: tl.constexpr):
    """(h - mean) * rstd; h * rstd where it is not centred."""
    h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if CENTRED:
        h -= tl.load(mean_ptr + row, mask=in_rows, other=0.0)[:, None]
    return h * rstd


@triton.jit
def _wide_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    residual_out_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    size,
    eps,
    weight_offset,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = (h - mean) * rstd * (weight + offset) + bias, h = x + residual; x, y: (rows, size).

    Reads x and residual twice.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < rows
    mean = tl.zeros((BLOCK_M,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first in range(0, size, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        mask = in_rows[:, None] & (columns < size)[None, :]
        offsets = row[:, None] * size + columns[None, :]
        h = _load_h(x_ptr, residual_ptr, offsets, mask, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(residual_out_ptr + offsets, h.to(residual_out_ptr.dtype.element_ty), mask=mask)
        if CENTRED:
            # Moments of the block joined to those before it (Chan, Golub and LeVeque 1983).
            count = tl.minimum(BLOCK_N, size - first)
            block_mean = tl.sum(h, axis=1) / count
            centred = tl.where(mask, h - block_mean[:, None], 0.0)
            step = block_mean - mean
            share = count / (first + count)
            mean += step * share
            squares += tl.sum(centred * centred, axis=1) + step * step * (first * share)
        else:
            squares += tl.sum(h * h, axis=1)
    rstd = 1.0 / tl.sqrt(squares / size + eps)
    tl.store(rstd_ptr + row, rstd, mask=in_rows)
    if CENTRED:
        tl.store(mean_ptr + row, mean, mask=in_rows)
    for first in range(0, size, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        in_row = columns < size
        mask = in_rows[:, None] & in_row[None, :]
        offsets = row[:, None] * size + columns[None, :]
        weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32) + weight_offset
        h = _load_h(x_ptr, residual_ptr, offsets, mask, HAS_RESIDUAL)
        y = (h - mean[:, None]) * rstd[:, None] * weight[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + columns, mask=in_row, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _wide_norm_bwd_means_kernel(
    dy_ptr,
    h_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    means_ptr,
    rows,
    size,
    weight_offset,
    CENTRED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """means: (2, rows) of mean(g) and mean(g * n), g = dy * (weight + offset), n = (h - mean) * rstd. Reads dy, h."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < rows
    rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)[:, None]
    grads = tl.zeros((BLOCK_M,), dtype=tl.float32)
    products = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first in range(0, size, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        in_row = columns < size
        mask = in_rows[:, None] & in_row[None, :]
        offsets = row[:, None] * size + columns[None, :]
        weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32) + weight_offset
        # Outside the mask dy is 0, and with it every term.
        grad = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * weight[None, :]
        normed = _load_normed(h_ptr, mean_ptr, rstd, row, in_rows, offsets, mask, CENTRED)
        grads += tl.sum(grad, axis=1)
        products += tl.sum(grad * normed, axis=1)
    if CENTRED:
        tl.store(means_ptr + row, grads / size, mask=in_rows)
    tl.store(means_ptr + rows + row, products / size, mask=in_rows)


@triton.jit
def _wide_norm_bwd_kernel(
    dy_ptr,
    dresidual_out_ptr,
    h_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    means_ptr,
    dx_ptr,
    dweight_partial_ptr,
    dbias_partial_ptr,
    rows,
    size,
    weight_offset,
    HAS_RESIDUAL: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx = rstd * (g - mean(g) - n * mean(g * n)) + dresidual_out, each mean given; g and n as above.

    A program has BLOCK_N columns and a share of the rows. Moves dy, h, dx once, dresidual_out too; the gradients of
    weight and bias by share: (shares, size) in float32.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_row = columns < size
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32) + weight_offset
    dweight = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(tl.program_id(1) * BLOCK_M, rows, tl.num_programs(1) * BLOCK_M):
        row = first + tl.arange(0, BLOCK_M).to(tl.int64)
        in_rows = row < rows
        mask = in_rows[:, None] & in_row[None, :]
        offsets = row[:, None] * size + columns[None, :]
        rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)[:, None]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        normed = _load_normed(h_ptr, mean_ptr, rstd, row, in_rows, offsets, mask, CENTRED)
        if WEIGHT_GRAD:
            dweight += dy * normed
        if BIAS_GRAD:
            dbias += dy
        grad = dy * weight[None, :] - normed * tl.load(means_ptr + rows + row, mask=in_rows, other=0.0)[:, None]
        if CENTRED:
            grad -= tl.load(means_ptr + row, mask=in_rows, other=0.0)[:, None]
        dx = rstd * grad
        if HAS_RESIDUAL:
            dx += tl.load(dresidual_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial = tl.program_id(1).to(tl.int64) * size + columns
    if WEIGHT_GRAD:
        tl.store(dweight_partial_ptr + partial, tl.sum(dweight, axis=0), mask=in_row)
    if BIAS_GRAD:
        tl.store(dbias_partial_ptr + partial, tl.sum(dbias, axis=0), mask=in_row)


def wide_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    *,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, residual_out (empty without residual), mean (empty where it is not centred) and rstd; inputs contiguous."""
    size, rows = x.shape[-1], x.shape[:-1].numel()
    y = torch.empty_like(x)
    residual_out = x.new_empty(0) if residual is None else torch.empty_like(x)
    rstd = x.new_empty(rows, dtype=torch.float32)
    mean = rstd.new_empty(rows if centred else 0)
    if rows:
        _wide_norm_fwd_kernel[(triton.cdiv(rows, ROW_TILE["BLOCK_M"]),)](
            x, residual, weight, bias, y, residual_out, mean, rstd, rows, size, eps, weight_offset,
            HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, CENTRED=centred, **ROW_TILE,
        )  # fmt: skip
    return y, residual_out, mean, rstd


def wide_norm_bwd(
    dy: Tensor,
    dresidual_out: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx and, by share of the rows, the partial sums of dweight and dbias; inputs contiguous, mean None where it is not
    centred."""
    size, rows = h.shape[-1], h.shape[:-1].numel()
    centred = mean is not None
    dx, means = torch.empty_like(h), h.new_empty((2, rows), dtype=torch.float32)
    if rows:
        _wide_norm_bwd_means_kernel[(triton.cdiv(rows, ROW_TILE["BLOCK_M"]),)](
            dy, h, weight, mean, rstd, means, rows, size, weight_offset, CENTRED=centred, **ROW_TILE
        )
    shares = min(MAX_SHARES, num_programs(h, rows, COLUMN_TILE["BLOCK_M"]))
    dweight_partial, dbias_partial = (partial_sums(h, shares, wanted) for wanted in (weight_grad, bias_grad))
    # With no rows the kernel still writes the zeros of dweight and dbias.
    _wide_norm_bwd_kernel[(triton.cdiv(size, COLUMN_TILE["BLOCK_N"]), shares)](
        dy, dresidual_out, h, weight, mean, rstd, means, dx, dweight_partial, dbias_partial, rows, size, weight_offset,
        HAS_RESIDUAL=dresidual_out is not None, CENTRED=centred, WEIGHT_GRAD=weight_grad, BIAS_GRAD=bias_grad,
        **COLUMN_TILE,
    )  # fmt: skip
    return dx, dweight_partial, dbias_partial
