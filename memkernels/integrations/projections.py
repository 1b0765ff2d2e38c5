"""Projections that a family keeps apart, or as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def projected(module: Any, names: Sequence[str], x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """What the modules `names` make of x; where one module makes all, its output in parts of `sizes`."""
    if len(names) == len(sizes):
        return tuple(getattr(module, name)(x) for name in names)
    return getattr(module, names[0])(x).split(sizes, dim=-1)


def weights(module: Any, names: Sequence[str], roles: Sequence[str], sizes: Sequence[int]) -> dict[str, Any]:
    """Weights w_<role> and biases b_<role> of the plain linear modules `names`, or of the parts of one."""
    if len(names) == len(roles):
        modules = [getattr(module, name) for name in names]
        pairs = [(linear.weight, linear.bias) for linear in modules]
    else:
        linear = getattr(module, names[0])
        biases = (None,) * len(roles) if linear.bias is None else linear.bias.split(sizes)
        pairs = list(zip(linear.weight.split(sizes), biases, strict=True))
    arguments: dict[str, Any] = {}
    for role, (weight, bias) in zip(roles, pairs, strict=True):
        arguments |= {f"w_{role}": weight, f"b_{role}": bias}
    return arguments
