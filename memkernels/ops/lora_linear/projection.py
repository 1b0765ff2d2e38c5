"""The projection of a weight with a low-rank adapter, for `ops.lora_linear` and every block op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memkernels.ops.gradient_sum import GradientSum
from memkernels.ops.lora_linear import operators  # noqa: F401  defines the operators
from memkernels.ops.lora_linear.dropout import row_dropout, row_dropout_add_
from memkernels.ops.matmul import addmm, mm
from memkernels.ops.quantized.encoding import Encoding
from memkernels.ops.quantized.projection import QuantizedProjection

_TILE_TOKENS = 1024


@dataclass(frozen=True)
class LoRA:
    """What is static of an adapted weight. `base` is the encoding of a quantised one, whose parts come first."""

    scaling: float
    dropout_p: float
    has_bias: bool
    has_out_scale: bool
    base: Encoding | None = None

    @property
    def present(self) -> tuple[bool, ...]:
        """Which fields of `Tensors` there are."""
        return self.base is None, True, True, self.has_bias, self.has_out_scale, self.dropout_p > 0

    @property
    def num_parts(self) -> int:
        return 0 if self.base is None else len(self.base.part_names)

    @property
    def num_tensors(self) -> int:
        return self.num_parts + sum(self.present)

    def named(self, values: Sequence) -> Tensors:
        """Values of the tensors, one each, by the tensors' names; not those of a quantised weight's parts."""
        given = iter(values[self.num_parts :])
        return Tensors(*(next(given) if present else None for present in self.present))

    def bind(self, tensors: Sequence[Tensor]) -> LoRAProjection:
        return LoRAProjection(self, self.named(tensors), tuple(tensors[: self.num_parts]))


class Tensors(NamedTuple):
    """The tensors of an adapted weight, or a value for each; `weight` is None where it is quantised.

    `out_scale` is DoRA's magnitude over the rows' norms.
    """

    weight: Any
    lora_a: Any
    lora_b: Any
    bias: Any
    out_scale: Any
    seed: Any


class Tile(NamedTuple):
    """What backward has of rows of tokens: dy (rows, N), x (rows, K), and s and p (rows, r) where they are made."""

    dy: Tensor
    x: Any
    s: Tensor | None = None
    p: Tensor | None = None
    first_row: int = 0


class LoRAProjection:
    """y = x W^T + scaling s B^T + bias with s = (m * x) A^T, m the dropout mask over its keep probability.

    With DoRA's scale g, y = x W^T + bias + (g - 1) * ((m * x) W^T) + g * scaling s B^T: without dropout
    g * (x W^T + scaling s B^T) + bias.

    Backward with p = scaling (g * dy) B: dA = p^T (m * x), dB = scaling (g * dy)^T s, dx = (g * dy) W + m * (p A).
    `first_row` is the number of a tile's first row, from which the mask is made. Where the halves of backward are
    called apart s is made again from x, a product by r columns, and so is p, unless it is handed from one to the other.
    Where W is quantised, `parts` hold it, and `QuantizedProjection` multiplies by it.
    """

    def __init__(self, description: LoRA, of: Tensors, parts: tuple[Tensor, ...] = ()):
        self.description = description
        self.of = of
        self.base: QuantizedProjection | None = None
        if description.base is not None:
            # A scale comes between the product and the bias.
            self.base = QuantizedProjection(description.base, parts, of.bias if of.out_scale is None else None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        parts = () if self.base is None else self.base.parts
        return (*parts, *(tensor for tensor in self.of if tensor is not None))

    @property
    def out_features(self) -> int:
        return self.of.lora_b.shape[0]

    def down(self, x: Tensor, first_row: int = 0) -> Tensor:
        """s, (tokens, r)."""
        return torch.ops.memkernels.lora_down(x, self.of.lora_a, *self._mask(first_row))

    def up(self, x: Tensor, s: Tensor, first_row: int = 0) -> Tensor:
        """y, given s."""
        of = self.of
        if not self.scales_dropped:
            return self._up(x, s, of.bias, of.out_scale)
        dropped = self._dropped(x, first_row)
        y = self._up(dropped, s, of.bias, of.out_scale)
        if self.base is not None:
            return y.add_(self.base.forward(x - dropped))
        return addmm(y, x - dropped, of.weight.t(), out=y)

    def forward(self, x: Tensor, first_row: int = 0) -> Tensor:
        return self.up(x, self.down(x, first_row), first_row)

    def input_grad(self, dy: Tensor, into: Tensor | None = None, first_row: int = 0) -> Tensor:
        return self.input_grad_of(dy, self._up_grad(dy, None, True)[0], into, first_row)

    def add_b_gradient(self, dy: Tensor, s: Tensor | None, sums: Sequence[GradientSum | None]) -> Tensor:
        """Adds the gradient of B, where it is wanted, given s then; p, from the same read of dy."""
        b_sum = self.description.named(sums).lora_b
        p, db = self._up_grad(dy, None if b_sum is None else s, True)
        if b_sum is not None:
            b_sum.add(db)
        return p

    def add_gradients(self, dy: Tensor, x: Tensor, sums: Sequence[GradientSum | None], first_row: int = 0) -> None:
        self.add_gradients_and_p(dy, x, sums, first_row, p_needed=False)

    def add_gradients_and_p(
        self,
        dy: Tensor,
        x: Tensor,
        sums: Sequence[GradientSum | None],
        first_row: int,
        *,
        p_needed: bool,
    ) -> Tensor:
        """`add_gradients`; p, empty unless it is needed for them or outside."""
        wanted = self.description.named(sums)
        s = self.down(x, first_row) if wanted.lora_b is not None or wanted.out_scale is not None else None
        return self.add_gradients_of(Tile(dy, x, s, None, first_row), wanted, p_needed=p_needed)

    def backward(
        self, dy: Tensor, x: Tensor | None, s: Tensor | None, sums: Sequence[GradientSum | None], input_grad: bool
    ) -> Tensor | None:
        """Both halves at once, of a whole x, with forward's s: from one p. dx, or None where it is not wanted."""
        p = self.add_gradients_of(Tile(dy, x, s), self.description.named(sums), p_needed=input_grad)
        return self.input_grad_of(dy, p, None, 0) if input_grad else None

    @property
    def scales_dropped(self) -> bool:
        """Whether a scale goes to what comes through the dropped-out input, of which W too then multiplies a part."""
        return self.of.out_scale is not None and self.of.seed is not None

    def _mask(self, first_row: int) -> tuple[Tensor | None, float, int]:
        return self.of.seed, self.description.dropout_p, first_row

    def _dropped(self, x: Tensor, first_row: int) -> Tensor:
        return row_dropout(x, *self._mask(first_row), x.dtype)

    def _up(self, x: Tensor, s: Tensor, bias: Tensor | None, out_scale: Tensor | None) -> Tensor:
        b, scaling = self.of.lora_b, self.description.scaling
        if self.base is None:
            return torch.ops.memkernels.lora_up(x, self.of.weight, bias, s, b, scaling, out_scale)
        return torch.ops.memkernels.lora_quantized_up(x, *self.base.stored, bias, s, b, scaling, out_scale)

    def _base_grad(self, dy: Tensor, into: Tensor | None) -> Tensor:
        """dy W, new or added to `into`."""
        if self.base is not None:
            return self.base.input_grad(dy, into)
        weight = self.of.weight
        return mm(dy, weight) if into is None else addmm(into, dy, weight, out=into)

    def _up_grad(self, dy: Tensor, s: Tensor | None, p_needed: bool) -> tuple[Tensor, Tensor]:
        """p, and B's gradient. g goes to what is of B's size and dtype: dy may be narrower."""
        b, g = self.of.lora_b, self.of.out_scale
        b = b if g is None else (g[:, None] * b).to(b.dtype)
        p, db = torch.ops.memkernels.lora_up_grad(dy, s, b, self.description.scaling, p_needed)
        return p, db if g is None or s is None else (g[:, None] * db).to(db.dtype)

    def _scaled(self, dy: Tensor, less: float = 0.0) -> Tensor:
        """(g - less) * dy, in dy's dtype."""
        g = self.of.out_scale
        return dy if g is None else torch.mul(dy, g - less, out=torch.empty_like(dy))

    def add_gradients_of(self, tile: Tile, wanted: Tensors, *, p_needed: bool) -> Tensor:
        """Adds a tile's gradients to the sums of the tensors, where there is one; p, empty unless it is needed.

        s is given where B's or the scale's gradient is wanted, x where that of another is. p is made for A's too.
        """
        dy, x, s, p, first_row = tile
        if wanted.bias is not None:
            wanted.bias.add(dy.sum(0))
        if wanted.out_scale is not None:
            wanted.out_scale.add(self._out_scale_grad(dy, x, s, first_row))
        p_needed = p is None and (p_needed or wanted.lora_a is not None)
        if p_needed or wanted.lora_b is not None:
            made, db = self._up_grad(dy, None if wanted.lora_b is None else s, p_needed)
            p = made if p is None else p
            if wanted.lora_b is not None:
                wanted.lora_b.add(db)
        p = dy.new_empty(0) if p is None else p
        if wanted.lora_a is not None:
            wanted.lora_a.add(torch.ops.memkernels.lora_down_grad(p, x, *self._mask(first_row)))
        if wanted.weight is not None and self.scales_dropped:
            dropped = self._dropped(x, first_row)
            term = mm(self._scaled(dy).t(), dropped)
            wanted.weight.add(addmm(term, dy.t(), x - dropped, out=term))
        elif wanted.weight is not None:
            wanted.weight.add_product(self._scaled(dy), x)
        return p

    def base_grad(self, dy: Tensor, into: Tensor | None) -> Tensor:
        """(g * dy) W, new or added to `into`: dx but for the adapter's term."""
        return self._base_grad(self._scaled(dy), into)

    def input_grad_of(self, dy: Tensor, p: Tensor, into: Tensor | None, first_row: int) -> Tensor:
        """dx, given p."""
        of, mask = self.of, self._mask(first_row)
        if not self.scales_dropped:
            scaled = self._scaled(dy)
            if into is None and self.base is None:
                return torch.ops.memkernels.lora_input_grad(scaled, of.weight, p, of.lora_a, *mask)
            if into is None and self.base is not None:
                return torch.ops.memkernels.lora_quantized_input_grad(scaled, *self.base.stored, p, of.lora_a, *mask)
            dx = self._base_grad(scaled, into)
            torch.ops.memkernels.lora_input_add_(dx, p, of.lora_a, *mask)
            return dx
        dx = self._base_grad(dy, into)
        # What came through the dropped-out input beyond what x W^T has of it.
        through = self._base_grad(self._scaled(dy, 1.0), None)
        torch.ops.memkernels.lora_input_add_(through, p, of.lora_a, None, 0.0, 0)
        row_dropout_add_(dx, through, of.seed, self.description.dropout_p, first_row)
        return dx

    def _out_scale_grad(self, dy: Tensor, x: Any, s: Any, first_row: int) -> Tensor:
        """The sum over tokens of dy * ((m * x) W^T + scaling s B^T), which is recomputed tile by tile."""
        total = torch.zeros_like(self.of.out_scale)
        for first in range(0, x.shape[0], _TILE_TOKENS):
            tile = slice(first, first + _TILE_TOKENS)
            x_tile = self._dropped(x[tile], first_row + first)
            total.add_((self._up(x_tile, s[tile], None, None) * dy[tile]).sum(0, dtype=total.dtype))
        return total
