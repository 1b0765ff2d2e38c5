"""What becomes of one module: the result of planning it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn


class Forward(partial):
    """A function as the forward of the module that is its first argument."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # accelerate's unwrap_model binds it to its module once more, and copy.deepcopy then to the copy of the module.
        if args and type(args[0]) is type(self.args[0]):
            return self.func(*args, **self.keywords, **kwargs)
        return self.func(*self.args, *args, **self.keywords, **kwargs)  # torch.compile traces no super() of a partial


@dataclass(frozen=True)
class Replacement:
    """`what` the module becomes by its new `forward` (None: it stays), and what is `left` and why (None: nothing)."""

    what: str
    forward: Forward | None = None
    left: str | None = None


def bind(function: Callable, module: nn.Module, **constants: object) -> Forward:
    """`function` as the module's forward.

    A partial and not a closure or a bound method: copy.deepcopy binds it to the copy, pickle finds the function by its
    name, and torch.compile traces it. inspect.signature shows the signature that it replaces.
    """
    forward = Forward(function, module, **constants)
    forward.__wrapped__ = type(module).forward  # type: ignore[attr-defined]
    return forward


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The arguments that the forward of a module's class takes by position; families order them differently."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return tuple(one.name for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)


def by_name(names: tuple[str, ...], args: tuple) -> dict[str, object]:
    """Arguments given by position, by name.

    Raises:
        TypeError: there are more of them than names.
    """
    if len(args) > len(names):
        raise TypeError(f"forward: it takes {len(names)} arguments by position, got {len(args)}.")
    return dict(zip(names, args, strict=False))


def why_left(fits: dict[str, bool]) -> str | None:
    """Why a layer is no op where not each of its sublayers, by name, `fits` one; None where each does."""
    others = " and ".join(name for name, fit in fits.items() if not fit)
    return f"{others} with a hook, or an adapter, weight or activation that no op takes" if others else None
