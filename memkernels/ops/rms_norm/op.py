"""RMS norm: operators, autograd Function and public function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memkernels._library import define, has_kernel, implement_with_triton
from memkernels.ops.checks import check_eps, check_finite, check_floating, check_like, check_parameter
from memkernels.ops.distinct import distinct
from memkernels.ops.once_differentiable import once_differentiable
from memkernels.ops.rms_norm import reference


def _fwd_fake(x, residual, weight, eps, weight_offset):
    y = x.new_empty(x.shape)
    residual_out = x.new_empty(0 if residual is None else x.shape)
    return y, residual_out, x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)


def _bwd_fake(dy, dresidual_out, h, weight, rstd, weight_offset, weight_grad):
    return h.new_empty(h.shape), weight.new_empty(weight.shape if weight_grad else 0)


define(
    "rms_norm_fwd(Tensor x, Tensor? residual, Tensor weight, float eps, float weight_offset)"
    " -> (Tensor y, Tensor residual_out, Tensor rstd)",
    _fwd_fake,
)
define(
    "rms_norm_bwd(Tensor dy, Tensor? dresidual_out, Tensor h, Tensor weight, Tensor rstd, float weight_offset,"
    " bool weight_grad) -> (Tensor dx, Tensor dweight)",
    _bwd_fake,
)
implement_with_triton("memkernels.ops.rms_norm.triton", "rms_norm_fwd", "rms_norm_bwd")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, weight_offset):
        y, residual_out, rstd = torch.ops.memkernels.rms_norm_fwd(x, residual, weight, eps, weight_offset)
        ctx.weight_offset = weight_offset
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else residual_out, weight, rstd)
        return (y, None) if residual is None else (y, residual_out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dresidual_out):
        h, weight, rstd = ctx.saved_tensors
        x_grad, residual_grad, weight_grad = ctx.needs_input_grad[:3]
        if dy is None:
            return dresidual_out if x_grad else None, dresidual_out if residual_grad else None, None, None, None
        dh, dweight = torch.ops.memkernels.rms_norm_bwd(
            dy, dresidual_out, h, weight, rstd, ctx.weight_offset, weight_grad
        )
        return dh if x_grad else None, dh if residual_grad else None, dweight if weight_grad else None, None, None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None, weight_offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm over the last dimension, with an optional residual added in the same pass.

    h = x + residual (x without one), y = h / sqrt(mean(h^2) + eps) * (weight + weight_offset), computed in float32 and
    rounded once, under autocast too. Zhang and Sennrich 2019, arXiv 1910.07467; weight_offset = 1 is Gemma's form.

    Args:
        x: (..., d); float32, bfloat16 or float16 (float64 is computed by the reference).
        weight: (d,); x's dtype or float32.
        eps: added to the mean of squares.
        residual: like x; adds h to what is returned.
        weight_offset: added to the weight.

    Returns:
        y, like x; with `residual` the pair (y, h).

    Raises:
        TypeError: a dtype other than those above, or an eps or weight_offset that is no number.
        ValueError: a shape or device that does not fit x; a negative or infinite eps, an infinite weight_offset.

    Saved for backward: h (x itself without residual: no copy), weight, and rstd, 4 bytes per row.
    """
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar.")
    check_parameter("weight", weight, x, (x.shape[-1],), "the last dimension of x")
    if residual is not None:
        check_like("residual", residual, "x", x)
    check_eps("eps", eps)
    check_finite("weight_offset", weight_offset)
    if not has_kernel("rms_norm_fwd", x):
        return reference.rms_norm(x, weight, eps, residual=residual, weight_offset=weight_offset)
    y, residual_out = _RMSNorm.apply(*distinct(x, residual, weight), float(eps), float(weight_offset))
    return y if residual is None else (y, residual_out)
