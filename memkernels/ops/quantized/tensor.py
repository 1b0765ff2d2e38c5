"""A tensor that stands for values kept in few bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memkernels.ops.quantized.encoding import Encoding

aten = torch.ops.aten


class QuantizedTensor(torch.Tensor):
    """A frozen weight: the shape, dtype and device of its values, and their storage in the parts of an encoding.

    `.to(dtype)` changes the dtype in which the values come, not what is stored. A tensor of values that is copied into
    it is quantised. `torch.nn.functional.linear` and the block ops take it as a weight; any other computation first
    needs `dequantize()`. It shares along its first dimension, so that FSDP2 shards it.
    """

    encoding: Encoding

    @staticmethod
    def __new__(cls, encoding: Encoding, parts: Sequence[Tensor]):
        return torch.Tensor._make_wrapper_subclass(
            cls, encoding.shape, dtype=encoding.dtype, device=parts[0].device, requires_grad=False
        )

    def __init__(self, encoding: Encoding, parts: Sequence[Tensor]):
        self.encoding = encoding
        for name, part in zip(encoding.part_names, parts, strict=True):
            setattr(self, name, part)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.encoding.part_names)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, a plain tensor of their dtype or another."""
        return self.encoding.values(self.parts, dtype or self.dtype)

    def storage(self):
        """There is none: what writes a tensor's bytes from it, as safetensors does, asks for it first.

        Raises:
            TypeError: always.
        """
        kind = type(self).__name__
        raise TypeError(f"{kind} has no memory of its own: memkernels.quant.save_file writes it, or dequantize() it.")

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.encoding}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Encoding]:
        return list(self.encoding.part_names), self.encoding

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], encoding: Encoding, outer_size, outer_stride):
        return cls(encoding, [parts[name] for name in encoding.part_names])

    def __reduce_ex__(self, protocol):
        return _rebuilt, (type(self), self.encoding, self.parts, isinstance(self, torch.nn.Parameter))

    def __deepcopy__(self, memo):
        copy = _rebuilt(
            type(self), self.encoding, [part.clone() for part in self.parts], isinstance(self, torch.nn.Parameter)
        )
        memo[id(self)] = copy
        return copy

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            from memkernels.ops.quantized.op import quantized_linear

            return quantized_linear(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[override]
        if not all(issubclass(kind, (cls, Tensor)) for kind in types):
            return NotImplemented
        handler = _HANDLERS.get(function)
        if handler is None:
            raise NotImplementedError(f"{cls.__name__} stores a frozen weight and has no {function}: dequantize() it.")
        return handler(*args, **(kwargs or {}))

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """What FSDP2 gathers of this shard, and what it hands to `fsdp_post_all_gather`."""
        sharded, replicated = self.encoding.sharded_parts(self.parts)
        if mesh.size() == 1:  # where torch takes the first tensor alone
            sharded, replicated = sharded[:1], (*sharded[1:], *replicated)
        return sharded, (type(self), self.encoding, replicated, tuple(outer_size))

    @staticmethod
    def fsdp_post_all_gather(all_gather_outputs, metadata, param_dtype, *, out=None):
        """The whole weight over what was gathered."""
        cls, encoding, replicated, shape = metadata
        if out is not None:
            return None
        whole = encoding.with_shape(shape).with_dtype(param_dtype)
        return cls(whole, (*all_gather_outputs, *replicated)), all_gather_outputs


def check_frozen(weight: QuantizedTensor) -> None:
    if weight.requires_grad:
        raise ValueError("weight: a quantised weight has no gradient; set requires_grad to False.")


def _rebuilt(cls, encoding: Encoding, parts: Sequence[Tensor], is_parameter: bool) -> Tensor:
    tensor = cls(encoding, parts)
    return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _like(self: QuantizedTensor, encoding: Encoding, parts: Sequence[Tensor]) -> QuantizedTensor:
    return type(self)(encoding, parts)


def _same(self: QuantizedTensor, *args: Any, **kwargs: Any) -> QuantizedTensor:
    return _like(self, self.encoding, self.parts)


def _to_copy(self: QuantizedTensor, *, dtype=None, device=None, non_blocking=False, **kwargs: Any) -> QuantizedTensor:
    parts = [part.to(device=device, non_blocking=non_blocking) for part in self.parts]
    return _like(self, self.encoding.with_dtype(dtype or self.dtype), parts)


def _clone(self: QuantizedTensor, **kwargs: Any) -> QuantizedTensor:
    return _like(self, self.encoding, [part.clone() for part in self.parts])


def _copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(self, QuantizedTensor):
        assert isinstance(source, QuantizedTensor)
        return self.copy_(source.dequantize(self.dtype))
    if self.shape != source.shape:
        raise ValueError(f"copy_: expected shape {tuple(self.shape)}, got {tuple(source.shape)}.")
    if isinstance(source, QuantizedTensor) and source.encoding.with_dtype(self.dtype) == self.encoding:
        parts = source.parts
    else:
        values = source.dequantize() if isinstance(source, QuantizedTensor) else source
        parts = self.encoding.encode(values)
    for own, part in zip(self.parts, parts, strict=True):
        own.copy_(part, non_blocking=non_blocking)
    return self


def _slice(self: QuantizedTensor, dim: int = 0, start=None, end=None, step: int = 1) -> QuantizedTensor:
    first, last, step = slice(start, end, step).indices(self.shape[dim])
    if (first, last, step) == (0, self.shape[dim], 1):
        return _same(self)
    if dim != 0 or step != 1:
        raise NotImplementedError(f"{type(self).__name__} is sliced by whole rows, got dim {dim}, step {step}.")
    return _like(self, *self.encoding.row_slice(self.parts, first, max(first, last)))


def _split(self: QuantizedTensor, size: int, dim: int = 0) -> list[QuantizedTensor]:
    rows = self.shape[dim]
    if dim != 0 or rows % size:
        raise NotImplementedError(
            f"{type(self).__name__} is split by whole rows into equal parts, got {rows} of dim {dim} into parts of"
            f" {size}: to shard it, take a number of ranks that divides its first dimension."
        )
    return [_slice(self, 0, first, first + size) for first in range(0, rows, size)]


def _split_with_sizes(self: QuantizedTensor, sizes: Sequence[int], dim: int = 0) -> list[QuantizedTensor]:
    ends = list(itertools.accumulate(sizes))
    return [_slice(self, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _new_zeros(self: QuantizedTensor, size: Sequence[int], **kwargs: Any) -> Tensor:
    if kwargs.get("dtype") not in (None, self.dtype) or tuple(size[1:]) != tuple(self.shape[1:]):
        raise NotImplementedError(f"{type(self).__name__} has new_zeros of its own kind of rows, got {tuple(size)}.")
    return _like(self, *self.encoding.zeros(self.parts, size))


def _view(self: QuantizedTensor, size: Sequence[int], *args: Any) -> QuantizedTensor:
    shape = torch.empty(self.shape, device="meta").view(size).shape
    return _like(self, *self.encoding.reshaped(self.parts, tuple(shape)))


def _as_strided(self: QuantizedTensor, size, stride, storage_offset=None) -> QuantizedTensor:
    if tuple(size) != tuple(self.shape) or tuple(stride) != self.stride() or storage_offset:
        raise NotImplementedError(f"{type(self).__name__} has no other strides, got {tuple(size)}, {tuple(stride)}.")
    return _same(self)


def _is_pinned(self: QuantizedTensor, device=None) -> bool:
    return all(part.is_pinned() for part in self.parts)


def _pin_memory(self: QuantizedTensor, device=None) -> QuantizedTensor:
    return _like(self, self.encoding, [part.pin_memory() for part in self.parts])


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten._to_copy.default: _to_copy,
    aten.clone.default: _clone,
    aten.copy_.default: _copy_,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.new_zeros.default: _new_zeros,
    aten.view.default: _view,
    aten.as_strided.default: _as_strided,
    aten.is_pinned.default: _is_pinned,
    aten._pin_memory.default: _pin_memory,
}
torch.serialization.add_safe_globals([_rebuilt])
