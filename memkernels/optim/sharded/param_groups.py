"""Param groups of one optimizer and their counterparts in another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def with_parameters(group: dict[str, Any], parameters: Iterable[Tensor]) -> dict[str, Any]:
    """A group's options and names with other parameters."""
    return options_of(group) | {"params": list(zip(group["param_names"], parameters, strict=True))}


def copy_options(source: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]]) -> None:
    for of_source, of_target in zip(source, target, strict=True):
        of_target.update(options_of(of_source))


def named_parameters(groups: Sequence[dict[str, Any]]) -> list[tuple[str, Tensor, int]]:
    """All parameters by name and place in the optimizer."""
    names = [name for group in groups for name in group["param_names"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    return list(zip(names, parameters, range(len(parameters)), strict=True))
