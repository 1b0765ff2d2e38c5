"""The routers' product: operators, autograd Function and the op."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from memkernels._library import define, has_kernel, implement_with_python, implement_with_triton
from memkernels.ops.autocast import without_autocast
from memkernels.ops.lora_linear.products import token_tiles
from memkernels.ops.once_differentiable import once_differentiable
from memkernels.ops.router_logits import reference


def _noise_fake(x, seed, width, first_row):
    return x.new_empty(x.shape, dtype=torch.float32)


def _fwd_fake(x, weight, seed, jitter):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


def _bwd_fake(dlogits, x, weight, seed, jitter, dtype, x_grad, padding_mask=None):
    dx = dlogits.new_empty((dlogits.shape[0], weight.shape[1]) if x_grad else 0, dtype=dtype)
    return dx, weight.new_empty(weight.shape if x is not None else 0)


def _tiles(rows: Tensor, seed: Tensor | None, padding_mask: Tensor | None = None) -> Iterable[slice]:
    """Of rows in tiles; in one piece where they are multiplied as they are."""
    if seed is None and padding_mask is None and rows.dtype == torch.float32:
        return (slice(0, rows.shape[0]),)
    return token_tiles(rows, torch.float32)


def _with_noise(rows: Tensor, seed: Tensor | None, jitter: float, first_row: int) -> Tensor:
    """In float32; first_row is the number of the first of them in the whole."""
    if seed is None:
        return rows.float()
    if has_kernel("row_noise", rows):
        return torch.ops.memkernels.row_noise(rows, seed, jitter, first_row)
    return reference.row_noise(rows.float(), seed, jitter, first_row)


def _fwd(x: Tensor, weight: Tensor, seed: Tensor | None, jitter: float) -> Tensor:
    wide = weight.float()
    logits = wide.new_empty(x.shape[0], weight.shape[0])
    for tile in _tiles(x, seed):
        torch.mm(_with_noise(x[tile], seed, jitter, tile.start), wide.t(), out=logits[tile])
    return logits


def _bwd(
    dlogits: Tensor,
    x: Tensor | None,
    weight: Tensor,
    seed: Tensor | None,
    jitter: float,
    dtype: torch.dtype,
    x_grad: bool,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    wide = weight.float()
    dx = wide.new_empty((dlogits.shape[0], weight.shape[1]) if x_grad else 0, dtype=dtype)
    for tile in token_tiles(dx, torch.float32) if x_grad else ():
        dx[tile] = _with_noise(torch.mm(dlogits[tile], wide), seed, jitter, tile.start)
    if x is None:
        return dx, weight.new_empty(0)
    dweight = torch.zeros_like(wide)
    for tile in _tiles(x, seed, padding_mask):
        rows = _with_noise(x[tile], seed, jitter, tile.start)
        if padding_mask is not None:  # whose dlogits are zero, but zero times NaN is not
            rows = rows.masked_fill(padding_mask[tile, None], 0.0)
        torch.addmm(dweight, dlogits[tile].t(), rows, out=dweight)
    return dx, dweight.to(weight.dtype)


# u * x in float32; u is uniform in [1 - width, 1 + width], a function of the seed (0-dim, int64) and of an element's
# row, counted from first_row, and column: 1 - width + 2^-23 width w, w the upper 24 bits of its word in `row_words`.
define("row_noise(Tensor x, Tensor seed, float width, int first_row) -> Tensor", _noise_fake)
implement_with_triton("memkernels.ops.router_logits.triton", "row_noise")
# logits = x' weight^T, (T, E) float32; x' (T, d) is x, with a seed times noise of width `jitter`.
define("router_logits_fwd(Tensor x, Tensor weight, Tensor? seed, float jitter) -> Tensor", _fwd_fake)
# dx, of dtype, and dweight; empty where x_grad is False, and where there is no x. Of padding dlogits are zero.
define(
    "router_logits_bwd(Tensor dlogits, Tensor? x, Tensor weight, Tensor? seed, float jitter, ScalarType dtype,"
    " bool x_grad, Tensor? padding_mask=None) -> (Tensor dx, Tensor dweight)",
    _bwd_fake,
)
implement_with_python("router_logits_fwd", _fwd)
implement_with_python("router_logits_bwd", _bwd)


class _RouterLogits(torch.autograd.Function):
    """Saves x where weight has a gradient, weight, the seed and the mask."""

    @staticmethod
    def forward(ctx, x, weight, seed, jitter, padding_mask):
        ctx.jitter, ctx.dtype = jitter, x.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, seed, padding_mask)
        with without_autocast(x):
            logits = torch.ops.memkernels.router_logits_fwd(x, weight, seed, jitter)
        return logits if padding_mask is None else logits.masked_fill_(padding_mask[:, None], 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits):
        x, weight, seed, padding_mask = ctx.saved_tensors
        x_grad, weight_grad = ctx.needs_input_grad[:2]
        if padding_mask is not None:
            dlogits = dlogits.masked_fill(padding_mask[:, None], 0.0)
        with without_autocast(dlogits):
            dx, dweight = torch.ops.memkernels.router_logits_bwd(
                dlogits, x, weight, seed, ctx.jitter, ctx.dtype, x_grad, padding_mask
            )
        return dx if x_grad else None, dweight if weight_grad else None, None, None, None


def router_logits(
    x: Tensor,
    weight: Tensor,
    *,
    jitter: float = 0.0,
    seed: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Logits of T tokens for E experts: x' weight^T, in float32 whatever the dtypes, autocast off.

    x' is x, with a seed times noise uniform in [1 - jitter, 1 + jitter] (Fedus et al. 2021, arXiv 2101.03961, section
    2.4), that of Philox at an element's row and column, made anew in backward. What is cast or has noise exists a tile
    of tokens at a time.

    Args:
        x: (T, d); any floating dtype.
        weight: (E, d), likewise.
        jitter: the noise's half width.
        seed: 0-dim, int64.
        padding_mask: (T,), bool, True where a token is padding: its logits are zero and give no gradient, whatever x
            holds there, NaN for one.

    Returns:
        logits, (T, E), float32.

    Saved for backward: x as it is, where weight has a gradient, weight, the seed, 8 bytes, and padding_mask.
    """
    return _RouterLogits.apply(x, weight, seed, jitter, padding_mask)
