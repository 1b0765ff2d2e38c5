"""What was read and handed out, which serves again while it is in use."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from memkernels.offload.tensors import with_version_of, witness_of


class Lent:
    """Serves again within the same backward, for as long as somebody holds its memory and nobody has changed it.

    Whoever holds it may keep it: where a Function returns a saved tensor as a gradient, a leaf takes its memory for
    `grad`, to which the next backward adds, and which may be written to.

    Args:
        tensor: what is handed out. Changes of it count, and of tensors that `with_version_of` makes of it.
    """

    def __init__(self, tensor: Tensor):
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._witness = witness_of(tensor)
        self._version = tensor._version
        self._backward = _current_backward()

    @property
    def usable(self) -> bool:
        return self._unchanged and not self._storage.expired()

    def again(self) -> Tensor | None:
        """The bytes, (n,) uint8; None where they do not serve any more."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata) if self._unchanged else None
        if storage is None:
            return None
        return with_version_of(self._witness, torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))

    @property
    def _unchanged(self) -> bool:
        return self._witness._version == self._version and self._backward == _current_backward()


def _current_backward() -> int:
    """The number of the backward that this thread runs; -1 outside of any."""
    return torch._C._current_graph_task_id()
