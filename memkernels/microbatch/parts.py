"""Batches cut along their leading dimension, into rows or into whole packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

IGNORED = -100  # a label that is no target, as in torch.nn.functional.cross_entropy
STARTS = "cu_seqlens"


class Rows:
    """A batch of rows: every tensor in it has one entry a row; one without dimensions goes to all parts."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch
        self.count = _length(batch)
        self.least = 1  # parts of this size cannot be smaller

    def parts(self, size: int) -> Iterator[Any]:
        """Parts of `size` rows, the last perhaps of fewer."""
        for first in range(0, self.count, size):
            yield _cut(self.batch, first, min(first + size, self.count))


class PackedSequences:
    """A mapping with `cu_seqlens`, the starts of the sequences and their end; tensors have one entry a token."""

    def __init__(self, batch: Mapping[str, Any]) -> None:
        self.batch = batch
        starts = batch[STARTS]
        if not isinstance(starts, Tensor) or starts.dim() != 1 or starts.is_floating_point():
            raise ValueError(f"batch[{STARTS!r}]: expected a tensor of integers of one dimension, got {starts!r}.")
        self.starts = starts.tolist()
        self.count = self.starts[-1] if self.starts else 0
        if len(self.starts) < 2 or self.starts[0] != 0 or sorted(set(self.starts)) != self.starts:
            raise ValueError(
                f"batch[{STARTS!r}]: expected ascending starts from 0 on and their end, got {self.starts}."
            )
        pairs = [last - first for first, last in zip(self.starts, self.starts[2:], strict=False)]
        self.least = min(pairs, default=self.count + 1) - 1  # no two sequences fit into a part
        _check_lengths(_lengths({key: value for key, value in batch.items() if key != STARTS}), self.count)

    def parts(self, size: int) -> Iterator[Any]:
        """Parts of at most `size` tokens, but of one whole sequence at least."""
        rest = {key: value for key, value in self.batch.items() if key != STARTS}
        first = 0
        while first + 1 < len(self.starts):
            last = first + 1
            while last + 1 < len(self.starts) and self.starts[last + 1] - self.starts[first] <= size:
                last += 1
            part = _cut(rest, self.starts[first], self.starts[last])
            part[STARTS] = self.batch[STARTS][first : last + 1] - self.batch[STARTS][first]
            yield part
            first = last


def split(batch: Any) -> Rows | PackedSequences:
    """How `batch` is cut."""
    return PackedSequences(batch) if isinstance(batch, Mapping) and STARTS in batch else Rows(batch)


def signature(batch: Any) -> tuple:
    """What a row's memory depends on: names, dtypes and sizes beyond the leading one."""
    found: list[tuple] = []
    _visit(batch, "batch", lambda name, leaf: found.append((name, *_kind(leaf))))
    return tuple(found)


def tensors(batch: Any) -> list[Tensor]:
    """All that are in a batch."""
    found: list[Tensor] = []
    _visit(batch, "batch", lambda _, leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


def count_targets(batch: Any, rows: int) -> int:
    """Entries of batch["labels"] that are not -100; without labels its rows."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return int((labels != IGNORED).sum()) if isinstance(labels, Tensor) else rows


def _kind(leaf: Any) -> tuple:
    return (leaf.dtype, leaf.shape[1:], leaf.device) if isinstance(leaf, Tensor) else (type(leaf),)


def _is_cut(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _visit(value: Any, name: str, action: Callable[[str, Any], object]) -> None:
    """Calls action(name, leaf) for everything in nested mappings, tuples and lists."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _visit(inner, f"{name}[{key!r}]", action)
    elif isinstance(value, (tuple, list)):
        for index, inner in enumerate(value):
            _visit(inner, f"{name}[{index}]", action)
    else:
        action(name, value)


def _lengths(batch: Any) -> list[tuple[str, int]]:
    """The tensors' leading dimensions, by name."""
    found: list[tuple[str, int]] = []
    _visit(batch, "batch", lambda name, leaf: found.append((name, len(leaf))) if _is_cut(leaf) else None)
    return found


def _length(batch: Any) -> int:
    lengths = _lengths(batch)
    if not lengths or lengths[0][1] == 0:
        raise ValueError("batch: expected tensors of one row at least.")
    _check_lengths(lengths, lengths[0][1])
    return lengths[0][1]


def _check_lengths(lengths: list[tuple[str, int]], count: int) -> None:
    for name, length in lengths:
        if length != count:
            raise ValueError(f"{name}: expected {count} along the leading dimension, as the others, got {length}.")


def _cut(value: Any, first: int, last: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _cut(inner, first, last) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        cut = [_cut(inner, first, last) for inner in value]
        if hasattr(value, "_fields"):  # a named tuple
            return type(value)(*cut)
        return tuple(cut) if isinstance(value, tuple) else cut
    return value[first:last] if _is_cut(value) else value
