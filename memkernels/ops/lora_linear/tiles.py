"""Tiles of the adapter's narrow products: those by the rank's few columns, and the gradients of its factors.

Each compiles without a spilled register and fits the shared memory of every architecture. They are not tuned: no speed
has been measured on a GPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from memkernels.ops.product_tiles import low_rank_precision


@dataclass(frozen=True)
class NarrowTile:
    """A program's tile of x or dy, BLOCK_M rows by BLOCK_N columns.

    maxnreg: a bound of registers that lets NVIDIA's compiler use them all, where it would spill to fit more programs.
    PRECISION: how float32 operands are multiplied.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    PRECISION: str = "ieee"

    def options(self) -> dict[str, int | str]:
        """The kernel's compile-time arguments."""
        return {name: value for name, value in asdict(self).items() if value is not None}


Tiles = dict[str, dict[int, NarrowTile]]
# By vendor and the bytes of an element of the adapter.
NARROW_TILES: Tiles = {
    "nvidia": {
        2: NarrowTile(64, 64, num_warps=4, num_stages=3, maxnreg=255),
        4: NarrowTile(32, 64, num_warps=8, num_stages=2, maxnreg=255),
    },
    "amd": {2: NarrowTile(64, 64, num_warps=4, num_stages=1), 4: NarrowTile(32, 64, num_warps=4, num_stages=1)},
}
# Where a program makes the masks of several adapters from a tile and sums for each.
SHARED_TILES: Tiles = {
    "nvidia": {2: NARROW_TILES["nvidia"][2], 4: NarrowTile(16, 64, num_warps=4, num_stages=2, maxnreg=255)},
    "amd": {2: NarrowTile(32, 64, num_warps=4, num_stages=1), 4: NARROW_TILES["amd"][4]},
}
# Where p and the gradient of B come from one read of dy, at low ranks: the wider, the fewer terms of p.
UP_GRAD_TILES: Tiles = {
    "nvidia": {
        2: NarrowTile(64, 256, num_warps=8, num_stages=2, maxnreg=255),
        4: NarrowTile(32, 128, num_warps=8, num_stages=2, maxnreg=255),
    },
    "amd": {2: NarrowTile(32, 256, num_warps=8, num_stages=1), 4: NarrowTile(32, 128, num_warps=8, num_stages=1)},
}
# Several tiles each way at the sizes that tests use.
INTERPRETER_TILE = NarrowTile(32, 64, num_warps=1, num_stages=1)


def select_narrow(dtype: torch.dtype, device: torch.device, tiles: Tiles = NARROW_TILES) -> NarrowTile:
    """The tile for an adapter of a dtype."""
    if device.type != "cuda":
        return INTERPRETER_TILE
    tile = tiles["amd" if torch.version.hip else "nvidia"][dtype.itemsize]
    return replace(tile, PRECISION=low_rank_precision(dtype, device))
