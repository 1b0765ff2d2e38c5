"""The configurations of the gated MLP's Triton kernels that the checks without a GPU compile and count.

Every tile of every architecture, with biases. What registers an epilogue takes differs by activation, and backward has
few to spare, so there each smooth activation is compiled.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from memkernels.ops.gated_mlp.tiles import SMALL_TILE, TF32_TILE, TILES, GemmTile
from memkernels.ops.gated_mlp.triton import gated_hidden_bwd, gated_hidden_fwd
from memkernels.testing.cases import NVIDIA, TARGETS, KernelCase, Target, targets_of

ALIGNED, UNALIGNED = (256, 128, 256), (250, 130, 250)


def _launch(
    backward: bool,
    tile: GemmTile,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    activation: str,
    gated: bool,
    device: str,
) -> tuple[Tensor, ...]:
    tokens, size, hidden = shape
    dy, x = (torch.ones(tokens, size, dtype=dtype, device=device) for _ in range(2))
    w_gate, w_up = (torch.ones(hidden, size, dtype=dtype, device=device) for _ in range(2))
    b_gate, b_up = (torch.ones(hidden, dtype=dtype, device=device) for _ in range(2))
    w_down = torch.ones(size, hidden, dtype=dtype, device=device)
    gate = (w_gate, b_gate) if gated else (None, None)
    moved = (x, w_up, b_up, *((w_gate, b_gate) if gated else ()))
    if backward:
        outputs = gated_hidden_bwd(dy, w_down, x, gate[0], w_up, gate[1], b_up, activation, tile)
        return dy, w_down, *moved, *outputs
    return *moved, gated_hidden_fwd(x, gate[0], w_up, gate[1], b_up, activation, tile)


def _cases(
    name: str,
    tiles: tuple[GemmTile, GemmTile],
    targets: tuple[Target, ...],
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int, int] = ALIGNED,
    backward_epilogues: tuple[str, ...] = ("silu", "gelu", "gelu_tanh", "silu ungated", "gelu ungated"),
) -> list[KernelCase]:
    cases = []
    for backward, epilogues in ((False, ("gelu",)), (True, backward_epilogues)):
        for epilogue in epilogues:
            activation, gated = epilogue.split()[0], "ungated" not in epilogue
            launch = partial(_launch, backward, tiles[backward], shape, dtype, activation, gated)
            label = f"{'backward' if backward else 'forward'} {str(dtype)[6:]} {name} {epilogue}"
            cases.append(KernelCase(label, launch, None, targets))
    return cases


KERNEL_CASES = [
    *(case for name, tiles in TILES.items() for case in _cases(name, tiles, targets_of(name))),
    *_cases("unaligned", (SMALL_TILE, SMALL_TILE), TARGETS, shape=UNALIGNED, backward_epilogues=("gelu_tanh",)),
    *_cases("sm_90", TILES["sm_90"], targets_of("sm_90"), torch.float16, backward_epilogues=("silu",)),
    *_cases("exact", (SMALL_TILE, SMALL_TILE), TARGETS, torch.float32, backward_epilogues=("gelu_tanh",)),
    *_cases("tf32", (TF32_TILE, TF32_TILE), NVIDIA, torch.float32, backward_epilogues=("gelu_tanh",)),
]
