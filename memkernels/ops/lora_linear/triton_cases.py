"""The configurations of the adapter's Triton kernels that the checks without a GPU compile and count.

Every tile of every architecture, with dropout and without; adapters of x's dtype and in float32. The least bytes are
those at the tile's size: x or dy once a product, the result once, and what the tiles need of the adapter, tile by tile.
The terms of sums in parts are not among them; where p and dB come from one read of dy, p's are always there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from memkernels.ops.lora_linear import triton as kernels
from memkernels.ops.lora_linear import triton_dropout as dropouts
from memkernels.ops.lora_linear import triton_shared as shared
from memkernels.ops.lora_linear.tiles import NARROW_TILES, SHARED_TILES, UP_GRAD_TILES, NarrowTile
from memkernels.ops.product_tiles import (
    EXACT_QUANTIZED_TILE,
    QUANTIZED_TILES,
    SMALL_TILES,
    TF32_TILE,
    TILES,
    ProductTile,
)
from memkernels.ops.quantized.triton_cases import stored_zeros
from memkernels.testing.cases import AMD, NVIDIA, KernelCase, Target, targets_of

ALIGNED, UNALIGNED = (512, 256, 512), (250, 130, 250)
# One tile of rows, or of columns: sums in parts, whose terms are float32.
FEW = {"few rows": (64, 256, 256), "few columns": (256, 64, 64)}
DROPOUT_P, RANK, SCALING = 0.1, 16, 0.5
# Of one input, as q, k and v have.
ADAPTERS = 3


class Inputs:
    """Tensors of one call, (tokens, K, N) being `shape`."""

    def __init__(self, shape, dtype, adapter_dtype, dropout, rank, device):
        tokens, k, n = shape

        def ones(*size, dtype=dtype):
            return torch.ones(*size, dtype=dtype, device=device)

        self.x, self.dy, self.weight, self.bias = ones(tokens, k), ones(tokens, n), ones(n, k), ones(n)
        self.a, self.b = ones(rank, k, dtype=adapter_dtype), ones(n, rank, dtype=adapter_dtype)
        self.s, self.p = (ones(tokens, rank, dtype=adapter_dtype) for _ in range(2))
        seed = torch.zeros((), dtype=torch.int64, device=device) if dropout else None
        self.mask = (seed, DROPOUT_P, 0)
        self.masks = (None if seed is None else seed.expand(ADAPTERS).contiguous(), DROPOUT_P, 0)

    def stored(self, kind: str) -> tuple[list[Tensor], str, list[int]]:
        """A quantised weight in the place of the dense one."""
        n, k = self.weight.shape
        parts, sizes = stored_zeros(kind, n, k, self.weight.dtype, self.weight.device.type)
        return parts, kind.split()[-1], sizes


def _down(tile: NarrowTile, inputs: Inputs) -> tuple[Tensor, ...]:
    s = kernels.lora_down(inputs.x, inputs.a, *inputs.mask, tile)
    return inputs.x, s, *[inputs.a] * -(-len(inputs.x) // tile.BLOCK_M)


def _up_grad(tile: NarrowTile, inputs: Inputs) -> tuple[Tensor, ...]:
    p, db = kernels.lora_up_grad(inputs.dy, inputs.s, inputs.b, SCALING, True, tile)
    (rows, columns), dy = inputs.dy.shape, inputs.dy
    return dy, dy, *[inputs.b] * -(-rows // tile.BLOCK_M), p, *[inputs.s] * -(-columns // tile.BLOCK_N), db


def _up_grad_of_one_read(tile: NarrowTile, inputs: Inputs) -> tuple[Tensor, ...]:
    p, db = kernels.lora_up_grad(inputs.dy, inputs.s, inputs.b, SCALING, True, tile)
    return inputs.dy, inputs.b, p, *[inputs.s] * -(-inputs.dy.shape[1] // tile.BLOCK_N), db.float()


def _down_grad(tile: NarrowTile, inputs: Inputs) -> tuple[Tensor, ...]:
    da = kernels.lora_down_grad(inputs.p, inputs.x, *inputs.mask, tile)
    return inputs.x, *[inputs.p] * -(-inputs.x.shape[1] // tile.BLOCK_N), da


def _of_adapters(tensor: Tensor) -> Tensor:
    return tensor.expand(ADAPTERS, *tensor.shape).contiguous()


def _read_by_ranks(inputs: Inputs) -> list[Tensor]:
    """x once for every 32 of the rank of adapters that share it."""
    return [inputs.x] * -(-len(inputs.a) // 32)


def _down_shared(tile: NarrowTile, inputs: Inputs) -> tuple[Tensor, ...]:
    a = _of_adapters(inputs.a)
    s = shared.lora_down_shared(inputs.x, a, *inputs.masks, tile)
    return *_read_by_ranks(inputs), s, *[a] * -(-len(inputs.x) // tile.BLOCK_M)


def _down_grad_shared(tile: NarrowTile, inputs: Inputs) -> tuple[Tensor, ...]:
    p = _of_adapters(inputs.p)
    da = shared.lora_down_grad_shared(p, inputs.x, *inputs.masks, tile)
    return *_read_by_ranks(inputs), *[p] * -(-inputs.x.shape[1] // tile.BLOCK_N), da


def _input_add_shared(tile: NarrowTile, inputs: Inputs) -> tuple[Tensor, ...]:
    (rows, size), a, p = inputs.x.shape, _of_adapters(inputs.a), _of_adapters(inputs.p)
    shared.lora_input_add_shared_(inputs.x, p, a, *inputs.masks, tile)
    return inputs.x, inputs.x, *[a] * -(-rows // tile.BLOCK_M), *[p] * -(-size // tile.BLOCK_N)


def _up(tile: ProductTile, inputs: Inputs) -> tuple[Tensor, ...]:
    scale = torch.ones(len(inputs.bias), device=inputs.x.device)
    y = kernels.lora_up(inputs.x, inputs.weight, inputs.bias, inputs.s, inputs.b, SCALING, scale, tile)
    return inputs.x, inputs.weight, inputs.bias, inputs.s, inputs.b, scale, y


def _quantized_up(kind: str, tile: ProductTile, inputs: Inputs) -> tuple[Tensor, ...]:
    stored = inputs.stored(kind)
    y = kernels.lora_quantized_up(inputs.x, *stored, inputs.bias, inputs.s, inputs.b, SCALING, None, tile)
    return inputs.x, *stored[0], inputs.bias, inputs.s, inputs.b, y


def _quantized_input_grad(kind: str, tile: ProductTile, inputs: Inputs) -> tuple[Tensor, ...]:
    stored = inputs.stored(kind)
    dx = kernels.lora_quantized_input_grad(inputs.dy, *stored, inputs.p, inputs.a, *inputs.mask, tile)
    return inputs.dy, *stored[0], inputs.p, inputs.a, dx


def _up_add(tile: ProductTile, inputs: Inputs) -> tuple[Tensor, ...]:
    kernels.lora_up_add_(inputs.dy, inputs.s, inputs.b, SCALING, None, inputs.bias, tile)
    return inputs.dy, inputs.s, inputs.b, inputs.bias, inputs.dy


def _input_grad(tile: ProductTile, inputs: Inputs) -> tuple[Tensor, ...]:
    dx = kernels.lora_input_grad(inputs.dy, inputs.weight, inputs.p, inputs.a, *inputs.mask, tile)
    return inputs.dy, inputs.weight, inputs.p, inputs.a, dx


def _input_add(tile: ProductTile, inputs: Inputs) -> tuple[Tensor, ...]:
    kernels.lora_input_add_(inputs.x, inputs.p, inputs.a, *inputs.mask, tile)
    return inputs.x, inputs.p, inputs.a, inputs.x


def _case(
    label: str,
    function: Callable,
    tile: NarrowTile | ProductTile,
    targets: tuple[Target, ...],
    *,
    dtype: torch.dtype = torch.bfloat16,
    adapter: torch.dtype | None = None,
    shape: tuple[int, int, int] = ALIGNED,
    dropout: bool = True,
    rank: int = RANK,
    traffic_limit: float | None = None,
) -> KernelCase:
    adapter = adapter or dtype
    function_name = getattr(function, "func", function).__name__
    label = f"{function_name[1:].replace('_', ' ')} {str(dtype)[6:]} {label}"
    if adapter != dtype:
        label += f" {str(adapter)[6:]} adapter"
    if rank != RANK:
        label += f" rank {rank}"
    if not dropout:
        label += " no dropout"

    def launch(device: str) -> tuple[Tensor, ...]:
        return function(tile, Inputs(shape, dtype, adapter, dropout, rank, device))

    return KernelCase(label, launch, traffic_limit, targets)


def _narrow_cases() -> list[KernelCase]:
    cases = []
    functions = (
        (_down, ("few rows",)),
        (_up_grad, ("few rows",)),
        (_down_grad, ("few columns",)),
        (_down_shared, ("few rows",)),
        (_down_grad_shared, ("few columns",)),
        (_input_add_shared, ()),
    )
    vendors = (("nvidia", NVIDIA, ("tf32x3", "tf32")), ("amd", AMD, ("ieee",)))
    for (function, in_parts), (vendor, targets, precisions) in product(functions, vendors):
        tiles = (SHARED_TILES if function is _down_shared else NARROW_TILES)[vendor]
        case = partial(_case, function=function, targets=targets, traffic_limit=1.05)
        for rank in (RANK, 64):
            cases.append(case(vendor, tile=tiles[2], rank=rank))
        cases.append(case(f"unaligned {vendor}", tile=tiles[2], shape=UNALIGNED))
        for dtype, precision in product((torch.bfloat16, torch.float32), precisions):
            tile = replace(tiles[4], PRECISION=precision)
            cases.append(case(precision, tile=tile, dtype=dtype, adapter=torch.float32, rank=64))
        if function is not _up_grad:
            cases.append(case(vendor, tile=tiles[2], dropout=False))
        for few in in_parts:
            cases.append(case(f"{few} {vendor}", tile=tiles[2], shape=FEW[few], traffic_limit=None))
    return cases


def _one_read_cases() -> list[KernelCase]:
    """p's terms, in float32 and two of each element at this size, are beside the least."""
    cases = []
    for vendor, targets, precisions in (("nvidia", NVIDIA, ("tf32x3", "tf32")), ("amd", AMD, ("ieee",))):
        tiles = UP_GRAD_TILES[vendor]
        case = partial(_case, function=_up_grad_of_one_read, targets=targets, dropout=True, traffic_limit=1.25)
        for rank in (RANK, 32):
            cases.append(case(vendor, tile=tiles[2], rank=rank))
        cases.append(case(f"unaligned {vendor}", tile=tiles[2], shape=UNALIGNED))
        for dtype, precision in product((torch.bfloat16, torch.float32), precisions):
            tile = replace(tiles[4], PRECISION=precision)
            cases.append(case(precision, tile=tile, dtype=dtype, adapter=torch.float32))
        cases.append(case(f"few columns {vendor}", tile=tiles[2], shape=FEW["few columns"], traffic_limit=None))
    return cases


def _product_cases() -> list[KernelCase]:
    cases = []
    for name, tile in TILES.items():
        targets = targets_of(name)
        wide = replace(tile, LOW_RANK_PRECISION="ieee" if name == "gfx942" else "tf32x3")
        for function in (_up, _input_grad):
            cases.append(_case(name, function, tile, targets))
            cases.append(_case(name, function, wide, targets, adapter=torch.float32))
        cases.append(_case(name, _input_grad, tile, targets, dropout=False))
        cases.append(_case(name, _input_grad, tile, targets, rank=64))
    for function in (_up, _input_grad, _up_add, _input_add):
        for vendor, targets, precision in (("nvidia", NVIDIA, "tf32x3"), ("amd", AMD, "ieee")):
            tile = SMALL_TILES[vendor]
            wide = replace(tile, LOW_RANK_PRECISION=precision)
            cases.append(_case(f"small {vendor}", function, tile, targets, shape=UNALIGNED))
            cases.append(_case(f"small {vendor}", function, wide, targets, shape=UNALIGNED, adapter=torch.float32))
            cases.append(_case(f"exact {vendor}", function, tile, targets, dtype=torch.float32))
        tile = replace(SMALL_TILES["nvidia"], LOW_RANK_PRECISION="tf32")
        tile = TF32_TILE if function in (_up, _input_grad) else tile
        cases.append(_case("tf32", function, tile, NVIDIA, dtype=torch.float32))
    return cases


def _quantized_cases() -> list[KernelCase]:
    cases = []
    for function, kind in product((_quantized_up, _quantized_input_grad), ("nested nf4", "int8")):
        of_kind = partial(function, kind)
        for name, tile in QUANTIZED_TILES.items():
            wide = replace(tile, LOW_RANK_PRECISION="ieee" if name == "gfx942" else "tf32x3")
            label = f"{kind} {name}"
            cases.append(_case(label, of_kind, tile, targets_of(name)))
            cases.append(_case(label, of_kind, wide, targets_of(name), adapter=torch.float32))
        for vendor, targets, precision in (("nvidia", NVIDIA, "tf32x3"), ("amd", AMD, "ieee")):
            tile = replace(SMALL_TILES[vendor], LOW_RANK_PRECISION=precision)
            label = f"{kind} small {vendor}"
            cases.append(_case(label, of_kind, tile, targets, shape=UNALIGNED, adapter=torch.float32))
        cases.append(_case(f"{kind} exact nvidia", of_kind, EXACT_QUANTIZED_TILE, NVIDIA, dtype=torch.float32))
    return cases


def _row_dropout(add: bool, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    x = torch.ones(ALIGNED[:2], dtype=dtype, device=device)
    mask = torch.zeros((), dtype=torch.int64, device=device), DROPOUT_P, 0
    if not add:
        return x, dropouts.row_dropout(x, *mask, dtype)
    term = x.float()
    dropouts.row_dropout_add_(x, term, *mask)
    return x, x, term


def _dropout_cases() -> list[KernelCase]:
    return [
        KernelCase(f"row dropout{' add' if add else ''} {str(dtype)[6:]}", partial(_row_dropout, add, dtype))
        for add, dtype in ((False, torch.bfloat16), (False, torch.float32), (True, torch.bfloat16))
    ]


KERNEL_CASES = [*_narrow_cases(), *_one_read_cases(), *_product_cases(), *_quantized_cases(), *_dropout_cases()]
