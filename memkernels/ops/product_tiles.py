"""Tiles of `product_triton`'s kernel, by GPU architecture and by what the weight is stored in.

Each compiles without a spilled register and fits its architecture's shared memory. They are not tuned: no speed has
been measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from memkernels.ops.gated_mlp.tiles import GemmTile, architecture


@dataclass(frozen=True)
class ProductTile(GemmTile):
    """LOW_RANK_PRECISION: how float32 factors of the low-rank term are multiplied.

    BLOCK_N holds whole groups of the 64 columns that a dropout mask comes in.
    """

    LOW_RANK_PRECISION: str = "ieee"


# For bfloat16 and float16 matrices whose rows are aligned.
TILES = {
    "sm_80": ProductTile(128, 128, 32, num_warps=8, num_stages=4),
    "sm_86": ProductTile(128, 128, 32, num_warps=8, num_stages=3),
    "sm_90": ProductTile(128, 128, 64, num_warps=8, num_stages=4, TMA=True),
    "sm_100": ProductTile(128, 128, 64, num_warps=8, num_stages=4, TMA=True),
    "sm_120": ProductTile(128, 64, 64, num_warps=8, num_stages=3, TMA=True),
    "gfx942": ProductTile(128, 128, 32, num_warps=8, num_stages=2),
}
# The same over a quantised weight, whose tile comes through registers.
QUANTIZED_TILES = {
    "sm_80": ProductTile(128, 64, 64, num_warps=8, num_stages=3),
    "sm_86": ProductTile(128, 64, 64, num_warps=8, num_stages=3),
    "sm_90": ProductTile(128, 64, 64, num_warps=8, num_stages=3, TMA=True),
    "sm_100": ProductTile(128, 64, 64, num_warps=8, num_stages=3, TMA=True),
    "sm_120": ProductTile(128, 64, 64, num_warps=8, num_stages=3, TMA=True),
    "gfx942": ProductTile(128, 64, 64, num_warps=8, num_stages=1),
}
TF32_TILE = ProductTile(
    128, 64, 32, num_warps=8, num_stages=3, PRECISION="tf32", LOW_RANK_PRECISION="tf32", maxnreg=255
)
# For rows that are not aligned; for quantised rows that 64 columns do not cut into parts of one block each; for exact
# float32 products, which have no tensor cores on NVIDIA.
SMALL_TILES = {
    "nvidia": ProductTile(64, 64, 16, num_warps=8, num_stages=2, maxnreg=255),
    "amd": ProductTile(64, 64, 16, num_warps=8, num_stages=2),
}
# For exact float32 products with a quantised weight on NVIDIA. From 64 rows on Triton 3.7 gives a product to sm_100's
# tensor cores as tf32, whatever precision it asks for, if an operand was loaded in fewer than 32 bits.
EXACT_QUANTIZED_TILE = replace(SMALL_TILES["nvidia"], BLOCK_M=32)
# Several tiles each way at the sizes that tests use.
INTERPRETER_TILE = ProductTile(32, 64, 32, num_warps=1, num_stages=1, GROUP_M=2)


def low_rank_precision(dtype: torch.dtype, device: torch.device) -> str:
    """How products with a few columns multiply float32.

    On NVIDIA, whose tensor cores have no exact float32, by three products of tf32, whose error is that of float32's own
    rounding; or by one, where torch allows it.
    """
    if device.type != "cuda" or torch.version.hip or dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def select_tile(
    dtype: torch.dtype,
    low_rank_dtype: torch.dtype,
    device: torch.device,
    *,
    aligned: bool,
    tiles: dict[str, ProductTile] = TILES,
) -> ProductTile:
    """The tile for a launch; `aligned` says whether the rows of every matrix are, as `GemmTile.TMA` needs."""
    if device.type != "cuda":
        return replace(INTERPRETER_TILE, TMA=aligned)
    small_tile = SMALL_TILES["amd" if torch.version.hip else "nvidia"]
    if dtype == torch.float32:
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and not torch.version.hip
        precision = "tf32" if tf32 else "ieee"
        if tiles is QUANTIZED_TILES and not tf32 and not torch.version.hip:
            small_tile = EXACT_QUANTIZED_TILE
        tile = TF32_TILE if tf32 and aligned else replace(small_tile, PRECISION=precision)
        return replace(tile, LOW_RANK_PRECISION=precision)
    tile = tiles[architecture(device)] if aligned else small_tile
    return replace(tile, LOW_RANK_PRECISION=low_rank_precision(low_rank_dtype, device))
