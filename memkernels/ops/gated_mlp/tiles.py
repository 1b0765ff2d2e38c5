"""Tiles of the hidden layer's matrix products, by GPU architecture, direction and precision.

Each compiles without a spilled register for every activation and fits its architecture's shared memory. They are not
tuned: no speed has been measured on a GPU.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class GemmTile:
    """A program's output tile, BLOCK_M tokens by BLOCK_N hidden columns, and how it walks d in steps of BLOCK_K.

    GROUP_M tiles of tokens take turns at one tile of weights, which then comes from L2. PRECISION is how float32
    operands are multiplied. TMA: matrices are moved through tensor-map descriptors, else through pointers. maxnreg: a
    bound of registers that lets NVIDIA's compiler use them all, where it would spill to fit more programs.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8
    PRECISION: str = "ieee"
    TMA: bool = False
    maxnreg: int | None = None

    def options(self) -> dict[str, int | str | bool]:
        """The kernel's compile-time arguments."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def programs(self, rows: int, columns: int) -> int:
        return -(-rows // self.BLOCK_M) * -(-columns // self.BLOCK_N)


# For bfloat16 and float16 matrices whose rows are aligned: {architecture: (forward, backward)}. Backward holds a third
# accumulator.
TILES = {
    "sm_80": (GemmTile(128, 64, 64, num_warps=8, num_stages=4), GemmTile(128, 64, 64, num_warps=8, num_stages=4)),
    "sm_86": (GemmTile(128, 64, 64, num_warps=8, num_stages=3), GemmTile(128, 64, 64, num_warps=8, num_stages=3)),
    "sm_90": (
        GemmTile(128, 128, 64, num_warps=8, num_stages=4, TMA=True),
        GemmTile(128, 64, 64, num_warps=8, num_stages=4, TMA=True),
    ),
    "sm_100": (
        GemmTile(128, 128, 64, num_warps=8, num_stages=4, TMA=True),
        GemmTile(128, 64, 64, num_warps=8, num_stages=4, TMA=True),
    ),
    "sm_120": (
        GemmTile(128, 64, 64, num_warps=8, num_stages=3, TMA=True),
        GemmTile(128, 64, 32, num_warps=8, num_stages=4, TMA=True),
    ),
    "gfx942": (GemmTile(128, 128, 32, num_warps=8, num_stages=2), GemmTile(128, 64, 64, num_warps=8, num_stages=2)),
}
TF32_TILE = GemmTile(128, 64, 32, num_warps=8, num_stages=3, PRECISION="tf32")
# For rows that are not aligned, where each element is loaded by itself and its address takes registers; and for exact
# float32 products, which have no tensor cores on NVIDIA.
SMALL_TILE = GemmTile(64, 64, 16, num_warps=8, num_stages=3)
# Several tiles each way at the sizes that tests use.
INTERPRETER_TILE = GemmTile(32, 32, 32, num_warps=1, num_stages=1, GROUP_M=2)


def architecture(device: torch.device) -> str:
    """The entry of the tables for a GPU: its own, or the closest older one's."""
    if torch.version.hip:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    known = {(12, 0): "sm_120", (10, 0): "sm_100", (9, 0): "sm_90", (8, 6): "sm_86", (8, 0): "sm_80"}
    return next((name for oldest, name in known.items() if capability >= oldest), "sm_86")


def select_tile(backward: bool, dtype: torch.dtype, device: torch.device, *, aligned: bool) -> GemmTile:
    """The tile for a launch; `aligned` says whether the rows of every matrix are, as `GemmTile.TMA` needs."""
    if device.type != "cuda":
        return dataclasses.replace(INTERPRETER_TILE, TMA=aligned)
    if dtype == torch.float32:
        # torch's own setting decides whether float32 products may round their operands; AMD's need not.
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and not torch.version.hip
        return TF32_TILE if tf32 and aligned else dataclasses.replace(SMALL_TILE, PRECISION="tf32" if tf32 else "ieee")
    return TILES[architecture(device)][backward] if aligned else SMALL_TILE
