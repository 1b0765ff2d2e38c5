"""The configurations of the experts' kernels that are compiled ahead of time, and whose traffic is counted.

Of the grouped products every tile of every architecture, rows gathered, and the small ones over rows that are not
aligned and in exact float32. Their least bytes are those of their tiles: a tile of the output moves its rows of the one
factor and its columns of the other once, and no tile has rows of two groups. A row is gathered once for each choice.

A code of NF4 takes the 4 bytes of its value from a table of 64, which stays in the nearest cache: eight times the bytes
of the code, and in the least too. Matrices that tiles of 64 by 64 do not cut into parts of one block each have no
kernel: one that looked up the scale of each code moved 2.5 times the least.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from memkernels.ops.gated_mlp.tiles import GemmTile
from memkernels.ops.moe.tiles import (
    EXACT_QUANTIZED,
    NARROW,
    PRODUCT,
    QUANTIZED,
    SMALL_QUANTIZED,
    SMALL_TILES,
    TF32_TILE,
    WEIGHT_GRAD,
)
from memkernels.ops.moe.triton import expert_activation_bwd, expert_activation_bwd_, expert_activation_fwd
from memkernels.ops.moe.triton_grouped import (
    grouped_product,
    grouped_product_add_,
    grouped_quantized_product,
    grouped_weight_grad,
)
from memkernels.ops.quantized.triton_cases import stored_zeros
from memkernels.testing.cases import AMD, NVIDIA, KernelCase, Target, targets_of

ROWS, SIZE = 32, 2048
# Of the grouped products: groups of which one is empty, and rows beyond the last.
OFFSETS, GROUPED_ROWS, TOKENS = (0, 200, 200, 328, 500), 512, 256
ALIGNED, UNALIGNED = (128, 256), (130, 250)


def _tensors(dtype, device, gated=True):
    """dh, gate_up and row_weight."""
    wide = torch.ones(ROWS, 2 * SIZE if gated else SIZE, dtype=dtype, device=device)
    return torch.ones(ROWS, SIZE, dtype=dtype, device=device), wide, torch.ones(ROWS, device=device)


def _forward(gated, activation, dtype, device):
    _, gate_up, row_weight = _tensors(dtype, device, gated)
    return gate_up, row_weight, expert_activation_fwd(gate_up, row_weight, gated, activation)


def _backward(gated, activation, dtype, device):
    dh, gate_up, row_weight = _tensors(dtype, device, gated)
    return dh, gate_up, row_weight, dh, *expert_activation_bwd(dh, gate_up, row_weight, gated, activation)


def _backward_in_place(gated, activation, dtype, device):
    dh, gate_up, row_weight = _tensors(dtype, device, gated)
    drow_weight = expert_activation_bwd_(dh, gate_up, row_weight, gated, activation)
    return dh, gate_up, row_weight, dh, gate_up, drow_weight


def _grouped(size: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A matrix of the tokens, the token of each row, offsets, and what all groups gather."""
    tokens = torch.arange(GROUPED_ROWS, dtype=torch.int32, device=device) % TOKENS
    x, gathered = (torch.ones(rows, size, dtype=dtype, device=device) for rows in (TOKENS, OFFSETS[-1]))
    return x, tokens, torch.tensor(OFFSETS, dtype=torch.int32, device=device), gathered


def _tiled(
    tile: GemmTile, y: Tensor, of_expert: Sequence[Tensor], *of_rows: Tensor, add: bool = False
) -> tuple[Tensor, ...]:
    """What a product moves: y, once more where it is added to, for each tile of rows an expert's weight, and for each
    tile of columns what the groups' rows are made of."""
    row_tiles = sum(-(-(end - begin) // tile.BLOCK_M) for begin, end in pairwise(OFFSETS))
    written = [y[: OFFSETS[-1]]] * 2 if add else [y]
    return *written, *[*of_expert] * row_tiles, *[*of_rows] * -(-y.shape[1] // tile.BLOCK_N)


def _product(
    by_rows: bool, tile: GemmTile, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, ...]:
    inner, columns = shape
    x, tokens, offsets, gathered = _grouped(inner, dtype, device)
    stored = (columns, inner) if by_rows else (inner, columns)
    weights = torch.ones(len(OFFSETS) - 1, *stored, dtype=dtype, device=device)
    y = grouped_product(x, tokens, weights.mT if by_rows else weights, offsets, GROUPED_ROWS, "triton", tile)
    return _tiled(tile, y, [weights[0]], gathered, tokens[: OFFSETS[-1]])


def _quantized_product(
    by_rows: bool, kind: str, tile: GemmTile, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, ...]:
    inner, columns = shape
    x, tokens, offsets, gathered = _grouped(inner, dtype, device)
    experts = len(OFFSETS) - 1
    rows, row_size = (columns, inner) if by_rows else (inner, columns)
    parts, sizes = stored_zeros(kind, experts * rows, row_size, dtype, device)
    stored = parts, kind.split()[-1], sizes
    y = grouped_quantized_product(x, tokens, *stored, offsets, GROUPED_ROWS, by_rows, "triton", tile)
    of_expert, _ = stored_zeros(kind, rows, row_size, dtype, device)
    if kind != "int8":
        of_expert.append(torch.zeros(rows * row_size, device=device))  # the values of the codes
    return _tiled(tile, y, of_expert, gathered, tokens[: OFFSETS[-1]])


def _tiled_weight_grad(tile: GemmTile, dweights: Tensor, dy: Tensor, x: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
    """What the weights' gradient moves: the groups' rows of either factor for each tile of the other's columns, and the
    tokens they are gathered by for each tile."""
    _, columns, inner = dweights.shape
    tiles_m, tiles_n = -(-columns // tile.BLOCK_M), -(-inner // tile.BLOCK_N)
    return dweights, *[dy] * tiles_n, *[x] * tiles_m, *[*tokens] * (tiles_m * tiles_n)


def _weight_grad(tile: GemmTile, shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    inner, columns = shape
    x, tokens, offsets, x_gathered = _grouped(inner, dtype, device)
    dy, _, _, dy_gathered = _grouped(columns, dtype, device)
    dweights = grouped_weight_grad(dy, tokens, x, tokens, offsets, "triton", tile)
    return _tiled_weight_grad(tile, dweights, dy_gathered, x_gathered, *[tokens[: OFFSETS[-1]]] * 2)


def _grouped_cases(
    name: str,
    tiles: tuple[GemmTile, GemmTile],
    targets: tuple[Target, ...],
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int] = ALIGNED,
) -> list[KernelCase]:
    of_products, of_weight_grad = tiles
    launches = {
        "product": functools.partial(_product, True, of_products, shape, dtype),
        "input grad": functools.partial(_product, False, of_products, shape, dtype),
        "weight grad": functools.partial(_weight_grad, of_weight_grad, shape, dtype),
    }
    return [
        KernelCase(f"{label} {str(dtype)[6:]} {name}", launch, targets=targets) for label, launch in launches.items()
    ]


def _quantized_cases(
    name: str,
    kinds: tuple[str, ...],
    tile: GemmTile,
    targets: tuple[Target, ...],
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int] = ALIGNED,
) -> list[KernelCase]:
    return [
        KernelCase(
            f"{direction} {str(dtype)[6:]} {kind} {name}",
            functools.partial(_quantized_product, direction == "product", kind, tile, shape, dtype),
            targets=targets,
        )
        for direction in ("product", "input grad")
        for kind in kinds
    ]


def _narrow(direction: str, tile: GemmTile, dtype: torch.dtype, rank: int, device: str) -> tuple[Tensor, ...]:
    """Products of bfloat16 rows with an adapter's factors."""
    size, experts, rows = ALIGNED[1], len(OFFSETS) - 1, OFFSETS[-1]
    x, tokens, offsets, gathered = _grouped(size, torch.bfloat16, device)
    y = torch.ones(GROUPED_ROWS, size, dtype=torch.bfloat16, device=device)
    s = torch.ones(GROUPED_ROWS, rank, dtype=dtype, device=device)
    a = torch.ones(experts, rank, size, dtype=dtype, device=device)
    b = torch.ones(experts, size, rank, dtype=dtype, device=device)
    if direction in ("down", "up grad"):
        weights = a.mT if direction == "down" else b
        s = grouped_product(x, tokens, weights, offsets, GROUPED_ROWS, "triton", tile)
        return _tiled(tile, s, [weights[0]], gathered, tokens[:rows])
    if direction in ("up add", "input add"):
        weights = b.mT if direction == "up add" else a
        grouped_product_add_(y, s, weights, offsets, "triton", tile)
        return _tiled(tile, y, [weights[0]], s[:rows], add=True)
    if direction == "down weight grad":
        dweights = grouped_weight_grad(s, None, x, tokens, offsets, "triton", tile)
        return _tiled_weight_grad(tile, dweights, s[:rows], gathered, tokens[:rows])
    dweights = grouped_weight_grad(x, tokens, s, None, offsets, "triton", tile)
    return _tiled_weight_grad(tile, dweights, gathered, s[:rows], tokens[:rows])


KERNEL_CASES = [
    KernelCase(f"{name} {activation} {str(dtype)[6:]}", functools.partial(launch, gated, activation, dtype))
    for name, launch, gated, activation, dtype in (
        ("forward", _forward, True, "silu", torch.bfloat16),
        ("forward ungated", _forward, False, "relu", torch.bfloat16),
        ("backward", _backward, True, "gelu", torch.float32),
        ("backward in place", _backward_in_place, True, "silu", torch.bfloat16),
        ("backward in place ungated", _backward_in_place, False, "relu", torch.float16),
    )
]
KERNEL_CASES += [
    *(case for name in PRODUCT for case in _grouped_cases(name, (PRODUCT[name], WEIGHT_GRAD[name]), targets_of(name))),
    *(
        case
        for name, tile in QUANTIZED.items()
        for case in _quantized_cases(name, ("nested nf4", "int8"), tile, targets_of(name))
    ),
    *(
        case
        for vendor, targets in (("nvidia", NVIDIA), ("amd", AMD))
        for tile in (SMALL_TILES[vendor],)
        for case in (
            *_grouped_cases(f"unaligned {vendor}", (tile, tile), targets, shape=UNALIGNED),
            *_quantized_cases(f"unaligned {vendor}", ("int8",), SMALL_QUANTIZED[vendor], targets, shape=UNALIGNED),
            *_quantized_cases(f"small {vendor}", ("nested nf4",), SMALL_QUANTIZED[vendor], targets),
            *_grouped_cases(f"exact {vendor}", (tile, tile), targets, torch.float32),
            *_quantized_cases(
                f"exact {vendor}", ("nested nf4", "int8"), EXACT_QUANTIZED[vendor], targets, torch.float32
            ),
        )
    ),
    *_grouped_cases("tf32", (TF32_TILE, TF32_TILE), NVIDIA, torch.float32),
    *_quantized_cases("tf32", ("nested nf4",), TF32_TILE, NVIDIA, torch.float32),
]
KERNEL_CASES += [
    KernelCase(f"{direction} {str(dtype)[6:]} {rank} {vendor}", launch, targets=targets)
    for vendor, targets in (("nvidia", NVIDIA), ("amd", AMD))
    for dtype, rank in ((torch.bfloat16, 16), (torch.bfloat16, 3), (torch.float32, 3))
    for direction in ("down", "up grad", "up add", "input add", "down weight grad", "up weight grad")
    for tile in (replace(NARROW[vendor][dtype.itemsize], PRECISION="ieee" if vendor == "amd" else "tf32x3"),)
    for launch in (functools.partial(_narrow, direction, tile, dtype, rank),)
]
