"""Squared norms of the rows of frozen weights, which DoRA divides by, kept from one call to the next."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from memkernels.ops.lora_linear.norm import row_squares
from memkernels.ops.quantized.tensor import QuantizedTensor

_KEPT: WeakKeyDictionary[torch.nn.Module, tuple[list[tuple], Tensor]] = WeakKeyDictionary()


def kept_row_squares(layer: torch.nn.Module, weight: Tensor) -> Tensor | None:
    """`ops.row_squares` of the frozen weight (N, K) under a layer's adapter, kept as long as the layer is.

    They are computed again where the weight has other memory or was written. A write through `.data`, as in
    `weight.data.mul_(2)`, or to a shard of FSDP2 leaves no trace and is not seen.

    Returns:
        None where a write would leave none either, or torch.compile traces: a weight that is trained, or one made in
        inference mode. The op computes them then.
    """
    parts = weight.parts if isinstance(weight, QuantizedTensor) else (weight,)
    if torch.compiler.is_compiling() or weight.requires_grad or any(of.is_inference() for of in (weight, *parts)):
        return None
    state = [(weight.dtype, weight._version), *map(_state, parts)]
    known = _KEPT.get(layer)
    if known is None or known[0] != state:
        known = _KEPT[layer] = state, row_squares(weight)
    return known[1]


def _state(part: Tensor) -> tuple[Any, ...]:
    # A reference to the storage keeps its number from being given to another; one to the tensor would keep
    # Module.to() from swapping it.
    return StorageWeakRef(part.untyped_storage()), part.data_ptr(), part._version, part.dtype
