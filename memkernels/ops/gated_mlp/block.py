"""The gated MLP as one autograd Function over projections, tile by tile over tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memkernels.ops.autocast import without_autocast
from memkernels.ops.block_norm import Norm, NormDescription
from memkernels.ops.distinct import distinct
from memkernels.ops.gradient_sum import GradientSum, gradient_sums, results
from memkernels.ops.input_grad_first import (
    add_other_gradients,
    forward_and_low_rank,
    input_grad_and_p,
    needs_low_rank,
)
from memkernels.ops.once_differentiable import once_differentiable
from memkernels.ops.projection import DenseProjection, Description, Projection, split_by
from memkernels.ops.shared_input import add_gradients_all, forward_all, input_grad_all


@dataclass(frozen=True)
class Plan:
    """What is static of one call. `gate` is None in the ungated form; `dtype` is that of the products."""

    norm: NormDescription
    gate: Description | None
    up: Description
    down: Description
    post_norm: NormDescription
    activation: str
    tile_tokens: int
    fused: bool
    dtype: torch.dtype

    @property
    def parts(self) -> tuple[NormDescription | Description | None, ...]:
        """In the order of the Function's tensors."""
        return self.norm, self.gate, self.up, self.down, self.post_norm

    @property
    def num_tensors(self) -> int:
        return sum(part.num_tensors for part in self.parts if part is not None)

    def bind(self, tensors: Sequence[Tensor]) -> Layer:
        norm, gate, up, down, post_norm = split_by(self.parts, tensors)
        return Layer(
            self,
            self.norm.bind(norm),
            None if self.gate is None else self.gate.bind(gate),
            self.up.bind(up),
            self.down.bind(down),
            self.post_norm.bind(post_norm),
        )

    def needs_low_rank(self, needed: Sequence[bool]) -> bool:
        """Whether backward takes s of down's adapter, given which of the tensors have a gradient."""
        return needs_low_rank(self.down, split_by(self.parts, needed)[3])

    def num_tiles(self, tokens: int) -> int:
        return -(-tokens // self.tile_tokens)

    def tiles(self, tokens: int) -> Iterator[slice]:
        return (slice(first, first + self.tile_tokens) for first in range(0, tokens, self.tile_tokens))


@dataclass(frozen=True)
class Layer:
    """The norms and the three projections, and their computations over rows (tokens, d).

    `first` is a tile's first row in the whole.
    """

    plan: Plan
    norm: Norm
    gate: Projection | None
    up: Projection
    down: Projection
    post_norm: Norm

    def forward(self, rows: Tensor, keeps_low_rank: bool) -> tuple[Tensor, Tensor | None]:
        """y, (tokens, d), and s of down's adapter, (tokens, r), if it is kept."""
        if self.plan.num_tiles(rows.shape[0]) <= 1:
            y, s = self._forward_tile(rows, 0)
            return y, s if keeps_low_rank else None
        y = rows.new_empty(rows.shape[0], self.down.out_features, dtype=self.plan.dtype)
        kept: list[Tensor] = []
        for tile in self.plan.tiles(rows.shape[0]):
            y[tile], s = self._forward_tile(rows[tile], tile.start)
            if keeps_low_rank and s is not None:
                kept.append(s)
        return y, torch.cat(kept) if kept else None

    def backward(self, dy: Tensor, rows: Tensor, s: Tensor | None, gradients: Gradients) -> Tensor | None:
        """dx, None where it is not wanted; adds the gradients of the tensors to their sums."""
        if self.plan.num_tiles(rows.shape[0]) <= 1:
            return self._backward_tile(dy, rows, s, 0, gradients)
        dx = torch.empty_like(rows) if gradients.x else None
        for tile in self.plan.tiles(rows.shape[0]):
            s_tile = None if s is None else s[tile]
            dx_tile = self._backward_tile(dy[tile], rows[tile], s_tile, tile.start, gradients)
            if dx is not None and dx_tile is not None:
                dx[tile] = dx_tile
        return dx

    def _forward_tile(self, x: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        n = self.norm.forward(x)[0].to(self.plan.dtype)
        y, s = forward_and_low_rank(self.down, self._hidden(n, first), first)
        return self.post_norm.forward(y)[0], s

    def _backward_tile(
        self, dy: Tensor, x: Tensor, s: Tensor | None, first: int, gradients: Gradients
    ) -> Tensor | None:
        n, statistics = self.norm.forward(x)
        n = n.to(self.plan.dtype)
        if not gradients.through_hidden:
            h = self._hidden(n, first)
            dy = self._through_post_norm(dy, h, s, first, gradients)
            add_other_gradients(self.down, dy, h, s, None, gradients.down, first)
            return None
        dy, h, dys, p, low_rank = self._hidden_backward(dy, n, s, first, gradients)
        add_other_gradients(self.down, dy, h, s, p, gradients.down, first)
        del h, p
        sums = [gradients.up, gradients.gate][: len(dys)]
        of_dys = add_gradients_all(self._in_front, dys, n, sums, first, input_grad=gradients.through_norm, s=low_rank)
        del n
        if not gradients.through_norm:
            return None
        dn = input_grad_all(self._in_front, dys, of_dys, first)
        del dys
        return self.norm.backward(dn, x, statistics, gradients.norm)

    def _dense_hidden(self) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """Weights and biases of gate and up as `gated_hidden_fwd` takes them."""
        gate, up = self.gate, self.up
        assert isinstance(up, DenseProjection)
        if gate is None:
            return None, up.weight, None, up.bias
        assert isinstance(gate, DenseProjection)
        return gate.weight, up.weight, gate.bias, up.bias

    def _hidden(self, n: Tensor, first: int) -> Tensor:
        """h = act(gate) * up."""
        if self.plan.fused:
            return torch.ops.memkernels.gated_hidden_fwd(n, *self._dense_hidden(), self.plan.activation)
        return torch.ops.memkernels.gated_activation_fwd(*self._pair(n, first)[0], self.plan.activation)

    @property
    def _in_front(self) -> list[Projection]:
        """up and gate, or up alone."""
        return [self.up] if self.gate is None else [self.up, self.gate]

    def _pair(self, n: Tensor, first: int) -> tuple[tuple[Tensor, Tensor | None], dict[int, Tensor]]:
        """gate and up, or up and None if ungated; and s of their adapters, by place in `_in_front`."""
        (up, *gate), low_rank = forward_all(self._in_front, n, first)
        return ((gate[0], up) if gate else (up, None)), low_rank

    def _through_post_norm(self, dy: Tensor, h: Tensor, s: Tensor | None, first: int, gradients: Gradients) -> Tensor:
        """The gradient of the down product, which is recomputed where a norm follows it."""
        if self.post_norm.weight is None:
            return dy
        y, _ = forward_and_low_rank(self.down, h, first, s)
        return self.post_norm.backward(dy, y, self.post_norm.forward(y)[1], gradients.post_norm)

    def _hidden_backward(
        self, dy: Tensor, n: Tensor, s: Tensor | None, first: int, gradients: Gradients
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None, dict[int, Tensor]]:
        """The down product's gradient, h, and those of `_in_front`, recomputed; p of down's adapter, s of theirs."""
        if self.plan.fused:
            assert isinstance(self.down, DenseProjection)
            if self.post_norm.weight is not None:
                dy = self._through_post_norm(dy, self._hidden(n, first), s, first, gradients)
            h, dgate, dup = torch.ops.memkernels.gated_hidden_bwd(
                dy, self.down.weight, n, *self._dense_hidden(), self.plan.activation
            )
            return dy, h, [dup] if self.gate is None else [dup, dgate], None, {}
        pair, low_rank = self._pair(n, first)
        if self.post_norm.weight is not None:
            h = torch.ops.memkernels.gated_activation_fwd(*pair, self.plan.activation)
            dy = self._through_post_norm(dy, h, s, first, gradients)
            del h
        dh, p = input_grad_and_p(self.down, dy, s, gradients.down, first)
        torch.ops.memkernels.gated_activation_bwd_(dh, *pair, self.plan.activation)
        gate, up = pair
        return dy, dh, [gate] if up is None else [up, gate], p, low_rank


class Gradients:
    """Which gradients are wanted, and the sums of those of the tensors."""

    def __init__(self, plan: Plan, tensors: Sequence[Tensor], x: bool, needed: Sequence[bool], tokens: int):
        self.x = x
        self.sums = gradient_sums(tensors, needed, plan.num_tiles(tokens))
        self.norm: tuple[GradientSum | None, ...]
        self.norm, self.gate, self.up, self.down, self.post_norm = split_by(plan.parts, self.sums)
        self.through_norm = x or any(total is not None for total in self.norm)
        self.through_hidden = self.through_norm or any(total is not None for total in self.gate + self.up)


class _GatedMLP(torch.autograd.Function):
    """Saves x (..., d), s of an adapter of w_down, and the parameters."""

    @staticmethod
    def forward(ctx, plan, *arguments):
        ctx.plan = plan
        x, *tensors = arguments
        keeps_low_rank = plan.needs_low_rank(ctx.needs_input_grad[2:])
        with without_autocast(x):
            y, s = plan.bind(tensors).forward(x.reshape(-1, x.shape[-1]), keeps_low_rank)
        ctx.save_for_backward(x, s, *tensors)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        plan = ctx.plan
        x, s, *tensors = ctx.saved_tensors
        with without_autocast(x):
            rows = x.reshape(-1, x.shape[-1])
            x_needed, *needed = ctx.needs_input_grad[1:]
            gradients = Gradients(plan, tensors, x_needed, needed, rows.shape[0])
            dx = plan.bind(tensors).backward(dy.reshape(-1, dy.shape[-1]), rows, s, gradients)
            return None, dx.view(x.shape) if x_needed else None, *results(gradients.sums)


def default_tile(tokens: int, size: int) -> int:
    """Tokens a tile: one tile of all below twice max(2048, 2 size), equal tiles of at least that from there on."""
    return max(1, -(-tokens // max(1, tokens // max(2048, 2 * size))))


def gated_mlp_plan(
    x: Tensor,
    norm: Norm,
    gate: Projection | None,
    up: Projection,
    down: Projection,
    post_norm: Norm,
    *,
    activation: str,
    tile_tokens: int | None,
    fused: bool,
    dtype: torch.dtype,
) -> tuple[Plan, tuple[Tensor, ...]]:
    """The plan over any projections, arguments checked, and its tensors.

    Args:
        fused: compute the hidden layer by `gated_hidden_fwd` and `gated_hidden_bwd`, which take dense projections only.
        dtype: that of the projections; x has it too, unless it has a norm in front.
    """
    plan = Plan(
        norm=norm.description,
        gate=None if gate is None else gate.description,
        up=up.description,
        down=down.description,
        post_norm=post_norm.description,
        activation=activation,
        tile_tokens=tile_tokens or default_tile(math.prod(x.shape[:-1]), x.shape[-1]),
        fused=fused,
        dtype=dtype,
    )
    parts = [part for part in (norm, gate, up, down, post_norm) if part is not None]
    return plan, tuple(tensor for part in parts for tensor in part.tensors)


def gated_mlp_block(x: Tensor, plan: Plan, tensors: Sequence[Tensor]) -> Tensor:
    """`ops.gated_mlp` of a plan."""
    return _GatedMLP.apply(plan, *distinct(x, *tensors))
