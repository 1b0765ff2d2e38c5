"""The configurations of the gated MLP's Triton kernels that the checks without a GPU compile and count.

Every tile of every architecture, with the activation that takes the most registers and with biases.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from memkernels.ops.gated_mlp.tiles import FLOAT32_TILE, POINTER_TILES, TF32_TILE, TMA_TILES, GemmTile
from memkernels.ops.gated_mlp.triton import gated_hidden_bwd, gated_hidden_fwd
from memkernels.testing.cases import TARGETS, KernelCase, Target

TOKENS, SIZE, HIDDEN = 256, 128, 256


def _launch(
    backward: bool, tile: GemmTile, dtype: torch.dtype, activation: str, gated: bool, device: str
) -> tuple[Tensor, ...]:
    dy, x = (torch.ones(TOKENS, SIZE, dtype=dtype, device=device) for _ in range(2))
    w_gate, w_up = (torch.ones(HIDDEN, SIZE, dtype=dtype, device=device) for _ in range(2))
    b_gate, b_up = (torch.ones(HIDDEN, dtype=dtype, device=device) for _ in range(2))
    w_down = torch.ones(SIZE, HIDDEN, dtype=dtype, device=device)
    gate = (w_gate, b_gate) if gated else (None, None)
    moved = (x, w_up, b_up, *((w_gate, b_gate) if gated else ()))
    if backward:
        outputs = gated_hidden_bwd(dy, w_down, x, gate[0], w_up, gate[1], b_up, activation, tile)
        return dy, w_down, *moved, *outputs
    return *moved, gated_hidden_fwd(x, gate[0], w_up, gate[1], b_up, activation, tile)


def _case(
    backward: bool,
    architecture: str,
    tile: GemmTile,
    targets: tuple[Target, ...],
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "gelu",
    gated: bool = True,
) -> KernelCase:
    words = [
        "backward" if backward else "forward", architecture, str(dtype)[6:], *(["tf32"] if tile is TF32_TILE else []),
        activation, *([] if gated else ["ungated"]), "tma" if tile.TMA else "pointers",
    ]  # fmt: skip
    return KernelCase(" ".join(words), partial(_launch, backward, tile, dtype, activation, gated), None, targets)


def _targets(architecture: str) -> tuple[Target, ...]:
    names = ("sm_86", "sm_89") if architecture == "sm_86" else (architecture,)
    return tuple(target for target in TARGETS if target.name in names)


NVIDIA = tuple(target for target in TARGETS if target.backend == "cuda")
KERNEL_CASES = [
    case
    for backward in (False, True)
    for case in (
        *(
            _case(backward, architecture, tiles[backward], _targets(architecture))
            for table in (POINTER_TILES, TMA_TILES)
            for architecture, tiles in table.items()
        ),
        _case(backward, "sm_90", TMA_TILES["sm_90"][backward], _targets("sm_90"), torch.float16, "silu"),
        _case(
            backward, "sm_90", TMA_TILES["sm_90"][backward], _targets("sm_90"), activation="relu_squared", gated=False
        ),
        _case(backward, "any", FLOAT32_TILE, TARGETS, torch.float32),
        _case(backward, "any", TF32_TILE, NVIDIA, torch.float32),
    )
]
