"""The operators of an embedding with a low-rank adapter: rows of its sum, and the gradients of the adapter.

Written over torch's operators, a tile of tokens at a time, for every device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memkernels._library import define, implement_with_python
from memkernels.ops.autocast import without_autocast
from memkernels.ops.lora_linear.products import token_tiles


def _fwd(
    ids: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    embed_scale: Tensor | None,
    column_scale: Tensor | None,
) -> Tensor:
    """(*ids.shape, d): g * e * (W[ids] + s A[:, ids]^T B^T), in float32 or wider and rounded to W's dtype once."""
    with without_autocast(weight):
        y = _base_rows(ids, weight, embed_scale)
        rows, tokens = y.view(-1, weight.shape[1]), ids.reshape(-1)
        b = _scaled(lora_b, scaling, embed_scale, weight.dtype)
        for tile in token_tiles(rows, b.dtype):
            _adapt(rows[tile], tokens[tile], lora_a, b, column_scale)
    return y


def _bwd(
    dy: Tensor,
    ids: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    embed_scale: Tensor | None,
    column_scale: Tensor | None,
    padding_idx: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of A, B and g that are `wanted`, the others empty. No row of `padding_idx` counts for A's."""
    with without_autocast(weight):
        rows, tokens = dy.reshape(-1, dy.shape[-1]), ids.reshape(-1)
        dtype = _wide(weight.dtype)
        # s e B, which g scales by rows: P = dY (g s e B), and the gradient of B is that of g s e B times g s e.
        b = _scaled(lora_b, scaling, embed_scale, weight.dtype)
        up = b if column_scale is None else b * column_scale[:, None]
        a_grad, b_grad, scale_grad = wanted
        p = rows.new_empty(len(rows) if a_grad else 0, b.shape[1], dtype=dtype)
        db = b.new_zeros(b.shape if b_grad else 0)
        dscale = b.new_zeros(b.shape[0] if scale_grad else 0)
        for tile in token_tiles(rows, dtype):
            wide = rows[tile].to(dtype)
            if a_grad:
                torch.mm(wide, up, out=p[tile])
            if b_grad:
                db.addmm_(wide.t(), _rank_rows(lora_a, tokens[tile], dtype))
            if scale_grad:
                y = _base_rows(tokens[tile], weight, embed_scale).to(dtype)
                _adapt(y, tokens[tile], lora_a, b, None)
                dscale.add_(torch.linalg.vecdot(wide, y, dim=0))
        if b_grad:
            db.mul_(scaling)
            for scale in (embed_scale, None if column_scale is None else column_scale[:, None]):
                if scale is not None:
                    db.mul_(scale)
        da = _columns_sum(p, tokens, lora_a, padding_idx) if a_grad else lora_a.new_empty(0)
        return da, db.to(lora_b.dtype), dscale if column_scale is None else dscale.to(column_scale.dtype)


def _base_rows(ids: Tensor, weight: Tensor, embed_scale: Tensor | None) -> Tensor:
    y = F.embedding(ids, weight)
    return y if embed_scale is None else y.mul_(embed_scale.to(y.dtype))


def _adapt(y: Tensor, ids: Tensor, lora_a: Tensor, b: Tensor, column_scale: Tensor | None) -> None:
    """y becomes g * (y + A[:, ids]^T b^T), in b's dtype and rounded once."""
    wide = y.to(b.dtype)
    wide.addmm_(_rank_rows(lora_a, ids, b.dtype), b.t())
    if column_scale is not None:
        wide.mul_(column_scale)
    if wide is not y:
        y.copy_(wide)


def _columns_sum(p: Tensor, ids: Tensor, lora_a: Tensor, padding_idx: int) -> Tensor:
    """The gradient of A, (r, V): in the column of each id the sum of its rows of p (T, r), in their order."""
    seen, place = ids.unique(return_inverse=True)
    sums = torch.ops.aten.embedding_dense_backward(p, place, len(seen), -1, False)
    da = lora_a.new_zeros(lora_a.shape)
    da.index_copy_(1, seen.long(), sums.t().to(da.dtype))
    if padding_idx >= 0:
        da[:, padding_idx] = 0
    return da


def _rank_rows(lora_a: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    return lora_a.index_select(1, ids).t().to(dtype)


def _scaled(lora_b: Tensor, scaling: float, embed_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    b = lora_b.to(_wide(dtype)) * scaling
    return b if embed_scale is None else b.mul_(embed_scale)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _fwd_fake(ids, weight, *arguments):
    return weight.new_empty(*ids.shape, weight.shape[1])


def _bwd_fake(dy, ids, weight, lora_a, lora_b, scaling, embed_scale, column_scale, padding_idx, wanted):
    scale_dtype = _wide(weight.dtype) if column_scale is None else column_scale.dtype
    return (
        lora_a.new_empty(lora_a.shape if wanted[0] else 0),
        lora_b.new_empty(lora_b.shape if wanted[1] else 0),
        lora_b.new_empty(lora_b.shape[0] if wanted[2] else 0, dtype=scale_dtype),
    )


define(
    "lora_embedding_fwd(Tensor ids, Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, Tensor? embed_scale,"
    " Tensor? column_scale) -> Tensor",
    _fwd_fake,
)
define(
    "lora_embedding_bwd(Tensor dy, Tensor ids, Tensor weight, Tensor lora_a, Tensor lora_b, float scaling,"
    " Tensor? embed_scale, Tensor? column_scale, int padding_idx, bool[] wanted) -> (Tensor da, Tensor db,"
    " Tensor dscale)",
    _bwd_fake,
)
implement_with_python("lora_embedding_fwd", _fwd)
implement_with_python("lora_embedding_bwd", _bwd)
