"""Linear cross-entropy in plain PyTorch: the specification with whole logits, and the tile kernels' fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels.ops.weights import Weight, base_of, linear


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
    """The loss of `ops.linear_cross_entropy`, from the (..., V) logits in one piece."""
    logits = linear(x, weight, bias)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if shift:
        target = shifted(target, ignore_index)
    lse = torch.logsumexp(z, -1)
    ignored = target == ignore_index
    at_target = z.gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    losses = lse - (1 - label_smoothing) * at_target + z_loss * lse.square()
    if label_smoothing:
        losses = losses - label_smoothing / base_of(weight).shape[0] * z.sum(-1)
    return reduce(losses.masked_fill(ignored, 0.0), target, ignore_index, reduction, num_items)


def shifted(target: Tensor, ignore_index: int) -> Tensor:
    """The target of each position when it predicts the next one: the last has none."""
    return torch.nn.functional.pad(target[..., 1:], (0, min(1, target.shape[-1])), value=ignore_index)


def reduce(losses: Tensor, target: Tensor, ignore_index: int, reduction: str, num_items: int | Tensor | None) -> Tensor:
    """`losses` as they are, their sum, or their sum over num_items (by default the tokens that are not ignored)."""
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    if num_items is None:
        num_items = (target != ignore_index).sum()
    return total / (num_items.reshape(()) if isinstance(num_items, Tensor) else num_items)


def cross_entropy_stats(
    logits: Tensor,
    target: Tensor,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
    softcap: float,
    row_max: Tensor,
    row_sum: Tensor,
    target_logit: Tensor,
    logit_sum: Tensor,
) -> None:
    """Merges a tile, columns vocab_start and on of the logits, into the running statistics of its rows."""
    z = logits.to(row_max.dtype)
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    new_max = torch.maximum(row_max, z.amax(-1))
    shift = new_max.masked_fill(new_max == -torch.inf, 0.0)
    row_sum.mul_(torch.exp(row_max - shift)).add_(torch.exp(z - shift[:, None]).sum(-1))
    row_max.copy_(new_max)
    logit_sum.add_(z.sum(-1))
    column, here = _target_column(logits, target, vocab_start, ignore_index)
    target_logit.copy_(torch.where(here, z.gather(-1, column[:, None]).squeeze(-1), target_logit))


def cross_entropy_grad_(
    logits: Tensor,
    target: Tensor,
    vocab_start: int,
    vocab_size: int,
    row_max: Tensor,
    row_sum: Tensor,
    grad_loss: Tensor,
    ignore_index: int,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
) -> None:
    """Overwrites a tile of logits by grad_loss * dloss/dlogits; rows that are ignored by zero.

    A probability is exp(z - row_max) / row_sum: lse, rounded where logits are large, would put its error into each.
    """
    z = logits.to(row_max.dtype)
    tanh = torch.tanh(z / softcap) if softcap > 0 else None
    if tanh is not None:
        z = softcap * tanh
    no_weight = row_max == -torch.inf
    lse = row_max + row_sum.log()
    scale = (grad_loss * (1 + 2 * z_loss * lse) / row_sum).masked_fill(no_weight, 0.0)
    gradient = torch.exp(z - row_max.masked_fill(no_weight, 0.0)[:, None]).mul_(scale[:, None])
    gradient.sub_((grad_loss * (label_smoothing / vocab_size))[:, None])
    column, here = _target_column(logits, target, vocab_start, ignore_index)
    at_target = torch.where(here, grad_loss * (label_smoothing - 1), 0.0)
    gradient.scatter_add_(-1, column[:, None], at_target[:, None])
    if tanh is not None:
        gradient.mul_(1 - tanh.square())
    logits.copy_(gradient.masked_fill_((target == ignore_index)[:, None], 0.0))


def _target_column(logits: Tensor, target: Tensor, vocab_start: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The column of each row's target in the tile (0 where it is elsewhere), and whether it is there."""
    column = target - vocab_start
    here = (column >= 0) & (column < logits.shape[1]) & (target != ignore_index)
    return column.masked_fill(~here, 0), here
