"""What becomes of one module: the result of planning it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn


@dataclass(frozen=True)
class Replacement:
    """`what` the module becomes by its new `forward` (None: it stays), and what is `left` and why (None: nothing)."""

    what: str
    forward: partial | None = None
    left: str | None = None


def bind(function: Callable, module: nn.Module, **constants: object) -> partial:
    """`function` as the module's forward.

    A partial and not a closure or a bound method: copy.deepcopy binds it to the copy, pickle finds the function by its
    name, and torch.compile traces it. inspect.signature shows the signature that it replaces.
    """
    forward = partial(function, module, **constants)
    forward.__wrapped__ = type(module).forward  # type: ignore[attr-defined]
    return forward
