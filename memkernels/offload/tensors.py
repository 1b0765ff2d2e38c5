"""Tensors by their memory: the parts that have some, and a range of a storage's bytes with what makes a tensor of them
again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_ALIGNMENT = 64  # of torch's CPU memory: kernels may sum in another order at another alignment


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory that a tensor consists of: itself, or those that a subclass wraps."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):
                yield from plain_parts(part)
    elif tensor.layout == torch.strided:
        yield tensor


def storage_id(tensor: Tensor) -> int:
    """What no other storage has while this one is there."""
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Span:
    """Bytes first to last (exclusive) of a storage."""

    first: int
    last: int

    @property
    def nbytes(self) -> int:
        return self.last - self.first

    def holds(self, other: Span) -> bool:
        return self.first <= other.first and other.last <= self.last


def span_of(tensor: Tensor) -> Span:
    """The bytes from a tensor's first element to its last; of an expanded one those that are there."""
    if tensor.numel() == 0:
        return Span(0, 0)
    size = tensor.element_size()
    first = int(tensor.storage_offset()) * size
    elements = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Span(first, first + elements * size)


def span_to_move(tensor: Tensor) -> Span:
    """The whole storage where the tensor spans half of it or more, so that the parts of one move once."""
    span, whole = span_of(tensor), int(tensor.untyped_storage().nbytes())
    if 2 * span.nbytes >= whole:
        return Span(0, whole)
    return Span(span.first // _ALIGNMENT * _ALIGNMENT, span.last)


def bytes_of(tensor: Tensor, span: Span) -> Tensor:
    """(n,) uint8: that part of the tensor's storage, not a copy."""
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), span.first, (span.nbytes,), (1,))


@dataclass(frozen=True)
class View:
    """How a tensor lies in the bytes that are kept of its storage."""

    dtype: torch.dtype
    device: torch.device
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # in elements
    conjugated: bool
    negated: bool

    @staticmethod
    def of(tensor: Tensor, span: Span) -> View:
        offset = int(tensor.storage_offset()) - span.first // tensor.element_size()
        conjugated = tensor.is_complex() and tensor.is_conj()
        return View(tensor.dtype, tensor.device, tensor.size(), tensor.stride(), offset, conjugated, tensor.is_neg())

    def tensor(self, data: Tensor) -> Tensor:
        """The tensor, over `data` itself where that is on its device, and of its version now and later."""
        data = data.to(self.device)
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        tensor = with_version_of(data, empty.set_(data.untyped_storage(), self.offset, self.size, self.stride))
        if self.conjugated:
            tensor = tensor.conj()
        return torch._neg_view(tensor) if self.negated else tensor


def with_version_of(counted: Tensor, values: Tensor) -> Tensor:
    """`values`, as a tensor that counts in-place changes together with `counted`."""
    tensor = counted.detach()
    tensor.data = values
    return tensor


def witness_of(tensor: Tensor) -> Tensor:
    """A tensor without memory that has the other's version, now and later."""
    if not is_traceable_wrapper_subclass(tensor):
        return with_version_of(tensor, tensor.new_empty(0))
    witness = tensor.detach()
    assert witness is not tensor
    for name in tensor.__tensor_flatten__()[0]:
        if isinstance(getattr(witness, name), Tensor):
            setattr(witness, name, None)
    return witness
