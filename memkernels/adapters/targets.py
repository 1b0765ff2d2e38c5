"""The layers that PEFT's configuration gives an adapter, and the modules that it trains whole."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Targets:
    """PEFT's options of the same names; a text is a regular expression of whole names of layers, None is none.

    A name in a list is that of a layer, or its end after a dot. With `layers_to_transform`, what a list finds by the
    end counts in those layers of a model's stack alone: the number is behind a name in `layers_pattern`, or without it
    the first in the layer's name. `target_parameters` are names of parameters, or their ends after a dot.
    `modules_to_save` are ends of the names of modules that are trained whole.
    """

    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None

    def have(self, name: str) -> bool:
        """Whether the layer of this name has an adapter."""
        if _found(self.exclude_modules, name) or not _found(self.target_modules, name):
            return False
        numbers = self.layers_to_transform
        numbers = [numbers] if isinstance(numbers, int) else numbers
        whole = isinstance(self.target_modules, str) or name in (self.target_modules or ())
        return whole or not numbers or self._number(name) in numbers

    def _number(self, name: str) -> int | None:
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        expressions = [rf"(?:.*?\.)?{of}" for of in patterns or () if of] or [r".*?\.[^.]*"]
        matches = (re.match(rf"{expression}\.(?P<number>\d+)\.", name) for expression in expressions)
        # The first that matches counts, as in PEFT: without a number where it has alternatives that end before one.
        number = next((match["number"] for match in matches if match), None)
        return None if number is None else int(number)


def matches(name: str, targets: Iterable[str]) -> bool:
    """PEFT's rule: a target is a module's name, or the end of it after a dot."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _found(modules: str | list[str] | None, name: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return matches(name, modules or ())
