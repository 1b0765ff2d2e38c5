"""Memory in tests: fresh memory filled with NaN, and the bytes that a forward pass keeps for backward."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


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
    """Bytes of the distinct storages that `forward` leaves alive for backward.

    Those are what autograd saves and what Python objects still hold after the call: attributes of a Function's ctx, the
    outputs that selective checkpointing keeps. Storages of `exclude` do not count, nor those of the result unless
    autograd saves them.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    seen = excluded | _storages_in_python().keys()
    kept = {}  # Keeps storages alive: a freed one's address could come again and hide a second.

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    seen |= {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
    kept |= {address: storage for address, storage in _storages_in_python().items() if address not in seen}
    return sum(storage.nbytes() for storage in kept.values())


def _storages_in_python() -> dict[int, torch.UntypedStorage]:
    """The memory of every tensor that some Python object holds, by its address."""
    gc.collect()
    found = {}
    for held in gc.get_objects():
        if type(held) in (Tensor, torch.nn.Parameter) and held.layout == torch.strided and held.device.type != "meta":
            with suppress(RuntimeError):  # left over from a trace, without memory
                storage = held.untyped_storage()
                found[storage.data_ptr()] = storage
    return found
