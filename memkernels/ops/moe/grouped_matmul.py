"""Products of groups of rows, each by its expert's matrix: autograd Function and public function."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels._library import has_kernel
from memkernels.ops.autocast import product_dtype, without_autocast
from memkernels.ops.distinct import distinct
from memkernels.ops.gradient_sum import gradient_sums, results
from memkernels.ops.moe import reference
from memkernels.ops.moe.dispatch import check_grouped
from memkernels.ops.moe.plan import DispatchPlan
from memkernels.ops.moe.projection import Groups
from memkernels.ops.moe.weights import (
    ExpertsWeight,
    as_product_weights,
    check_expert_weights,
    dense_of,
    projection_of,
    select_backend,
    stand_in,
)
from memkernels.ops.once_differentiable import once_differentiable


class _GroupedMatmul(torch.autograd.Function):
    """Saves x_grouped where a weight has a gradient, the offsets and the weights."""

    @staticmethod
    def forward(ctx, description, *arguments):
        ctx.description = description
        x_grouped, offsets, *tensors = arguments
        ctx.save_for_backward(x_grouped if any(ctx.needs_input_grad[3:]) else None, offsets, *tensors)
        with without_autocast(x_grouped):
            return description.bind(tensors).forward(x_grouped, None, Groups(offsets, x_grouped.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x_grouped, offsets, *tensors = ctx.saved_tensors
        projection, groups = ctx.description.bind(tensors), Groups(offsets, dy.shape[0])
        sums = gradient_sums(tensors, ctx.needs_input_grad[3:])
        with without_autocast(dy):
            p = projection.low_rank_grad(dy, None, groups)
            if x_grouped is not None:
                projection.add_gradients(dy, None, x_grouped, None, groups, sums, p)
            dx = projection.input_grad(dy, None, groups, p) if ctx.needs_input_grad[1] else None
        return None, dx, None, *results(sums)


def grouped_matmul(x_grouped: Tensor, weights: ExpertsWeight, plan: DispatchPlan, *, backend: str = "auto") -> Tensor:
    """Multiplies each expert's rows by its weight, with no padding of groups to a capacity.

    y[r] = x_grouped[r] weights[e]^T for the rows r of expert e. Under autocast both are cast as
    `torch.nn.functional.linear` casts them.

    Args:
        x_grouped: (R, in); float32, bfloat16 or float16 (float64 is computed by the reference).
        weights: (E, out, in), x_grouped's dtype; dense, or quantised (`memkernels.quant`) and frozen, of which a tile
            of one expert's is dequantised in front of each product, on GPUs within it; either in an
            `ExpertsLoRAWeight` with an adapter; or a sequence of E dense tensors (out, in).
        plan: that of the dispatch.
        backend: "triton": the kernels for GPUs, which find the groups there; NF4 by blocks of fewer than 64, or of
            matrices whose sides are no multiples of 64, goes as by "loop". "grouped_mm":
            `torch.nn.functional.grouped_mm`, for rows of multiples of 16 bytes. "loop": a product an expert, which asks
            the device for the groups. "auto": the first of these that there is, `grouped_mm` on CUDA in bfloat16 and
            for dense weights alone.

    Returns:
        y, (R, out), of x_grouped's dtype (under autocast, of autocast's); rows that belong to no expert are zero.

    Raises:
        TypeError: a dtype other than those above, or that of weights is not x_grouped's; plan is no `DispatchPlan`.
        ValueError: a shape, device or backend that does not fit; quantised weights that require a gradient.

    Saved for backward: x_grouped where weights need a gradient; weights, as they are stored, and offsets.
    """
    check_grouped("x_grouped", x_grouped, plan)
    check_expert_weights("weights", stand_in("weights", weights), "x_grouped", x_grouped, plan)
    dtype = product_dtype(x_grouped)
    (weights,) = as_product_weights(x_grouped, dtype, weights=weights).values()
    x_grouped = x_grouped.to(dtype)
    backend = select_backend(backend, x_grouped, weights)
    if not has_kernel("moe_dispatch", x_grouped):
        with without_autocast(x_grouped):
            return reference.grouped_matmul(x_grouped, dense_of(weights), plan.offsets)
    projection = projection_of(weights, backend)
    return _GroupedMatmul.apply(projection.description, *distinct(x_grouped, plan.offsets, *projection.tensors))
