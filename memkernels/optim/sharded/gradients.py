"""Where gradients are until they are exchanged, and where their sums over the ranks are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from memkernels.optim.operators import square_sum
from memkernels.optim.sharded.layout import Bucket, Piece

_CHUNK = 1 << 18  # elements that are added up at a time


class Buffers:
    """Memory for buckets on their way, which is used again, but for that of buckets larger than `bucket_bytes`: a
    large parameter does not make the memory of all others as large."""

    def __init__(self, buckets: Sequence[Bucket], bucket_bytes: int, device: torch.device) -> None:
        self._usual = max((bucket.size for bucket in buckets if bucket.nbytes <= bucket_bytes), default=0)
        self._device = device
        self._free: dict[torch.dtype, list[Tensor]] = {}

    def stays(self, size: int) -> bool:
        """Whether memory of so many elements is kept once it is there."""
        return size <= self._usual

    def borrow(self, size: int, dtype: torch.dtype) -> Tensor:
        free = self._free.setdefault(dtype, []) if self.stays(size) else []
        memory = free.pop() if free else torch.empty(max(size, self._usual), dtype=dtype, device=self._device)
        return memory[:size]

    def give_back(self, buffer: Tensor) -> None:
        assert buffer._base is not None
        if buffer._base.numel() == self._usual:
            self._free[buffer.dtype].append(buffer._base)


class Gradients:
    """Of every bucket: `shards` are the sums over the ranks of this rank's range, in the parameters' dtype, where they
    are in memory, and `wire` is the dtype that it is sent in."""

    may_fail: ClassVar[bool] = False  # whether `square` and `sums` may, for a disk, on one rank alone
    shards: list[Tensor]
    wire: Sequence[torch.dtype]

    @abstractmethod
    def take(self, i: int, piece: Piece) -> None:
        """Has a parameter's gradient, where there is one, in bucket i's place for it; after `take` it may be freed."""

    @abstractmethod
    def to_send(self, i: int) -> Tensor:
        """Bucket i as it is sent; every piece was taken."""

    @abstractmethod
    def filler(self, i: int) -> Tensor:
        """What a rank sends of bucket i whose gradients nobody will use."""

    @abstractmethod
    def store(self, i: int, parts: Tensor) -> None:
        """Keeps the sum over the first dimension of parts (ranks, shard_size), which were sent to this rank."""

    @abstractmethod
    def sent(self, i: int, buffer: Tensor) -> None:
        """What `to_send` or `filler` gave is no longer needed."""

    @abstractmethod
    def clear(self, only_sums: bool) -> None:
        """No gradients; with `only_sums` nothing was taken since all of it was stored."""

    def sums(self) -> Iterator[Mapping[int, Tensor]]:
        """The sums by bucket, as many at a time as are in memory at once."""
        yield dict(enumerate(self.shards))

    def square(self) -> Tensor:
        """The sum of the squares of all sums, 0-dim float64."""
        return square_sum(self.shards) if self.shards else torch.zeros((), dtype=torch.float64)

    def multiply(self, factor: float) -> None:
        """Multiplies the sums."""
        for shard in self.shards:
            shard.mul_(factor)

    def copies(self) -> Any:
        """The sums; nothing was taken since all of it was stored."""
        return [shard.clone() for shard in self.shards]

    def put_back(self, sums: Any) -> None:
        """Makes the sums those that `copies` gave; there are no gradients."""
        for shard, kept in zip(self.shards, sums, strict=True):
            shard.copy_(kept)


class WholeGradients(Gradients):
    """Stage 1: gradients are views into buckets that stay, accumulate there and are sent from there.

    After an exchange this rank's range has the sum and all else is zero, so that what is added next is exchanged once.
    """

    def __init__(
        self, buckets: Sequence[Bucket], rank: int, buffers: Buffers, wire: Sequence[torch.dtype], device: torch.device
    ) -> None:
        self._buckets, self._rank, self._buffers, self.wire = buckets, rank, buffers, wire
        self._flat = [torch.zeros(bucket.size, dtype=bucket.dtype, device=device) for bucket in buckets]
        self.shards = [bucket.shard(flat, rank) for bucket, flat in zip(buckets, self._flat, strict=True)]
        for i, bucket in enumerate(buckets):
            for piece in bucket.pieces:
                self.take(i, piece)

    def take(self, i: int, piece: Piece) -> None:
        parameter, view = piece.parameter, self._buckets[i].view(self._flat[i], piece)
        if parameter.grad is None:
            parameter.grad = view
        elif parameter.grad.data_ptr() != view.data_ptr():  # the model's zero_grad() had set it to None
            view.add_(parameter.grad)
            parameter.grad = view

    def to_send(self, i: int) -> Tensor:
        flat = self._flat[i]
        return flat if flat.dtype == self.wire[i] else self._buffers.borrow(len(flat), self.wire[i]).copy_(flat)

    def filler(self, i: int) -> Tensor:
        return self.to_send(i)

    def store(self, i: int, parts: Tensor) -> None:
        flat, size = self._flat[i], self._buckets[i].shard_size
        if parts.data_ptr() == flat.data_ptr():  # of one rank
            return
        if parts.dtype == flat.dtype:
            torch.sum(parts, 0, out=self.shards[i])
        else:  # this rank's own, the sum of earlier backwards among it, is here as it was before it was rounded
            for own, sent in _chunks(self.shards[i], parts):
                total = own.float()
                for part in (*sent[: self._rank], *sent[self._rank + 1 :]):
                    total += part
                own.copy_(total)
        flat[: self._rank * size].zero_()
        flat[(self._rank + 1) * size :].zero_()

    def sent(self, i: int, buffer: Tensor) -> None:
        if buffer is not self._flat[i]:
            self._buffers.give_back(buffer)

    def clear(self, only_sums: bool) -> None:
        for zeroed in self.shards if only_sums else self._flat:
            zeroed.zero_()


class PassingGradients(Gradients):
    """Stage 2: a gradient is copied into a buffer of its bucket and freed; the sums are added to the ranges."""

    def __init__(
        self, buckets: Sequence[Bucket], buffers: Buffers, wire: Sequence[torch.dtype], shards: list[Tensor]
    ) -> None:
        self._buckets, self._buffers, self.wire, self.shards = buckets, buffers, wire, shards
        self._empty = set(range(len(buckets)))
        self._filling: dict[int, Tensor] = {}
        self._taken: set[int] = set()

    def take(self, i: int, piece: Piece) -> None:
        bucket, parameter = self._buckets[i], piece.parameter
        if i not in self._filling:
            buffer = self._filling[i] = self._buffers.borrow(bucket.size, self.wire[i])
            for first, last in bucket.gaps():
                buffer[first:last].zero_()
        view = bucket.view(self._filling[i], piece)
        if piece.place in self._taken:
            view.add_(0 if parameter.grad is None else parameter.grad)
        elif parameter.grad is None:
            view.zero_()
        else:
            view.copy_(parameter.grad)
        parameter.grad = None
        self._taken.add(piece.place)

    def to_send(self, i: int) -> Tensor:
        self._taken.difference_update(piece.place for piece in self._buckets[i].pieces)
        return self._filling.pop(i)

    def filler(self, i: int) -> Tensor:
        return self._buffers.borrow(self._buckets[i].size, self.wire[i])

    def store(self, i: int, parts: Tensor) -> None:
        add_up(self.shards[i], parts, is_empty=i in self._empty)
        self._empty.discard(i)

    def sent(self, i: int, buffer: Tensor) -> None:
        self._buffers.give_back(buffer)

    def clear(self, only_sums: bool) -> None:
        self._empty = set(range(len(self._buckets)))
        for buffer in self._filling.values():
            self._buffers.give_back(buffer)
        self._filling, self._taken = {}, set()
        for bucket in self._buckets:
            for piece in bucket.pieces:
                piece.parameter.grad = None

    def put_back(self, sums: Any) -> None:
        super().put_back(sums)
        self._empty.clear()


def add_up(shard: Tensor, parts: Tensor, *, is_empty: bool) -> None:
    """Adds the sum over the first dimension of parts to a rank's range, or with is_empty makes it that."""
    if is_empty and parts.dtype == shard.dtype:
        torch.sum(parts, 0, out=shard)
        return
    for own, sent in _chunks(shard, parts):
        total = _sum_of(sent)
        own.copy_(total if is_empty else own + total)


def _chunks(shard: Tensor, parts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A rank's range and what the ranks sent for it, so few elements at a time that those in float32 take no memory."""
    for first in range(0, len(shard), _CHUNK):
        yield shard[first : first + _CHUNK], parts[:, first : first + _CHUNK]


def _sum_of(parts: Tensor) -> Tensor:
    """Added up in float32; those in bfloat16 one by one, since torch would widen all of them first."""
    if parts.dtype == torch.float32:
        return parts.sum(0)
    total = parts[0].float()
    for part in parts[1:]:
        total += part
    return total
