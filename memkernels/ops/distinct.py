"""Tensors that a Function is given twice, in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def distinct(*arguments: Any) -> tuple[Any, ...]:
    """The arguments of a Function; where it is traced, a view in the place of a tensor that is among those before it.

    Dynamo traces no Function that is given one tensor twice, as attention(q, q, q) and tied weights give it.
    """
    if not torch.compiler.is_compiling():
        return arguments
    given: list[Any] = []
    for argument in arguments:
        again = isinstance(argument, Tensor) and any(argument is other for other in given)
        given.append(argument.view_as(argument) if again else argument)
    return tuple(given)
