"""Layer norm: operators, autograd Function and public function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memkernels._library import define, has_kernel, implement_with_triton
from memkernels.ops.checks import check_eps, check_floating, check_like, check_parameter
from memkernels.ops.distinct import distinct
from memkernels.ops.layer_norm import reference
from memkernels.ops.once_differentiable import once_differentiable


def _fwd_fake(x, residual, weight, bias, eps):
    rows = math.prod(x.shape[:-1])
    residual_out = x.new_empty(0 if residual is None else x.shape)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), residual_out, mean, rstd


def _bwd_fake(dy, dresidual_out, h, weight, mean, rstd, weight_grad, bias_grad):
    dweight, dbias = (weight.new_empty(weight.shape if wanted else 0) for wanted in (weight_grad, bias_grad))
    return h.new_empty(h.shape), dweight, dbias


define(
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)",
    _fwd_fake,
)
define(
    "layer_norm_bwd(Tensor dy, Tensor? dresidual_out, Tensor h, Tensor weight, Tensor mean, Tensor rstd,"
    " bool weight_grad, bool bias_grad) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _bwd_fake,
)
implement_with_triton("memkernels.ops.layer_norm.triton", "layer_norm_fwd", "layer_norm_bwd")


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):
        y, residual_out, mean, rstd = torch.ops.memkernels.layer_norm_fwd(x, residual, weight, bias, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else residual_out, weight, mean, rstd)
        return (y, None) if residual is None else (y, residual_out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dresidual_out):
        h, weight, mean, rstd = ctx.saved_tensors
        x_grad, residual_grad, weight_grad, bias_grad = ctx.needs_input_grad[:4]
        if dy is None:
            return dresidual_out if x_grad else None, dresidual_out if residual_grad else None, None, None, None
        dh, dweight, dbias = torch.ops.memkernels.layer_norm_bwd(
            dy, dresidual_out, h, weight, mean, rstd, weight_grad, bias_grad
        )
        return (
            dh if x_grad else None,
            dh if residual_grad else None,
            dweight if weight_grad else None,
            dbias if bias_grad else None,
            None,
        )


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm over the last dimension, with an optional residual added in the same pass.

    h = x + residual (x without one), y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias, computed in float32 and
    rounded once, under autocast too; var is the biased variance, of which a large mean costs no digits. Ba, Kiros and
    Hinton 2016, arXiv 1607.06450.

    Args:
        x: (..., d); float32, bfloat16 or float16 (float64 is computed by the reference).
        weight: (d,); x's dtype or float32.
        bias: (d,); weight's dtype.
        eps: added to the variance.
        residual: like x; adds h to what is returned.

    Returns:
        y, like x; with `residual` the pair (y, h).

    Raises:
        TypeError: a dtype other than those above, or an eps that is no number.
        ValueError: a shape or device that does not fit x; a negative or infinite eps.

    Saved for backward: h (x itself without residual: no copy), weight, and mean and rstd, 8 bytes per row.
    """
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar.")
    check_parameter("weight", weight, x, (x.shape[-1],), "the last dimension of x")
    if bias is not None:
        check_like("bias", bias, "weight", weight)
    if residual is not None:
        check_like("residual", residual, "x", x)
    check_eps("eps", eps)
    if not has_kernel("layer_norm_fwd", x):
        return reference.layer_norm(x, weight, bias, eps, residual=residual)
    y, residual_out = _LayerNorm.apply(*distinct(x, residual, weight, bias), float(eps))
    return y if residual is None else (y, residual_out)
