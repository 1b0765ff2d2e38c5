"""Attention for GPUs: from the operators' arguments to launches of the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memkernels.ops.attention.configs import Config, Tile, select_config
from memkernels.ops.attention.triton_bwd import _attention_delta_kernel, _attention_dkdv_kernel, _attention_dq_kernel
from memkernels.ops.attention.triton_fwd import _attention_fwd_kernel
from memkernels.ops.attention.triton_scores import Masks
from memkernels.ops.attention.triton_tiles import Rows
from memkernels.ops.philox import threshold

_UNBOUNDED = 2**30


def _aligned(tensor: Tensor) -> Tensor:
    """(B, S, H, D), packed rows as one batch, with rows at multiples of 16 bytes and D of 8; copied where it is not."""
    tensor = tensor if tensor.dim() == 4 else tensor[None]
    if tensor.shape[-1] % 8:
        tensor = torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % 8))
    *strides, last = tensor.stride()
    fits = last == 1 and all(stride > 0 and stride % 8 == 0 for stride in strides) and tensor.data_ptr() % 16 == 0
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def _blocks(*sizes: int) -> list[int]:
    """The columns in which tiles hold heads of these sizes: half of the largest at least, or registers spill."""
    blocks = [max(16, triton.next_power_of_2(size)) for size in sizes]
    return [max(block, max(blocks) // 2) for block in blocks]


def _rows(tensor: Tensor, streamed: int = 0, columns: int = 0) -> Rows:
    """With a number of rows that are streamed at a time, in so many columns, also by a descriptor."""
    block = [1, 1, streamed, columns]
    descriptor = TensorDescriptor.from_tensor(tensor.transpose(1, 2), block) if streamed else None
    batch_stride, row_stride, head_stride, _ = tensor.stride()
    return Rows(tensor, batch_stride, row_stride, head_stride, descriptor)


def _masks(
    cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, scale, window_left, window_right, softcap, dropout_p
) -> Masks:
    cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks = (
        t if t is None else t.contiguous() for t in (cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks)
    )
    left, right = (_UNBOUNDED if span < 0 else min(span, _UNBOUNDED) for span in (window_left, window_right))
    return Masks(
        cu_seqlens_q, cu_seqlens_k, alibi_slopes,
        alibi_batch_stride=alibi_slopes.shape[1] if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        sinks=sinks,
        seed=seed if dropout_p > 0 else None,
        left=left,
        right=right,
        scale=scale,
        softcap=softcap if softcap > 0 else None,
        dropped_below=threshold(dropout_p) - 2**31,
        keep_scale=1.0 / (1.0 - dropout_p),
    )  # fmt: skip


class _Call:
    """What the launches of one call share: operands, masks, sizes and configuration."""

    def __init__(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, max_seqlen_q, max_seqlen_k, *options,
        config: Config | None,
    ):  # fmt: skip
        self.q, self.k, self.v = map(_aligned, (q, k, v))
        self.masks = _masks(cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, *options)
        self.sequences = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        self.natural = (
            q.dtype == torch.float32
            or alibi_slopes is not None
            or (self.masks.softcap is None and self.masks.scale <= 0)
        )
        self.max_queries, self.max_keys = max_seqlen_q, max_seqlen_k
        self.heads, self.kv_heads = q.shape[-2], k.shape[-2]
        self.size, self.value_size = self.q.shape[-1], self.v.shape[-1]
        self.block_d, self.block_dv = _blocks(self.size, self.value_size)
        rich = alibi_slopes is not None or self.masks.softcap is not None or self.masks.seed is not None
        self.config = config or select_config((self.block_d, self.block_dv), rich, q.dtype, q.device)
        if not all(tensor.numel() for tensor in (q, k, v)):  # nothing for a descriptor to describe
            self.config = self.config._replace(TMA=False)

    def launch(
        self,
        kernel: Any,
        tile: Tile,
        outputs: tuple[Tensor, ...],
        statistics: tuple[Tensor, ...],
        *,
        dout: Tensor | None = None,
        by_keys: bool = False,
    ) -> None:
        """Runs `kernel` on each tile of queries, or of keys, of each of their heads and of each sequence."""
        block, longest, heads = tile.BLOCK_M, self.max_queries, self.heads
        if by_keys:
            block, longest, heads = tile.BLOCK_N, self.max_keys, self.kv_heads
        tiles = triton.cdiv(longest, block)
        if tiles * heads * self.sequences == 0:
            return
        # A program keeps the tile of its own side and streams those of the other.
        streamed_q, streamed_k = (tile.BLOCK_M, 0) if by_keys else (0, tile.BLOCK_N)
        inputs = [(self.q, streamed_q, self.block_d), (self.k, streamed_k, self.block_d)]
        inputs += [(self.v, streamed_k, self.block_dv)]
        inputs += [] if dout is None else [(dout, streamed_q, self.block_dv)]
        kernel[(tiles * heads * self.sequences,)](
            *(_rows(tensor, rows if self.config.TMA else 0, columns) for tensor, rows, columns in inputs), *outputs,
            *statistics, self.masks, heads, self.heads // self.kv_heads, self.q.shape[1], self.k.shape[1], tiles,
            SIZE=self.size, VALUE_SIZE=self.value_size, NATURAL=self.natural, PRECISION=self.config.PRECISION,
            BLOCK_D=self.block_d, BLOCK_DV=self.block_dv, **tile.options(),
        )  # fmt: skip


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _as_output(rows: Tensor, tensor: Tensor) -> Tensor:
    """(B, S, H, D) as kernels write it, in the layout and head size of `tensor`."""
    rows = rows if tensor.dim() == 4 else rows[0]
    return rows[..., : tensor.shape[-1]].contiguous()


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, *masks: Any, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """The operator of that name; without a configuration, by that of q's device."""
    call = _Call(q, k, v, *masks, config=config)
    batch, rows, heads, _ = call.q.shape
    out = q.new_empty(batch, rows, heads, call.value_size)
    lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    call.launch(_attention_fwd_kernel, call.config.forward, (out,), (lse,))
    out = _as_output(out, v)
    return out, lse if q.dim() == 4 else lse[0]


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *masks: Any,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator of that name, by the configuration of q's device without another; always deterministic."""
    *masks, _deterministic = masks  # type: ignore[assignment]
    call = _Call(q, k, v, *masks, config=config)
    dout, lse = _aligned(dout), lse.contiguous()
    delta, dsinks = _delta(call, _aligned(out), dout, lse, dlse if dlse is None else dlse.contiguous())
    dq, dk, dv = map(_empty_like, (call.q, call.k, call.v))
    call.launch(_attention_dkdv_kernel, call.config.dkdv, (dk, dv), (lse, delta), dout=dout, by_keys=True)
    call.launch(_attention_dq_kernel, call.config.dq, (dq,), (lse, delta), dout=dout)
    return _as_output(dq, q), _as_output(dk, k), _as_output(dv, v), dsinks


def _delta(call: _Call, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    """delta of every query, like lse, and the gradient of the sinks."""
    batch, rows, heads, size = out.shape
    block_m = max(16, 4096 // call.block_dv)
    tiles = triton.cdiv(rows, block_m)
    delta = torch.empty_like(lse)
    sinks = call.masks.sinks
    dsinks_partial = lse.new_empty(batch * tiles, 0 if sinks is None else heads)
    if delta.numel():
        _attention_delta_kernel[(tiles * heads * batch,)](
            _rows(out), _rows(dout), lse, dlse, sinks, delta, dsinks_partial, heads, rows, tiles,
            VALUE_SIZE=size, BLOCK_M=block_m, BLOCK_DV=call.block_dv,
        )  # fmt: skip
    return delta, dsinks_partial.sum(0)
