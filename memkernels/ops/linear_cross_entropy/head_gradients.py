"""Gradients through the head, from those of its logits a tile at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memkernels.ops.huge_pages import on_huge_pages
from memkernels.ops.linear_cross_entropy.head import Head
from memkernels.ops.lora_linear.dropout import row_dropout_add_
from memkernels.ops.matmul import add_product, addmm, mm


def new_gradient(like: Tensor | None, x: Tensor, wanted: bool) -> Tensor:
    """Memory for the gradient of a tensor, empty where none is wanted."""
    return like.new_empty(like.shape) if wanted and like is not None else x.new_empty(0)


class Wanted(NamedTuple):
    """Which gradients there shall be, in the operator's order."""

    x: bool
    weight: bool
    lora_a: bool
    lora_b: bool
    bias: bool
    out_scale: bool


class HeadGradients:
    """Those of x and of a head's weight, A, B, bias and DoRA's scale, as `wanted`.

    Of each tile of dlogits comes what belongs to its part of the vocabulary, complete: dW = dlogits^T x, dB =
    scaling dlogits^T s, and the sums of bias and scale. dx and p = scaling dlogits B are summed over the tiles in
    float32; p then gives dA = p^T (m * x) and dx its term m * (p A).
    """

    def __init__(self, head: Head, wanted: Sequence[bool]):
        self.head, self.wanted = head, Wanted(*wanted)
        x, of, wants = head.x, head.of, self.wanted
        self.wide_dtype = torch.promote_types(x.dtype, torch.float32)
        self.dweight = on_huge_pages(new_gradient(of.weight, x, wants.weight))
        self.dlora_a = new_gradient(None, x, False)  # comes from p at the end
        self.dlora_b = new_gradient(of.lora_b, x, wants.lora_b)
        self.dbias = new_gradient(of.bias, x, wants.bias)
        self.dout_scale = new_gradient(of.out_scale, x, wants.out_scale)
        self.dx = torch.zeros_like(x, dtype=self.wide_dtype) if wants.x else None
        # Of what DoRA's scale adds to the gradient through the dropped-out input.
        self.through = torch.zeros_like(self.dx) if self.dx is not None and head.scales_dropped else None
        self.product = torch.empty_like(x) if wants.x and self.wide_dtype != x.dtype else None
        self.p: Tensor | None = None
        if of.lora_b is not None and (wants.x or wants.lora_a):
            self.p = x.new_zeros(
                x.shape[0], of.lora_b.shape[1], dtype=torch.promote_types(of.lora_b.dtype, torch.float32)
            )

    def add(self, part: slice, weight: Tensor, dlogits: Tensor) -> None:
        """Adds a tile of dlogits, of a part of the vocabulary and W's rows of it."""
        head, g = self.head, self.head.of.out_scale
        if self.wanted.bias:
            self.dbias[part] = dlogits.sum(0, dtype=self.wide_dtype)
        if self.wanted.out_scale:
            self.dout_scale[part] = head.before_scale(part, weight).mul_(dlogits).sum(0, dtype=g.dtype)
        if self.p is not None or self.wanted.lora_b:
            self._add_adapter(part, dlogits, None if g is None else g[part])
        if not self.wanted.weight and self.dx is None:
            return
        scaled = dlogits if g is None else torch.mul(dlogits, g[part], out=torch.empty_like(dlogits))
        if self.wanted.weight:
            self._set_weight(part, scaled, dlogits)
        if self.dx is not None and self.through is None:
            add_product(self.dx, scaled, weight, self.wide_dtype, self.product)
        elif self.dx is not None and self.through is not None:
            add_product(self.dx, dlogits, weight, self.wide_dtype, self.product)
            torch.mul(dlogits, g[part] - 1, out=scaled)
            add_product(self.through, scaled, weight, self.wide_dtype, self.product)

    def _set_weight(self, part: slice, scaled: Tensor, dlogits: Tensor) -> None:
        """dweight, which autocast rounds as it does a weight's own cast."""
        head, cast = self.head, self.dweight.dtype != dlogits.dtype
        term = mm(scaled.t(), head.scaled_x, out=None if cast else self.dweight[part])
        if head.unscaled_x is not None:
            addmm(term, dlogits.t(), head.unscaled_x, out=term)
        if cast:
            self.dweight[part] = term

    def _add_adapter(self, part: slice, dlogits: Tensor, g: Tensor | None) -> None:
        """The scale goes to what is of B's size and dtype: dlogits may be narrower."""
        b = self.head.of.lora_b[part]
        s = self.head.s if self.wanted.lora_b else None
        scaled_b = b if g is None else (g[:, None] * b).to(b.dtype)
        p, db = torch.ops.memkernels.lora_up_grad(dlogits, s, scaled_b, self.head.scaling, self.p is not None)
        if self.p is not None:
            self.p.add_(p)
        if self.wanted.lora_b:
            self.dlora_b[part] = db if g is None else g[:, None] * db

    def results(self) -> list[Tensor]:
        """The gradients, empty where none is wanted."""
        x, of, mask = self.head.x, self.head.of, self.head.mask
        p = None if self.p is None else self.p.to(of.lora_b.dtype)
        if self.wanted.lora_a:
            self.dlora_a = torch.ops.memkernels.lora_down_grad(p, x, *mask)
        dx = x.new_empty(0) if self.dx is None else self.dx.to(x.dtype)
        if self.through is not None:
            through = self.through.to(x.dtype)
            torch.ops.memkernels.lora_input_add_(through, p, of.lora_a, None, 0.0, 0)
            row_dropout_add_(dx, through, *mask)
        elif self.dx is not None and p is not None:
            torch.ops.memkernels.lora_input_add_(dx, p, of.lora_a, *mask)
        return [dx, self.dweight, self.dlora_a, self.dlora_b, self.dbias, self.dout_scale]
