"""Linear cross-entropy: operators, autograd Function and public function."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels._library import define, implement_with_python
from memkernels.ops.autocast import check_product_dtype, product_dtype
from memkernels.ops.distinct import distinct
from memkernels.ops.linear_cross_entropy import tiles
from memkernels.ops.linear_cross_entropy.checks import check_num_items, check_options, check_tensors
from memkernels.ops.linear_cross_entropy.head import HEAD, head_arguments
from memkernels.ops.linear_cross_entropy.head_gradients import new_gradient
from memkernels.ops.linear_cross_entropy.reference import reduce, shifted
from memkernels.ops.lora_linear.weight import LoRAWeight
from memkernels.ops.once_differentiable import once_differentiable
from memkernels.ops.weights import Weight, base_of, projection_of


def _fwd_fake(x, tensors, parts, kind, sizes, scaling, dropout_p, target, *options):
    losses = x.new_empty(target.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    return losses, losses.new_empty(target.numel()), losses.new_empty(target.numel())


def _bwd_fake(grad_losses, x, tensors, parts, kind, sizes, scaling, dropout_p, target, row_max, row_sum, ignore_index,
              softcap, label_smoothing, z_loss, wanted):  # fmt: skip
    return tuple(new_gradient(like, x, want) for like, want in zip((x, *tensors[:5]), wanted, strict=True))


define(
    "cross_entropy_stats(Tensor logits, Tensor target, int vocab_start, int vocab_size, int ignore_index,"
    " float softcap, Tensor(a!) row_max, Tensor(b!) row_sum, Tensor(c!) target_logit, Tensor(d!) logit_sum) -> ()"
)
define(
    "cross_entropy_grad_(Tensor(a!) logits, Tensor target, int vocab_start, int vocab_size, Tensor row_max,"
    " Tensor row_sum, Tensor grad_loss, int ignore_index, float softcap, float label_smoothing, float z_loss) -> ()"
)
define(
    f"linear_cross_entropy_fwd(Tensor x, {HEAD}, Tensor target, int ignore_index, float softcap,"
    " float label_smoothing, float z_loss) -> (Tensor losses, Tensor row_max, Tensor row_sum)",
    _fwd_fake,
)
# wanted: of which of x, weight, lora_a, lora_b, bias and out_scale, the others' gradients are empty.
define(
    f"linear_cross_entropy_bwd(Tensor grad_losses, Tensor x, {HEAD}, Tensor target, Tensor row_max, Tensor row_sum,"
    " int ignore_index,"
    " float softcap, float label_smoothing, float z_loss, bool[] wanted)"
    " -> (Tensor dx, Tensor dweight, Tensor dlora_a, Tensor dlora_b, Tensor dbias, Tensor dout_scale)",
    _bwd_fake,
)
implement_with_python("linear_cross_entropy_fwd", tiles.linear_cross_entropy_fwd)
implement_with_python("linear_cross_entropy_bwd", tiles.linear_cross_entropy_bwd)

_NUM_TENSORS = 6  # of `HEAD`, the seed last


class _LinearCrossEntropy(torch.autograd.Function):
    """Saves x, target, each row's maximum and sum, and the parameters: `tensors` of the head, then its parts."""

    @staticmethod
    def forward(ctx, description, options, x, target, *tensors):
        head = (list(tensors[:_NUM_TENSORS]), list(tensors[_NUM_TENSORS:]), *description)
        losses, *row_stats = torch.ops.memkernels.linear_cross_entropy_fwd(x, *head, target, *options)
        ctx.description, ctx.options = description, options
        ctx.save_for_backward(x, target, *row_stats, *tensors)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        x, target, row_max, row_sum, *tensors = ctx.saved_tensors
        head = (tensors[:_NUM_TENSORS], tensors[_NUM_TENSORS:], *ctx.description)
        x_wanted, _, *wanted = ctx.needs_input_grad[2:]
        wanted = [x_wanted, *wanted[: _NUM_TENSORS - 1]]
        grads = torch.ops.memkernels.linear_cross_entropy_bwd(
            grad_losses, x, *head, target, row_max, row_sum, *ctx.options, wanted
        )
        dx, *others = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return None, None, dx, None, *others, *(None for _ in tensors[len(others) :])


def linear_cross_entropy(
    x: Tensor,
    weight: Weight,
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
        weight: (V, d), x's dtype: a tensor, a quantised one (`memkernels.quant`), or an `ops.LoRAWeight` over either.
        target: (...), int64: the label of each token, in [0, V), or ignore_index.
        bias: (V,), x's dtype.
        ignore_index: the label of a token that has no loss and no gradient.
        reduction: "mean": the sum over tokens divided by their number, ignored ones left out (all ignored: NaN, as
            `torch.nn.functional.cross_entropy`), or by num_items; "sum"; "none": the loss of each token.
        num_items: what "mean" divides by, a positive number or a tensor of one on x's device. For gradient
            accumulation: the tokens of all micro-batches that are not ignored, so that the sum of the micro-batches'
            losses is the mean of the batch.
        softcap: the largest magnitude of z; positive.
        label_smoothing: in [0, 1].
        z_loss: weight of lse^2, from 0 up, which keeps the normaliser near 1 (de Brebisson and Vincent 2016, arXiv
            1604.08859).
        shift: token t predicts target t + 1 along the last dimension of target; its last token counts as ignored. x is
            not copied.

    Returns:
        float32 (float64 for float64): a scalar, or with "none" target's shape, 0 where ignored.

    Raises:
        TypeError: a dtype other than those above, or an option of another type.
        ValueError: a shape, device, reduction or option that does not fit; a weight that is quantised and requires a
            gradient.
        IndexError: a label out of range. On a GPU it is a device-side assertion, without a synchronisation, as is a
            num_items that is not positive.

    Saved for backward: x, weight, bias, target (with `shift` a shifted copy, 8 bytes per token) and of each token
    the largest z and the sum of exp(z - that), 8 bytes: of their lse float32 keeps too little where logits are
    large. Under autocast x, bias and adapter as it casts them; of a dense weight no copy, since it is cast a tile
    at a time, in forward and in backward. Backward recomputes the logits: one GEMM more than the three that keep
    them; a frozen weight costs none for its gradient. A quantised weight is dequantised a tile at a time, once in
    forward and once in backward. An adapter's product with x is made once in each; DoRA with dropout multiplies by
    the weight once more in both.
    """
    check_options(ignore_index, reduction, softcap, label_smoothing, z_loss, shift)
    check_tensors(x, base_of(weight), target, bias, shift)
    check_num_items(num_items, x, reduction)
    dtype = product_dtype(x)
    # W goes on as it is: under autocast it is cast a tile at a time.
    check_product_dtype(x, dtype, weight=base_of(weight), bias=bias)
    if isinstance(weight, LoRAWeight):
        weight = weight.adapter_as_product_dtype("weight", x, dtype)
    projection = projection_of(weight, None if bias is None else bias.to(dtype))
    if shift:
        target = shifted(target, ignore_index)
    tensors, parts, *description = head_arguments(projection)
    options = (int(ignore_index), float(softcap or 0.0), float(label_smoothing), float(z_loss))
    inputs = distinct(x.to(dtype), target, *tensors, *parts)
    losses = _LinearCrossEntropy.apply(tuple(description), options, *inputs)
    return reduce(losses, target, ignore_index, reduction, num_items)
