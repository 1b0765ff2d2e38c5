"""Row-wise int8: 8 bits a value, the nearest multiple of a 127th of the row's absolute maximum."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memkernels.ops.quantized.encoding import Encoding
from memkernels.ops.quantized.tensor import QuantizedTensor
from memkernels.quant.checks import check_values


@dataclass(frozen=True)
class Int8Encoding(Encoding):
    """Rows of int8 with a float32 absmax each; a row is what one index of all dimensions but the last takes."""

    kind = "int8"

    @property
    def part_names(self) -> tuple[str, ...]:
        """codes (..., K) int8; absmax (...) float32. A vector is a column: its codes are (N, 1)."""
        return "codes", "absmax"

    @property
    def sizes(self) -> list[int]:
        return [self.rows, self.row_size]

    @classmethod
    def from_sizes(cls, sizes: Sequence[int], dtype: torch.dtype, num_parts: int) -> Int8Encoding:
        return cls(tuple(sizes), dtype)

    @property
    def codes_shape(self) -> tuple[int, ...]:
        return self.shape if len(self.shape) > 1 else (*self.shape, 1)

    def reshaped(self, parts: Sequence[Tensor], shape: Sequence[int]) -> tuple[Int8Encoding, tuple[Tensor, ...]]:
        """Of the same rows; with others, as FSDP2 flattens a shard, the parts stay as they are."""
        like = dataclasses.replace(self, shape=tuple(shape))
        if like.codes_shape[-1] != self.codes_shape[-1]:
            return like, tuple(parts)
        return like, (parts[0].view(like.codes_shape), parts[1].view(like.codes_shape[:-1]))

    def decode_(self, out: Tensor, parts: Sequence[Tensor], first_row: int, first_column: int) -> None:
        rows = slice(first_row, first_row + out.shape[0])
        codes = parts[0][rows, first_column : first_column + out.shape[1]]
        torch.mul(codes, (parts[1][rows, None] / 127).to(torch.promote_types(out.dtype, torch.float32)), out=out)

    def encode(self, values: Tensor) -> tuple[Tensor, ...]:
        rows = values.detach().reshape(self.codes_shape)
        absmax = rows.abs().amax(-1).float() if rows.shape[-1] else rows.new_zeros(rows.shape[:-1]).float()
        if not absmax.isfinite().all():
            raise ValueError("weight: expected finite values.")
        scale = torch.where(absmax > 0, 127 / absmax, 0.0)[..., None]
        return torch.mul(rows, scale).round_().to(torch.int8), absmax

    def row_slice(self, parts: Sequence[Tensor], first: int, last: int) -> tuple[Int8Encoding, tuple[Tensor, ...]]:
        shape = (last - first, *self.shape[1:])
        return dataclasses.replace(self, shape=shape), (parts[0][first:last], parts[1][first:last])

    def zeros(self, parts: Sequence[Tensor], shape: Sequence[int]) -> tuple[Int8Encoding, tuple[Tensor, ...]]:
        like = dataclasses.replace(self, shape=tuple(shape))
        return like, (parts[0].new_zeros(like.codes_shape), parts[1].new_zeros(like.codes_shape[:-1]))

    def sharded_parts(self, parts: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return tuple(parts), ()


class Int8Tensor(QuantizedTensor):
    """A frozen weight in int8 with a float32 absmax a row: its parts are the attributes `codes` and `absmax`."""

    encoding: Int8Encoding
    codes: Tensor
    absmax: Tensor


torch.serialization.add_safe_globals([Int8Encoding, Int8Tensor])


def quantize_int8(weight: Tensor) -> Int8Tensor:
    """weight in int8, row by row: round(127 w / absmax), ties to even, absmax the row's largest magnitude.

    Dettmers et al. 2022, arXiv 2208.07339, section 2.1.

    Args:
        weight: (..., K), float32, bfloat16 or float16; a row is what one index of all dimensions but the last takes.

    Returns:
        An `Int8Tensor` of weight's shape and dtype.

    Raises:
        TypeError: weight of another dtype.
        ValueError: weight without a dimension, or with an element that is not finite.
    """
    check_values(weight)
    encoding = Int8Encoding(tuple(weight.shape), weight.dtype)
    return Int8Tensor(encoding, encoding.encode(weight))
