"""NF4: 4 bits a value, the nearest of 16 quantiles of the normal distribution times the block's absolute maximum."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memkernels.ops.quantized.encoding import Encoding
from memkernels.ops.quantized.tensor import QuantizedTensor
from memkernels.quant.checks import check_values
from memkernels.quant.operators import nf4_dequantize_, nf4_quantize, nf4_quantize_absmax
from memkernels.quant.reference import NESTED_BLOCK, dequantize_absmax, nested_code

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_TWO_ZEROS = 0x77  # a byte of two codes of the value 0


@dataclass(frozen=True)
class NF4Encoding(Encoding):
    """Blocks of `block_size` neighbours, by rows; `nested`: their absolute maxima are in 8 bits."""

    kind = "nf4"

    block_size: int
    nested: bool

    @property
    def part_names(self) -> tuple[str, ...]:
        """packed (ceil(n / 2),) uint8; absmax (blocks,), float32, or nested uint8 codes of nested_code (256,) float32.

        Value of code * nested_absmax (ceil(blocks / 256),) + offset () is then a block's absmax, in float32.
        """
        return ("packed", "absmax", *(("nested_absmax", "nested_code", "offset") if self.nested else ()))

    @property
    def sizes(self) -> list[int]:
        return [self.rows, self.row_size, self.block_size]

    @classmethod
    def from_sizes(cls, sizes: Sequence[int], dtype: torch.dtype, num_parts: int) -> NF4Encoding:
        rows, row_size, block_size = sizes
        return cls((rows, row_size), dtype, block_size, num_parts == 5)

    def sharded_parts(self, parts: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return tuple(parts[:3]), tuple(parts[3:])

    @property
    def blocks(self) -> int:
        return -(-math.prod(self.shape) // self.block_size)

    def decode_(self, out: Tensor, parts: Sequence[Tensor], first_row: int, first_column: int) -> None:
        nf4_dequantize_(out, parts, self.block_size, self.row_size, first_row, first_column)

    def encode(self, values: Tensor) -> tuple[Tensor, ...]:
        return self.stored(*nf4_quantize(values.detach(), self.block_size))

    def stored(self, packed: Tensor, absmax: Tensor) -> tuple[Tensor, ...]:
        """The parts of blocks with these absolute maxima, float32."""
        offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
        # One pass where the mean says it: it is finite only if they all are, and may overflow where they are.
        if not (offset.isfinite() or absmax.isfinite().all()):
            raise ValueError("weight: expected finite values.")
        if not self.nested:
            return packed, absmax
        code = nested_code().to(absmax.device)
        codes, nested_absmax = nf4_quantize_absmax(absmax, offset, code)
        return packed, codes, nested_absmax, code, offset

    def row_slice(self, parts: Sequence[Tensor], first: int, last: int) -> tuple[NF4Encoding, tuple[Tensor, ...]]:
        """Of nested maxima that the slice does not take in whole blocks of 256, their values, in float32."""
        start, end = first * self.row_size, last * self.row_size
        if start % self.block_size or (end % self.block_size and last != self.rows):
            raise ValueError(
                f"rows {first} to {last} of {self.row_size} elements are not whole blocks of {self.block_size}."
            )
        start, end = start // self.block_size, -(-end // self.block_size)
        packed = parts[0][start * self.block_size // 2 : end * self.block_size // 2]
        shape = (last - first, *self.shape[1:])
        if not self.nested:
            return dataclasses.replace(self, shape=shape), (packed, parts[1][start:end])
        if self._is_nested_slice(first, last):
            nested_absmax = parts[2][start // NESTED_BLOCK : -(-end // NESTED_BLOCK)]
            return dataclasses.replace(self, shape=shape), (packed, parts[1][start:end], nested_absmax, *parts[3:])
        return dataclasses.replace(self, shape=shape, nested=False), (packed, dequantize_absmax(*parts[1:])[start:end])

    @property
    def has_whole_rows(self) -> bool:
        return self.row_size % self.block_size == 0

    def _is_nested_slice(self, first: int, last: int) -> bool:
        unit = NESTED_BLOCK * self.block_size
        return first * self.row_size % unit == 0 and (last == self.rows or last * self.row_size % unit == 0)

    def zeros(self, parts: Sequence[Tensor], shape: Sequence[int]) -> tuple[NF4Encoding, tuple[Tensor, ...]]:
        nested = self.nested and self._is_nested_slice(0, shape[0])
        like = dataclasses.replace(self, shape=tuple(shape), nested=nested)
        packed = parts[0].new_full(((math.prod(shape) + 1) // 2,), _TWO_ZEROS)
        if not nested:
            return like, (packed, packed.new_zeros(like.blocks, dtype=torch.float32))
        nested_absmax = parts[2].new_zeros(-(-like.blocks // NESTED_BLOCK))
        return like, (packed, parts[1].new_zeros(like.blocks), nested_absmax, parts[3].clone(), parts[4].clone())


class NF4Tensor(QuantizedTensor):
    """A frozen weight in NF4: 4.5 bits a value at block size 64, 4.127 with its absolute maxima in 8 bits.

    Shape, dtype and device are those of its values; its parts are attributes: `packed`, `absmax` and, nested,
    `nested_absmax`, `nested_code` and `offset`, as bitsandbytes computes them.
    """

    encoding: NF4Encoding
    packed: Tensor
    absmax: Tensor


torch.serialization.add_safe_globals([NF4Encoding, NF4Tensor])


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Tensor:
    """weight in NF4, as bitsandbytes quantises it.

    Each block of neighbours is divided by its largest magnitude, absmax, and each quotient becomes the nearest of 16
    values. With double_quant, absmax less its mean over all blocks is itself stored in 8 bits, in blocks of 256.
    Dettmers et al. 2023, arXiv 2305.14314.

    Args:
        weight: any shape, float32, bfloat16 or float16.
        block_size: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        double_quant: whether absmax takes 8 bits and a little a block, instead of 32.

    Returns:
        An `NF4Tensor` of weight's shape and dtype.

    Raises:
        TypeError: weight of another dtype.
        ValueError: another block size; weight without a dimension, or with an element that is not finite.
    """
    check_values(weight)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size: expected one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}.")
    encoding = NF4Encoding(tuple(weight.shape), weight.dtype, block_size, bool(double_quant))
    return NF4Tensor(encoding, encoding.encode(weight))


def quantize_nf4_pieces(pieces: Iterable[Tensor], shape: Sequence[int], dtype: torch.dtype) -> NF4Tensor:
    """`quantize_nf4` of a weight of `shape` whose values come in pieces, in the order of its memory.

    Its values have `dtype`. Beside it memory holds a piece, and what the one before left of a block.
    """
    block_size = 64
    encoding = NF4Encoding(tuple(shape), dtype, block_size, nested=True)
    packed = torch.empty((math.prod(shape) + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(encoding.blocks)
    rest, blocks = torch.empty(0), 0

    def store(values: Tensor) -> None:
        of_values = nf4_quantize(values, block_size)
        first = blocks * block_size // 2
        packed[first : first + len(of_values[0])], absmax[blocks : blocks + len(of_values[1])] = of_values

    for piece in pieces:
        values = torch.cat((rest.to(piece.dtype), piece.flatten())) if len(rest) else piece.flatten()
        whole = len(values) // block_size
        store(values[: whole * block_size])
        rest, blocks = values[whole * block_size :].clone(), blocks + whole
    store(rest)
    return NF4Tensor(encoding, encoding.stored(packed, absmax))
