"""Linear cross-entropy: operators, autograd Function and public function."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels._library import define, implement_with_python
from memkernels.ops.checks import check_floating, check_same_device, check_shape
from memkernels.ops.linear_cross_entropy import tiles
from memkernels.ops.linear_cross_entropy.reference import reduce, shifted

REDUCTIONS = ("mean", "sum", "none")


def _fwd_fake(x, weight, bias, target, ignore_index, softcap, label_smoothing, z_loss):
    losses = x.new_empty(target.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    return losses, losses.new_empty(target.numel())


def _bwd_fake(grad_losses, x, weight, bias, target, lse, ignore_index, softcap, label_smoothing, z_loss,
              x_grad, weight_grad, bias_grad):  # fmt: skip
    dx = x.new_empty(x.shape if x_grad else 0)
    return (
        dx,
        weight.new_empty(weight.shape if weight_grad else 0),
        weight.new_empty(weight.shape[:1] if bias_grad else 0),
    )


def _no_output(*args):
    return None


define(
    "cross_entropy_stats(Tensor logits, Tensor target, int vocab_start, int vocab_size, int ignore_index,"
    " float softcap, Tensor(a!) row_max, Tensor(b!) row_sum, Tensor(c!) target_logit, Tensor(d!) logit_sum) -> ()",
    _no_output,
)
define(
    "cross_entropy_grad_(Tensor(a!) logits, Tensor target, int vocab_start, int vocab_size, Tensor lse,"
    " Tensor grad_loss, int ignore_index, float softcap, float label_smoothing, float z_loss) -> ()",
    _no_output,
)
define(
    "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, float softcap,"
    " float label_smoothing, float z_loss) -> (Tensor losses, Tensor lse)",
    _fwd_fake,
)
define(
    "linear_cross_entropy_bwd(Tensor grad_losses, Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor lse,"
    " int ignore_index, float softcap, float label_smoothing, float z_loss, bool x_grad, bool weight_grad,"
    " bool bias_grad) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _bwd_fake,
)
implement_with_python("linear_cross_entropy_fwd", tiles.linear_cross_entropy_fwd)
implement_with_python("linear_cross_entropy_bwd", tiles.linear_cross_entropy_bwd)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, target, *options):
        losses, lse = torch.ops.memkernels.linear_cross_entropy_fwd(x, weight, bias, target, *options)
        ctx.options = options
        ctx.save_for_backward(x, weight, bias, target, lse)
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        wanted = ctx.needs_input_grad[:3]
        grads = torch.ops.memkernels.linear_cross_entropy_bwd(grad_losses, *ctx.saved_tensors, *ctx.options, *wanted)
        dx, dweight, dbias = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return dx, dweight, dbias, None, *(None for _ in ctx.options)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    shift: bool = False,
) -> Tensor:
    """Cross-entropy of a linear layer's logits, which exist only one tile of the vocabulary at a time.

    logits = x weight^T + bias; z = softcap * tanh(logits / softcap) with `softcap`, else logits; lse = log(sum exp(z));
    loss of a token = lse - (1 - s) * z[target] - s / V * sum(z) + z_loss * lse^2 with s = label_smoothing.
    A tile's logits are rounded to x's dtype, as those of `torch.nn.functional.linear` are; the rest is float32. Under
    autocast x, weight and bias are cast as that function casts them.

    Args:
        x: (..., d); float32, bfloat16 or float16 (float64 is computed by plain PyTorch, tile by tile).
        weight: (V, d), x's dtype.
        target: (...), int64: the label of each token, in [0, V), or ignore_index.
        bias: (V,), x's dtype.
        ignore_index: the label of a token that has no loss and no gradient.
        reduction: "mean": the sum over tokens divided by their number, ignored ones left out (all ignored: NaN, as
            `torch.nn.functional.cross_entropy`), or by num_items; "sum"; "none": the loss of each token.
        num_items: what "mean" divides by, a number or a tensor of one. For gradient accumulation: the tokens of all
            micro-batches that are not ignored, so that the sum of the micro-batches' losses is the mean of the batch.
        softcap: the largest magnitude of z; positive.
        label_smoothing: in [0, 1].
        z_loss: weight of lse^2, which keeps the normaliser near 1 (de Brebisson and Vincent 2016, arXiv 1604.08859).
        shift: token t predicts target t + 1 along the last dimension of target; its last token counts as ignored. x is
            not copied.

    Returns:
        float32 (float64 for float64): a scalar, or with "none" target's shape, 0 where ignored.

    Raises:
        TypeError: a dtype other than those above.
        ValueError: a shape, device, reduction or option that does not fit.
        IndexError: on CPU, a label out of range; on a GPU a device-side assertion, without a synchronisation.

    Saved for backward: x, weight, bias, target (with `shift` a shifted copy, 8 bytes per token) and lse, 4 bytes per
    token. Backward recomputes the logits: one GEMM more than the three that keep them.
    """
    _check(x, weight, target, bias, reduction, num_items, softcap, label_smoothing, shift)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check_one_dtype(x, weight, bias)
    if shift:
        target = shifted(target, ignore_index)
    losses = _LinearCrossEntropy.apply(
        x, weight, bias, target, ignore_index, float(softcap or 0.0), float(label_smoothing), float(z_loss)
    )
    return reduce(losses, target, ignore_index, reduction, num_items)


def _check(x, weight, target, bias, reduction, num_items, softcap, label_smoothing, shift) -> None:
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar.")
    check_floating("weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: expected shape (V, {x.shape[-1]}), V > 0, got {tuple(weight.shape)}.")
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError(f"target: expected an int64 tensor, got {getattr(target, 'dtype', type(target).__name__)}.")
    check_shape("target", target, x.shape[:-1], "the leading dimensions of x")
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (weight.shape[0],), "the rows of weight")
    check_same_device("x", x, weight=weight, target=target, bias=bias)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}.")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: it is what reduction='mean' divides by, got it with {reduction!r}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}.")
    if shift and target.dim() == 0:
        raise ValueError("shift: expected a target of at least one dimension, got a scalar.")


def _check_one_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype}, as x, got {tensor.dtype}.")
