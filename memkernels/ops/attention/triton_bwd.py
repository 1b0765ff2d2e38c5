"""Attention backward on GPUs, in three passes without atomics, so the same bits on every run.

With P = exp(S - lse) and delta = rowsum(dO * O) - dlse, dS = P * (dO V^T - delta) * dscore/dproduct:
    dV = P^T dO      dK = dS^T Q      by tiles of keys, which walk the queries that see them
    dQ = dS K                         by tiles of queries, which walk the keys that they see
P of dV and dO V^T are those of dropout where there is dropout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memkernels.ops.attention.triton_scores import LOG2E, alibi_slope, kept, row_products, score_unit, scores
from memkernels.ops.attention.triton_tiles import (
    load_rows,
    sequence_rows,
    store_rows,
    stream_rows,
    tile_at,
    visible_tiles,
)


@triton.jit
def _attention_delta_kernel(
    out,
    dout,
    lse_ptr,
    dlse_ptr,
    sinks_ptr,
    delta_ptr,
    dsinks_partial_ptr,
    heads,
    rows,
    tiles,
    VALUE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """delta = rowsum(dout * out) - dlse, 0 for a query that sees nothing; (B, H, S) in float32.

    dsinks_partial: (tiles * B, H), the sums of -exp(sink - lse) * delta. Moves each row of out and dout once.
    """
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    batch = tl.program_id(0) // (tiles * heads)
    first = tile * BLOCK_M
    query = first + tl.arange(0, BLOCK_M)
    out_tile = load_rows(out, batch, head, first, rows, VALUE_SIZE, BLOCK_M, BLOCK_DV)
    dout_tile = load_rows(dout, batch, head, first, rows, VALUE_SIZE, BLOCK_M, BLOCK_DV)
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    row, mask = (batch * heads + head).to(tl.int64) * rows + query, query < rows
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, mask=mask, other=0.0)
    lse = tl.load(lse_ptr + row, mask=mask, other=float("-inf"))
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    tl.store(delta_ptr + row, delta, mask=mask)
    if sinks_ptr is not None:
        probability = tl.exp(tl.load(sinks_ptr + head) - lse)
        dsinks = tl.sum(tl.where(lse == float("-inf"), 0.0, -probability * delta), 0)
        tl.store(dsinks_partial_ptr + (batch * tiles + tile).to(tl.int64) * heads + head, dsinks)


@triton.jit
def _row_statistics(
    lse_ptr, delta_ptr, first_row, query, queries, LOG2_UNIT: tl.constexpr, BOUNDED: tl.constexpr
):  # fmt: skip
    """lse in the unit of scores, inf where nothing is seen or where there is no query; and delta."""
    mask = query < queries if BOUNDED else None
    lse = tl.load(lse_ptr + first_row + query, mask=mask, other=float("-inf") if BOUNDED else None)
    delta = tl.load(delta_ptr + first_row + query, mask=mask, other=0.0 if BOUNDED else None)
    return tl.where(lse == float("-inf"), float("inf"), lse * (LOG2E / LOG2_UNIT)), delta


@triton.jit
def _attention_dkdv_kernel(
    q,
    k,
    v,
    dout,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
    masks,
    kv_heads,
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
    """dK and dV of a tile of keys, from the queries of all `group` heads that share them. Tiles are (keys, queries).

    Programs: tiles of keys, heads of k and v, sequences. Each moves its keys, values and their gradients once, and q,
    dout, lse and delta of the queries that see it.
    """
    first = tl.program_id(0) % tiles * BLOCK_N
    kv_head = tl.program_id(0) // tiles % kv_heads
    sequence = tl.program_id(0) // (tiles * kv_heads)
    q_start, queries = sequence_rows(masks.cu_seqlens_q, sequence, q_rows)
    k_start, keys = sequence_rows(masks.cu_seqlens_k, sequence, k_rows)
    if first >= keys:
        return
    batch = sequence if masks.cu_seqlens_q is None else 0
    PACKED: tl.constexpr = masks.cu_seqlens_q is not None
    row, k_end, q_end = k_start + first, k_start + keys, q_start + queries
    k_tile = load_rows(k, batch, kv_head, row, k_end, SIZE, BLOCK_N, BLOCK_D)
    v_tile = load_rows(v, batch, kv_head, row, k_end, VALUE_SIZE, BLOCK_N, BLOCK_DV)
    key = (first + tl.arange(0, BLOCK_N))[:, None]
    unit = score_unit(masks, NATURAL)
    LOG2_UNIT: tl.constexpr = LOG2E if NATURAL else 1.0
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_DV), dtype=tl.float32)

    # Which queries see a key: the same question from the other side.
    begin, full_begin, full_end, end = visible_tiles(
        first, min(first + BLOCK_N, keys), queries - keys, queries, masks.right, masks.left, BLOCK_M
    )
    for EDGE in tl.static_range(2):
        full_tiles = full_end - full_begin
        count = end - begin - full_tiles if EDGE else full_tiles
        for index in range(group * count):
            head = kv_head * group + index // count
            first_query = tile_at(index % count, begin, full_begin, full_end, EDGE) * BLOCK_M
            query = first_query + tl.arange(0, BLOCK_M)
            lse_row = (batch * kv_heads * group + head).to(tl.int64) * q_rows + q_start
            lse, delta = _row_statistics(lse_ptr, delta_ptr, lse_row, query, queries, LOG2_UNIT, EDGE)
            q_row = q_start + first_query
            q_tile = stream_rows(q, batch, head, q_row, q_end, SIZE, BLOCK_M, BLOCK_D, EDGE, PACKED)
            products = row_products(k_tile, q_tile, PART, PRECISION)
            position = (query + keys - queries)[None, :]
            slope = alibi_slope(masks, sequence, head)
            score, derivative = scores(products, position, key, keys, slope, masks, NATURAL, EDGE)
            probability = tl.exp2((score * unit - lse[None, :]) * LOG2_UNIT)
            dout_tile = stream_rows(dout, batch, head, q_row, q_end, VALUE_SIZE, BLOCK_M, BLOCK_DV, EDGE, PACKED)
            dprobability = row_products(v_tile, dout_tile, PART, PRECISION)
            seen = probability
            if masks.seed is not None:
                stream = sequence * kv_heads * group + head
                keep = kept(masks, stream, first_query, first, BLOCK_M, BLOCK_N).T
                seen = tl.where(keep, probability, 0.0)
                dprobability = tl.where(keep, dprobability * masks.keep_scale, 0.0)
            dv_tile = tl.dot(seen.to(dout_tile.dtype), dout_tile, dv_tile, input_precision=PRECISION)
            dscore = probability * (dprobability - delta[None, :]) * derivative
            dk_tile = tl.dot(dscore.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION)

    store_rows(dk_ptr, dk_tile * masks.scale, batch, kv_head, row, k_end, k_rows, kv_heads, SIZE)
    store_rows(dv_ptr, dv_tile * masks.keep_scale, batch, kv_head, row, k_end, k_rows, kv_heads, VALUE_SIZE)


@triton.jit
def _attention_dq_kernel(
    q,
    k,
    v,
    dout,
    dq_ptr,
    lse_ptr,
    delta_ptr,
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
    """dQ of a tile of queries. Tiles are (queries, keys).

    Programs: tiles of queries, heads, sequences. Each moves its q, dout, lse, delta and dq once, and the keys and
    values that it sees.
    """
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    head = tl.program_id(0) // tiles % heads
    sequence = tl.program_id(0) // (tiles * heads)
    q_start, queries = sequence_rows(masks.cu_seqlens_q, sequence, q_rows)
    k_start, keys = sequence_rows(masks.cu_seqlens_k, sequence, k_rows)
    if first >= queries:
        return
    batch = sequence if masks.cu_seqlens_q is None else 0
    PACKED: tl.constexpr = masks.cu_seqlens_q is not None
    row, q_end, k_end = q_start + first, q_start + queries, k_start + keys
    q_tile = load_rows(q, batch, head, row, q_end, SIZE, BLOCK_M, BLOCK_D)
    dout_tile = load_rows(dout, batch, head, row, q_end, VALUE_SIZE, BLOCK_M, BLOCK_DV)
    query = first + tl.arange(0, BLOCK_M)
    position = (query + keys - queries)[:, None]
    unit = score_unit(masks, NATURAL)
    LOG2_UNIT: tl.constexpr = LOG2E if NATURAL else 1.0
    lse_row = (batch * heads + head).to(tl.int64) * q_rows + q_start
    lse, delta = _row_statistics(lse_ptr, delta_ptr, lse_row, query, queries, LOG2_UNIT, True)
    slope = alibi_slope(masks, sequence, head)
    dq_tile = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)

    begin, full_begin, full_end, end = visible_tiles(
        first, min(first + BLOCK_M, queries), keys - queries, keys, masks.left, masks.right, BLOCK_N
    )
    for EDGE in tl.static_range(2):
        full_tiles = full_end - full_begin
        for index in range(end - begin - full_tiles if EDGE else full_tiles):
            first_key = tile_at(index, begin, full_begin, full_end, EDGE) * BLOCK_N
            k_row = k_start + first_key
            k_tile = stream_rows(k, batch, head // group, k_row, k_end, SIZE, BLOCK_N, BLOCK_D, EDGE, PACKED)
            v_tile = stream_rows(v, batch, head // group, k_row, k_end, VALUE_SIZE, BLOCK_N, BLOCK_DV, EDGE, PACKED)
            products = row_products(q_tile, k_tile, PART, PRECISION)
            key = (first_key + tl.arange(0, BLOCK_N))[None, :]
            score, derivative = scores(products, position, key, keys, slope, masks, NATURAL, EDGE)
            probability = tl.exp2((score * unit - lse[:, None]) * LOG2_UNIT)
            dprobability = row_products(dout_tile, v_tile, PART, PRECISION)
            if masks.seed is not None:
                keep = kept(masks, sequence * heads + head, first, first_key, BLOCK_M, BLOCK_N)
                dprobability = tl.where(keep, dprobability * masks.keep_scale, 0.0)
            dscore = probability * (dprobability - delta[:, None]) * derivative
            dq_tile = tl.dot(dscore.to(k_tile.dtype), k_tile, dq_tile, input_precision=PRECISION)

    store_rows(dq_ptr, dq_tile * masks.scale, batch, head, row, q_end, q_rows, heads, SIZE)
