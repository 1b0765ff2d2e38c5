"""A linear layer with a low-rank adapter: autograd Function and public function."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels.ops.autocast import as_product_dtype, product_dtype, without_autocast
from memkernels.ops.checks import check_floating, check_same_device, check_shape
from memkernels.ops.distinct import distinct
from memkernels.ops.gradient_sum import gradient_sums, results
from memkernels.ops.lora_linear.weight import LoRAWeight
from memkernels.ops.once_differentiable import once_differentiable


class _LoRALinear(torch.autograd.Function):
    """Saves of x (..., K) and s what the wanted gradients need, and the parameters."""

    @staticmethod
    def forward(ctx, description, x, *tensors):
        projection = description.bind(tensors)
        with without_autocast(x):
            rows = x.reshape(-1, x.shape[-1])
            s = projection.down(rows)
            y = projection.up(rows, s)
        wanted = description.named(ctx.needs_input_grad[2:])
        x_needed = wanted.weight or wanted.lora_a or wanted.out_scale
        s_needed = wanted.lora_b or wanted.out_scale
        ctx.description, ctx.x_shape = description, x.shape
        ctx.save_for_backward(x if x_needed else None, s if s_needed else None, *tensors)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, s, *tensors = ctx.saved_tensors
        dx_needed, *needed = ctx.needs_input_grad[1:]
        with without_autocast(dy):
            sums = gradient_sums(tensors, needed)
            rows = None if x is None else x.reshape(-1, x.shape[-1])
            projection = ctx.description.bind(tensors)
            dx = projection.backward(dy.reshape(-1, dy.shape[-1]), rows, s, sums, dx_needed)
        return None, None if dx is None else dx.view(ctx.x_shape), *results(sums)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    magnitude: Tensor | None = None,
    row_squares: Tensor | None = None,
) -> Tensor:
    """A linear layer with a low-rank adapter whose dropout mask is made anew in backward and never stored.

    y = x W^T + bias + s (m * x) A^T B^T, with m a dropout mask over its keep probability. With magnitude, DoRA:
    y = x W^T + bias + (g - 1) * ((m * x) W^T) + g * s (m * x) A^T B^T with g = magnitude / the norms of the rows of
    W + s B A, which backward takes for constants. Hu et al. 2021, arXiv 2106.09685; Liu et al. 2024, arXiv 2402.09353.
    Under autocast x, W, A, B and bias are cast as `torch.nn.functional.linear` casts them.

    Args:
        x: (..., K); float32, bfloat16, float16 or float64.
        weight: W, (N, K), x's dtype; frozen or not.
        lora_a: A, (r, K), x's dtype or float32; any r from 1 up.
        lora_b: B, (N, r), A's dtype. In float32 the adapter computes in float32, as PEFT's does.
        scaling: s, a finite number: alpha / r, or alpha / sqrt(r) for rsLoRA.
        bias: (N,), x's dtype.
        dropout_p: probability with which an element of A's input is dropped, in [0, 1).
        seed: of the mask, an integer or a 0-dim int64 tensor; None: drawn from torch's generator. An element's mask is
            a function of the seed, its row and its column, the same on every device.
        magnitude: (N,), x's dtype or float32.
        row_squares: (N,), from `ops.row_squares`: the squared norms of W's rows, if W is frozen; with magnitude only.

    Returns:
        y, (..., N), of x's dtype (under autocast, of autocast's).

    Raises:
        TypeError: a dtype other than those above; a scaling or probability that is no number.
        ValueError: a shape, device, scaling or probability that does not fit.

    Saved for backward, beside the parameters: x, K elements a token, and (m * x) A^T, r elements of A's dtype; with
    dropout its seed, 8 bytes. x only if A, W or magnitude has a gradient, and (m * x) A^T only if B or magnitude has.
    A frozen W costs no product. The gradient of magnitude recomputes the products of forward, a tile of tokens at a
    time. Every sum has a fixed order: the same inputs give the same gradients. Backward holds beside its results r
    elements a token and a tile of tokens; by Triton, in the place of the tile, at most 768 r bytes a multiprocessor, or
    where p and dB come from one read of dy, up to r = 32 (float32: 16), 1536 r, dB in float32 and 24 MiB.
    """
    adapted = LoRAWeight(weight, lora_a, lora_b, scaling, dropout_p, seed, magnitude, row_squares)
    return adapted_linear(x, adapted, bias)


def adapted_linear(x: Tensor, adapted: LoRAWeight, bias: Tensor | None) -> Tensor:
    """`lora_linear` of an adapted weight."""
    weight = adapted.weight
    check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected shape (..., {weight.shape[1]}), that of weight's rows, got {tuple(x.shape)}.")
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (weight.shape[0],), "weight's rows")
    check_same_device("x", x, weight=weight, bias=bias)
    dtype = product_dtype(x)
    bias = as_product_dtype(x, dtype, bias=bias)["bias"]
    projection = adapted.as_product_dtype("weight", x, dtype).projection(bias)
    return _LoRALinear.apply(projection.description, *distinct(x.to(dtype), *projection.tensors))
