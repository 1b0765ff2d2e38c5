"""Parameters that torch.distributed.tensor divides among ranks: what of them is in this process.

DTensor is known by what it has: importing it takes seconds, which nobody spends who does not use it.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return is_traceable_wrapper_subclass(tensor) and hasattr(tensor, "to_local")


def division_of(tensor: Tensor) -> tuple[Any, Any] | None:
    """A DTensor's mesh and placements."""
    whole = cast(Any, tensor)
    return (whole.device_mesh, tuple(whole.placements)) if is_distributed(tensor) else None


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part, which shares memory; of a plain tensor itself. Without gradients."""
    return cast(Any, tensor).to_local() if is_distributed(tensor) else tensor


def divided_as(parameter: Tensor, grad: Tensor) -> Tensor:
    """A gradient that is divided as its parameter: where tensor parallelism leaves partial sums, their sum."""
    division = division_of(parameter)
    if division is None or division_of(grad) == division:
        return grad
    return cast(Any, grad).redistribute(*division)


def as_parameter(local: Tensor, parameter: Tensor) -> Tensor:
    """`local` as this rank's part of a tensor that is divided as the parameter is."""
    if not is_distributed(parameter):
        return local
    whole = cast(Any, parameter)
    return type(whole).from_local(
        local, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def first_element(parameter: Tensor) -> int:
    """Which of a parameter's elements, by the order of its dimensions, is the first that this rank has, where those
    that it has follow each other."""
    if not is_distributed(parameter):
        return 0
    chunks = cast(Any, parameter).__create_chunk_list__()
    first = 0
    for offset, size in zip(chunks[0].offsets, parameter.shape, strict=True) if chunks else ():
        first = first * size + offset
    return first
