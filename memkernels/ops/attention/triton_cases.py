"""The configurations of attention's Triton kernels that the checks without a GPU compile and count.

Every tile of every architecture, causal: without options on a batch, with all of them at once on packed sequences and,
where rows come by TMA, on a batch, whose edges then do too; those of float32 with all of them, and where head sizes
differ so that one is cut in fewer parts. Without options also small heads, head sizes that differ, by much with all
options too, and what training packed sequences and gpt-oss launch, sinks and a window without the options that have
tiles of their own. The window hides nothing here: a kernel knows it as a number alone. The least bytes are those of
flash attention at the tile's size: what a tile keeps and writes once, and of the other side what it sees, tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from memkernels.ops.attention.configs import FLOAT32, PLAIN, RICH, Config, fitting
from memkernels.ops.attention.triton import attention_bwd, attention_fwd
from memkernels.testing.cases import AMD, NVIDIA, KernelCase, Target, targets_of

Sizes = tuple[int, int]  # of a head of q and k, and of v

SEQUENCES, LENGTH, HEADS, KV_HEADS = 2, 256, 2, 1
NONE, PACKED, BATCH = "", " all options", " all options on a batch"
PACKED_ALONE, SINKS, PACKED_SINKS = " packed", " sinks and window", " packed, sinks and window"
WINDOW = 2 * LENGTH - 1


def _inputs(sizes: Sizes, options: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], tuple]:
    """q, k, v and what the operators take after them."""
    packed = options in (PACKED, PACKED_ALONE, PACKED_SINKS)
    lead = (SEQUENCES * LENGTH,) if packed else (SEQUENCES, LENGTH)
    shapes = (HEADS, sizes[0]), (KV_HEADS, sizes[0]), (KV_HEADS, sizes[1])
    inputs = [torch.ones(*lead, *shape, dtype=dtype, device=device) for shape in shapes]
    starts = torch.arange(0, (SEQUENCES + 1) * LENGTH, LENGTH, dtype=torch.int32, device=device) if packed else None
    slopes, sinks = (torch.ones(HEADS, device=device) for _ in range(2))
    lengths = LENGTH, LENGTH
    if options in (PACKED, BATCH):
        seed = torch.zeros((), dtype=torch.int64, device=device)
        return inputs, (starts, starts, slopes, sinks, seed, *lengths, 0.1, -1, 0, 30.0, 0.1)
    if options in (SINKS, PACKED_SINKS):
        return inputs, (starts, starts, None, sinks, None, *lengths, 0.1, WINDOW, 0, 0.0, 0.0)
    return inputs, (starts, starts, None, None, None, *lengths, 0.1, -1, 0, 0.0, 0.0)


def _seen(block: int, *tensors: Tensor, later: bool = False) -> Iterator[Tensor]:
    """What each tile of `block` rows sees of the other side: all up to its last row or, `later`, from its first on.

    Of the tensors' layout nothing matters but the bytes of a row.
    """
    for first in range(0, LENGTH, block):
        for tensor in tensors:
            rows = tensor.reshape(SEQUENCES, LENGTH, -1)
            yield rows[:, first:] if later else rows[:, : first + block]


def _forward(config: Config, sizes: Sizes, options: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    (q, k, v), masks = _inputs(sizes, options, dtype, device)
    out, lse = attention_fwd(q, k, v, *masks, config=config)
    return q, out, lse, *_seen(config.forward.BLOCK_M, *(k, v) * (HEADS // KV_HEADS))


def _backward(config: Config, sizes: Sizes, options: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    (q, k, v), masks = _inputs(sizes, options, dtype, device)
    out, dout = (q.new_ones(*q.shape[:-1], sizes[1]) for _ in range(2))
    lse = torch.ones(*((HEADS, len(q)) if q.dim() == 3 else (SEQUENCES, HEADS, LENGTH)), device=device)
    dq, dk, dv, _ = attention_bwd(dout, None, q, k, v, out, lse, *masks, True, config=config)
    delta = torch.empty_like(lse)
    of_delta = out, dout, lse, delta
    of_dkdv = k, v, dk, dv, *_seen(config.dkdv.BLOCK_N, q, dout, lse, delta, later=True)
    of_dq = q, dout, lse, delta, dq, *_seen(config.dq.BLOCK_M, *(k, v) * (HEADS // KV_HEADS))
    return *of_delta, *of_dkdv, *of_dq


def _cases(
    name: str,
    config: Config,
    sizes: Sizes,
    options: str,
    targets: tuple[Target, ...],
    dtype: torch.dtype = torch.bfloat16,
) -> list[KernelCase]:
    size = str(sizes[0]) if sizes[0] == sizes[1] else f"{sizes[0]}/{sizes[1]}"
    label = f"{str(dtype)[6:]} {size} {name}{options}"
    return [
        KernelCase(f"forward {label}", partial(_forward, config, sizes, options, dtype), targets=targets),
        KernelCase(f"backward {label}", partial(_backward, config, sizes, options, dtype), targets=targets),
    ]


KERNEL_CASES = [
    case
    for architecture, size in product(PLAIN, (64, 96, 128, 256))
    for options, configs in (
        (NONE, PLAIN), (PACKED_ALONE, PLAIN), (SINKS, PLAIN), (PACKED_SINKS, PLAIN), (PACKED, RICH), (BATCH, RICH)
    )
    if options != BATCH or fitting(configs[architecture], (size, size)).TMA
    for case in _cases(
        architecture, fitting(configs[architecture], (size, size)), (size, size), options, targets_of(architecture)
    )
]  # fmt: skip
KERNEL_CASES += [
    case
    for architecture, size in product(PLAIN, (16, 32))
    for case in _cases(
        architecture, fitting(PLAIN[architecture], (size, size)), (size, size), NONE, targets_of(architecture)
    )
]
KERNEL_CASES += [
    case
    for architecture in PLAIN
    for sizes, (options, configs) in product(((192, 128), (32, 256)), ((NONE, PLAIN), (PACKED, RICH)))
    for case in _cases(architecture, configs[architecture][256], sizes, options, targets_of(architecture))
]
KERNEL_CASES += [
    case
    for options, configs in ((NONE, PLAIN), (PACKED, RICH))
    for architecture, sizes in product(configs, ((64, 128), (128, 64)))
    for case in _cases(architecture, fitting(configs[architecture], sizes), sizes, options, targets_of(architecture))
]
KERNEL_CASES += [
    case
    for name, targets in (("exact", NVIDIA), ("tf32", NVIDIA), ("amd", AMD))
    for size in (32, 64, 96, 128, 256)
    for case in _cases(name, fitting(FLOAT32[name], (size, size)), (size, size), PACKED, targets, torch.float32)
]
KERNEL_CASES += [
    case
    for name, sizes in (("exact", (64, 128)), ("tf32", (64, 256)))
    for case in _cases(name, FLOAT32[name][sizes[1]], sizes, PACKED, NVIDIA, torch.float32)
]
