"""A projection whose dx is wanted before its input is there: what its adapter needs of that is kept from forward.

Given s, r elements a row, p, which dx takes, and the gradient of B come from one read of dy.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from memkernels.ops.dropped_projection import Dropped, DroppedProjection
from memkernels.ops.gradient_sum import GradientSum
from memkernels.ops.lora_linear.projection import LoRA, LoRAProjection, Tile
from memkernels.ops.projection import Description, Projection


def needs_low_rank(description: Description, needed: Sequence[bool]) -> bool:
    """Whether backward takes s, given which of the tensors have a gradient."""
    if isinstance(description, Dropped):
        return needs_low_rank(description.inner, needed[1:])
    if not isinstance(description, LoRA):
        return False
    wanted = description.named(needed)
    return bool(wanted.lora_b or wanted.out_scale)


def forward_and_low_rank(
    projection: Projection, x: Tensor, first_row: int, s: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """y, and s of an adapter, made from x unless it is given."""
    if isinstance(projection, DroppedProjection):
        return forward_and_low_rank(projection.inner, projection.dropped(x, first_row), first_row, s)
    if not isinstance(projection, LoRAProjection):
        return projection.forward(x, first_row), None
    s = projection.down(x, first_row) if s is None else s
    return projection.up(x, s, first_row), s


def input_grad_and_p(
    projection: Projection, dy: Tensor, s: Tensor | None, sums: Sequence[GradientSum | None], first_row: int
) -> tuple[Tensor, Tensor | None]:
    """dx, and p of an adapter, whose gradient of B is added to its sum."""
    if isinstance(projection, DroppedProjection):
        through, p = input_grad_and_p(projection.inner, dy, s, sums[1:], first_row)
        return projection.dropped(through, first_row), p
    if not isinstance(projection, LoRAProjection):
        return projection.input_grad(dy, None, first_row), None
    p = projection.add_b_gradient(dy, s, sums)
    return projection.input_grad_of(dy, p, None, first_row), p


def add_other_gradients(
    projection: Projection,
    dy: Tensor,
    x: Tensor,
    s: Tensor | None,
    p: Tensor | None,
    sums: Sequence[GradientSum | None],
    first_row: int,
) -> None:
    """Adds the gradients of the tensors; given p, all but that of B, which `input_grad_and_p` has added."""
    if all(total is None for total in sums):
        return
    if isinstance(projection, DroppedProjection):
        dropped = projection.dropped(x, first_row)
        add_other_gradients(projection.inner, dy, dropped, s, p, sums[1:], first_row)
    elif isinstance(projection, LoRAProjection):
        wanted = projection.description.named(sums)
        if p is not None:
            wanted = wanted._replace(lora_b=None)
        projection.add_gradients_of(Tile(dy, x, s, p, first_row), wanted, p_needed=False)
    else:
        projection.add_gradients(dy, x, sums, first_row)
