"""Memory in tests: fresh memory filled with NaN, and the bytes that a forward pass keeps for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills every uninitialised tensor (torch.empty and its kin, from C++ too) with NaN, or the largest integer."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings = cast(Any, torch.utils.deterministic)
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


def saved_bytes(forward: Callable[[], object], *, exclude: tuple[Tensor, ...] = ()) -> int:
    """Bytes of the distinct storages that autograd saves while `forward` runs; those of `exclude` do not count."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    total = 0
    alive = []  # A freed storage's address could come again and hide a second one.

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            alive.append(storage)
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return total
