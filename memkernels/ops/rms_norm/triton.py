"""RMS norm for GPUs. A fixed number of programs walks the rows: weight is read, and dweight written, once a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memkernels.ops.launch import holds_row, num_programs, row_tile
from memkernels.ops.partial_sums import partial_sums, total
from memkernels.ops.wide_norm import holds_row_in_forward, wide_norm_bwd, wide_norm_fwd


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    residual_out_ptr,
    rstd_ptr,
    rows,
    size,
    eps,
    weight_offset,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = h * rstd * (weight + offset), h = x + residual; x, y: (rows, size). Moves each once."""
    columns = tl.arange(0, BLOCK_N)
    in_row = columns < size
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32) + weight_offset
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
        rstd = 1.0 / tl.sqrt(tl.sum(h * h, axis=1) / size + eps)
        tl.store(rstd_ptr + row, rstd, mask=row < rows)
        y = h * rstd[:, None] * weight[None, :]
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr,
    dresidual_out_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_partial_ptr,
    rows,
    size,
    weight_offset,
    HAS_RESIDUAL: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx = rstd * (g - n * mean(g * n)) + dresidual_out, g = dy * (weight + offset), n = h * rstd; dweight by program.

    Moves dy, h, dx once, dresidual_out too; dweight_partial: (programs, size) in float32.
    """
    columns = tl.arange(0, BLOCK_N)
    in_row = columns < size
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32) + weight_offset
    dweight = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row = first + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (row < rows)[:, None] & in_row[None, :]
        offsets = row[:, None] * size + columns[None, :]
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * rstd
        if WEIGHT_GRAD:
            dweight += tl.sum(dy * normed, axis=0)
        grad = dy * weight[None, :]
        dx = rstd * (grad - normed * (tl.sum(grad * normed, axis=1) / size)[:, None])
        if HAS_RESIDUAL:
            dx += tl.load(dresidual_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if WEIGHT_GRAD:
        partial = dweight_partial_ptr + tl.program_id(0).to(tl.int64) * size + columns
        tl.store(partial, dweight, mask=in_row)


def rms_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    weight_offset: float,
    *,
    held: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of that name; `held`, whether a program holds a row, is told by the size and torch without it."""
    x, weight = x.contiguous(), weight.contiguous()
    residual = residual if residual is None else residual.contiguous()
    size, rows = x.shape[-1], x.shape[:-1].numel()
    if not (holds_row_in_forward(x, None) if held is None else held):
        y, residual_out, _, rstd = wide_norm_fwd(x, residual, weight, None, eps, weight_offset, centred=False)
        return y, residual_out, rstd
    y = torch.empty_like(x)
    residual_out = x.new_empty(0) if residual is None else torch.empty_like(x)
    rstd = x.new_empty(rows, dtype=torch.float32)
    if x.numel():
        tile = row_tile(size)
        _rms_norm_fwd_kernel[(num_programs(x, rows, tile.BLOCK_M),)](
            x, residual, weight, y, residual_out, rstd, rows, size, eps, weight_offset,
            HAS_RESIDUAL=residual is not None, **tile.options(),
        )  # fmt: skip
    return y, residual_out, rstd


def rms_norm_bwd(
    dy: Tensor,
    dresidual_out: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_offset: float,
    weight_grad: bool,
    *,
    held: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator of that name; `held` as above."""
    dy, h, weight = dy.contiguous(), h.contiguous(), weight.contiguous()
    dresidual_out = dresidual_out if dresidual_out is None else dresidual_out.contiguous()
    size, rows = h.shape[-1], h.shape[:-1].numel()
    if not (holds_row(size) if held is None else held):
        return wide_norm_bwd(dy, dresidual_out, h, weight, None, rstd, weight_offset, weight_grad, False)[:2]
    dx = torch.empty_like(h)
    tile = row_tile(size)
    programs = num_programs(h, rows, tile.BLOCK_M)
    dweight_partial = partial_sums(h, programs, weight_grad)
    if size:  # With no rows the kernel still writes dweight's zeros.
        _rms_norm_bwd_kernel[(programs,)](
            dy, dresidual_out, h, weight, rstd, dx, dweight_partial, rows, size, weight_offset,
            HAS_RESIDUAL=dresidual_out is not None, WEIGHT_GRAD=weight_grad, **tile.options(),
        )  # fmt: skip
    return dx, total(dweight_partial, weight, weight_grad)
