"""Tiles of attention's Triton kernels, by GPU architecture, options, head size and pass.

Each fits its architecture's shared memory and compiles without a spilled register. They are not tuned: no speed has
been measured on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from memkernels.ops.gated_mlp.tiles import architecture


class Tile(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys. A program keeps the one and streams the other.

    maxnreg: a bound of registers that lets NVIDIA's compiler use them all, where it would spill to fit more programs.
    PART: the head size of the parts in which products of queries and keys come (`triton_scores.row_products`).
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    PART: int = 256  # no head is larger, so one part

    def options(self) -> dict[str, int]:
        """The kernel's compile-time arguments."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Config(NamedTuple):
    """A tile for each kernel; whether what is streamed goes through TMA; how float32 operands are multiplied."""

    forward: Tile
    dkdv: Tile
    dq: Tile
    TMA: bool = False
    PRECISION: str = "ieee"


def _config(forward: tuple, dkdv: tuple, dq: tuple, **options) -> Config:
    return Config(Tile(*forward), Tile(*dkdv), Tile(*dq), **options)


Heads = int | tuple[int, int]  # the largest head size, or that of the larger of two and that of the smaller
# {architecture: {heads: the fields of `Tile` for forward, dkdv and dq}}
PLAIN: dict[str, dict[Heads, Config]] = {
    "sm_80": {
        64: _config((128, 64, 4, 3), (32, 128, 8, 3), (128, 64, 8, 3)),
        (128, 64): _config((128, 64, 8, 3), (32, 64, 8, 2), (64, 64, 8, 2)),
        128: _config((128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
        256: _config((64, 64, 8, 2), (32, 32, 4, 2), (64, 64, 8, 2)),
    },
    "sm_86": {
        64: _config((128, 64, 4, 3), (32, 128, 8, 3), (128, 64, 8, 3)),
        (128, 64): _config((128, 64, 8, 2), (32, 64, 8, 2), (64, 64, 8, 2)),
        128: _config((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        256: _config((64, 32, 8, 2), (32, 32, 8, 2, 255), (32, 32, 8, 2)),
    },
    "sm_90": {
        64: _config((128, 128, 8, 2), (64, 128, 8, 2), (128, 64, 8, 3), TMA=True),
        128: _config((128, 128, 8, 2), (32, 128, 8, 2), (128, 64, 8, 2), TMA=True),
        256: _config((128, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), TMA=True),
    },
    "sm_100": {
        64: _config((128, 128, 8, 2), (64, 128, 8, 2), (128, 64, 8, 3), TMA=True),
        128: _config((128, 64, 8, 3), (64, 128, 8, 2), (64, 64, 8, 2), TMA=True),
        256: _config((128, 32, 8, 2), (32, 64, 8, 2), (128, 32, 8, 2), TMA=True),
    },
    "sm_120": {
        32: _config((128, 64, 8, 3, 255), (32, 128, 8, 3), (128, 32, 8, 3, 255), TMA=True),
        64: _config((128, 64, 8, 3), (32, 128, 8, 3), (128, 32, 8, 3), TMA=True),
        (128, 64): _config((128, 64, 8, 2), (16, 64, 4, 3), (64, 32, 8, 2), TMA=True),
        128: _config((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), TMA=True),
        256: _config((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), TMA=True),
    },
    "gfx942": {
        32: _config((128, 32, 4, 1), (32, 128, 4, 1), (128, 32, 4, 1)),
        64: _config((128, 64, 4, 1), (32, 128, 4, 1), (128, 32, 4, 1)),
        128: _config((128, 32, 8, 2), (32, 64, 4, 1), (128, 32, 4, 1)),
        256: _config((64, 32, 8, 1), (16, 64, 8, 1), (64, 16, 8, 1)),
    },
}
# With softcap, ALiBi or dropout, which need registers of their own.
RICH: dict[str, dict[Heads, Config]] = {
    "sm_80": {
        64: _config((128, 64, 8, 3), (16, 64, 4, 3), (128, 32, 8, 3)),
        (128, 64): _config((128, 32, 8, 3), (16, 64, 4, 3), (64, 32, 8, 2)),
        128: _config((128, 32, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
        256: _config((64, 64, 8, 2), (32, 32, 8, 2, 255), (64, 32, 8, 2)),
    },
    "sm_86": {
        64: _config((128, 64, 8, 3), (16, 64, 4, 3), (128, 32, 8, 3)),
        (128, 64): _config((128, 32, 8, 3), (16, 64, 4, 3), (64, 32, 8, 2)),
        128: _config((128, 32, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
        256: _config((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 4, 2)),
    },
    "sm_90": {
        64: _config((128, 64, 8, 3), (32, 128, 8, 3), (128, 64, 8, 2), TMA=True),
        128: _config((128, 64, 8, 2), (32, 64, 8, 2), (128, 32, 8, 2), TMA=True),
        256: _config((64, 64, 8, 2), (32, 32, 8, 2), (32, 32, 4, 2), TMA=True),
    },
    "sm_100": {
        64: _config((128, 64, 8, 3), (32, 128, 8, 3), (128, 64, 8, 3), TMA=True),
        (128, 64): _config((128, 32, 8, 3, 255), (32, 128, 8, 2), (128, 64, 8, 2), TMA=True),
        128: _config((128, 32, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2), TMA=True),
        256: _config((64, 64, 8, 2), (32, 64, 8, 2), (64, 64, 8, 2), TMA=True),
    },
    "sm_120": {
        64: _config((128, 64, 8, 3), (16, 64, 4, 3), (128, 32, 8, 3), TMA=True),
        (128, 64): _config((128, 32, 8, 3), (16, 64, 4, 3), (64, 32, 8, 2), TMA=True),
        128: _config((128, 32, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2), TMA=True),
        256: _config((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), TMA=True),
    },
    "gfx942": {
        64: _config((128, 32, 4, 1), (16, 64, 4, 1), (64, 16, 4, 1)),
        128: _config((128, 16, 8, 2), (16, 64, 4, 1), (64, 16, 4, 1)),
        256: _config((64, 16, 8, 1), (16, 32, 8, 1), (64, 16, 8, 1)),
    },
}
# float32 with every option. NVIDIA's tensor cores have no exact float32, but tf32, where torch allows it.
FLOAT32: dict[str, dict[Heads, Config]] = {
    "exact": {
        64: _config((32, 32, 4, 2, 255), (32, 32, 4, 2, 255), (32, 32, 4, 2, 255)),
        128: _config((32, 32, 8, 1, 255, 16), (16, 32, 8, 1, 255, 16), (32, 16, 8, 1, 255, 16)),
        256: _config((16, 16, 8, 1, 255, 32), (16, 16, 8, 1, 255, 32), (16, 16, 8, 1, 255, 32)),
    },
    "tf32": {
        64: _config((32, 32, 4, 2, 255), (32, 32, 4, 2, 255), (32, 32, 4, 2, 255), PRECISION="tf32"),
        128: _config((32, 32, 8, 2, 255), (32, 32, 8, 2, 255), (32, 32, 8, 2, 255), PRECISION="tf32"),
        256: _config((32, 16, 8, 1, 255, 32), (16, 16, 8, 1, 255, 32), (32, 16, 8, 1, 255, 32), PRECISION="tf32"),
    },
    "amd": {
        32: _config((32, 16, 4, 1), (16, 32, 4, 1), (32, 16, 4, 1)),
        64: _config((32, 16, 4, 1), (16, 32, 4, 1), (32, 32, 4, 1)),
        128: _config((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        256: _config((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
}
# Several tiles each way at the sizes that tests use.
INTERPRETER = _config((32, 32, 1, 1), (32, 32, 1, 1), (32, 32, 1, 1), TMA=True)


def fitting(configs: dict[Heads, Config], sizes: tuple[int, int]) -> Config:
    """The first whose head sizes are not below `sizes`, of q and k, and of v."""
    larger, smaller = max(sizes), min(sizes)
    limits = ((heads if isinstance(heads, tuple) else (heads, heads), config) for heads, config in configs.items())
    return next(config for (largest, second), config in limits if larger <= largest and smaller <= second)


def select_config(blocks: tuple[int, int], rich: bool, dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration for a launch whose heads, of q and k, and of v, are held in so many columns.

    rich: with softcap, ALiBi or dropout.
    """
    if device.type != "cuda":
        return INTERPRETER
    if dtype == torch.float32:
        # torch's own setting decides whether float32 products may round their operands.
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return fitting(FLOAT32["amd" if torch.version.hip else "tf32" if tf32 else "exact"], blocks)
    return fitting((RICH if rich else PLAIN)[architecture(device)], blocks)
