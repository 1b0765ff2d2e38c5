"""Linear cross-entropy over tiles of the vocabulary: the logits exist one tile at a time, in one reused buffer.

Forward multiplies once; backward recomputes each tile and multiplies for dweight, complete within the tile, and for dx,
which is summed over the tiles in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from memkernels._library import has_kernel
from memkernels.ops.linear_cross_entropy import reference

# Bytes of one tile: on CPU it stays in the last-level cache between the product and the row kernel.
TILE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
MIN_COLUMNS, MAX_COLUMNS = 512, 32768


def tile_columns(logits_like: Tensor, rows: int, vocab_size: int) -> int:
    """Columns of a tile: what fits the budget of bytes, in steps of 64, so that a product still fills the machine."""
    budget = TILE_BYTES.get(logits_like.device.type, TILE_BYTES["cuda"])
    columns = budget // (max(rows, 1) * logits_like.element_size()) // 64 * 64
    return min(max(columns, MIN_COLUMNS), MAX_COLUMNS, vocab_size)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """The tiles in turn, each with its slice of the vocabulary and x @ weight[slice].T + bias[slice] in the buffer."""
    rows, vocab_size = x.shape[0], weight.shape[0]
    columns = tile_columns(x, rows, vocab_size)
    buffer = x.new_empty(rows * columns)
    for start in range(0, vocab_size, columns):
        part = slice(start, min(start + columns, vocab_size))
        logits = buffer[: rows * (part.stop - start)].view(rows, part.stop - start)
        if bias is None:
            torch.mm(x, weight[part].t(), out=logits)
        else:
            torch.addmm(bias[part], x, weight[part].t(), out=logits)
        yield part, logits


def _kernel(name: str, x: Tensor) -> Callable:
    return getattr(torch.ops.memkernels if has_kernel(name, x) else reference, name)


def _check_labels(target: Tensor, vocab_size: int, ignore_index: int) -> None:
    """On CPU an error at once; on other devices an assertion that does not wait for them."""
    valid = ((target >= 0) & (target < vocab_size) | (target == ignore_index)).all()
    if target.device.type != "cpu":
        torch._assert_async(valid, f"target: expected values in [0, {vocab_size}) or ignore_index={ignore_index}")
    elif not valid:
        wrong = target[(target != ignore_index) & ((target < 0) | (target >= vocab_size))][0].item()
        raise IndexError(f"target: expected values in [0, {vocab_size}) or ignore_index={ignore_index}, got {wrong}.")


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    rows, labels, vocab_size = x.reshape(-1, x.shape[-1]), target.reshape(-1).contiguous(), weight.shape[0]
    _check_labels(labels, vocab_size, ignore_index)
    wide = torch.promote_types(x.dtype, torch.float32)
    row_max = x.new_full(labels.shape, -torch.inf, dtype=wide)
    row_sum, target_logit, logit_sum = torch.zeros_like(row_max).repeat(3, 1).unbind()
    merge = _kernel("cross_entropy_stats", x)
    with torch.autocast(x.device.type, enabled=False):
        for part, logits in _logits(rows, weight, bias):
            merge(
                logits, labels, part.start, vocab_size, ignore_index, softcap, row_max, row_sum, target_logit, logit_sum
            )
    lse = row_max.add_(row_sum.log_())
    losses = torch.addcmul(lse, lse, lse, value=z_loss) if z_loss else lse.clone()
    losses.sub_(target_logit, alpha=1 - label_smoothing)
    if label_smoothing:
        losses.sub_(logit_sum, alpha=label_smoothing / vocab_size)
    return losses.masked_fill_(labels == ignore_index, 0.0).view(target.shape), lse


def linear_cross_entropy_bwd(
    grad_losses: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    x_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, labels, vocab_size = x.reshape(-1, x.shape[-1]), target.reshape(-1).contiguous(), weight.shape[0]
    grad_loss = grad_losses.reshape(-1).contiguous()
    dx = torch.zeros_like(rows, dtype=lse.dtype) if x_grad else rows.new_empty(0)
    product = torch.empty_like(rows) if x_grad and dx.dtype != x.dtype else None
    dweight = weight.new_empty(weight.shape if weight_grad else 0)
    dbias = weight.new_empty(vocab_size if bias_grad else 0)
    to_gradient_ = _kernel("cross_entropy_grad_", x)
    with torch.autocast(x.device.type, enabled=False):
        for part, logits in _logits(rows, weight, bias):
            to_gradient_(
                logits, labels, part.start, vocab_size, lse, grad_loss, ignore_index, softcap, label_smoothing, z_loss
            )
            if weight_grad:
                torch.mm(logits.t(), rows, out=dweight[part])
            if bias_grad:
                dbias[part] = logits.sum(0, dtype=lse.dtype)
            if product is not None:
                dx.add_(torch.mm(logits, weight[part], out=product))
            elif x_grad:
                dx.addmm_(logits, weight[part])
    return dx.to(x.dtype).view(x.shape if x_grad else 0), dweight, dbias
