"""How a quantised tensor is stored: what is static of it, and the way from and to its values."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

# Of each product with the dense matrix a tile at a time, on CPU in about these bytes, and at most half of the matrix:
# from 512 rows or columns on the products take as long as one of the whole, by 256 a twentieth longer
# (docs/design/nf4.md).
_TILE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
_LEAST_TILE = 256


@dataclass(frozen=True)
class Encoding:
    """A kind of storage with its sizes: a tensor of `shape`, of which `dtype` is that of its values, seen as a matrix.

    Its rows are those of the first dimension. A subclass names its `kind` and the tensors that hold the values, its
    parts.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Encoding]]] = {}

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __init_subclass__(cls) -> None:
        Encoding.kinds[cls.kind] = cls

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def row_size(self) -> int:
        return math.prod(self.shape[1:])

    @property
    @abstractmethod
    def part_names(self) -> tuple[str, ...]: ...

    @abstractmethod
    def decode_(self, out: Tensor, parts: Sequence[Tensor], first_row: int, first_column: int) -> None:
        """Fills out (rows, columns) with the values of a matrix from (first_row, first_column) on."""

    @abstractmethod
    def encode(self, values: Tensor) -> tuple[Tensor, ...]:
        """The parts for values of this shape, of this kind and sizes."""

    @abstractmethod
    def row_slice(self, parts: Sequence[Tensor], first: int, last: int) -> tuple[Encoding, tuple[Tensor, ...]]:
        """Rows first to last: views of the parts, where they can be."""

    @property
    def has_whole_rows(self) -> bool:
        """Whether `row_slice` takes any rows."""
        return True

    @abstractmethod
    def zeros(self, parts: Sequence[Tensor], shape: Sequence[int]) -> tuple[Encoding, tuple[Tensor, ...]]:
        """A tensor of zeros of another shape, stored as a `row_slice` of as many rows would be."""

    @abstractmethod
    def sharded_parts(self, parts: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The parts of which each slice of rows has its own, and those that all slices share."""

    @property
    @abstractmethod
    def sizes(self) -> list[int]:
        """What an operator needs beside the parts, N and K first."""

    @classmethod
    @abstractmethod
    def from_sizes(cls, sizes: Sequence[int], dtype: torch.dtype, num_parts: int) -> Encoding:
        """The encoding of a matrix again."""

    def with_dtype(self, dtype: torch.dtype) -> Encoding:
        return dataclasses.replace(self, dtype=dtype)

    def with_shape(self, shape: Sequence[int]) -> Encoding:
        return dataclasses.replace(self, shape=tuple(shape))

    def reshaped(self, parts: Sequence[Tensor], shape: Sequence[int]) -> tuple[Encoding, tuple[Tensor, ...]]:
        """The same values in another shape; views of the parts."""
        return self.with_shape(shape), tuple(parts)

    def as_matrix(self, parts: Sequence[Tensor]) -> tuple[Encoding, tuple[Tensor, ...]]:
        """The same values with the rows of the last dimension, of more than two dimensions."""
        if len(self.shape) <= 2:
            return self, tuple(parts)
        return self.reshaped(parts, (math.prod(self.shape[:-1]), self.shape[-1]))

    def values(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """All of them, of `shape`."""
        matrix, parts = self.as_matrix(parts)
        out = torch.empty(matrix.rows, matrix.row_size, dtype=dtype, device=parts[0].device)
        matrix.decode_(out, parts, 0, 0)
        return out.view(self.shape)

    def row_tiles(
        self, parts: Sequence[Tensor], dtype: torch.dtype, within: range | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their values) of a matrix or its rows `within`, tile by tile, each in the memory of the one before.

        Rows are counted from the first of them.
        """
        within = range(self.rows) if within is None else within
        rows = _tile_size(len(within), self.row_size * dtype.itemsize, parts[0].device)
        buffer = torch.empty(rows, self.row_size, dtype=dtype, device=parts[0].device)
        for first in range(0, len(within), rows):
            last = min(first + rows, len(within))
            self.decode_(buffer[: last - first], parts, within.start + first, 0)
            yield slice(first, last), buffer[: last - first]

    def column_tiles(
        self, parts: Sequence[Tensor], dtype: torch.dtype, within: range | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """(columns, their values) of a matrix or its rows `within`, tile by tile, each in the memory of the last."""
        within = range(self.rows) if within is None else within
        columns = _tile_size(self.row_size, len(within) * dtype.itemsize, parts[0].device)
        buffer = torch.empty(len(within) * columns, dtype=dtype, device=parts[0].device)
        for first in range(0, self.row_size, columns):
            last = min(first + columns, self.row_size)
            tile = buffer[: len(within) * (last - first)].view(len(within), last - first)
            self.decode_(tile, parts, within.start, first)
            yield slice(first, last), tile


def _tile_size(count: int, line_bytes: int, device: torch.device) -> int:
    """How many of `count` rows or columns, of `line_bytes` each, are a tile: a multiple of 64 if several."""
    budget = _TILE_BYTES.get(device.type, _TILE_BYTES["cuda"]) // max(1, line_bytes)
    size = max(_LEAST_TILE, min(budget, count // 2)) // 64 * 64
    return max(1, min(size, count))
