"""The configurations of attention's Triton kernels that the checks without a GPU compile and count.

Every tile of every architecture: without options on a batch, and with all of them at once on packed sequences, causal;
those of float32 with all of them. Missing are float32 heads on NVIDIA that spill: over 64 exactly, over 128 by tf32.
The least bytes are those of flash attention at the tile's size: what a tile keeps and writes once, and of the other
side what it sees, tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from memkernels.ops.attention.configs import FLOAT32, PLAIN, RICH, Config
from memkernels.ops.attention.triton import attention_bwd, attention_fwd
from memkernels.testing.cases import TARGETS, KernelCase, Target

SEQUENCES, LENGTH, HEADS, KV_HEADS = 2, 256, 2, 1


def _inputs(size: int, rich: bool, dtype: torch.dtype, device: str) -> tuple[list[Tensor], tuple]:
    """q, k, v and what the operators take after them."""
    lead = (SEQUENCES * LENGTH,) if rich else (SEQUENCES, LENGTH)
    inputs = [torch.ones(*lead, heads, size, dtype=dtype, device=device) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    if not rich:
        return inputs, (None, None, None, None, None, LENGTH, LENGTH, 0.1, -1, 0, 0.0, 0.0)
    starts = torch.arange(0, (SEQUENCES + 1) * LENGTH, LENGTH, dtype=torch.int32, device=device)
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


def _forward(config: Config, size: int, rich: bool, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    (q, k, v), masks = _inputs(size, rich, dtype, device)
    out, lse = attention_fwd(q, k, v, *masks, config=config)
    return q, out, lse, *_seen(config.forward.BLOCK_M, *(k, v) * (HEADS // KV_HEADS))


def _backward(config: Config, size: int, rich: bool, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    (q, k, v), masks = _inputs(size, rich, dtype, device)
    out, dout = torch.ones_like(q), torch.ones_like(q)
    lse = torch.ones(*((HEADS, len(q)) if rich else (SEQUENCES, HEADS, LENGTH)), device=device)
    dq, dk, dv, _ = attention_bwd(dout, None, q, k, v, out, lse, *masks, True, config=config)
    delta = torch.empty_like(lse)
    of_delta = out, dout, lse, delta
    of_dkdv = k, v, dk, dv, *_seen(config.dkdv.BLOCK_N, q, dout, lse, delta, later=True)
    of_dq = q, dout, lse, delta, dq, *_seen(config.dq.BLOCK_M, *(k, v) * (HEADS // KV_HEADS))
    return *of_delta, *of_dkdv, *of_dq


def _cases(
    name: str, config: Config, size: int, rich: bool, targets: tuple[Target, ...], dtype: torch.dtype = torch.bfloat16
) -> list[KernelCase]:
    label = f"{str(dtype)[6:]} {size} {name}{' all options' if rich else ''}"
    return [
        KernelCase(f"forward {label}", partial(_forward, config, size, rich, dtype), targets=targets),
        KernelCase(f"backward {label}", partial(_backward, config, size, rich, dtype), targets=targets),
    ]


def _targets(architecture: str) -> tuple[Target, ...]:
    names = ("sm_86", "sm_89") if architecture == "sm_86" else (architecture,)
    return tuple(target for target in TARGETS if target.name in names)


def _block(size: int) -> int:
    return 128 if size == 96 else size


NVIDIA, AMD = (tuple(t for t in TARGETS if t.backend == backend) for backend in ("cuda", "hip"))

KERNEL_CASES = [
    case
    for architecture, size in product(PLAIN, (64, 96, 128, 256))
    for rich, configs in ((False, PLAIN), (True, RICH))
    for case in _cases(architecture, configs[architecture][_block(size)], size, rich, _targets(architecture))
]
KERNEL_CASES += [
    case
    for name, configs, precision, sizes, targets in (
        ("exact", FLOAT32["nvidia"], "ieee", (64,), NVIDIA),
        ("tf32", FLOAT32["nvidia"], "tf32", (64, 128), NVIDIA),
        ("gfx942", FLOAT32["amd"], "ieee", (64, 128, 256), AMD),
    )
    for size in sizes
    for case in _cases(name, configs[size]._replace(PRECISION=precision), size, True, targets, torch.float32)
]
