"""An embedding with a low-rank adapter: autograd Function and public function."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels.ops.checks import (
    check_dense,
    check_dtype_or_float32,
    check_finite,
    check_floating,
    check_integer,
    check_same_device,
    check_shape,
)
from memkernels.ops.distinct import distinct
from memkernels.ops.lora_embedding import operators as operators  # defines them
from memkernels.ops.lora_linear.norm import adapted_row_norms
from memkernels.ops.once_differentiable import once_differentiable


class _LoRAEmbedding(torch.autograd.Function):
    """Saves the ids alone, beside the parameters: rows of A and W are read again."""

    @staticmethod
    def forward(ctx, scaling, padding_idx, ids, weight, lora_a, lora_b, embed_scale, column_scale):
        ctx.scaling, ctx.padding_idx = scaling, padding_idx
        ctx.save_for_backward(ids, weight, lora_a, lora_b, embed_scale, column_scale)
        return torch.ops.memkernels.lora_embedding_fwd(ids, weight, lora_a, lora_b, scaling, embed_scale, column_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        wanted = [ctx.needs_input_grad[index] for index in (4, 5, 7)]
        ids, weight, lora_a, lora_b, embed_scale, column_scale = ctx.saved_tensors
        da, db, dscale = torch.ops.memkernels.lora_embedding_bwd(
            dy, ids, weight, lora_a, lora_b, ctx.scaling, embed_scale, column_scale, ctx.padding_idx, wanted
        )
        grads = [grad if needed else None for grad, needed in zip((da, db, dscale), wanted, strict=True)]
        return None, None, None, None, grads[0], grads[1], None, grads[2]


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    padding_idx: int | None = None,
    embed_scale: Tensor | None = None,
    magnitude: Tensor | None = None,
    column_squares: Tensor | None = None,
) -> Tensor:
    """Rows of a frozen table with a low-rank adapter, as PEFT's adapters of embeddings compute them.

    y = W[ids] + s A[:, ids]^T B^T, times e where there is an embed_scale. With magnitude, DoRA: times
    g = magnitude / the norms of the columns of W + s A^T B^T besides, which backward takes for constants. The sum is in
    float32 or wider, under autocast too, and rounded once. Hu et al. 2021, arXiv 2106.09685; Liu et al. 2024, arXiv
    2402.09353.

    Args:
        ids: int64 or int32, of any shape; from 0 up and below V.
        weight: W, (V, d); float32, bfloat16, float16 or float64; without gradient.
        lora_a: A, (r, V), weight's dtype or float32; any r from 1 up.
        lora_b: B, (d, r), A's dtype.
        scaling: s, a finite number: alpha / r, or alpha / sqrt(r) for rsLoRA.
        padding_idx: the id whose column of A has no gradient, as `torch.nn.functional.embedding` has it; below V.
        embed_scale: e, of one element: some models' embeddings are scaled.
        magnitude: (d,), weight's dtype or float32.
        column_squares: (d,), from `ops.row_squares(weight.t())`; with magnitude only. None: computed at each call.

    Returns:
        y, (*ids.shape, d), of weight's dtype.

    Raises:
        TypeError: a dtype other than those above; a scaling that is no number.
        ValueError: a shape, device, scaling or padding_idx that does not fit; a weight that is trained.
        IndexError: on CPU, an id that is none of weight's rows.

    Saved for backward, beside the parameters: ids itself, no element of its own. A's gradient sums the r elements of
    each token in float32 or wider, id by id in the tokens' order, and writes the columns of ids that there are once
    each: the same inputs give the same gradients. On a GPU backward waits once, for the number of these ids. It holds
    beside its results r elements a token and a tile of tokens; the gradient of magnitude makes y again, a tile at a
    time.
    """
    _check(ids, weight, lora_a, lora_b, scaling, padding_idx, embed_scale, magnitude, column_squares)
    column_scale = None
    if magnitude is not None:
        column_scale = magnitude / adapted_row_norms(weight.t(), lora_a, lora_b, scaling, column_squares)
    index = -1 if padding_idx is None else int(padding_idx)
    return _LoRAEmbedding.apply(
        float(scaling), index, *distinct(ids, weight, lora_a, lora_b, embed_scale, column_scale)
    )


def _check(ids, weight, lora_a, lora_b, scaling, padding_idx, embed_scale, magnitude, column_squares) -> None:
    check_dense("ids", ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids: expected int64 or int32, got {ids.dtype}.")
    check_floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (V, d), got {tuple(weight.shape)}.")
    if weight.requires_grad:
        raise ValueError("weight: expected a frozen one under an adapter, got one that requires a gradient.")
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
        check_floating(name, tensor)
    if lora_a.dim() != 2 or lora_a.shape[0] == 0 or lora_a.shape[1] != weight.shape[0]:
        raise ValueError(
            f"lora_a: expected shape (r, {weight.shape[0]}), r > 0, a column for each row of weight, got"
            f" {tuple(lora_a.shape)}."
        )
    check_shape("lora_b", lora_b, (weight.shape[1], lora_a.shape[0]), "weight's columns and lora_a's rows")
    check_dtype_or_float32("lora_a", lora_a, weight.dtype, "weight")
    if lora_b.dtype != lora_a.dtype:
        raise TypeError(f"lora_b: expected {lora_a.dtype}, as lora_a, got {lora_b.dtype}.")
    check_finite("scaling", scaling)
    if padding_idx is not None:
        check_integer("padding_idx", padding_idx, f"an integer from 0 up and below {weight.shape[0]}, or None", 0)
        if padding_idx >= weight.shape[0]:
            raise ValueError(f"padding_idx: expected a number below {weight.shape[0]}, got {padding_idx}.")
    if embed_scale is not None:
        check_floating("embed_scale", embed_scale)
        if embed_scale.numel() != 1 or embed_scale.requires_grad:
            raise ValueError(f"embed_scale: expected one element, frozen, got shape {tuple(embed_scale.shape)}.")
    for name, tensor in (("magnitude", magnitude), ("column_squares", column_squares)):
        if tensor is not None:
            check_floating(name, tensor)
            check_shape(name, tensor, (weight.shape[1],), "weight's columns")
    if magnitude is not None:
        check_dtype_or_float32("magnitude", magnitude, weight.dtype, "weight")
    elif column_squares is not None:
        raise ValueError("column_squares: expected None without magnitude, got a tensor.")
    check_same_device(
        "weight", weight, ids=ids, lora_a=lora_a, lora_b=lora_b, embed_scale=embed_scale, magnitude=magnitude,
        column_squares=column_squares,
    )  # fmt: skip
