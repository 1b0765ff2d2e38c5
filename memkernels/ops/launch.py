"""How row kernels are launched on GPUs: the tile of rows a program holds, and the number of programs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class RowTile:
    """BLOCK_M rows of BLOCK_N >= size columns, held by num_warps warps."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int

    def options(self) -> dict[str, int]:
        return {"BLOCK_M": self.BLOCK_M, "BLOCK_N": self.BLOCK_N, "num_warps": self.num_warps}


def row_tile(size: int) -> RowTile:
    """About 16 elements of a row a thread, as float32 in backward spills at 32; short rows share four warps."""
    block_n = triton.next_power_of_2(max(size, 1))
    block_m = max(1, min(16, 2048 // block_n))
    return RowTile(block_m, block_n, num_warps=min(16, max(4, block_n // 512)))


def holds_row(size: int, *, twice: bool = False) -> bool:
    """Whether a program has registers for a row: where it is no multiple of 16, Triton spreads it less evenly.

    AMD's warps have twice as many lanes. `twice`: as wide again, where it has no sums to hold.
    """
    widest = 8192 if size % 16 == 0 else 4096
    return size <= widest * (2 if torch.version.hip else 1) * (2 if twice else 1)


def multiprocessors(x: Tensor) -> int:
    """Of x's GPU; a fixed few on a CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def num_programs(x: Tensor, rows: int, rows_per_program: int, *, per_multiprocessor: int = 2) -> int:
    """As many a multiprocessor, or fewer where rows run out; a fixed few under the interpreter."""
    limit = multiprocessors(x) * (per_multiprocessor if x.is_cuda else 1)
    return max(1, min(limit, triton.cdiv(rows, rows_per_program)))
