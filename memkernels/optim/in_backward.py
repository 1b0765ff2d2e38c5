"""The optimizer's step within backward, so that the gradients of a model never exist together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from memkernels.optim.checks import check_in_range
from memkernels.optim.clipping import clip_factor, total_norm, total_squares
from memkernels.optim.local import divided_as
from memkernels.optim.optimizer import LowMemoryOptimizer


class _Hook:
    """What autograd calls with a parameter whose gradient is complete; `micro_batch` knows such a parameter by it.

    It does not keep the stepper alive: Python's collector does not see what autograd's hooks hold.
    """

    def __init__(self, stepper: StepInBackward, group: int, index: int) -> None:
        self._stepper, self._group, self._index = weakref.ref(stepper), group, index

    @property
    def steps(self) -> bool:
        stepper = self._stepper()
        return stepper is not None and stepper.steps

    def __call__(self, param: Tensor) -> None:
        stepper = self._stepper()
        if stepper is None:
            raise RuntimeError("step_in_backward: keep what it returned for as long as the model trains.")
        stepper.on_gradient(self._group, self._index, param)


class StepInBackward:
    """What `step_in_backward` returns.

    `optimizer` is the optimizer, for schedulers, `param_groups` and `state_dict`; its `step` is not to be called, and
    it takes no further groups.
    `grad_norm` is the norm that the last `backward` clipped by.
    """

    def __init__(self, optimizer: LowMemoryOptimizer, max_norm: float | None) -> None:
        self.optimizer = optimizer
        self.max_norm = max_norm
        self.grad_norm: Tensor | None = None
        self._on_gradient: Callable[[int, int, Tensor], None] | None = self._step
        self._scale: float | Tensor = 1.0
        self._squares: list[Tensor] = []
        self._handles = []
        index = 0
        for number, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                if param.requires_grad or (param.is_floating_point() and not param.is_inference()):
                    self._handles.append(_register(param, _Hook(self, number, index)))
                index += 1
        optimizer.steps_in_backward = True
        if max_norm is not None:
            self._on_gradient = self._refuse

    @property
    def steps(self) -> bool:
        """Whether the next backward does more than add to the gradients."""
        return self._on_gradient is not None

    def on_gradient(self, group: int, index: int, param: Tensor) -> None:
        """The gradient of a parameter is complete."""
        if self._on_gradient is not None:
            self._on_gradient(group, index, param)

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()` with the steps; to be called in its place with `max_norm`, and after `accumulate`."""
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        if any(param.grad is not None for param in params):
            with self.accumulate():
                loss.backward()
            self.optimizer.step(max_norm=self.max_norm)
            self.optimizer.zero_grad()
            self.grad_norm = self.optimizer.grad_norm
            return
        if self.max_norm is None:
            loss.backward()
            return
        self._squares = []
        with self._calling(self._measure):
            # Of the leaves that others train, only the pass that steps adds to the gradients.
            loss.backward(retain_graph=True, inputs=[param for param in params if param.requires_grad])
        self.grad_norm = torch.stack(self._squares).sum().sqrt().float() if self._squares else total_norm([])
        self._scale = clip_factor(self.grad_norm, self.max_norm)
        with self._calling(self._step):
            loss.backward()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within it backward adds to the gradients and steps nothing: of a batch in parts, all but the last."""
        with self._calling(None):
            yield

    def remove(self) -> None:
        """Takes the hooks off the parameters: backward leaves gradients as without them."""
        self.optimizer.steps_in_backward = False
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def _calling(self, function: Callable[[int, int, Tensor], None] | None) -> Iterator[None]:
        before, self._on_gradient = self._on_gradient, function
        try:
            yield
        finally:
            self._on_gradient = before

    def _step(self, group: int, index: int, param: Tensor) -> None:
        try:
            self.optimizer.step_parameter(group, index, self._scale)
        finally:
            param.grad = None

    def _measure(self, group: int, index: int, param: Tensor) -> None:
        assert param.grad is not None
        self._squares += total_squares([divided_as(param, param.grad)])
        param.grad = None

    def _refuse(self, group: int, index: int, param: Tensor) -> None:
        param.grad = None
        raise RuntimeError(
            "max_norm: call backward(loss) of what step_in_backward returned, in place of loss.backward()."
        )


def _register(param: Tensor, hook: _Hook) -> RemovableHandle:
    """Has the hook on a frozen parameter too, for when it is trained: torch takes none while it is frozen."""
    trained = param.requires_grad
    param.requires_grad_(True)
    try:
        return param.register_post_accumulate_grad_hook(hook)
    finally:
        param.requires_grad_(trained)


def step_in_backward(
    model: Any, optimizer_class: type[LowMemoryOptimizer], *, max_norm: float | None = None, **defaults: Any
) -> StepInBackward:
    """Updates each parameter as soon as backward has its whole gradient, and frees the gradient at once.

        stepper = step_in_backward(model, AdamW, lr=1e-4, state_bits=8)
        for batch in batches:
            model(batch).loss.backward()  # the parameters are new after it; no step, no zero_grad

    The result is that of backward and then `optimizer.step()`; of the gradients one parameter's exists at a time, where
    they would take as much as the parameters. A batch in parts keeps its gradients from the first part on: all parts
    but the last run within `stepper.accumulate()`, and the last by `stepper.backward(loss)`.

    Clipping by the norm of all gradients together needs that norm before the first update, and the gradients are gone
    when it is known. `stepper.backward(loss)` therefore runs backward twice: one pass adds up the squares and frees
    each gradient, the other steps. That costs a backward more, and the graph lives on through the first pass; gradients
    never exist together, and the clipping is exact. Stepping at a guessed factor and mending the parameters afterwards
    is not offered: the updates of Adam and Lion are not linear in the factor and their moments are rounded, so it would
    need the old states or the gradients, which are what is saved here. Where gradients were accumulated they exist:
    then backward runs once, and the step follows it.

    Losses scaled by `torch.amp.GradScaler` are not supported, whose check needs all gradients first; nor wrappers that
    reduce gradients between ranks after they are complete, as DistributedDataParallel does. With activation
    checkpointing take `use_reentrant=False`.

    Args:
        model: a module, of which the parameters that have requires_grad now are trained; or what an optimizer takes as
            `params`, such as `model.named_parameters()`: of these, frozen ones are trained from when they are thawed.
        optimizer_class: an optimizer of this package.
        max_norm: clip the gradients by their norm; then call `stepper.backward(loss)`, not `loss.backward()`.
        defaults: the optimizer's arguments.

    Raises:
        TypeError: optimizer_class is not one of this package's optimizers.
        ValueError: max_norm is not positive; and what the optimizer raises.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, LowMemoryOptimizer)):
        raise TypeError(f"optimizer_class: expected an optimizer of memkernels.optim, got {optimizer_class!r}.")
    if max_norm is not None:
        check_in_range("max_norm", max_norm, 1e-38)
    params = model
    if isinstance(model, torch.nn.Module):
        params = [named for named in model.named_parameters() if named[1].requires_grad]
    return StepInBackward(optimizer_class(params, **defaults), max_norm)
