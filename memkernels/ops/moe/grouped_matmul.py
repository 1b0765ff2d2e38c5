"""Products of groups of rows, each by its expert's matrix: operators, autograd Function and public function."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from memkernels._library import define, has_kernel, implement_with_python
from memkernels.ops.checks import check_floating, check_same_device
from memkernels.ops.moe import reference
from memkernels.ops.moe.dispatch import check_grouped
from memkernels.ops.moe.plan import DispatchPlan
from memkernels.ops.projection import as_right_operand

BACKENDS = ("auto", "loop", "grouped_mm")


def _product_fake(x, rows, weights, offsets, num_rows, grouped_mm):
    return x.new_empty(num_rows, weights.shape[2])


def _weight_grad_fake(dy, dy_rows, x, x_rows, offsets, grouped_mm):
    return x.new_empty(offsets.shape[0] - 1, dy.shape[1], x.shape[1])


def _product(
    x: Tensor, rows: Tensor | None, weights: Tensor, offsets: Tensor, num_rows: int, grouped_mm: bool
) -> Tensor:
    if grouped_mm:
        y = F.grouped_mm(_all_rows(x, rows), weights, offs=offsets[1:])
        beyond = torch.arange(num_rows, device=x.device) >= offsets[-1]
        return y.masked_fill_(beyond[:, None], 0.0)
    y = x.new_empty(num_rows, weights.shape[2])
    end = 0
    for weight, group in zip(weights, _groups(offsets), strict=True):
        if group.stop > group.start:
            torch.mm(_rows(x, rows, group), as_right_operand(weight), out=y[group])
        end = group.stop
    y[end:].zero_()
    return y


def _weight_grad(
    dy: Tensor, dy_rows: Tensor | None, x: Tensor, x_rows: Tensor | None, offsets: Tensor, grouped_mm: bool
) -> Tensor:
    if grouped_mm:
        dweights = F.grouped_mm(_all_rows(dy, dy_rows).t(), _all_rows(x, x_rows), offs=offsets[1:])
        return dweights.masked_fill_((offsets.diff() == 0)[:, None, None], 0.0)
    dweights = x.new_empty(offsets.shape[0] - 1, dy.shape[1], x.shape[1])
    for dweight, group in zip(dweights, _groups(offsets), strict=True):
        if group.stop > group.start:
            torch.mm(_rows(dy, dy_rows, group).t(), _rows(x, x_rows, group), out=dweight)
        else:
            dweight.zero_()
    return dweights


def _groups(offsets: Tensor) -> Iterator[slice]:
    return (slice(begin, end) for begin, end in pairwise(offsets.tolist()))


def _rows(x: Tensor, rows: Tensor | None, group: slice) -> Tensor:
    return x[group] if rows is None else x.index_select(0, rows[group])


def _all_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Contiguous, as `grouped_mm` wants them; rows that belong to no group are any of x's."""
    return x.contiguous() if rows is None or not x.shape[0] else x.index_select(0, rows.clamp(min=0))


# y[r] = x[rows[r]] weights[e] for the rows r of group e, x[r] without `rows`; zero beyond the last group. weights are
# (E, in, out), of any strides. grouped_mm: by torch.nn.functional.grouped_mm, whose groups the host need not know.
define(
    "grouped_product(Tensor x, Tensor? rows, Tensor weights, Tensor offsets, SymInt num_rows, bool grouped_mm)"
    " -> Tensor",
    _product_fake,
)
# dweights[e] = sum over the rows r of group e of dy[dy_rows[r]]^T x[x_rows[r]], (E, out, in)
define(
    "grouped_weight_grad(Tensor dy, Tensor? dy_rows, Tensor x, Tensor? x_rows, Tensor offsets, bool grouped_mm)"
    " -> Tensor",
    _weight_grad_fake,
)
implement_with_python("grouped_product", _product)
implement_with_python("grouped_weight_grad", _weight_grad)


def takes_grouped_mm(backend: str, x: Tensor, *sizes: int) -> bool:
    """Whether products of x's dtype go by `grouped_mm`; "auto": where it has a kernel.

    That is on CUDA in bfloat16, with rows of all `sizes`, in elements, multiples of 16 bytes.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}.")
    fits = x.is_cuda and x.dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes)
    return backend == "grouped_mm" or (backend == "auto" and fits)


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_grouped, weights, offsets, grouped_mm):
        ctx.grouped_mm = grouped_mm
        x_needed, weights_needed = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x_grouped if weights_needed else None, weights if x_needed else None, offsets)
        return torch.ops.memkernels.grouped_product(
            x_grouped, None, weights.transpose(1, 2), offsets, x_grouped.shape[0], grouped_mm
        )

    @staticmethod
    def backward(ctx, dy):
        x_grouped, weights, offsets = ctx.saved_tensors
        dx = dweights = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.memkernels.grouped_product(dy, None, weights, offsets, dy.shape[0], ctx.grouped_mm)
        if ctx.needs_input_grad[1]:
            dweights = torch.ops.memkernels.grouped_weight_grad(dy, None, x_grouped, None, offsets, ctx.grouped_mm)
        return dx, dweights, None, None


def check_expert_weights(name: str, weights: Tensor, x_name: str, x: Tensor, plan: DispatchPlan) -> None:
    """(E, out, in) of a plan's E experts, for x's last dimension, on its device."""
    check_floating(name, weights)
    if weights.dim() != 3 or weights.shape[0] != plan.num_experts or weights.shape[2] != x.shape[1]:
        raise ValueError(
            f"{name}: expected shape ({plan.num_experts}, out, {x.shape[1]}) (experts, out, the last dimension of"
            f" {x_name}), got {tuple(weights.shape)}."
        )
    check_same_device(x_name, x, **{name: weights})


def grouped_matmul(x_grouped: Tensor, weights: Tensor, plan: DispatchPlan, *, backend: str = "auto") -> Tensor:
    """Multiplies each expert's rows by its weight, with no padding of groups to a capacity.

    y[r] = x_grouped[r] weights[e]^T for the rows r of expert e.

    Args:
        x_grouped: (R, in); float32, bfloat16 or float16 (float64 is computed by the reference).
        weights: (E, out, in), x_grouped's dtype.
        plan: that of the dispatch.
        backend: "loop": a product an expert, which asks the device for the groups. "grouped_mm":
            `torch.nn.functional.grouped_mm`, for rows of multiples of 16 bytes. "auto": the latter on CUDA in bfloat16
            where the rows fit, else the former.

    Returns:
        y, (R, out); rows that belong to no expert are zero.

    Raises:
        TypeError: a dtype other than those above, or that of weights is not x_grouped's.
        ValueError: a shape, device or backend that does not fit.

    Saved for backward: x_grouped where weights need a gradient, weights where x_grouped does, and offsets.
    """
    check_grouped("x_grouped", x_grouped, plan)
    check_expert_weights("weights", weights, "x_grouped", x_grouped, plan)
    if weights.dtype != x_grouped.dtype:
        raise TypeError(f"weights: expected {x_grouped.dtype}, as x_grouped, got {weights.dtype}.")
    grouped_mm = takes_grouped_mm(backend, x_grouped, *weights.shape[1:])
    if not has_kernel("moe_dispatch", x_grouped):
        return reference.grouped_matmul(x_grouped, weights, plan.offsets)
    return _GroupedMatmul.apply(x_grouped, weights, plan.offsets, grouped_mm)
