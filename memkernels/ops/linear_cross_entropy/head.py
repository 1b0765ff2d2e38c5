"""The head's products with a weight of any kind, a part of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from memkernels.ops.lora_linear.dropout import row_dropout
from memkernels.ops.lora_linear.projection import LoRAProjection, Tensors
from memkernels.ops.matmul import addmm, mm
from memkernels.ops.projection import DenseProjection, Projection
from memkernels.ops.quantized.operators import STORED
from memkernels.ops.quantized.products import encoding_of
from memkernels.ops.quantized.projection import QuantizedProjection

# A weight as the operators take it: the `Tensors` of an adapted weight, of which a plain one has only weight and bias;
# where W is quantised, what stores it, else no parts.
HEAD = f"Tensor?[] tensors, {STORED}, float scaling, float dropout_p"


class HeadArguments(NamedTuple):
    """The arguments of `HEAD`."""

    tensors: Sequence[Tensor | None]
    parts: Sequence[Tensor]
    kind: str
    sizes: Sequence[int]
    scaling: float
    dropout_p: float


def head_arguments(projection: Projection) -> HeadArguments:
    """A projection as the operators take it."""
    of, scaling, dropout_p = Tensors(None, None, None, None, None, None), 1.0, 0.0
    stored: tuple[Sequence[Tensor], str, Sequence[int]] = ((), "", ())
    if isinstance(projection, DenseProjection):
        of = of._replace(weight=projection.weight, bias=projection.bias)
    elif isinstance(projection, QuantizedProjection):
        of, stored = of._replace(bias=projection.bias), projection.stored
    else:
        assert isinstance(projection, LoRAProjection)
        of, scaling, dropout_p = projection.of, projection.description.scaling, projection.description.dropout_p
        stored = stored if projection.base is None else projection.base.stored
    return HeadArguments(of, *stored, scaling, dropout_p)


class Head:
    """logits = x W^T + bias for rows x (T, d), tile by tile over W's rows (V, d), each as `LoRAProjection` has it.

    s = (m * x) A^T is made once. With DoRA's scale g and dropout, logits = (x - m * x) W^T + g * ((m * x) W^T +
    scaling s B^T) + bias: two products, and m * x and x - m * x beside the tile, (T, d) each.
    """

    def __init__(self, x: Tensor, arguments: HeadArguments):
        self.x = x
        self.of = Tensors(*arguments.tensors)
        self.parts = arguments.parts
        self.encoding = (
            encoding_of(self.parts, arguments.kind, arguments.sizes, x.dtype) if self.of.weight is None else None
        )
        self.scaling = arguments.scaling
        self.mask = (self.of.seed, arguments.dropout_p, 0)

    @property
    def vocab_size(self) -> int:
        return self.of.weight.shape[0] if self.encoding is None else self.encoding.rows

    @cached_property
    def s(self) -> Tensor | None:
        """(T, r); None without an adapter."""
        return None if self.of.lora_a is None else torch.ops.memkernels.lora_down(self.x, self.of.lora_a, *self.mask)

    @property
    def scales_dropped(self) -> bool:
        return self.of.out_scale is not None and self.of.seed is not None

    @cached_property
    def scaled_x(self) -> Tensor:
        """What goes through W into DoRA's scale: m * x; without dropout all of x."""
        return row_dropout(self.x, *self.mask, self.x.dtype) if self.scales_dropped else self.x

    @cached_property
    def unscaled_x(self) -> Tensor | None:
        """What goes through W past DoRA's scale."""
        return self.x - self.scaled_x if self.scales_dropped else None

    @property
    def converts(self) -> bool:
        """Whether W's rows are made anew for a tile: dequantised, or cast, which autocast leaves to the head."""
        return self.encoding is not None or self.of.weight.dtype != self.x.dtype

    @property
    def column_size(self) -> int:
        """Elements that a tile holds for each of its columns: logits, and beside them a row of W that it converts."""
        rows, size = self.x.shape
        return rows + size if self.converts else rows

    def tiles(self, columns: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The tiles in turn: a slice of the vocabulary, W's rows of it, and their logits, in reused memory."""
        rows, size = self.x.shape
        buffer = self.x.new_empty(rows * columns)
        converted = self.x.new_empty(columns, size) if self.converts else None
        for start in range(0, self.vocab_size, columns):
            part = slice(start, min(start + columns, self.vocab_size))
            count = part.stop - part.start
            weight = self.of.weight[part] if converted is None else self._convert(part, converted[:count])
            logits = buffer[: rows * count].view(rows, count)
            self._fill(logits, part, weight)
            yield part, weight, logits

    def _convert(self, part: slice, out: Tensor) -> Tensor:
        if self.encoding is None:
            return out.copy_(self.of.weight[part])
        self.encoding.decode_(out, self.parts, part.start, 0)
        return out

    def _fill(self, logits: Tensor, part: slice, weight: Tensor) -> None:
        of, bias = self.of, None if self.of.bias is None else self.of.bias[part]
        if bias is None or of.out_scale is not None:
            mm(self.scaled_x, weight.t(), out=logits)
        else:
            addmm(bias, self.scaled_x, weight.t(), out=logits)
        if of.out_scale is not None:
            self._add_adapter(logits, part, of.out_scale[part], bias)
        elif self.s is not None:
            self._add_adapter(logits, part, None, None)
        if self.unscaled_x is not None:
            addmm(logits, self.unscaled_x, weight.t(), out=logits)

    def before_scale(self, part: slice, weight: Tensor) -> Tensor:
        """What DoRA's scale multiplies, a new tile."""
        y = mm(self.scaled_x, weight.t())
        self._add_adapter(y, part, None, None)
        return y

    def _add_adapter(self, y: Tensor, part: slice, out_scale: Tensor | None, bias: Tensor | None) -> None:
        """y = (y + scaling s B^T) * out_scale + bias."""
        torch.ops.memkernels.lora_up_add_(y, self.s, self.of.lora_b[part], self.scaling, out_scale, bias)
