"""Sums of the adapter's kernels on GPUs, cut in parts where a result has too few tiles to fill the GPU.

The parts' terms are added in a fixed order: without atomics, so the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from memkernels.ops.launch import num_programs


def rank_block(rank: int) -> int:
    return max(16, min(64, triton.next_power_of_2(rank)))


def cut_in_parts(x: Tensor, tiles: int, size: int, block: int, *, per_multiprocessor: int = 2) -> tuple[int, int]:
    """Into how many parts a walk over `size` is cut so that those of all tiles fill the GPU, and how long each is."""
    programs = num_programs(x, tiles * triton.cdiv(size, block), 1, per_multiprocessor=per_multiprocessor)
    length = triton.cdiv(triton.cdiv(size, max(1, programs // tiles)), block) * block
    return triton.cdiv(size, length), length


def sum_of(terms: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the terms of each part, in their order."""
    return (terms[0] if len(terms) == 1 else terms.sum(0)).to(dtype)
