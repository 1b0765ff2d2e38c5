"""What a saved tensor is of, by which in-place changes of it are known."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Source:
    """Tensors count in-place changes together with the base that they are views of, and with nothing else that shares
    their memory: each part that `unsafe_chunk` gives counts its own. What a subclass such as DTensor wraps counts no
    change that is made through the subclass.

    Args:
        root: what counts.
        versions: of the whole tensor that is saved, and of the part of it that this is about, or the whole again.
    """

    root: weakref.ref[Tensor]
    versions: tuple[int, int]

    @staticmethod
    def of(part: Tensor, whole: Tensor) -> Source:
        root = whole if whole._base is None else whole._base
        return Source(weakref.ref(root), (whole._version, part._version))

    def is_that_of(self, other: Source) -> bool:
        root = self.root()
        return root is not None and root is other.root() and self.versions == other.versions
