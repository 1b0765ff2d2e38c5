"""Hooks that mark what memory is for: parameters, gradients, optimizer states, what autograd saves, offload."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from memkernels.offload import store
from memkernels.offload.tensors import plain_parts
from memkernels.profiling.categories import CATEGORIES
from memkernels.profiling.marks import mark, place


class Watch:
    """Marks what exists at `begin`, and from then to `end` what comes.

    The optimizers' hooks last from when it is made to `close`: they must not change while they are called, and `begin`
    and `end` may be called by another of them.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._hooked: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()
        self._names: dict[int, str] = {}
        self._depth = 0
        self._active = False
        self._step_handles = (
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        )

    def begin(self) -> None:
        self._mark_what_exists()
        for handle in (
            nn.modules.module.register_module_forward_pre_hook(self._enter),
            nn.modules.module.register_module_forward_hook(self._leave, always_call=True),
        ):
            self._stack.callback(handle.remove)
        self._watch_saved_tensors()
        store.watchers.add(self._put)
        self._stack.callback(store.watchers.discard, self._put)
        self._active = True

    def end(self) -> None:
        self._active = False
        self._stack.close()
        self._hooked.clear()
        self._names.clear()

    def close(self) -> None:
        for handle in self._step_handles:
            handle.remove()

    def _mark_what_exists(self) -> None:
        """Of all tensors in Python; of what only autograd holds nothing is known."""
        gc.collect()
        found: dict[tuple[torch.device, int], tuple[Tensor, str]] = {}

        def add(tensors: Iterable[Any], category: str) -> None:
            for tensor in tensors:
                for part in _parts(tensor):
                    before = found.get(place(part))
                    if before is None or CATEGORIES[category].rank > CATEGORIES[before[1]].rank:
                        found[place(part)] = part, category

        for held in gc.get_objects():
            if issubclass(type(held), Tensor):
                add([held], "temporary")
            elif issubclass(type(held), store.Stored) and not held.parts:  # which are found too
                self._count("kept", held)
            # Without its attribute the making of one failed, and somebody holds the error.
            elif issubclass(type(held), nn.Module) and hasattr(held, "_parameters"):
                self._hook_parameters(parameters := list(held.parameters(recurse=False)))
                add([*parameters, *held.buffers(recurse=False)], "parameters")
                add((p.grad for p in parameters), "gradients")
            elif issubclass(type(held), torch.optim.Optimizer) and hasattr(held, "param_groups"):
                self._hook_parameters(parameters := _parameters_of(held))
                add(parameters, "parameters")
                add((p.grad for p in parameters), "gradients")
                add(tree_leaves(list(held.state.values())), "optimizer")
        for (device, address), (tensor, category) in found.items():
            storage = tensor.untyped_storage()
            mark("alive", category, device, address, storage.nbytes())
            # The profiler does not see the end of CPU memory whose beginning it has not seen.
            self._stack.callback(weakref.finalize(storage, mark, "freed", device, address).detach)

    def _hook_parameters(self, parameters: Iterable[nn.Parameter]) -> None:
        for param in parameters:
            if id(param) not in self._hooked:
                self._hooked[id(param)] = param
                if param.requires_grad:
                    self._stack.callback(param.register_hook(_marks("gradients")).remove)

    def _watch_saved_tensors(self) -> None:
        """All pairs of hooks mark what they are given, those under which it begins too, and one below them all.

        Only the innermost pair is applied, and between `begin` and `end` blocks may end that began before. So pairs are
        put in the place of those there are, and none on top.
        """
        push, base = torch._C._autograd._push_saved_tensors_default_hooks, _MarkingPack(_same)

        def marking_push(pack: _Pack, unpack: _Unpack) -> None:
            push(_MarkingPack(pack), unpack)

        def restore() -> None:
            for pack, unpack in _pop_saved_tensors_hooks():
                if pack is not base:
                    push(pack.pack if isinstance(pack, _MarkingPack) else pack, unpack)

        before = _pop_saved_tensors_hooks()
        push(base, _same)
        for hooks in before:
            marking_push(*hooks)
        self._stack.callback(restore)
        self._stack.enter_context(
            mock.patch.object(torch._C._autograd, "_push_saved_tensors_default_hooks", marking_push)
        )

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._depth += 1
        if self._depth == 1:
            self._names = {id(child): name for name, child in module.named_modules()}
            new = [p for p in module.parameters() if id(p) not in self._hooked]
            self._hook_parameters(new)
            _mark_all([*new, *module.buffers()], "parameters")
            mark("phase", "forward")
        mark("enter", self._names.get(id(module), "") or type(module).__name__)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._depth == 0:
            return
        mark("leave")
        self._depth -= 1

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._active:
            _mark_all((p.grad for p in _parameters_of(optimizer)), "gradients")
            mark("phase", "optimizer")

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._active:
            _mark_all(_parameters_of(optimizer), "parameters")
            _mark_all(tree_leaves(list(optimizer.state.values())), "optimizer")
            mark("phase", "")

    def _put(self, stored: store.Stored) -> None:
        self._count("offloaded", stored)

    def _count(self, kind: str, stored: store.Stored) -> None:
        mark(kind, stored.nbytes)
        self._stack.callback(weakref.finalize(stored, mark, "offloaded", -stored.nbytes).detach)


_Pack = Callable[[Tensor], Any]
_Unpack = Callable[[Any], Tensor]


class _MarkingPack:
    def __init__(self, pack: _Pack) -> None:
        self.pack = pack

    def __call__(self, tensor: Tensor) -> Any:
        _mark_all([tensor], "activations")
        return self.pack(tensor)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _pop_saved_tensors_hooks() -> list[tuple[_Pack, _Unpack]]:
    """All of this thread's, the innermost last."""
    found = []
    while hooks := torch._C._autograd._top_saved_tensors_default_hooks(True):
        torch._C._autograd._pop_saved_tensors_default_hooks()
        found.append(hooks)
    return found[::-1]


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _parts(tensor: Any) -> Iterator[Tensor]:
    """Those with memory that it consists of; none of what is no tensor."""
    if not isinstance(tensor, Tensor) or tensor.device.type == "meta" or nn.parameter.is_lazy(tensor):
        return
    for part in plain_parts(tensor):
        if not _is_traced(part) and place(part)[1]:
            yield part


def _is_traced(tensor: Tensor) -> bool:
    """A tracer's tensor has no memory."""
    return isinstance(tensor, FakeTensor | FunctionalTensor) or torch._is_functional_tensor(tensor)


def _mark_all(tensors: Iterable[Any], category: str) -> None:
    for tensor in tensors:
        for part in _parts(tensor):
            mark("is", category, *place(part))


def _marks(category: str) -> Callable[[Tensor], None]:
    def on_tensor(tensor: Tensor) -> None:
        _mark_all([tensor], category)

    return on_tensor
