"""A model's stack of layers, shortened where layers are alike: a trace takes as long for a hundred as for three.

What three equal layers in a row do to memory tells what any number of them does: each but the first and the last does
what the middle one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from memkernels.planner.trace import Event, Trace

_ENOUGH = 3  # layers that stand for a run of equal ones


@dataclass(frozen=True)
class Repeat:
    """Events from `first` to `last`, exclusive, that happen `times` times."""

    first: int
    last: int
    times: int


class ShortenedStack:
    """A model whose longest list of layers keeps three of each run of equal ones; `layers`: how many each stands for.

    Args:
        model: it is changed in place; parameters of the layers that are taken out go.
        trace: whose events those of the layers are.
        whole: keep all layers, as it must be where what one does to memory depends on its place.
    """

    def __init__(self, model: nn.Module, trace: Trace, *, whole: bool = False):
        self._trace = trace
        self._begins: dict[tuple[str, int], int] = {}
        stack = max(_stacks(model), key=len, default=nn.ModuleList())
        self.layers: list[tuple[nn.Module, int]] = []
        for _, run in groupby(stack, key=_signature):
            layers = list(run)
            if len(layers) > _ENOUGH and not whole:
                self.layers += [(layers[0], 1), (layers[1], len(layers) - 2), (layers[-1], 1)]
            else:
                self.layers += [(layer, 1) for layer in layers]
        del stack[:]
        stack.extend(layer for layer, _ in self.layers)
        for index, (layer, _) in enumerate(self.layers):
            layer.register_forward_pre_hook(self._mark("forward", index))
            layer.register_forward_hook(self._mark_backward(index))

    def events(self) -> Iterator[Event]:
        """Those of the trace, with those of the layers that were taken out."""
        recorded = self._trace.events
        position = 0
        for repeat in sorted(self._repeats(), key=lambda repeat: repeat.first):
            yield from recorded[position : repeat.first]
            for _ in range(repeat.times):
                yield from recorded[repeat.first : repeat.last]
            position = repeat.last
        yield from recorded[position:]

    def _repeats(self) -> Iterator[Repeat]:
        for index, (_, times) in enumerate(self.layers):
            if times > 1:
                yield Repeat(self._begins["forward", index], self._begins["forward", index + 1], times)
                yield Repeat(self._begins["backward", index], self._begins["backward", index - 1], times)

    def _mark(self, direction: str, index: int) -> Callable[..., None]:
        def mark(*_: Any) -> None:
            # A layer that is computed again in backward does not begin again.
            self._begins.setdefault((direction, index), len(self._trace.events))

        return mark

    def _mark_backward(self, index: int) -> Callable[..., None]:
        def mark(layer: nn.Module, args: Any, output: Any) -> None:
            hidden_states = output[0] if isinstance(output, tuple) else output
            if hidden_states.requires_grad:
                hidden_states.register_hook(self._mark("backward", index))

        return mark


def _stacks(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists of modules that are in no other."""
    if isinstance(module, nn.ModuleList):
        yield module
    else:
        for child in module.children():
            yield from _stacks(child)


def _signature(layer: nn.Module) -> tuple:
    """What layers that take the same memory have in common."""
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    kinds = tuple((name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors)
    return type(layer), kinds
