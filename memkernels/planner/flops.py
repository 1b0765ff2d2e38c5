"""Operations of operators, those of this package and torch's: two for each multiplication with addition.

The formulas of this package's operators are kept here and not in torch's registry, which is the process's own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, shape_wrapper

import memkernels.ops  # noqa: F401  defines the operators

_KERNELS = torch.ops.memkernels
Shape = tuple[int, ...]
_formulas: dict[Any, Callable[..., int]] = {}


def formula_of(operator: Any) -> Callable[..., int] | None:
    """Operations of a call, from its arguments and `out_val`, its result; None for what multiplies no matrices."""
    return _formulas.get(operator) or flop_registry.get(operator)


def _formula(operator: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorates the function that counts from the shapes of the operator's tensors."""

    def keep(count: Callable[..., int]) -> Callable[..., int]:
        _formulas[operator] = shape_wrapper(count)
        return count

    return keep


@_formula(_KERNELS.attention_fwd)
def _attention_fwd(q: Shape, k: Shape, v: Shape, *masks: Any, **_: Any) -> int:
    """Scores, and their product with v."""
    return 2 * _visible_pairs(q, k, masks) * (q[-1] + v[-1])


@_formula(_KERNELS.attention_bwd)
def _attention_bwd(
    dout: Shape, dlse: Any, q: Shape, k: Shape, v: Shape, out: Shape, lse: Shape, *masks: Any, **_: Any
) -> int:
    """Scores again, dq and dk; dv, and the gradient of the weights."""
    return 2 * _visible_pairs(q, k, masks) * (3 * q[-1] + 2 * v[-1])


@_formula(_KERNELS.gated_hidden_fwd)
def _gated_hidden_fwd(x: Shape, w_gate: Shape | None, w_up: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * math.prod(w_up) * (1 if w_gate is None else 2)


@_formula(_KERNELS.gated_hidden_bwd)
def _gated_hidden_bwd(dy: Shape, w_down: Shape, x: Shape, w_gate: Shape | None, w_up: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * math.prod(w_up) * (2 if w_gate is None else 3)


def _visible_pairs(q: Shape, k: Shape, masks: tuple) -> int:
    """Over all heads; of packed sequences (T, H, D), as if they were one."""
    batch, queries, heads = (1, *q[:2]) if len(q) == 3 else q[:3]
    keys = k[0] if len(k) == 3 else k[1]
    window_left, window_right = masks[8:10]
    return batch * heads * _pairs(queries, keys, window_left, window_right)


@functools.cache
def _pairs(queries: int, keys: int, left: int, right: int) -> int:
    """Of queries and the keys within their windows, whose last ones are aligned; -1: no bound."""
    total = 0
    for query in range(keys - queries, keys):
        first = 0 if left < 0 else max(0, query - left)
        last = keys if right < 0 else min(keys, query + right + 1)
        total += max(0, last - first)
    return total
