"""The attention half-block: the public function, and its checked call."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels._library import has_kernel
from memkernels.ops.attention.backends import Call, select_implementation
from memkernels.ops.attention.checks import check_per_head, check_scores
from memkernels.ops.attention.op import seen_window
from memkernels.ops.attention_block import reference
from memkernels.ops.attention_block.block import Context, Plan
from memkernels.ops.attention_block.block import attention_block as run
from memkernels.ops.attention_block.checks import check_layout, check_sequences
from memkernels.ops.autocast import product_dtype, without_autocast
from memkernels.ops.block_norm import make_norm, make_rms_norm
from memkernels.ops.checks import check_flag, check_floating
from memkernels.ops.philox import seed_tensor
from memkernels.ops.rotary.op import check_tables
from memkernels.ops.weights import Weight, as_product_weights, base_of, projection_of


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
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    deterministic: bool = False,
) -> Tensor:
    """A transformer's self-attention sublayer, with the norm in front of it, that keeps x, out and lse for backward.

    n = `ops.rms_norm` or `ops.layer_norm` of x, or x itself without norm_weight; q, k, v = n w^T + b in heads; q and k
    RMS-normed by head where q_norm_weight and k_norm_weight are given, then turned by `ops.apply_rotary` where cos and
    sin are; out = `ops.attention`(q, k, v); y = out w_o^T + b_o. The residual is the caller's. Under autocast n,
    weights and biases are cast as `torch.nn.functional.linear` casts them.

    Args:
        x: (B, S, d), or packed (T, d) or (1, T, d) with cu_seqlens; float32, bfloat16 or float16 (float64 is computed
            by the reference).
        w_q: (H D, d), x's dtype. It, w_k, w_v and w_o each a tensor, quantised or not, or an `ops.LoRAWeight`.
        w_k: (Hk D, d), x's dtype; Hk divides H.
        w_v: (Hk Dv, d), x's dtype.
        w_o: (d, H Dv), x's dtype.
        num_heads: H.
        b_q, b_k, b_v, b_o: biases of the projections, x's dtype.
        norm: rms or layer; of effect with norm_weight.
        norm_weight: (d,); x's dtype or float32.
        norm_bias: (d,), of a layer norm.
        norm_eps: added to the mean of squares, or to the variance; in the norms of q, k and y too.
        norm_offset: added to an RMS norm's weight (1 is Gemma's form); to those of q, k and y too.
        q_norm_weight, k_norm_weight: (D,); x's dtype or float32 (Qwen3, Gemma 3).
        post_norm_weight: (d,), of an RMS norm of y (Gemma 2 and 3); x's dtype or float32.
        cos, sin: (S, R), (1, S, R) or (B, S, R), for a packed batch with S = T, as `ops.apply_rotary` takes them.
        interleaved: which elements of a head are turned together, as in `ops.apply_rotary`.
        causal, scale, window, softcap, alibi_slopes, sinks, dropout_p, seed, deterministic: as in `ops.attention`.
        cu_seqlens: (B + 1,) int32, starts of the packed sequences and their end.
        max_seqlen: the longest sequence; given, it saves a synchronisation on a GPU. With fullgraph torch.compile needs
            it; else it breaks the graph.

    Returns:
        y, like x (under autocast, of autocast's dtype).

    Raises:
        TypeError: a dtype other than those above, or an option of another type.
        ValueError: a shape, device or option that does not fit.

    Saved for backward: x, d elements a token, out, H Dv elements, and lse, 4 H bytes, beside the parameters, cos and
    sin; dropout adds its seed, 8 bytes. No norm's rstd is kept: backward recomputes the norms with their statistics, q,
    k, v and the rotation: the three products of q, k and v more than a backward that keeps them; with post_norm_weight
    the output product too. Frozen weights cost no product.
    """
    softcap = 0.0 if softcap is None else softcap
    x_in, plan, context, tensors, has_kernels = plan_attention_block(
        x, w_q, w_k, w_v, w_o, num_heads=num_heads, b_q=b_q, b_k=b_k, b_v=b_v, b_o=b_o, norm=norm,
        norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=norm_eps, norm_offset=norm_offset,
        q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, post_norm_weight=post_norm_weight, cos=cos, sin=sin,
        interleaved=interleaved, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
        sinks=sinks, dropout_p=dropout_p, seed=seed, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
        deterministic=deterministic,
    )  # fmt: skip
    if has_kernels:
        return run(x_in, plan, context, tensors).view(*x.shape[:-1], base_of(w_o).shape[0])
    weights = as_product_weights(x, plan.dtype, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o, b_q=b_q, b_k=b_k, b_v=b_v, b_o=b_o)
    with without_autocast(x):
        return reference.attention_block(
            x if norm_weight is not None else x.to(plan.dtype), **weights, num_heads=num_heads, norm=norm,
            norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=norm_eps, norm_offset=norm_offset,
            q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, post_norm_weight=post_norm_weight, cos=cos,
            sin=sin, interleaved=interleaved, scale=scale, window=seen_window(window, causal), softcap=softcap,
            alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p, seed=context.seed, cu_seqlens=cu_seqlens,
        )  # fmt: skip


def plan_attention_block(
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
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Plan, Context, tuple[Tensor, ...], bool]:
    """The checked call of `attention_block`: x as (B, S, d), plan, context, tensors, and whether kernels run."""
    check_floating("x", x)
    dtype = product_dtype(x)
    given = {"w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o}
    head_size = check_layout(
        x,
        num_heads,
        {name: base_of(weight) for name, weight in given.items()},
        {"b_q": b_q, "b_k": b_k, "b_v": b_v, "b_o": b_o},
    )
    in_front = make_norm(x, norm, norm_weight, norm_bias, norm_eps, norm_offset)
    batch, length, longest = check_sequences(x, cu_seqlens, max_seqlen)
    rows = batch if cu_seqlens is None else 1
    if (cos is None) != (sin is None):
        raise ValueError(f"{'cos' if cos is None else 'sin'}: expected with its counterpart, got None.")
    if cos is not None and sin is not None:
        check_tables(x, (rows, length, head_size), dtype, cos, sin)
    check_flag("interleaved", interleaved)
    check_flag("deterministic", deterministic)
    softcap = 0.0 if softcap is None else softcap
    check_scores("x", x, causal, scale, window, softcap, alibi_slopes, sinks, dropout_p)
    check_per_head(x.dtype, batch, num_heads, alibi_slopes, sinks)
    weights = as_product_weights(x, dtype, **given, b_q=b_q, b_k=b_k, b_v=b_v, b_o=b_o)
    q, k, v, o = (projection_of(weights[f"w_{name}"], weights[f"b_{name}"]) for name in "qkvo")
    q_norm, k_norm, post_norm = (
        make_rms_norm(name, x, size, weight, norm_eps, norm_offset, dtype)
        for name, size, weight in (
            ("q_norm_weight", head_size, q_norm_weight),
            ("k_norm_weight", head_size, k_norm_weight),
            ("post_norm_weight", x.shape[-1], post_norm_weight),
        )
    )
    x = x.to(dtype) if norm_weight is None else x
    num_kv_heads = base_of(w_k).shape[0] // head_size
    seen = seen_window(window, causal)
    call = Call(
        x.device, dtype, (head_size, base_of(w_v).shape[0] // num_kv_heads), (longest, longest), same_lengths=True,
        packed=cu_seqlens is not None, grouped=num_kv_heads != num_heads, empty=x.numel() == 0, window=seen,
        softcap=softcap > 0, alibi_slopes=alibi_slopes is not None, sinks=sinks is not None, dropout=dropout_p > 0,
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(), lse=False,
    )  # fmt: skip
    attention = select_implementation("auto", call)
    plan = Plan(
        in_front.description, q_norm.description, k_norm.description, q.description, k.description, v.description,
        o.description, post_norm.description, num_heads=num_heads, interleaved=interleaved, max_seqlen=longest,
        scores=(float(head_size**-0.5 if scale is None else scale), *seen, float(softcap), float(dropout_p)),
        deterministic=deterministic, dtype=dtype, attention=attention,
    )  # fmt: skip
    seed = seed_tensor(seed, x.device) if dropout_p > 0 else None
    context = Context(cos, sin, cu_seqlens, alibi_slopes, seed, sinks)
    tensors = tuple(tensor for part in (in_front, q_norm, k_norm, q, k, v, o, post_norm) for tensor in part.tensors)
    has_kernels = (
        attention != "reference" and has_kernel("rotary_fwd", x) and in_front.has_kernel(x) and post_norm.has_kernel(x)
    )
    return x[None] if x.dim() == 2 else x, plan, context, tensors, has_kernels
