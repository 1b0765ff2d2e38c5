"""Projections of one input: their adapters read it together, once in forward and once in each half of backward.

Each function does what the projections' own would one after the other. s of adapted weights goes from the products,
which backward makes again, to the gradients; p goes from the half of backward that made it, from one read of dy with
the gradient of B where it may, to the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memkernels.ops.gradient_sum import GradientSum
from memkernels.ops.lora_linear.projection import LoRAProjection, Tile
from memkernels.ops.projection import Projection


class _Adapters(NamedTuple):
    """Adapters of one rank, dtype and dropout probability, each with a mask of its own, as operators take them."""

    lora_a: Tensor
    seeds: Tensor | None
    dropout_p: float

    def mask(self, first_row: int) -> tuple[Tensor | None, float, int]:
        return self.seeds, self.dropout_p, first_row


def _stacked(projections: Sequence[LoRAProjection]) -> _Adapters:
    dropout_p = projections[0].description.dropout_p
    seeds = torch.stack([projection.of.seed for projection in projections]) if dropout_p > 0 else None
    return _Adapters(torch.stack([projection.of.lora_a for projection in projections]), seeds, dropout_p)


def _groups(projections: Sequence[Projection]) -> tuple[dict[int, LoRAProjection], list[list[int]]]:
    """Of those that are adapted weights, by place; and the places of those that go together."""
    adapted = {i: of for i, of in enumerate(projections) if isinstance(of, LoRAProjection) and not of.scales_dropped}
    alike: dict[tuple, list[int]] = {}
    for i, projection in adapted.items():
        lora_a = projection.of.lora_a
        alike.setdefault((lora_a.shape, lora_a.dtype, projection.description.dropout_p), []).append(i)
    return adapted, [places for places in alike.values() if len(places) > 1]


def forward_all(
    projections: Sequence[Projection], x: Tensor, first_row: int = 0
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """y of each, (tokens, out), and s of adapted weights, by place."""
    adapted, groups = _groups(projections)
    s: dict[int, Tensor] = {}
    for places in groups:
        of = _stacked([adapted[i] for i in places])
        of_places = torch.ops.memkernels.lora_down_shared(x, of.lora_a, *of.mask(first_row))
        s |= zip(places, of_places, strict=True)
    y = []
    for i, projection in enumerate(projections):
        if isinstance(projection, LoRAProjection):
            if i not in s:
                s[i] = projection.down(x, first_row)
            y.append(projection.up(x, s[i], first_row))
        else:
            y.append(projection.forward(x, first_row))
    return y, s


def add_gradients_all(
    projections: Sequence[Projection],
    dys: Sequence[Tensor],
    x: Tensor,
    sums: Sequence[Sequence[GradientSum | None]],
    first_row: int = 0,
    *,
    input_grad: bool,
    s: Mapping[int, Tensor],
) -> dict[int, Tensor]:
    """Adds one tile's gradients to the sums of each, given s of all that share x; one alone makes its own without.

    With input_grad p of adapted weights, by place, for dx.
    """
    adapted, groups = _groups(projections)
    wanted = {i: projection.description.named(sums[i]) for i, projection in adapted.items()}
    p: dict[int, Tensor] = {}
    for places in groups:
        for i in places:
            tile = Tile(dys[i], x, s[i], None, first_row)
            p_needed = input_grad or wanted[i].lora_a is not None
            p[i] = adapted[i].add_gradients_of(tile, wanted[i]._replace(lora_a=None), p_needed=p_needed)
        trained = [i for i in places if wanted[i].lora_a is not None]
        if trained:
            mask = _stacked([adapted[i] for i in trained]).mask(first_row)
            of_trained = torch.stack([p[i] for i in trained])
            da = torch.ops.memkernels.lora_down_grad_shared(of_trained, x, *mask)
            for i, term in zip(trained, da, strict=True):
                wanted[i].lora_a.add(term)
    together = {i for places in groups for i in places}
    for i, projection in enumerate(projections):
        if i in together:
            continue
        if isinstance(projection, LoRAProjection) and i in s:
            tile = Tile(dys[i], x, s[i], None, first_row)
            p[i] = projection.add_gradients_of(tile, projection.description.named(sums[i]), p_needed=input_grad)
        elif isinstance(projection, LoRAProjection):
            p[i] = projection.add_gradients_and_p(dys[i], x, sums[i], first_row, p_needed=input_grad)
        else:
            projection.add_gradients(dys[i], x, sums[i], first_row)
    return p


def input_grad_all(
    projections: Sequence[Projection], dys: Sequence[Tensor], p: dict[int, Tensor], first_row: int = 0
) -> Tensor:
    """The sum of dx of each, given the p of `add_gradients_all`."""
    adapted, groups = _groups(projections)
    together = {i for places in groups for i in places}
    dx: Tensor | None = None
    for i, projection in enumerate(projections):
        if i in together:
            dx = adapted[i].base_grad(dys[i], dx)
        elif isinstance(projection, LoRAProjection):
            dx = projection.input_grad_of(dys[i], p[i], dx, first_row)
        else:
            dx = projection.input_grad(dys[i], dx, first_row)
    assert dx is not None
    for places in groups:
        adapters = _stacked([adapted[i] for i in places])
        of_places = torch.stack([p[i] for i in places])
        torch.ops.memkernels.lora_input_add_shared_(dx, of_places, adapters.lora_a, *adapters.mask(first_row))
    return dx
