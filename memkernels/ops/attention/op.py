"""Attention: operators, autograd Function and public function."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels._library import define, implement_with_triton
from memkernels.ops.attention import reference
from memkernels.ops.attention.backends import Call, operators, select_implementation
from memkernels.ops.attention.checks import check_arguments
from memkernels.ops.autocast import product_dtype, without_autocast
from memkernels.ops.checks import check_flag, check_floating
from memkernels.ops.distinct import distinct
from memkernels.ops.once_differentiable import once_differentiable
from memkernels.ops.philox import seed_tensor

_MASKS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, int window_left, int window_right, float softcap,"
    " float dropout_p"
)


def _fwd_fake(q, k, v, *masks):
    lse_shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(lse_shape, dtype=torch.float32)


def _bwd_fake(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, *masks):
    dsinks = q.new_empty(0 if sinks is None else sinks.shape, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


define(f"attention_fwd(Tensor q, Tensor k, Tensor v, {_MASKS}) -> (Tensor out, Tensor lse)", _fwd_fake)
define(
    f"attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_MASKS},"
    " bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    _bwd_fake,
)
implement_with_triton("memkernels.ops.attention.triton", "attention_fwd", "attention_bwd")


class _Attention(torch.autograd.Function):
    """cu_seqlens_k is None where it is cu_seqlens_q: Dynamo traces no Function that is given one tensor twice."""

    @staticmethod
    def forward(
        ctx, q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, options, deterministic, implementation
    ):
        masks = (cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed)
        out, lse = operators(implementation)[0](q, k, v, *_with_starts_of_keys(*masks), *options)
        ctx.options, ctx.deterministic, ctx.implementation = options, deterministic, implementation
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse.detach(), *masks)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *masks = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 11
        dout = torch.zeros_like(out) if dout is None else dout
        backward, masks = operators(ctx.implementation)[1], _with_starts_of_keys(*masks)
        gradients = backward(dout, dlse, q, k, v, out, lse, *masks, *ctx.options, ctx.deterministic)
        needed = ctx.needs_input_grad[:4]
        return *(grad if need else None for grad, need in zip(gradients, needed, strict=True)), *(None,) * 7


def _with_starts_of_keys(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, *masks: Tensor | None):
    return cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, *masks


def seen_window(window: tuple[int, int], causal: bool) -> tuple[int, int]:
    """The window that both together leave, of numbers that every backend takes: no sequence is longer."""
    left, right = (min(int(bound), 2**31 - 1) for bound in window)
    return left, 0 if causal else right


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention that never holds the score matrix.

    s_ij = softcap(scale * q_i . k_j) - alibi_h |j - p_i|, with p_i = i + Sk - Sq: queries stand at the end of the keys,
    so a causal mask is aligned bottom-right. P = softmax over the visible keys, and the sink if there is one;
    out_i = sum_j dropout(P)_ij v_j. A query that sees nothing gives zero, with zero gradients. Dao 2023,
    arXiv 2307.08691; sinks as in gpt-oss; the mask of dropout is Philox (Salmon et al. 2011), the same on every backend
    for one seed, and never stored. Under autocast q, k and v are cast as `scaled_dot_product_attention` casts them.

    Args:
        q: (B, Sq, H, D), or packed (Tq, H, D) with cu_seqlens_q; float32, bfloat16 or float16 (float64 is computed by
            the reference).
        k: (B, Sk, Hk, D) or (Tk, Hk, D); Hk divides H, and head h reads h // (H / Hk): nothing is expanded.
        v: (B, Sk, Hk, Dv) or (Tk, Hk, Dv).
        causal: hides the keys after p_i.
        scale: of the products; D ** -0.5 by default.
        window: keys seen before and after p_i; -1 is unbounded.
        softcap: c > 0 turns a score s into c * tanh(s / c); 0 or None: off.
        alibi_slopes: (H,) or (B, H), float32, without gradient.
        sinks: (H,) float32: one more logit a head, whose probability goes nowhere.
        dropout_p: in [0, 1).
        seed: of dropout; drawn from torch's generator by default.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, starts of the packed sequences and their end; one tensor for both
            says, without a look at it, that they are the same, which torch's operators need.
        max_seqlen_q, max_seqlen_k: the longest of them; given, they save a synchronisation on a GPU. With fullgraph
            torch.compile needs them; else it breaks the graph.
        deterministic: the same gradients bit for bit on every run. Those of this package's kernels always are: on GPUs
            dk and dv, and dq, come of passes of their own, with seven products a tile, two of them to make scores and
            dP again, where one pass that sums dq by atomics, in any order, has five. On a GPU it keeps "auto" from
            torch's operators, which have that one pass: it costs what these are faster by (not measured here).
        return_lse: returns (out, lse), lse = log sum exp of the scores, (B, H, Sq) or (H, Tq), float32, differentiable;
            -inf for a query that sees nothing.
        backend: "cpu" and "triton" are this package's kernels; "aten" are torch's own operators, flash attention and
            cuDNN's, which have few of the options; "reference" is plain PyTorch and holds the scores. "auto" takes
            "aten" on an NVIDIA GPU where it has what the call needs, else the kernels, else the reference.

    Returns:
        out, (B, Sq, H, Dv) or (Tq, H, Dv), like q.

    Raises:
        TypeError: no dense tensor, a dtype other than those above, or dtypes that differ; a number or flag of another
            type.
        ValueError: shapes, devices, a scale, softcap, window, sequence starts, dropout_p or seed that do not fit, or a
            backend that lacks what the call needs. Each names the argument, and is the same on every backend.

    Saved for backward: q, k, v, out and lse, 4 bytes a query and head. Backward makes P again from lse, and takes
    sum_j P_ij dP_ij as dout_i . out_i, as flash attention does: where one key has all of a query's probability, dq, dk
    and dsinks are rounding errors of out, not the exact zero of a backward that holds P.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(name, tensor)
    q, k, v = (tensor.to(product_dtype(tensor)) for tensor in (q, k, v))
    softcap = 0.0 if softcap is None else softcap
    lengths = check_arguments(
        q, k, v, causal, scale, window, softcap, alibi_slopes, sinks, dropout_p, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    check_flag("deterministic", deterministic)
    check_flag("return_lse", return_lse)
    seed = seed_tensor(seed, q.device) if dropout_p > 0 else None
    left, right = seen_window(window, causal)
    call = Call(
        q.device, q.dtype, (q.shape[-1], v.shape[-1]), lengths, packed=cu_seqlens_q is not None,
        same_lengths=lengths[0] == lengths[1] if cu_seqlens_q is None else cu_seqlens_q is cu_seqlens_k,
        grouped=q.shape[-2] != k.shape[-2], empty=not all(tensor.numel() for tensor in (q, k, v)), window=(left, right),
        softcap=softcap > 0, alibi_slopes=alibi_slopes is not None, sinks=sinks is not None, dropout=dropout_p > 0,
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(), lse=return_lse,
    )  # fmt: skip
    implementation = select_implementation(backend, call)
    if implementation != "reference":
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        options = (*lengths, float(scale), left, right, float(softcap), float(dropout_p))
        masks = (cu_seqlens_q, None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k, alibi_slopes, seed)
        out, lse = _Attention.apply(*distinct(q, k, v, sinks, *masks), options, deterministic, implementation)
    else:
        with without_autocast(q):
            out, lse = reference.attention(
                q, k, v, scale=scale, window=(left, right), softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
                dropout_p=dropout_p, seed=seed, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            )  # fmt: skip
    return (out, lse) if return_lse else out
