"""The attention half-block in plain PyTorch: the specification."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from memkernels.ops.attention.reference import attention
from memkernels.ops.layer_norm.reference import layer_norm
from memkernels.ops.rms_norm.reference import rms_norm
from memkernels.ops.rotary.reference import apply_rotary
from memkernels.ops.weights import Weight, base_of, linear


def attention_block(
    x: Tensor,
    w_q: Weight,
    w_k: Weight,
    w_v: Weight,
    w_o: Weight,
    *,
    num_heads: int,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    b_o: Tensor | None = None,
    norm: str = "rms",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    post_norm_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    cu_seqlens: Tensor | None = None,
    **scores: Any,
) -> Tensor:
    """y = attention(rope(q), rope(k), v) w_o^T + b_o, or its norm.

    q, k and v are the projections of norm(x), q and k normed by head.
    `scores`: the keywords of `ops.attention` that change or hide scores.
    """
    n = x
    if norm_weight is not None and norm == "rms":
        n = cast(Tensor, rms_norm(x, norm_weight, norm_eps, weight_offset=norm_offset)).to(base_of(w_q).dtype)
    elif norm_weight is not None:
        n = cast(Tensor, layer_norm(x, norm_weight, norm_bias, norm_eps)).to(base_of(w_q).dtype)
    q = linear(n, w_q, b_q).unflatten(-1, (num_heads, -1))
    k, v = linear(n, w_k, b_k).unflatten(-1, (-1, q.shape[-1])), linear(n, w_v, b_v)
    v = v.unflatten(-1, (k.shape[-2], -1))
    if q_norm_weight is not None:
        q = cast(Tensor, rms_norm(q, q_norm_weight, norm_eps, weight_offset=norm_offset))
    if k_norm_weight is not None:
        k = cast(Tensor, rms_norm(k, k_norm_weight, norm_eps, weight_offset=norm_offset))
    packed = cu_seqlens is not None
    q, k, v = (tensor.reshape(1, -1, *tensor.shape[-2:]) if packed else tensor for tensor in (q, k, v))
    if cos is not None and sin is not None:
        q, k = apply_rotary(q, k, cos, sin, interleaved=interleaved)
    if packed:
        q, k, v = q[0], k[0], v[0]
    out, _ = attention(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, **scores)
    y = linear(out.flatten(-2).view(*x.shape[:-1], -1), w_o, b_o)
    if post_norm_weight is None:
        return y
    return cast(Tensor, rms_norm(y, post_norm_weight, norm_eps, weight_offset=norm_offset))
