"""Checks of attention's arguments, before any kernel runs."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from memkernels.ops.checks import (
    check_dropout_p,
    check_finite,
    check_flag,
    check_integer,
    check_number,
    check_same_device,
)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> tuple[int, int]:
    """Raises for what does not fit; returns the longest sequence of queries and of keys."""
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    _check_heads(q, k, v, packed)
    check_same_device("q", q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_scores("q", q, causal, scale, window, softcap, alibi_slopes, sinks, dropout_p)
    if not packed:
        for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            if longest is not None:
                raise ValueError(f"{name}: expected None without cu_seqlens_q and cu_seqlens_k, got {longest}.")
        batch = q.shape[0]
        lengths = q.shape[1], k.shape[1]
    else:
        if cu_seqlens_q is None or cu_seqlens_k is None:
            missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
            raise ValueError(f"{missing}: expected with its counterpart: a packed batch has both or none.")
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            expected, got = tuple(cu_seqlens_q.shape), tuple(cu_seqlens_k.shape)
            raise ValueError(f"cu_seqlens_k: expected shape {expected}, as cu_seqlens_q, got {got}.")
        batch = cu_seqlens_q.shape[0] - 1
        lengths = (
            check_starts("cu_seqlens_q", cu_seqlens_q, q.shape[0], "max_seqlen_q", max_seqlen_q),
            check_starts("cu_seqlens_k", cu_seqlens_k, k.shape[0], "max_seqlen_k", max_seqlen_k),
        )
    check_per_head(q.dtype, batch, q.shape[-2], alibi_slopes, sinks)
    return lengths


def check_scores(
    name: str,
    x: Tensor,
    causal: bool,
    scale: float | None,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
) -> None:
    """What changes and hides scores, whatever the layout; `name` and x say on which device."""
    check_same_device(name, x, alibi_slopes=alibi_slopes, sinks=sinks)
    check_score_options(causal, scale, window, softcap, dropout_p)


def check_score_options(
    causal: bool, scale: float | None, window: tuple[int, int], softcap: float, dropout_p: float
) -> None:
    """What a layer knows of scores when it is made."""
    check_flag("causal", causal)
    if scale is not None:
        check_finite("scale", scale)
    expected = "two numbers of keys, -1 for unbounded"
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window: expected {expected}, got {window}.")
    for bound in window:
        check_integer("window", bound, expected, least=-1)
    check_number("softcap", softcap, "0 or None (off) or a positive number", lambda number: 0 <= number < math.inf)
    check_dropout_p(dropout_p)


def check_per_head(
    dtype: torch.dtype, batch: int, heads: int, alibi_slopes: Tensor | None, sinks: Tensor | None
) -> None:
    """A number for each head: float32, beside float64 also float64, which the reference computes."""
    dtypes = (torch.float32, torch.float64) if dtype == torch.float64 else (torch.float32,)
    for name, tensor, shapes in (
        ("alibi_slopes", alibi_slopes, ((heads,), (batch, heads))),
        ("sinks", sinks, ((heads,),)),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name}: expected float32, got {tensor.dtype}.")
        if tuple(tensor.shape) not in shapes:
            wanted = " or ".join(str(shape) for shape in shapes)
            raise ValueError(f"{name}: expected shape {wanted}, got {tuple(tensor.shape)}.")
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes: expected a tensor that needs no gradient; they are not learned.")


def _check_heads(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    dims, layout = (3, "(T, H, D)") if packed else (4, "(B, S, H, D)")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype}, as q, got {tensor.dtype}.")
        if tensor.dim() != dims:
            raise ValueError(f"{name}: expected {layout}, got shape {tuple(tensor.shape)}.")
    if q.shape[-2] == 0:
        raise ValueError(f"q: expected at least one head, got shape {tuple(q.shape)}.")
    if k.shape[-1] != q.shape[-1] or q.shape[-1] == 0:
        raise ValueError(f"k: expected head size {q.shape[-1]} > 0, as q, got {k.shape[-1]}.")
    if v.shape[:-1] != k.shape[:-1] or v.shape[-1] == 0:
        raise ValueError(f"v: expected shape {(*k.shape[:-1], 'Dv > 0')}, as k, got {tuple(v.shape)}.")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"k: expected a number of heads that divides q's {q.shape[-2]}, got {k.shape[-2]}.")
    if not packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"k: expected batch size {q.shape[0]}, as q, got {k.shape[0]}.")


def check_starts(name: str, starts: Tensor, rows: int, max_name: str, longest: int | None) -> int:
    """Starts must rise from 0 to the number of rows.

    Where the longest is given, no GPU or trace has to wait: it is asserted on a GPU, and by a compiled graph, when it
    comes to that, before the kernels.
    """
    if starts.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {starts.dtype}.")
    if starts.dim() != 1 or starts.shape[0] < 2:
        raise ValueError(f"{name}: expected shape (B + 1,), B > 0, got {tuple(starts.shape)}.")
    if longest is not None:
        check_integer(max_name, longest, "an integer from 0 up or None", least=0)
    if longest is not None and (starts.device.type != "cpu" or torch.compiler.is_compiling()):
        if not starts.is_meta:
            # Without numbers, which would bind a compiled graph to them.
            expected = f"{name}: expected starts that rise from 0 to the number of rows by at most {max_name}."
            torch._assert_async(starts_fit(starts, rows, longest), expected)
        return longest
    if longest is None and torch.compiler.is_compiling():
        raise ValueError(f"{max_name}: expected a number under torch.compile with fullgraph, got None.")
    values = starts.tolist()
    lengths = [end - start for start, end in pairwise(values)]
    if values[0] != 0 or values[-1] != rows or min(lengths) < 0:
        raise ValueError(f"{name}: expected starts that rise from 0 to {rows}, got {values}.")
    if longest is not None and longest < max(lengths):
        raise ValueError(f"{max_name}: expected at least {max(lengths)}, the longest sequence, got {longest}.")
    return max(lengths)


def starts_fit(starts: Tensor, rows: int, longest: int) -> Tensor:
    """Whether starts rise from 0 to `rows` in steps of at most `longest`, computed where they are."""
    lengths = starts.diff()
    return (starts[0] == 0) & (starts[-1] == rows) & (lengths >= 0).all() & (lengths <= longest).all()
