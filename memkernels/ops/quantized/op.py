"""A linear layer with a quantised weight: autograd Function and public function."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels.ops.autocast import as_product_dtype, product_dtype, without_autocast
from memkernels.ops.checks import check_floating, check_same_device, check_shape
from memkernels.ops.gradient_sum import gradient_sums, results
from memkernels.ops.once_differentiable import once_differentiable
from memkernels.ops.quantized.projection import QuantizedProjection
from memkernels.ops.quantized.tensor import QuantizedTensor, check_frozen


class _QuantizedLinear(torch.autograd.Function):
    """Saves the parts of the weight."""

    @staticmethod
    def forward(ctx, description, x, *tensors):
        ctx.description = description
        ctx.save_for_backward(*tensors)
        with without_autocast(x):
            y = description.bind(tensors).forward(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        tensors = ctx.saved_tensors
        dx_needed, *needed = ctx.needs_input_grad[1:]
        projection = ctx.description.bind(tensors)
        rows = dy.reshape(-1, dy.shape[-1])
        with without_autocast(dy):
            sums = gradient_sums(tensors, needed)
            projection.add_gradients(rows, rows, sums)
            dx = projection.input_grad(rows).view(*dy.shape[:-1], projection.encoding.row_size) if dx_needed else None
        return None, dx, *results(sums)


def quantized_linear(input: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """y = input weight^T + bias with a frozen weight that is dequantised a tile at a time, in forward and in backward.

    It is what `torch.nn.functional.linear` calls for such a weight. Under autocast input and bias are cast as it casts
    them, and the weight's values come in autocast's dtype.

    Args:
        input: (..., K); float32, bfloat16, float16 or float64.
        weight: (N, K), of input's dtype.
        bias: (N,), input's dtype.

    Returns:
        y, (..., N), of input's dtype (under autocast, of autocast's).

    Raises:
        TypeError: a dtype other than those above.
        ValueError: a shape or device that does not fit; a weight that requires a gradient.

    Saved for backward: nothing of input; the stored weight.
    """
    x = input
    check_floating("input", x)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (N, K), got {tuple(weight.shape)}.")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input: expected shape (..., {weight.shape[1]}), that of weight's rows, got {tuple(x.shape)}."
        )
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (weight.shape[0],), "weight's rows")
    check_same_device("input", x, weight=weight, bias=bias)
    dtype = product_dtype(x)
    cast = as_product_dtype(x, dtype, weight=weight, bias=bias)
    projection = quantized_projection(cast["weight"], cast["bias"])
    return _QuantizedLinear.apply(projection.description, x.to(dtype), *projection.tensors)


def quantized_projection(weight: QuantizedTensor, bias: Tensor | None) -> QuantizedProjection:
    check_frozen(weight)
    return QuantizedProjection(weight.encoding, weight.parts, bias)
