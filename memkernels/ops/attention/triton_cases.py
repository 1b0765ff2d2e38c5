"""The configurations of attention's Triton kernels that the checks without a GPU compile and count.

Every tile of every architecture, causal: without options on a batch, with all of them at once on packed sequences and,
where rows come by TMA, on a batch, whose edges then do too; those of float32 with all of them. The least bytes are
those of flash attention at the tile's size: what a tile keeps and writes once, and of the other side what it sees, tile
by tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from memkernels.ops.attention.configs import FLOAT32, PLAIN, RICH, Config
from memkernels.ops.attention.triton import attention_bwd, attention_fwd
from memkernels.testing.cases import AMD, NVIDIA, KernelCase, Target, targets_of

SEQUENCES, LENGTH, HEADS, KV_HEADS = 2, 256, 2, 1
NONE, PACKED, BATCH = "", " all options", " all options on a batch"


def _inputs(size: int, options: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], tuple]:
    """q, k, v and what the operators take after them."""
    packed = options == PACKED
    lead = (SEQUENCES * LENGTH,) if packed else (SEQUENCES, LENGTH)
    inputs = [torch.ones(*lead, heads, size, dtype=dtype, device=device) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    if options == NONE:
        return inputs, (None, None, None, None, None, LENGTH, LENGTH, 0.1, -1, 0, 0.0, 0.0)
    starts = torch.arange(0, (SEQUENCES + 1) * LENGTH, LENGTH, dtype=torch.int32, device=device) if packed else None
    slopes, sinks = (torch.ones(HEADS, device=device) for _ in range(2))
    seed = torch.zeros((), dtype=torch.int64, device=device)
    return inputs, (starts, starts, slopes, sinks, seed, LENGTH, LENGTH, 0.1, -1, 0, 30.0, 0.1)


def _seen(block: int, *tensors: Tensor, later: bool = False) -> Iterator[Tensor]:
    """What each tile of `block` rows sees of the other side: all up to its last row or, `later`, from its first on.

    Of the tensors' layout nothing matters but the bytes of a row.
    """
    for first in range(0, LENGTH, block):
        for tensor in tensors:
            rows = tensor.reshape(SEQUENCES, LENGTH, -1)
            yield rows[:, first:] if later else rows[:, : first + block]


def _forward(config: Config, size: int, options: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    (q, k, v), masks = _inputs(size, options, dtype, device)
    out, lse = attention_fwd(q, k, v, *masks, config=config)
    return q, out, lse, *_seen(config.forward.BLOCK_M, *(k, v) * (HEADS // KV_HEADS))


def _backward(config: Config, size: int, options: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    (q, k, v), masks = _inputs(size, options, dtype, device)
    out, dout = torch.ones_like(q), torch.ones_like(q)
    lse = torch.ones(*((HEADS, len(q)) if options == PACKED else (SEQUENCES, HEADS, LENGTH)), device=device)
    dq, dk, dv, _ = attention_bwd(dout, None, q, k, v, out, lse, *masks, True, config=config)
    delta = torch.empty_like(lse)
    of_delta = out, dout, lse, delta
    of_dkdv = k, v, dk, dv, *_seen(config.dkdv.BLOCK_N, q, dout, lse, delta, later=True)
    of_dq = q, dout, lse, delta, dq, *_seen(config.dq.BLOCK_M, *(k, v) * (HEADS // KV_HEADS))
    return *of_delta, *of_dkdv, *of_dq


def _cases(
    name: str,
    config: Config,
    size: int,
    options: str,
    targets: tuple[Target, ...],
    dtype: torch.dtype = torch.bfloat16,
) -> list[KernelCase]:
    label = f"{str(dtype)[6:]} {size} {name}{options}"
    return [
        KernelCase(f"forward {label}", partial(_forward, config, size, options, dtype), targets=targets),
        KernelCase(f"backward {label}", partial(_backward, config, size, options, dtype), targets=targets),
    ]


def _block(size: int) -> int:
    return 128 if size == 96 else size


KERNEL_CASES = [
    case
    for architecture, size in product(PLAIN, (64, 96, 128, 256))
    for options, configs in ((NONE, PLAIN), (PACKED, RICH), (BATCH, RICH))
    if options != BATCH or configs[architecture][_block(size)].TMA
    for case in _cases(architecture, configs[architecture][_block(size)], size, options, targets_of(architecture))
]
KERNEL_CASES += [
    case
    for name, targets in (("exact", NVIDIA), ("tf32", NVIDIA), ("amd", AMD))
    for size in (64, 96, 128, 256)
    for case in _cases(name, FLOAT32[name][_block(size)], size, PACKED, targets, torch.float32)
]
