"""Projections that a family keeps apart, or as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from memkernels.integrations.linears import parts, weight_and_bias


def projected(module: Any, names: Sequence[str], x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """What the modules `names` make of x; where one module makes all, its output in parts of `sizes`."""
    if len(names) == len(sizes):
        return tuple(getattr(module, name)(x) for name in names)
    return getattr(module, names[0])(x).split(sizes, dim=-1)


def weights(module: Any, names: Sequence[str], roles: Sequence[str], sizes: Sequence[int]) -> dict[str, Any]:
    """Weights w_<role> and biases b_<role> of the linear modules `names`, or of the parts of one."""
    if len(names) == len(roles):
        pairs = [weight_and_bias(getattr(module, name)) for name in names]
    else:
        pairs = parts(getattr(module, names[0]), sizes)
    arguments: dict[str, Any] = {}
    for role, (weight, bias) in zip(roles, pairs, strict=True):
        arguments |= {f"w_{role}": weight, f"b_{role}": bias}
    return arguments
