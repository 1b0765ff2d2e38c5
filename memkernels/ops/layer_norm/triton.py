"""Layer norm for GPUs. A fixed number of programs walks the rows: the parameters are read, and their gradients written,
once a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memkernels.ops.launch import holds_row, num_programs, row_tile
from memkernels.ops.partial_sums import partial_sums, total
from memkernels.ops.wide_norm import holds_row_in_forward, wide_norm_bwd, wide_norm_fwd


@triton.jit
def _layer_norm_fwd_kernel(
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
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = (h - mean) * rstd * weight + bias, h = x + residual; x, y: (rows, size). Moves each once."""
    columns = tl.arange(0, BLOCK_N)
    in_row = columns < size
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    for first in range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row = first + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (row < rows)[:, None] & in_row[None, :]
        offsets = row[:, None] * size + columns[None, :]
        h = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            h += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            rounded = h.to(residual_out_ptr.dtype.element_ty)
            tl.store(residual_out_ptr + offsets, rounded, mask=mask)
            h = rounded.to(tl.float32)
        mean = tl.sum(h, axis=1) / size
        centred = tl.where(mask, h - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / size + eps)
        tl.store(mean_ptr + row, mean, mask=row < rows)
        tl.store(rstd_ptr + row, rstd, mask=row < rows)
        y = centred * (rstd[:, None] * weight[None, :])
        if HAS_BIAS:
            y += bias[None, :]
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,
    dresidual_out_ptr,
    h_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_partial_ptr,
    dbias_partial_ptr,
    rows,
    size,
    HAS_RESIDUAL: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx = rstd * (g - mean(g) - n * mean(g * n)) + dresidual_out, g = dy * weight, n = (h - mean) * rstd.

    Moves dy, h, dx once, dresidual_out too; the gradients of weight and bias by program: (programs, size) in float32.
    """
    columns = tl.arange(0, BLOCK_N)
    in_row = columns < size
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row = first + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (row < rows)[:, None] & in_row[None, :]
        offsets = row[:, None] * size + columns[None, :]
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        # Outside the mask dy is 0, and with it every sum over n's elements there.
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        normed = (tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        if WEIGHT_GRAD:
            dweight += tl.sum(dy * normed, axis=0)
        if BIAS_GRAD:
            dbias += tl.sum(dy, axis=0)
        grad = dy * weight[None, :]
        grad_mean = (tl.sum(grad, axis=1) / size)[:, None]
        dx = rstd * (grad - grad_mean - normed * (tl.sum(grad * normed, axis=1) / size)[:, None])
        if HAS_RESIDUAL:
            dx += tl.load(dresidual_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial = tl.program_id(0).to(tl.int64) * size + columns
    if WEIGHT_GRAD:
        tl.store(dweight_partial_ptr + partial, dweight, mask=in_row)
    if BIAS_GRAD:
        tl.store(dbias_partial_ptr + partial, dbias, mask=in_row)


def layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    held: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator of that name; `held`, whether a program holds a row, is told by the size and torch without it."""
    x, weight = x.contiguous(), weight.contiguous()
    residual, bias = (tensor if tensor is None else tensor.contiguous() for tensor in (residual, bias))
    size, rows = x.shape[-1], x.shape[:-1].numel()
    if not (holds_row_in_forward(x, bias) if held is None else held):
        return wide_norm_fwd(x, residual, weight, bias, eps, 0.0, centred=True)
    y = torch.empty_like(x)
    residual_out = x.new_empty(0) if residual is None else torch.empty_like(x)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if x.numel():
        tile = row_tile(size)
        _layer_norm_fwd_kernel[(num_programs(x, rows, tile.BLOCK_M),)](
            x, residual, weight, bias, y, residual_out, mean, rstd, rows, size, eps,
            HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, **tile.options(),
        )  # fmt: skip
    return y, residual_out, mean, rstd


def layer_norm_bwd(
    dy: Tensor,
    dresidual_out: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight_grad: bool,
    bias_grad: bool,
    *,
    held: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of that name; `held` as above."""
    dy, h, weight = dy.contiguous(), h.contiguous(), weight.contiguous()
    dresidual_out = dresidual_out if dresidual_out is None else dresidual_out.contiguous()
    size, rows = h.shape[-1], h.shape[:-1].numel()
    if not (holds_row(size) if held is None else held):
        return wide_norm_bwd(dy, dresidual_out, h, weight, mean, rstd, 0.0, weight_grad, bias_grad)
    dx = torch.empty_like(h)
    tile = row_tile(size)
    programs = num_programs(h, rows, tile.BLOCK_M)
    dweight_partial, dbias_partial = (partial_sums(h, programs, wanted) for wanted in (weight_grad, bias_grad))
    if size:  # With no rows the kernel still writes the zeros of dweight and dbias.
        _layer_norm_bwd_kernel[(programs,)](
            dy, dresidual_out, h, weight, mean, rstd, dx, dweight_partial, dbias_partial, rows, size,
            HAS_RESIDUAL=dresidual_out is not None, WEIGHT_GRAD=weight_grad, BIAS_GRAD=bias_grad, **tile.options(),
        )  # fmt: skip
    return dx, total(dweight_partial, weight, weight_grad), total(dbias_partial, weight, bias_grad)
