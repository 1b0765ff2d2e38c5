"""From products q.k to scores and dropout masks, for forward and backward of attention's Triton kernels.

Scores times `score_unit` are in log2, so that a probability is one exp2 of one fused multiply-add; or, where NATURAL,
in natural units: float32 and a large bias must not be rounded more than that, as lse is on its way to log2 and back,
and a scale that is not positive turns their order.
Tiles come as (queries, keys) or transposed: positions are a column and a row that broadcast.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Masks(NamedTuple):
    """The options of a call as kernels take them; None where one is off."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    alibi_slopes: Tensor | None
    alibi_batch_stride: int
    sinks: Tensor | None
    seed: Tensor | None
    left: int  # keys seen before and after the query's own position
    right: int
    scale: float
    softcap: float | None
    dropped_below: int  # the threshold of dropout, less 2^31
    keep_scale: float  # 1 / (1 - dropout_p)


@triton.jit
def row_products(rows, columns, PART: tl.constexpr, PRECISION: tl.constexpr):
    """rows columns^T over the head size, which is cut into parts of PART that warps multiply apart and then add.

    Without it each thread holds whole rows of float32, for which large heads leave no registers. A head of at most
    PART stays whole; tl.dot takes no part below 16.
    """
    if rows.shape[1] <= PART:
        products = tl.dot(rows, columns.T, input_precision=PRECISION)
    else:
        PARTS: tl.constexpr = rows.shape[1] // PART
        left = rows.reshape(rows.shape[0], PARTS, PART).permute(1, 0, 2)
        right = columns.reshape(columns.shape[0], PARTS, PART).permute(1, 2, 0)
        products = tl.sum(tl.dot(left, right, input_precision=PRECISION), 0)
    return products


@triton.jit
def alibi_slope(masks, sequence, head):
    """The slope of a head; 0 without ALiBi."""
    slope = 0.0
    if masks.alibi_slopes is not None:
        slope = tl.load(masks.alibi_slopes + sequence * masks.alibi_batch_stride + head)
    return slope


@triton.jit
def scores(products, position, key, keys, slope, masks, NATURAL: tl.constexpr, MASKED: tl.constexpr):
    """The scores of a tile over `score_unit`, and their derivative by scaled products.

    Where MASKED, any key may be hidden, with a score of -inf; else none is. position: of the queries, aligned to the
    last key; keys: how many there are; slope: ALiBi's.
    """
    score = products
    derivative = 1.0
    if masks.softcap is not None:
        score = _tanh(products * (masks.scale / masks.softcap))
        derivative = 1.0 - score * score
    if NATURAL:
        score *= masks.scale if masks.softcap is None else masks.softcap
        if masks.alibi_slopes is not None:
            score -= slope * tl.abs(key - position).to(tl.float32)
    if MASKED:
        # From the first visible key on, compared as unsigned numbers: one comparison for both sides.
        first = position - masks.left
        count = tl.maximum(tl.minimum(position + masks.right, keys - 1) - first + 1, 0)
        visible = (key - first).to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)
        score = tl.where(visible, score, float("-inf"))
    return score, derivative


@triton.jit
def score_unit(masks, NATURAL: tl.constexpr):
    """What scores are to be multiplied by, here in the exponent, where it costs nothing."""
    unit = 1.0
    if not NATURAL:
        unit = (masks.scale if masks.softcap is None else masks.softcap) * LOG2E
    return unit


@triton.jit
def _tanh(x):
    """tanh(x) to a few units in the last place; NaN for NaN."""
    square = x * x
    # A fit of (tanh(x) - x) / x^3 on |x| < 0.625, where the other form cancels.
    fit = -5.7169846e-3
    fit = fit * square + 2.0650528e-2
    fit = fit * square - 5.3743478e-2
    fit = fit * square + 1.3331491e-1
    fit = fit * square - 3.3333284e-1
    small = x + x * square * fit
    large = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, large)


@triton.jit
def kept(masks, stream, first_query, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which probabilities of a (queries, keys) tile dropout keeps.

    The word of (query i, key j) is word j % 4 of Philox at the counter (j // 4, i, stream, 0).
    """
    query = first_query + tl.arange(0, BLOCK_M)[:, None]
    quad = first_key // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    # Loaded anew for each tile: from a seed that stays, the compiler keeps the 20 keys of the rounds in registers.
    seed = tl.load(masks.seed, volatile=True)
    a, b, c, d = tl.philox(seed, quad, query, tl.zeros_like(query) + stream, tl.zeros_like(query))
    ac = tl.join(_is_kept(a, masks), _is_kept(c, masks))
    bd = tl.join(_is_kept(b, masks), _is_kept(d, masks))
    return tl.join(ac, bd).reshape(BLOCK_M, BLOCK_N)


@triton.jit
def _is_kept(word, masks):
    # Compared as signed numbers, since a Triton argument has no unsigned type.
    return (word ^ 0x80000000).to(tl.int32, bitcast=True) >= masks.dropped_below
