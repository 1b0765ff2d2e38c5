"""The gated MLP as one autograd Function over projections, tile by tile over tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memkernels.ops.gradient_sum import GradientSum
from memkernels.ops.projection import DenseProjection, Description, Projection


@dataclass(frozen=True)
class Plan:
    """What is static of one call. `gate` is None in the ungated form; `dtype` is that of the products."""

    gate: Description | None
    up: Description
    down: Description
    activation: str
    norm_eps: float
    tile_tokens: int
    fused: bool
    dtype: torch.dtype

    def split(self, flat: Sequence) -> list:
        """Per-tensor values, in the order of the Function's tensors, by gate, up and down."""
        parts, first = [], 0
        for description in (self.gate, self.up, self.down):
            count = 0 if description is None else description.num_tensors
            parts.append(tuple(flat[first : first + count]))
            first += count
        return parts

    def bind(self, tensors: Sequence[Tensor]) -> Layer:
        gate, up, down = self.split(tensors)
        return Layer(self, None if self.gate is None else self.gate.bind(gate), self.up.bind(up), self.down.bind(down))

    def tiles(self, tokens: int) -> Iterator[slice]:
        return (slice(first, first + self.tile_tokens) for first in range(0, tokens, self.tile_tokens))


@dataclass(frozen=True)
class Layer:
    """The three projections, and one tile's computations."""

    plan: Plan
    gate: Projection | None
    up: Projection
    down: Projection

    def norm(self, x: Tensor, norm_weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The input of gate and up, and rstd with a norm."""
        if norm_weight is None:
            return x, None
        n, _, rstd = torch.ops.memkernels.rms_norm_fwd(x, None, norm_weight, self.plan.norm_eps, 0.0)
        return n.to(self.plan.dtype), rstd

    def dense_hidden(self) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """Weights and biases of gate and up as `gated_hidden_fwd` takes them."""
        gate, up = self.gate, self.up
        assert isinstance(up, DenseProjection)
        if gate is None:
            return None, up.weight, None, up.bias
        assert isinstance(gate, DenseProjection)
        return gate.weight, up.weight, gate.bias, up.bias

    def hidden(self, n: Tensor) -> Tensor:
        """h = act(gate) * up."""
        if self.plan.fused:
            return torch.ops.memkernels.gated_hidden_fwd(n, *self.dense_hidden(), self.plan.activation)
        up = self.up.forward(n)
        if self.gate is None:
            return torch.ops.memkernels.gated_activation_fwd(up, None, self.plan.activation)
        return torch.ops.memkernels.gated_activation_fwd(self.gate.forward(n), up, self.plan.activation)

    def hidden_backward(self, dy: Tensor, n: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """h, dgate and dup, with gate and up recomputed; dgate is None in the ungated form."""
        if self.plan.fused:
            assert isinstance(self.down, DenseProjection)
            h, dgate, dup = torch.ops.memkernels.gated_hidden_bwd(
                dy, self.down.weight, n, *self.dense_hidden(), self.plan.activation
            )
            return h, None if self.gate is None else dgate, dup
        up = self.up.forward(n)
        gate = None if self.gate is None else self.gate.forward(n)
        dh = self.down.input_grad(dy)
        if gate is None:
            torch.ops.memkernels.gated_activation_bwd_(dh, up, None, self.plan.activation)
        else:
            torch.ops.memkernels.gated_activation_bwd_(dh, gate, up, self.plan.activation)
        return dh, gate, up

    def forward(self, x: Tensor, norm_weight: Tensor | None) -> Tensor:
        return self.down.forward(self.hidden(self.norm(x, norm_weight)[0]))

    def backward(self, dy: Tensor, x: Tensor, norm_weight: Tensor | None, gradients: Gradients) -> Tensor | None:
        """One tile: adds to the sums, returns dx where it is wanted."""
        n, rstd = self.norm(x, norm_weight)
        if not gradients.through_hidden:
            self.down.add_gradients(dy, self.hidden(n), gradients.down)
            return None
        h, dgate, dup = self.hidden_backward(dy, n)
        self.down.add_gradients(dy, h, gradients.down)
        del h
        self.up.add_gradients(dup, n, gradients.up)
        if self.gate is not None and dgate is not None:
            self.gate.add_gradients(dgate, n, gradients.gate)
        if not gradients.x and gradients.norm is None:
            return None
        dn = self.up.input_grad(dup)
        if self.gate is not None and dgate is not None:
            dn = self.gate.input_grad(dgate, into=dn)
        if norm_weight is None:
            return dn
        dx, dnorm_weight = torch.ops.memkernels.rms_norm_bwd(
            dn.to(x.dtype), None, x, norm_weight, rstd, 0.0, gradients.norm is not None
        )
        if gradients.norm is not None:
            gradients.norm.add(dnorm_weight)
        return dx if gradients.x else None


class Gradients:
    """Which gradients are wanted, and the sums of those of the parameters."""

    def __init__(self, plan: Plan, needs: Sequence[bool], norm_weight: Tensor | None, tensors: Sequence[Tensor],
                 tiles: int):  # fmt: skip
        self.x, norm, *needs_tensors = needs
        self.norm = GradientSum(norm_weight, tiles) if norm_weight is not None and norm else None
        self.flat = [
            GradientSum(tensor, tiles) if need else None for tensor, need in zip(tensors, needs_tensors, strict=True)
        ]
        self.gate, self.up, self.down = plan.split(self.flat)
        self.through_hidden = self.x or self.norm is not None or any(s is not None for s in self.gate + self.up)

    def results(self) -> list[Tensor | None]:
        """The gradients of norm_weight and of the tensors, in order."""
        return [None if total is None else total.result() for total in (self.norm, *self.flat)]


class _GatedMLP(torch.autograd.Function):
    """Saves x and the parameters; x is (..., d)."""

    @staticmethod
    def forward(ctx, plan, x, norm_weight, *tensors):
        ctx.plan = plan
        ctx.save_for_backward(x, norm_weight, *tensors)
        with torch.autocast(x.device.type, enabled=False):
            layer, rows = plan.bind(tensors), x.reshape(-1, x.shape[-1])
            if rows.shape[0] <= plan.tile_tokens:
                y = layer.forward(rows, norm_weight)
            else:
                y = rows.new_empty(rows.shape[0], layer.down.out_features, dtype=plan.dtype)
                for tile in plan.tiles(rows.shape[0]):
                    y[tile] = layer.forward(rows[tile], norm_weight)
        return y.view(*x.shape[:-1], layer.down.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        plan = ctx.plan
        x, norm_weight, *tensors = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            layer, rows, dy = plan.bind(tensors), x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            tokens = rows.shape[0]
            tiles = -(-tokens // plan.tile_tokens)
            gradients = Gradients(plan, ctx.needs_input_grad[1:], norm_weight, tensors, tiles)
            if tiles <= 1:
                dx = layer.backward(dy, rows, norm_weight, gradients)
            else:
                dx = torch.empty_like(rows) if gradients.x else None
                for tile in plan.tiles(tokens):
                    dx_tile = layer.backward(dy[tile], rows[tile], norm_weight, gradients)
                    if dx is not None:
                        dx[tile] = dx_tile
            return None, None if dx is None else dx.view(x.shape), *gradients.results()


def default_tile(tokens: int, size: int) -> int:
    """Tokens a tile: one tile of all below twice max(2048, 2 size), equal tiles of at least that from there on."""
    return max(1, -(-tokens // max(1, tokens // max(2048, 2 * size))))


def gated_mlp_block(
    x: Tensor,
    gate: Projection | None,
    up: Projection,
    down: Projection,
    *,
    activation: str,
    norm_weight: Tensor | None,
    norm_eps: float,
    tile_tokens: int | None,
    fused: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`ops.gated_mlp` over any projections, arguments checked.

    Args:
        fused: compute the hidden layer by `gated_hidden_fwd` and `gated_hidden_bwd`, which take dense projections only.
        dtype: that of the projections; x has it too, unless it has a norm in front.
    """
    projections = [projection for projection in (gate, up, down) if projection is not None]
    plan = Plan(
        gate=None if gate is None else gate.description,
        up=up.description,
        down=down.description,
        activation=activation,
        norm_eps=float(norm_eps),
        tile_tokens=tile_tokens or default_tile(x.shape[:-1].numel(), x.shape[-1]),
        fused=fused,
        dtype=dtype,
    )
    tensors = [tensor for projection in projections for tensor in projection.tensors]
    return _GatedMLP.apply(plan, x, norm_weight, *tensors)
