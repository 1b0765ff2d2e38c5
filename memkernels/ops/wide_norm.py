"""RMS norm and layer norm on GPUs of rows too wide for a Triton program: which kernels compute them, and operators.

A block of `wide_norm_fwd` and `wide_norm_bwd` (csrc/cuda/wide_norm.cuh) holds a row of up to 16,384 elements and reads
it once. Wider rows, and GPUs without the library of CUDA C++, take the kernels of `wide_norm_triton.py`, which read it
twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels._library import define, has_kernel

WIDEST_HELD = 16384
_ALTERNATIVE = "rms_norm's and layer_norm's other kernels"


def _fwd_fake(x, residual, weight, bias, eps, weight_offset, centred, blocks):
    rows = x.shape[:-1].numel()
    mean, rstd = (x.new_empty(count, dtype=torch.float32) for count in (rows if centred else 0, rows))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), mean, rstd


def _bwd_fake(dy, dresidual_out, h, weight, mean, rstd, weight_offset, weight_grad, bias_grad, blocks):
    dweight, dbias = (
        h.new_empty((blocks if wanted else 0, h.shape[-1]), dtype=torch.float32) for wanted in (weight_grad, bias_grad)
    )
    return h.new_empty(h.shape), dweight, dbias


define(
    "wide_norm_fwd(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, float weight_offset,"
    " bool centred, int blocks) -> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)",
    _fwd_fake,
    alternative=_ALTERNATIVE,
)
define(
    "wide_norm_bwd(Tensor dy, Tensor? dresidual_out, Tensor h, Tensor weight, Tensor? mean, Tensor rstd,"
    " float weight_offset, bool weight_grad, bool bias_grad, int blocks)"
    " -> (Tensor dx, Tensor dweight_partial, Tensor dbias_partial)",
    _bwd_fake,
    alternative=_ALTERNATIVE,
)


def _holds(operator: str, x: Tensor) -> bool:
    return x.shape[-1] <= WIDEST_HELD and has_kernel(operator, x)


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
    from memkernels.ops import launch, wide_norm_triton  # they import Triton

    if not _holds("wide_norm_fwd", x):
        return wide_norm_triton.wide_norm_fwd(x, residual, weight, bias, eps, weight_offset, centred=centred)
    blocks = launch.num_programs(x, x.shape[:-1].numel(), 1)
    return torch.ops.memkernels.wide_norm_fwd(x, residual, weight, bias, eps, weight_offset, centred, blocks)


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
    """dx and, empty where not wanted, dweight and dbias; inputs contiguous, mean None where it is not centred."""
    from memkernels.ops import launch, wide_norm_triton

    wanted = (weight_grad, bias_grad)
    if not _holds("wide_norm_bwd", h):
        return wide_norm_triton.wide_norm_bwd(dy, dresidual_out, h, weight, mean, rstd, weight_offset, *wanted)
    # A block takes all registers of a multiprocessor.
    blocks = launch.num_programs(h, h.shape[:-1].numel(), 1, per_multiprocessor=1)
    dx, *partial = torch.ops.memkernels.wide_norm_bwd(
        dy, dresidual_out, h, weight, mean, rstd, weight_offset, *wanted, blocks
    )
    dweight, dbias = (
        sums.sum(0).to(weight.dtype) if of else weight.new_empty(0) for sums, of in zip(partial, wanted, strict=True)
    )
    return dx, dweight, dbias
