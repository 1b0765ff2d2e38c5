"""What hooks on all modules tell of a running model: its parameters and buffers, and whether its last layers run."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from memkernels.offload.tensors import plain_parts, storage_id


class LayerWatch:
    """Follows the modules that the thread which began it calls.

    A stack is an `nn.ModuleList` or `nn.Sequential` of two or more modules of one class that has a forward, outside of
    any other stack of the module that is called outermost; its elements are that module's layers. A module without any,
    such as a loss, goes on where the model before it ended.

    Args:
        keep_last: how many calls of layers, the last of a call of the outermost module, `in_last_layers` is about.
        expected: how many calls of layers each outermost module makes; known after its first.
    """

    def __init__(self, keep_last: int, expected: weakref.WeakKeyDictionary[nn.Module, int]):
        self.owned: set[int] = set()  # storages of parameters and buffers
        self._keep_last = keep_last
        self._expected = expected
        self._depth = self._calls = self._layer_count = 0
        self._layers: set[int] = set()  # of the module that is called outermost
        self._layer_depth: int | None = None
        self._beside = _watches()
        self._beside.append(self)
        _hooks.begin()

    @property
    def in_last_layers(self) -> bool:
        """Whether the last layers have begun: they, and what runs after them, come first in backward."""
        return self._keep_last > 0 and self._calls > max(self._layer_count - self._keep_last, 0)

    def end(self) -> None:
        self._beside.remove(self)
        _hooks.end()

    def enter(self, module: nn.Module) -> None:
        self._depth += 1
        if self._depth == 1:
            self.owned = set(_storages(module))
            self._layers, self._layer_depth = {id(layer) for layer in _layers(module)}, None
            if self._layers:
                self._calls, self._layer_count = 0, self._expected.get(module, len(self._layers))
        if self._layer_depth is None and id(module) in self._layers:
            self._layer_depth = self._depth
            self._calls += 1

    def leave(self, module: nn.Module, output: Any) -> None:
        if self._depth == 0:
            return
        if self._layer_depth == self._depth:
            self._layer_depth = None
        self._depth -= 1
        if self._depth == 0 and self._layers and self._calls and output is not None:  # without an output it failed
            self._expected[module] = self._calls

    def leave_last_layers(self) -> None:
        """Backward has begun: what is saved from here on is of another pass."""
        if self._depth == 0:
            self._calls = self._layer_count = 0


_of_thread = threading.local()


def _watches() -> list[LayerWatch]:
    """Those of this thread."""
    found: list[LayerWatch] = vars(_of_thread).setdefault("watches", [])
    return found


def _enter(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():  # a graph has no place for it
        return
    for watch in _watches():
        watch.enter(module)


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for watch in _watches():
        watch.leave(module, output)


class _Hooks:
    """Those on all modules, there while anything is watched.

    Compiled graphs are guarded by the hooks and by their keys, so both are the same each time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._handles: tuple[RemovableHandle, RemovableHandle] | None = None

    def begin(self) -> None:
        with self._lock:
            self._count += 1
            if self._count > 1:
                return
            if self._handles is None:
                self._handles = (
                    nn.modules.module.register_module_forward_pre_hook(_enter),
                    nn.modules.module.register_module_forward_hook(_leave, always_call=True),
                )
                return
            before, after = self._handles
            places: list[tuple[RemovableHandle, Any, Any]] = [
                (before, before.hooks_dict_ref(), _enter),
                (after, after.hooks_dict_ref(), _leave),
                (after, after.extra_dict_ref[0](), True),
            ]
            for handle, dictionary, value in places:
                dictionary[handle.id] = value

    def end(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                for handle in self._handles or ():
                    handle.remove()


_hooks = _Hooks()


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    elements = list(module) if isinstance(module, nn.ModuleList | nn.Sequential) else []
    alike = len(elements) > 1 and len(set(map(type, elements))) == 1
    if alike and type(elements[0]).forward is not nn.Module.forward:
        yield from elements
    else:
        for child in module.children():
            yield from _layers(child)


def _storages(module: nn.Module) -> Iterator[int]:
    """Identities of the storages of all parameters and buffers."""
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            if not nn.parameter.is_lazy(tensor):
                yield from map(storage_id, plain_parts(tensor))
