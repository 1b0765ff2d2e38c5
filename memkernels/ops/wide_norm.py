"""RMS norm and layer norm on GPUs of rows too wide for a Triton program: which kernels compute them, and operators.

A block of `wide_norm_fwd` and `wide_norm_bwd` (csrc/cuda/wide_norm.cuh) holds 16,384 elements of a row, a team of
blocks a longer row, which so is read once. GPUs without the library of CUDA C++ take the kernels of
`wide_norm_triton.py`, which read it twice, and so do rows that no team holds; but in forward a Triton program holds
twice as wide a row as in backward (docs/design/wide_norms.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels._library import define, has_kernel
from memkernels.ops.partial_sums import total

HELD_BY_BLOCK = 16384
MOST_BLOCKS = 32  # of a team
_ALTERNATIVE = "rms_norm's and layer_norm's other kernels"


def _fwd_fake(x, residual, weight, bias, eps, weight_offset, centred, teams):
    rows = x.shape[:-1].numel()
    mean, rstd = (x.new_empty(count, dtype=torch.float32) for count in (rows if centred else 0, rows))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), mean, rstd


def _bwd_fake(dy, dresidual_out, h, weight, mean, rstd, weight_offset, weight_grad, bias_grad, teams):
    dweight, dbias = (
        h.new_empty((teams if wanted else 0, h.shape[-1]), dtype=torch.float32) for wanted in (weight_grad, bias_grad)
    )
    return h.new_empty(h.shape), dweight, dbias


define(
    "wide_norm_fwd(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, float weight_offset,"
    " bool centred, int teams) -> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)",
    _fwd_fake,
    alternative=_ALTERNATIVE,
)
define(
    "wide_norm_bwd(Tensor dy, Tensor? dresidual_out, Tensor h, Tensor weight, Tensor? mean, Tensor rstd,"
    " float weight_offset, bool weight_grad, bool bias_grad, int teams)"
    " -> (Tensor dx, Tensor dweight_partial, Tensor dbias_partial)",
    _bwd_fake,
    alternative=_ALTERNATIVE,
)


def _teams(operator: str, rows: Tensor, per_multiprocessor: int) -> int:
    """How many rows the operator computes at once; 0 where it does not.

    A team of several blocks waits for each of them, so that all blocks are on the GPU together, one a multiprocessor.
    """
    from memkernels.ops import launch  # imports Triton

    blocks = -(-rows.shape[-1] // HELD_BY_BLOCK)
    if blocks > MOST_BLOCKS or not has_kernel(operator, rows):
        return 0
    at_once = launch.multiprocessors(rows) * (per_multiprocessor if blocks == 1 else 1)
    return min(max(rows.shape[:-1].numel(), 1), at_once // blocks)


def holds_row_in_forward(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a Triton program holds a row of x: one that only it and the CUDA C++ kernel could is the latter's.

    Beside a weight it holds twice as wide a row as in backward; beside a bias too one of 16 bits on NVIDIA's.
    """
    from memkernels.ops import launch  # imports Triton

    room = bias is None or (x.element_size() == 2 and torch.version.hip is None)
    return launch.holds_row(x.shape[-1], twice=room and not has_kernel("wide_norm_fwd", x))


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
    from memkernels.ops import wide_norm_triton

    teams = _teams("wide_norm_fwd", x, per_multiprocessor=2)
    if not teams:
        return wide_norm_triton.wide_norm_fwd(x, residual, weight, bias, eps, weight_offset, centred=centred)
    return torch.ops.memkernels.wide_norm_fwd(x, residual, weight, bias, eps, weight_offset, centred, teams)


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
    from memkernels.ops import wide_norm_triton

    arguments = (dy, dresidual_out, h, weight, mean, rstd, weight_offset, weight_grad, bias_grad)
    # A block takes all registers of a multiprocessor.
    teams = _teams("wide_norm_bwd", h, per_multiprocessor=1)
    if teams:
        dx, dweight, dbias = torch.ops.memkernels.wide_norm_bwd(*arguments, teams)
    else:
        dx, dweight, dbias = wide_norm_triton.wide_norm_bwd(*arguments)
    return dx, total(dweight, weight, weight_grad), total(dbias, weight, bias_grad)
