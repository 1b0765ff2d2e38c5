"""Linear cross-entropy over tiles of the vocabulary: the logits exist one tile at a time, in one reused buffer.

Forward multiplies once; backward recomputes each tile and takes the head's gradients from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from memkernels._library import has_kernel
from memkernels.ops.autocast import without_autocast
from memkernels.ops.linear_cross_entropy import reference
from memkernels.ops.linear_cross_entropy.head import Head, HeadArguments
from memkernels.ops.linear_cross_entropy.head_gradients import HeadGradients

# Bytes of one tile: on CPU it stays in the last-level cache between the product and the row kernel.
TILE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
MIN_COLUMNS, MAX_COLUMNS = 512, 32768


def tile_columns(like: Tensor, column_size: int, vocab_size: int) -> int:
    """Columns of a tile: what fits the budget of bytes, in steps of 64, so that a product still fills the machine."""
    budget = TILE_BYTES.get(like.device.type, TILE_BYTES["cuda"])
    columns = budget // (max(column_size, 1) * like.element_size()) // 64 * 64
    return min(max(columns, MIN_COLUMNS), MAX_COLUMNS, vocab_size)


def _tiles(head: Head) -> Iterator[tuple[slice, Tensor, Tensor]]:
    return head.tiles(tile_columns(head.x, head.column_size, head.vocab_size))


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
    tensors: Sequence[Tensor | None],
    parts: Sequence[Tensor],
    kind: str,
    sizes: Sequence[int],
    scaling: float,
    dropout_p: float,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(x.reshape(-1, x.shape[-1]), HeadArguments(tensors, parts, kind, sizes, scaling, dropout_p))
    labels, vocab_size = target.reshape(-1).contiguous(), head.vocab_size
    _check_labels(labels, vocab_size, ignore_index)
    wide = torch.promote_types(x.dtype, torch.float32)
    row_max = x.new_full(labels.shape, -torch.inf, dtype=wide)
    row_sum, target_logit, logit_sum = (torch.zeros_like(row_max) for _ in range(3))
    merge = _kernel("cross_entropy_stats", x)
    with without_autocast(x):
        for part, _, logits in _tiles(head):
            merge(
                logits, labels, part.start, vocab_size, ignore_index, softcap, row_max, row_sum, target_logit, logit_sum
            )
    # Differences of logits first: where these are large, lse has lost what log(row_sum) adds to row_max.
    log_sum = row_sum.log()
    losses = torch.add(log_sum, row_max - target_logit, alpha=1 - label_smoothing)
    if label_smoothing:
        losses.add_(row_max - logit_sum / vocab_size, alpha=label_smoothing)
    if z_loss:
        lse = log_sum.add_(row_max)
        losses.addcmul_(lse, lse, value=z_loss)
    return losses.masked_fill_(labels == ignore_index, 0.0).view(target.shape), row_max, row_sum


def linear_cross_entropy_bwd(
    grad_losses: Tensor,
    x: Tensor,
    tensors: Sequence[Tensor | None],
    parts: Sequence[Tensor],
    kind: str,
    sizes: Sequence[int],
    scaling: float,
    dropout_p: float,
    target: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    ignore_index: int,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    head = Head(x.reshape(-1, x.shape[-1]), HeadArguments(tensors, parts, kind, sizes, scaling, dropout_p))
    labels, vocab_size = target.reshape(-1).contiguous(), head.vocab_size
    grad_loss = grad_losses.reshape(-1).contiguous()
    to_gradient_ = _kernel("cross_entropy_grad_", x)
    with without_autocast(x):
        gradients = HeadGradients(head, wanted)
        for part, weight, logits in _tiles(head):
            to_gradient_(
                logits, labels, part.start, vocab_size, row_max, row_sum, grad_loss, ignore_index, softcap,
                label_smoothing, z_loss,
            )  # fmt: skip
            gradients.add(part, weight, logits)
        dx, *others = gradients.results()
    return dx.view(x.shape) if wanted[0] else dx, *others
