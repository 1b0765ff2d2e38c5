"""Tiles of the grouped products' kernels, by GPU architecture.

Each compiles without a spilled register and fits its architecture's shared memory. They are not tuned: no speed has
been measured on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from memkernels.ops.gated_mlp.tiles import GemmTile, architecture
from memkernels.ops.product_tiles import EXACT_QUANTIZED_TILE, low_rank_precision

# For bfloat16 and float16 matrices whose rows are aligned; TMA moves the weights, since rows are gathered.
PRODUCT = {
    "sm_80": GemmTile(128, 128, 32, num_warps=8, num_stages=4),
    "sm_86": GemmTile(128, 128, 32, num_warps=8, num_stages=3),
    "sm_90": GemmTile(128, 128, 64, num_warps=8, num_stages=4, TMA=True),
    "sm_100": GemmTile(128, 128, 64, num_warps=8, num_stages=4, TMA=True),
    "sm_120": GemmTile(128, 128, 32, num_warps=8, num_stages=3, TMA=True, maxnreg=255),
    "gfx942": GemmTile(128, 128, 32, num_warps=8, num_stages=2),
}
# The same over quantised weights, whose tile comes through registers.
QUANTIZED = {
    "sm_80": GemmTile(128, 64, 64, num_warps=8, num_stages=3),
    "sm_86": GemmTile(128, 64, 64, num_warps=8, num_stages=3),
    "sm_90": GemmTile(128, 64, 64, num_warps=8, num_stages=3),
    "sm_100": GemmTile(128, 64, 64, num_warps=8, num_stages=3),
    "sm_120": GemmTile(128, 64, 64, num_warps=8, num_stages=3),
    "gfx942": GemmTile(128, 64, 64, num_warps=8, num_stages=1),
}
# The weights' gradient: BLOCK_M by BLOCK_N of (out, in), in steps of BLOCK_K rows.
WEIGHT_GRAD = {
    "sm_80": GemmTile(128, 128, 32, num_warps=8, num_stages=4),
    "sm_86": GemmTile(128, 128, 32, num_warps=8, num_stages=3),
    "sm_90": GemmTile(128, 128, 64, num_warps=8, num_stages=3),
    "sm_100": GemmTile(128, 128, 64, num_warps=8, num_stages=3),
    "sm_120": GemmTile(128, 128, 32, num_warps=8, num_stages=3),
    "gfx942": GemmTile(128, 128, 32, num_warps=8, num_stages=2),
}
TF32_TILE = GemmTile(128, 64, 32, num_warps=8, num_stages=3, PRECISION="tf32", maxnreg=255)
# For rows that are not aligned, and for exact float32 products, which have no tensor cores on NVIDIA.
SMALL_TILES = {
    "nvidia": GemmTile(64, 64, 16, num_warps=8, num_stages=2, maxnreg=255),
    "amd": GemmTile(64, 64, 16, num_warps=8, num_stages=2),
}
# The same over quantised weights: steps of 32 read half as often the scale of what they take a part of.
SMALL_QUANTIZED = {
    "nvidia": replace(SMALL_TILES["nvidia"], BLOCK_K=32),
    "amd": replace(SMALL_TILES["amd"], BLOCK_K=32, num_stages=1),
}
# For exact float32 products with quantised weights; BLOCK_M on NVIDIA as `product_tiles` says.
EXACT_QUANTIZED = {
    "nvidia": replace(SMALL_QUANTIZED["nvidia"], BLOCK_M=EXACT_QUANTIZED_TILE.BLOCK_M),
    "amd": SMALL_QUANTIZED["amd"],
}
# For products by the few columns of an adapter, whatever their rows; by the bytes of its elements.
NARROW = {
    "nvidia": {
        2: GemmTile(64, 64, 32, num_warps=4, num_stages=3, maxnreg=255),
        4: GemmTile(64, 64, 16, num_warps=8, num_stages=2, maxnreg=255),
    },
    "amd": {2: GemmTile(64, 64, 32, num_warps=4, num_stages=2), 4: GemmTile(64, 64, 16, num_warps=8, num_stages=2)},
}
# Several tiles each way at the sizes that tests use.
INTERPRETER_TILE = GemmTile(16, 32, 32, num_warps=1, num_stages=1, GROUP_M=2)


def select_tile(
    tiles: dict[str, GemmTile], dtype: torch.dtype, device: torch.device, narrowest: int, *, aligned: bool, tma: bool
) -> GemmTile:
    """The tile for a launch.

    Args:
        tiles: PRODUCT, QUANTIZED or WEIGHT_GRAD.
        dtype: in which the product is computed.
        narrowest: the smaller one of the sizes of the experts' matrices.
        aligned: whether the rows of every matrix are.
        tma: whether what TMA would move can be moved by it.
    """
    if device.type != "cuda":
        return replace(INTERPRETER_TILE, TMA=aligned and tma)
    vendor = "amd" if torch.version.hip else "nvidia"
    if narrowest <= 64 and tiles is not QUANTIZED:
        return replace(NARROW[vendor][dtype.itemsize], PRECISION=low_rank_precision(dtype, device))
    small = (SMALL_QUANTIZED if tiles is QUANTIZED else SMALL_TILES)[vendor]
    if dtype == torch.float32:
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and vendor == "nvidia"
        if tiles is QUANTIZED and not tf32:
            return EXACT_QUANTIZED[vendor]
        return TF32_TILE if tf32 and aligned else replace(small, PRECISION="tf32" if tf32 else "ieee")
    return tiles[architecture(device)] if aligned else small
