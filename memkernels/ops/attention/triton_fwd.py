"""Attention forward on GPUs: a tile of queries walks the keys it sees with a running maximum and sum."""

from __future__ import annotations

import triton
import triton.language as tl

from memkernels.ops.attention.triton_scores import LN2, LOG2E, alibi_slope, kept, row_products, score_unit, scores
from memkernels.ops.attention.triton_tiles import (
    load_rows,
    sequence_rows,
    store_rows,
    stream_rows,
    tile_at,
    visible_tiles,
)


@triton.jit
def _attention_fwd_kernel(
    q,
    k,
    v,
    out_ptr,
    lse_ptr,
    masks,
    heads,
    group,
    q_rows,
    k_rows,
    tiles,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """out = softmax(scores(q k^T)) v, lse = log sum exp of the scores; rows of (B, S, H, D), lse (B, H, S) in float32.

    Programs: tiles of queries, heads, sequences. Each moves its queries and outputs once, and the keys and values that
    it sees. First come the tiles of keys that all its queries see, which need no mask; then those at the edges.
    """
    # The last queries see the most keys under a causal mask: they go first.
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    head = tl.program_id(0) // tiles % heads
    sequence = tl.program_id(0) // (tiles * heads)
    q_start, queries = sequence_rows(masks.cu_seqlens_q, sequence, q_rows)
    k_start, keys = sequence_rows(masks.cu_seqlens_k, sequence, k_rows)
    if first >= queries:
        return
    batch = sequence if masks.cu_seqlens_q is None else 0
    PACKED: tl.constexpr = masks.cu_seqlens_q is not None
    q_end = q_start + queries
    q_tile = load_rows(q, batch, head, q_start + first, q_end, SIZE, BLOCK_M, BLOCK_D)
    position = (first + keys - queries + tl.arange(0, BLOCK_M))[:, None]
    slope = alibi_slope(masks, sequence, head)

    unit = score_unit(masks, NATURAL)
    LOG2_UNIT: tl.constexpr = LOG2E if NATURAL else 1.0
    if masks.sinks is None:
        largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    else:
        largest = tl.zeros((BLOCK_M,), dtype=tl.float32) + tl.load(masks.sinks + head) * (LOG2E / LOG2_UNIT)
        total = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    accumulator = tl.zeros((BLOCK_M, BLOCK_DV), dtype=tl.float32)

    begin, full_begin, full_end, end = visible_tiles(
        first, min(first + BLOCK_M, queries), keys - queries, keys, masks.left, masks.right, BLOCK_N
    )
    for EDGE in tl.static_range(2):
        full_tiles = full_end - full_begin
        for index in range(end - begin - full_tiles if EDGE else full_tiles):
            first_key = tile_at(index, begin, full_begin, full_end, EDGE) * BLOCK_N
            row, k_end = k_start + first_key, k_start + keys
            k_tile = stream_rows(k, batch, head // group, row, k_end, SIZE, BLOCK_N, BLOCK_D, EDGE, PACKED)
            products = row_products(q_tile, k_tile, PART, PRECISION)
            key = (first_key + tl.arange(0, BLOCK_N))[None, :]
            score, _ = scores(products, position, key, keys, slope, masks, NATURAL, EDGE)
            larger = tl.maximum(largest, tl.max(score, 1) * unit)
            # A row that has seen nothing has no maximum to subtract.
            shift = tl.where(larger == float("-inf"), 0.0, larger) if EDGE else larger
            probability = tl.exp2((score * unit - shift[:, None]) * LOG2_UNIT)
            factor = tl.exp2((largest - shift) * LOG2_UNIT)
            total = total * factor + tl.sum(probability, 1)
            accumulator *= factor[:, None]
            largest = larger
            if masks.seed is not None:
                keep = kept(masks, sequence * heads + head, first, first_key, BLOCK_M, BLOCK_N)
                probability = tl.where(keep, probability, 0.0)
            v_tile = stream_rows(v, batch, head // group, row, k_end, VALUE_SIZE, BLOCK_N, BLOCK_DV, EDGE, PACKED)
            accumulator = tl.dot(probability.to(v_tile.dtype), v_tile, accumulator, input_precision=PRECISION)

    inverse = tl.where(total == 0.0, 0.0, masks.keep_scale / total)
    store_rows(out_ptr, accumulator * inverse[:, None], batch, head, q_start + first, q_end, q_rows, heads, VALUE_SIZE)
    query = first + tl.arange(0, BLOCK_M)
    lse_row = (batch * heads + head).to(tl.int64) * q_rows + q_start + query
    lse = largest * (LN2 * LOG2_UNIT) + tl.log2(total) * LN2
    tl.store(lse_ptr + lse_row, lse, mask=query < queries)
