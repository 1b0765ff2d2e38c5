"""Projections that a family keeps apart, or as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from memkernels.integrations.linears import parts, weight_and_bias


def projected(module: Any, names: Sequence[str | None], x: Tensor, sizes: Sequence[int]) -> tuple[Any, ...]:
    """What the modules `names` make of x, None where there is none; of one that makes all, its parts of `sizes`."""
    if len(names) > 1:
        return tuple(None if name is None else getattr(module, name)(x) for name in names)
    return getattr(module, str(names[0]))(x).split(sizes, dim=-1)


def weights(
    module: Any, x: Tensor, names: Sequence[str | None], roles: Sequence[str], sizes: Sequence[int]
) -> dict[str, Any]:
    """Weights w_<role> and biases b_<role> of the linear modules `names`, None of none, or of the parts of one.

    In a call with x.
    """
    pairs: Sequence[tuple[Any, Any]]
    if len(names) == len(roles):
        pairs = [(None, None) if name is None else weight_and_bias(getattr(module, name), x) for name in names]
    else:
        pairs = parts(getattr(module, str(names[0])), x, sizes)
    arguments: dict[str, Any] = {}
    for role, (weight, bias) in zip(roles, pairs, strict=True):
        arguments |= {f"w_{role}": weight, f"b_{role}": bias}
    return arguments
